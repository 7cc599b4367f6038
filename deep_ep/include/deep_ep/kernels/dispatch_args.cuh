#pragma once
// What a dispatch kernel is compiled for, and what a launch of it is told; deep_ep/ops/dispatch.py holds the same.

#include <deep_ep/phases/in_place.cuh>
#include <deep_ep/phases/land.cuh>
#include <deep_ep/phases/payload.cuh>
#include <deep_ep/phases/report.cuh>
#include <deep_ep/phases/room.cuh>
#include <deep_ep/phases/route.cuh>

namespace deep_ep {

struct DispatchConfig {
  int num_send_warps;   // of a sending block
  int num_send_stages;  // of each of their rings (ring.cuh)
  int num_send_storing;
  int num_receive_warps;  // of a receiving block
  int num_receive_stages;
  int num_receive_storing;
  PlacesFrom places_from;
  bool in_place;  // nobody sends: receivers read the rows of peers where they lie
};

struct DispatchArgs {
  Window window;
  device::Patience patience;
  Routing routing;
  Record record;
  Rows rows;
  const float* weights;  // [num_tokens, num_topk] or null
  Scales scales;         // [num_tokens, count]
  int32_t* slots;        // [num_tokens, num_topk]: what this call finds, or a handle's
  InPlace in_place;
  Received received;
  Counts counts;
  void* kept_idx;       // [num_tokens, num_topk], null or where a copy of topk_idx goes
  int32_t* stats;       // [experts_per_rank] or null: grows by what each local expert receives
  int32_t* host_words;  // null, or where the counts are reported to the host
  Least least;          // then
  int32_t alignment;
  int32_t plan_flags;          // plan.cuh
  int32_t num_count_warps;     // of a counting block: as many as have room for their counts (plan.py)
  int32_t first_count_block;   // it and those behind it count; none, if their number is reached
  int32_t num_send_blocks;     // the first ones
  int32_t num_receive_blocks;  // those behind them
  int32_t num_blocks;          // of this launch, and of the one behind it if there is one, or would be
  int32_t send_piece_bytes, send_stage_bytes, receive_piece_bytes, receive_stage_bytes;
  int32_t tables_bytes;  // and mailboxes
};

}  // namespace deep_ep
