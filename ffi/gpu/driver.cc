#include "gpu/driver.h"

#include <memory>
#include <type_traits>
#include <utility>

#include "gpu/failure.h"
#include "gpu/library.h"
#include "gpu/once_map.h"
#include "gpu/settings.h"

namespace monokernel::gpu {
namespace {

constexpr unsigned kMapped = 2, kHipCoherent = 0x40000000;

Wanted wanted_driver(Vendor vendor) {
  const Settings s = settings();
  if (vendor == Vendor::kCuda) {
    return {.name = "libcuda.so",
            .sonames = {"libcuda.so.1"},
            .dirs = {},
            .only = s.cuda_library,
            .variable = "MONOKERNEL_CUDA_LIBRARY",
            .install = "Install the NVIDIA driver"};
  }
  std::vector<std::string> dirs = s.library_dirs;
  dirs.push_back("/opt/rocm/lib");
  return {.name = "libamdhip64.so",
          .sonames = {"libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so"},
          .dirs = dirs,
          .only = s.hip_library,
          .variable = "MONOKERNEL_HIP_LIBRARY",
          .install = "Install ROCm 6 or later (its system packages, or the ROCm wheels: pip install 'rocm[libraries]')"};
}

std::shared_ptr<Driver> open_driver(Vendor vendor, const Wanted& wanted) {
  const Library library = open_library(wanted);
  auto d = std::make_shared<Driver>();
  d->vendor = vendor;
  d->path = library.path;
#define X(member, type, cuda, hip)                                                              \
  if (const char* name = vendor == Vendor::kCuda ? cuda : hip; *name) {                         \
    d->member = reinterpret_cast<std::type_identity_t<type>*>(find_function(library, name));    \
  }
  MONOKERNEL_DRIVER_FUNCTIONS(X)
#undef X
  if (vendor == Vendor::kCuda) {
    d->attributes = {.multiprocessors = 16, .warp_size = 10, .max_threads = 1, .shared_limit_bytes = 97,
                     .cooperative = 95, .clock_khz = 13, .major = 75, .minor = 76};
    d->host_alloc_flags = kMapped;
  } else {
    d->attributes = {.multiprocessors = 63, .warp_size = 87, .max_threads = 56, .shared_limit_bytes = 74,
                     .cooperative = 10, .clock_khz = 10017, .major = 23, .minor = 61};
    d->host_alloc_flags = kMapped | kHipCoherent;
  }
  d->check(d->init(0), "start");
  d->check(d->driver_version(&d->version), "tell its version");
  return d;
}

}  // namespace

void Driver::check(int error, const char* what) const {
  if (error == 0) return;
  const char* text = nullptr;
  if (error_text(error, &text) != 0 || !text) text = "unknown error";
  throw Failure(error == kOutOfMemory ? Code::kExhausted : Code::kInternal,
                std::string("the ") + (vendor == Vendor::kCuda ? "CUDA" : "ROCm") + " driver could not " + what + ": " + text +
                    " (error " + std::to_string(error) + ")");
}

const Driver& driver(Vendor vendor) {
  // Never closed: XLA's own use of the driver ends with the process too.
  static auto* drivers = new OnceMap<std::pair<Vendor, std::string>, Driver>;
  const Wanted wanted = wanted_driver(vendor);
  return *drivers->get({vendor, wanted.only}, [&] { return open_driver(vendor, wanted); });
}

int driver_version(Vendor vendor) {
  try {
    return driver(vendor).version;
  } catch (const Failure&) {
    return 0;
  }
}

}  // namespace monokernel::gpu
