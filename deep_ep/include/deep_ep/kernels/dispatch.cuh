#pragma once
// Dispatch inside one NVLink domain: every token goes, once, to each rank that holds one of its experts.
//
// The first blocks of a launch send: they push this rank's rows to the peers' staging regions. The others receive: they
// learn from the counts where every row will stand, then copy rows out as they arrive, and this rank's own straight
// from x. The two never share a block: stores to a peer that wait for the link would hold up the copies behind them.
//
// A launch may also do one half only. With a CPU sync the host allocates exact tensors between the halves, while the
// pushes run. With the handle of an earlier dispatch all places are known and no counts are exchanged.

#include <deep_ep/phases/admit.cuh>
#include <deep_ep/phases/agree.cuh>
#include <deep_ep/phases/blank.cuh>
#include <deep_ep/phases/collect.cuh>
#include <deep_ep/phases/copy_out.cuh>
#include <deep_ep/phases/look_back.cuh>
#include <deep_ep/phases/place.cuh>
#include <deep_ep/phases/publish.cuh>
#include <deep_ep/phases/recall.cuh>
#include <deep_ep/phases/report.cuh>
#include <deep_ep/phases/retire.cuh>
#include <deep_ep/phases/scatter.cuh>
#include <deep_ep/wire/blocks.cuh>

