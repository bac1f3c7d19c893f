// A stand-in for libamdhip64 that runs kernels: those that the stand-in for hipRTC compiled for this CPU, on the executor of
// native/gpu_host. Device memory is host memory, a stream is a thread.
//
// It takes no call that HIP's documentation does not promise to work, nor one that this run time has no reason to make: what is
// wrong is noted in hip_complaints, and the call fails. Two devices stand for MI300X: what they answer is what such a GPU does.
#include <dlfcn.h>
#include <elf.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "about_kernel.h"
#include "gpu/driver.h"
#include "numbers.h"
#include "strict.h"

#define VARIABLE __attribute__((visibility("default")))

extern "C" {
VARIABLE char hip_complaints[rocm::kComplaintBytes] = "";
VARIABLE int hip_devices = 2, hip_driver_version = 60232830, hip_units = 304;
VARIABLE char hip_arch[64] = "gfx942:sramecc+:xnack-";
// How the executor goes about it, and what goes wrong: numbers of gpu_host/options.h. The fault is in bytes of the workspace.
VARIABLE int hip_policy = 3, hip_stores = 1, hip_seed = 1, hip_fault = 0, hip_fault_store = 0;
VARIABLE int hip_dies = 1;  // work-groups are dealt to so many by turns
VARIABLE mk::host::Homes hip_homes = {};  // of memory: what is read of it is counted
VARIABLE std::atomic<uint64_t> hip_near = 0, hip_far = 0;
VARIABLE int hip_break_set = 0;  // 1: hipMemsetD8Async does nothing
// What was done.
VARIABLE std::atomic<int> hip_loads = 0, hip_launches = 0, hip_allocations = 0, hip_steps = 0;
}

namespace {

using namespace rocm;
namespace host = mk::host;

constexpr intptr_t kStreams = 0x5000;  // gpu/handler.h: kTestStreams
constexpr int kMostThreads = 1024;

template <typename... A>
int complain(int error, const char* format, A... arguments) {
  return rocm::complain(hip_complaints, error, format, arguments...);
}

// ---- Devices and threads ----

std::atomic<bool> g_initialized = false;
// A thread's device at first is the last one, so that nothing goes to device 0 because it was forgotten to say where. Also
// where a test before had more devices.
thread_local int t_own = -1, t_current = -1;

int current() {
  if (t_own < 0 || t_own >= hip_devices) t_own = t_current = hip_devices - 1;
  return t_current;
}

bool is_gfx950() { return std::strncmp(hip_arch, "gfx950", 6) == 0; }
int shared_limit() { return (is_gfx950() ? 160 : 64) * 1024; }

#define NEEDS_INIT(name) \
  if (!g_initialized) return complain(kNotInitialized, "%s: hipInit was not called", name)
#define REQUIRE(condition, error, ...) \
  if (!(condition)) return complain(error, __VA_ARGS__)

// ---- Memory ----

struct Memory {
  char* begin;
  size_t bytes;
  int device;   // -1: the host's
  char* alias;  // of host memory: where the device sees it
};
std::mutex g_memory_mutex;
std::map<const char*, Memory> g_memory;  // by begin, and by alias

const Memory* memory_at(const void* p) {
  std::lock_guard lock(g_memory_mutex);
  auto it = g_memory.upper_bound(static_cast<const char*>(p));
  if (it == g_memory.begin()) return nullptr;
  --it;
  return static_cast<const char*>(p) < it->first + it->second.bytes ? &it->second : nullptr;
}

// "" if these bytes can be a device's: its own memory, host memory by its address for devices, or memory of XLA's.
std::string not_on_device(const void* p, size_t bytes, int device) {
  if (!p) return "a null pointer";
  const Memory* m = memory_at(p);
  if (!m) return "";
  const char* at = static_cast<const char*>(p);
  if (m->device >= 0) {
    if (m->device != device) return "memory of device " + std::to_string(m->device);
    return at + bytes <= m->begin + m->bytes ? "" : "more than was allocated";
  }
  if (at >= m->begin && at < m->begin + m->bytes) return "host memory by the host's address";
  return at + bytes <= m->alias + m->bytes ? "" : "more than was allocated";
}

// ---- Streams ----

class Stream {
 public:
  explicit Stream(int device) : device(device) {
    std::thread([this] { work(); }).detach();
  }

