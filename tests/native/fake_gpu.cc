// A stand-in for the vendors' drivers and run-time compilers, over host memory: all that ffi/gpu asks of them, under both vendors'
// names. Tests set the fake_* variables to make it misbehave, and read what it was asked for.
//
// Compiling stores the source. A launch writes tokens, or a report; in mode kUntilCancelled it lasts until the cancel word is set.
// Work on a stream happens at once, or after the launch that it follows.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "gpu/kernel/args.h"
#include "probe_on_host.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

enum Launch : int { kRuns, kTimesOut, kUntilCancelled, kFailsToLaunch, kCrashes, kUnknownReason, kInvalidToken, kInvalidPosition,
                    kMissesActivations, kMissesToken, kMissesPlaces, kMissesNoMore };
enum Error : int { kInvalidValue = 1, kNoBinary = 209, kNotReady = 600, kIllegalAddress = 700, kTooLarge = 720 };

#define VARIABLE __attribute__((visibility("default")))

extern "C" {
VARIABLE int fake_devices = 2, fake_major = 9, fake_minor = 0, fake_units = 132, fake_uuid = 17, fake_old_device = -1, fake_occupancy = 1, fake_cooperative = 1;
VARIABLE int fake_shared_bytes = 227 * 1024, fake_driver_version = 13000, fake_nvrtc_major = 13, fake_launch = kRuns;
VARIABLE int fake_compile_ms = 0, fake_compile_error = 0, fake_no_memory = 0, fake_launch_ms = 0;
VARIABLE int fake_groups = 2, fake_most_bytes = 0;
VARIABLE char fake_arch[64] = "gfx942:sramecc+:xnack-";
// What was seen.
VARIABLE std::atomic<int> fake_compiles = 0, fake_loads = 0, fake_unloads = 0, fake_contexts = 0, fake_host_allocations = 0, fake_launches = 0, fake_allocations = 0, fake_overlaps = 0,
                          fake_cleared_bytes = 0;
VARIABLE int fake_last_device = -1, fake_grid = 0, fake_block = 0, fake_dynamic_shared = 0;
VARIABLE char fake_source[1 << 20] = "", fake_flags[1024] = "", fake_headers[8192] = "";
}

