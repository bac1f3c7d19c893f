#include "gpu/architecture.h"

#include <cctype>
#include <cstdlib>

#include "gpu/failure.h"

namespace monokernel::gpu {
namespace {

constexpr const char* kSupported = "supported are sm_90 and later, gfx942 and gfx950";

Architecture cuda(const std::string& name) {
  const std::string digits = name.substr(3, name.find_first_not_of("0123456789", 3) - 3);
  const std::string suffix = name.substr(3 + digits.size());
  if (digits.size() < 2 || digits.size() > 3 || !(suffix.empty() || suffix == "a")) {
    throw Failure(Code::kInvalid, "\"" + name + "\" is no GPU architecture; expected a name such as sm_90 or gfx942");
  }
  const int number = std::atoi(digits.c_str()), major = number / 10;
  if (major < 9) throw Failure(Code::kUnsupported, "the kernel does not run on " + name + "; " + kSupported);
  const std::string plain = "sm_" + digits;
  // Instructions of one generation only, such as Hopper's bulk copies into shared memory of a cluster, need the suffix.
  return {.vendor = Vendor::kCuda,
          .name = plain,
          .target = major == 9 || major == 10 ? plain + "a" : plain,
          .wave_size = 32,
          .shared_bytes = (major >= 12 ? 99 : 227) * 1024};
}

}  // namespace

Architecture architecture(const std::string& name) {
  if (name.starts_with("sm_")) return cuda(name);
  if (name == "gfx942") return {Vendor::kRocm, name, name, 64, 64 * 1024};
  if (name == "gfx950") return {Vendor::kRocm, name, name, 64, 160 * 1024};
  if (name.starts_with("gfx")) throw Failure(Code::kUnsupported, "the kernel does not run on " + name + "; " + kSupported);
  throw Failure(Code::kInvalid, "\"" + name + "\" is no GPU architecture; expected a name such as sm_90 or gfx942");
}

}  // namespace monokernel::gpu