  uint64_t add(std::function<int()> work) {
    std::lock_guard lock(mutex_);
    queue_.push_back(std::move(work));
    changed_.notify_all();
    return ++added_;
  }
  // 0, or kNotReady, or what went wrong since it was asked for.
  int state(uint64_t number) {
    std::lock_guard lock(mutex_);
    return done_ < number ? kNotReady : std::exchange(error_, 0);
  }
  int wait() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return done_ == added_; });
    return std::exchange(error_, 0);
  }

  const int device;

 private:
  void work() {
    std::unique_lock lock(mutex_);
    for (;;) {
      changed_.wait(lock, [this] { return !queue_.empty(); });
      const auto next = std::move(queue_.front());
      queue_.pop_front();
      lock.unlock();
      const int error = next();
      lock.lock();
      if (error != 0) error_ = error;
      done_++;
      changed_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<int()>> queue_;
  uint64_t added_ = 0, done_ = 0;
  int error_ = 0;
};

std::mutex g_streams_mutex;
std::map<int, Stream*> g_streams;

// Null after a complaint.
Stream* stream_of(const char* name, void* handle) {
  const intptr_t device = reinterpret_cast<intptr_t>(handle) - kStreams;
  if (!handle) return complain(0, "%s: on the null stream, which waits for all others; XLA's is to be used", name), nullptr;
  if (device < 0 || device >= hip_devices) return complain(0, "%s: %p is no stream", name, handle), nullptr;
  if (device != current()) {
    complain(0, "%s: a stream of device %d while device %d is current", name, static_cast<int>(device), current());
    return nullptr;
  }
  std::lock_guard lock(g_streams_mutex);
  Stream*& stream = g_streams[static_cast<int>(device)];
  if (!stream) stream = new Stream(static_cast<int>(device));
  return stream;
}

struct Event {
  int device;
  Stream* stream = nullptr;
  uint64_t number = 0;
};
std::mutex g_events_mutex;
std::set<void*> g_events;

Event* event_of(void* event) {
  std::lock_guard lock(g_events_mutex);
  return g_events.count(event) ? static_cast<Event*>(event) : nullptr;
}

// ---- Modules ----

struct Module {
  int device;
  const About* about;
  int (*run)(const host::Options*, host::Statistics*, char*, size_t);
  bool described = false, placed = false;  // what is to be asked before a launch
};
std::mutex g_modules_mutex;
std::set<void*> g_modules, g_functions;

Module* function_of(void* function) {
  std::lock_guard lock(g_modules_mutex);
  return g_functions.count(function) ? static_cast<Module*>(function) : nullptr;
}

// The size of a library in memory: its section headers come last.
size_t elf_bytes(const void* image) {
  const auto* header = static_cast<const Elf64_Ehdr*>(image);
  if (std::memcmp(header->e_ident, ELFMAG, SELFMAG) != 0) return 0;
  return header->e_shoff + size_t{header->e_shnum} * header->e_shentsize;
}

// ---- Launches ----

bool is_zero(const void* p, size_t bytes) {
  const char* at = static_cast<const char*>(p);
  return std::all_of(at, at + bytes, [](char c) { return c == 0; });
}

void fill(void* p, size_t bytes) {
  for (size_t i = 0; i + 4 <= bytes; i += 4) std::memcpy(static_cast<char*>(p) + i, &host::kUnwritten, 4);
}

std::vector<host::Region> regions_of(const About& about, const mk::Args& args) {
  std::vector<host::Region> regions(kMostRegions);
  regions.resize(about.regions(args, regions.data()));
  for (host::Region& r : regions) {
    const Memory* m = std::strcmp(r.name, "trace") == 0 ? memory_at(r.begin) : nullptr;
    if (m && r.begin == m->begin) r.bytes = std::max<uint64_t>(r.bytes, m->bytes);
  }
  return regions;
}

int check_regions(const std::vector<host::Region>& regions, int device) {
  for (const host::Region& r : regions) {
    if (r.bytes == 0) continue;
    REQUIRE(reinterpret_cast<uintptr_t>(r.begin) % 16 == 0, kInvalidValue, "launch: %s is at %p, not aligned to 16 bytes", r.name,
            r.begin);
    const bool of_host = std::strcmp(r.name, "cancel") == 0 || std::strcmp(r.name, "mailbox") == 0;
    const std::string wrong = not_on_device(r.begin, r.bytes, device);
    REQUIRE(wrong.empty(), kInvalidValue, "launch: %s is %s", r.name, wrong.c_str());
    const Memory* m = memory_at(r.begin);
    REQUIRE(!of_host || (m && m->device < 0), kInvalidValue, "launch: %s is not in host memory", r.name);
    REQUIRE(of_host || !m || m->device >= 0, kInvalidValue, "launch: %s is in host memory", r.name);
    for (const host::Region& other : regions) {
      const bool apart = r.begin + r.bytes <= other.begin || other.begin + other.bytes <= r.begin;
      REQUIRE(&other == &r || other.bytes == 0 || !r.writable || apart, kInvalidValue, "launch: %s and %s overlap", r.name,
              other.name);
    }
  }
  return 0;
}

int execute(const Module& module, const mk::Args& args) {
  std::vector<host::Region> regions = regions_of(*module.about, args);
  char* workspace = nullptr;
  uint64_t words = 0;
  for (const host::Region& r : regions) {
    const std::string name = r.name;
    // The run time clears these on the stream, before the launch.
    const bool cleared = name == "report" || name == "workspace" || name == "trace" || name == "mailbox";
    if (cleared) REQUIRE(is_zero(r.begin, r.bytes), kLaunchFailure, "launch: %s is not cleared", r.name);
    if (name == "workspace") workspace = r.begin, words = r.bytes;
    if (r.blank || name == "tokens" || name == "lengths" || name == "log_probs") fill(r.begin, r.bytes);
  }
  host::Options options{};
  options.args = args;
  options.regions = regions.data();
  options.region_count = regions.size();
  options.seed = static_cast<mk::u64>(hip_seed);
  options.max_steps = uint64_t{1} << 60;
  options.policy = static_cast<host::Policy>(hip_policy);
  options.stores = static_cast<host::Stores>(hip_stores);
  options.fault = {static_cast<host::FaultKind>(hip_fault), static_cast<mk::u32>(hip_fault_store), workspace, workspace + words, host::Watched::kAll};
  host::Statistics statistics;
  char message[4096] = "";
  std::vector<mk::u32> dies(4096);
  for (size_t i = 0; i < dies.size(); i++) dies[i] = static_cast<mk::u32>(i) % static_cast<mk::u32>(hip_dies);
  options.dies = dies.data();
  options.homes = hip_homes;
  const int error = module.run(&options, &statistics, message, sizeof message);
  hip_near += statistics.near;
  hip_far += statistics.far;
  hip_steps = static_cast<int>(std::min<uint64_t>(statistics.steps, 1u << 30));
  return error == 0 ? 0 : complain(kLaunchFailure, "the kernel: %s", message);
}

}  // namespace

