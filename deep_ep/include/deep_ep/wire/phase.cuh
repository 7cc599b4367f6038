#pragma once
// Names of the waits that can time out; deep_ep/ops/faults.py gives them their words in error messages.

#include <deep_ep/device/device.cuh>

namespace deep_ep::phase {

constexpr uint32_t kAdmit = 1;          // for a peer to have read what the operation before this one sent to it
constexpr uint32_t kLookBack = 2;       // for the counts of this rank's other blocks
constexpr uint32_t kCollect = 3;        // for a source's message of counts
constexpr uint32_t kCopyOut = 4;        // for a source's token
constexpr uint32_t kReduce = 5;         // for a peer's partial result
constexpr uint32_t kLabel = 6;          // for a source to say whether a token comes
constexpr uint32_t kAgree = 7;          // for a source to say what it calls
constexpr uint32_t kFindRows = 9;       // for a source to say where its rows can be read
constexpr uint32_t kAwaitReaders = 10;  // for a peer to have read this rank's rows in place

// No wait: a source called something else. Which word of its plan differs stands above kItemShift.
constexpr uint32_t kDiffer = 8;
constexpr int kItemShift = 8;

}  // namespace deep_ep::phase
