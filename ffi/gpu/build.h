// Gives the compiled kernel for a request: from memory, from the disk, or from the compiler.
#pragma once

#include <memory>
#include <string>

#include "gpu/architecture.h"
#include "gpu/request.h"

namespace monokernel::gpu {

struct Built {
  std::string code;     // a binary that the driver loads
  std::string path;     // where it is cached; "" if nowhere
  double seconds = 0;   // that compiling took; 0: it did not have to be compiled
};

// Threads that ask for the same kernel wait for one of them to build it. Throws Failure.
std::shared_ptr<const Built> build(const Architecture& architecture, const Request& request);

}  // namespace monokernel::gpu
