// A message is a header of 8 + 8 bytes (a kind or status, and the payload's size), then the payload: integers of 8
// bytes, in this machine's order, and strings with their length before them. deep_ep/machine/world.py is the client.
#include "server.hpp"

#include <unistd.h>

#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "launch.hpp"
#include "memory.hpp"
#include "report.hpp"

namespace deep_ep::sim {
namespace {

enum class Status : std::uint64_t { kOk, kRefused, kFailed };
enum class Kind : std::uint64_t { kAllocate = 1, kFree, kWrite, kRead, kLaunch };

bool read_all(int file, void* data, std::size_t num_bytes) {
  auto* at = static_cast<std::byte*>(data);
  while (num_bytes > 0) {
    const ssize_t got = read(file, at, num_bytes);
    if (got <= 0) return false;
    at += got;
    num_bytes -= got;
  }
  return true;
}

bool write_all(int file, const void* data, std::size_t num_bytes) {
  const auto* at = static_cast<const std::byte*>(data);
  while (num_bytes > 0) {
    const ssize_t put = write(file, at, num_bytes);
    if (put <= 0) return false;
    at += put;
    num_bytes -= put;
  }
  return true;
}

class Reader {
 public:
  explicit Reader(const std::string& payload) : payload_(payload) {}
  std::uint64_t number() {
    std::uint64_t value;
    std::memcpy(&value, take(sizeof value), sizeof value);
    return value;
  }
  std::int32_t small() { return static_cast<std::int32_t>(number()); }
  std::string text() {
    const std::size_t num_bytes = number();
    return std::string(take(num_bytes), num_bytes);
  }
  std::size_t num_left() const { return payload_.size() - offset_; }
  const char* take(std::size_t num_bytes) {
    if (num_bytes > num_left()) throw std::runtime_error("a request is shorter than it says");
    const char* at = payload_.data() + offset_;
    offset_ += num_bytes;
    return at;
  }

 private:
  const std::string& payload_;
  std::size_t offset_ = 0;
};

std::string pack(std::uint64_t value) { return std::string(reinterpret_cast<const char*>(&value), sizeof value); }

std::byte* region_bytes(std::uint64_t address, std::size_t num_bytes) {
  auto* bytes = reinterpret_cast<std::byte*>(address);
  if (find_region(bytes, num_bytes) == nullptr) {
    throw std::runtime_error("not in one region of this world: " + describe(bytes, num_bytes));
  }
  return bytes;
}

std::string run_launch(Reader& reader, Status& status) {
  const std::uint64_t seed = reader.number();
  const bool lets_expire = reader.number() != 0;
  std::vector<LaunchRequest> requests(reader.number());
  for (LaunchRequest& request : requests) {
    request.kernel = reader.text();
    request.entry = reader.text();
    request.args = reader.text();
    request.rank = reader.small();
    request.num_blocks = reader.small();
    request.num_threads = reader.small();
    request.shared_bytes = reader.small();
    request.cluster_blocks = reader.small();
    request.start_ns = reader.number();
    request.in_order = reader.number() != 0;
  }
  const Report report = launch(requests, seed, lets_expire);
  if (!report.is_ok) status = Status::kFailed;
  return pack(report.num_steps) + pack(report.virtual_ns) + report.text;
}

std::string answer(Kind kind, const std::string& payload, Status& status) {
  Reader reader(payload);
  switch (kind) {
    case Kind::kAllocate: {
      const std::uint64_t num_bytes = reader.number();
      const auto fill = static_cast<std::uint8_t>(reader.number());
      return pack(reinterpret_cast<std::uint64_t>(allocate(num_bytes, fill, reader.text())));
    }
    case Kind::kFree: {
      const auto* begin = reinterpret_cast<const std::byte*>(reader.number());
      if (!release(begin)) throw std::runtime_error("no region begins there: " + describe(begin, 1));
      return "";
    }
    case Kind::kWrite: {
      const std::uint64_t address = reader.number();
      const std::size_t num_bytes = reader.num_left();
      std::memcpy(region_bytes(address, num_bytes), reader.take(num_bytes), num_bytes);
      return "";
    }
    case Kind::kRead: {
      const std::uint64_t address = reader.number();
      const std::uint64_t num_bytes = reader.number();
      return std::string(reinterpret_cast<const char*>(region_bytes(address, num_bytes)), num_bytes);
    }
    case Kind::kLaunch:
      return run_launch(reader, status);
  }
  throw std::runtime_error("a request of an unknown kind");
}

}  // namespace

int serve(int requests, int answers) {
  install_crash_reports();
  std::uint64_t header[2];
  while (read_all(requests, header, sizeof header)) {
    std::string payload(header[1], '\0');
    if (!read_all(requests, payload.data(), payload.size())) return 1;
    Status status = Status::kOk;
    std::string result;
    try {
      result = answer(static_cast<Kind>(header[0]), payload, status);
    } catch (const std::runtime_error& error) {
      status = Status::kRefused;
      result = error.what();
    } catch (const std::bad_alloc&) {
      status = Status::kRefused;
      result = "no memory is left for this";
    }
    const std::uint64_t answer_header[2] = {static_cast<std::uint64_t>(status), result.size()};
    if (!write_all(answers, answer_header, sizeof answer_header)) return 1;
    if (!write_all(answers, result.data(), result.size())) return 1;
  }
  return 0;
}

}  // namespace deep_ep::sim
