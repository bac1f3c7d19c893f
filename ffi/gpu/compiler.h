// The vendors' run-time compilers, NVRTC and hipRTC, through one table.
#pragma once

#include <string>

#include "gpu/architecture.h"

namespace monokernel::gpu {

struct Compiler {
  Vendor vendor;
  std::string path;     // of the library
  std::string version;  // "nvrtc-13.0"
};

// Opens the vendor's compiler at the first call. Throws Failure kMissing, naming what to install.
const Compiler& compiler(Vendor vendor);

// The flags for an architecture, separated by blanks.
std::string compile_flags(const Architecture& architecture);

// Compiles `source`, which finds the kernel's headers by their names, to a binary for `architecture`. Throws Failure with the
// compiler's log.
std::string compile(const Architecture& architecture, const std::string& source);

}  // namespace monokernel::gpu
