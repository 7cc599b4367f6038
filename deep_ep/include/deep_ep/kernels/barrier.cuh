#pragma once
// A barrier of all ranks: what any rank's stream had done before is done, and can be seen, before any rank's goes on.
//
// It is an operation like the others, with an epoch and a plan of its own: so a rank that calls something else
// meanwhile is named at once. One warp suffices.

#include <deep_ep/phases/admit.cuh>
#include <deep_ep/phases/agree.cuh>
#include <deep_ep/phases/retire.cuh>

namespace deep_ep {

struct BarrierConfig {};

struct BarrierArgs {
  Window window;
  device::Patience patience;
};

template <BarrierConfig C>
EP_DEVICE void barrier(const BarrierArgs& a) {
  const auto [epoch, is_void] = begin_operation(a.window);
  if (is_void) return;
  const Plan plan{.what = kBarrier};
  propose(a.window, epoch, plan);
  const bool all_came = agree(a.window, epoch, plan, a.patience);
  // Its marks are released, and so carry what came before; whoever is admitted to the next operation has acquired those
  // of all peers. No mark may go out before all have come: a peer that still waits for the one before would miss it.
  retire<false>(a.window, epoch, a.patience, device::num_blocks());
  if (all_came) admit_warp(a.window, epoch + 1, a.patience);
}

}  // namespace deep_ep
