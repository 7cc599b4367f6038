#!/usr/bin/env bash
# Set up .venv with torch and deep_ep. Run by `make`, again whenever pyproject.toml changes.
#
# PYTHON chooses the interpreter (python3 unless set). Where that interpreter can import a torch that is recent enough,
# the environment uses it. Otherwise torch is installed: on a host with an NVIDIA GPU the usual build and the NCCL that goes
# with it, elsewhere the CPU build, because the usual one would pull gigabytes that nothing there could use.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
TORCH=2.13.0
CPU_BUILDS=https://download.pytorch.org/whl/cpu
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "deep_ep needs Python 3.10 or newer; set PYTHON to one" >&2; exit 1; }

has_recent_torch() { # has_recent_torch INTERPRETER
  "$1" -c 'import sys, torch; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11))' 2>/dev/null
}

if [ ! -x .venv/bin/python ]; then
  if has_recent_torch "$PYTHON"; then
    "$PYTHON" -m venv --system-site-packages .venv
  else
    "$PYTHON" -m venv .venv
  fi
fi

if has_recent_torch .venv/bin/python; then
  echo "using the torch that is installed"
elif command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
  pip install "torch>=2.14.1" -e ".[cu13]"
else
  # The first form takes a wheel that pip was configured to find; the second asks the place where PyTorch keeps CPU builds.
  pip install "torch==$TORCH+cpu" || pip install "torch==$TORCH+cpu" --index-url "$CPU_BUILDS" || {
    echo "no CPU build of torch $TORCH could be installed; install torch 2.11 or newer into .venv and run make again" >&2
    exit 1
  }
fi

pip install -e .
touch .venv/ready
