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
  const int most = device::reduce_max(lane < window.num_ranks && lane != window.rank ? by_owner.count(lane) : 0);
  const int items = most * peers;  // the first row for each owner, then the second, ...
  int item = share.first, offset = 0, owner = -1, slot = -1;
  Announcer announcer(window, epoch);

  const auto fill = [&](Stage stage, bool) {
    if (offset == 0) {
      for (; item < items; item += share.step) {
        const int other = item % peers;
        owner = other < window.rank ? other : other + 1;
        slot = item / peers;
        if (slot < by_owner.count(owner)) break;
      }
      if (item >= items) return Filled::kNoMore;
    }
    const int row = by_owner.begin(owner) + slot;
    const int bytes = min_of(piece_bytes, record.row_bytes - offset);
    const bool last = offset + bytes == record.row_bytes;
    if (last && lane < num_topk) {
      reinterpret_cast<float*>(stage.data + bytes)[lane] =
          results.weights != nullptr ? results.weights[int64_t(row) * num_topk + lane] : 0.0f;
    }
    device::fence_async_proxy_shared();
    device::sync_warp();
    if (device::elect()) {
      *stage.ticket = {.row = slot,
                       .source = owner,
                       .offset = offset,
                       .bytes = last ? bytes + record.tail_bytes : bytes,
                       .last = last};
      device::mbarrier_arrive_expect(*stage.full, bytes);
      device::bulk_load(stage.data, rows.x + row * rows.stride + offset, bytes, *stage.full);
    }
    device::sync_warp();
    offset = last ? 0 : offset + bytes;
    if (last) item += share.step;
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
    if (ticket.last) announcer.add(lane == ticket.source ? ticket.row : -1, drained, (items - item) / share.step);
  };
  ring.run(fill, drain, [&](int pieces) { announcer.after(pieces); });
  announcer.finish();
}

}  // namespace deep_ep