namespace deep_ep {

enum class PlacesFrom { kSelections, kHandle };

struct DispatchConfig {
  int num_send_warps;   // of a sending block
  int num_send_stages;  // of each of their rings (ring.cuh)
  int num_send_storing;
  int num_receive_warps;  // of a receiving block
  int num_receive_stages;
  int num_receive_storing;
  PlacesFrom places_from;
};

// Places of this rank's tokens, [num_tokens, num_topk] each (place.cuh).
struct Places {
  int32_t* slots;
  int32_t* positions;
};

struct DispatchArgs {
  Window window;
  device::Patience patience;
  Routing routing;
  Record record;
  Rows rows;
  const float* weights;  // [num_tokens, num_topk] or null
  Scales scales;         // [num_tokens, count]
  Places sent;           // what senders work out; in a launch without senders or with a handle, what an earlier one did
  Places kept;           // what receivers work out for themselves, so that no half waits for the other
  Received received;
  Counts counts;
  void* kept_idx;       // [num_tokens, num_topk], null or where a copy of topk_idx goes
  int32_t* stats;       // [experts_per_rank] or null: grows by what each local expert receives
  int32_t* host_words;  // null, or where a launch of senders only reports the counts
  int32_t alignment;
  int32_t plan_flags;       // plan.cuh
  int32_t num_place_warps;  // as many as have room for their counts (plan.py)
  int32_t num_send_blocks;  // the others receive
  int32_t send_piece_bytes, send_stage_bytes, receive_piece_bytes, receive_stage_bytes, tables_bytes;
};

// Finds the place of every token of this block's range, among all tokens of this rank. Senders tell the peers what will
// come as soon as it is known. Returns, to all threads alike, whether the counts of all blocks came.
EP_DEVICE bool place(const DispatchArgs& a, uint32_t epoch, int warp, const Blocks& team, Range range,
                     const Places& places, const Tables& tables) {
  const bool places_tokens = warp < a.num_place_warps;
  const Range share = part_of(range, warp, a.num_place_warps);
  const WarpCounts counts{device::shared_memory<int>(a.tables_bytes), a.routing.num_experts};
  if (places_tokens) {
    place_in_experts(a.routing, warp, share, places.positions, counts);
    place_in_ranks(a.routing, warp, share, a.window.num_ranks, places.slots, counts);
  }
  device::sync_block();
  sum_over_warps(a.num_place_warps, a.routing.num_experts, counts, tables);
  device::sync_block();
  share_counts(a.window, epoch, a.routing.num_experts, tables);
  device::sync_block();
  look_back(a.window, epoch, team, a.routing.num_experts, a.patience, tables);
  device::sync_block();
  const bool all_came = device::load_relaxed_gpu(tables.ok) != 0;  // nobody takes it back before the next sync_block
  if (all_came) {
    if (sends(a.num_send_blocks)) publish(a.window, epoch, team, a.routing.experts_per_rank, tables);
    if (places_tokens) settle(a.routing, warp, share, places.slots, places.positions, counts, tables);
  }
  const bool copies = !sends(a.num_send_blocks) || a.num_send_blocks == device::num_blocks();
  if (copies && a.kept_idx != nullptr) keep_selections(a.routing, range, a.kept_idx);
  device::fence_async_proxy_shared();  // the rings take over the memory of the counts
  device::sync_block();
  if (all_came) tell_settled(a.window, epoch);
  return all_came;
}

template <DispatchConfig C>
EP_DEVICE void dispatch(const DispatchArgs& a) {
  if (is_broken(a.window)) return;
  const uint32_t epoch = device::load_relaxed_gpu(&control(a.window, a.window.rank).epoch) + 1;
  const Tables tables = Tables::at(device::shared_memory<int>(), a.routing.num_experts);
  const bool sender = sends(a.num_send_blocks), receiver = !sender;
  const Blocks team = team_of_block(a.num_send_blocks);
  const Range range = part_of({0, a.routing.num_tokens}, team.own(), team.count);
  const Places& places = receiver && a.num_send_blocks > 0 ? a.kept : a.sent;
  const TokenTables token_tables{places.slots, places.positions, a.weights, a.scales};
  constexpr bool kRecalls = C.places_from == PlacesFrom::kHandle;
  const int experts_per_rank = a.routing.experts_per_rank, warp = device::warp_idx();
  char* rings = device::shared_memory<char>(a.tables_bytes);
  const auto good = [&] { return device::load_relaxed_gpu(tables.ok) != 0; };

  if (device::thread_idx() == 0) device::store_relaxed_gpu(tables.ok, 1);
  device::sync_block();
  const Plan plan = plan_of(kDispatch, a.plan_flags, a.routing, a.record, kRecalls ? *a.counts.number : 0);
  if (sender && team.own() == 0) propose(a.window, epoch, plan);
  if (sender) admit(a.window, epoch, a.patience, tables.ok);
  const bool placed = kRecalls || a.num_send_blocks == 0 || place(a, epoch, warp, team, range, places, tables);

  const bool reports = !kRecalls && sender && a.host_words != nullptr && team.own() == 0;
  if ((receiver || reports) && placed) {
    // The last warp looks at the plans, while the first ones load the counts.
    const bool asks = warp == device::num_threads() / 32 - 1;
    if (asks && !agree(a.window, epoch, plan, a.patience)) device::store_relaxed_gpu(tables.ok, 0);
    if constexpr (kRecalls) {
      recall(a.window, experts_per_rank, a.counts, tables);
    } else {
      collect(a.window, epoch, experts_per_rank, a.alignment, a.patience, tables);
      if (reports && good()) report_to_host(a.window, experts_per_rank, tables, a.host_words);
      if (receiver && good() && team.own() == 0)
        report_counts(a.window, epoch, experts_per_rank, a.alignment, tables, a.counts);
    }
  }
  device::sync_block();

  if (receiver && good() && team.own() == 0) add_to_stats(experts_per_rank, tables, a.stats);
  if (sender && warp < C.num_send_warps && good()) {
    using SendRing = Ring<C.num_send_stages, C.num_send_storing>;
    const SendRing ring = SendRing::at(rings, warp, C.num_send_warps, a.send_stage_bytes);
    if (kRecalls || await_settled(a.window, epoch, team, a.patience)) {
      scatter(ring, a.window, epoch, a.routing, token_tables, a.rows, a.record, a.send_piece_bytes);
    }
  }
  if (receiver && good()) {
    if (warp < C.num_receive_warps) {
      using ReceiveRing = Ring<C.num_receive_stages, C.num_receive_storing>;
      const ReceiveRing ring = ReceiveRing::at(rings, warp, C.num_receive_warps, a.receive_stage_bytes);
      copy_out(ring, a.window, epoch, a.routing, token_tables, a.rows, a.record, a.receive_piece_bytes, range, warp,
               team, C.num_receive_warps, a.patience, tables, a.received);
    }
    blank(a.window, a.routing, a.record, a.alignment, tables, warp, team, a.received);
  }
  if (a.num_send_blocks < device::num_blocks()) retire(a.window, epoch);
}

}  // namespace deep_ep
