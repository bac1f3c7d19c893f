// GPU architectures that the kernel is built for.
#pragma once

#include <cstdint>
#include <string>

#include "gpu/driver.h"

namespace monokernel::gpu {

struct Architecture {
  Vendor vendor;
  std::string name;      // sm_90, gfx942: what users say
  std::string target;    // sm_90a, gfx942: what the compiler is told
  int wave_size;
  int64_t shared_bytes;  // of a unit: all that a work-group can have
};

// For messages; and why not others.
constexpr const char* kSupported =
    "supported are sm_90 (H100, H200), sm_100 (B200), sm_103 (B300), gfx942 (MI300X, MI300A, MI325X) and gfx950 (MI350X, MI355X): the "
    "kernel needs instructions and shared memory that others do not have";

// From a name such as sm_90, sm_90a or gfx942. Throws Failure: invalid or unsupported.
Architecture architecture(const std::string& name);

}  // namespace monokernel::gpu
