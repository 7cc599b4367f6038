#!/usr/bin/env bash
# GPU tests and measurements on a host with two GPUs that can install nothing.
#
#   scripts/gpu_host.sh [--carried FOLDER] [--nccl VERSION]... [--within SECONDS] [STEP or GROUP...]
#   scripts/gpu_host.sh --list
#
#   --carried  what scripts/pack_gpu_host.sh made (.carry unless given)
#   --nccl     a packed version to put over the one that torch loads; several are tried one after the other; none leaves
#              the host's own. The library is replaced in place, since torch loads it by its path; the original stays
#              beside it as libnccl.so.2.original.
#   --within   for all of it together: what would begin later is not run, and what runs then is stopped
#   --list     says which steps and groups there are, and does nothing; without any named, all of them run
#
# Steps run one after the other, each within its own limit, and go on after a failure of the one before. A short table
# comes last; the exit code is 0 if all steps passed. The full log is $OUT/gpu_host.log if OUT is set, else in a new folder
# that the table names. SEEDS and TRIPS (first:last) say which round trips elastic2, elastic8 and trips make, SANITIZED
# what the sanitizers look at (what torchrun is to start).
set -euo pipefail
cd "$(dirname "$0")/.."

# NVLink multicast stays off: on a shared host, a program that dies while using it can take the GPUs down with it.
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1

SEEDS=${SEEDS:-0:40} TRIPS=${TRIPS:-0:10000} SANITIZED=${SANITIZED:-tests/elastic/small_case.py}

# step, group, seconds that it may take
STEPS='
precompile  correct    120
device      correct    150
machine     correct    150
elastic2    correct    150
ways        correct    150
streams     correct    150
graphs      correct    240
mishaps     correct    150
mishaps3    more       240
importers   correct    100
bad_input   correct    100
worlds      more       300
gradients   more       300
elastic8    more       240
covering    more       300
examples    more       300
trips       trips      570
memcheck    sanitizers 240
racecheck   sanitizers 240
synccheck   sanitizers 240
initcheck   sanitizers 240
repeat      speed      150
bench       speed      420
bench_check speed      180
bench_model speed      300
bench_sm    speed       60
bench_trace speed      100
'

ranks() { # ranks N ARGUMENT...: torchrun with N ranks
  local count=$1
  shift
  python3 -m torch.distributed.run --standalone --nproc-per-node "$count" "$@"
}

# Two ranks of a job in tests/elastic, which are told to use the GPUs.
elastic() { # elastic JOB ARGUMENT...
  local job=$1
  shift
  ranks 2 -m "tests.elastic.$job" --machine cuda "$@"
}

# A finding is an error. Failed calls of the driver are not reported: libraries probe for what a driver may lack. Every
# tensor gets memory of its own, or what lies just behind it, and what it held before, would be another tensor's.
sanitize() { # sanitize TOOL [OPTION...]
  # shellcheck disable=SC2086  # SANITIZED may be several words
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 EP_JIT_WITH_LINEINFO=1 compute-sanitizer --tool "$@" --print-limit 100 \
    --report-api-errors no --target-processes all --error-exitcode 9 \
    python3 -m torch.distributed.run --standalone --nproc-per-node 2 $SANITIZED
}

# So that the steps after it are not the ones that pay for it. With and without the sanitizers' line numbers.
step_precompile() {
  for lineinfo in 0 1; do
    EP_JIT_WITH_LINEINFO=$lineinfo python3 -c 'import deep_ep; print(deep_ep.precompile(), "kernels")'
  done
}
step_device() { python3 -m pytest tests/device -m gpu -p no:cacheprovider; }
step_machine() { ranks 2 tests/unit/test_machine_greet.py; }
step_elastic2() { elastic worker --seeds "$SEEDS" --largest 200 --longest 8192; }
step_elastic8() { NCCL_MULTI_RANK_GPU_ENABLE=1 ranks 8 -m tests.elastic.worker --machine cuda --seeds "$SEEDS"; }
step_ways() { elastic ways; }
step_streams() { elastic streams; }
step_graphs() { elastic graphs; }
step_mishaps() { elastic mishaps; }
step_mishaps3() { NCCL_MULTI_RANK_GPU_ENABLE=1 ranks 3 -m tests.elastic.mishaps --machine cuda; } # two live on
step_importers() { elastic importers; }
step_bad_input() { EP_BUFFER_DEBUG=1 elastic bad_calls; }
step_worlds() { # the same ways in other surroundings
  CUDA_DEVICE_MAX_CONNECTIONS=1 elastic ways
  PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True EP_AVOID_RECORD_STREAM=1 elastic ways
  EP_REUSE_NCCL_COMM=0 EP_USE_NVIDIA_TOOLS=1 elastic ways
  PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True elastic graphs --replays 200
}
step_gradients() {
  elastic gradients --backend aot_eager
  elastic gradients --backend inductor
}
step_covering() { elastic worker --covering : --check-memory; }
step_examples() { # with what a host has that can install nothing
  ranks 2 examples/moe_layer.py
  ranks 2 examples/train_moe.py --plain
  ranks 2 examples/decode.py
}
step_trips() { elastic worker --seeds "$TRIPS" --check-memory; }
step_memcheck() { sanitize memcheck; }
step_racecheck() { sanitize racecheck; }
step_synccheck() { sanitize synccheck; }
# The first of two ranks alone: while the second is under this tool, NCCL does not come back from registering a window.
# Findings are counted by where they are, and ours are those in our kernels (docs/contributing.md says what others are).
step_initcheck() {
  local found=$logs/initcheck.log ours='(at|Device Frame:) .*(deep_ep(_|::)|\.cuh:)' # by its entry, an inlined function, or a line
  export TOOL="compute-sanitizer --tool initcheck --print-limit 100000 --report-api-errors no
    --kernel-name-exclude kns=ncclDevKernel"
  # shellcheck disable=SC2016  # the rank's shell expands it
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 EP_JIT_WITH_LINEINFO=1 ranks 2 --no-python bash -c \
    '[ "$RANK" -eq 0 ] || TOOL=; exec $TOOL python3 '"$SANITIZED" >"$found" 2>&1 || { tail -n 40 "$found"; return 1; }
  awk '/Uninitialized/ { what = $0; if (!/Memcpy/) getline what; gsub(/0x[0-9a-f]+/, "", what); print what }' "$found" | sort | uniq -c | sort -rn
  grep "round trips" "$found" || true # that it came to its end, its exit code has said
  if grep -qE "$ours" "$found"; then
    echo "uninitialised memory was read by a kernel of ours:"
    grep -m 5 -B 1 -A 3 -E "$ours" "$found"
    return 1
  fi
}
step_repeat() { ranks 2 -m benchmarks.ep --repeat 200; }
step_bench() { ranks 2 -m benchmarks.ep --json "$logs/bench.json"; } # benchmarks.report draws it, where matplotlib is
step_bench_check() { # against the committed reference; a new one, to be committed if it is right, stays in the logs
  cp benchmarks/reference.json "$logs"
  ranks 2 -m benchmarks.ep --reference benchmarks/reference.json --write-reference "$logs/reference.json"
}
step_bench_model() { ranks 2 -m benchmarks.ep --check-model --json "$logs/bench_model.json"; }
step_bench_trace() { ranks 2 -m benchmarks.ep --trace "$logs/bench_trace.json"; }
step_bench_sm() { python3 -m benchmarks.sm --json "$logs/bench_sm.json"; }

