#!/usr/bin/env bash
# GPU tests and measurements on a host with two GPUs that can install nothing.
#
#   scripts/gpu_host.sh [--carried FOLDER] [--nccl VERSION]... [STEP...]
#
#   --carried  what scripts/pack_gpu_host.sh made (.carry unless given)
#   --nccl     a packed version to put over the one that torch loads; several are tried one after the other; none leaves
#              the host's own. The library is replaced in place, since torch loads it by its path; the original stays
#              beside it as libnccl.so.2.original.
#   STEP       of: device elastic2 elastic8 example sanitizer repeat bench; all of them unless given
#
# Every step has a time limit and goes on after a failure of the one before. A short table comes last; the exit code is 0
# if all steps passed. The full log is $OUT/gpu_host.log if OUT is set, else in a new folder that the table names. For a
# longer swarm set SEEDS (first:last).
set -euo pipefail
cd "$(dirname "$0")/.."

# NVLink multicast stays off: on a shared host, a program that dies while using it can take the GPUs down with it.
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1

ALL_STEPS=(device elastic2 elastic8 example sanitizer repeat bench)
SEEDS=${SEEDS:-0:40}
logs=${OUT:-$(mktemp -d)}
carried=.carry versions=() steps=()
while [ $# -gt 0 ]; do
  case $1 in
    --carried) carried=$2; shift 2 ;;
    --nccl) versions+=("$2"); shift 2 ;;
    -*) sed -n '2,15s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
    *) steps+=("$1"); shift ;;
  esac
done
[ ${#steps[@]} -gt 0 ] || steps=("${ALL_STEPS[@]}")
[ ${#versions[@]} -gt 0 ] || versions=(host)

ranks() { # ranks N ARGUMENT...: torchrun with N ranks
  local count=$1
  shift
  python3 -m torch.distributed.run --standalone --nproc-per-node "$count" "$@"
}

# A finding is an error. Failed calls of the driver are not reported: libraries probe for what a driver may lack.
sanitize() { # sanitize TOOL
  EP_USE_NVIDIA_TOOLS=1 EP_JIT_WITH_LINEINFO=1 compute-sanitizer --tool "$1" --report-api-errors no \
    --target-processes all --error-exitcode 9 python3 -m torch.distributed.run --standalone --nproc-per-node 2 tests/elastic/small_case.py
}

step_device() { python3 -m pytest tests/device -m gpu -p no:cacheprovider; }
step_elastic2() { ranks 2 -m tests.elastic.worker --machine cuda --seeds "$SEEDS" --largest 200; }
step_elastic8() { NCCL_MULTI_RANK_GPU_ENABLE=1 ranks 8 -m tests.elastic.worker --machine cuda --seeds "$SEEDS"; }
step_example() { ranks 2 examples/moe_layer.py --hidden 1024; }
step_sanitizer() { sanitize memcheck && sanitize racecheck; }
step_repeat() { ranks 2 -m benchmarks.ep --repeat 200; }
step_bench() { ranks 2 -m benchmarks.ep --json "$logs/bench.json"; }

limit_of() { # the seconds that a step may take
  case $1 in
    sanitizer | elastic8 | bench) echo 240 ;;
    *) echo 150 ;;
  esac
}

use_nccl() { # use_nccl VERSION: put a packed NCCL and its nccl4py in place
  local pack=$carried/nccl-$1 nccl
  [ -d "$pack" ] || { echo "$pack is not there; scripts/pack_gpu_host.sh makes it" >&2; exit 2; }
  nccl=$(python3 -c 'import nvidia.nccl; print(list(nvidia.nccl.__path__)[0])')
  [ -e "$nccl/lib/libnccl.so.2.original" ] || cp -p "$nccl/lib/libnccl.so.2" "$nccl/lib/libnccl.so.2.original"
  python3 - "$pack/libnccl.so.2.xz" "$nccl/lib/libnccl.so.2.new" <<'PYTHON'
import lzma, shutil, sys
with lzma.open(sys.argv[1]) as packed, open(sys.argv[2], "wb") as library:
    shutil.copyfileobj(packed, library, 1 << 24)
PYTHON
  mv -f "$nccl/lib/libnccl.so.2.new" "$nccl/lib/libnccl.so.2"
  cp -r "$pack/include/." "$nccl/include/"
  install_wheels "$pack"/*.whl
}

packages=$(mktemp -d)
trap 'rm -rf "$packages"' EXIT
PYTHONPATH=$packages:$PYTHONPATH
install_wheels() { python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$packages" "$@"; }

export SEEDS logs
export -f ranks sanitize
for step in "${ALL_STEPS[@]}"; do export -f "step_$step"; done
for step in "${steps[@]}"; do
  declare -F "step_$step" >/dev/null || { echo "no step '$step'; steps are: ${ALL_STEPS[*]}" >&2; exit 2; }
done
mkdir -p "$logs"
if compgen -G "$carried/wheels/*.whl" >/dev/null; then install_wheels "$carried"/wheels/*.whl; fi

log=$logs/gpu_host.log table=() failed=0
for version in "${versions[@]}"; do
  [ "$version" = host ] || use_nccl "$version"
  for step in "${steps[@]}"; do
    echo "== $step (NCCL: $version)" | tee -a "$log"
    log_start=$(($(wc -c <"$log") + 1)) started=$SECONDS code=0
    # torchrun gives its ranks 30 seconds to end before it kills them, so that none is left to hold a GPU.
    timeout --kill-after 45 "$(limit_of "$step")" bash -c "set -euo pipefail; step_$step" >>"$log" 2>&1 || code=$?
    case $code in
      0) verdict=passed ;;
      124 | 137) verdict="TIMED OUT" ;;
      *) verdict="FAILED ($code)" ;;
    esac
    [ "$code" -eq 0 ] && num_lines=4 || num_lines=40 failed=1
    tail -c "+$log_start" "$log" | tail -n "$num_lines"
    table+=("$(printf '%-10s %-8s %-12s %4d s' "$step" "$version" "$verdict" $((SECONDS - started)))")
  done
done

printf '\n%-10s %-8s %-12s %6s\n' step NCCL result time
printf '%s\n' "${table[@]}" "full log: $log"
exit "$failed"
