#include "cpu/settings.h"

#include <cstdlib>
#include <mutex>

namespace monokernel::cpu {
namespace {

std::mutex g_mutex;
int64_t g_threads = 0;
std::string g_isa;

}  // namespace

void read_environment() {
  const char* threads = std::getenv("MONOKERNEL_THREADS");
  const char* isa = std::getenv("MONOKERNEL_ISA");
  std::lock_guard lock(g_mutex);
  g_threads = threads ? std::strtol(threads, nullptr, 10) : 0;
  g_isa = isa ? isa : "";
}

int64_t threads_setting() {
  std::lock_guard lock(g_mutex);
  return g_threads > 0 ? g_threads : 0;
}

std::string isa_setting() {
  std::lock_guard lock(g_mutex);
  return g_isa;
}

}  // namespace monokernel::cpu
