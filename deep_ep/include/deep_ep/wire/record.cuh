#pragma once
// What travels for one token. Its row, with a tail behind it, makes a record; rows and tails are multiples of 16 bytes,
// as bulk copies want them, and records start at multiples of 128, because the link moves whole lines. What is said of
// a dispatched token beside its row is its label, which comes from other warps, and to this rank's own tokens too.
//
//   dispatch tail   scale factors [P]
//   combine tail    weights [K]
//   label           experts [K]; positions [K]; weights [K]

#include <deep_ep/device/device.cuh>

namespace deep_ep {

struct Record {
  int32_t row_bytes, tail_bytes;
  int32_t label_bytes;  // 0 in combine
  EP_DEVICE int bytes() const { return (row_bytes + tail_bytes + 127) / 128 * 128; }
};

// `position` is the number of earlier tokens of the same source that selected the same expert.
struct Label {
  int32_t* words;
  int num_topk;
  EP_DEVICE int32_t& expert(int k) const { return words[k]; }
  EP_DEVICE int32_t& position(int k) const { return words[num_topk + k]; }
  EP_DEVICE float& weight(int k) const { return reinterpret_cast<float*>(words)[2 * num_topk + k]; }
};

}  // namespace deep_ep
