// Meetings of more than a warp. Whoever leaves sees what everyone did before coming. (Bulk copies are not included:
// wait for them first, and fence as bulk.cuh says.)
#pragma once

#include <deep_ep/device/sm90/memory.cuh>
#include <deep_ep/device/sm90/thread.cuh>

namespace deep_ep::device {

// All threads of the block.
EP_DEVICE void sync_block() { __syncthreads(); }

// `num_threads` threads of the block, whole warps; ids 1 to 15 (sync_block has 0).
EP_DEVICE void sync_named(int id, int num_threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}

// Counts as one of the `num_threads` of that meeting and does not wait; the others see what came before it.
EP_DEVICE void arrive_named(int id, int num_threads) {
  asm volatile("barrier.arrive %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}

// In global memory, zero before its first use; it needs no reset between uses or launches.
struct GridBarrier {
  std::uint32_t arrived;
  std::uint32_t generation;
};

// All threads of all blocks, which must all be resident (a cooperative launch sees to that).
EP_DEVICE void sync_grid(GridBarrier* barrier) {
  sync_block();
  if (thread_idx() == 0) {
    // Read before arriving: the generation cannot move on without this block.
    const std::uint32_t generation = load_relaxed_gpu(&barrier->generation);
    const bool is_last = fetch_add_acq_rel_gpu(&barrier->arrived, 1u) + 1 == static_cast<std::uint32_t>(num_blocks());
    if (is_last) {
      store_relaxed_gpu(&barrier->arrived, 0u);
      store_release_gpu(&barrier->generation, generation + 1);
    } else {
      while (load_acquire_gpu(&barrier->generation) == generation) {
      }
    }
  }
  sync_block();
}

// All threads of all blocks of the cluster.
EP_DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

// Without a cluster launch every block is a cluster of its own.
EP_DEVICE int cluster_idx() {
  int idx;
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(idx));
  return idx;
}
EP_DEVICE int cluster_block_idx() {
  int idx;
  asm("mov.u32 %0, %%cluster_ctaid.x;" : "=r"(idx));
  return idx;
}
EP_DEVICE int cluster_num_blocks() {
  int count;
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(count));
  return count;
}

}  // namespace deep_ep::device
