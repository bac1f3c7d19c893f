// One decode call, as every thread of its team sees it.
#pragma once

#include <cstdint>

#include "cpu/barrier.h"
#include "cpu/sampling.h"
#include "program.h"

namespace monokernel {
struct MailRows;
}

namespace monokernel::cpu {

// DecodeState.status (jax_monokernel/state.py)
enum Status : int32_t { kRunning = 0, kStopped = 1, kFull = 2 };

// Sampling operands, one entry per request (jax_monokernel/sampling.py: SamplingParams).
struct Sampling {
  const float* temperature;           // [batch]
  const int32_t* top_k;               // [batch]
  const float* top_p;                 // [batch]
  const float* min_p;                 // [batch]
  const float* repetition_penalty;    // [batch]
  const float* presence_penalty;      // [batch]
  const int32_t* max_new_tokens;      // [batch]
  const int32_t* eos_token_id;        // [batch, eos_count], -1: unused
  const float* logit_bias;            // [batch, vocab] or nullptr
  int64_t eos_count;
};

// Exchange buffers, written by the threads in one phase and read by all of them in the next. A buffer is written again one
// layer (or token) later, with several hand-offs between.
struct Shared {
  float* qkv;       // [batch, q_size + 2 * kv_size] before norms and rotation
  float* attended;  // [splits, batch, heads, head_dim] unnormalised partial sums of values
  float* softmax;   // [splits, batch, heads, 2] running maximum and sum of each split
  float* projected;  // [batch, hidden] output of the o or down phase, before post-norm
  float* inner;     // [batch, intermediate] activated MLP values
  float* logits;    // [batch, vocab]
  float* sampling;  // [batch, vocab] scratch of the sampler
};

struct Job {
  Program program;
  int64_t batch;
  int64_t capacity;
  int64_t max_new_tokens;
  int64_t splits;  // parts of kSplitPositions that the longest context of this call has
  int threads;
  SampleIsa sample_isa;

  const void* streams;     // weight_dtype [units, unit_elems]
  const float* constants;  // [constants]
  const void* embedding;   // weight_dtype [vocab, hidden] or nullptr when tied
  Sampling sampling;

  void* k_cache;  // kv_dtype [batch, layers, kv_heads, capacity, head_dim]
  void* v_cache;
  int32_t* position;    // [batch]
  int32_t* last_token;  // [batch]
  const uint32_t* key_data;  // [batch, 2]
  int32_t* status;      // [batch]
  uint8_t* seen;        // [batch, vocab]

  int32_t* tokens;   // [batch, max_new_tokens]
  int32_t* lengths;  // [batch]
  float* log_probs;  // [batch, max_new_tokens] or nullptr
  const MailRows* mail;  // who listens; nullptr: nobody

  Shared shared;
  float* scratch;  // [threads, scratch_floats] private to each thread
  int64_t scratch_floats;

  Barrier barrier;
  const uint64_t* cancel_epoch;  // differs from cancel_at_start once the call is to be cancelled (cpu/interrupt.h)
  uint64_t cancel_at_start;
  const uint32_t* stop;  // not 0 once whoever listens has heard enough; nullptr where nobody does
  bool cancelled;  // written by thread 0 before a hand-off, so that all threads leave together
};

// Attention's unit of work: the part of one request's context between two multiples of this. Fixed places, so that the order
// of sums depends on a request's position only: not on its neighbours in the batch, nor on the number of threads.
inline constexpr int64_t kSplitPositions = 256;

// Largest batch one call takes; Python splits larger ones.
inline constexpr int64_t kMaxBatch = 16;

// Chooses the next token of one request from its logits and updates its state.
void sample_request(Job& job, int64_t row);

inline constexpr int64_t kReadBytes = 512;

// A build of the kernel for one instruction set (cpu/kernel/kernel.cc).
struct Kernel {
  const char* name;
  SampleIsa sample_isa;  // the sampler's build that goes with it
  void (*run)(Job& job, int thread);
  // Floats of private scratch that one thread needs for `job`.
  int64_t (*scratch_floats)(const Job& job);
  // Reads `bytes` at a 64-byte aligned address, rounded down to whole kReadBytes, as fast as it can; returns some sum.
  uint64_t (*read)(const void* from, int64_t bytes);
};

}  // namespace monokernel::cpu
