#pragma once
// Combine inside one NVLink domain: every token's results come home and are added, in one order everywhere.
//
// The first warps of a launch's sending blocks push the rows of other ranks' tokens to their owners' staging regions.
// As many more may announce what has been sent. All other warps add the parts of this rank's tokens as they arrive; its
// own part comes straight from x. Who has sent sums then adds, too. A few warps with deep rings fill the link; adding
// takes no shared memory, so all fit into one block.
//
// Rows in registered memory are not sent (in_place.cuh): all warps add, and read the peers' rows where they lie. The
// call ends when all peers have read this rank's.
//
// Rows of the expanded layout are added on the rank that has them before they travel, or travel one by one: a kernel is
// compiled for one way to return (results.cuh).

#include <deep_ep/phases/agree.cuh>
#include <deep_ep/phases/push_rows.cuh>
#include <deep_ep/phases/reduce.cuh>
#include <deep_ep/phases/retire.cuh>
#include <deep_ep/wire/blocks.cuh>

namespace deep_ep {

struct CombineConfig {
  int num_send_warps;   // of a sending block
  int num_send_stages;  // of each of their rings (ring.cuh)
  int num_send_storing;
  int num_heralds;  // as many as there are sending warps, or none: those announce what they have sent (announce.cuh)
  int num_warps;    // of every block
  Return returned;  // what of a token comes home
};

struct CombineArgs {
  Window window;
  device::Patience patience;
  Routing routing;       // of the tokens of this rank
  const int32_t* slots;  // [num_tokens, num_topk]
  Results results;
  InPlace in_place;
  Combined combined;
  const uint32_t* routes;   // the handle's number (plan.cuh)
  int32_t plan_flags;       // plan.cuh
  int32_t num_send_blocks;  // 1 to all; none, in place
  int32_t piece_bytes, stage_bytes;
};

template <CombineConfig C>
EP_DEVICE void send(const CombineArgs& a, uint32_t epoch, Mailbox& box) {
  constexpr By kBy = C.num_heralds > 0 ? By::kHerald : By::kSender;
  const int warp = device::warp_idx();
  using SendRing = Ring<C.num_send_stages, C.num_send_storing>;
  char* rings = device::shared_memory<char>(Mailbox::bytes(C.num_send_warps));
  const SendRing ring = SendRing::at(rings, warp, C.num_send_warps, a.stage_bytes);
  const Team crew = across({0, a.num_send_blocks}, warp, C.num_send_warps);
  // A first number of its own takes a register more than who adds rows has.
  const Team team = C.returned == Return::kSum ? Team{} : crew;
  push_rows<C.returned, kBy>(ring, a.window, a.results, a.routing.max_tokens, a.piece_bytes, epoch, a.patience, team,
                             box);
}

template <CombineConfig C>
EP_DEVICE void combine(const CombineArgs& a) {
  constexpr bool kInPlace = C.returned == Return::kInPlace;
  static_assert(C.num_heralds == 0 || C.num_heralds == C.num_send_warps);
  static_assert(C.num_send_warps + C.num_heralds < C.num_warps, "where every block sends, some of its other warps add");
  const auto [epoch, is_void] = begin_operation(a.window);
  if (is_void) return;
  const Plan plan = plan_of(kCombine, a.plan_flags, a.routing, a.results.record, *a.routes);
  const int warp = device::warp_idx();
  const bool sender = sends(a.num_send_blocks);
  Mailbox* boxes = device::shared_memory<Mailbox>();
  if (device::block_idx() == 0) propose(a.window, epoch, plan);
  if (kInPlace && device::block_idx() == 0 && warp == 0) {
    const int rank = device::lane_idx();
    offer(a.window, epoch, a.in_place, rank < a.window.num_ranks ? a.results.by_owner.begin(rank) : 0);
  }
  if (sender) open_mailboxes(boxes, C.num_send_warps);
  device::sync_block();
  const auto add = [&](const Found& found) {
    reduce<C.returned>(a.window, epoch, a.patience, a.routing, a.slots, a.results, found, a.combined);
  };
  if constexpr (kInPlace) {
    // Peers' memory is read, so all warps wait for the answer.
    Found found;
    if (agree(a.window, epoch, plan, a.patience) && find_rows(a.window, epoch, a.patience, found)) add(found);
  } else if (sender && warp < C.num_send_warps) {
    send<C>(a, epoch, boxes[warp]);
    if constexpr (C.returned == Return::kSum) add({});
  } else if (sender && warp < C.num_send_warps + C.num_heralds) {
    announce(a.window, epoch, boxes[warp - C.num_send_warps]);
  } else {
    // Nothing is indexed by what arrives, so only one warp waits for the answer; the others do its work meanwhile.
    const bool asks = device::block_idx() == 0 && warp == C.num_warps - 1;
    if (asks) agree(a.window, epoch, plan, a.patience);
    add({});
  }
  retire<kInPlace>(a.window, epoch, a.patience, device::num_blocks());
}

}  // namespace deep_ep
