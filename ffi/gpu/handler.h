// The decode custom call on GPUs, for XLA.
#pragma once

#include <cstdint>

#include "gpu/driver.h"
#include "xla/ffi/api/ffi.h"

namespace monokernel::gpu {

// Handlers for the platforms CUDA and ROCM.
XLA_FFI_Handler* decode_handler(Vendor vendor);

// The same handlers for the platform cpu, which has no streams: for tests with a stand-in for the driver. What they find in place
// of device n's stream is the address kTestStreams + n.
constexpr intptr_t kTestStreams = 0x5000;
XLA_FFI_Handler* decode_handler_for_tests(Vendor vendor);

}  // namespace monokernel::gpu
