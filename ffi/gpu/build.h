// Gives compiled kernels: from memory, from the disk, or from the compiler.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "gpu/architecture.h"
#include "gpu/failure.h"
#include "gpu/request.h"

namespace monokernel::gpu {

struct Built {
  std::string code;     // a binary that the driver loads
  std::vector<std::string> others;  // of other compilers, where nothing is compiled: for a driver that does not load the first
  std::string path;     // where it is cached; "" if nowhere
  double seconds = 0;   // that compiling took; 0: it did not have to be compiled
};

// Threads that ask for the same kernel wait for one of them to build it. Throws Failure; once cancelled it neither waits nor begins to
// compile, but a compile that is under way goes on to its end, as no compiler can be stopped.
std::shared_ptr<const Built> build(const Architecture& architecture, const Request& request, const IsCancelled& is_cancelled = {});

// What a source is, for messages.
struct Title {
  std::string what;   // "the kernel for this model, batch 1,"
  std::string short_what;  // "kernel for this model"
  std::string ahead;  // the command that compiles it ahead of time
};

// The same for any source.
std::shared_ptr<const Built> build(const Architecture& architecture, const std::string& source, const Title& title,
                                   const IsCancelled& is_cancelled = {});

}  // namespace monokernel::gpu
