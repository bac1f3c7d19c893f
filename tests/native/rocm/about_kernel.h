// What the stand-in for hipRTC says of a kernel to the stand-in for the driver.
#pragma once

#include "options.h"

namespace rocm {

struct About {
  mk::u32 units, threads, shared_bytes, trace;
  mk::u64 (*regions)(const mk::Args&, mk::host::Region*);  // their number
};
constexpr mk::u64 kMostRegions = 32;

}  // namespace rocm
