// The only header that kernels include for what the machine can do. Both back ends define the same names: sm90/ for
// GPUs (nvcc, NVRTC), sim/ for the simulated machine (g++). docs/primitives.md says what each primitive promises.
#pragma once

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#include <deep_ep/device/sm90/bulk.cuh>
#include <deep_ep/device/sm90/convert.cuh>
#include <deep_ep/device/sm90/group.cuh>
#include <deep_ep/device/sm90/memory.cuh>
#include <deep_ep/device/sm90/thread.cuh>
#include <deep_ep/device/sm90/time.cuh>
#include <deep_ep/device/sm90/warp.cuh>
#else
#include <deep_ep/device/sim/bulk.cuh>
#include <deep_ep/device/sim/convert.cuh>
#include <deep_ep/device/sim/group.cuh>
#include <deep_ep/device/sim/memory.cuh>
#include <deep_ep/device/sim/thread.cuh>
#include <deep_ep/device/sim/time.cuh>
#include <deep_ep/device/sim/warp.cuh>
#endif
