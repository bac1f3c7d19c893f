// Errors of the GPU run time. They are thrown inside and turned into an ffi::Error, or a Python exception, at the border.
#pragma once

#include <functional>
#include <stdexcept>
#include <string>

namespace monokernel::gpu {

enum class Code {
  kInvalid,        // an argument is wrong
  kUnsupported,    // not on this device
  kMissing,        // a library, or a kernel that may not be compiled
  kExhausted,      // no memory, or the kernel does not fit on the device
  kInternal,       // what a driver or compiler said
  kCancelled,
  kTimeout,        // a wait inside the kernel
};

class Failure : public std::runtime_error {
 public:
  Failure(Code code, const std::string& message) : std::runtime_error("jax_monokernel: " + message), code(code) {}
  const Code code;
};

// Asked again and again by what waits for another thread or process. Where it is true, the wait ends with a Failure kCancelled.
using IsCancelled = std::function<bool()>;

inline void check_cancelled(const IsCancelled& is_cancelled) {
  if (is_cancelled && is_cancelled()) throw Failure(Code::kCancelled, "cancelled while it waited for a kernel");
}

}  // namespace monokernel::gpu
