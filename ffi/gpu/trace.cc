#include "gpu/trace.h"

#include <cstdio>
#include <vector>

#include "gpu/failure.h"

namespace monokernel::gpu {

Trace::Trace(Device& device, const Request& request, const std::string& path) : device_(device), path_(path) {
  if (path_.empty()) return;
  bytes_ = static_cast<size_t>(trace_bytes(request));
  device.api().check(device.api().device_alloc(&buffer_, bytes_), "allocate memory for the timeline");
}

Trace::~Trace() {
  if (buffer_) device_.api().device_free(buffer_);
}

void Trace::clear(void* stream) {
  if (buffer_) device_.api().check(device_.api().set_async(buffer_, 0, bytes_, stream), "clear the timeline");
}

void Trace::save(void* stream) {
  if (!buffer_) return;
  std::vector<char> host(bytes_);
  device_.api().check(device_.api().copy_out_async(host.data(), buffer_, bytes_, stream), "read the timeline");
  device_.api().check(device_.api().stream_wait(stream), "read the timeline");
  std::FILE* file = std::fopen(path_.c_str(), "wb");
  const bool written = file && std::fwrite(host.data(), 1, host.size(), file) == host.size();
  if ((file && std::fclose(file) != 0) || !written) throw Failure(Code::kInvalid, "the timeline cannot be written to " + path_ + " (MONOKERNEL_TRACE)");
}

}  // namespace monokernel::gpu