EXPORT int hipInit(unsigned flags) {
  REQUIRE(flags == 0, kInvalidValue, "hipInit: flags are %u", flags);
  g_initialized = true;
  return 0;
}

EXPORT int hipDriverGetVersion(int* version) {
  NEEDS_INIT("hipDriverGetVersion");
  *version = hip_driver_version;
  return 0;
}

EXPORT int hipDrvGetErrorString(int error, const char** text) {
  static thread_local std::string kept;
  std::lock_guard lock(rocm::complaint_mutex);
  kept = rocm::last_complaint.empty() ? "error of the stand-in" : rocm::last_complaint;
  if (error == kOutOfMemory) kept = "out of memory";
  *text = kept.c_str();
  return 0;
}

EXPORT int hipGetDeviceCount(int* count) {
  NEEDS_INIT("hipGetDeviceCount");
  *count = hip_devices;
  return 0;
}

EXPORT int hipDeviceGet(int* device, int ordinal) {
  NEEDS_INIT("hipDeviceGet");
  REQUIRE(ordinal >= 0 && ordinal < hip_devices, kInvalidValue, "hipDeviceGet: there is no device %d", ordinal);
  *device = ordinal;
  return 0;
}

EXPORT int hipDeviceGetName(char* name, int bytes, int device) {
  NEEDS_INIT("hipDeviceGetName");
  REQUIRE(device >= 0 && device < hip_devices && bytes > 0, kInvalidValue, "hipDeviceGetName: device %d, %d bytes", device, bytes);
  std::snprintf(name, static_cast<size_t>(bytes), "AMD Instinct MI300X (stand-in)");
  return 0;
}

EXPORT int hipDeviceTotalMem(size_t* bytes, int device) {
  NEEDS_INIT("hipDeviceTotalMem");
  REQUIRE(device >= 0 && device < hip_devices, kInvalidValue, "hipDeviceTotalMem: there is no device %d", device);
  *bytes = size_t{192} << 30;
  return 0;
}

