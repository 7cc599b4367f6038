#pragma once
// What travels for one token. Its row, with a tail behind it, makes a record; rows and tails are multiples of 16 bytes,
// as bulk copies want them, and records start at multiples of 128, because the link moves whole lines. What is said of
// a dispatched token beside its row is its label, which comes from other warps, and to this rank's own tokens too.
//
//   dispatch tail   scale factors [P]
//   combine tail    weights [K]
//   label           place and weight of each selection, as words (word.cuh)

#include <deep_ep/device/device.cuh>
#include <deep_ep/limits.cuh>

namespace deep_ep {

struct Record {
  int32_t row_bytes, tail_bytes;
  EP_DEVICE int bytes() const { return (row_bytes + tail_bytes + 127) / 128 * 128; }
};

// A selection's expert, and the number of earlier tokens of the same source that selected the same expert, in 32 bits.
struct Place {
  int expert, position;

  static constexpr uint32_t kNone = ~0u;
  static constexpr int kLost = kMaxTokens - 1;  // a position behind all that are told: some tokens name an expert twice
  static_assert(int64_t(kMaxExperts) * kMaxTokens <= int64_t(1) << 32);

  EP_DEVICE uint32_t packed() const {
    const int told = position < kLost ? position : kLost;
    return expert < 0 ? kNone : static_cast<uint32_t>(expert) * kMaxTokens + static_cast<uint32_t>(told);
  }
  EP_DEVICE static Place unpack(uint32_t packed) {
    if (packed == kNone) return {-1, -1};
    return {static_cast<int>(packed / kMaxTokens), static_cast<int>(packed % kMaxTokens)};
  }
};

constexpr int kLabelWords = 2;  // of a selection: its place, its weight

}  // namespace deep_ep
