#!/usr/bin/env bash
# Fetch what tests/unit/test_compile_matrix.py compiles with, beside the CUDA 13.0 that .venv has. Run by `make toolkits`.
#
#   scripts/make_toolkits.sh [FOLDER]     FOLDER is .toolkits unless given
#
# FOLDER/cuda-VERSION/ gets nvcc and NVRTC of the newest CUDA 13 on PyPI (450 MB), FOLDER/nccl-VERSION/include the headers of
# each NCCL that this project supports (1 MB; the wheels of 200 to 350 MB around them are thrown away). What is there
# already stays; an older "newest" is removed.
set -euo pipefail

NCCL_VERSIONS=(2.30.7 2.32.3)
PYTHON=${PYTHON:-python3}
folder=${1:-.toolkits}
mkdir -p "$folder"
work=$(mktemp -d "$folder/fetching.XXXXXX") # beside its target, so that finished folders can be renamed into place
trap 'rm -rf "$work"' EXIT
pip() { "$PYTHON" -m pip --disable-pip-version-check -q "$@"; }

# The toolkit's own wheel is a list of others, a few kB: its name says which version is the newest.
pip download --no-deps --dest "$work" 'cuda-toolkit==13.*'
newest=$(basename "$work"/cuda_toolkit-*.whl | cut -d- -f2)
if [ ! -d "$folder/cuda-$newest" ]; then
  pip install --target "$work/cuda" "cuda-toolkit[nvcc,cccl,cudart,nvrtc]==$newest"
  rm -rf "$folder"/cuda-*
  mv "$work/cuda" "$folder/cuda-$newest"
fi

for version in "${NCCL_VERSIONS[@]}"; do
  if [ ! -d "$folder/nccl-$version" ]; then
    pip download --no-deps --no-cache-dir --dest "$work" "nvidia-nccl-cu13==$version"
    "$PYTHON" -m zipfile --extract "$work"/nvidia_nccl_cu13-"$version"-*.whl "$work/wheel"
    mkdir -p "$work/nccl-$version"
    mv "$work/wheel/nvidia/nccl/include" "$work/nccl-$version/include"
    mv "$work/nccl-$version" "$folder/nccl-$version"
    rm -rf "$work/wheel" "$work"/*.whl
  fi
done
du -sh "$folder"/cuda-* "$folder"/nccl-*
