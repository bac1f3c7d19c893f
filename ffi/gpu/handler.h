// The decode custom call on GPUs, for XLA.
#pragma once

#include "gpu/driver.h"
#include "xla/ffi/api/ffi.h"

namespace monokernel::gpu {

// Handlers for the platforms CUDA and ROCM.
XLA_FFI_Handler* decode_handler(Vendor vendor);

// The same for the platform cpu, without a stream: for tests with a stand-in for the driver.
XLA_FFI_Handler* decode_handler_for_tests(Vendor vendor);

}  // namespace monokernel::gpu
