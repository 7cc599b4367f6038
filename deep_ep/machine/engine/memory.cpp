#include "memory.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <new>
#include <sstream>

#include "model.hpp"

namespace deep_ep::sim {
namespace {

constexpr std::size_t kPage = 4096;
constexpr std::size_t kAlignment = 128;
constexpr std::uint8_t kCanary = 0xa5;

std::map<const std::byte*, Region> regions;  // by begin
const Region* last_found = nullptr;          // most accesses go where the one before went

std::size_t round_up(std::size_t value, std::size_t unit) { return (value + unit - 1) / unit * unit; }

// The two ends of a region that no trapping page touches: what lies just before its begin, and after its end.
struct Slack {
  std::byte* begin;
  std::size_t num_bytes;
};
Slack slack_before(const Region& region) {
  const std::size_t room = region.begin - (region.mapping + kPage);
  return {region.begin - std::min(room, kAlignment), std::min(room, kAlignment)};
}
Slack slack_after(const Region& region) {
  return {region.begin + region.num_bytes, round_up(region.num_bytes, kAlignment) - region.num_bytes};
}

void fill(const Slack& slack) { std::memset(slack.begin, kCanary, slack.num_bytes); }

// The first byte that somebody wrote, or nullptr.
const std::byte* find_written(const Slack& slack) {
  const auto* end = slack.begin + slack.num_bytes;
  const auto* found = std::find_if(slack.begin, slack.begin + slack.num_bytes,
                                   [](std::byte byte) { return byte != std::byte{kCanary}; });
  return found == end ? nullptr : found;
}

bool contains(const Region& region, const std::byte* address, std::size_t num_bytes) {
  return address >= region.begin && num_bytes <= region.num_bytes &&
         address - region.begin <= static_cast<std::ptrdiff_t>(region.num_bytes - num_bytes);
}

// The last region that begins at or before the address.
const Region* find_before(const std::byte* address) {
  auto after = regions.upper_bound(address);
  return after == regions.begin() ? nullptr : &std::prev(after)->second;
}

// Maps memory far from where processes usually keep theirs. Ranks hand over pointers to their own tensors and to
// windows of this world, and tell the two apart by address. The race detector allows these addresses too.
void* map_apart(std::size_t num_bytes) {
  constexpr std::uintptr_t kFirst = std::uintptr_t{32} << 30, kLast = std::uintptr_t{56} << 30;
  static std::uintptr_t next = kFirst;
  if (next + num_bytes > kLast) next = kFirst;
  void* wanted = reinterpret_cast<void*>(next);
  next += num_bytes;
  return mmap(wanted, num_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

}  // namespace

std::byte* allocate(std::size_t num_bytes, std::uint8_t fill, const std::string& name, const Block* owner) {
  const std::size_t aligned_bytes = round_up(num_bytes, kAlignment);
  const std::size_t body_bytes = round_up(aligned_bytes, kPage);
  const std::size_t mapped_bytes = body_bytes + 2 * kPage;
  void* mapping = map_apart(mapped_bytes);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  Region region;
  region.mapping = static_cast<std::byte*>(mapping);
  region.mapped_bytes = mapped_bytes;
  region.begin = region.mapping + kPage + body_bytes - aligned_bytes;
  region.num_bytes = num_bytes;
  region.name = name;
  region.owner = owner;
  mprotect(region.mapping, kPage, PROT_NONE);
  mprotect(region.mapping + kPage + body_bytes, kPage, PROT_NONE);
  if (fill != 0) std::memset(region.begin, fill, num_bytes);
  sim::fill(slack_before(region));
  sim::fill(slack_after(region));
  regions[region.begin] = region;
  return region.begin;
}

bool release(const std::byte* begin) {
  const auto found = regions.find(begin);
  if (found == regions.end()) return false;
  munmap(found->second.mapping, found->second.mapped_bytes);
  regions.erase(found);
  last_found = nullptr;
  return true;
}

const Region* find_region(const void* address, std::size_t num_bytes) {
  const auto* bytes = static_cast<const std::byte*>(address);
  if (last_found != nullptr && contains(*last_found, bytes, num_bytes)) return last_found;
  const Region* region = find_before(bytes);
  if (region == nullptr || !contains(*region, bytes, num_bytes)) return nullptr;
  last_found = region;
  return region;
}

std::string describe(const void* address, std::size_t num_bytes) {
  const auto* bytes = static_cast<const std::byte*>(address);
  std::ostringstream text;
  text << num_bytes << " bytes at " << address;
  const Region* before = find_before(bytes);
  const auto named = [&](const Region& region) {
    if (region.owner != nullptr)
      return "the " + name_of(*region.owner) + " (" + std::to_string(region.num_bytes) + " bytes)";
    return "'" + region.name + "' (" + std::to_string(region.num_bytes) + " bytes)";
  };
  if (before != nullptr && bytes < before->begin + before->num_bytes) {
    text << ", offset " << bytes - before->begin << " of " << named(*before);
    const std::ptrdiff_t past = bytes + num_bytes - (before->begin + before->num_bytes);
    if (past > 0) text << ", " << past << " bytes past its end";
    return text.str();
  }
  const auto after = regions.upper_bound(bytes);
  if (before != nullptr && bytes < before->mapping + before->mapped_bytes) {
    text << ", " << bytes - (before->begin + before->num_bytes) << " bytes past the end of " << named(*before);
  } else if (after != regions.end() && bytes >= after->second.mapping) {
    text << ", " << after->second.begin - bytes << " bytes before " << named(after->second);
  }
  return text.str();
}

std::string find_overruns() {
  std::string text;
  for (const auto& [begin, region] : regions) {
    for (const Slack& slack : {slack_before(region), slack_after(region)}) {
      const std::byte* written = find_written(slack);
      if (written == nullptr) continue;
      text += "bytes outside '" + region.name + "' (" + std::to_string(region.num_bytes) +
              " bytes) were written, the first at offset " + std::to_string(written - region.begin) + "\n";
      fill(slack);
    }
  }
  return text;
}

}  // namespace deep_ep::sim