namespace {

std::mutex g_mutex;
thread_local std::vector<int> t_current;  // devices made current

struct Running {
  bool active = false;
  int64_t batch = 0;
  mk::Args args;
  std::chrono::steady_clock::time_point end;
  std::vector<std::function<void()>> later;
};
std::map<int, Running> g_running;  // by device

int device() { return t_current.empty() ? -1 : t_current.back(); }

// Does `work` now, or after the launch that is under way.
int enqueue(std::function<void()> work) {
  if (device() < 0) return kInvalidValue;
  std::lock_guard lock(g_mutex);
  Running& r = g_running[device()];
  r.active ? r.later.push_back(std::move(work)) : work();
  return 0;
}

void write_tokens(const mk::Args& a, int64_t batch) {
  for (int64_t b = 0; b < batch; b++) {
    const int n = a.status[b] == 0 ? std::min(a.max_new_tokens, a.row_max_new_tokens[b]) : 0;
    for (int i = 0; a.mailbox && i < n; i++) {  // the kernel's words (phases/head.h), a millisecond apart
      uint64_t* to = reinterpret_cast<uint64_t*>(a.mailbox) + (b * a.max_new_tokens + i) * 2;
      to[0] = uint64_t{0x80000000u | static_cast<uint32_t>(a.last_token[b] + i + 1)} << 32;
      to[1] = static_cast<uint64_t>(i + 1) * 1000000;
    }
    for (int i = 0; i < a.max_new_tokens; i++) a.tokens[b * a.max_new_tokens + i] = i < n ? a.last_token[b] + i + 1 : -1;
    a.lengths[b] = n;
    a.position[b] += n;
    a.last_token[b] += n;
  }
}

// Ends the launch if it is time; true if nothing runs.
bool progress(Running& r) {
  if (!r.active) return true;
  const bool cancelled = __atomic_load_n(r.args.cancel, __ATOMIC_RELAXED) != 0;
  if (!cancelled && (fake_launch == kUntilCancelled || std::chrono::steady_clock::now() < r.end)) return false;
  if (cancelled) {
    r.args.report->reason = mk::kCancelled;
  } else if (fake_launch == kTimesOut) {
    *r.args.report = {mk::kTimeout, 4, 3, 17, 5, 123, 1, 0xbeef};
  } else if (fake_launch == kMissesActivations) {
    *r.args.report = {mk::kTimeout, 5, 1, 2, 5, 40, mk::kNotZero, 0x3f80};
  } else if (fake_launch == kMissesToken) {
    *r.args.report = {mk::kTimeout, 8, 0, 2, 5, 0, 1, 6};
  } else if (fake_launch == kMissesPlaces) {
    *r.args.report = {mk::kTimeout, 12, 0, 0, 5, 0, 304, 303};
  } else if (fake_launch == kMissesNoMore) {
    *r.args.report = {mk::kTimeout, 5, 1, 2, 5, mk::kNotLooked, 0, 0};
  } else if (fake_launch == kUnknownReason) {
    r.args.report->reason = 77;
  } else if (fake_launch == kInvalidToken || fake_launch == kInvalidPosition) {
    const uint32_t position = fake_launch == kInvalidPosition ? 0u - 7 : 3;
    *r.args.report = {.reason = mk::kInvalid, .handoff = 0, .layer = 0, .token = 0, .unit = 1, .word = 0, .expected = position,
                      .seen = 51};
  } else {
    write_tokens(r.args, r.batch);
  }
  r.active = false;
  for (const auto& work : r.later) work();
  r.later.clear();
  return true;
}

int begin_launch(void* function, unsigned grid, unsigned block, unsigned shared, const mk::Args& args) {
  if (device() < 0) return kInvalidValue;
  if (fake_launch == kFailsToLaunch) return kTooLarge;
  std::lock_guard lock(g_mutex);
  Running& r = g_running[device()];
  if (r.active) fake_overlaps++;
  fake_last_device = device();
  fake_grid = static_cast<int>(grid);
  fake_block = static_cast<int>(block);
  fake_dynamic_shared = static_cast<int>(shared);
  fake_launches++;
  r.args = args;
  r.batch = std::atoi(std::strstr(static_cast<char*>(function), "#define MK_BATCH ") + 17);
  r.active = true;
  r.end = std::chrono::steady_clock::now() + std::chrono::milliseconds(fake_launch_ms);
  return 0;
}

// What a module's functions other than the kernel are.
enum Other : int { kProbe, kClusters };
Other g_others[] = {kProbe, kClusters};

bool is(void* function, Other other) { return function == &g_others[other]; }

int launch_probe(unsigned units, const topology::Args& args, double ticks_per_ns, int place_shift) {
  if (fake_launch == kFailsToLaunch) return kTooLarge;
  fake_launches++;
  topology::arch::g_ticks_per_ns = ticks_per_ns;
  topology::arch::g_groups = fake_groups;
  topology::arch::g_place_shift = place_shift;
  run_probe_on_host(args, units);
  return 0;
}

int query() {
  std::lock_guard lock(g_mutex);
  Running& r = g_running[device()];
  if (fake_launch == kCrashes && r.active) {
    r = {};
    return kIllegalAddress;
  }
  return progress(r) ? 0 : kNotReady;
}

int attribute(int* value, int number, const std::map<int, int>& values) {
  const auto found = values.find(number);
  if (found == values.end()) return kInvalidValue;
  *value = found->second;
  return 0;
}

}  // namespace

#define BOTH(cuda, hip, parameters, ...) \
  EXPORT int cuda parameters __VA_ARGS__ \
  EXPORT int hip parameters __VA_ARGS__

