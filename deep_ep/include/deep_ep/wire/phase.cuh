#pragma once
// Names of the waits that can time out; deep_ep/ops/faults.py gives them their words in error messages.

#include <deep_ep/device/device.cuh>

namespace deep_ep::phase {

constexpr uint32_t kAdmit = 1;     // for a peer to have read what the operation before this one sent to it
constexpr uint32_t kLookBack = 2;  // for the counts of this rank's other blocks
constexpr uint32_t kCollect = 3;   // for a source's message of counts
constexpr uint32_t kCopyOut = 4;   // for a source's token
constexpr uint32_t kReduce = 5;    // for a peer's partial result
constexpr uint32_t kSettle = 6;    // for the places that this rank's other blocks find

}  // namespace deep_ep::phase
