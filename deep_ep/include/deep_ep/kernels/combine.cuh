#pragma once
// Combine inside one NVLink domain: every token's results come home and are added, in one order everywhere.
//
// The first blocks of a launch send: they push the rows of other ranks' tokens to their owners' staging regions. The
// others receive: they add the parts of this rank's tokens as they arrive; its own part comes straight from x. A launch
// may also do one half only.

#include <deep_ep/phases/admit.cuh>
#include <deep_ep/phases/push_rows.cuh>
#include <deep_ep/phases/reduce.cuh>
#include <deep_ep/phases/retire.cuh>
#include <deep_ep/wire/blocks.cuh>

namespace deep_ep {

struct CombineConfig {
  int num_send_warps;   // of a sending block
  int num_send_stages;  // of each of their rings (ring.cuh)
  int num_send_storing;
  int num_receive_warps;  // of a receiving block
  int num_receive_stages;
  int num_receive_storing;
};

struct CombineArgs {
  Window window;
  device::Patience patience;
  Routing routing;  // of the tokens of this rank
  Record record;
  Rows rows;             // as dispatch returned them
  const float* weights;  // [rows, num_topk] or null
  const int32_t* slots;  // [num_tokens, num_topk]
  RowsByOwner by_owner;
  Combined combined;
  int32_t num_send_blocks;  // the others receive
  int32_t send_piece_bytes, send_stage_bytes, receive_piece_bytes, receive_stage_bytes, tables_bytes;
};

template <CombineConfig C>
EP_DEVICE void send(const CombineArgs& a, uint32_t epoch, int* ok) {
  admit(a.window, epoch, a.patience, ok);
  device::sync_block();
  const int warp = device::warp_idx();
  if (warp >= C.num_send_warps || !device::load_relaxed_gpu(ok)) return;
  const Blocks team = team_of_block(a.num_send_blocks);
  using SendRing = Ring<C.num_send_stages, C.num_send_storing>;
  const SendRing ring =
      SendRing::at(device::shared_memory<char>(a.tables_bytes), warp, C.num_send_warps, a.send_stage_bytes);
  push_rows(ring, a.window, epoch, a.rows, a.weights, a.routing.num_topk, a.by_owner, a.routing.max_tokens, a.record,
            a.send_piece_bytes, team.own() + team.count * warp, team.count * C.num_send_warps);
}

template <CombineConfig C>
EP_DEVICE void receive(const CombineArgs& a, uint32_t epoch) {
  const int warp = device::warp_idx();
  if (warp >= C.num_receive_warps) return;
  const Blocks team = team_of_block(a.num_send_blocks);
  using ReceiveRing = Ring<C.num_receive_stages, C.num_receive_storing>;
  const ReceiveRing ring =
      ReceiveRing::at(device::shared_memory<char>(a.tables_bytes), warp, C.num_receive_warps, a.receive_stage_bytes);
  reduce(ring, a.window, epoch, a.routing, a.slots, a.rows, a.weights, a.by_owner, a.record, a.receive_piece_bytes,
         team.own() + team.count * warp, team.count * C.num_receive_warps, a.patience, a.combined);
}

template <CombineConfig C>
EP_DEVICE void combine(const CombineArgs& a) {
  const uint32_t epoch = device::load_relaxed_gpu(&control(a.window, a.window.rank).epoch) + 1;
  int* ok = device::shared_memory<int>();
  if (device::thread_idx() == 0) device::store_relaxed_gpu(ok, 1);
  device::sync_block();
  if (sends(a.num_send_blocks)) {
    send<C>(a, epoch, ok);
  } else {
    receive<C>(a, epoch);
  }
  if (a.num_send_blocks < device::num_blocks()) retire(a.window, epoch);
}

}  // namespace deep_ep