known() { awk -v what="$1" 'NF && (what == "" || $1 == what || $2 == what)' <<<"$STEPS"; } # lines of STEPS
limit_of() { awk -v step="$1" '$1 == step { print $3 }' <<<"$STEPS"; }

logs=${OUT:-$(mktemp -d)}
carried=.carry versions=() steps=() within=1000000
while [ $# -gt 0 ]; do
  case $1 in
    --carried) carried=$2; shift 2 ;;
    --nccl) versions+=("$2"); shift 2 ;;
    --within) within=$2; shift 2 ;;
    --list) known ""; exit 0 ;;
    -*) sed -n '2,19s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
    *)
      found=$(known "$1" | awk '{ print $1 }')
      [ -n "$found" ] || { echo "no step or group '$1'; --list says which there are" >&2; exit 2; }
      # shellcheck disable=SC2206  # names have no spaces
      steps+=($found)
      shift
      ;;
  esac
done
# shellcheck disable=SC2207
[ ${#steps[@]} -gt 0 ] || steps=($(known "" | awk '{ print $1 }'))
[ ${#versions[@]} -gt 0 ] || versions=(host)

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

export SEEDS TRIPS SANITIZED logs
# shellcheck disable=SC2046
export -f ranks elastic sanitize $(known "" | awk '{ print "step_" $1 }')
mkdir -p "$logs"
if compgen -G "$carried/wheels/*.whl" >/dev/null; then install_wheels "$carried"/wheels/*.whl; fi

# Of what a step wrote only the beginning and the end, if it is much: what comes back from the host has a limit.
shorten() { # shorten FIRST_BYTE
  local part=300000
  [ $(($(wc -c <"$log") - $1)) -gt $((2 * part)) ] || return 0
  { head -c "$(($1 + part))" "$log"; printf '\n[...]\n'; tail -c "$part" "$log"; } >"$log.short"
  mv "$log.short" "$log"
}

log=$logs/gpu_host.log table=() failed=0
for version in "${versions[@]}"; do
  [ "$version" = host ] || use_nccl "$version"
  for step in "${steps[@]}"; do
    limit=$(limit_of "$step") left=$((within - SECONDS)) started=$SECONDS code=0
    [ "$limit" -le "$left" ] || limit=$left
    if [ "$left" -le 0 ]; then
      verdict="no time" failed=1
    else
      echo "== $step (NCCL: $version)" | tee -a "$log"
      log_start=$(($(wc -c <"$log") + 1))
      # torchrun gives its ranks 30 seconds to end before it kills them, so that none is left to hold a GPU.
      timeout --kill-after 45 "$limit" bash -c "set -euo pipefail; step_$step" >>"$log" 2>&1 || code=$?
      case $code in
        0) verdict=passed ;;
        124 | 137) verdict="TIMED OUT" ;;
        *) verdict="FAILED ($code)" ;;
      esac
      [ "$code" -eq 0 ] && num_lines=4 || num_lines=40 failed=1
      tail -c "+$log_start" "$log" | tail -n "$num_lines"
      shorten "$log_start"
    fi
    table+=("$(printf '%-11s %-8s %-12s %4d s' "$step" "$version" "$verdict" $((SECONDS - started)))")
  done
done

printf '\n%-11s %-8s %-12s %6s\n' step NCCL result time
printf '%s\n' "${table[@]}" "full log: $log"
exit "$failed"
