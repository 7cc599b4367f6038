#!/usr/bin/env bash
# Fetch what the compile matrix (tests/unit/test_compile_matrix.py) needs beside .venv, into .toolkits: the newest CUDA 13
# and the headers of both versions of NCCL. About 700 MB are downloaded, once. Run by `make`, after scripts/make_venv.sh.
set -euo pipefail
cd "$(dirname "$0")/.."

NCCL_VERSIONS=(2.30.7 2.32.3)
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }

mkdir -p .toolkits
# Everything is made in a folder of its own and renamed whole, so that an interrupted run leaves nothing half done.
making=$(mktemp -d .toolkits/making.XXXXXX)
trap 'rm -rf "$making"' EXIT

if ! compgen -G ".toolkits/cuda-*" >/dev/null; then
  pip install -q --target "$making/cuda" 'cuda-toolkit[nvcc,cccl,cudart,nvrtc]>=13.1,<14'
  version=$(basename "$making"/cuda/cuda_toolkit-*.dist-info .dist-info)
  mv "$making/cuda" ".toolkits/cuda-${version#cuda_toolkit-}"
fi

for version in "${NCCL_VERSIONS[@]}"; do
  if [ ! -d ".toolkits/nccl-$version" ]; then
    pip download -q --no-deps -d "$making" "nvidia-nccl-cu13==$version"
    .venv/bin/python -m zipfile -e "$making"/nvidia_nccl_cu13-"$version"-*.whl "$making/wheel"
    mkdir "$making/nccl"
    mv "$making/wheel/nvidia/nccl/include" "$making/nccl/include"
    mv "$making/nccl" ".toolkits/nccl-$version"
    rm -rf "$making/wheel"
  fi
done
touch .toolkits/ready
