// The XLA custom call: checks what it was given, lays out the call's memory and runs a team over it.
#include "cpu/decode.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <string>

#include "cpu/cpus.h"
#include "cpu/interrupt.h"
#include "cpu/isa.h"
#include "cpu/settings.h"
#include "cpu/team.h"
#include "mailbox.h"
#include "read_fields.h"

namespace monokernel::cpu {
namespace {

namespace ffi = xla::ffi;

ffi::Error invalid(const std::string& message) { return ffi::Error::InvalidArgument("jax_monokernel: " + message); }

#define REQUIRE(condition, message) \
  if (!(condition)) return invalid(message)

ffi::DataType xla_type(int64_t dtype) {
  return dtype == kBF16 ? ffi::DataType::BF16 : dtype == kF16 ? ffi::DataType::F16 : ffi::DataType::F32;
}

// Attributes come from jax_monokernel/_program.py, but an exported program may have been changed on its way here: nothing in
// them may lead outside a buffer.
ffi::Error read_program(const Attributes& a, Program* p) {
  if (std::string error = read_fields(a.ints, a.floats, p); !error.empty()) return invalid(error);
  constexpr const char* kPlatforms[] = {"the CPU", "cuda", "rocm"};
  REQUIRE(p->platform >= 0 && p->platform < std::ssize(kPlatforms), "unknown platform");
  REQUIRE(p->platform == 0, std::string("the weights are packed for ") + kPlatforms[p->platform] +
                                ", but this computation runs on the CPU; pack them with a plan for the CPU, or use "
                                "arrays on such a device and the package for it");
  for (int64_t size : {p->vocab_size, p->hidden_size, p->intermediate_size, p->num_heads, p->num_kv_heads, p->head_dim,
                       p->num_layers, p->units}) {
    REQUIRE(size >= 1 && size <= std::numeric_limits<int32_t>::max(), "a model dimension is out of range");
  }
  // Products of two dimensions, of which there may be eight or sixteen times as many elements, do not overflow from here on.
  REQUIRE(p->num_heads <= kFieldLimit / p->head_dim, "the heads are too large");
  REQUIRE(p->num_heads % p->num_kv_heads == 0, "num_heads is not a multiple of num_kv_heads");
  REQUIRE(p->rotary_dim >= 0 && p->rotary_dim % 2 == 0 && p->rotary_dim <= p->head_dim, "rotary_dim is out of range");
  REQUIRE(p->num_ropes >= 0, "num_ropes is out of range");
  REQUIRE(p->weight_dtype >= kBF16 && p->weight_dtype <= kF32 && p->kv_dtype >= kBF16 && p->kv_dtype <= kF32,
          "unknown dtype");
  REQUIRE(static_cast<int64_t>(a.layers.size()) == p->num_layers * 2, "the layer table has the wrong size");
  REQUIRE(static_cast<int64_t>(a.ropes.size()) == p->num_ropes * 6, "the rope table has the wrong size");
  REQUIRE(static_cast<int64_t>(a.tiles.size()) == kPhases * p->units * 3, "the tile table has the wrong size");
  p->layers = reinterpret_cast<const LayerRow*>(a.layers.begin());
  p->ropes = reinterpret_cast<const RopeRow*>(a.ropes.begin());
  p->tiles = reinterpret_cast<const TileRow*>(a.tiles.begin());

  for (int64_t l = 0; l < p->num_layers; l++) {
    REQUIRE(p->layers[l].window >= 0 && p->layers[l].rope >= -1 && p->layers[l].rope < p->num_ropes,
            "the layer table is out of range");
  }
  for (int64_t r = 0; r < p->num_ropes; r++) {
    const RopeRow& rope = p->ropes[r];
    const double last = rope.inv_freq_row + (rope.scaling == 2 ? 1 : 0);
    REQUIRE(rope.inv_freq_row >= 0 && p->inv_freq >= 0 && last < 1e6 &&
                p->inv_freq + (static_cast<int64_t>(last) + 1) * (p->rotary_dim / 2) <= p->constants,
            "the rope table is out of range");
  }

  const int64_t group = p->weight_dtype == kBF16 ? 2 : 1;
  const int64_t inputs[kPhases] = {p->hidden_size, p->q_size(), p->hidden_size, p->intermediate_size, p->hidden_size};
  const int64_t outputs[kPhases] = {p->q_size() + 2 * p->kv_size(), p->hidden_size,
                                    p->intermediate_size, p->hidden_size, p->vocab_size};
  for (int phase = 0; phase < kPhases; phase++) {
    const int64_t step = phase == kGateUp && p->gated ? 2 : 1;
    const int64_t tiles = (outputs[phase] + 15) / 16 * step;
    const int64_t tile_elems = 16 * ((inputs[phase] + group - 1) / group * group);
    const int64_t room = phase == kHead ? p->unit_elems : p->layer_elems;
    int64_t next = 0;
    for (int64_t u = 0; u < p->units; u++) {
      const TileRow& t = p->tile(static_cast<Phase>(phase), u);
      REQUIRE(t.begin == next && t.count >= 0 && t.count <= tiles && t.count % step == 0 && t.offset >= 0 &&
                  t.offset <= room && t.count <= (room - t.offset) / tile_elems,
              "the tile table is out of range");
      next += t.count;
    }
    REQUIRE(next == tiles, "the tile table does not cover the matrices");
  }
  REQUIRE(p->layer_elems <= p->unit_elems / p->num_layers, "the layers do not fit in a unit's stream");

  struct Vector {
    int64_t offset, size;
    bool needed;
  };
  const int64_t norm_size[2] = {p->qk_norm == 1 ? p->head_dim : p->q_size(), p->qk_norm == 1 ? p->head_dim : p->kv_size()};
  for (const Vector& v : {
           Vector{p->attn_norm, p->hidden_size, p->pre_norm != 0}, Vector{p->mlp_norm, p->hidden_size, p->pre_norm != 0},
           Vector{p->attn_post_norm, p->hidden_size, p->post_norm != 0},
           Vector{p->mlp_post_norm, p->hidden_size, p->post_norm != 0},
           Vector{p->q_norm, norm_size[0], p->qk_norm != 0}, Vector{p->k_norm, norm_size[1], p->qk_norm != 0},
           Vector{p->q_bias, p->q_size() + 2 * p->kv_size(), false}, Vector{p->o_bias, p->hidden_size, false},
           Vector{p->gate_bias, p->intermediate_size, false}, Vector{p->up_bias, p->intermediate_size, false},
           Vector{p->down_bias, p->hidden_size, false},
       }) {
    REQUIRE(v.offset >= 0 || !v.needed, "a norm that the model has is missing from the constants");
    REQUIRE(v.offset < 0 || v.offset + v.size <= p->layer_constants, "the constants are out of range");
  }
  REQUIRE(p->final_norm >= 0 && p->final_norm + p->hidden_size <= p->constants && p->layer_constants >= 0 &&
              p->layer_constants_offset >= 0 && p->layer_constants_offset <= p->constants &&
              p->layer_constants <= (p->constants - p->layer_constants_offset) / p->num_layers,
          "the constants are out of range");
  return ffi::Error::Success();
}

template <typename Buffer>
bool has_shape(const Buffer& buffer, std::initializer_list<int64_t> shape) {
  auto dims = buffer.dimensions();
  return dims.size() == shape.size() && std::equal(dims.begin(), dims.end(), shape.begin());
}

template <typename In, typename Out>
bool same_type(const In& in, Out& out) {
  auto a = in.dimensions(), b = out->dimensions();
  return in.element_type() == out->element_type() && std::equal(a.begin(), a.end(), b.begin(), b.end());
}

#define REQUIRE_SHAPE(buffer, ...) \
  REQUIRE(has_shape(buffer, {__VA_ARGS__}), std::string(#buffer) + " has the wrong shape; expected [" #__VA_ARGS__ "]")

ffi::Error check_operands(const Operands& in, Results& out, const Program& p, int64_t batch, int64_t capacity,
                          int64_t tokens) {
  REQUIRE_SHAPE(in.streams, p.units, p.unit_elems);
  REQUIRE_SHAPE(in.constants, p.constants);
  if (!p.tied_head) REQUIRE_SHAPE(in.embedding, p.vocab_size, p.hidden_size);
  REQUIRE(in.streams.element_type() == xla_type(p.weight_dtype) && in.embedding.element_type() == xla_type(p.weight_dtype),
          "the streams' dtype is not the program's");
  REQUIRE(in.k_cache.element_type() == xla_type(p.kv_dtype) && in.v_cache.element_type() == xla_type(p.kv_dtype),
          "the KV cache's dtype is not the program's");
  REQUIRE_SHAPE(in.k_cache, batch, p.num_layers, p.num_kv_heads, capacity, p.head_dim);
  REQUIRE_SHAPE(in.v_cache, batch, p.num_layers, p.num_kv_heads, capacity, p.head_dim);
  for (const auto& operand : {in.temperature, in.top_p, in.min_p, in.repetition_penalty, in.presence_penalty}) {
    REQUIRE_SHAPE(operand, batch);
  }
  for (const auto& operand : {in.top_k, in.max_new_tokens, in.position, in.last_token, in.status}) {
    REQUIRE_SHAPE(operand, batch);
  }
  REQUIRE_SHAPE(in.eos_token_id, batch, in.eos_token_id.dimensions()[1]);
  REQUIRE(has_shape(in.logit_bias, {batch, 0}) || has_shape(in.logit_bias, {batch, p.vocab_size}),
          "logit_bias has the wrong shape; expected [batch, vocab_size]");
  REQUIRE_SHAPE(in.key_data, batch, 2);
  REQUIRE_SHAPE(in.seen, batch, p.vocab_size);
  REQUIRE_SHAPE(*out.tokens, batch, tokens);
  REQUIRE_SHAPE(*out.lengths, batch);
  REQUIRE(has_shape(*out.log_probs, {batch, 0}) || has_shape(*out.log_probs, {batch, tokens}),
          "log_probs has the wrong shape");
  REQUIRE(same_type(in.k_cache, out.k_cache) && same_type(in.v_cache, out.v_cache) &&
              same_type(in.position, out.position) && same_type(in.last_token, out.last_token) &&
              same_type(in.status, out.status) && same_type(in.seen, out.seen),
          "a result has another type than the operand that it continues");
  if (in.mailbox) REQUIRE(has_shape(*in.mailbox, {batch, 2}), "mailbox has the wrong shape; expected [batch, 2]");
  const int32_t *token = in.last_token.typed_data(), *position = in.position.typed_data();
  for (int64_t b = 0; b < batch; b++) {
    if (in.status.typed_data()[b] != kRunning) continue;
    REQUIRE(token[b] >= 0 && token[b] < p.vocab_size, "last_token of request " + std::to_string(b) + " is " +
                                                          std::to_string(token[b]) + "; expected 0 to " +
                                                          std::to_string(p.vocab_size - 1));
    REQUIRE(position[b] >= 0,
            "position of request " + std::to_string(b) + " is " + std::to_string(position[b]) + "; expected at least 0");
  }
  return ffi::Error::Success();
}

// XLA gives an aliased result its operand's memory. Where it could not, the operand's contents are brought along.
template <typename In, typename Out>
void carry_over(const In& in, Out& out) {
  if (in.untyped_data() != out->untyped_data()) std::memcpy(out->untyped_data(), in.untyped_data(), in.size_bytes());
}

// Hands out consecutive, cache-line aligned parts of a block of floats; the first pass only adds up.
struct Parts {
  float* base = nullptr;
  int64_t used = 0;
  float* take(int64_t floats) {
    float* part = base ? base + used : nullptr;
    used += (floats + 15) / 16 * 16;
    return part;
  }
};

void place(Job& job, Parts& parts) {
  const Program& p = job.program;
  const int64_t batch = job.batch;
  job.shared.qkv = parts.take(batch * (p.q_size() + 2 * p.kv_size()));
  job.shared.attended = parts.take(job.splits * batch * p.q_size());
  job.shared.softmax = parts.take(job.splits * batch * p.num_heads * 2);
  job.shared.projected = parts.take(batch * p.hidden_size);
  job.shared.inner = parts.take(batch * p.intermediate_size);
  job.shared.logits = parts.take(batch * p.vocab_size);
  job.shared.sampling = parts.take(batch * p.vocab_size);
  job.scratch = parts.take(job.threads * job.scratch_floats);
}

ffi::Error cancelled_error() {
  return ffi::Error(ffi::ErrorCode::kCancelled,
                    "jax_monokernel: decode was cancelled, by Ctrl-C or jax_monokernel.cancel(). Its tokens are lost. The state "
                    "that it was given is as before if it was not donated: call decode with it again. If it was donated, it "
                    "is unusable, even where it can still be read: make a new one with prefill");
}

// A tape may come from a machine with more CPUs than this one; a thread then serves several units.
int64_t thread_limit() {
  const int64_t forced = threads_setting();
  return forced > 0 ? forced : available_cpus();
}

}  // namespace

ffi::Error decode(const Operands& in, Results& out, const Attributes& attributes) {
  const uint64_t cancel_at_start = __atomic_load_n(cancel_epoch(), __ATOMIC_RELAXED);
  Job job{};
  if (ffi::Error error = read_program(attributes, &job.program); error.failure()) return error;
  const Program& p = job.program;

  REQUIRE(in.k_cache.dimensions().size() == 5 && in.eos_token_id.dimensions().size() == 2 &&
              out.tokens->dimensions().size() == 2,
          "k_cache, eos_token_id or tokens has the wrong rank");
  job.batch = in.k_cache.dimensions()[0];
  job.capacity = in.k_cache.dimensions()[3];
  job.max_new_tokens = out.tokens->dimensions()[1];
  REQUIRE(job.batch >= 1 && job.batch <= kMaxBatch, "a call takes 1 to 16 requests, got " + std::to_string(job.batch));
  REQUIRE(job.capacity < std::numeric_limits<int32_t>::max(), "the KV cache's capacity is out of range");
  if (ffi::Error error = check_operands(in, out, p, job.batch, job.capacity, job.max_new_tokens); error.failure()) {
    return error;
  }

  std::string isa_error;
  const Kernel* kernel = current_kernel(&isa_error);
  if (!kernel) return invalid(isa_error);

  carry_over(in.k_cache, out.k_cache);
  carry_over(in.v_cache, out.v_cache);
  carry_over(in.position, out.position);
  carry_over(in.last_token, out.last_token);
  carry_over(in.status, out.status);
  carry_over(in.seen, out.seen);
  job.k_cache = out.k_cache->untyped_data();
  job.v_cache = out.v_cache->untyped_data();
  job.position = out.position->typed_data();
  job.last_token = out.last_token->typed_data();
  job.status = out.status->typed_data();
  job.seen = out.seen->typed_data();
  job.key_data = in.key_data.typed_data();
  job.tokens = out.tokens->typed_data();
  job.lengths = out.lengths->typed_data();
  job.log_probs = out.log_probs->element_count() > 0 ? out.log_probs->typed_data() : nullptr;
  job.streams = in.streams.untyped_data();
  job.constants = in.constants.typed_data();
  job.embedding = p.tied_head ? nullptr : in.embedding.untyped_data();
  job.sampling = Sampling{
      .temperature = in.temperature.typed_data(),
      .top_k = in.top_k.typed_data(),
      .top_p = in.top_p.typed_data(),
      .min_p = in.min_p.typed_data(),
      .repetition_penalty = in.repetition_penalty.typed_data(),
      .presence_penalty = in.presence_penalty.typed_data(),
      .max_new_tokens = in.max_new_tokens.typed_data(),
      .eos_token_id = in.eos_token_id.typed_data(),
      .logit_bias = in.logit_bias.element_count() > 0 ? in.logit_bias.typed_data() : nullptr,
      .eos_count = in.eos_token_id.dimensions()[1],
  };
  std::fill_n(job.tokens, job.batch * job.max_new_tokens, -1);
  std::fill_n(job.lengths, job.batch, 0);
  if (job.log_probs) std::fill_n(job.log_probs, job.batch * job.max_new_tokens, 0.0f);

  InterruptScope interrupts;
  job.cancel_epoch = cancel_epoch();
  job.cancel_at_start = cancel_at_start;
  MailRows mail;
  if (in.mailbox) {
    std::string error = open_mail(in.mailbox->typed_data(), job.batch, job.max_new_tokens, &mail);
    if (!error.empty()) return invalid(error);
  }
  if (mail.box) {
    job.mail = &mail;
    job.stop = mail.box->stop_word();
  }
  auto cancelled = [&] { return __atomic_load_n(job.cancel_epoch, __ATOMIC_RELAXED) != cancel_at_start; };
  // Whoever listens has all tokens so far, and gets the state that goes with them: for them a call that ends early is no failure.
  auto ended_early = [&] {
    if (!mail.box) return cancelled_error();
    if (cancelled()) mail.box->set_cancelled();
    return ffi::Error::Success();
  };

  if (mail.stopped()) return ended_early();
  Lease lease(static_cast<int>(std::min<int64_t>(p.units, thread_limit())),
              [&] { return cancelled() || mail.stopped(); });
  if (!lease.team()) return ended_early();
  job.threads = lease.team()->threads();
  for (int64_t b = 0; b < job.batch; b++) {
    if (job.status[b] != kRunning) continue;
    const int64_t end = std::min(job.capacity, job.position[b] + job.max_new_tokens);
    job.splits = std::max(job.splits, (end + kSplitPositions - 1) / kSplitPositions);
  }
  job.sample_isa = kernel->sample_isa;
  job.scratch_floats = kernel->scratch_floats(job);
  Parts count;
  place(job, count);
  Parts parts{static_cast<float*>(lease.team()->arena().reserve(static_cast<size_t>(count.used) * sizeof(float)))};
  if (!parts.base) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "jax_monokernel: no memory for a workspace of " +
                                                              std::to_string(count.used * 4) + " bytes");
  }
  place(job, parts);
  job.barrier.reset(job.threads);
  lease.team()->run([&](int thread) { kernel->run(job, thread); });
  if (mail.box) mail.box->end_nap();

  if (job.cancelled) {
    if (ffi::Error error = ended_early(); error.failure()) return error;
  }
  for (int64_t b = 0; b < job.batch; b++) {
    const int64_t limit = std::min<int64_t>(job.max_new_tokens, job.sampling.max_new_tokens[b]);
    if (job.status[b] == kRunning && job.position[b] >= job.capacity && job.lengths[b] < limit) job.status[b] = kFull;
  }
  return ffi::Error::Success();
}

}  // namespace monokernel::cpu
