#include "cpu/ping_pong.h"

#include <atomic>
#include <chrono>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <thread>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

namespace monokernel::cpu {
namespace {

using Clock = std::chrono::steady_clock;
constexpr auto kLongest = std::chrono::seconds(1);  // for an answer

bool run_on([[maybe_unused]] int cpu) {
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(static_cast<size_t>(cpu), &set);
  return pthread_setaffinity_np(pthread_self(), sizeof(set), &set) == 0;
#else
  return false;
#endif
}

struct Word {
  alignas(128) std::atomic<uint32_t> value{0};
  alignas(128) std::atomic<bool> given_up{false};

  // Whether the value has come.
  bool wait(uint32_t wanted) {
    Clock::time_point start{};  // once it takes long
    for (uint32_t looks = 1; value.load(std::memory_order_acquire) != wanted; looks++) {
      if (looks % 1024 != 0) continue;
      if (given_up.load(std::memory_order_relaxed)) return false;
      if (start == Clock::time_point{}) start = Clock::now();
      if (Clock::now() - start > kLongest) {
        given_up.store(true, std::memory_order_relaxed);
        return false;
      }
    }
    return true;
  }
};

}  // namespace

std::vector<double> ping_pong(int cpu, int other, int rounds, int batches) {
#if defined(__linux__)
  constexpr int kCpus = CPU_SETSIZE;
#else
  constexpr int kCpus = 1024;
#endif
  if (cpu < 0 || other < 0 || cpu >= kCpus || other >= kCpus || cpu == other || rounds < 1 || rounds > 1 << 20 || batches < 1 ||
      batches > 1 << 10) {
    throw std::invalid_argument("ping_pong needs two CPUs, 1 to 2^20 rounds and 1 to 2^10 batches");
  }
  Word word;
  std::vector<double> times;
  const uint32_t count = static_cast<uint32_t>(rounds) * static_cast<uint32_t>(batches);
  const auto answer = [&] {
    if (!run_on(other)) return word.given_up.store(true);
    for (uint32_t i = 0; i < count; i++) {
      if (!word.wait(2 * i + 1)) return;
      word.value.store(2 * i + 2, std::memory_order_release);
    }
  };
  const auto ask = [&] {
    if (!run_on(cpu)) return word.given_up.store(true);
    for (uint32_t batch = 0, i = 0; batch < static_cast<uint32_t>(batches); batch++) {
      const auto begin = Clock::now();
      for (int round = 0; round < rounds; round++, i++) {
        word.value.store(2 * i + 1, std::memory_order_release);
        if (!word.wait(2 * i + 2)) return;
      }
      times.push_back(std::chrono::duration<double, std::nano>(Clock::now() - begin).count() / (2.0 * rounds));
    }
  };
  // Threads of its own, so that the caller stays where it was.
  std::thread answers(answer), asks(ask);
  answers.join();
  asks.join();
  if (times.size() != static_cast<size_t>(batches)) {
    throw std::runtime_error("a thread may not run on CPU " + std::to_string(cpu) + " or " + std::to_string(other) +
                             ", or does not get to run there");
  }
  return times;
}

}  // namespace monokernel::cpu
