#include "gpu/settings.h"

#include <cstdlib>
#include <mutex>

#include "gpu/failure.h"

namespace monokernel::gpu {
namespace {

std::mutex g_mutex;
Settings g_settings;

std::string variable(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

bool is_set(const char* name) {
  const std::string value = variable(name);
  return !value.empty() && value != "0";
}

std::string cache_dir() {
  if (std::string own = variable("MONOKERNEL_CACHE_DIR"); !own.empty()) return own;
  if (std::string xdg = variable("XDG_CACHE_HOME"); !xdg.empty()) return xdg + "/jax_monokernel";
  if (std::string home = variable("HOME"); !home.empty()) return home + "/.cache/jax_monokernel";
  return "";
}

}  // namespace

double Settings::timeout_s() const {
  constexpr double kDefault = 10, kBelow = 1e6;
  if (timeout.empty()) return kDefault;
  char* end = nullptr;
  const double seconds = std::strtod(timeout.c_str(), &end);
  if (*end == '\0' && seconds > 0 && seconds < kBelow) return seconds;
  throw Failure(Code::kInvalid, "MONOKERNEL_TIMEOUT is \"" + timeout + "\"; expected a number of seconds above 0 and below 1000000, such "
                                    "as 30, or leave it unset for 10");
}

void read_environment() {
  Settings s;
  s.cache_dir = cache_dir();
  s.no_compile = is_set("MONOKERNEL_NO_COMPILE");
  s.chip_wide = is_set("MONOKERNEL_CHIP_WIDE");
  s.racecheck = is_set("MONOKERNEL_RACECHECK");
  s.trace = variable("MONOKERNEL_TRACE");
  s.timeout = variable("MONOKERNEL_TIMEOUT");
  s.cuda_library = variable("MONOKERNEL_CUDA_LIBRARY");
  s.nvrtc_library = variable("MONOKERNEL_NVRTC_LIBRARY");
  s.hip_library = variable("MONOKERNEL_HIP_LIBRARY");
  s.hiprtc_library = variable("MONOKERNEL_HIPRTC_LIBRARY");
  std::lock_guard lock(g_mutex);
  s.library_dirs = g_settings.library_dirs;
  g_settings = s;
}

void set_library_dirs(const std::vector<std::string>& dirs) {
  std::lock_guard lock(g_mutex);
  g_settings.library_dirs = dirs;
}

Settings settings() {
  std::lock_guard lock(g_mutex);
  return g_settings;
}

}  // namespace monokernel::gpu
