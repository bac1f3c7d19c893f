// Choosing the next token of one request, as docs/sampling.md defines it (the definition: jax_monokernel/sampling.py).
#pragma once

#include <cstdint>

namespace monokernel::cpu {

// One request's options. Values out of range have the meanings that docs/sampling.md gives them: none is an error.
struct SampleParams {
  float temperature;         // 0: greedy
  int32_t top_k;             // 0: off
  float top_p;               // 1: off
  float min_p;               // 0: off
  float repetition_penalty;  // 1: off
  float presence_penalty;    // 0: off
  const float* logit_bias;   // [vocab] or nullptr
  uint32_t key[2];           // the request's threefry key
};

struct Sampled {
  int32_t token;   // 0 <= token < vocab, whatever the inputs are
  float log_prob;  // log_softmax(logits)[token] before any option applies; 0 where it was not asked for
};

// Instruction sets for which there is code. All of them give bit-equal results.
enum class SampleIsa { kBase, kAvx2, kAvx512 };

// The best one that this machine has.
SampleIsa best_sample_isa();

// logits [vocab], seen [vocab] or nullptr, position: index of the last token in the sequence, vocab: 1 to 2^31 - 1.
// scratch [vocab] is overwritten; it may not overlap the inputs. `isa` must not exceed what the machine has.
Sampled sample_row(const float* logits, int64_t vocab, const uint8_t* seen, int32_t position,
                   const SampleParams& params, bool want_log_prob, float* scratch,
                   SampleIsa isa = best_sample_isa());

// out[i] = jax.random.bits(fold_in(key, position), (count,))[i], for tests.
void sample_bits(const uint32_t key[2], int32_t position, int64_t count, uint32_t* out);

}  // namespace monokernel::cpu
