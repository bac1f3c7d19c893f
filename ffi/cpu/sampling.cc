#include "cpu/sampling.h"

#include "cpu/sampling_kernel.h"

// The kernel is compiled once per instruction set. Only loops differ: nothing here is contracted to fused multiply-adds
// (see CMakeLists.txt) and sums have fixed orders, so that every version gives the same bits.
#if defined(__x86_64__)
#define MONOKERNEL_TARGET(isa) __attribute__((target(isa)))
#if defined(__clang__)
#define MONOKERNEL_AVX512 "avx512f,avx512bw,avx512dq,avx512vl"
#else
#define MONOKERNEL_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"
#endif
#endif

namespace monokernel::cpu {
namespace {

Sampled sample_base(const sampling::Row& row, bool want_log_prob) { return sampling::sample(row, want_log_prob); }

#if defined(__x86_64__)
MONOKERNEL_TARGET("avx2") Sampled sample_avx2(const sampling::Row& row, bool want_log_prob) {
  return sampling::sample(row, want_log_prob);
}

MONOKERNEL_TARGET(MONOKERNEL_AVX512) Sampled sample_avx512(const sampling::Row& row, bool want_log_prob) {
  return sampling::sample(row, want_log_prob);
}
#endif

}  // namespace

SampleIsa best_sample_isa() {
#if defined(__x86_64__)
  static const SampleIsa best = [] {
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      return SampleIsa::kAvx512;
    }
    return __builtin_cpu_supports("avx2") ? SampleIsa::kAvx2 : SampleIsa::kBase;
  }();
  return best;
#else
  return SampleIsa::kBase;
#endif
}

Sampled sample_row(const float* logits, int64_t vocab, const uint8_t* seen, int32_t position,
                   const SampleParams& params, bool want_log_prob, float* scratch, [[maybe_unused]] SampleIsa isa) {
  const sampling::Row row = sampling::make_row(logits, vocab, seen, position, params, scratch);
#if defined(__x86_64__)
  if (isa == SampleIsa::kAvx512) return sample_avx512(row, want_log_prob);
  if (isa == SampleIsa::kAvx2) return sample_avx2(row, want_log_prob);
#endif
  return sample_base(row, want_log_prob);
}

void sample_bits(const uint32_t key[2], int32_t position, int64_t count, uint32_t* out) {
  uint32_t step_key[2] = {key[0], key[1]};
  sampling::fold_in(step_key, static_cast<uint32_t>(position));
  for (int64_t i = 0; i < count; i++) out[i] = sampling::random_bits(step_key, static_cast<uint32_t>(i));
}

}  // namespace monokernel::cpu