BOTH(cuInit, hipInit, (unsigned), { return 0; })
BOTH(cuDriverGetVersion, hipDriverGetVersion, (int* v), {
  *v = fake_driver_version;
  return 0;
})
BOTH(cuGetErrorString, hipDrvGetErrorString, (int error, const char** text), {
  *text = error == 2 ? "out of memory" : error == kIllegalAddress ? "an illegal memory access was encountered" : "fake error";
  return 0;
})
BOTH(cuDeviceGetCount, hipGetDeviceCount, (int* n), {
  *n = fake_devices;
  return 0;
})
BOTH(cuDeviceGet, hipDeviceGet, (int* handle, int ordinal), {
  *handle = ordinal;
  return 0;
})
BOTH(cuDeviceGetName, hipDeviceGetName, (char* name, int size, int), {
  std::strncpy(name, "Fake GPU", static_cast<size_t>(size));
  return 0;
})
BOTH(cuDeviceTotalMem_v2, hipDeviceTotalMem, (size_t* bytes, int), {
  *bytes = size_t{80} << 30;
  return 0;
})
BOTH(cuDeviceGetPCIBusId, hipDeviceGetPCIBusId, (char* bus, int size, int device), {
  std::snprintf(bus, static_cast<size_t>(size), "0000:%02x:00.0", 0xc1 + device);
  return 0;
})
BOTH(cuDeviceGetUuid_v2, hipDeviceGetUuid, (void* uuid, int device), {
  std::memset(uuid, fake_uuid + device, 16);
  return 0;
})
BOTH(cuDeviceCanAccessPeer, hipDeviceCanAccessPeer, (int* can, int, int), {
  *can = 1;
  return 0;
})
EXPORT int cuDeviceGetAttribute(int* value, int number, int device) {
  return attribute(value, number,
                   {{16, fake_units}, {10, 32}, {1, 1024}, {97, fake_shared_bytes}, {95, fake_cooperative}, {13, 1980000},
                    {75, device == fake_old_device ? 7 : fake_major}, {76, fake_minor}});
}
EXPORT int hipDeviceGetAttribute(int* value, int number, int) {
  return attribute(value, number,
                   {{63, fake_units}, {87, 64}, {56, 1024}, {74, fake_shared_bytes}, {10, fake_cooperative}, {10017, 100000},
                    {23, fake_major}, {61, fake_minor}});
}
EXPORT int hipGetDevicePropertiesR0600(void* properties, int) {
  std::memset(properties, 0, 1472);
  std::strcpy(static_cast<char*>(properties), "Fake gfx GPU");
  std::strcpy(static_cast<char*>(properties) + 1160, fake_arch);
  return 0;
}
EXPORT int cuDevicePrimaryCtxRetain(void** context, int handle) {
  *context = reinterpret_cast<void*>(static_cast<intptr_t>(handle) + 1);
  fake_contexts++;
  return 0;
}
EXPORT int cuCtxPushCurrent_v2(void* context) {
  t_current.push_back(static_cast<int>(reinterpret_cast<intptr_t>(context)) - 1);
  return 0;
}
EXPORT int cuCtxPopCurrent_v2(void** context) {
  if (t_current.empty()) return kInvalidValue;
  *context = reinterpret_cast<void*>(static_cast<intptr_t>(t_current.back()) + 1);
  t_current.pop_back();
  return 0;
}
EXPORT int hipGetDevice(int* handle) {
  *handle = t_current.empty() ? 0 : t_current.back();
  return 0;
}
EXPORT int hipSetDevice(int handle) {
  t_current.assign(1, handle);
  return 0;
}
BOTH(cuModuleLoadData, hipModuleLoadData, (void** module, const void* code), {
  if (std::memcmp(code, "FAKE", 4) != 0) return kNoBinary;
  fake_loads++;
  *module = strdup(static_cast<const char*>(code));
  return device() < 0 ? kInvalidValue : 0;
})
BOTH(cuModuleUnload, hipModuleUnload, (void* module), {
  std::free(module);
  fake_unloads++;
  return device() < 0 ? kInvalidValue : 0;
})
BOTH(cuModuleGetFunction, hipModuleGetFunction, (void** function, void* module, const char* name), {
  const std::string wanted = name;
  *function = wanted == "topology_probe" ? &g_others[kProbe] : wanted.starts_with("topology_clusters_") ? &g_others[kClusters] : module;
  return *function != module || wanted == "monokernel" ? 0 : kInvalidValue;
})
BOTH(cuFuncGetAttribute, hipFuncGetAttribute, (int* value, int number, void*),
     { return attribute(value, number, {{1, 0}, {3, 0}, {4, 128}}); })
