#pragma once
// reads         rows of x that belong to tokens of other ranks, and their weights
// writes        staged records and arrival marks at those ranks
// waits for     its own bulk stores (admit has let us in)
// leaves behind at each owner a whole record before its mark (announce.cuh)

#include <deep_ep/phases/announce.cuh>
#include <deep_ep/phases/ring.cuh>
#include <deep_ep/phases/scatter.cuh>
#include <deep_ep/wire/integers.cuh>
#include <deep_ep/wire/record.cuh>
#include <deep_ep/wire/window.cuh>

namespace deep_ep {

// Rows of x by the rank that owns their tokens: inclusive sums over ranks.
struct RowsByOwner {
  const int32_t* per_rank;
  EP_DEVICE int begin(int rank) const { return rank == 0 ? 0 : per_rank[rank - 1]; }
  EP_DEVICE int count(int rank) const { return per_rank[rank] - begin(rank); }
};

// What combine is given: results for the tokens that a dispatch brought here.
struct Results {
  Rows rows;             // as dispatch returned them
  const float* weights;  // [rows, num_topk] or null
  RowsByOwner by_owner;
  Record record;  // in which they travel
};

// Of numbered things those that one warp deals with: every step-th.
struct Share {
  int first, step;
};

template <class Ring>
EP_DEVICE void push_rows(const Ring& ring, const Window& window, uint32_t epoch, const Results& results, int num_topk,
                         int max_tokens, int piece_bytes, Share share) {
  const Rows& rows = results.rows;
  const RowsByOwner& by_owner = results.by_owner;
  const Record& record = results.record;
  const int lane = device::lane_idx(), peers = window.num_ranks - 1;
  // Lane r knows what rank r owns.
  const int first_row = lane < window.num_ranks ? by_owner.begin(lane) : 0;
  const int num_rows = lane < window.num_ranks && lane != window.rank ? by_owner.count(lane) : 0;
  const int items = device::reduce_max(num_rows) * peers;  // the first row for each owner, then the second, ...
  int offset = 0;
  Announcer announcer(window, epoch);

  // A row with this lane's weight. The next one is known while one is being loaded, so nobody waits for its weights.
  struct Item {
    int idx, owner, slot, row;
    float weight;
  };
  const auto find = [&](int idx) {
    Item found{idx, -1, -1, -1, 0.0f};
    EP_NO_UNROLL
    for (; found.idx < items; found.idx += share.step) {
      const int other = found.idx % peers;
      found.owner = other < window.rank ? other : other + 1;
      found.slot = found.idx / peers;
      if (found.slot < device::shuffle(num_rows, found.owner)) break;
    }
    if (found.idx >= items) return found;
    found.row = device::shuffle(first_row, found.owner) + found.slot;
    if (results.weights != nullptr && lane < num_topk) {
      found.weight = results.weights[int64_t(found.row) * num_topk + lane];
    }
    return found;
  };
  Item next = find(share.first), item = next;

  const auto fill = [&](Stage stage, bool) {
    if (offset == 0) {
      if (next.idx >= items) return Filled::kNoMore;
      item = next;
    }
    const int bytes = min_of(piece_bytes, record.row_bytes - offset);
    const bool last = offset + bytes == record.row_bytes;
    if (last) {
      if (lane < num_topk) reinterpret_cast<float*>(stage.data + bytes)[lane] = item.weight;
      device::fence_async_proxy_shared();
    }
    device::sync_warp();
    if (device::elect()) {
      *stage.ticket = {.row = item.slot,
                       .source = item.owner,
                       .offset = offset,
                       .bytes = last ? bytes + record.tail_bytes : bytes,
                       .last = last};
      device::mbarrier_arrive_expect(*stage.full, bytes);
      device::bulk_load(stage.data, rows.x + item.row * rows.stride + offset, bytes, *stage.full);
    }
    device::sync_warp();
    // Behind the load and, in long rows, before the last piece's fence, which would wait for it.
    if (offset == 0) next = find(item.idx + share.step);
    offset = last ? 0 : offset + bytes;
    return Filled::kYes;
  };
  int drained = 0;
  const auto drain = [&](Stage stage) {
    const Ticket& ticket = *stage.ticket;
    if (device::elect()) {
      char* to = staged(window, ticket.source, window.rank, ticket.row, max_tokens, record.bytes());
      device::bulk_store(to + ticket.offset, stage.data, ticket.bytes);
    }
    ++drained;
    if (ticket.last) announcer.add(lane == ticket.source ? ticket.row : -1, drained, (items - next.idx) / share.step);
  };
  ring.run(fill, drain, [&](int pieces) { announcer.after(pieces); });
  announcer.finish();
}

}  // namespace deep_ep
