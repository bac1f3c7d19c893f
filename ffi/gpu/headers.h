// Device code, as text. The build writes the tables from the files in gpu/kernel and gpu/probe (embed_headers.cmake).
#pragma once

#include <vector>

namespace monokernel::gpu {

struct Header {
  const char* name;  // path below gpu/kernel: "sync/handoff.h"
  const char* text;
};

const std::vector<Header>& headers();        // the kernel's, by name
const std::vector<Header>& probe_headers();  // probe.h alone

}  // namespace monokernel::gpu
