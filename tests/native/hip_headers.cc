// What ffi/gpu and the stand-in for ROCm believe about HIP, held against AMD's own headers. To be compiled, not run.
#include <hip/hip_runtime_api.h>
#include <hip/hip_version.h>
#if __has_include(<hip/hiprtc.h>)
#include <hip/hiprtc.h>
#define HAS_HIPRTC 1
#endif

#include <cstddef>
#include <type_traits>

#include "gpu/compiler.h"
#include "gpu/driver.h"
#include "rocm/numbers.h"

static_assert(HIP_VERSION_MAJOR >= 6, "these headers are older than what is supported");

namespace {

// Whether an argument of type Ours is passed as one of type Theirs. We have void* for handles and for what they point to, where HIP
// has a type; int for its enumerations; and pointers to const where HIP forgot it.
template <typename Ours, typename Theirs>
constexpr bool passes_as() {
  if constexpr (std::is_pointer_v<Ours> && std::is_pointer_v<Theirs>) {
    using A = std::remove_cv_t<std::remove_pointer_t<Ours>>;
    using B = std::remove_cv_t<std::remove_pointer_t<Theirs>>;
    return std::is_void_v<A> || std::is_void_v<B> || passes_as<A, B>();
  } else if constexpr (std::is_enum_v<Theirs>) {
    return std::is_same_v<Ours, int> && sizeof(Theirs) == sizeof(int);
  } else {
    return std::is_same_v<Ours, Theirs>;
  }
}

template <typename Ours, typename Theirs>
struct Same : std::false_type {};
template <typename R, typename... A, typename S, typename... B>
  requires(sizeof...(A) == sizeof...(B))
struct Same<R(A...), S(B...)> : std::bool_constant<passes_as<R, S>() && (passes_as<A, B>() && ...)> {};

struct None;
template <typename Ours>
struct Same<Ours, None> : std::true_type {};
extern None none;

}  // namespace

#define X(member, type, cuda, hip) static_assert(Same<type, decltype(hip)>::value, #hip);
MONOKERNEL_DRIVER_FUNCTIONS(X)
#undef X

using namespace monokernel;
static_assert(hipSuccess == 0);
static_assert(gpu::kNotReady == hipErrorNotReady);
static_assert(gpu::kOutOfMemory == hipErrorOutOfMemory);
static_assert(gpu::kEventNoTiming == hipEventDisableTiming);
static_assert(gpu::kHostMapped == hipHostMallocMapped);
static_assert(gpu::kHipHostCoherent == hipHostMallocCoherent);
static_assert(gpu::kStaticSharedBytes == HIP_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES);
static_assert(gpu::kLocalBytes == HIP_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES);
static_assert(gpu::kRegisters == HIP_FUNC_ATTRIBUTE_NUM_REGS);
static_assert(gpu::kHipAttributes.multiprocessors == hipDeviceAttributeMultiprocessorCount);
static_assert(gpu::kHipAttributes.shared_limit_bytes == hipDeviceAttributeMaxSharedMemoryPerBlock);
static_assert(gpu::kHipAttributes.cooperative == hipDeviceAttributeCooperativeLaunch);
static_assert(gpu::kHipAttributes.clock_khz == hipDeviceAttributeWallClockRate);
static_assert(gpu::kHipAttributes.major == hipDeviceAttributeComputeCapabilityMajor);
static_assert(gpu::kHipAttributes.minor == hipDeviceAttributeComputeCapabilityMinor);

// The architecture's name is looked for behind the product's name, in no more memory than there is.
static_assert(offsetof(hipDeviceProp_tR0600, name) == 0 && sizeof(hipDeviceProp_tR0600::name) == 256);
static_assert(offsetof(hipDeviceProp_tR0600, gcnArchName) >= 256 && sizeof(hipDeviceProp_tR0600::gcnArchName) == 256);
static_assert(sizeof(hipDeviceProp_tR0600) <= gpu::kHipPropertiesBytes);

static_assert(sizeof(hipUUID) == gpu::kUuidBytes);

// ---- The stand-in ----

static_assert(rocm::kInvalidValue == hipErrorInvalidValue && rocm::kOutOfMemory == hipErrorOutOfMemory &&
              rocm::kNotInitialized == hipErrorNotInitialized && rocm::kInvalidImage == hipErrorInvalidImage &&
              rocm::kInvalidContext == hipErrorInvalidContext && rocm::kInvalidHandle == hipErrorInvalidHandle &&
              rocm::kNotFound == hipErrorNotFound && rocm::kNotReady == hipErrorNotReady &&
              rocm::kLaunchFailure == hipErrorLaunchFailure && rocm::kTooLarge == hipErrorCooperativeLaunchTooLarge);
static_assert(rocm::kCooperative == hipDeviceAttributeCooperativeLaunch &&
              rocm::kMajor == hipDeviceAttributeComputeCapabilityMajor && rocm::kMaxThreads == hipDeviceAttributeMaxThreadsPerBlock &&
              rocm::kMinor == hipDeviceAttributeComputeCapabilityMinor && rocm::kUnits == hipDeviceAttributeMultiprocessorCount &&
              rocm::kSharedBytes == hipDeviceAttributeMaxSharedMemoryPerBlock && rocm::kWaveSize == hipDeviceAttributeWarpSize &&
              rocm::kClockRate == hipDeviceAttributeWallClockRate);
static_assert(rocm::kStaticShared == HIP_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES && rocm::kLocal == HIP_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES &&
              rocm::kRegisters == HIP_FUNC_ATTRIBUTE_NUM_REGS);
static_assert(rocm::kMappedAndCoherent == (hipHostMallocMapped | hipHostMallocCoherent) && rocm::kNoTiming == hipEventDisableTiming);
static_assert(rocm::kUuidBytes == sizeof(hipUUID));
static_assert(rocm::kArchOffset == offsetof(hipDeviceProp_tR0600, gcnArchName));
static_assert(rocm::kPropertiesBytes == sizeof(hipDeviceProp_tR0600));

// ---- hipRTC ----

#if HAS_HIPRTC
#define X(member, type, nvrtc, hiprtc) static_assert(Same<type, decltype(hiprtc)>::value, #hiprtc);
MONOKERNEL_COMPILER_FUNCTIONS(X)
#undef X
static_assert(HIPRTC_SUCCESS == 0);
static_assert(rocm::kInvalidInput == HIPRTC_ERROR_INVALID_INPUT && rocm::kInvalidProgram == HIPRTC_ERROR_INVALID_PROGRAM &&
              rocm::kInvalidOption == HIPRTC_ERROR_INVALID_OPTION && rocm::kCompilation == HIPRTC_ERROR_COMPILATION);
#endif
