// The timeline of a call, from kernels built with MK_TRACE=1. What the bytes mean is the kernel's and its reader's matter.
#pragma once

#include <string>

#include "gpu/device.h"
#include "gpu/request.h"

namespace monokernel::gpu {

class Trace {
 public:
  // Takes device memory for the timeline if `path` is not empty.
  Trace(Device& device, const Request& request, const std::string& path);
  ~Trace();
  Trace(const Trace&) = delete;
  Trace& operator=(const Trace&) = delete;

  void* buffer() const { return buffer_; }
  void clear(void* stream);
  void save(void* stream);  // waits for the copy; the file is replaced by every call

 private:
  Device& device_;
  std::string path_;
  size_t bytes_ = 0;
  void* buffer_ = nullptr;
};

}  // namespace monokernel::gpu
