#pragma once
// reads         tables of a block, or of its warp, that has collected or recalled
// writes        the handle's counts on the device, the caller's statistics, or the host's words
// waits for     nothing
// leaves behind counts; for the host, released by their first word

#include <deep_ep/phases/collect.cuh>
#include <deep_ep/wire/plan.cuh>

namespace deep_ep {

// What a handle keeps: reported by the dispatch that makes it, read by those that use it.
struct Counts {
  int32_t* per_rank;            // [num_ranks]         inclusive sums of rows by source
  int32_t* per_expert_aligned;  // [experts_per_rank]  inclusive sums of aligned counts
  int32_t* per_expert_end;      // [experts_per_rank]  where an expert's rows end in the expanded layout, padding apart
  int32_t* per_expert;          // [experts_per_rank]  counts
  uint32_t* number;             // [1]                 of these routes (plan.cuh)
};

// After collect(), coming[e] is the count of local expert e.
EP_DEVICE void report_counts(const Window& window, uint32_t epoch, int experts_per_rank, int alignment,
                             const Tables& tables, const Counts& out) {
  const int thread = device::thread_idx();
  if (thread == 0) *out.number = number_of_routes(window, epoch);
  if (thread < window.num_ranks) out.per_rank[thread] = tables.row_base[thread + 1];
  EP_NO_UNROLL
  for (int e = thread; e < experts_per_rank; e += device::num_threads()) {
    const int start = tables.expert_row[e], count = tables.coming[e];  // source 0's rows come first
    out.per_expert[e] = count;
    out.per_expert_aligned[e] = start + align_up(count, alignment);
    out.per_expert_end[e] = start + count;
  }
}

// stats[e] grows by what local expert e received; null if nobody asks. By atomics: calls of other buffers, on other
// streams, may add to the same counters.
EP_DEVICE void add_to_stats(int experts_per_rank, const Tables& tables, int32_t* stats) {
  EP_NO_UNROLL
  for (int e = device::thread_idx(); stats != nullptr && e < experts_per_rank; e += device::num_threads()) {
    device::add_relaxed_gpu(stats + e, tables.coming[e]);
  }
}

// words: [0] ready, [1] rows of the plain layout, [2..] count of each local expert. By the warp that has collected, so
// the host need not wait for others of its block.
EP_DEVICE void report_to_host(const Window& window, int experts_per_rank, const Tables& tables, int32_t* words) {
  const int lane = device::lane_idx();
  device::sync_warp();
  if (lane == 0) device::store_relaxed_sys(words + 1, static_cast<int32_t>(tables.row_base[window.num_ranks]));
  EP_NO_UNROLL
  for (int e = lane; e < experts_per_rank; e += 32) {
    device::store_relaxed_sys(words + 2 + e, static_cast<int32_t>(tables.coming[e]));
  }
  device::sync_warp();
  if (lane == 0) device::store_release_sys(words, 1);
}

}  // namespace deep_ep
