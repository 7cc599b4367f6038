#pragma once
// Dispatch inside one NVLink domain: every token goes, once, to each rank that holds one of its experts.
//
// The first blocks of a launch send: they push this rank's rows to the peers' staging regions, from the first moment
// on, since a row's place there is its token's number. The others receive: they learn from the counts where every row
// will stand, then copy rows out as they arrive, and this rank's own straight from x. Before that, the last of them
// count: they find each token's slot and positions, and tell all ranks. Senders and receivers never share a block:
// stores to a peer that wait for the link would hold up the copies behind them.
//
// Where rows lie in registered memory (in_place.cuh), nobody sends: receivers fetch them from the peers, once it is
// known where they go, and the call ends when all peers have fetched this rank's.
//
// With a CPU sync the counters tell the host what comes. If it has made room for that, all is as in any other launch.
// If that room does not do nothing is received, and if there is none the launch has no receivers; then the host
// launches them behind. So it is with one block in any case: it counts, sends, and has left before it receives. With
// the handle of an earlier dispatch all places are known and no counts are exchanged.

#include <deep_ep/kernels/dispatch_args.cuh>
#include <deep_ep/phases/admit.cuh>
#include <deep_ep/phases/agree.cuh>
#include <deep_ep/phases/blank.cuh>
#include <deep_ep/phases/collect.cuh>
#include <deep_ep/phases/copy_out.cuh>
#include <deep_ep/phases/count.cuh>
#include <deep_ep/phases/look_back.cuh>
#include <deep_ep/phases/publish.cuh>
#include <deep_ep/phases/recall.cuh>
#include <deep_ep/phases/report.cuh>
#include <deep_ep/phases/retire.cuh>
#include <deep_ep/phases/room.cuh>
#include <deep_ep/phases/route.cuh>
#include <deep_ep/phases/scatter.cuh>
#include <deep_ep/wire/blocks.cuh>

