#pragma once
// Rows that nobody sends: they lie in registered memory, and peers read them there.
//
// reads         what every source says of its own
// writes        where this rank's rows lie, at all ranks
// waits for     the words of all sources; at the end of the call, every peer to have read this rank's rows
// leaves behind the addresses of all ranks' rows, which may be read; at the end, rows that may be written again
//
// A rank says where its rows lie together with what it calls (agree.cuh), and as freely: the words of odd and even
// epochs lie apart. What was written before the call is released with them.

#include <deep_ep/phases/agree.cuh>
#include <deep_ep/phases/tables.cuh>
#include <deep_ep/wire/message.cuh>
#include <deep_ep/wire/phase.cuh>
#include <deep_ep/wire/window.cuh>
#include <deep_ep/wire/word.cuh>

namespace deep_ep {

// Where registered rows lie, and what goes beside each: scale factors in a dispatch, weights in a combine. In words of
// 4 bytes, from the beginning of the registered memory.
struct InPlace {
  uint32_t rows, beside;
  uint32_t row_words, beside_words;  // of one row
};

// By a warp. `first_of_lane`: lane r's, of the rows that rank r is to read.
EP_DEVICE void offer(const Window& window, uint32_t epoch, const InPlace& own, int first_of_lane) {
  const int rank = device::lane_idx();
  if (rank >= window.num_ranks) return;
  uint64_t* at = plan_word(window, epoch, rank, window.rank, message_word::kPlanWords);
  device::store_release_sys(at, word(own.rows + first_of_lane * own.row_words, epoch));
  device::store_release_sys(at + 1, word(own.beside + first_of_lane * own.beside_words, epoch));
}

// Lane r learns where rank r's rows are. Collective over the warp; false if some rank did not say.
EP_DEVICE bool find_rows(const Window& window, uint32_t epoch, const device::Patience& patience, Found& found) {
  const int source = device::lane_idx();
  bool came = true;
  if (source < window.num_ranks) {
    const uint64_t* at = plan_word(window, epoch, window.rank, source, message_word::kPlanWords);
    const auto take = [&](const uint64_t* from) {
      int value = 0;
      came = came && await_word(from, epoch, patience, phase::kFindRows, source, value);
      static_cast<void>(device::load_acquire_sys(from));  // once more, to acquire the rows
      return window.base[source] + window.registered + uint64_t(static_cast<uint32_t>(value)) * 4;
    };
    found.rows = take(at);
    found.beside = take(at + 1);
  }
  device::fence_async_proxy_global();  // the copy engine may read them
  return device::all(came);
}

// What a lane has found. Collective over the warp.
EP_DEVICE Found of_lane(const Found& found, int lane) {
  return {reinterpret_cast<const char*>(device::shuffle(reinterpret_cast<uint64_t>(found.rows), lane)),
          reinterpret_cast<const char*>(device::shuffle(reinterpret_cast<uint64_t>(found.beside), lane))};
}

}  // namespace deep_ep
