// The memory of all ranks: regions between pages that nobody may touch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace deep_ep::sim {

struct Block;

struct Region {
  std::byte* begin = nullptr;  // a multiple of 128
  std::size_t num_bytes = 0;
  std::string name;
  const Block* owner = nullptr;  // of shared memory; nullptr for global memory
  std::byte* mapping = nullptr;
  std::size_t mapped_bytes = 0;
};

// The region ends, up to 127 bytes, where a page begins that traps. Throws std::bad_alloc.
std::byte* allocate(std::size_t num_bytes, std::uint8_t fill, const std::string& name, const Block* owner = nullptr);

// `begin` as allocate returned it; false if it did not.
bool release(const std::byte* begin);

// The region that holds all these bytes, or nullptr.
const Region* find_region(const void* address, std::size_t num_bytes);

// "16 bytes at 0x7f00: 8 bytes past the end of 'window of rank 1' (4096 bytes)", for reports.
std::string describe(const void* address, std::size_t num_bytes);

// The little room between a region and the pages that trap is filled with a pattern. Says which regions' pattern
// is gone, "" if none.
std::string find_overruns();

}  // namespace deep_ep::sim