namespace deep_ep {

// Finds the slots and positions of this rank's tokens and tells all ranks, once it may: counts, then labels, which lie
// where this call's sizes say. By all warps of a counting block but the last.
template <PlacesFrom kFrom>
EP_DEVICE void tell(const DispatchArgs& a, uint32_t epoch, const Blocks& team, const Tables& tables) {
  const int warp = device::warp_idx();
  const Range range = part_of({0, a.routing.num_tokens}, team.own(), team.count);
  const Range share = warp < a.num_count_warps ? part_of(range, warp, a.num_count_warps) : Range{0, 0};
  const WarpCounts counts{device::shared_memory<int>(a.tables_bytes), a.routing.num_experts};
  if constexpr (kFrom == PlacesFrom::kSelections) {
    if (warp < a.num_count_warps) count_share(a.routing, warp, share, counts, a.kept_idx);
    sync_counting();
    sum_over_warps(a.num_count_warps, a.routing.num_experts, counts, tables);
    sync_counting();
    if (team.count == 1) {
      look_at_own(a.routing.num_experts, tables);
    } else {
      share_counts(a.window, epoch, a.routing.num_experts, tables);
      sync_counting();
      look_back(a.window, epoch, team, a.routing.num_experts, a.patience, tables);
    }
  }
  // It comes when all who count have come here: what they have added up is there, too.
  hear_answer();
  if (tables.is(Ok::kCounts) && tables.is(Ok::kAgrees)) {  // nobody takes them back any more
    if (kFrom == PlacesFrom::kSelections) publish(a.window, epoch, team, a.routing.experts_per_rank, tables);
    const Router router{a.window, a.routing, a.weights, a.slots, counts, tables, warp};
    route<kFrom>(router, epoch, share);
  }
  device::fence_async_proxy_shared();  // the rings take over the memory of the counts
}

// What the last warp does meanwhile, and in a block that only receives: it asks whether all ranks agree, and for those
// who count whether they may tell; and it learns where everything that comes will stand.
template <DispatchConfig C>
EP_DEVICE void ask(const DispatchArgs& a, uint32_t epoch, const Plan& plan, bool counts, bool receives, bool reports,
                   const Tables& tables) {
  const bool admitted = !counts || admit_warp(a.window, epoch, a.patience);
  const bool all_agree = agree(a.window, epoch, plan, a.patience, tables.tokens_of) && admitted;
  if (!all_agree) tables.take_back(Ok::kAgrees);
  if (counts) give_answer();
  if (!(receives || reports) || !all_agree) return;
  if constexpr (C.in_place) {
    Found found;
    if (!find_rows(a.window, epoch, a.patience, found)) tables.take_back(Ok::kLearns);
    if (device::lane_idx() < a.window.num_ranks) tables.found[device::lane_idx()] = found;
  }
  if constexpr (C.places_from == PlacesFrom::kHandle) {
    recall(a.window, a.routing.experts_per_rank, a.counts, tables);
  } else {
    collect(a.window, epoch, a.routing.experts_per_rank, a.alignment, a.patience, tables);
  }
  if (reports && tables.is(Ok::kLearns)) {
    report_to_host(a.window, a.routing.experts_per_rank, tables, a.host_words);
  }
}

// Whether this launch receives. Where the host waits for the counts, it does if they fit.
EP_DEVICE bool can_receive(const DispatchArgs& a, const Tables& tables) {
  if (a.host_words == nullptr) return true;
  return a.num_receive_blocks > 0 &&
         fits(a.window.num_ranks, a.routing.experts_per_rank, a.alignment, tables, a.least, a.received);
}

template <DispatchConfig C>
EP_DEVICE void dispatch(const DispatchArgs& a) {
  const auto [epoch, is_void] = begin_operation(a.window);
  if (is_void) return;
  constexpr bool kRecalls = C.places_from == PlacesFrom::kHandle;
  const Tables tables = Tables::at(device::shared_memory<int>(), a.routing.num_experts);
  const Blocks counters = blocks_from(a.first_count_block), receivers{a.num_send_blocks, a.num_receive_blocks};
  const bool sender = sends(a.num_send_blocks), receiver = receivers.has_own(), counts = counters.has_own();
  const bool reports = counts && a.host_words != nullptr && counters.own() == 0;
  const int experts_per_rank = a.routing.experts_per_rank, warp = device::warp_idx();
  Mailbox* boxes = device::shared_memory<Mailbox>(Tables::bytes(a.routing.num_experts));
  char* rings = device::shared_memory<char>(a.tables_bytes);

  tables.open();
  if (sender) open_mailboxes(boxes, C.num_send_warps);
  device::sync_block();
  const Record said{a.record.row_bytes, a.scales.bytes()};  // not rounded up
  const Plan plan = plan_of(kDispatch, a.plan_flags, a.routing, said, kRecalls ? *a.counts.number : 0);
  // The first launch, or the only one, speaks for the call.
  if (device::block_idx() == 0 && (sender || counters.count > 0)) {
    propose(a.window, epoch, plan);
    if (C.in_place && warp == 0) offer(a.window, epoch, a.in_place, 0);
  }
  if (sender && !counts) admit(a.window, epoch, a.patience, tables);
  if ((counts || receiver) && asks_others()) {
    ask<C>(a, epoch, plan, counts, receiver, reports, tables);
  } else if (counts) {
    tell<C.places_from>(a, epoch, counters, tables);
  }
  device::sync_block();
  // Nothing is taken back any more. Who asked has told the host by now, or never will.
  const bool good = tables.are_all(), learned = tables.is(Ok::kAgrees) && tables.is(Ok::kLearns);
  const bool can = learned && (receiver || reports) && can_receive(a, tables), receives = receiver && good && can;

  if (receives && receivers.own() == 0) {
    if (!kRecalls) report_counts(a.window, epoch, experts_per_rank, a.alignment, tables, a.counts);
    add_to_stats(experts_per_rank, tables, a.stats);
  }
  if constexpr (!C.in_place) {
    if (sender && good && warp < C.num_send_warps) {
      using SendRing = Ring<C.num_send_stages, C.num_send_storing>;
      const SendRing ring = SendRing::at(rings, warp, C.num_send_warps, a.send_stage_bytes);
      const Team team = across({0, a.num_send_blocks}, warp, C.num_send_warps);
      scatter(ring, a.window, a.routing, a.rows, a.scales, a.record, a.send_piece_bytes, epoch, boxes[warp], team);
    } else if (sender && good && warp < 2 * C.num_send_warps) {
      announce(a.window, epoch, boxes[warp - C.num_send_warps]);
    }
  }
  if (receives) {
    const Landing landing{a.window, a.routing, a.rows, a.scales, a.record, tables, a.received, epoch, a.patience};
    if (warp < C.num_receive_warps) {
      using ReceiveRing = Ring<C.num_receive_stages, C.num_receive_storing>;
      const ReceiveRing ring = ReceiveRing::at(rings, warp, C.num_receive_warps, a.receive_stage_bytes);
      copy_out<C.in_place>(ring, landing, a.receive_piece_bytes, across(receivers, warp, C.num_receive_warps));
    } else {
      const int num_landing = device::num_threads() / 32 - C.num_receive_warps;
      land(landing, across(receivers, warp - C.num_receive_warps, num_landing));
    }
    blank(a.window, a.routing, a.record, a.alignment, tables, warp, receivers, a.received);
  }
  // Blocks are counted as if receivers were launched behind. They are not, if nobody needs them or if the host got no
  // report; then the block that reports stands for them.
  const int num_others = reports && (can || !learned) ? a.num_blocks - device::num_blocks() : 0;
  retire<C.in_place>(a.window, epoch, a.patience, a.num_blocks, 1 + num_others);
}

}  // namespace deep_ep