EXPORT int hipDeviceGetPCIBusId(char* bus, int bytes, int device) {
  NEEDS_INIT("hipDeviceGetPCIBusId");
  REQUIRE(device >= 0 && device < hip_devices && bytes >= 13, kInvalidValue, "hipDeviceGetPCIBusId: device %d, %d bytes", device, bytes);
  std::snprintf(bus, static_cast<size_t>(bytes), "0000:%02x:00.0", 0xc1 + device);
  return 0;
}

EXPORT int hipDeviceGetUuid(void* uuid, int device) {
  NEEDS_INIT("hipDeviceGetUuid");
  REQUIRE(device >= 0 && device < hip_devices, kInvalidValue, "hipDeviceGetUuid: there is no device %d", device);
  std::memcpy(uuid, "0123456789abcde", kUuidBytes - 1);
  static_cast<char*>(uuid)[kUuidBytes - 1] = static_cast<char>('0' + device);
  return 0;
}

EXPORT int hipDeviceCanAccessPeer(int* can, int device, int peer) {
  NEEDS_INIT("hipDeviceCanAccessPeer");
  REQUIRE(device != peer && std::max(device, peer) < hip_devices, kInvalidValue, "hipDeviceCanAccessPeer: %d and %d", device, peer);
  *can = 1;
  return 0;
}

EXPORT int hipDeviceGetAttribute(int* value, int attribute, int device) {
  NEEDS_INIT("hipDeviceGetAttribute");
  REQUIRE(device >= 0 && device < hip_devices, kInvalidValue, "hipDeviceGetAttribute: there is no device %d", device);
  const std::map<int, int> values = {
      {kUnits, hip_units}, {kWaveSize, 64},    {kMaxThreads, kMostThreads}, {kSharedBytes, shared_limit()},
      {kCooperative, 1},   {kClockRate, 100000}, {kMajor, 9},                 {kMinor, is_gfx950() ? 5 : 4}};
  const auto found = values.find(attribute);
  REQUIRE(found != values.end(), kInvalidValue, "hipDeviceGetAttribute: nobody has a reason to ask for attribute %d", attribute);
  *value = found->second;
  return 0;
}

EXPORT int hipGetDevicePropertiesR0600(void* properties, int device) {
  NEEDS_INIT("hipGetDevicePropertiesR0600");
  REQUIRE(device >= 0 && device < hip_devices, kInvalidValue, "hipGetDevicePropertiesR0600: there is no device %d", device);
  char* p = static_cast<char*>(properties);
  std::memset(p, 0x67, kPropertiesBytes);  // "ggg..."
  std::snprintf(p, 256, "gfx of a name that begins so");
  std::snprintf(p + kArchOffset, 256, "%s", hip_arch);
  return 0;
}

EXPORT int hipGetDevice(int* device) {
  NEEDS_INIT("hipGetDevice");
  *device = current();
  REQUIRE(t_current == t_own, kInvalidContext,
          "hipGetDevice: device %d was current before an earlier call, and device %d was left so", t_own, t_current);
  return 0;
}

EXPORT int hipSetDevice(int device) {
  NEEDS_INIT("hipSetDevice");
  REQUIRE(device >= 0 && device < hip_devices, kInvalidValue, "hipSetDevice: there is no device %d", device);
  current();
  t_current = device;
  return 0;
}

EXPORT int hipModuleLoadData(void** module, const void* image) {
  NEEDS_INIT("hipModuleLoadData");
  const size_t bytes = image ? elf_bytes(image) : 0;
  REQUIRE(bytes > 0, kInvalidImage, "hipModuleLoadData: this is no code object");
  char path[] = "/tmp/code_object-XXXXXX";  // a name of its own: the loader takes what has the same one for the same library
  const int file = mkstemp(path);
  const bool written = write(file, image, bytes) == static_cast<ssize_t>(bytes);
  close(file);
  void* library = written ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : nullptr;
  unlink(path);
  REQUIRE(library, kInvalidImage, "hipModuleLoadData: %s", dlerror());
  auto* about = static_cast<const About*>(dlsym(library, "mk_about"));
  auto* run = reinterpret_cast<decltype(Module::run)>(dlsym(library, "mk_host_run"));
  REQUIRE(about && run, kInvalidImage, "hipModuleLoadData: no kernel that the stand-in for hipRTC compiled");
  auto* m = new Module{current(), about, run};
  hip_loads++;
  std::lock_guard lock(g_modules_mutex);
  g_modules.insert(m);
  *module = m;
  return 0;
}

