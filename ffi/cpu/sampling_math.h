// Random words, Gumbel noise and the exponential of the sampler. Included by sampling_kernel.h only.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#define MONOKERNEL_INLINE static inline __attribute__((always_inline))

namespace monokernel::cpu::sampling {

// Above -log(-log(u)) for the largest u, 1 - 2^-24.
constexpr float kMaxNoise = 16.64f;

// ---- Random bits: threefry2x32 with 20 rounds (Salmon et al., 2011) ----

MONOKERNEL_INLINE void threefry(const uint32_t key[2], uint32_t& x0, uint32_t& x1) {
  constexpr int kRotations[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
  const uint32_t keys[3] = {key[0], key[1], key[0] ^ key[1] ^ 0x1BD11BDAu};
  x0 += keys[0];
  x1 += keys[1];
#pragma GCC unroll 5
  for (uint32_t group = 0; group < 5; group++) {
#pragma GCC unroll 4
    for (int round = 0; round < 4; round++) {
      const int r = kRotations[group % 2][round];
      x0 += x1;
      x1 = (x1 << r) | (x1 >> (32 - r));
      x1 ^= x0;
    }
    x0 += keys[(group + 1) % 3];
    x1 += keys[(group + 2) % 3] + group + 1;
  }
}

MONOKERNEL_INLINE void fold_in(uint32_t key[2], uint32_t data) {
  uint32_t x0 = 0, x1 = data;
  threefry(key, x0, x1);
  key[0] = x0;
  key[1] = x1;
}

MONOKERNEL_INLINE uint32_t random_bits(const uint32_t step_key[2], uint32_t i) {
  uint32_t x0 = 0, x1 = i;
  threefry(step_key, x0, x1);
  return x0 ^ x1;
}

// 1 - u, exact; u = ((bits >> 9) + 0.5) * 2^-23.
MONOKERNEL_INLINE float one_minus_u(uint32_t bits) {
  return (8388607.5f - static_cast<float>(static_cast<int32_t>(bits >> 9))) * 0x1p-23f;
}

// -log(-log(u)), each logarithm rounded to f32.
MONOKERNEL_INLINE float gumbel_noise(uint32_t bits) {
  const double u = 1.0 - static_cast<double>(one_minus_u(bits));
  return static_cast<float>(-std::log(static_cast<double>(static_cast<float>(-std::log(u)))));
}

// ---- Arithmetic ----

// Integers that compare as the floats do (no NaN; zeros must be positive). Its own inverse.
MONOKERNEL_INLINE int32_t order_key(int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }
MONOKERNEL_INLINE int32_t to_key(float z) { return order_key(std::bit_cast<int32_t>(z)); }
MONOKERNEL_INLINE float from_key(int32_t key) { return std::bit_cast<float>(order_key(key)); }

// e^x for x <= 0 within 2 units in the last place; 0 below -87. Taylor series on |r| <= log(2) / 2.
MONOKERNEL_INLINE float exp_negative(float x) {
  const float c = x < -87.0f ? -87.0f : x;
  const float shifted = c * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum is rounded to an integer
  const float n = shifted - 12582912.0f;
  const float r = (c - n * 0.693145752f) - n * 1.42860677e-6f;
  float p = 1.98412698e-4f;
  p = p * r + 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const float scaled = std::bit_cast<float>(std::bit_cast<int32_t>(p) + (std::bit_cast<int32_t>(shifted) << 23));
  return x < -87.0f ? 0.0f : scaled;
}

}  // namespace monokernel::cpu::sampling
