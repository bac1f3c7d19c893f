// One device of one vendor: what it is, the kernels loaded on it, and the memory that a launch reports through.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>

#include "gpu/architecture.h"
#include "gpu/driver.h"
#include "gpu/kernel/args.h"
#include "gpu/once_map.h"
#include "gpu/request.h"

namespace monokernel::gpu {

struct Kernel {
  void* function = nullptr;
  int threads = 0;
  unsigned units = 0;
  unsigned shared_bytes = 0;
  int registers = 0, local_bytes = 0;  // of a thread
};

// Host memory that the device reads and writes too.
struct PinnedMemory {
  void* host = nullptr;
  void* on_device = nullptr;  // the same memory, as the device addresses it
  size_t bytes = 0;

  // Makes it at least so large. The device must be current, and nothing may use what it was. Throws Failure.
  void reserve(const Driver& api, size_t wanted);
};

// What a launch reports through. Used by one launch at a time.
struct Exchange {
  struct Host {
    uint32_t cancel;  // the kernel looks at it once per token
    alignas(64) mk::Report report;
  };
  Host* host = nullptr;
  void* host_on_device = nullptr;  // the same memory, as the device addresses it
  void* report = nullptr;          // mk::Report in device memory, because all units may write it
  void* event = nullptr;
  PinnedMemory mail;               // of the launches that somebody listens to
};
static_assert(offsetof(Exchange::Host, cancel) == 0, "the kernel is given the address of the whole");

class Device {
 public:
  // The device with the driver's number `ordinal`; made at the first call and kept for the life of the process. Throws Failure.
  static Device& get(Vendor vendor, int ordinal);

  Device(const Driver& api, int ordinal);

  // To be called before anything that needs the device to be current. Throws Failure.
  void open();

  // Makes the device current for the calling thread while it lives.
  class Current {
   public:
    explicit Current(const Device& device);
    ~Current();
    Current(const Current&) = delete;
    Current& operator=(const Current&) = delete;

   private:
    const Device& device_;
    int previous_ = -1;
  };

  // Built, loaded and checked to fit on the device as a whole. The device must be current. Throws Failure.
  std::shared_ptr<const Kernel> kernel(const std::string& key, const Request& request, const IsCancelled& is_cancelled);

  const Driver& api() const { return api_; }
  const Architecture& architecture() const { return architecture_; }
  const std::string& name() const { return name_; }
  std::string bus() const;   // its PCI address, 0000:c1:00.0
  std::string uuid() const;  // hexadecimal; "" if the driver gives it none
  int multiprocessors() const { return multiprocessors_; }
  int clock_khz() const { return clock_khz_; }  // of the kernel's ticks
  uint64_t ticks(double seconds) const { return static_cast<uint64_t>(seconds * 1e3 * clock_khz_); }

  // Held from launch to end: a launch owns every multiprocessor, so two cannot run side by side. Guards `exchange`.
  std::timed_mutex& launching() { return launching_; }
  Exchange& exchange() { return exchange_; }

  // Whether a launch has found units of a group on several dies: it may do so again.
  bool misplaced() const { return misplaced_.load(); }
  void set_misplaced() { misplaced_.store(true); }

 private:
  int attribute(int number, const char* what) const;
  std::string architecture_name() const;
  std::shared_ptr<const Kernel> load(const Request& request, const IsCancelled& is_cancelled);
  std::shared_ptr<const Kernel> describe(void* module, const Request& request) const;

  const Driver& api_;
  int handle_ = 0;
  std::mutex open_mutex_;
  bool open_ = false;
  void* context_ = nullptr;  // CUDA: the primary context, which is XLA's too
  std::string name_;
  Architecture architecture_;
  int multiprocessors_ = 0;
  int clock_khz_ = 0;
  std::timed_mutex launching_;
  std::atomic<bool> misplaced_{false};
  Exchange exchange_;
  OnceMap<std::string, const Kernel> kernels_;
};

}  // namespace monokernel::gpu
