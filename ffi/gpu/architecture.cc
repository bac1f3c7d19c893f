#include "gpu/architecture.h"

#include <algorithm>
#include <iterator>

#include "gpu/failure.h"

namespace monokernel::gpu {
namespace {

// Those that the kernel compiles for. Later ones lack instructions that it is made of, such as setmaxnreg on sm_110 and sm_120, and
// those from sm_120 on have 99 KiB of shared memory; earlier ones have no bulk copies.
constexpr const char* kCuda[] = {"sm_90", "sm_100", "sm_103"};

Architecture cuda(const std::string& name) {
  const std::string digits = name.substr(3, name.find_first_not_of("0123456789", 3) - 3);
  const std::string suffix = name.substr(3 + digits.size());
  if (digits.size() < 2 || digits.size() > 3 || !(suffix.empty() || suffix == "a")) {
    throw Failure(Code::kInvalid, "\"" + name + "\" is no GPU architecture; expected a name such as sm_90 or gfx942");
  }
  const std::string plain = "sm_" + digits;
  if (std::find(std::begin(kCuda), std::end(kCuda), plain) == std::end(kCuda)) {
    throw Failure(Code::kUnsupported, "the kernel does not run on " + plain + "; " + kSupported);
  }
  // Instructions of one generation only, such as setmaxnreg, need the suffix.
  return {.vendor = Vendor::kCuda, .name = plain, .target = plain + "a", .wave_size = 32, .shared_bytes = 227 * 1024};
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
