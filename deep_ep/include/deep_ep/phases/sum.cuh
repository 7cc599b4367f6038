#pragma once
// How a warp adds rows of bfloat16: in registers, in float32, kTogether vectors of a lane at a time. Plain loads and
// stores; rows lie in global memory.

#include <deep_ep/device/device.cuh>
#include <deep_ep/wire/integers.cuh>

namespace deep_ep {

constexpr int kVectorBytes = int(sizeof(device::Vector16));
constexpr int kStride = 32 * kVectorBytes;  // bytes that a warp takes in at once

// A part of a row: of each lane, kTogether vectors that lie kStride apart.
template <int kTogether>
struct Columns {
  int offset, end;  // of this lane's first vector; of the row, or of what of it is added at a time

  // Behind the end a lane has nothing to store. It loads what the last lane loads: all lanes stay together.
  EP_DEVICE bool mine() const { return kTogether > 1 || offset < end; }
  template <class Byte>
  EP_DEVICE Byte* of(Byte* row) const {
    return row + (kTogether > 1 ? offset : min_of(offset, end - kVectorBytes));
  }
};

// How much of what is added a warp loads at once: vectors of a lane in each row, and rows.
struct Grasp {
  int vectors, rows;
};

// Calls add(Columns<kTogether>) for every part of a row from `begin` to `end`, collectively: kTogether vectors of a
// lane while they last, so that many loads are under way, then single ones.
template <int kTogether, class Add>
EP_DEVICE void for_columns(int begin, int end, Add add) {
  const int lane_offset = device::lane_idx() * kVectorBytes;
  EP_NO_UNROLL
  for (; begin + kTogether * kStride <= end; begin += kTogether * kStride) {
    add(Columns<kTogether>{begin + lane_offset, end});
  }
  EP_NO_UNROLL
  for (; begin < end; begin += kStride) add(Columns<1>{begin + lane_offset, end});
}

// The bfloat16 of a lane's columns.
template <int kTogether>
struct Rounded {
  device::Vector16 at[kTogether];

  EP_DEVICE static Rounded load(const char* row) {
    Rounded loaded;
    for (int v = 0; v < kTogether; ++v) {
      loaded.at[v] = device::load_streaming(reinterpret_cast<const device::Vector16*>(row + v * kStride));
    }
    return loaded;
  }

  // To global memory, where nobody looks again soon.
  EP_DEVICE void stream(char* to) const {
    for (int v = 0; v < kTogether; ++v) {
      device::store_streaming(reinterpret_cast<device::Vector16*>(to + v * kStride), at[v]);
    }
  }

  // To shared memory.
  EP_DEVICE void keep(char* to) const {
    for (int v = 0; v < kTogether; ++v) *reinterpret_cast<device::Vector16*>(to + v * kStride) = at[v];
  }
};

template <int kTogether>
class Sum {
 public:
  EP_DEVICE void add(const Rounded<kTogether>& row) {
    for (int v = 0; v < kTogether; ++v) {
      for (int i = 0; i < 4; ++i) {
        const device::Float2 pair = device::bf16x2_to_float2(row.at[v].word[i]);
        sum_[v][2 * i] += pair.x;
        sum_[v][2 * i + 1] += pair.y;
      }
    }
  }

  EP_DEVICE void add(const char* row) { add(Rounded<kTogether>::load(row)); }

  // The row of each lane in `lanes`, in the order of the lanes. As many as kRows are loaded before the first is added,
  // since nothing else hides what memory takes. Collective.
  template <int kRows>
  EP_DEVICE void add_lanes(uint32_t lanes, const char* row_of_lane, const Columns<kTogether>& at) {
    const auto take = [&] {
      const int lane = lowest_bit(lanes);
      lanes &= lanes - 1;
      return at.of(reinterpret_cast<const char*>(device::shuffle(reinterpret_cast<uint64_t>(row_of_lane), lane)));
    };
    EP_NO_UNROLL
    while (lanes != 0) {
      Rounded<kTogether> rows[kRows];
      rows[0] = Rounded<kTogether>::load(take());
      const uint32_t more = lanes;
      for (int i = 1; i < kRows; ++i) {
        if (lanes != 0) rows[i] = Rounded<kTogether>::load(take());
      }
      const int count = 1 + device::popcount(more ^ lanes);
      add(rows[0]);
      for (int i = 1; i < kRows; ++i) {
        if (i < count) add(rows[i]);
      }
    }
  }

  EP_DEVICE Rounded<kTogether> rounded() const {
    Rounded<kTogether> result;
    for (int v = 0; v < kTogether; ++v) {
      for (int i = 0; i < 4; ++i) {
        result.at[v].word[i] = device::float2_to_bf16x2({sum_[v][2 * i], sum_[v][2 * i + 1]});
      }
    }
    return result;
  }

 private:
  float sum_[kTogether][8] = {};
};

// A sum of as many vectors as the columns have.
template <int kTogether>
EP_DEVICE Sum<kTogether> empty_sum(const Columns<kTogether>&) {
  return {};
}

}  // namespace deep_ep
