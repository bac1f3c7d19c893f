// Vectors of LANES floats in the compiler's own vector types, and the elementary functions on them. Compiled once for each
// instruction set (kernel.cc), inside that build's namespace; no standard headers, whose inline functions would be shared
// between builds.

// clang-format off
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4  // SSE2 and NEON
#endif
// clang-format on

typedef float Vf __attribute__((vector_size(LANES * 4)));
typedef int32_t Vi __attribute__((vector_size(LANES * 4)));
typedef uint32_t Vu __attribute__((vector_size(LANES * 4)));
typedef uint16_t Vh __attribute__((vector_size(LANES * 2)));
#if defined(__aarch64__)
typedef __fp16 Half;  // g++ 12 does not know _Float16 here
#else
typedef _Float16 Half;
typedef Half Vf16 __attribute__((vector_size(LANES * 2)));
#endif

// Storage types: a weight or cache element as its bits.
struct Bf16 {
  uint16_t bits;
};
struct F16 {
  Half value;
};

#define FORCE static inline __attribute__((always_inline))

template <typename V, typename T>
FORCE V load_as(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

FORCE Vf load(const float* p) { return load_as<Vf>(p); }
FORCE Vf load(const Bf16* p) { return (Vf)(__builtin_convertvector(load_as<Vh>(p), Vu) << 16); }
#if defined(__aarch64__)
FORCE Vf load(const F16* p) { return (Vf)vcvt_f32_f16(load_as<float16x4_t>(p)); }
#else
FORCE Vf load(const F16* p) { return __builtin_convertvector(load_as<Vf16>(p), Vf); }
#endif

FORCE void store(float* p, Vf v) { __builtin_memcpy(p, &v, sizeof(v)); }

FORCE float bits_to_float(uint32_t u) {
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}
FORCE uint32_t float_to_bits(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  return u;
}

FORCE float to_float(float x) { return x; }
FORCE float to_float(Bf16 x) { return bits_to_float((uint32_t)x.bits << 16); }
FORCE float to_float(F16 x) { return (float)x.value; }

// Rounds to nearest, ties to even, as XLA converts. A NaN stays a NaN.
FORCE void round_to(float x, float* out) { *out = x; }
FORCE void round_to(float x, Bf16* out) {
  uint32_t u = float_to_bits(x);
  uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  out->bits = (uint16_t)(x != x ? (u >> 16) | 0x40 : rounded);
}
FORCE void round_to(float x, F16* out) { out->value = (Half)x; }

template <typename T>
FORCE float rounded(float x) {
  T t;
  round_to(x, &t);
  return to_float(t);
}

FORCE Vf splat(float x) { return x - (Vf){}; }
FORCE Vf select(Vi mask, Vf yes, Vf no) { return (Vf)(((Vi)yes & mask) | ((Vi)no & ~mask)); }
// Where one of the two is NaN, the result is `b`.
FORCE Vf vmax(Vf a, Vf b) { return select(a > b, a, b); }
FORCE Vf vmin(Vf a, Vf b) { return select(a < b, a, b); }

FORCE float sum(Vf v) {
  float total[LANES];
  __builtin_memcpy(total, &v, sizeof(v));
#pragma GCC unroll 16
  for (int i = 1; i < LANES; i++) total[0] += total[i];
  return total[0];
}

// e^x to about 1 ulp for x in [-87, 88]; 0 below and e^88 above; NaN for NaN. Cody-Waite reduction to |r| <= ln(2)/2 and a
// degree-6 polynomial (Cephes expf).
FORCE Vf vexp(Vf x) {
  Vi tiny = x < -87.0f;
  x = vmin(splat(88.0f), vmax(splat(-87.0f), x));
  Vf shifted = x * 1.44269504f + 12583039.0f;  // adding 1.5 * 2^23 rounds to an integer in the low bits, and 127 biases it
  Vf n = shifted - 12583039.0f;
  Vf r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  Vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  Vf power = (Vf)((Vi)shifted << 23);  // the integer moves from the mantissa into the exponent: 2^n
  return select(tiny, splat(0.0f), p * power);
}

// tanh x: an odd polynomial near 0 (Cephes tanhf), where 1 - 2 / (e^2x + 1) would cancel, that formula elsewhere.
FORCE Vf vtanh(Vf x) {
  Vf magnitude = (Vf)((Vi)x & 0x7fffffff);
  Vf z = x * x;
  Vf p = splat(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  Vf near = p * z * x + x;
  Vf far = 1.0f - 2.0f / (vexp(vmin(magnitude, splat(20.0f)) * 2.0f) + 1.0f);
  far = (Vf)((Vi)far | ((Vi)x & (Vi)splat(-0.0f)));
  return select(magnitude >= 0.625f, far, near);  // NaN for NaN
}

FORCE Vf vactivate(int64_t kind, Vf x) {
  if (kind == 0) return x / (1.0f + vexp(-x));
  if (kind == 2) return 0.5f * x * (1.0f + vtanh(0.79788456080286535588f * (x + 0.044715f * x * x * x)));
  if (kind == 3) return vmax(splat(0.0f), x);  // NaN for NaN
  float parts[LANES];  // gelu: no vector erf; no model here uses it in its hot path
  store(parts, x);
  for (int i = 0; i < LANES; i++) parts[i] = 0.5f * parts[i] * (1.0f + __builtin_erff(parts[i] * 0.70710678118654752440f));
  return load(parts);
}
