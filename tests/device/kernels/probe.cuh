// What all probes of primitives share: they read words, write words, and may use a window that is zero at first.
#pragma once

#include <deep_ep/device/device.cuh>

namespace deep_ep {

struct ProbeConfig {
  int variant;  // which of a probe's few forms
};

struct ProbeArgs {
  const uint32_t* input;
  uint32_t* output;
  unsigned char* window;  // of this rank
  unsigned char* peer;    // the other rank's window (this one's, where there is one rank)
  int count;              // what it counts is the probe's affair
  int rank;
};

EP_DEVICE int global_thread_idx() { return device::block_idx() * device::num_threads() + device::thread_idx(); }

}  // namespace deep_ep