EXPORT int cuFuncSetAttribute(void*, int number, int bytes) {
  return number == 8 && bytes <= fake_shared_bytes ? 0 : kInvalidValue;
}
BOTH(cuOccupancyMaxActiveBlocksPerMultiprocessor, hipModuleOccupancyMaxActiveBlocksPerMultiprocessor,
     (int* blocks, void*, int, size_t), {
       *blocks = fake_occupancy;
       return 0;
     })
#define LAUNCH (void* function, unsigned grid, unsigned, unsigned, unsigned block, unsigned, unsigned, unsigned shared, void*, void** parameters)
EXPORT int cuLaunchCooperativeKernel LAUNCH {
  if (is(function, kProbe)) return launch_probe(grid, *static_cast<topology::Args*>(parameters[0]), 1.98, 0);
  return begin_launch(function, grid, block, shared, *static_cast<mk::Args*>(parameters[0]));
}
EXPORT int hipModuleLaunchCooperativeKernel LAUNCH {
  if (is(function, kProbe)) return launch_probe(grid, *static_cast<topology::Args*>(parameters[0]), 0.1, 8);
  return begin_launch(function, grid, block, shared, *static_cast<mk::Args*>(parameters[0]));
}
#undef LAUNCH
BOTH(cuLaunchKernel, hipModuleLaunchKernel,
     (void* function, unsigned grid, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void** parameters, void**), {
       if (!is(function, kClusters)) return kInvalidValue;
       auto* found = *static_cast<uint32_t**>(parameters[0]);
       // Clusters of SMs whose numbers have the same remainder, as few as there may be.
       for (unsigned i = 0; i < grid; i++) {
         const unsigned count = static_cast<unsigned>(fake_groups);
         found[i * 2] = i;
         found[i * 2 + 1] = i % count;
       }
       return 0;
     })
BOTH(cuMemAlloc_v2, hipMalloc, (void** memory, size_t bytes), {
  const bool too_much = fake_most_bytes > 0 && bytes > static_cast<size_t>(fake_most_bytes);
  *memory = fake_no_memory || too_much ? nullptr : std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  if (*memory) fake_allocations++;
  return *memory ? 0 : 2;
})
BOTH(cuMemFree_v2, hipFree, (void* memory), {
  std::free(memory);
  fake_allocations--;
  return 0;
})
BOTH(cuMemHostAlloc, hipHostMalloc, (void** memory, size_t bytes, unsigned flags), {
  *memory = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  fake_host_allocations++;
  return flags & 2 ? 0 : kInvalidValue;
})
BOTH(cuMemFreeHost, hipHostFree, (void* memory), {
  std::free(memory);
  fake_host_allocations--;
  return 0;
})
BOTH(cuMemHostGetDevicePointer_v2, hipHostGetDevicePointer, (void** on_device, void* memory, unsigned), {
  *on_device = memory;
  return 0;
})
BOTH(cuMemsetD8Async, hipMemsetD8Async, (void* to, unsigned char value, size_t bytes, void*),
     {
       fake_cleared_bytes += value == 0 ? static_cast<int>(bytes) : 0;
       return enqueue([=] { std::memset(to, value, bytes); });
     })
