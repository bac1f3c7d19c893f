// How many CPUs this process may use.
#pragma once

#include <string>

namespace monokernel::cpu {

// CPUs of the process's affinity mask, cut down by its cgroup's quota, as jax_monokernel.plan.available_cpus counts them.
// The quota is read once.
int available_cpus();

// CPUs that the quota in a cgroup file system (version 2 or 1) is worth, rounded up; 0 where there is none.
int quota_cpus(const std::string& folder);

}  // namespace monokernel::cpu
