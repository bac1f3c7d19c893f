#include "cpu/isa.h"

#include <mutex>

#include "cpu/settings.h"

namespace monokernel::cpu {

#define BUILD(isa)            \
  namespace isa {             \
  extern const Kernel kernel; \
  }
#if defined(__x86_64__)
BUILD(avx512_bf16)
BUILD(avx512)
BUILD(avx2)
BUILD(scalar)
#elif defined(__aarch64__)
BUILD(neon)
#else
BUILD(scalar)
#endif
#undef BUILD

namespace {

std::mutex g_mutex;
std::string g_forced;

const std::vector<const Kernel*>& kernels() {
  static const std::vector<const Kernel*> all = [] {
    std::vector<const Kernel*> found;
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && __builtin_cpu_supports("avx512bf16")) found.push_back(&avx512_bf16::kernel);
    if (avx512) found.push_back(&avx512::kernel);
    if (avx2) found.push_back(&avx2::kernel);
    found.push_back(&scalar::kernel);
#elif defined(__aarch64__)
    found.push_back(&neon::kernel);
#else
    found.push_back(&scalar::kernel);
#endif
    return found;
  }();
  return all;
}

const Kernel* find(const std::string& name) {
  for (const Kernel* kernel : kernels()) {
    if (name == kernel->name) return kernel;
  }
  return nullptr;
}

std::string unknown(const std::string& name, const char* from) {
  std::string message = std::string(from) + " is '" + name + "'; this machine can run";
  const char* separator = " ";
  for (const std::string& isa : available_isas()) {
    message += separator + isa;
    separator = ", ";
  }
  return message;
}

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernel* kernel : kernels()) names.emplace_back(kernel->name);
  return names;
}

std::string set_isa(const std::string& name) {
  if (!name.empty() && !find(name)) return unknown(name, "the instruction set");
  std::lock_guard lock(g_mutex);
  g_forced = name;
  return "";
}

const Kernel& best_kernel() { return *kernels().front(); }

const Kernel* current_kernel(std::string* error) {
  std::string name;
  {
    std::lock_guard lock(g_mutex);
    name = g_forced;
  }
  if (name.empty()) name = isa_setting();
  if (name.empty()) return kernels().front();
  const Kernel* kernel = find(name);
  if (!kernel) *error = unknown(name, "MONOKERNEL_ISA");
  return kernel;
}

}  // namespace monokernel::cpu
