#include "launch.hpp"

#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <stdexcept>

#include "copies.hpp"
#include "memory.hpp"
#include "report.hpp"
#include "scheduler.hpp"
#include "watch.hpp"
#include "words.hpp"

namespace deep_ep::sim {
namespace {

// ThreadSanitizer has room for 8,128 lines, and a process for 65,530 mappings, of which a line takes eight. Ten lines
// of a block are for its copy engine.
constexpr std::size_t kMaxRaceFibers = 7800;
constexpr std::uint8_t kPoison = 0xcb;

// Recycled from launch to launch: above all, a new line of ThreadSanitizer takes 0.4 ms.
std::vector<std::unique_ptr<Fiber>> fiber_pool;
std::vector<std::unique_ptr<Block>> block_pool;

tsan::Token launch_begin, launch_end;

// Kernels of one rank, one after the other, on the same blocks and fibers: what comes later knows all that came before,
// so sharing them hides nothing from the race detector.
struct Stream {
  std::vector<std::unique_ptr<Grid>> grids;
  std::size_t num_started = 0;
  tsan::Token ended;  // released by all that the grids before did
  std::vector<Block*> blocks;
  std::vector<Fiber*> fibers;
  std::size_t num_fibers = 0;  // of the running grid, the first ones

  Grid& running() const { return *grids[num_started - 1]; }
};

// What one launch uses of the pools.
struct Stage {
  std::vector<std::unique_ptr<Stream>> streams;
  std::vector<std::unique_ptr<std::max_align_t[]>> args;

