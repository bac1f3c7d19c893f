#include "cpu/cpus.h"

#if defined(__linux__)
#include <sched.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <initializer_list>
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

// Whether the file begins with as many numbers. (No iostreams: see gpu/stub.cc.)
bool read_numbers(const std::string& path, std::initializer_list<int64_t*> numbers) {
  std::FILE* file = std::fopen(path.c_str(), "r");
  if (!file) return false;
  bool found = true;
  for (int64_t* number : numbers) {
    long long value = 0;
    found = found && std::fscanf(file, "%lld", &value) == 1;
    *number = found ? value : 0;
  }
  std::fclose(file);
  return found;
}

}  // namespace

int quota_cpus(const std::string& folder) {
  int64_t quota = 0, period = 0;
  if (!read_numbers(folder + "/cpu.max", {&quota, &period})) {  // "max" is no number
    read_numbers(folder + "/cpu/cpu.cfs_quota_us", {&quota});
    read_numbers(folder + "/cpu/cpu.cfs_period_us", {&period});
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
