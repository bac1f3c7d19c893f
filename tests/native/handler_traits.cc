// What a handler of XLA's FFI declares of itself, asked for as XLA does.
#include <cstdint>

#include "xla/ffi/api/ffi.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace ffi = xla::ffi;

// The bits of XLA_FFI_Handler_TraitsBits; -1 if the handler does not answer.
EXPORT int64_t traits_of(XLA_FFI_Handler* handler) {
  XLA_FFI_Api api{};
  api.struct_size = XLA_FFI_Api_STRUCT_SIZE;
  XLA_FFI_Metadata metadata{};
  metadata.struct_size = XLA_FFI_Metadata_STRUCT_SIZE;
  XLA_FFI_Metadata_Extension question{{XLA_FFI_Metadata_Extension_STRUCT_SIZE, XLA_FFI_Extension_Metadata, nullptr}, &metadata};
  XLA_FFI_CallFrame frame{};
  frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
  frame.extension_start = &question.extension_base;
  frame.api = &api;
  const bool answered = handler(&frame) == nullptr && metadata.api_version.major_version == XLA_FFI_API_MAJOR &&
                        metadata.api_version.minor_version > 0;
  return answered ? int64_t{metadata.traits} : -1;
}

// One that does declare it, to see that the question finds it.
static ffi::Error nothing() { return ffi::Error::Success(); }
XLA_FFI_DEFINE_HANDLER(kCompatible, nothing, ffi::Ffi::Bind(), {ffi::Traits::kCmdBufferCompatible});

EXPORT int64_t traits_of_a_compatible_one() { return traits_of(kCompatible); }