  std::vector<Fiber*> running_fibers() const {
    std::vector<Fiber*> fibers;
    for (const auto& stream : streams) {
      fibers.insert(fibers.end(), stream->fibers.begin(), stream->fibers.begin() + stream->num_fibers);
    }
    return fibers;
  }
};

void run_fiber() {
  Fiber& fiber = scheduler.current();
  Grid& grid = *fiber.block->grid;
  launch_begin.acquire();
  grid.before->acquire();
  grid.entry(grid.args);
  --fiber.block->num_running;
  check_leaving(fiber);
  if (--grid.num_running == 0) scheduler.stop();  // another one may follow
  scheduler.finish();
}

template <class T>
T* find_symbol(void* object, const std::string& name) {
  return reinterpret_cast<T*>(dlsym(object, name.c_str()));
}

// Opens the kernel's shared object, once, and checks the request against what the kernel says of itself.
void* find_entry(const LaunchRequest& request) {
  static std::map<std::string, void*> objects;
  void*& object = objects[request.kernel];
  if (object == nullptr) object = dlopen(request.kernel.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (object == nullptr) throw std::runtime_error(std::string("the kernel cannot be loaded: ") + dlerror());
  void* entry = dlsym(object, request.entry.c_str());
  const auto* num_threads = find_symbol<const int>(object, request.entry + "_num_threads");
  const auto* args_bytes = find_symbol<const int>(object, request.entry + "_args_bytes");
  if (entry == nullptr || num_threads == nullptr || args_bytes == nullptr) {
    throw std::runtime_error("no entry " + request.entry + " in " + request.kernel + "; EP_ENTRY defines one");
  }
  const auto differ = [&](const char* what, std::size_t given, int expected) {
    throw std::runtime_error(request.entry + " takes " + std::to_string(expected) + what + ", not " +
                             std::to_string(given));
  };
  if (*num_threads != request.num_threads) differ(" threads a block", request.num_threads, *num_threads);
  if (static_cast<std::size_t>(*args_bytes) != request.args.size()) {
    differ(" bytes of arguments", request.args.size(), *args_bytes);
  }
  if (request.num_blocks < 1 || request.cluster_blocks < 1 || request.num_blocks % request.cluster_blocks != 0) {
    throw std::runtime_error("the number of blocks must be positive and a multiple of the cluster's");
  }
  return entry;
}

const void* copy_args(Stage& stage, const std::string& args) {
  stage.args.push_back(std::make_unique<std::max_align_t[]>(args.size() / sizeof(std::max_align_t) + 1));
  std::memcpy(stage.args.back().get(), args.data(), args.size());
  return stage.args.back().get();
}

void prepare_block(Block& block, Grid& grid, int idx, int shared_bytes) {
  block.grid = &grid;
  block.idx = idx;
  block.num_running = grid.num_threads;
  rename_lines(block);
  block.mbarriers.clear();
  for (NamedBarrier& barrier : block.barriers) barrier.meeting.reset(0);
  block.barriers[0].meeting.reset(grid.num_threads);
  block.warps.resize(grid.num_threads / kWarpThreads);
  for (auto& warp : block.warps) {
    if (warp == nullptr) warp = std::make_unique<Warp>();
    warp->meeting.reset(kWarpThreads);
    warp->is_slow = scheduler.random.chance(scheduler.climate.slow_warps);
    warp->elected_lane = static_cast<int>(scheduler.random.below(kWarpThreads));
  }
  if (block.shared != nullptr && block.shared_bytes != shared_bytes) {
    release(block.shared);
    block.shared = nullptr;
  }
  if (block.shared == nullptr) block.shared = allocate(shared_bytes, kPoison, "shared memory of a block", &block);
  std::memset(block.shared, kPoison, shared_bytes);
  block.shared_bytes = shared_bytes;
}

void prepare_fiber(Fiber& fiber, Block& block, int thread) {
  fiber.block = &block;
  fiber.warp = block.warps[thread / kWarpThreads].get();
  fiber.thread = thread;
  fiber.lane = thread % kWarpThreads;
  fiber.resume = fiber.stack.prepare(run_fiber);
  fiber.is_done = fiber.is_polling = fiber.is_expired = false;
  fiber.ready_idx = -1;
  fiber.wait = {nullptr, {}};
  fiber.site = {};
  fiber.watched.clear();
  fiber.loaded.clear();
  forget_fences(fiber);
  fiber.open_group.reset();
  fiber.groups.clear();
  fiber.line.name(name_of(fiber).c_str());
}

Stream& stream_of(Stage& stage, const LaunchRequest& request) {
  if (!request.in_order) return *stage.streams.emplace_back(std::make_unique<Stream>());
  for (auto stream = stage.streams.rbegin(); stream != stage.streams.rend(); ++stream) {
    if ((*stream)->grids.front()->rank == request.rank) return **stream;
  }
  throw std::runtime_error("the first launch of rank " + std::to_string(request.rank) + " has none to come after");
}

void add_grid(Stage& stage, const LaunchRequest& request) {
  void* entry = find_entry(request);
  Stream& stream = stream_of(stage, request);
  Grid& grid = *stream.grids.emplace_back(std::make_unique<Grid>());
  grid.rank = request.rank;
  grid.num_blocks = request.num_blocks;
  grid.num_threads = request.num_threads;
  grid.cluster_blocks = request.cluster_blocks;
  grid.shared_bytes = request.shared_bytes;
  grid.start_ns = request.start_ns;
  grid.entry = reinterpret_cast<void (*)(const void*)>(entry);
  grid.args = copy_args(stage, request.args);
  grid.before = &stream.ended;
  for (int i = 0; i < grid.num_blocks / grid.cluster_blocks; ++i) {
    grid.clusters.push_back(std::make_unique<Rendezvous>());
    grid.clusters.back()->reset(grid.cluster_blocks * grid.num_threads);
  }
}

std::size_t max_blocks(const Stream& stream) {
  int blocks = 0;
  for (const auto& grid : stream.grids) blocks = std::max(blocks, grid->num_blocks);
  return blocks;
}

std::size_t max_fibers(const Stream& stream) {
  int fibers = 0;
  for (const auto& grid : stream.grids) fibers = std::max(fibers, grid->num_blocks * grid->num_threads);
  return fibers;
}

template <class T>
T* take(std::vector<std::unique_ptr<T>>& pool, std::size_t& num_taken) {
  if (num_taken == pool.size()) pool.push_back(std::make_unique<T>());
  return pool[num_taken++].get();
}

void take_from_pools(Stage& stage) {
  std::size_t num_blocks = 0, num_fibers = 0;
  for (const auto& stream : stage.streams) {
    for (std::size_t i = max_blocks(*stream); i > 0; --i) stream->blocks.push_back(take(block_pool, num_blocks));
    for (std::size_t i = max_fibers(*stream); i > 0; --i) stream->fibers.push_back(take(fiber_pool, num_fibers));
  }
}

void check_size(const Stage& stage) {
  std::size_t num_fibers = 0;
  for (const auto& stream : stage.streams) num_fibers += max_fibers(*stream) + 10 * max_blocks(*stream);
  if (tsan::is_on() && num_fibers > kMaxRaceFibers) {
    throw std::runtime_error("this launch needs " + std::to_string(num_fibers) +
                             " fibers; the race detector has room for " + std::to_string(kMaxRaceFibers) +
                             ": take fewer ranks, blocks or threads");
  }
}

void prepare_next_grid(Stream& stream) {
  Grid& grid = *stream.grids[stream.num_started++];
  stream.num_fibers = 0;
  grid.num_running = grid.num_blocks * grid.num_threads;
  for (int idx = 0; idx < grid.num_blocks; ++idx) {
    Block& block = *stream.blocks[idx];
    prepare_block(block, grid, idx, grid.shared_bytes);
    for (int thread = 0; thread < grid.num_threads; ++thread) {
      prepare_fiber(*stream.fibers[stream.num_fibers++], block, thread);
    }
  }
}

void start_grid(const Stream& stream) {
  const Grid& grid = stream.running();
  stream.fibers.front()->line.enter();
  launch_begin.acquire();
  grid.before->acquire();
  for (int idx = 0; idx < grid.num_blocks; ++idx) {
    for (CopyEngine& engine : stream.blocks[idx]->engines) engine.told.release();
  }
  scheduler.enter_home();
  for (std::size_t i = 0; i < stream.num_fibers; ++i) {
    Fiber& fiber = *stream.fibers[i];
    fiber.is_slow = fiber.rank() == scheduler.climate.slow_rank || fiber.warp->is_slow ||
                    scheduler.random.chance(scheduler.climate.slow_lanes);
    scheduler.add(fiber, grid.start_ns);
  }
}

void begin(Stage& stage) {
  take_from_pools(stage);
  for (const auto& stream : stage.streams) prepare_next_grid(*stream);
  launch_begin.release();
  for (const auto& stream : stage.streams) start_grid(*stream);
}

// All that the lines of a stream did, also of the copy engines.
void release_all(const Stream& stream, tsan::Token& token) {
  const auto release_in = [&](const tsan::Line& line) {
    if (!line.exists()) return;
    line.enter();
    token.release();
  };
  for (const Fiber* fiber : stream.fibers) release_in(fiber->line);
  for (const Block* block : stream.blocks) {
    for (const CopyEngine& engine : block->engines) {
      release_in(engine.teller);
      for (const tsan::Line& lane : engine.lanes) release_in(lane);
    }
  }
  scheduler.enter_home();
}

// Whatever waits for a kernel that has ended starts. False if nothing did.
bool start_followers(const Stage& stage) {
  bool any = false;
  for (const auto& stream : stage.streams) {
    if (stream->running().num_running > 0 || stream->num_started == stream->grids.size()) continue;
    complete_copies_of(stream->running());
    release_all(*stream, stream->ended);
    prepare_next_grid(*stream);
    start_grid(*stream);
    any = true;
  }
  return any;
}

// Everything that any line of execution did comes before the next launch, also when this one failed.
void end(const Stage& stage) {
  for (const auto& stream : stage.streams) {
    release_all(*stream, launch_end);
    for (Fiber* fiber : stream->fibers) {
      fiber->open_group.reset();
      fiber->groups.clear();
      if (!fiber->is_done) fiber->line.forget();  // it stopped inside calls that the detector has noted
    }
  }
  launch_end.acquire();
  forget_copies();
  forget_watches();
  forget_words();
}

// The earliest deadline's owners give up waiting. False if nobody has one.
bool expire_earliest(const Stage& stage) {
  std::uint64_t earliest = kNever;
  for (const Fiber* fiber : stage.running_fibers()) {
    if (!fiber->is_done) earliest = std::min(earliest, fiber->wait.deadline_ns);
  }
  if (earliest == kNever) return false;
  scheduler.now_ns = std::max(scheduler.now_ns, earliest);
  for (Fiber* fiber : stage.running_fibers()) {
    if (!fiber->is_done && fiber->wait.deadline_ns == earliest) expire(*fiber);
  }
  return true;
}

}  // namespace

Report launch(const std::vector<LaunchRequest>& requests, std::uint64_t seed, bool lets_expire) {
  int num_ranks = 1;
  for (const LaunchRequest& request : requests) num_ranks = std::max(num_ranks, request.rank + 1);
  scheduler.reset(seed, num_ranks);
  Stage stage;
  for (const LaunchRequest& request : requests) add_grid(stage, request);
  check_size(stage);
  begin(stage);

  Report report;
  std::uint64_t progress_at_retry = 0;
  while (true) {
    const Ending ending = scheduler.run();
    if (ending == Ending::kFailed) {
      report.text = scheduler.failure();
      break;
    }
    if (start_followers(stage)) continue;
    if (ending == Ending::kAllDone) break;
    if (ending == Ending::kStopped) continue;
    // A predicate may depend on more than the words it loaded through primitives; asking all again costs little.
    if (scheduler.progress() != progress_at_retry && notify_all()) {
      progress_at_retry = scheduler.progress();
      continue;
    }
    if (lets_expire && expire_earliest(stage)) continue;
    report.text = describe_deadlock(stage.running_fibers());
    break;
  }
  end(stage);
  report.text += find_overruns();
  report.is_ok = report.text.empty();
  report.num_steps = scheduler.num_steps;
  report.virtual_ns = scheduler.now_ns;
  return report;
}

}  // namespace deep_ep::sim
