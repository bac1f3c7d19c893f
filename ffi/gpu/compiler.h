// The vendors' run-time compilers, NVRTC and hipRTC, through one table.
#pragma once

#include <cstddef>
#include <string>

#include "gpu/architecture.h"

namespace monokernel::gpu {

// X(member, type, NVRTC's function, hipRTC's function), as for the driver.
#define MONOKERNEL_COMPILER_FUNCTIONS(X)                                                                        \
  X(version, int(int*, int*), nvrtcVersion, hiprtcVersion)                                                      \
  X(error_text, const char*(int), nvrtcGetErrorString, hiprtcGetErrorString)                                    \
  X(create, int(void**, const char*, const char*, int, const char* const*, const char* const*),                 \
    nvrtcCreateProgram, hiprtcCreateProgram)                                                                    \
  X(compile, int(void*, int, const char* const*), nvrtcCompileProgram, hiprtcCompileProgram)                    \
  X(log_size, int(void*, size_t*), nvrtcGetProgramLogSize, hiprtcGetProgramLogSize)                             \
  X(log, int(void*, char*), nvrtcGetProgramLog, hiprtcGetProgramLog)                                            \
  X(code_size, int(void*, size_t*), nvrtcGetCUBINSize, hiprtcGetCodeSize)                                       \
  X(code, int(void*, char*), nvrtcGetCUBIN, hiprtcGetCode)                                                      \
  X(destroy, int(void**), nvrtcDestroyProgram, hiprtcDestroyProgram)

struct Compiler {
  Vendor vendor;
  std::string path;     // of the library
  std::string version;  // "nvrtc-13.0"
};

// Opens the vendor's compiler at the first call. Throws Failure kMissing, naming what to install.
const Compiler& compiler(Vendor vendor);

// The flags for an architecture, separated by blanks.
std::string compile_flags(const Architecture& architecture);

// Compiles `source`, which finds the kernel's headers by their names, to a binary for `architecture`. Throws Failure with the
// compiler's log.
std::string compile(const Architecture& architecture, const std::string& source);

}  // namespace monokernel::gpu
