// The copy engines. Every bulk copy is an agent: it reads its source and writes its destination at two moments that
// the scheduler draws, in any order among copies.
#pragma once

#include <cstddef>
#include <string>

#include "model.hpp"

namespace deep_ep::sim {

bool has_copies();
void advance_a_copy();

// A recycled block is now another one.
void rename_lines(Block& block);

// A thread leaves the kernel; fails if its copies still need its memory.
void check_leaving(const Fiber& fiber);

// What is under way for an mbarrier, for reports: "1 of 1 arrivals and 512 bytes outstanding".
std::string describe_mbarrier(const Block& block, const void* barrier);

// Brings the copies of a kernel that all its threads have left to their end.
void complete_copies_of(const Grid& grid);

void forget_copies();

// For mbarriers.cpp: a bulk load brought its bytes; `shared` and `global` are the lines that did it.
void complete_bytes(MbarrierState& state, device::Mbarrier* barrier, int num_bytes, const tsan::Line& shared,
                    const tsan::Line& global);
MbarrierState& state_of(device::Mbarrier& barrier, const Site& site);

// Tells a copy engine what whoever released `token` did.
void tell(CopyEngine& engine, tsan::Token& token);

}  // namespace deep_ep::sim
