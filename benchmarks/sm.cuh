#pragma once
// What SMs move while they do nothing else: rows of one size, loaded in any order, stored in order, or both.
//
// By the copy engine it is the ring that dispatch and combine use (deep_ep/phases/ring.cuh); by threads each warp loads
// a whole row into registers and stores it from there. What is only loaded is thrown away; what is only stored is
// zeros, or whatever a stage holds.

#include <deep_ep/phases/ring.cuh>
#include <deep_ep/wire/blocks.cuh>

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
EP_DEVICE void move_by_engine(const MoveArgs& a, const Team& team) {
  const auto ring =
      Ring<C.num_stages, 1>::at(device::shared_memory<char>(), device::warp_idx(), C.num_warps, C.row_bytes);
  int next = team.own, stored = team.own;
  ring.run(
      [&](const Stage& stage, bool) {
        if (next >= a.num_rows) return Filled::kNoMore;
        if (device::elect()) {
          device::mbarrier_arrive_expect(*stage.full, C.loads ? C.row_bytes : 0);
          const char* from = a.from + int64_t(a.order[next]) * C.row_bytes;
          if (C.loads) device::bulk_load(stage.data, from, C.row_bytes, *stage.full);
        }
        next += team.count;
        return Filled::kYes;
      },
      [&](const Stage& stage) {
        char* to = a.to + int64_t(stored) * C.row_bytes;
        if (C.stores && device::elect()) device::bulk_store(to, stage.data, C.row_bytes);
        stored += team.count;
      },
      [](int) {});
}

template <MoveConfig C>
EP_DEVICE void move_by_threads(const MoveArgs& a, const Team& team) {
  using Vector = device::Vector16;
  constexpr int kVectors = C.row_bytes / int(32 * sizeof(Vector));
  static_assert(kVectors * 32 * sizeof(Vector) == C.row_bytes, "a row is a whole number of vectors of each lane");
  uint32_t seen = 0;
  for (int row = team.own; row < a.num_rows; row += team.count) {
    Vector vectors[kVectors] = {};
    const auto* from = reinterpret_cast<const Vector*>(a.from + int64_t(a.order[row]) * C.row_bytes);
    auto* to = reinterpret_cast<Vector*>(a.to + int64_t(row) * C.row_bytes);
    if constexpr (C.loads) {
      for (int i = 0; i < kVectors; ++i) vectors[i] = device::load_streaming(from + i * 32 + device::lane_idx());
    }
    for (int i = 0; i < kVectors; ++i) {
      if (C.stores) device::store_streaming(to + i * 32 + device::lane_idx(), vectors[i]);
      for (uint32_t word : vectors[i].word) seen ^= word;  // all of them, or less is loaded
    }
  }
  // Never so, but the compiler does not know, and so keeps the loads.
  if (!C.stores && seen == 0x9e3779b9u && a.num_rows < 0) a.to[0] = 1;
}

template <MoveConfig C>
EP_DEVICE void move(const MoveArgs& a) {
  const Team team = across({0, device::num_blocks()}, device::warp_idx(), C.num_warps);
  if constexpr (C.by == By::kCopyEngine) {
    move_by_engine<C>(a, team);
  } else {
    move_by_threads<C>(a, team);
  }
}

}  // namespace deep_ep
