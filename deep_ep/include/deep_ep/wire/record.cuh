#pragma once
// What travels for one token: its row, then a tail. Rows and tails are multiples of 16 bytes, as bulk copies want them;
// records start at multiples of 128, because the link moves whole lines.
//
//   dispatch tail   token number of the source, 3 words unused; experts [K]; positions [K]; weights [K]; scales [P]
//   combine tail    weights [K]

#include <deep_ep/device/device.cuh>

namespace deep_ep {

struct Record {
  int32_t row_bytes, tail_bytes;
  EP_DEVICE int bytes() const { return (row_bytes + tail_bytes + 127) / 128 * 128; }
};

// A view of a dispatch tail. `position` is the number of earlier tokens of the same source that selected the same
// expert. Scale factors are four bytes each, whatever they mean.
struct RoutingTail {
  int32_t* words;
  int num_topk;
  EP_DEVICE int32_t& token() const { return words[0]; }
  EP_DEVICE int32_t& expert(int k) const { return words[4 + k]; }
  EP_DEVICE int32_t& position(int k) const { return words[4 + num_topk + k]; }
  EP_DEVICE float& weight(int k) const { return reinterpret_cast<float*>(words)[4 + 2 * num_topk + k]; }
  EP_DEVICE int32_t& scale(int i) const { return words[4 + 3 * num_topk + i]; }
};

}  // namespace deep_ep
