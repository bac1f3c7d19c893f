// One decode on a device: launches the kernel on a stream and waits for its end.
#pragma once

#include <cstdint>
#include <vector>

#include "gpu/kernel/args.h"
#include "gpu/request.h"

namespace monokernel::gpu {

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Call {
  Attributes attributes;
  Request request;
  // Device pointers and sizes; report, cancel, mailbox, trace and timeout_ticks are filled in here.
  mk::Args args;
  const void* mailbox;  // int32 [batch, 2] on the device, see open_mail(); nullptr: nobody listens
  std::vector<Copy> copies;  // made before the launch: operands whose results are not in place
};

// Throws Failure: whatever kept the kernel from running, kCancelled, or kTimeout with what was waited for.
//
// Waits for the kernel, although it is launched on XLA's stream, so that the call that failed is the one that raises, and so that
// Ctrl-C and cancel() reach a kernel that runs.
void run(Vendor vendor, int ordinal, void* stream, const Call& call);

}  // namespace monokernel::gpu
