#include "gpu/device.h"

#include <cstring>
#include <utility>
#include <vector>

#include "gpu/build.h"
#include "gpu/failure.h"

namespace monokernel::gpu {

Device& Device::get(Vendor vendor, int ordinal) {
  static auto* devices = new OnceMap<std::pair<const Driver*, int>, Device>;
  const Driver& api = driver(vendor);
  return *devices->get({&api, ordinal}, [&] { return std::make_shared<Device>(api, ordinal); });
}

Device::Device(const Driver& api, int ordinal) : api_(api) {
  int count = 0;
  api_.check(api_.device_count(&count), "count its devices");
  if (ordinal < 0 || ordinal >= count) {
    throw Failure(Code::kInvalid, "there is no " + std::string(platform_name(api_.vendor)) + " device " + std::to_string(ordinal) +
                                      "; the driver has " + std::to_string(count));
  }
  api_.check(api_.device_get(&handle_, ordinal), "find the device");
  char name[256] = {};
  api_.check(api_.device_name(name, sizeof(name) - 1, handle_), "name the device");
  name_ = name;
  const DeviceAttributes& a = api_.attributes;
  multiprocessors_ = attribute(a.multiprocessors, "multiprocessors");
  clock_khz_ = attribute(a.clock_khz, "clock");
  const std::string architecture_text = architecture_name();
  try {
    architecture_ = gpu::architecture(architecture_text);
  } catch (const Failure&) {
    throw Failure(Code::kUnsupported, "the kernel does not run on " + name_ + " (" + architecture_text + "); " + kSupported);
  }
  if (!attribute(a.cooperative, "cooperative launches")) {
    throw Failure(Code::kUnsupported, name_ + " does not launch all work-groups of a kernel at once, as this driver has it set up");
  }
  if (const int shared = attribute(a.shared_limit_bytes, "shared memory"); shared < architecture_.shared_bytes) {
    throw Failure(Code::kUnsupported, name_ + " gives a work-group " + std::to_string(shared) + " bytes of shared memory; " +
                                          std::to_string(architecture_.shared_bytes) + " are needed");
  }
}

int Device::attribute(int number, const char* what) const {
  int value = 0;
  api_.check(api_.device_attribute(&value, number, handle_), (std::string("tell the device's ") + what).c_str());
  return value;
}

std::string Device::architecture_name() const {
  if (!api_.device_properties) {
    return "sm_" + std::to_string(attribute(api_.attributes.major, "generation")) +
           std::to_string(attribute(api_.attributes.minor, "generation"));
  }
  // The struct grows from version to version, so the name, such as gfx942:sramecc+:xnack-, is looked for instead of the offset.
  std::vector<char> properties(kHipPropertiesBytes, '\0');
  api_.check(api_.device_properties(properties.data(), handle_), "describe the device");
  std::string found;
  for (size_t i = 256; i + 32 < properties.size(); i++) {  // the first 256 bytes are the product's name
    if (std::memcmp(properties.data() + i, "gfx", 3) != 0) continue;
    const std::string text(properties.data() + i);
    return text.substr(0, text.find(':'));
  }
  return "an unknown architecture";
}

std::string Device::bus() const {
  char bus[64] = {};
  api_.check(api_.device_bus(bus, sizeof(bus) - 1, handle_), "tell where the device is");
  return bus;
}

std::string Device::uuid() const {
  unsigned char bytes[kUuidBytes] = {};
  if (api_.device_uuid(bytes, handle_) != 0) return "";
  constexpr char digits[] = "0123456789abcdef";
  std::string text;
  for (const unsigned char byte : bytes) text += {digits[byte >> 4], digits[byte & 15]};
  return text.find_first_not_of('0') == std::string::npos ? "" : text;
}

// Asking what a device is must not take its memory, so this waits for the first call. What an attempt that failed has made is kept for
// the next one.
void Device::open() {
  std::lock_guard lock(open_mutex_);
  if (open_) return;
  const auto once = [this](void*& kept, const char* what, const auto& make) {
    void* made = nullptr;
    if (kept) return;
    api_.check(make(&made), what);
    kept = made;
  };
  if (api_.retain_context) once(context_, "open the device", [&](void** made) { return api_.retain_context(made, handle_); });
  const Current current(*this);
  void* host = exchange_.host;
  once(host, "allocate host memory", [&](void** made) { return api_.host_alloc(made, sizeof(Exchange::Host), api_.host_alloc_flags); });
  if (!exchange_.host) exchange_.host = new (host) Exchange::Host{};
  api_.check(api_.host_address(&exchange_.host_on_device, host, 0), "map host memory");
  once(exchange_.report, "allocate device memory", [&](void** made) { return api_.device_alloc(made, sizeof(mk::Report)); });
  once(exchange_.event, "create an event", [&](void** made) { return api_.event_create(made, kEventNoTiming); });
  open_ = true;
}

void PinnedMemory::reserve(const Driver& api, size_t wanted) {
  if (wanted <= bytes) return;
  if (host) api.check(api.host_free(std::exchange(host, nullptr)), "free host memory");
  bytes = 0;
  api.check(api.host_alloc(&host, wanted, api.host_alloc_flags), "allocate host memory");
  api.check(api.host_address(&on_device, host, 0), "map host memory");
  bytes = wanted;
}

Device::Current::Current(const Device& device) : device_(device) {
  const Driver& api = device.api_;
  if (api.push_context) {
    api.check(api.push_context(device.context_), "make the device current");
  } else {
    api.check(api.get_device(&previous_), "tell the current device");
    api.check(api.set_device(device.handle_), "make the device current");
  }
}

Device::Current::~Current() {
  const Driver& api = device_.api_;
  if (api.pop_context) {
    void* context;
    api.pop_context(&context);
  } else {
    api.set_device(previous_);
  }
}

std::shared_ptr<const Kernel> Device::kernel(const std::string& key, const Request& request, const IsCancelled& is_cancelled) {
  return kernels_.get(key, [&] { return load(request, is_cancelled); }, is_cancelled);
}

std::shared_ptr<const Kernel> Device::load(const Request& request, const IsCancelled& is_cancelled) {
  const Program& p = request.program;
  if (p.wave_size != architecture_.wave_size) {
    throw Failure(Code::kInvalid, "the plan is for waves of " + std::to_string(p.wave_size) + " lanes, but " + name_ + " has " +
                                      std::to_string(architecture_.wave_size));
  }
  const std::shared_ptr<const Built> built = build(architecture_, request, is_cancelled);
  void* module = nullptr;
  int error = api_.module_load(&module, built->code.data());
  for (const std::string& other : built->others) {
    if (error == 0) break;
    if (api_.module_load(&module, other.data()) == 0) error = 0;
  }
  api_.check(error, "load the kernel");
  try {
    return describe(module, request);
  } catch (const Failure&) {  // the next call loads it anew
    api_.module_unload(module);
    throw;
  }
}

std::shared_ptr<const Kernel> Device::describe(void* module, const Request& request) const {
  const Program& p = request.program;
  auto kernel = std::make_shared<Kernel>();
  kernel->threads = request.threads();
  kernel->units = static_cast<unsigned>(p.units);
  kernel->shared_bytes = static_cast<unsigned>(architecture_.shared_bytes);
  api_.check(api_.module_function(&kernel->function, module, "monokernel"), "find the kernel");
  int fixed_shared = 0;
  api_.check(api_.function_attribute(&kernel->registers, kRegisters, kernel->function), "describe the kernel");
  api_.check(api_.function_attribute(&kernel->local_bytes, kLocalBytes, kernel->function), "describe the kernel");
  api_.check(api_.function_attribute(&fixed_shared, kStaticSharedBytes, kernel->function), "describe the kernel");
  kernel->shared_bytes -= static_cast<unsigned>(fixed_shared);
  if (api_.set_function_attribute) {
    api_.check(api_.set_function_attribute(kernel->function, kDynamicSharedBytes, static_cast<int>(kernel->shared_bytes)),
               "give the kernel its shared memory");
  }
  int resident = 0;
  api_.check(api_.occupancy(&resident, kernel->function, kernel->threads, kernel->shared_bytes), "place the kernel");
  const int64_t room = int64_t{resident} * multiprocessors_;
  if (room < p.units) {
    throw Failure(Code::kExhausted,
                  resident == 0 ? "a unit of the kernel (" + std::to_string(kernel->threads) + " threads with " +
                                      std::to_string(kernel->registers) + " registers, " +
                                      std::to_string(architecture_.shared_bytes) +
                                      " bytes of shared memory) does not fit on a multiprocessor of " + name_
                                : "the weights are packed for " + std::to_string(p.units) + " units, but " + name_ +
                                      " runs at most " + std::to_string(room) + " at once; pack them with make_plan(spec, platform=\"" +
                                      platform_name(api_.vendor) + "\", units=" + std::to_string(room) + ")");
  }
  return kernel;
}

}  // namespace monokernel::gpu
