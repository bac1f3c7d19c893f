// The few driver calls that the run time makes, one table for both vendors: CUDA's driver API and HIP differ in names,
// numbers and how a device is made current, and in nothing else that matters here. Handles are opaque pointers. A device
// address is 64 bits in both (an integer in CUDA's declarations), which is passed like a pointer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>

namespace monokernel::gpu {

enum class Vendor { kCuda = 1, kRocm = 2 };  // numbers as Program::platform

inline const char* platform_name(Vendor vendor) { return vendor == Vendor::kCuda ? "cuda" : "rocm"; }

// X(member, type, CUDA's function, HIP's function); none where a vendor has no such function. tests/native/hip_headers.cc holds
// HIP's types and numbers against AMD's headers.
#define MONOKERNEL_DRIVER_FUNCTIONS(X)                                                                                 \
  X(init, int(unsigned), cuInit, hipInit)                                                                              \
  X(driver_version, int(int*), cuDriverGetVersion, hipDriverGetVersion)                                                \
  X(error_text, int(int, const char**), cuGetErrorString, hipDrvGetErrorString)                                        \
  X(device_count, int(int*), cuDeviceGetCount, hipGetDeviceCount)                                                      \
  X(device_get, int(int*, int), cuDeviceGet, hipDeviceGet)                                                             \
  X(device_name, int(char*, int, int), cuDeviceGetName, hipDeviceGetName)                                              \
  X(device_attribute, int(int*, int, int), cuDeviceGetAttribute, hipDeviceGetAttribute)                                \
  X(device_properties, int(void*, int), none, hipGetDevicePropertiesR0600)                                             \
  X(device_memory, int(size_t*, int), cuDeviceTotalMem_v2, hipDeviceTotalMem)                                          \
  X(device_bus, int(char*, int, int), cuDeviceGetPCIBusId, hipDeviceGetPCIBusId)                                       \
  X(device_uuid, int(void*, int), cuDeviceGetUuid_v2, hipDeviceGetUuid)                                                \
  X(can_access_peer, int(int*, int, int), cuDeviceCanAccessPeer, hipDeviceCanAccessPeer)                               \
  X(retain_context, int(void**, int), cuDevicePrimaryCtxRetain, none)                                                  \
  X(push_context, int(void*), cuCtxPushCurrent_v2, none)                                                               \
  X(pop_context, int(void**), cuCtxPopCurrent_v2, none)                                                                \
  X(get_device, int(int*), none, hipGetDevice)                                                                         \
  X(set_device, int(int), none, hipSetDevice)                                                                          \
  X(module_load, int(void**, const void*), cuModuleLoadData, hipModuleLoadData)                                        \
  X(module_unload, int(void*), cuModuleUnload, hipModuleUnload)                                                        \
  X(module_function, int(void**, void*, const char*), cuModuleGetFunction, hipModuleGetFunction)                       \
  X(function_attribute, int(int*, int, void*), cuFuncGetAttribute, hipFuncGetAttribute)                                \
  X(set_function_attribute, int(void*, int, int), cuFuncSetAttribute, none)                                            \
  X(occupancy, int(int*, void*, int, size_t), cuOccupancyMaxActiveBlocksPerMultiprocessor,                             \
    hipModuleOccupancyMaxActiveBlocksPerMultiprocessor)                                                                \
  X(launch_cooperative,                                                                                                \
    int(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**),                   \
    cuLaunchCooperativeKernel, hipModuleLaunchCooperativeKernel)                                                       \
  X(launch,                                                                                                            \
    int(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**),           \
    cuLaunchKernel, hipModuleLaunchKernel)                                                                             \
  X(device_alloc, int(void**, size_t), cuMemAlloc_v2, hipMalloc)                                                       \
  X(device_free, int(void*), cuMemFree_v2, hipFree)                                                                    \
  X(host_alloc, int(void**, size_t, unsigned), cuMemHostAlloc, hipHostMalloc)                                          \
  X(host_free, int(void*), cuMemFreeHost, hipHostFree)                                                                 \
  X(host_address, int(void**, void*, unsigned), cuMemHostGetDevicePointer_v2, hipHostGetDevicePointer)                 \
  X(set_async, int(void*, unsigned char, size_t, void*), cuMemsetD8Async, hipMemsetD8Async)                            \
  X(copy_async, int(void*, void*, size_t, void*), cuMemcpyDtoDAsync_v2, hipMemcpyDtoDAsync)                            \
  X(copy_in_async, int(void*, const void*, size_t, void*), cuMemcpyHtoDAsync_v2, hipMemcpyHtoDAsync)                   \
  X(copy_out_async, int(void*, void*, size_t, void*), cuMemcpyDtoHAsync_v2, hipMemcpyDtoHAsync)                        \
  X(event_create, int(void**, unsigned), cuEventCreate, hipEventCreateWithFlags)                                       \
  X(event_record, int(void*, void*), cuEventRecord, hipEventRecord)                                                    \
  X(event_query, int(void*), cuEventQuery, hipEventQuery)                                                              \
  X(stream_wait, int(void*), cuStreamSynchronize, hipStreamSynchronize)

struct DeviceAttributes {
  int multiprocessors, shared_limit_bytes, cooperative, clock_khz, major, minor;
};

// The vendors' numbers.
constexpr DeviceAttributes kCudaAttributes{
    .multiprocessors = 16, .shared_limit_bytes = 97, .cooperative = 95, .clock_khz = 13, .major = 75, .minor = 76};
constexpr DeviceAttributes kHipAttributes{
    .multiprocessors = 63, .shared_limit_bytes = 74, .cooperative = 10, .clock_khz = 10017, .major = 23, .minor = 61};
constexpr unsigned kHostMapped = 2;               // host_alloc, both vendors
constexpr unsigned kHipHostCoherent = 0x40000000;  // likewise, HIP only
constexpr size_t kUuidBytes = 16;                 // that device_uuid writes, both vendors
constexpr size_t kHipPropertiesBytes = 16384;     // more than device_properties ever wrote

struct Driver {
  Vendor vendor;
  std::string path;  // of the library
  int version = 0;   // CUDA: 1000 major + 10 minor
#define X(member, type, cuda, hip) std::type_identity_t<type>* member = nullptr;
  MONOKERNEL_DRIVER_FUNCTIONS(X)
#undef X
  DeviceAttributes attributes;
  unsigned host_alloc_flags;

  // Throws Failure with the driver's text and `what`, which continues "the driver could not".
  void check(int error, const char* what) const;
};

constexpr int kNotReady = 600;             // both vendors' code for work that is not done
constexpr int kOutOfMemory = 2;            // likewise
constexpr unsigned kEventNoTiming = 2;     // event_create
constexpr int kStaticSharedBytes = 1;      // function_attribute
constexpr int kLocalBytes = 3;
constexpr int kRegisters = 4;
constexpr int kDynamicSharedBytes = 8;     // set_function_attribute

// Opens and initializes the vendor's driver at the first call; later calls give the same table, unless the settings name another
// library meanwhile. Throws Failure.
const Driver& driver(Vendor vendor);

// The driver's version if it can be opened, else 0.
int driver_version(Vendor vendor);

}  // namespace monokernel::gpu
