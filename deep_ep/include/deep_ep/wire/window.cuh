#pragma once
// The window: memory that every rank of the NVLink domain can load from and store to. All windows have the same regions
// at the same offsets (deep_ep/layout.py owns the table), so an address is a base plus an offset.
//
//   control    epoch, counters, drained marks                  written by this rank and, a word each, by its peers
//   partials   one word per (block, expert or rank), and one   written and read by this rank's blocks only
//   messages   one Message per source rank                     written by that source
//   arrived    one mark per (source rank, token)               written by that source
//   routed     one word per (source rank, token)               written by that source, this rank included
//   labels     two words per (source rank, token, selection)   written by that source, this rank included
//   rows       dispatch: one record per (source rank, token)   written by that source; a rank keeps none for itself
//              combine: one record per (holder rank, slot),    written by the rank that had the token
//              or one per (token, selection) of this rank      written by the rank of the selection's expert
//   registered tensors of the user                             written by the user, read by peers in place

#include <deep_ep/device/device.cuh>
#include <deep_ep/limits.cuh>
#include <deep_ep/wire/record.cuh>

namespace deep_ep {

// Every operation on a buffer has the next epoch. Marks and words carry the epoch they were written in, so nothing is
// ever reset, and a replayed CUDA graph counts on like any other launch.
struct Control {
  uint32_t epoch;               // of the last finished operation
  uint32_t blocks_done;         // blocks of the running operation that have finished, in all its launches
  uint32_t claimed[2];          // [queue]: items of the running operation that warps have taken
  uint32_t gave_up;             // not 0: some wait of this rank has ended in vain
  uint32_t broken;              // not 0: and the operation in which it did has ended; nothing is done any more
  uint32_t reserved[26];        // the words above are this rank's own; peers write the next cache line
  uint32_t drained[kMaxRanks];  // [r]: the last operation in which rank r has read all that this rank sent to it
};

// What warps share out among them as they get to it (claims.cuh).
enum class Queue { kSend, kReceive };

struct Window {
  char* base[kMaxRanks];  // as this rank addresses them
  int32_t rank, num_ranks;
  int32_t slots_per_source;  // arrival marks that the region holds for each source
  int32_t message_words;     // words of one Message
  int32_t number;            // of the buffer, among those that the same ranks have built
  uint64_t partials, messages, arrived, routed, labels, rows, registered;  // offsets in bytes
};

EP_DEVICE Control& control(const Window& window, int at) { return *reinterpret_cast<Control*>(window.base[at]); }

// An operation that begins. What a rank's failed one has left, places of tokens for one, is anything; calls may be
// queued behind it, or be replayed in a graph, before any host knows: they do nothing.
struct Operation {
  uint32_t epoch;
  bool is_void;
};

// The same for all threads of an operation.
EP_DEVICE Operation begin_operation(const Window& window) {
  const Control& own = control(window, window.rank);
  const uint32_t epoch = device::load_relaxed_gpu(&own.epoch) + 1, broken = device::load_relaxed_gpu(&own.broken);
  return {epoch, broken != 0};  // both are asked for at once
}

// What block `block` of this rank counted.
constexpr int kPartialWords = kMaxExperts + kMaxRanks;

EP_DEVICE uint64_t* partials(const Window& window, int block) {
  return reinterpret_cast<uint64_t*>(window.base[window.rank] + window.partials) + block * kPartialWords;
}

// The message that lies at rank `at` and that rank `from` wrote.
EP_DEVICE uint64_t* message(const Window& window, int at, int from) {
  return reinterpret_cast<uint64_t*>(window.base[at] + window.messages) + int64_t(from) * window.message_words;
}

// Dispatch: `slot` is a token's number at its source. Combine: its number among those that its owner sent there.
EP_DEVICE uint32_t* arrived(const Window& window, int at, int from, int slot) {
  return reinterpret_cast<uint32_t*>(window.base[at] + window.arrived) + int64_t(from) * window.slots_per_source + slot;
}

// The slot at rank `at` of a token of rank `from`, as a word (word.cuh): its number among those of that rank that come
// to `at`, or -1.
EP_DEVICE uint64_t* routed(const Window& window, int at, int from, int token) {
  return reinterpret_cast<uint64_t*>(window.base[at] + window.routed) + int64_t(from) * window.slots_per_source + token;
}

// Record `slot` of those that rank `from` puts at rank `at`. Only peers have a place there, so the own rank is left
// out.
EP_DEVICE char* staged(const Window& window, int at, int from, int slot, int max_tokens, int record_bytes) {
  const int64_t place = from < at ? from : from - 1;
  return window.base[at] + window.rows + (place * max_tokens + slot) * record_bytes;
}

// The label words of selection k of a token of rank `from`, at rank `at`. Nothing else is ever written there, so a word
// with this epoch is this operation's, whatever the sizes of the operations before.
EP_DEVICE uint64_t* label(const Window& window, int at, int from, int token, int k, int max_tokens, int num_topk) {
  const int64_t selection = (int64_t(from) * max_tokens + token) * num_topk + k;
  return reinterpret_cast<uint64_t*>(window.base[at] + window.labels) + selection * kLabelWords;
}

// Record `place` of those that combine brings to rank `at` when every selection has its own: token x num_topk + k. Any
// rank may write it, since one rank has the selection's expert.
EP_DEVICE char* returned(const Window& window, int at, int64_t place, int record_bytes) {
  return window.base[at] + window.rows + place * record_bytes;
}

}  // namespace deep_ep
