#pragma once
// What SMs move while they do nothing else: rows of one size, loaded in any order, stored in order, or both.
//
// By the copy engine it is the ring that dispatch and combine use (deep_ep/phases/ring.cuh); by threads each warp loads
// a whole row into registers and stores it from there. What is only loaded is thrown away; what is only stored is
// whatever is there.

#include <deep_ep/phases/ring.cuh>

namespace deep_ep {

enum class By { kCopyEngine, kThreads };

struct MoveConfig {
  int num_warps, num_stages, row_bytes;
  By by;
  bool loads, stores;
};

struct MoveArgs {
  const char* from;
  char* to;
  const int32_t* order;  // [num_rows]: the row that is loaded
  int32_t num_rows;
};

template <MoveConfig C>
EP_DEVICE void move_by_engine(const MoveArgs& a, int first, int step) {
  const auto ring =
      Ring<C.num_stages, 1>::at(device::shared_memory<char>(), device::warp_idx(), C.num_warps, C.row_bytes);
  int next = first, stored = first;
  ring.run(
      [&](const Stage& stage, bool) {
        if (next >= a.num_rows) return Filled::kNoMore;
        if (device::elect()) {
          device::mbarrier_arrive_expect(*stage.full, C.loads ? C.row_bytes : 0);
          if (C.loads)
            device::bulk_load(stage.data, a.from + int64_t(a.order[next]) * C.row_bytes, C.row_bytes, *stage.full);
        }
        next += step;
        return Filled::kYes;
      },
      [&](const Stage& stage) {
        if (C.stores && device::elect())
          device::bulk_store(a.to + int64_t(stored) * C.row_bytes, stage.data, C.row_bytes);
        stored += step;
      },
      [](int) {});
}

template <MoveConfig C>
EP_DEVICE void move_by_threads(const MoveArgs& a, int first, int step) {
  using Vector = device::Vector16;
  constexpr int kVectors = C.row_bytes / int(32 * sizeof(Vector));
  static_assert(kVectors * 32 * sizeof(Vector) == C.row_bytes, "a row is a whole number of vectors of each lane");
  uint32_t seen = 0;
  for (int row = first; row < a.num_rows; row += step) {
    Vector row_of_warp[kVectors] = {};
    const auto* from = reinterpret_cast<const Vector*>(a.from + int64_t(a.order[row]) * C.row_bytes);
    auto* to = reinterpret_cast<Vector*>(a.to + int64_t(row) * C.row_bytes);
    for (int i = 0; C.loads && i < kVectors; ++i)
      row_of_warp[i] = device::load_streaming(from + i * 32 + device::lane_idx());
    for (int i = 0; i < kVectors; ++i) {
      if (C.stores) device::store_streaming(to + i * 32 + device::lane_idx(), row_of_warp[i]);
      seen ^= row_of_warp[i].word[0] ^ row_of_warp[i].word[3];
    }
  }
  // Never so, but the compiler does not know, and so keeps the loads.
  if (!C.stores && seen == 0x9e3779b9u && a.num_rows < 0) a.to[0] = 1;
}

template <MoveConfig C>
EP_DEVICE void move(const MoveArgs& a) {
  const int step = device::num_blocks() * C.num_warps;
  const int first = device::block_idx() * C.num_warps + device::warp_idx();
  if constexpr (C.by == By::kCopyEngine) {
    move_by_engine<C>(a, first, step);
  } else {
    move_by_threads<C>(a, first, step);
  }
}

}  // namespace deep_ep
