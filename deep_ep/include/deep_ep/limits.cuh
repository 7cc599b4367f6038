#pragma once
// The largest values that kernels make room for. deep_ep/layout.py and deep_ep/plan.py hold the same numbers; a unit
// test compares the two.

namespace deep_ep {

constexpr int kMaxRanks = 32;        // of one NVLink domain: a rank mask is one word, and a lane stands for a rank
constexpr int kMaxTopk = 32;         // selections of a token: a lane stands for a selection
constexpr int kMaxExperts = 2048;    // of all ranks together
constexpr int kMaxTokens = 1 << 21;  // of a rank in one call, less one: a place fits into a word (record.cuh)
constexpr int kMaxBlocks = 160;      // of one launch

}  // namespace deep_ep
