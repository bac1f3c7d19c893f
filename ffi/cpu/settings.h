// What the environment variables say (docs/cpu.md).
#pragma once

#include <cstdint>
#include <string>

namespace monokernel::cpu {

// Reads the variables. Calls do not: they run beside Python, where another thread may be writing to the environment, and
// reading it meanwhile is undefined behaviour. Python's module calls this when it is imported, which is safe.
void read_environment();

// MONOKERNEL_THREADS, or 0 where it is not set or no positive number.
int64_t threads_setting();

// MONOKERNEL_ISA, or "".
std::string isa_setting();

}  // namespace monokernel::cpu