EXPORT int hipModuleUnload(void* module) {
  NEEDS_INIT("hipModuleUnload");
  std::lock_guard lock(g_modules_mutex);
  REQUIRE(g_modules.erase(module), kInvalidHandle, "hipModuleUnload: no such module");
  g_functions.erase(module);
  delete static_cast<Module*>(module);
  return 0;
}

EXPORT int hipModuleGetFunction(void** function, void* module, const char* name) {
  NEEDS_INIT("hipModuleGetFunction");
  std::lock_guard lock(g_modules_mutex);
  REQUIRE(g_modules.count(module), kInvalidHandle, "hipModuleGetFunction: no such module");
  REQUIRE(std::strcmp(name, "monokernel") == 0, kNotFound, "hipModuleGetFunction: the module has no %s", name);
  g_functions.insert(module);
  *function = module;
  return 0;
}

EXPORT int hipFuncGetAttribute(int* value, int attribute, void* function) {
  NEEDS_INIT("hipFuncGetAttribute");
  Module* m = function_of(function);
  REQUIRE(m, kInvalidHandle, "hipFuncGetAttribute: no such function");
  const std::map<int, int> values = {{kStaticShared, 0}, {kLocal, 0}, {kRegisters, 120}};
  const auto found = values.find(attribute);
  REQUIRE(found != values.end(), kInvalidValue, "hipFuncGetAttribute: nobody has a reason to ask for attribute %d", attribute);
  *value = found->second;
  m->described |= attribute == kStaticShared;
  return 0;
}

EXPORT int hipModuleOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void* function, int threads, size_t shared_bytes) {
  NEEDS_INIT("hipModuleOccupancyMaxActiveBlocksPerMultiprocessor");
  Module* m = function_of(function);
  REQUIRE(m, kInvalidHandle, "occupancy: no such function");
  REQUIRE(m->device == current(), kInvalidContext, "occupancy: a function of device %d while device %d is current", m->device,
          current());
  REQUIRE(threads == static_cast<int>(m->about->threads) && shared_bytes == m->about->shared_bytes, kInvalidValue,
          "occupancy: %d threads and %zu bytes; the kernel has %u and %u", threads, shared_bytes, m->about->threads,
          m->about->shared_bytes);
  *blocks = threads <= kMostThreads ? shared_limit() / static_cast<int>(shared_bytes) : 0;
  m->placed = true;
  return 0;
}

EXPORT int hipModuleLaunchCooperativeKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                                            unsigned block_y, unsigned block_z, unsigned shared_bytes, void* stream,
                                            void** parameters) {
  NEEDS_INIT("launch");
  Module* m = function_of(function);
  REQUIRE(m, kInvalidHandle, "launch: no such function");
  REQUIRE(m->device == current(), kInvalidContext, "launch: a function of device %d while device %d is current", m->device,
          current());
  const About& a = *m->about;
  REQUIRE(grid_x == a.units && grid_y == 1 && grid_z == 1, kInvalidValue, "launch: a grid of %u x %u x %u, not %u", grid_x, grid_y,
          grid_z, a.units);
  REQUIRE(block_x == a.threads && block_y == 1 && block_z == 1, kInvalidValue,
          "launch: blocks of %u x %u x %u; the kernel is for %u threads", block_x, block_y, block_z, a.threads);
  REQUIRE(shared_bytes == a.shared_bytes, kInvalidValue, "launch: %u bytes of shared memory; the kernel has %u", shared_bytes,
          a.shared_bytes);
  REQUIRE(m->described && m->placed, kInvalidValue, "launch: nobody asked whether the kernel fits");
  REQUIRE(grid_x <= static_cast<unsigned>(hip_units), kTooLarge, "launch: %u work-groups do not run at once", grid_x);
  REQUIRE(parameters && parameters[0], kInvalidValue, "launch: no parameters");
  Stream* s = stream_of("launch", stream);
  if (!s) return kInvalidHandle;
  // As HIP does, the parameters are copied now.
  const mk::Args args = *static_cast<const mk::Args*>(parameters[0]);
  REQUIRE(args.capacity > 0 && args.max_new_tokens > 0 && args.eos_count >= 0, kInvalidValue, "launch: sizes are out of range");
  REQUIRE(args.timeout_ticks > 0 && args.timeout_ticks < uint64_t{1} << 48, kInvalidValue, "launch: waits end after %llu ticks",
          args.timeout_ticks);
  REQUIRE((args.trace != nullptr) == (a.trace != 0), kInvalidValue, "launch: a timeline without memory, or the reverse");
  if (const int error = check_regions(regions_of(a, args), current())) return error;
  hip_launches++;
  s->add([m, args] { return execute(*m, args); });
  return 0;
}

