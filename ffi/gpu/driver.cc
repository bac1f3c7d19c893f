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
          .install = std::string("Install ") + kRocm};
}

std::shared_ptr<Driver> open_driver(Vendor vendor, const Wanted& wanted) {
  const Library library = open_library(wanted);
  auto d = std::make_shared<Driver>();
  d->vendor = vendor;
  d->path = library.path;
#define X(member, type, cuda, hip)                                                           \
  if (const std::string name = vendor == Vendor::kCuda ? #cuda : #hip; name != "none") {     \
    d->member = reinterpret_cast<std::type_identity_t<type>*>(find_function(library, name.c_str()));               \
  }
  MONOKERNEL_DRIVER_FUNCTIONS(X)
#undef X
  d->attributes = vendor == Vendor::kCuda ? kCudaAttributes : kHipAttributes;
  d->host_alloc_flags = kHostMapped | (vendor == Vendor::kCuda ? 0 : kHipHostCoherent);
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
