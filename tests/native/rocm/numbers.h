// HIP's numbers, as the stand-in answers with them. native/hip_headers.cc holds them against AMD's headers, as it does those of
// gpu/driver.h: they are written down twice on purpose.
#pragma once

#include <cstddef>

namespace rocm {

enum Error : int {  // hipError_t
  kInvalidValue = 1, kOutOfMemory = 2, kNotInitialized = 3, kInvalidImage = 200, kInvalidContext = 201, kInvalidHandle = 400,
  kNotFound = 500, kNotReady = 600, kLaunchFailure = 719, kTooLarge = 720
};
enum Attribute : int {  // hipDeviceAttribute_t
  kCooperative = 10, kMajor = 23, kMaxThreads = 56, kMinor = 61, kUnits = 63, kSharedBytes = 74, kWaveSize = 87, kClockRate = 10017
};
enum FunctionAttribute : int { kStaticShared = 1, kLocal = 3, kRegisters = 4 };  // hipFunction_attribute
enum Result : int { kInvalidInput = 3, kInvalidProgram = 4, kInvalidOption = 5, kCompilation = 6 };  // hiprtcResult
constexpr unsigned kMappedAndCoherent = 0x40000002;  // of hipHostMalloc
constexpr unsigned kNoTiming = 2;                    // of hipEventCreateWithFlags
constexpr size_t kUuidBytes = 16;                    // hipUUID
constexpr size_t kPropertiesBytes = 1472, kArchOffset = 1160;  // hipDeviceProp_tR0600

}  // namespace rocm
