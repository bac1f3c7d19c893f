// The Python module: XLA custom calls as capsules, and what Python needs to know about them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/cpus.h"
#include "cpu/decode.h"
#include "cpu/interrupt.h"
#include "cpu/isa.h"
#include "cpu/ping_pong.h"
#include "cpu/read_bandwidth.h"
#include "cpu/sampling_binding.h"
#include "cpu/settings.h"
#include "cpu/team.h"
#include "gpu/binding.h"
#include "gpu/settings.h"
#include "mailbox_binding.h"

namespace py = pybind11;
namespace ffi = xla::ffi;
namespace cpu = monokernel::cpu;

namespace {

using cpu::F32, cpu::S32, cpu::U32, cpu::U8;
using Any = ffi::AnyBuffer;

ffi::Error decode_on_cpu(Any streams, F32 constants, Any embedding, F32 temperature, S32 top_k, F32 top_p, F32 min_p,
                         F32 repetition_penalty, F32 presence_penalty, S32 max_new_tokens, S32 eos_token_id,
                         F32 logit_bias, U32 key_data, Any k_cache, Any v_cache, S32 position, S32 last_token, S32 status,
                         U8 seen, ffi::RemainingArgs more, ffi::Result<S32> tokens, ffi::Result<S32> lengths, ffi::Result<F32> log_probs,
                         ffi::Result<Any> k_cache_out, ffi::Result<Any> v_cache_out, ffi::Result<S32> position_out,
                         ffi::Result<S32> last_token_out, ffi::Result<S32> status_out, ffi::Result<U8> seen_out,
                         ffi::RemainingRets, ffi::Dictionary attributes) {
  cpu::Operands operands{streams,        constants,  embedding,          temperature,      top_k,
                               top_p,          min_p,      repetition_penalty, presence_penalty, max_new_tokens,
                               eos_token_id,   logit_bias, key_data,           k_cache,          v_cache,
                               position,       last_token, status,             seen};
  cpu::Results results{tokens,       lengths,        log_probs,  k_cache_out, v_cache_out,
                       position_out, last_token_out, status_out, seen_out};
  // A call that was made for a GPU has one more result and more attributes. It should get as far as being told so.
  const auto ints = attributes.get<ffi::Span<const int64_t>>("ints"), layers = attributes.get<ffi::Span<const int64_t>>("layers"),
             tiles = attributes.get<ffi::Span<const int64_t>>("tiles");
  const auto floats = attributes.get<ffi::Span<const float>>("floats");
  const auto ropes = attributes.get<ffi::Span<const double>>("ropes");
  for (const auto& error : {ints.has_value() ? ffi::Error::Success() : ints.error(),
                            floats.has_value() ? ffi::Error::Success() : floats.error(),
                            layers.has_value() ? ffi::Error::Success() : layers.error(),
                            ropes.has_value() ? ffi::Error::Success() : ropes.error(),
                            tiles.has_value() ? ffi::Error::Success() : tiles.error()}) {
    if (error.failure()) return error;
  }
  if (more.size() > 1) {
    return ffi::Error::InvalidArgument(
        "jax_monokernel: the call has more operands than this version knows; trace or export it again");
  }
  if (more.size() == 1) {
    const auto mailbox = more.get<S32>(0);
    if (!mailbox.has_value()) return mailbox.error();
    operands.mailbox = *mailbox;
  }
  try {
    return cpu::decode(operands, results, {*ints, *floats, *layers, *ropes, *tiles});
  } catch (const std::exception& e) {  // no thread could be started, no memory
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, std::string("jax_monokernel: ") + e.what());
  }
}

