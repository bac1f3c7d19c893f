// What the environment variables of the GPU run time say (docs/gpu.md), and where Python looks for libraries.
#pragma once

#include <string>
#include <vector>

namespace monokernel::gpu {

struct Settings {
  std::string cache_dir;    // MONOKERNEL_CACHE_DIR, else below XDG_CACHE_HOME or HOME; "": nowhere
  bool no_compile = false;  // MONOKERNEL_NO_COMPILE
  std::string trace;        // MONOKERNEL_TRACE: the file that timelines go to; "": none are recorded
  bool chip_wide = false;   // MONOKERNEL_CHIP_WIDE: hand-offs inside groups are as those between them
  bool racecheck = false;   // MONOKERNEL_RACECHECK: kernels whose waves meet as compute-sanitizer's racecheck can follow
  std::string timeout;      // MONOKERNEL_TIMEOUT, for timeout_s(): who uses no GPU need not hear of a wrong one
  // Libraries by path, instead of a search: MONOKERNEL_CUDA_LIBRARY, MONOKERNEL_NVRTC_LIBRARY, MONOKERNEL_HIP_LIBRARY,
  // MONOKERNEL_HIPRTC_LIBRARY
  std::string cuda_library, nvrtc_library, hip_library, hiprtc_library;
  std::vector<std::string> library_dirs;  // searched before the system's

  // How long a wait inside the kernel may last. Throws Failure kInvalid.
  double timeout_s() const;
};

// Reads the variables; as on the CPU, calls do not, because Python may be writing to the environment meanwhile.
void read_environment();

void set_library_dirs(const std::vector<std::string>& dirs);

Settings settings();

}  // namespace monokernel::gpu
