#!/usr/bin/env bash
# Pack what a GPU host that can install nothing lacks, to be carried there beside the working tree.
#
#   scripts/pack_gpu_host.sh [--sm 90] [--wheel NAME==VERSION]... [FOLDER]     FOLDER is .carry unless given
#
# For each pair of NCCL and nccl4py that this project supports: FOLDER/nccl-VERSION/ with a thin libnccl.so.2.xz (device
# code of one architecture), NCCL's headers, and the wheel of nccl4py for Python 3.12 on x86-64; about 25 MB a pair.
# FOLDER/wheels/ takes the wheels named with --wheel. scripts/gpu_host.sh FOLDER uses all of it. Run this where PyPI can
# be reached; a pair that is there already is left alone.
set -euo pipefail

PAIRS=(2.30.7:0.3.1.post1 2.32.3:0.6.0)
PYTHON=${PYTHON:-python3}
scripts=$(cd "$(dirname "$0")" && pwd)

architecture=90 folder=.carry wheels=()
while [ $# -gt 0 ]; do
  case $1 in
    --sm) architecture=$2; shift 2 ;;
    --wheel) wheels+=("$2"); shift 2 ;;
    -*) sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
    *) folder=$1; shift ;;
  esac
done

download() { # download INTO REQUIREMENT...
  local into=$1
  shift
  "$PYTHON" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_18_x86_64 \
    --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d "$into" "$@"
}

for pair in "${PAIRS[@]}"; do
  nccl=${pair%%:*} nccl4py=${pair#*:}
  packed=$folder/nccl-$nccl
  if [ -e "$packed" ]; then
    echo "$packed is there already"
    continue
  fi
  # Everything is made in a folder of its own and renamed whole, so that an interrupted run leaves no half pack behind.
  mkdir -p "$folder"
  making=$(mktemp -d "$folder/making.XXXXXX")
  trap 'rm -rf "$making"' EXIT
  mkdir "$making/pack"
  download "$making" "nvidia-nccl-cu13==$nccl"
  download "$making/pack" "nccl4py==$nccl4py"
  "$PYTHON" -m zipfile -e "$making"/nvidia_nccl_cu13-*.whl "$making/wheel"
  "$PYTHON" "$scripts/thin_nccl.py" "$making/wheel/nvidia/nccl/lib/libnccl.so.2" "$making/pack/libnccl.so.2.xz" --sm "$architecture"
  mv "$making/wheel/nvidia/nccl/include" "$making/pack/include"
  chmod -R u+rwX,go+rX "$making/pack"
  mv "$making/pack" "$packed"
  rm -rf "$making"
done

if [ ${#wheels[@]} -gt 0 ]; then
  mkdir -p "$folder/wheels"
  download "$folder/wheels" "${wheels[@]}"
fi
du -sh "$folder"/*
