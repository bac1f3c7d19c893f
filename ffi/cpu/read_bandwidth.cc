#include "cpu/read_bandwidth.h"

#include <chrono>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>

#include "cpu/team.h"

namespace monokernel::cpu {
namespace {

// Sums 64-bit words in eight independent chains; the compiler turns each into vector loads.
uint64_t sum_words(const uint64_t* words, int64_t count) {
  uint64_t sums[64] = {};
  for (int64_t i = 0; i + 64 <= count; i += 64) {
    __builtin_prefetch(words + i + 512);
    __builtin_prefetch(words + i + 520);
    __builtin_prefetch(words + i + 528);
    __builtin_prefetch(words + i + 536);
    __builtin_prefetch(words + i + 544);
    __builtin_prefetch(words + i + 552);
    __builtin_prefetch(words + i + 560);
    __builtin_prefetch(words + i + 568);
    for (int lane = 0; lane < 64; lane++) sums[lane] += words[i + lane];
  }
  uint64_t total = 0;
  for (uint64_t s : sums) total += s;
  return total;
}

}  // namespace

std::vector<double> read_bandwidth(int64_t bytes, int threads, int repeats) {
  if (bytes < 4096 || threads < 1 || threads > 4096 || repeats < 1) {
    throw std::invalid_argument("read_bandwidth needs bytes >= 4096, 1 to 4096 threads and repeats >= 1");
  }
  const int64_t part = bytes / threads / 4096 * 4096;
  if (part == 0) throw std::invalid_argument("read_bandwidth needs at least 4096 bytes per thread");
  auto free = [](void* p) { ::operator delete(p, std::align_val_t{4096}); };
  std::unique_ptr<void, decltype(free)> buffer(::operator new(static_cast<size_t>(part) * threads, std::align_val_t{4096}),
                                               free);
  Team team(threads);
  auto* base = static_cast<char*>(buffer.get());
  std::vector<uint64_t> sums(static_cast<size_t>(threads) * 8);  // a cache line each
  team.run([&](int t) { std::memset(base + t * part, t + 1, static_cast<size_t>(part)); });
  std::vector<double> seconds;
  for (int r = 0; r < repeats; r++) {
    const auto start = std::chrono::steady_clock::now();
    team.run([&](int t) { sums[t * 8] += sum_words(reinterpret_cast<uint64_t*>(base + t * part), part / 8); });
    seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  // A use of the sums that the compiler cannot do without.
  if (sums[0] == 0) throw std::logic_error("read_bandwidth read nothing");
  return seconds;
}

}  // namespace monokernel::cpu
