#include "gpu/compiler.h"

#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "gpu/failure.h"
#include "gpu/headers.h"
#include "gpu/library.h"
#include "gpu/once_map.h"
#include "gpu/settings.h"

namespace monokernel::gpu {
namespace {

struct Functions : Compiler {
#define X(member, type, nvrtc, hiprtc) std::type_identity_t<type>* member##_fn = nullptr;
  MONOKERNEL_COMPILER_FUNCTIONS(X)
#undef X
};

Wanted wanted_compiler(Vendor vendor) {
  const Settings s = settings();
  std::vector<std::string> dirs = s.library_dirs;
  if (vendor == Vendor::kCuda) {
    dirs.push_back("/usr/local/cuda/lib64");
    const int driver = driver_version(vendor);
    return {.name = "libnvrtc.so",
            .sonames = {"libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"},
            .dirs = dirs,
            .only = s.nvrtc_library,
            .variable = "MONOKERNEL_NVRTC_LIBRARY",
            .install = "Install NVIDIA's run-time compiler: pip install nvidia-cuda-nvrtc (nvidia-cuda-nvrtc-cu12 with a "
                       "driver for CUDA 12)",
            .newest = driver > 0 ? driver / 1000 : 1 << 30};  // a driver does not load binaries of a later major version
  }
  dirs.push_back("/opt/rocm/lib");
  return {.name = "libhiprtc.so",
          .sonames = {"libhiprtc.so.7", "libhiprtc.so.6", "libhiprtc.so"},
          .dirs = dirs,
          .only = s.hiprtc_library,
          .variable = "MONOKERNEL_HIPRTC_LIBRARY",
          .install = std::string("Install AMD's run-time compiler, a part of ") + kRocm};
}

std::shared_ptr<Functions> open_compiler(Vendor vendor, const Wanted& wanted) {
  const Library library = open_library(wanted);
  auto c = std::make_shared<Functions>();
  c->vendor = vendor;
  c->path = library.path;
#define X(member, type, nvrtc, hiprtc)                                     \
  c->member##_fn = reinterpret_cast<std::type_identity_t<type>*>(          \
      find_function(library, vendor == Vendor::kCuda ? #nvrtc : #hiprtc));
  MONOKERNEL_COMPILER_FUNCTIONS(X)
#undef X
  int major = 0, minor = 0;
  if (c->version_fn(&major, &minor) != 0) {
    throw Failure(Code::kInternal, library.path + " does not tell its version");
  }
  c->version = (vendor == Vendor::kCuda ? "nvrtc-" : "hiprtc-") + std::to_string(major) + "." + std::to_string(minor);
  return c;
}

const Functions& functions(Vendor vendor) {
  // Never closed, as the driver.
  static auto* compilers = new OnceMap<std::pair<Vendor, std::string>, Functions>;
  const Wanted wanted = wanted_compiler(vendor);
  return *compilers->get({vendor, wanted.only}, [&] { return open_compiler(vendor, wanted); });
}

}  // namespace

const Compiler& compiler(Vendor vendor) { return functions(vendor); }

std::string compile_flags(const Architecture& a) {
  // Products and sums are fused where the source says so and nowhere else: results must not depend on the compiler.
  if (a.vendor == Vendor::kCuda) {
    return "--gpu-architecture=" + a.target + " --std=c++17 -default-device -fmad=false -lineinfo";
  }
  // Constants that are moved out of loops as long as those of this kernel fill the registers (docs/amd.md).
  return "--offload-arch=" + a.target + " -std=c++17 -O3 -ffp-contract=off -mllvm -disable-machine-licm";
}

std::string compile(const Architecture& a, const std::string& source) {
  const Functions& c = functions(a.vendor);
  std::vector<const char*> texts, names;
  for (const Header& header : headers()) {
    texts.push_back(header.text);
    names.push_back(header.name);
  }
  const std::string flags = compile_flags(a) + " ";
  std::vector<std::string> options;
  for (size_t begin = 0, end; (end = flags.find(' ', begin)) != std::string::npos; begin = end + 1) {
    if (end > begin) options.push_back(flags.substr(begin, end - begin));
  }
  std::vector<const char*> option_texts;
  for (const std::string& option : options) option_texts.push_back(option.c_str());

  const auto check = [&](int error, const std::string& what) {
    if (error == 0) return;
    throw Failure(Code::kInternal, c.version + " (" + c.path + ") could not " + what + ": " + c.error_text_fn(error));
  };
  void* program = nullptr;
  check(c.create_fn(&program, source.c_str(), "monokernel.cu", static_cast<int>(names.size()), texts.data(), names.data()),
        "read the kernel");
  const auto destroy = [&c](void* p) { c.destroy_fn(&p); };
  const std::unique_ptr<void, decltype(destroy)> owner(program, destroy);

  const int error = c.compile_fn(program, static_cast<int>(option_texts.size()), option_texts.data());
  if (error != 0) {
    size_t size = 0;
    std::string log;
    if (c.log_size_fn(program, &size) == 0 && size > 1) {
      log.resize(size);
      if (c.log_fn(program, log.data()) != 0) log.clear();
      log = log.c_str();  // up to the terminating zero
    }
    check(error, "compile the kernel for " + a.target + ":\n" + log + "\n");
  }
  size_t size = 0;
  check(c.code_size_fn(program, &size), "give the binary");
  std::string code(size, '\0');
  check(c.code_fn(program, code.data()), "give the binary");
  return code;
}

}  // namespace monokernel::gpu
