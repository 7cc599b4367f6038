#pragma once
// Whether what comes goes into memory that the host has allocated before anybody knew.
//
// reads         tables of a block that has collected
// writes        nothing
// waits for     nothing
// leaves behind an answer that all blocks, and the host (deep_ep/calls/expected.py), find alike

#include <deep_ep/phases/land.cuh>
#include <deep_ep/wire/integers.cuh>

namespace deep_ep {

// Memory that would be far too large stays unused, too. The most is what there is (Received).
struct Least {
  int32_t rows, expanded_rows;
};

EP_DEVICE bool fits(int num_ranks, int experts_per_rank, int alignment, const Tables& tables, const Least& least,
                    const Received& most) {
  const int rows = tables.row_base[num_ranks], last = experts_per_rank - 1;
  // Of an expert, the rows of source 0 come first.
  const int expanded_rows = tables.expert_row[last] + align_up(tables.coming[last], alignment);
  return least.rows <= rows && rows <= most.rows && least.expanded_rows <= expanded_rows &&
         expanded_rows <= most.expanded_rows;
}

}  // namespace deep_ep
