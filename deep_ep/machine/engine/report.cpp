#include "report.hpp"

#include <map>

#include "copies.hpp"
#include "memory.hpp"
#include "scheduler.hpp"

namespace deep_ep::sim {
namespace {

// {0, 1, 2, 7} -> "0-2, 7"
std::string join_ranges(const std::vector<int>& numbers) {
  std::string text;
  for (std::size_t first = 0; first < numbers.size();) {
    std::size_t last = first;
    while (last + 1 < numbers.size() && numbers[last + 1] == numbers[last] + 1) ++last;
    if (!text.empty()) text += ", ";
    text += std::to_string(numbers[first]);
    if (last > first) text += "-" + std::to_string(numbers[last]);
    first = last + 1;
  }
  return text;
}

std::string describe_meeting(const Rendezvous& meeting) {
  return " (" + std::to_string(meeting.arrived) + " of " + std::to_string(meeting.expected) + " threads are there)";
}

std::string describe_wait(const Fiber& fiber) {
  const std::string what = fiber.wait.what;
  const Block& block = *fiber.block;
  if (fiber.wait.waiting != nullptr) {
    return "peer " + std::to_string(fiber.waiting.peer) + " in phase " + std::to_string(fiber.waiting.phase) +
           ": expects " + std::to_string(fiber.waiting.expected) + ", sees " + std::to_string(fiber.wait.seen);
  }
  if (what == "mbarrier") {
    std::string text = what;
    for (const std::uintptr_t word : fiber.watched) {
      text += " (" + describe_mbarrier(block, reinterpret_cast<const void*>(word)) + ")";
    }
    return text;
  }
  if (what == "sync_block") return what + describe_meeting(block.barriers[0].meeting);
  if (what == "sync_cluster") {
    return what + describe_meeting(*block.grid->clusters[block.idx / block.grid->cluster_blocks]);
  }
  if (what.starts_with("barrier ")) return what + describe_meeting(block.barriers[std::stoi(what.substr(8))].meeting);
  if (fiber.wait.what == fiber.warp->what) return what + describe_meeting(fiber.warp->meeting);
  return what;
}

}  // namespace

std::string name_of(const Fiber& fiber) {
  return "rank " + std::to_string(fiber.rank()) + " block " + std::to_string(fiber.block->idx) + " thread " +
         std::to_string(fiber.thread);
}

std::string name_of(const Block& block) {
  return "shared memory of rank " + std::to_string(block.grid->rank) + " block " + std::to_string(block.idx);
}

std::string name_of(const Site& site) { return std::string(site.file_name()) + ":" + std::to_string(site.line()); }

std::string describe_deadlock(const std::vector<Fiber*>& fibers) {
  std::map<std::pair<const Block*, std::string>, std::vector<int>> threads;  // by what they wait for
  std::vector<std::pair<const Block*, std::string>> order;
  for (const Fiber* fiber : fibers) {
    std::string state = "have left the kernel";
    if (!fiber->is_done) state = "wait for " + describe_wait(*fiber) + " at " + name_of(fiber->wait.site);
    const auto key = std::pair(static_cast<const Block*>(fiber->block), state);
    if (threads[key].empty()) order.push_back(key);
    threads[key].push_back(fiber->thread);
  }
  std::string text = "deadlock: nothing can move any more";
  for (const auto& key : order) {
    const Block& block = *key.first;
    text += "\n  rank " + std::to_string(block.grid->rank) + " block " + std::to_string(block.idx) + " threads " +
            join_ranges(threads[key]) + ": " + key.second;
  }
  return text;
}

}  // namespace deep_ep::sim
