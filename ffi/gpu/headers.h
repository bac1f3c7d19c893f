// The kernel's headers, as text. The build writes the table from the files in gpu/kernel (embed_headers.cmake).
#pragma once

#include <vector>

namespace monokernel::gpu {

struct Header {
  const char* name;  // path below gpu/kernel: "sync/handoff.h"
  const char* text;
};

const std::vector<Header>& headers();  // by name

}  // namespace monokernel::gpu
