// The library's interface, which tests/gpu_host.py calls.
#include <cstdio>
#include <exception>
#include <string>

#include "machine.h"

#define MK_EXPORT extern "C" __attribute__((visibility("default")))

MK_EXPORT const mk::u64 mk_host_options_bytes;
const mk::u64 mk_host_options_bytes = sizeof(mk::host::Options);

// Runs the kernel. Not 0: it failed, and `message` says why.
MK_EXPORT int mk_host_run(const mk::host::Options* options, mk::host::Statistics* statistics, char* message, size_t size) {
  std::string text;
  bool ok = false;
  try {
    *statistics = {};
    mk::host::Machine machine(*options, *statistics);
    mk::host::machine = &machine;
    ok = machine.run(text);
  } catch (const std::exception& error) {
    text = error.what();
  }
  mk::host::machine = nullptr;
  std::snprintf(message, size, "%s", text.c_str());
  return ok ? 0 : 1;
}