EXPORT int hipModuleLaunchKernel(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**) {
  return complain(kInvalidHandle, "hipModuleLaunchKernel: decode has nothing to launch that is not cooperative");
}

EXPORT int hipMalloc(void** p, size_t bytes) {
  NEEDS_INIT("hipMalloc");
  REQUIRE(bytes > 0, kInvalidValue, "hipMalloc: no bytes");
  const size_t rounded = (bytes + 255) / 256 * 256;
  char* memory = static_cast<char*>(std::aligned_alloc(256, rounded));
  fill(memory, rounded);
  hip_allocations++;
  std::lock_guard lock(g_memory_mutex);
  g_memory[memory] = {memory, bytes, current(), nullptr};
  *p = memory;
  return 0;
}

EXPORT int hipFree(void* p) {
  NEEDS_INIT("hipFree");
  const Memory* m = memory_at(p);
  REQUIRE(m && m->begin == p && m->device >= 0, kInvalidValue, "hipFree: %p is not from hipMalloc", p);
  REQUIRE(m->device == current(), kInvalidContext, "hipFree: memory of device %d while device %d is current", m->device, current());
  hip_allocations--;
  std::lock_guard lock(g_memory_mutex);
  g_memory.erase(static_cast<char*>(p));
  std::free(p);
  return 0;
}

EXPORT int hipHostMalloc(void** p, size_t bytes, unsigned flags) {
  NEEDS_INIT("hipHostMalloc");
  // Without "mapped" a device could not be given it, without "coherent" it might not see a word that changes while a kernel runs.
  REQUIRE(flags == kMappedAndCoherent, kInvalidValue, "hipHostMalloc: flags are %#x; expected mapped and coherent", flags);
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), rounded = (bytes + page - 1) / page * page;
  const int file = memfd_create("host", MFD_CLOEXEC);
  REQUIRE(bytes > 0 && ftruncate(file, static_cast<off_t>(rounded)) == 0, kOutOfMemory, "hipHostMalloc: no memory");
  char* views[2];  // the host's, and the device's
  for (char*& view : views) view = static_cast<char*>(mmap(nullptr, rounded, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0));
  close(file);
  std::lock_guard lock(g_memory_mutex);
  for (char* view : views) g_memory[view] = {views[0], bytes, -1, views[1]};
  *p = views[0];
  return 0;
}

EXPORT int hipHostFree(void* p) {
  NEEDS_INIT("hipHostFree");
  const Memory* m = memory_at(p);
  REQUIRE(m && m->begin == p && m->device < 0, kInvalidValue, "hipHostFree: %p is not from hipHostMalloc", p);
  const Memory memory = *m;
  std::lock_guard lock(g_memory_mutex);
  for (char* view : {memory.begin, memory.alias}) {
    g_memory.erase(view);
    munmap(view, memory.bytes);
  }
  return 0;
}

EXPORT int hipHostGetDevicePointer(void** device, void* p, unsigned flags) {
  NEEDS_INIT("hipHostGetDevicePointer");
  const Memory* m = memory_at(p);
  REQUIRE(m && m->device < 0 && m->begin == p && flags == 0, kInvalidValue, "hipHostGetDevicePointer: %p is not from hipHostMalloc",
          p);
  *device = m->alias;
  return 0;
}

EXPORT int hipMemsetD8Async(void* to, unsigned char value, size_t bytes, void* stream) {
  NEEDS_INIT("hipMemsetD8Async");
  Stream* s = stream_of("hipMemsetD8Async", stream);
  if (!s) return kInvalidHandle;
  const std::string wrong = not_on_device(to, bytes, current());
  REQUIRE(wrong.empty() && bytes > 0, kInvalidValue, "hipMemsetD8Async: %zu bytes of %s", bytes, wrong.c_str());
  s->add([=] {
    if (!hip_break_set) std::memset(to, value, bytes);
    return 0;
  });
  return 0;
}

