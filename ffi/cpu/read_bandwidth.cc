#include "cpu/read_bandwidth.h"

#include <sys/mman.h>

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>

#include "cpu/barrier.h"
#include "cpu/isa.h"
#include "cpu/team.h"

namespace monokernel::cpu {
namespace {

constexpr size_t kHugePageBytes = size_t{2} << 20;

void wait_for_all(Barrier& barrier) {
  const uint32_t ticket = barrier.arrive();
  for (int i = 0; i < 20000; i++) {
    if (__atomic_load_n(barrier.epoch(), __ATOMIC_ACQUIRE) != ticket) return;
  }
  barrier.sleep(ticket);
}

}  // namespace

std::vector<double> read_bandwidth(int64_t bytes, int threads, int repeats) {
  if (bytes < 1 || bytes > int64_t{1} << 40 || threads < 1 || threads > 4096 || repeats < 1 || repeats > 1 << 20) {
    throw std::invalid_argument("read_bandwidth needs 1 to 2^40 bytes, 1 to 4096 threads and 1 to 2^20 repeats");
  }
  const int64_t part = bytes / threads / kReadBytes * kReadBytes;
  if (part == 0) throw std::invalid_argument("read_bandwidth needs at least 512 bytes per thread");
  const size_t size = (static_cast<size_t>(part * threads) + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
  const std::unique_ptr<char, void (*)(void*)> buffer(static_cast<char*>(std::aligned_alloc(kHugePageBytes, size)),
                                                      std::free);
  if (!buffer) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  madvise(buffer.get(), size, MADV_HUGEPAGE);  // advice: a refusal only makes it slower
#endif

  using Clock = std::chrono::steady_clock;
  std::vector<double> rates(static_cast<size_t>(repeats));
  std::vector<uint64_t> sums(static_cast<size_t>(threads) * 8);  // a cache line each
  Barrier barrier;
  barrier.reset(threads);
  Team team(threads);
  team.run([&](int t) {
    char* mine = buffer.get() + t * part;
    std::memset(mine, t + 1, static_cast<size_t>(part));
    for (double& rate : rates) {
      wait_for_all(barrier);
      const auto start = Clock::now();
      sums[static_cast<size_t>(t) * 8] += best_kernel().read(mine, part);
      wait_for_all(barrier);
      if (t == 0) rate = static_cast<double>(part * threads) / std::chrono::duration<double>(Clock::now() - start).count();
    }
  });
  // A use of the sums that the compiler cannot do without.
  if (sums[0] == 0) throw std::logic_error("read_bandwidth read nothing");
  return rates;
}

}  // namespace monokernel::cpu
