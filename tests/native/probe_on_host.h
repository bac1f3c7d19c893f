// The device code of the topology probe on threads of the host: one for each unit's messenger and each of its readers.
#pragma once

#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

namespace topology::arch {

struct Words {
  unsigned x, y, z, w;
};
constexpr int kFlight = 8;
inline thread_local int t_unit = 0;
inline double g_ticks_per_ns = 1;
inline int g_groups = 1, g_place_shift = 0;  // shift 8: a compute unit in HW_ID

inline int unit() { return t_unit; }
inline unsigned load_word(const unsigned* p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
inline void store_word(unsigned* p, unsigned v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
inline unsigned or_word(unsigned* p, unsigned v) { return __atomic_fetch_or(p, v, __ATOMIC_ACQ_REL); }
inline Words load_once(const char* p) { return {load_word(reinterpret_cast<const unsigned*>(p)), 0, 0, 0}; }
inline unsigned long long wall_clock() {
  return static_cast<unsigned long long>(std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1));
}
inline unsigned long long ticks() { return static_cast<unsigned long long>(static_cast<double>(wall_clock()) * g_ticks_per_ns); }
inline void spin() { std::this_thread::yield(); }
inline void pause() { std::this_thread::sleep_for(std::chrono::microseconds(50)); }
inline bool is_set(unsigned* flag) { return load_word(flag) != 0; }
inline void set(unsigned* flag, unsigned v) { store_word(flag, v); }
inline unsigned place() { return static_cast<unsigned>(t_unit) << g_place_shift; }
inline unsigned group() { return g_place_shift ? static_cast<unsigned>(t_unit % g_groups) : 0; }
inline unsigned place_number() { return group() << 7 | static_cast<unsigned>(t_unit); }

}  // namespace topology::arch

#define MK_PROBE_HOST
#include "gpu/probe/probe.h"

// One launch; returns when all units are done.
inline void run_probe_on_host(const topology::Args& args, unsigned units) {
  std::vector<std::thread> threads;
  struct Unit {
    unsigned stop = 0;
    unsigned long long begin = 0, begin_ns = 0, steps[topology::kReaders] = {};
  };
  std::vector<Unit> all(units);
  for (unsigned u = 0; u < units; u++) {
    all[u].begin = topology::arch::ticks();
    all[u].begin_ns = topology::arch::wall_clock();
    threads.emplace_back([&args, &all, u] {
      topology::arch::t_unit = static_cast<int>(u);
      if (const int me = topology::unit_number(args); me >= 0) topology::run_messenger(args, me, all[u].begin, &all[u].stop);
    });
    for (int r = 0; r < topology::kReaders; r++) {
      threads.emplace_back([&args, &all, u, r] {
        topology::arch::t_unit = static_cast<int>(u);
        if (const int me = topology::unit_number(args); me >= 0) all[u].steps[r] = topology::read_blocks(args, me, r, 0, &all[u].stop, all[u].begin);
      });
    }
  }
  for (std::thread& thread : threads) thread.join();
  for (unsigned u = 0; u < units; u++) {
    topology::arch::t_unit = static_cast<int>(u);
    if (const int me = topology::unit_number(args); me >= 0) topology::report(args, me, all[u].begin, all[u].begin_ns, all[u].steps[0] + all[u].steps[1]);
  }
}