EXPORT int hipMemcpyDtoDAsync(void* to, void* from, size_t bytes, void* stream) {
  NEEDS_INIT("hipMemcpyDtoDAsync");
  Stream* s = stream_of("hipMemcpyDtoDAsync", stream);
  if (!s) return kInvalidHandle;
  const std::string wrong = not_on_device(to, bytes, current()) + not_on_device(from, bytes, current());
  REQUIRE(wrong.empty() && bytes > 0, kInvalidValue, "hipMemcpyDtoDAsync: %zu bytes of %s", bytes, wrong.c_str());
  const char *a = static_cast<char*>(to), *b = static_cast<char*>(from);
  REQUIRE(a + bytes <= b || b + bytes <= a, kInvalidValue, "hipMemcpyDtoDAsync: the two overlap");
  s->add([=] {
    std::memcpy(to, from, bytes);
    return 0;
  });
  return 0;
}

EXPORT int hipMemcpyHtoDAsync(void* to, const void* from, size_t bytes, void* stream) {
  NEEDS_INIT("hipMemcpyHtoDAsync");
  Stream* s = stream_of("hipMemcpyHtoDAsync", stream);
  if (!s) return kInvalidHandle;
  const std::string wrong = not_on_device(to, bytes, current());
  REQUIRE(wrong.empty() && bytes > 0 && from, kInvalidValue, "hipMemcpyHtoDAsync: %zu bytes to %s", bytes, wrong.c_str());
  s->add([=] {
    std::memcpy(to, from, bytes);
    return 0;
  });
  return 0;
}

EXPORT int hipMemcpyDtoHAsync(void* to, void* from, size_t bytes, void* stream) {
  NEEDS_INIT("hipMemcpyDtoHAsync");
  Stream* s = stream_of("hipMemcpyDtoHAsync", stream);
  if (!s) return kInvalidHandle;
  const std::string wrong = not_on_device(from, bytes, current());
  REQUIRE(wrong.empty() && bytes > 0, kInvalidValue, "hipMemcpyDtoHAsync: from %zu bytes of %s", bytes, wrong.c_str());
  const Memory* m = memory_at(to);
  const char* at = static_cast<char*>(to);
  REQUIRE(to && (!m || (m->device < 0 && at >= m->begin && at + bytes <= m->begin + m->bytes)), kInvalidValue,
          "hipMemcpyDtoHAsync: to memory that is not the host's, or too small");
  s->add([=] {
    std::memcpy(to, from, bytes);
    return 0;
  });
  return 0;
}

EXPORT int hipEventCreateWithFlags(void** event, unsigned flags) {
  NEEDS_INIT("hipEventCreateWithFlags");
  REQUIRE(flags == kNoTiming, kInvalidValue, "hipEventCreateWithFlags: flags are %u; expected no timing", flags);
  auto* e = new Event{current()};
  std::lock_guard lock(g_events_mutex);
  g_events.insert(e);
  *event = e;
  return 0;
}

EXPORT int hipEventRecord(void* event, void* stream) {
  NEEDS_INIT("hipEventRecord");
  Event* e = event_of(event);
  Stream* s = stream_of("hipEventRecord", stream);
  if (!s) return kInvalidHandle;
  REQUIRE(e && e->device == s->device, kInvalidHandle, "hipEventRecord: the event is not of the stream's device");
  e->stream = s;
  e->number = s->add([] { return 0; });
  return 0;
}

EXPORT int hipEventQuery(void* event) {
  NEEDS_INIT("hipEventQuery");
  Event* e = event_of(event);
  REQUIRE(e && e->stream, kInvalidHandle, "hipEventQuery: the event was not recorded");
  REQUIRE(e->device == current(), kInvalidContext, "hipEventQuery: an event of device %d while device %d is current", e->device,
          current());
  return e->stream->state(e->number);
}

EXPORT int hipStreamSynchronize(void* stream) {
  NEEDS_INIT("hipStreamSynchronize");
  Stream* s = stream_of("hipStreamSynchronize", stream);
  return s ? s->wait() : kInvalidHandle;
}

// The functions are those that the run time calls.
static void none() {}
#define X(member, type, cuda, hip) \
  static_assert(std::is_same_v<decltype(hip), type> || std::is_same_v<decltype(hip), decltype(none)>);
MONOKERNEL_DRIVER_FUNCTIONS(X)
#undef X
