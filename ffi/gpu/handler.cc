#include "gpu/handler.h"

#include <algorithm>
#include <exception>
#include <limits>
#include <string>
#include <vector>

#include "gpu/device.h"
#include "gpu/failure.h"
#include "gpu/request.h"
#include "gpu/run.h"

namespace monokernel::gpu {
namespace {

namespace ffi = xla::ffi;
using ffi::AnyBuffer;
using ffi::DataType;

// Operands and results in the order in which jax_monokernel/decode.py passes them. Those that are carried come last and in the
// same order on both sides; they are followed by the workspace.
enum Operand {
  kStreams, kConstants, kEmbedding, kTemperature, kTopK, kTopP, kMinP, kRepetitionPenalty, kPresencePenalty, kMaxNewTokens,
  kEosTokenId, kLogitBias, kKeyData, kKCache, kVCache, kPosition, kLastToken, kStatus, kSeen, kOperands
};
// After them: where pages of the streams are, for weights that are placed; and the mailbox, where somebody listens.
constexpr size_t kPlaceOperands = 2;
enum Outcome {
  kTokens, kLengths, kLogProbs, kKCacheOut, kVCacheOut, kPositionOut, kLastTokenOut, kStatusOut, kSeenOut, kWorkspace, kOutcomes
};

struct Field {
  const char* name;
  DataType dtype;
  std::vector<int64_t> shape;
};

std::string text(DataType dtype, const std::vector<int64_t>& shape) {
  std::string s;
  switch (dtype) {
    case DataType::U8: s = "u8"; break;
    case DataType::S32: s = "s32"; break;
    case DataType::U32: s = "u32"; break;
    case DataType::F16: s = "f16"; break;
    case DataType::BF16: s = "bf16"; break;
    case DataType::F32: s = "f32"; break;
    default: s = "dtype " + std::to_string(static_cast<int>(dtype));
  }
  s += "[";
  for (size_t i = 0; i < shape.size(); i++) s += (i ? "," : "") + std::to_string(shape[i]);
  return s + "]";
}

void check_field(const AnyBuffer& buffer, const Field& field) {
  const auto dims = buffer.dimensions();
  const std::vector<int64_t> shape(dims.begin(), dims.end());
  if (buffer.element_type() == field.dtype && shape == field.shape) return;
  throw Failure(Code::kInvalid, std::string(field.name) + " is " + text(buffer.element_type(), shape) + "; expected " +
                                    text(field.dtype, field.shape));
}

DataType xla_type(int64_t dtype) { return dtype == kBF16 ? DataType::BF16 : dtype == kF16 ? DataType::F16 : DataType::F32; }

template <typename T>
T* pointer(const AnyBuffer& buffer) {
  return buffer.element_count() > 0 ? static_cast<T*>(buffer.untyped_data()) : nullptr;
}

Call make_call(const std::vector<AnyBuffer>& in, const std::vector<AnyBuffer>& out, const Attributes& attributes, int64_t splits,
               int64_t task_heads) {
  const auto invalid = [](const std::string& message) { return Failure(Code::kInvalid, message); };
  if (in[kKCache].dimensions().size() != 5 || in[kEosTokenId].dimensions().size() != 2 ||
      out[kTokens].dimensions().size() != 2 || in[kLogitBias].dimensions().size() != 2 ||
      out[kLogProbs].dimensions().size() != 2) {
    throw invalid("k_cache, eos_token_id, tokens, logit_bias or log_probs has the wrong rank");
  }
  const int64_t batch = in[kKCache].dimensions()[0], capacity = in[kKCache].dimensions()[3];
  const int64_t steps = out[kTokens].dimensions()[1], eos_count = in[kEosTokenId].dimensions()[1];
  const int64_t bias = in[kLogitBias].dimensions()[1], log_probs = out[kLogProbs].dimensions()[1];
  Call call{.attributes = attributes, .request = read_request(attributes, batch, splits, task_heads), .args = {}, .mailbox = nullptr, .copies = {}};
  const Program& p = call.request.program;
  set_capacity(call.request, capacity);
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  if (capacity >= kMost || steps > kMost / kMaxBatch || eos_count > kMost / kMaxBatch) {
    throw invalid("the KV cache's capacity, max_new_tokens or the number of end tokens is out of range");
  }
  if (bias != 0 && bias != p.vocab_size) throw invalid("logit_bias has the wrong shape; expected [batch, vocab_size]");
  if (log_probs != 0 && log_probs != steps) throw invalid("log_probs has the wrong shape");
  call.request.placed = in.size() >= kOperands + kPlaceOperands;
  const int64_t page_count = pages(p), page_elems = mk::kPageBytes / (p.weight_dtype == kF32 ? 4 : 2);
  if (call.request.placed && page_count == 0) throw invalid("pages of weights can be placed for ROCM, by a plan with waves of 64 lanes");

  const DataType weights = xla_type(p.weight_dtype), kv = xla_type(p.kv_dtype);
  const std::vector<int64_t> cache = {batch, p.num_layers, p.num_kv_heads, capacity, p.head_dim};
  const std::vector<int64_t> embedding =
      p.tied_head ? std::vector<int64_t>{0, 0} : std::vector<int64_t>{p.vocab_size, p.hidden_size};
  const Field operands[kOperands] = {
      {"streams", weights,
       call.request.placed ? std::vector<int64_t>{page_count + 1, page_elems} : stream_shape(p)},
      {"constants", DataType::F32, {p.constants}},
      {"embedding", weights, embedding},
      {"temperature", DataType::F32, {batch}},
      {"top_k", DataType::S32, {batch}},
      {"top_p", DataType::F32, {batch}},
      {"min_p", DataType::F32, {batch}},
      {"repetition_penalty", DataType::F32, {batch}},
      {"presence_penalty", DataType::F32, {batch}},
      {"max_new_tokens", DataType::S32, {batch}},
      {"eos_token_id", DataType::S32, {batch, eos_count}},
      {"logit_bias", DataType::F32, {batch, bias}},
      {"key_data", DataType::U32, {batch, 2}},
      {"k_cache", kv, cache},
      {"v_cache", kv, cache},
      {"position", DataType::S32, {batch}},
      {"last_token", DataType::S32, {batch}},
      {"status", DataType::S32, {batch}},
      {"seen", DataType::U8, {batch, p.vocab_size}},
  };
  const WorkspaceSize workspace = workspace_size(call.request);
  const Field outcomes[kOutcomes] = {
      {"tokens", DataType::S32, {batch, steps}},
      {"lengths", DataType::S32, {batch}},
      {"log_probs", DataType::F32, {batch, log_probs}},
      operands[kKCache],
      operands[kVCache],
      operands[kPosition],
      operands[kLastToken],
      operands[kStatus],
      operands[kSeen],
      {"workspace", DataType::U8, {workspace.bytes}},
  };
  for (int i = 0; i < kOperands; i++) check_field(in[i], operands[i]);
  for (int i = 0; i < kOutcomes; i++) check_field(out[i], outcomes[i]);
  if (call.request.placed) {
    check_field(in[kOperands], {"pages", DataType::S32, {page_count}});
    check_field(in[kOperands + 1], {"die_units", DataType::S32, {mk::kDies}});
    call.args.pages = pointer<int32_t>(in[kOperands]);
    call.args.die_units = pointer<int32_t>(in[kOperands + 1]);
  }
  if (in.size() % kPlaceOperands != kOperands % kPlaceOperands) {
    check_field(in.back(), {"mailbox", DataType::S32, {batch, 2}});
    call.mailbox = pointer<void>(in.back());
  }
  // XLA gives an aliased result its operand's memory. Where it could not, the operand's contents are brought along.
  for (int i = kKCache; i < kOperands; i++) {
    const AnyBuffer &from = in[i], &to = out[i - kKCache + kKCacheOut];
    if (from.untyped_data() != to.untyped_data() && from.size_bytes() > 0) {
      call.copies.push_back({to.untyped_data(), from.untyped_data(), from.size_bytes()});
    }
  }

  mk::Args& args = call.args;
  args.streams = pointer<void>(in[kStreams]);
  args.constants = pointer<float>(in[kConstants]);
  args.embedding = pointer<void>(in[kEmbedding]);
  args.temperature = pointer<float>(in[kTemperature]);
  args.top_k = pointer<int32_t>(in[kTopK]);
  args.top_p = pointer<float>(in[kTopP]);
  args.min_p = pointer<float>(in[kMinP]);
  args.repetition_penalty = pointer<float>(in[kRepetitionPenalty]);
  args.presence_penalty = pointer<float>(in[kPresencePenalty]);
  args.row_max_new_tokens = pointer<int32_t>(in[kMaxNewTokens]);
  args.eos_token_id = pointer<int32_t>(in[kEosTokenId]);
  args.logit_bias = pointer<float>(in[kLogitBias]);
  args.key_data = pointer<uint32_t>(in[kKeyData]);
  args.k_cache = pointer<void>(out[kKCacheOut]);
  args.v_cache = pointer<void>(out[kVCacheOut]);
  args.position = pointer<int32_t>(out[kPositionOut]);
  args.last_token = pointer<int32_t>(out[kLastTokenOut]);
  args.status = pointer<int32_t>(out[kStatusOut]);
  args.seen = pointer<unsigned char>(out[kSeenOut]);
  args.tokens = pointer<int32_t>(out[kTokens]);
  args.lengths = pointer<int32_t>(out[kLengths]);
  args.log_probs = pointer<float>(out[kLogProbs]);
  args.workspace = pointer<void>(out[kWorkspace]);
  args.capacity = capacity;
  args.max_new_tokens = static_cast<int32_t>(steps);
  args.eos_count = static_cast<int32_t>(eos_count);
  return call;
}

ffi::ErrorCode error_code(Code code) {
  switch (code) {
    case Code::kInvalid: return ffi::ErrorCode::kInvalidArgument;
    case Code::kUnsupported: return ffi::ErrorCode::kUnimplemented;
    case Code::kMissing: return ffi::ErrorCode::kFailedPrecondition;
    case Code::kExhausted: return ffi::ErrorCode::kResourceExhausted;
    case Code::kCancelled: return ffi::ErrorCode::kCancelled;
    case Code::kTimeout: return ffi::ErrorCode::kDeadlineExceeded;
    case Code::kInternal: break;
  }
  return ffi::ErrorCode::kInternal;
}

using Ints = ffi::Span<const int64_t>;
using Floats = ffi::Span<const float>;
using Doubles = ffi::Span<const double>;

Failure another_version(const std::string& what) {
  return Failure(Code::kInvalid, "the call has " + what + "; it was made by another version of jax_monokernel: trace or export it again");
}

// The first of a program's fields.
void check_platform(int64_t platform, Vendor vendor) {
  constexpr const char* kPackedFor[] = {"the CPU", "cuda", "rocm"};
  if (platform == static_cast<int64_t>(vendor) || platform < 0 || platform >= std::ssize(kPackedFor)) return;  // or reading it says why
  throw Failure(Code::kInvalid, std::string("the weights are packed for ") + kPackedFor[platform] + ", but this computation runs on " +
                                    platform_name(vendor) + "; pack them with a plan for it");
}

template <typename T>
T attribute(const ffi::Dictionary& attributes, std::string_view name) {
  auto value = attributes.get<T>(name);
  if (!value.has_value()) throw another_version("no attribute " + std::string(name) + " of the type that is expected");
  return *value;
}

ffi::Error decode(Vendor vendor, void* stream, int32_t ordinal, ffi::RemainingArgs args, ffi::RemainingRets rets,
                  ffi::Dictionary given) {
  try {
    const auto ints = attribute<Ints>(given, "ints"), layers = attribute<Ints>(given, "layers"), tiles = attribute<Ints>(given, "tiles");
    const auto floats = attribute<Floats>(given, "floats");
    const auto ropes = attribute<Doubles>(given, "ropes");
    // A call for the CPU has other operands, results and attributes.
    check_platform(ints.size() > 0 ? ints.begin()[0] : -1, vendor);
    const auto splits = attribute<int64_t>(given, "splits"), task_heads = attribute<int64_t>(given, "task_heads");
    if (args.size() < kOperands || args.size() > kOperands + kPlaceOperands + 1 || rets.size() != kOutcomes) {
      throw another_version(std::to_string(args.size()) + " operands and " + std::to_string(rets.size()) + " results");
    }
    std::vector<AnyBuffer> in, out;
    for (size_t i = 0; i < args.size(); i++) {
      auto buffer = args.get<AnyBuffer>(i);
      if (!buffer.has_value()) return buffer.error();
      in.push_back(*buffer);
    }
    for (size_t i = 0; i < rets.size(); i++) {
      auto buffer = rets.get<AnyBuffer>(i);
      if (!buffer.has_value()) return buffer.error();
      out.push_back(**buffer);
    }
    const auto span = [](auto s) { return std::span(s.begin(), s.size()); };
    const Attributes attributes{span(ints), span(floats), span(layers), span(ropes), span(tiles)};
    run(vendor, ordinal, stream, make_call(in, out, attributes, splits, task_heads));
    return ffi::Error::Success();
  } catch (const Failure& failure) {
    return ffi::Error(error_code(failure.code), failure.what());
  } catch (const std::exception& e) {  // no memory
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, std::string("jax_monokernel: ") + e.what());
  }
}

template <Vendor vendor>
ffi::Error on_stream(void* stream, int32_t ordinal, ffi::RemainingArgs args, ffi::RemainingRets rets, ffi::Dictionary attributes) {
  return decode(vendor, stream, ordinal, args, rets, attributes);
}

// Not compatible with command buffers: the handler waits for the kernel.
#define ON_STREAM                               \
  ffi::Ffi::Bind()                              \
      .Ctx<ffi::PlatformStream<void*>>()        \
      .Ctx<ffi::DeviceOrdinal>()                \
      .RemainingArgs()                          \
      .RemainingRets()                          \
      .Attrs()

XLA_FFI_DEFINE_HANDLER(kOnCuda, on_stream<Vendor::kCuda>, ON_STREAM);
XLA_FFI_DEFINE_HANDLER(kOnRocm, on_stream<Vendor::kRocm>, ON_STREAM);

// XLA's answers to a handler, save that there is a stream on the platform cpu.
thread_local const XLA_FFI_Api* t_xla;
thread_local intptr_t t_stream;  // that the handler asked for

XLA_FFI_Error* test_stream(XLA_FFI_Stream_Get_Args* args) {
  XLA_FFI_DeviceOrdinal_Get_Args device{.struct_size = XLA_FFI_DeviceOrdinal_Get_Args_STRUCT_SIZE,
                                        .extension_start = nullptr, .ctx = args->ctx, .device_ordinal = 0};
  if (XLA_FFI_Error* error = t_xla->XLA_FFI_DeviceOrdinal_Get(&device)) return error;
  t_stream = kTestStreams + device.device_ordinal;
  args->stream = reinterpret_cast<void*>(t_stream);
  return nullptr;
}

template <Vendor vendor>
XLA_FFI_Error* on_test_stream(XLA_FFI_CallFrame* frame) {
  XLA_FFI_Api api = *frame->api;
  api.XLA_FFI_Stream_Get = test_stream;
  t_xla = frame->api;
  XLA_FFI_CallFrame same = *frame;
  same.api = &api;
  t_stream = 0;
  XLA_FFI_Error* error = decode_handler(vendor)(&same);
  if (!error && t_stream) {  // for which nobody waits on the platform cpu
    Device& device = Device::get(vendor, static_cast<int>(t_stream - kTestStreams));
    const Device::Current current(device);
    device.api().stream_wait(reinterpret_cast<void*>(t_stream));
  }
  return error;
}

}  // namespace

XLA_FFI_Handler* decode_handler(Vendor vendor) { return vendor == Vendor::kCuda ? kOnCuda : kOnRocm; }

XLA_FFI_Handler* decode_handler_for_tests(Vendor vendor) { return vendor == Vendor::kCuda ? on_test_stream<Vendor::kCuda> : on_test_stream<Vendor::kRocm>; }

}  // namespace monokernel::gpu
