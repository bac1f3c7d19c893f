#include "cpu/cpus.h"

#if defined(__linux__)
#include <sched.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <thread>

namespace monokernel::cpu {
namespace {

int affinity_cpus() {
#if defined(__linux__)
  cpu_set_t sets[16];  // room for 16,384 CPUs
  // Of the main thread, which is the one that users pin: this may be one of XLA's.
  if (sched_getaffinity(getpid(), sizeof(sets), sets) == 0) return std::max(1, CPU_COUNT_S(sizeof(sets), sets));
#endif
  return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
}

}  // namespace

int quota_cpus(const std::string& folder) {
  int64_t quota = 0, period = 0;
  if (std::ifstream file(folder + "/cpu.max"); !(file >> quota >> period)) {  // "max" is no number
    std::ifstream(folder + "/cpu/cpu.cfs_quota_us") >> quota;
    std::ifstream(folder + "/cpu/cpu.cfs_period_us") >> period;
  }
  if (quota <= 0 || period <= 0) return 0;
  return static_cast<int>(std::min<int64_t>((quota - 1) / period + 1, 1 << 20));
}

int available_cpus() {
  static const int quota = quota_cpus("/sys/fs/cgroup");
  const int cpus = affinity_cpus();
  return quota > 0 ? std::min(cpus, quota) : cpus;
}

}  // namespace monokernel::cpu
