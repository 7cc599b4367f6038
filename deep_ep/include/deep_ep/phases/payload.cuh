#pragma once
// Rows of bytes, and their scale factors: [rows, count] words of any strides. Where a row's scale factors lie side by
// side, the copy engine moves them like the row; else the lanes of a warp do, one by one.
//
// reads         scale factors, in memory or in a stage
// writes        scale factors, in a stage or in memory
// waits for     nothing
// leaves behind (after fence and sync of the warp) what the copy engine may take along

#include <deep_ep/device/device.cuh>

namespace deep_ep {

struct Rows {
  const char* x;
  int64_t stride;  // bytes

  EP_DEVICE const char* row(int64_t index) const { return x + index * stride; }
};

struct Scales {
  int32_t* words;              // null if there are none
  int64_t row_stride, stride;  // in words
  int32_t count;               // of a row
  int32_t in_rows;             // whether a row's lie side by side, in whole 16 bytes

  EP_DEVICE int32_t& at(int64_t row, int i) const { return words[row * row_stride + i * stride]; }
  EP_DEVICE int32_t* row(int64_t row) const { return words + row * row_stride; }
  EP_DEVICE int bytes() const { return 4 * count; }
};

EP_DEVICE void gather_scales(const Scales& scales, int64_t row, char* stage) {
  EP_NO_UNROLL
  for (int i = device::lane_idx(); i < scales.count; i += 32) reinterpret_cast<int32_t*>(stage)[i] = scales.at(row, i);
}

EP_DEVICE void spread_scales(const Scales& scales, int64_t row, const char* stage) {
  EP_NO_UNROLL
  for (int i = device::lane_idx(); i < scales.count; i += 32) {
    scales.at(row, i) = reinterpret_cast<const int32_t*>(stage)[i];
  }
}

}  // namespace deep_ep
