// Finds and opens vendors' libraries at run time, so that the package needs none of them to build or import.
#pragma once

#include <string>
#include <vector>

namespace monokernel::gpu {

struct Wanted {
  std::string name;                      // "libnvrtc.so", without a version
  std::vector<std::string> sonames;      // what the loader is asked for, best first
  std::vector<std::string> dirs;         // searched for files called `name` and a version, before the loader is asked
  std::string only;                      // a path: nothing else is tried
  std::string variable;                  // the environment variable that gives it
  std::string install;                   // what to do when there is none
  int newest = 1 << 30;                  // major versions above this are tried last
};

// What to install, for Wanted::install. JAX's wheels need ROCm 7, although HIP 6 has all that this package asks for.
constexpr const char* kRocm =
    "ROCm 7 (AMD's system package rocm, or amdrocm of the ROCm Core SDK, or \"rocm[libraries]\" by pip from AMD's index; docs/rocm.md has "
    "the commands)";

struct Library {
  void* handle = nullptr;
  std::string path;
};

// Takes a copy that the process has loaded already; else the first that loads. Throws Failure kMissing.
Library open_library(const Wanted& wanted);

// Throws Failure kMissing if the library has no such function.
void* find_function(const Library& library, const char* name);

}  // namespace monokernel::gpu