XLA_FFI_DEFINE_HANDLER(kDecodeOnCpu, decode_on_cpu,
                       ffi::Ffi::Bind()
                           .Arg<Any>()  // streams
                           .Arg<F32>()  // constants
                           .Arg<Any>()  // embedding
                           .Arg<F32>()  // temperature
                           .Arg<S32>()  // top_k
                           .Arg<F32>()  // top_p
                           .Arg<F32>()  // min_p
                           .Arg<F32>()  // repetition_penalty
                           .Arg<F32>()  // presence_penalty
                           .Arg<S32>()  // max_new_tokens
                           .Arg<S32>()  // eos_token_id
                           .Arg<F32>()  // logit_bias
                           .Arg<U32>()  // key_data
                           .Arg<Any>()  // k_cache
                           .Arg<Any>()  // v_cache
                           .Arg<S32>()  // position
                           .Arg<S32>()  // last_token
                           .Arg<S32>()  // status
                           .Arg<U8>()   // seen
                           .RemainingArgs()  // mailbox, where somebody listens
                           .Ret<S32>()  // tokens
                           .Ret<S32>()  // lengths
                           .Ret<F32>()  // log_probs
                           .Ret<Any>()  // k_cache
                           .Ret<Any>()  // v_cache
                           .Ret<S32>()  // position
                           .Ret<S32>()  // last_token
                           .Ret<S32>()  // status
                           .Ret<U8>()   // seen
                           .RemainingRets()
                           .Attrs());

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native part of jax_monokernel.";

  m.def("registrations", [] {
    py::dict targets;
    targets["jax_monokernel_decode"] = py::capsule(reinterpret_cast<void*>(kDecodeOnCpu));
    return targets;
  }, "XLA FFI handlers for the platform cpu, by custom call target.");

  m.attr("INT_FIELDS") = std::vector<std::string>{
#define X(name) #name,
      MONOKERNEL_INT_FIELDS(X)
#undef X
  };
  m.attr("FLOAT_FIELDS") = std::vector<std::string>{
#define X(name) #name,
      MONOKERNEL_FLOAT_FIELDS(X)
#undef X
  };
  m.attr("MAX_BATCH") = cpu::kMaxBatch;

  cpu::read_environment();
  m.def("read_environment", [] {
    cpu::read_environment();
    monokernel::gpu::read_environment();
  }, "Reads the MONOKERNEL_* variables, as the import did.");
  m.def("available_cpus", &cpu::available_cpus, "CPUs of the affinity mask and the cgroup quota.");
  m.def("all_cpus_decode", &cpu::all_cpus_decode, "Whether the decodes that run have all of them.");
  m.def("quota_cpus", &cpu::quota_cpus, py::arg("folder"), "CPUs that a cgroup file system's quota is worth; 0: no quota.");
  m.def("cancel", &cpu::cancel_all, "Cancels every decode that runs or waits in this process.");
  m.def("available_isas", &cpu::available_isas, "Builds of the CPU kernel that this machine can run, best first.");
  m.def("current_isa", [] {
    std::string error;
    const cpu::Kernel* kernel = cpu::current_kernel(&error);
    if (!kernel) throw std::invalid_argument(error);
    return std::string(kernel->name);
  }, "The build that decode uses.");
  m.def("set_isa", [](const std::string& name) {
    if (std::string error = cpu::set_isa(name); !error.empty()) throw std::invalid_argument(error);
  }, py::arg("name"), "Forces a build of the CPU kernel by name; '' goes back to the best one.");
  cpu::bind_sampling(m);
  monokernel::bind_mailbox(m);
  monokernel::gpu::bind(m);
  m.def("ping_pong", &cpu::ping_pong, py::arg("cpu"), py::arg("other"), py::arg("rounds"), py::arg("batches"),
        py::call_guard<py::gil_scoped_release>(),
        "Nanoseconds that a word takes from one CPU to another, one way, of each batch of rounds.");
  m.def("read_bandwidth", &cpu::read_bandwidth, py::arg("bytes"), py::arg("threads"), py::arg("repeats"),
        py::call_guard<py::gil_scoped_release>(),
        "Bytes per second of each of `repeats` reads of a buffer of `bytes`, every thread reading its own contiguous part.");
}
