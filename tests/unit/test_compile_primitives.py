"""Every device primitive compiles for GPUs, without one, with both compilers; nothing spills or lives on a stack.

What the primitives do is tested in tests/device; this file only reads what the compilers say and write.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from deep_ep.jit import Built, Nvcc, Nvrtc, Store, build_files
from deep_ep.jit.toolchain import INCLUDE_DIR
from deep_ep.jit.tools import find_disassembler

ROOT = Path(__file__).resolve().parents[2]
SM90 = INCLUDE_DIR / "deep_ep" / "device" / "sm90"
GROUPS = ("thread", "warp", "memory", "bulk", "group", "time", "convert")
ARCHITECTURES = ("sm_90a", "sm_100a")
MORE_NVCCS = sorted(ROOT.glob(".toolkits/cuda-*/nvidia/cu13/bin/nvcc"))  # fetched by `make toolkits`

# One kernel a group, each using all of its group.
SOURCE = """
namespace deep_ep {
using namespace device;

struct Config {
  int num_warps;
  constexpr int num_threads() const { return 32 * num_warps; }
};
constexpr Config kConfig{.num_warps = 4};

struct alignas(8) Pair { uint32_t value, epoch; };
struct Inner { void* pointers[2]; int count; };
struct Args { int* x; Inner inner; Pair* pairs; Vector16* vectors; GridBarrier* barrier; Patience patience; int rank; };
static_assert(sizeof(Args) == 96 && EP_OFFSET(Args, inner.count) == 24 && EP_OFFSET(Args, rank) == 88);

EP_ENTRY(use_thread, kConfig.num_threads(), Args) {
  const int mine = shared_memory<int>()[thread_idx()] + shared_memory<char>(128)[0];
  if (elect()) args.x[block_idx() * num_threads()] = mine + warp_idx() + lane_idx() + num_warps() + num_blocks();
}

EP_ENTRY(use_warp, 128, Args) {
  const int x = args.x[thread_idx()];
  sync_warp();
  int sum = ballot(x > 3) + any(x == 4) + all(x < 5) + reduce_add(x) + reduce_max(x) + inclusive_sum(x) + lanes_below();
  sum += shuffle(x, 3) + shuffle(args.pairs[x], lane_idx() ^ 1).epoch + int(shuffle(0.5f * x, sum));
  args.x[thread_idx()] = sum + match_any(x) + match_any(args.pairs[sum]) + popcount(match_any(int64_t{x}));
}

template <class T>
EP_DEVICE T access(T* at) {
  T sum = load_relaxed_gpu(at) + load_acquire_gpu(at + 1) + load_relaxed_sys(at + 2) + load_acquire_sys(at + 3);
  store_relaxed_gpu(at, sum), store_release_gpu(at, sum), store_relaxed_sys(at, sum), store_release_sys(at, sum);
  add_relaxed_gpu(at, sum), add_release_gpu(at, sum), add_relaxed_sys(at, sum), add_release_sys(at, sum);
  sum += fetch_add_relaxed_gpu(at, 1) + fetch_add_acq_rel_gpu(at, 2);
  sum += fetch_add_relaxed_sys(at, 3) + fetch_add_acq_rel_sys(at, 4);
  return sum + compare_exchange_gpu(at, 0, sum) + compare_exchange_sys(at, sum, 1);
}

EP_ENTRY(use_memory, 128, Args) {
  int64_t sum = fetch_add_shared(shared_memory<int>(), 1);
  sum += access(args.x) + access(reinterpret_cast<uint32_t*>(args.x));
  sum += access(reinterpret_cast<int64_t*>(args.x)) + access(reinterpret_cast<uint64_t*>(args.x));
  store_relaxed_sys(args.pairs, Pair{1, 2});
  fence_gpu();
  fence_sys();
  store_streaming(args.vectors, load_streaming(args.vectors + sum));
  store_streaming(args.pairs + 1, load_streaming(args.pairs));
  store_streaming(args.x, load_streaming(args.x + 1) + static_cast<int>(sum));
}

EP_ENTRY(use_bulk, 128, Args) {
  uint32_t* stage = shared_memory<uint32_t>(1024 * warp_idx());
  Mbarrier& full = *shared_memory<Mbarrier>(4096 + 8 * warp_idx());
  if (elect()) {
    mbarrier_init(full, 2);
    fence_mbarrier_init();
  }
  sync_warp();
  for (uint32_t i = 0, parity = 0; i < args.rank; ++i, parity ^= 1) {
    if (elect()) {
      bulk_wait_read<0>();
      fence_async_proxy_global();
      bulk_prefetch(args.vectors + 64 * i, 1024);
      bulk_load(stage, args.vectors + 64 * i, 1024, full);
      mbarrier_arrive_expect(full, 1024);
      mbarrier_arrive(full);
    }
    if (!mbarrier_test(full, parity)) mbarrier_wait(full, parity);
    stage[lane_idx()] += i;
    fence_async_proxy_shared();
    sync_warp();
    if (elect()) {
      bulk_store(args.vectors + 64 * i, stage, 1024);
      bulk_commit();
      bulk_wait_read<1>();
    }
  }
  fence_async_proxy();
  bulk_wait<2>();
  bulk_wait<0>();
}

EP_ENTRY(use_group, 128, Args) {
  sync_block();
  if (warp_idx() < 2) sync_named(1, 96);
  if (warp_idx() == 2) arrive_named(1, 96);
  sync_grid(args.barrier);
  sync_cluster();
  args.x[thread_idx()] = cluster_idx() + cluster_block_idx() + cluster_num_blocks();
}

EP_ENTRY(use_time, 128, Args) {
  wait_for_prerequisites();
  const uint32_t* flag = reinterpret_cast<const uint32_t*>(args.x) + thread_idx();
  const Waiting waiting{.phase = 3, .peer = args.rank, .expected = 7};
  if (!wait_until_equals(args.patience, waiting, [&] { return load_relaxed_sys(flag); })) return;
  wait_until("another block", [&] { return load_acquire_gpu(args.x + 999) == 1; });
  launch_dependents();
  args.x[thread_idx()] = static_cast<int>(clock_ns());
  if (args.x[1000] != 0) fault(args.patience, waiting, 5);
}

EP_ENTRY(use_convert, 128, Args) {
  const float scale = bf16_to_float(static_cast<uint16_t>(args.x[0])) * e4m3_to_float(static_cast<uint8_t>(args.x[1]));
  const Float2 both = bf16x2_to_float2(args.x[2]);
  args.x[3] = float2_to_bf16x2({scale * both.x, scale * both.y});
  args.x[4] = float_to_bf16(both.x) + float_to_e4m3(both.y);
}

}  // namespace deep_ep
"""


def includes(*groups: str) -> str:
    return "".join(f"#include <deep_ep/device/sm90/{group}.cuh>\n" for group in groups)


def compile_with(toolchain: Nvrtc | Nvcc, source: str, folder: Path) -> Built:
    return build_files("primitives", {toolchain.source_name: source}, toolchain, store=Store(folder))


def registers_by_kernel(log: str) -> dict[str, int]:
    pairs = re.findall(r"entry function '(\w+)'.*?Used (\d+) registers", log, re.DOTALL)
    return {kernel: int(registers) for kernel, registers in pairs}


def compilers(architecture: str) -> dict[str, Nvrtc | Nvcc]:
    more = {f"nvcc of {path.parents[3].name}": Nvcc(architecture, compiler=path) for path in MORE_NVCCS}
    return {"nvrtc": Nvrtc(architecture), "nvcc": Nvcc(architecture), **more}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("compiler", compilers("sm_90a"))
def test_every_primitive_compiles_and_stays_in_registers(compiler: str, architecture: str, tmp_path: Path) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    built = compile_with(compilers(architecture)[compiler], includes(*GROUPS) + SOURCE, tmp_path)
    assert built.resources is not None
    assert not built.resources.uses_local_memory, built.log
    registers = registers_by_kernel(built.log)
    assert set(registers) == {f"use_{group}" for group in GROUPS}
    print(f"{compiler}, {architecture}, registers:", registers)


@pytest.mark.parametrize("group", GROUPS)
def test_a_header_needs_no_other_to_be_included_first(group: str, tmp_path: Path) -> None:
    compile_with(Nvrtc("sm_90a"), f"{includes(group)}EP_ENTRY(empty, 32, int) {{}}", tmp_path)


def names_of(group: str) -> list[str]:
    """The primitives that a header defines, each as a function or by a line such as EP_DEFINE_LOAD(name, "ld...")."""
    text = (SM90 / f"{group}.cuh").read_text()
    public = re.sub(r"namespace detail \{.*?\}  // namespace detail", "", text, flags=re.DOTALL)
    return re.findall(r"^EP_(?:DEVICE [\w:]+[ *]+|DEFINE_\w+\()(\w+)(?=\(|, \")", public, re.MULTILINE)


@pytest.mark.parametrize("group", GROUPS)
def test_no_primitive_is_left_out_above_or_in_the_document(group: str) -> None:
    document = (ROOT / "docs" / "primitives.md").read_text()
    names = names_of(group)
    assert names
    assert [name for name in names if not re.search(rf"\b{name}\b", SOURCE)] == []
    assert [name for name in names if f"`{re.sub('_(gpu|sys)$', '', name)}" not in document] == []


# What the machine code must show: the copy engine, waits that suspend, 16 bytes at a time, additions without an answer.
INSTRUCTIONS = {
    "use_warp": ("REDUX.SUM", "MATCH.ANY", "SHFL.UP", "VOTE"),
    "use_memory": ("LDG.E.NA.128", "STG.E.NA.128", "REDG.E.ADD.STRONG.SYS", "ATOMS.ADD", "MEMBAR.ALL.SYS"),
    "use_bulk": ("UBLKCP.S.G", "UBLKCP.G.S", "SYNCS.PHASECHK.TRANS64.TRYWAIT", "UTMACMDFLUSH", "FENCE.VIEW.ASYNC"),
    "use_group": ("BAR.ARV", "BAR.SYNC", "UCGABAR_ARV", "ATOMG.E.ADD.STRONG.GPU"),
    "use_time": ("ACQBULK", "PREEXIT", "STRONG.SYS", "GLOBALTIMER"),
    "use_convert": ("F2FP.BF16.F32.PACK_AB", "F2FP.SATFINITE.E4M3", "F2FP.F16.E4M3.UNPACK"),
}


def test_the_machine_code_shows_what_was_meant(tmp_path: Path) -> None:
    disassembler = find_disassembler()
    if disassembler is None:
        pytest.skip("no nvdisasm or cuobjdump")
    built = compile_with(Nvrtc("sm_90a"), includes(*GROUPS) + SOURCE, tmp_path)
    text = subprocess.run([*disassembler, built.artifact], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"\.text\.(use_\w+):|Function : (use_\w+)", text)
    code = {first or second: body for first, second, body in zip(parts[1::3], parts[2::3], parts[3::3], strict=True)}
    for kernel, instructions in INSTRUCTIONS.items():
        assert [instruction for instruction in instructions if instruction not in code[kernel]] == [], kernel
        assert not re.search(r"\b(LDL|STL)\b", code[kernel]), kernel
