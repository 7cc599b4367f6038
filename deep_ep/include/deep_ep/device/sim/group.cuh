// Meetings of more than a warp. Whoever leaves sees what everyone did before coming. (Bulk copies are not included:
// wait for them first, and fence as bulk.cuh says.)
#pragma once

#include <deep_ep/device/sim/memory.cuh>
#include <deep_ep/device/sim/time.cuh>

namespace deep_ep::device {

// All threads of the block.
void sync_block(sim::Site site = sim::Site::current());

// `num_threads` threads of the block, whole warps; ids 1 to 15 (sync_block has 0).
void sync_named(int id, int num_threads, sim::Site site = sim::Site::current());

// Counts as one of the `num_threads` of that meeting and does not wait; the others see what came before it.
void arrive_named(int id, int num_threads, sim::Site site = sim::Site::current());

// In global memory, zero before its first use; it needs no reset between uses or launches.
struct GridBarrier {
  std::uint32_t arrived;
  std::uint32_t generation;
};

// All threads of all blocks of the launch.
EP_DEVICE void sync_grid(GridBarrier* barrier, sim::Site site = sim::Site::current()) {
  sync_block(site);
  if (thread_idx() == 0) {
    // Read before arriving: the generation cannot move on without this block.
    const std::uint32_t generation = load_relaxed_gpu(&barrier->generation, site);
    const auto num_arrived = fetch_add_acq_rel_gpu(&barrier->arrived, 1u, site) + 1;
    if (num_arrived == static_cast<std::uint32_t>(num_blocks())) {
      store_relaxed_gpu(&barrier->arrived, 0u, site);
      store_release_gpu(&barrier->generation, generation + 1, site);
    } else {
      wait_until("sync_grid", [&] { return load_acquire_gpu(&barrier->generation, site) != generation; }, site);
    }
  }
  sync_block(site);
}

// All threads of all blocks of the cluster. Without a cluster launch every block is a cluster of its own.
void sync_cluster(sim::Site site = sim::Site::current());
int cluster_idx();
int cluster_block_idx();
int cluster_num_blocks();

}  // namespace deep_ep::device
