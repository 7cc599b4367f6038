#pragma once
// How one warp moves rows: a ring of stages in shared memory, loads running ahead of stores. Each warp has its own
// ring, so warps never wait for each other.
//
// reads         what fill() loads
// writes        what drain() stores
// waits for     its own copies (which cannot fail) and whatever fill() waits for
// leaves behind every store complete and visible to this warp
//
// A piece is one stage full: a row, or a part of a long one. The warp's three verbs, each called by all its lanes:
//   fill(stage, patient)   starts the loads of the next piece. The elected lane issues the loads and one
//                    mbarrier_arrive_expect of all their bytes. If the piece depends on a peer and has not come, fill
//                    says kNotYet, so that what has is not held up; only when `patient` may it wait.
//   drain(stage)     the loads have landed: start the stores; the elected lane issues them. One bulk group a piece.
//   after(pieces)    so many pieces have been drained; the stores of the latest may still be under way.

#include <deep_ep/device/device.cuh>

namespace deep_ep {

enum class Filled { kYes, kNotYet, kNoMore };

// What the warp must remember of a piece between the verbs.
struct Ticket {
  int32_t token, row, rank, offset, bytes, first, last;
  uint32_t ranks;  // a mask
};

struct Stage {
  char* data;
  Ticket* ticket;
  device::Mbarrier* full;
};

// kStoring pieces may still be leaving their stages while later ones load: more of them fill a long way, such as the
// link.
template <int kStages, int kStoring>
struct Ring {
  static_assert(kStoring >= 0 && kStoring < kStages);

  char* data;
  Ticket* tickets;
  device::Mbarrier* full;
  int stage_bytes;

  EP_DEVICE static constexpr int bytes(int num_warps, int stage_bytes) {
    return (num_warps * kStages * (stage_bytes + int(sizeof(Ticket)) + int(sizeof(device::Mbarrier))) + 127) / 128 *
           128;
  }

  // The ring of warp `warp` of `num_warps` that share the memory at `base`. Collective over the warp.
  EP_DEVICE static Ring at(char* base, int warp, int num_warps, int stage_bytes) {
    Ring ring;
    ring.stage_bytes = stage_bytes;
    ring.data = base + warp * kStages * stage_bytes;
    char* tickets = base + num_warps * kStages * stage_bytes;
    ring.tickets = reinterpret_cast<Ticket*>(tickets) + warp * kStages;
    ring.full = reinterpret_cast<device::Mbarrier*>(tickets + num_warps * kStages * sizeof(Ticket)) + warp * kStages;
    if (device::elect()) {
      for (int i = 0; i < kStages; ++i) device::mbarrier_init(ring.full[i], 1);
      device::fence_mbarrier_init();
    }
    device::sync_warp();
    return ring;
  }

  EP_DEVICE Stage stage(int piece) const {
    const int index = piece % kStages;
    return {data + index * stage_bytes, tickets + index, full + index};
  }

  template <class Fill, class Drain, class After>
  EP_DEVICE void run(Fill fill, Drain drain, After after) const {
    int filled = 0, drained = 0;
    bool more = true;
    EP_NO_UNROLL
    while (true) {
      // The latest drained pieces may still be leaving their stages.
      EP_NO_UNROLL
      while (more && filled - drained + (drained < kStoring ? drained : kStoring) < kStages) {
        const Filled result = fill(stage(filled), filled == drained);
        more = result != Filled::kNoMore;
        if (result != Filled::kYes) break;
        ++filled;
      }
      if (drained == filled) {
        if (!more) break;
        continue;
      }
      const Stage now = stage(drained);
      device::mbarrier_wait(*now.full, drained / kStages & 1);
      drain(now);
      if (device::elect()) {
        device::bulk_commit();
        device::bulk_wait_read<kStoring>();
      }
      device::sync_warp();
      after(++drained);
    }
    if (device::elect()) device::bulk_wait<0>();
    device::sync_warp();
  }
};

}  // namespace deep_ep
