// Operands, results and attributes of the decode custom call, in the order in which jax_monokernel/decode.py passes them.
#pragma once

#include <optional>

#include "cpu/job.h"
#include "xla/ffi/api/ffi.h"

namespace monokernel::cpu {

using F32 = xla::ffi::Buffer<xla::ffi::DataType::F32>;
using S32 = xla::ffi::Buffer<xla::ffi::DataType::S32>;
using U32 = xla::ffi::Buffer<xla::ffi::DataType::U32>;
using U8 = xla::ffi::Buffer<xla::ffi::DataType::U8>;

struct Operands {
  xla::ffi::AnyBuffer streams;    // [units, unit_elems]
  F32 constants;                  // [constants]
  xla::ffi::AnyBuffer embedding;  // [vocab, hidden], or empty when tied
  F32 temperature;                // [batch]
  S32 top_k;                      // [batch]
  F32 top_p;                      // [batch]
  F32 min_p;                      // [batch]
  F32 repetition_penalty;         // [batch]
  F32 presence_penalty;           // [batch]
  S32 max_new_tokens;             // [batch]
  S32 eos_token_id;               // [batch, eos_count]
  F32 logit_bias;                 // [batch, vocab], or [batch, 0]
  U32 key_data;                   // [batch, 2]
  xla::ffi::AnyBuffer k_cache;    // [batch, layers, kv_heads, capacity, head_dim]
  xla::ffi::AnyBuffer v_cache;    // likewise
  S32 position;                   // [batch]
  S32 last_token;                 // [batch]
  S32 status;                     // [batch]
  U8 seen;                        // [batch, vocab]
  std::optional<S32> mailbox = std::nullopt;   // [batch, 2], see open_mail()
};

struct Results {
  xla::ffi::Result<S32> tokens;                   // [batch, max_new_tokens]
  xla::ffi::Result<S32> lengths;                  // [batch]
  xla::ffi::Result<F32> log_probs;                // [batch, max_new_tokens], or [batch, 0]
  xla::ffi::Result<xla::ffi::AnyBuffer> k_cache;  // aliased to the operand, as are those that follow
  xla::ffi::Result<xla::ffi::AnyBuffer> v_cache;
  xla::ffi::Result<S32> position;
  xla::ffi::Result<S32> last_token;
  xla::ffi::Result<S32> status;
  xla::ffi::Result<U8> seen;
};

struct Attributes {
  xla::ffi::Span<const int64_t> ints;    // MONOKERNEL_INT_FIELDS
  xla::ffi::Span<const float> floats;    // MONOKERNEL_FLOAT_FIELDS
  xla::ffi::Span<const int64_t> layers;  // LayerRow[num_layers]
  xla::ffi::Span<const double> ropes;    // RopeRow[num_ropes]
  xla::ffi::Span<const int64_t> tiles;   // TileRow[phases][units]
};

xla::ffi::Error decode(const Operands& in, Results& out, const Attributes& attributes);

}  // namespace monokernel::cpu