BOTH(cuMemcpyDtoDAsync_v2, hipMemcpyDtoDAsync, (void* to, void* from, size_t bytes, void*),
     { return enqueue([=] { std::memcpy(to, from, bytes); }); })
BOTH(cuMemcpyHtoDAsync_v2, hipMemcpyHtoDAsync, (void* to, const void* from, size_t bytes, void*), {
  std::memcpy(to, from, bytes);
  return device() < 0 ? kInvalidValue : 0;
})
BOTH(cuMemcpyDtoHAsync_v2, hipMemcpyDtoHAsync, (void* to, void* from, size_t bytes, void*),
     { return enqueue([=] { std::memcpy(to, from, bytes); }); })
BOTH(cuEventCreate, hipEventCreateWithFlags, (void** event, unsigned), {
  *event = &g_running;
  return 0;
})
BOTH(cuEventRecord, hipEventRecord, (void*, void*), { return 0; })
BOTH(cuEventQuery, hipEventQuery, (void*), { return query(); })
BOTH(cuStreamSynchronize, hipStreamSynchronize, (void*), {
  int state;
  while ((state = query()) == kNotReady) std::this_thread::yield();
  return state;
})

namespace {

struct Source {
  std::string text, headers, flags;
};

}  // namespace

BOTH(nvrtcVersion, hiprtcVersion, (int* major, int* minor), {
  *major = fake_nvrtc_major;
  *minor = 4;
  return 0;
})
EXPORT const char* nvrtcGetErrorString(int) { return "fake compilation error"; }
EXPORT const char* hiprtcGetErrorString(int) { return "fake compilation error"; }
BOTH(nvrtcCreateProgram, hiprtcCreateProgram,
     (void** program, const char* source, const char*, int n, const char* const* texts, const char* const* names), {
       auto* s = new Source{source, "", ""};
       for (int i = 0; i < n; i++) s->headers += std::string(names[i]) + ":" + std::to_string(std::strlen(texts[i])) + "\n";
       *program = s;
       return 0;
     })
BOTH(nvrtcCompileProgram, hiprtcCompileProgram, (void* program, int n, const char* const* flags), {
  auto* s = static_cast<Source*>(program);
  fake_compiles++;
  for (int i = 0; i < n; i++) s->flags += std::string(flags[i]) + "\n";
  std::this_thread::sleep_for(std::chrono::milliseconds(fake_compile_ms));
  std::lock_guard lock(g_mutex);
  std::strncpy(fake_source, s->text.c_str(), sizeof(fake_source) - 1);
  std::strncpy(fake_flags, s->flags.c_str(), sizeof(fake_flags) - 1);
  std::strncpy(fake_headers, s->headers.c_str(), sizeof(fake_headers) - 1);
  return fake_compile_error;
})
BOTH(nvrtcGetProgramLogSize, hiprtcGetProgramLogSize, (void*, size_t* size), {
  *size = 32;
  return 0;
})
BOTH(nvrtcGetProgramLog, hiprtcGetProgramLog, (void*, char* log), {
  std::strcpy(log, "kernel.h(1): the log says why");
  return 0;
})
BOTH(nvrtcGetCUBINSize, hiprtcGetCodeSize, (void* program, size_t* size), {
  *size = static_cast<Source*>(program)->text.size() + 5;
  return 0;
})
BOTH(nvrtcGetCUBIN, hiprtcGetCode, (void* program, char* code), {
  const std::string all = "FAKE" + static_cast<Source*>(program)->text;
  std::memcpy(code, all.c_str(), all.size() + 1);
  return 0;
})
BOTH(nvrtcDestroyProgram, hiprtcDestroyProgram, (void** program), {
  delete static_cast<Source*>(*program);
  *program = nullptr;
  return 0;
})
