#pragma once
// Which experts, and so which ranks, a token goes to.

#include <deep_ep/device/device.cuh>
#include <deep_ep/wire/integers.cuh>

namespace deep_ep {

struct Routing {
  const void* topk_idx;  // [num_tokens, num_topk], 4- or 8-byte integers; anything outside [0, num_experts) is "none"
  int32_t num_tokens, num_topk, num_experts, experts_per_rank;
  int32_t index_bytes;     // 4 or 8
  int32_t max_tokens;      // of any rank
  float ranks_per_expert;  // 1 / experts_per_rank

  // expert / experts_per_rank. The sum is half an expert away from the next rank, and float errs by less (a test
  // compares all quotients); a division takes many instructions.
  EP_DEVICE int rank_of(int expert) const {
    return static_cast<int>((static_cast<float>(expert) + 0.5f) * ranks_per_expert);
  }

  // Expert of selection `entry = token * num_topk + k`, or -1. Indices are read as words: of 8 bytes, the low one holds
  // any expert, and the high one is 0 then.
  EP_DEVICE int expert(int64_t entry) const {
    const uint32_t* words = static_cast<const uint32_t*>(topk_idx) + entry * (index_bytes / 4);
    const uint32_t low = words[0], high = index_bytes == 8 ? words[1] : 0;
    return high == 0 && low < static_cast<uint32_t>(num_experts) ? static_cast<int>(low) : -1;
  }

  // Copies an entry as it is to the same place of another matrix of such indices.
  EP_DEVICE void copy(int64_t entry, void* to) const {
    if (index_bytes == 8) {
      static_cast<int64_t*>(to)[entry] = static_cast<const int64_t*>(topk_idx)[entry];
    } else {
      static_cast<int32_t*>(to)[entry] = static_cast<const int32_t*>(topk_idx)[entry];
    }
  }
};

// A lane's selection of a token. `speaks` is set in one lane for every rank that the token goes to: the lane of that
// rank's last selection, so the speaking lanes, in order, are the order in which combine adds.
struct Selection {
  int rank;
  bool speaks;
};

// Lane k has selection k of one token.
EP_DEVICE Selection select(const Routing& routing, int expert_of_lane) {
  const int rank = expert_of_lane >= 0 ? routing.rank_of(expert_of_lane) : -1;
  const uint32_t same = device::match_any(rank);
  return {rank, rank >= 0 && same >> device::lane_idx() == 1};
}

// Several tokens side by side: lane j * num_topk + k has selection k of the j-th one. Lanes may be left over.
struct Abreast {
  int num_topk;
  int tokens;  // so many
  int j, k;    // this lane's

  EP_DEVICE explicit Abreast(int topk)
      : num_topk(topk), tokens(32 / topk), j(device::lane_idx() / topk), k(device::lane_idx() % topk) {}

  // This lane's entry of topk_idx, for tokens from `first` on; -1 if its token is not before `end`.
  EP_DEVICE int64_t entry(int first, int end) const {
    return j < tokens && first + j < end ? int64_t(first + j) * num_topk + k : -1;
  }

  // The lanes of this lane's token.
  EP_DEVICE uint32_t lanes() const { return (num_topk == 32 ? ~0u : (1u << num_topk) - 1) << (device::lane_idx() - k); }

  // As select() above, for each token.
  EP_DEVICE Selection select(const Routing& routing, int expert_of_lane) const {
    const int rank = expert_of_lane >= 0 ? routing.rank_of(expert_of_lane) : -1;
    const uint32_t same = device::match_any(rank) & lanes();
    return {rank, rank >= 0 && same >> device::lane_idx() == 1};
  }

  // To every lane with a rank, the value of the lane that speaks for its token there.
  EP_DEVICE int hear(const Selection& selection, int value) const {
    const uint32_t same = device::match_any(selection.rank) & lanes();
    return device::shuffle(value, highest_bit(same));
  }
};

// What lane k holds of a token: its selection, and the slot at that expert's rank. Loaded a token ahead, so nobody
// waits for it.
struct Choice {
  int expert = -1, slot = -1;
};

EP_DEVICE Choice load_choice(const Routing& routing, const int32_t* slots, int token) {
  const int k = device::lane_idx();
  if (token >= routing.num_tokens || k >= routing.num_topk) return {};
  const int64_t entry = int64_t(token) * routing.num_topk + k;
  return {routing.expert(entry), slots == nullptr ? -1 : slots[entry]};
}

// Consecutive tokens of this rank.
struct Range {
  int begin, end;
};

// Part `part` of `parts` nearly equal, consecutive ones.
EP_DEVICE Range part_of(Range whole, int part, int parts) {
  const uint32_t tokens = whole.end - whole.begin;  // far below 2^32 / kMaxBlocks
  return {whole.begin + static_cast<int>(tokens * part / parts),
          whole.begin + static_cast<int>(tokens * (part + 1) / parts)};
}

}  // namespace deep_ep
