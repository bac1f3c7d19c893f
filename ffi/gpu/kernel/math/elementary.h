// Elementary functions that give the same bits on every machine: only +, -, *, / and explicit fma, each correctly
// rounded. Compile without contraction. NaN in gives NaN out. The errors in units in the last place (ulp) are measured
// in tests/test_gpu_math.py; polynomials are minimax fits unless said otherwise.
#pragma once

#include "arch/arch.h"

namespace mk {

MK_DEVICE float magnitude(float x) { return arch::as_f32(arch::as_u32(x) & 0x7fffffffu); }
MK_DEVICE float with_sign_of(float x, float sign) {
  return arch::as_f32((arch::as_u32(x) & 0x7fffffffu) | (arch::as_u32(sign) & 0x80000000u));
}

// e^x within 1.1 ulp, subnormal results included. e^(x) = 2^n e^r with |r| <= log(2) / 2.
MK_DEVICE float exp_(float x) {
  float c = x < -104.0f ? -104.0f : x;
  c = c > 89.0f ? 89.0f : c;
  const float shifted = arch::fma(c, 1.44269502f, 12582912.0f);  // 1.5 * 2^23: the sum is rounded to an integer
  const float n = shifted - 12582912.0f;
  float r = arch::fma(n, -0.693145752f, c);  // log(2) in two parts, the first of 15 bits
  r = arch::fma(n, -1.42860677e-6f, r);
  float p = 1.38210389e-3f;
  p = arch::fma(p, r, 8.36867094e-3f);
  p = arch::fma(p, r, 4.16682623e-2f);
  p = arch::fma(p, r, 1.66665211e-1f);
  p = arch::fma(p, r, 4.9999994e-1f);
  p = arch::fma(p * r, r, r) + 1.0f;
  // 2^n in two factors, as neither 2^128 nor 2^-150 is a normal number.
  const u32 exponent = arch::as_u32(shifted) - 0x4b400000u;
  const u32 half = (exponent + 256u) / 2u - 128u;
  return p * arch::as_f32((half + 127u) << 23) * arch::as_f32((exponent - half + 127u) << 23);
}

// e^x within a few ulp, in half the time; 0 below -150, and no more than e^88.
MK_DEVICE float fast_exp(float x) {
  float c = x < -150.0f ? -150.0f : x;
  c = c > 88.0f ? 88.0f : c;
  const float high = c * 1.44269502f;
  const float low = arch::fma(c, 1.92596303e-8f, arch::fma(c, 1.44269502f, -high));  // log2(e) in two parts
  const float y = arch::fast_exp2(high);
  return arch::fma(y, low * 0.693147181f, y);
}

// Natural logarithm within 1 ulp; -inf at 0, NaN below. log(x) = n log(2) + log(1 + f) with 2/3 <= 1 + f < 4/3.
MK_DEVICE float log_(float x) {
  const bool subnormal = x < 1.17549435e-38f;
  const u32 bits = arch::as_u32(subnormal ? x * 8388608.0f : x);
  const u32 exponent = (bits - 0x3f2aaaabu) & 0xff800000u;
  const float f = arch::as_f32(bits - exponent) - 1.0f;
  const float n = (float)((i32)exponent / 8388608 - (subnormal ? 23 : 0));
  float p = -1.28856719e-1f;
  p = arch::fma(p, f, 1.3986899e-1f);
  p = arch::fma(p, f, -1.21857122e-1f);
  p = arch::fma(p, f, 1.40053064e-1f);
  p = arch::fma(p, f, -1.66803762e-1f);
  p = arch::fma(p, f, 2.0010446e-1f);
  p = arch::fma(p, f, -2.49998003e-1f);
  p = arch::fma(p, f, 3.33332151e-1f);
  const float square = f * f;
  p = arch::fma(p, f, -0.5f);
  p = arch::fma(n, 1.42860677e-6f, p * square);
  const float result = arch::fma(n, 6.93145752e-1f, f + p);
  if (x > 0.0f && x <= 3.40282347e38f) return result;
  if (x == 0.0f) return arch::as_f32(0xff800000u);
  return x > 0.0f ? x : arch::as_f32(0x7fc00000u);
}

// Within 2 ulp.
MK_DEVICE float tanh_(float x) {
  const float a = magnitude(x);
  const float s = x * x;
  float p = 2.18419335e-3f;
  p = arch::fma(p, s, -8.22062977e-3f);
  p = arch::fma(p, s, 2.17174683e-2f);
  p = arch::fma(p, s, -5.39496951e-2f);
  p = arch::fma(p, s, 1.33332282e-1f);
  p = arch::fma(p, s, -3.33333313e-1f);
  const float near = arch::fma(p * s, a, a);
  const float far = 1.0f - 2.0f / (exp_(2.0f * a) + 1.0f);
  return with_sign_of(a < 0.6f ? near : far, x);
}

// The error function within 2 ulp. Away from 0 it is 1 - e^-p, p a fit of -log(erfc).
MK_DEVICE float erf_(float x) {
  const float a = magnitude(x);
  const float s = x * x;
  float p = 7.97487446e-5f;
  p = arch::fma(p, s, -8.04470794e-4f);
  p = arch::fma(p, s, 5.19199343e-3f);
  p = arch::fma(p, s, -2.68555954e-2f);
  p = arch::fma(p, s, 1.12836242e-1f);
  p = arch::fma(p, s, -3.76126289e-1f);
  p = arch::fma(p, s, 1.28379166e-1f);
  const float near = arch::fma(p, a, a);
  const float c = a > 4.0f ? 4.0f : a;  // erf(4) rounds to 1
  float q = 2.1099333e-5f;
  q = arch::fma(q, c, -4.34497633e-4f);
  q = arch::fma(q, c, 4.17117542e-3f);
  q = arch::fma(q, c, -2.51196064e-2f);
  q = arch::fma(q, c, 1.08280234e-1f);
  q = arch::fma(q, c, 6.33346856e-1f);
  q = arch::fma(q, c, 1.12951493f);
  q = arch::fma(q, c, -1.74683140e-4f);
  const float far = 1.0f - exp_(-q);
  return with_sign_of(a < 0.93f ? near : far, x);
}

// Sine and cosine of an angle in radians, within 1 ulp for |angle| <= 2^24. Beyond 2^30 they are meaningless.
MK_DEVICE void sin_cos(float angle, float* sin, float* cos) {
  const double x = (double)angle;
  const double n = arch::fma(x, 0.63661977236758134, 6755399441055744.0) - 6755399441055744.0;  // 1.5 * 2^52
  double r = arch::fma(n, -1.5707963267948966, x);  // pi / 2 in two parts
  r = arch::fma(n, -6.123233995736766e-17, r);
  const double s = r * r;
  // Taylor series on |r| <= pi / 4, up to r^11 and r^12.
  double p = -2.5052108385441720e-8;
  p = arch::fma(p, s, 2.7557319223985893e-6);
  p = arch::fma(p, s, -1.9841269841269841e-4);
  p = arch::fma(p, s, 8.3333333333333333e-3);
  p = arch::fma(p, s, -1.6666666666666667e-1);
  const float sine = (float)arch::fma(p * s, r, r);
  double q = 2.0876756987868099e-9;
  q = arch::fma(q, s, -2.7557319223985891e-7);
  q = arch::fma(q, s, 2.4801587301587302e-5);
  q = arch::fma(q, s, -1.3888888888888889e-3);
  q = arch::fma(q, s, 4.1666666666666667e-2);
  q = arch::fma(q, s, -0.5);
  const float cosine = (float)arch::fma(q, s, 1.0);
  const u32 quadrant = (u32)(i32)(n > -1e9 && n < 1e9 ? n : 0.0) & 3u;
  const float a = (quadrant & 1u) ? cosine : sine;
  const float b = (quadrant & 1u) ? sine : cosine;
  *sin = (quadrant & 2u) ? -a : a;
  *cos = quadrant == 1u || quadrant == 2u ? -b : b;
}

}  // namespace mk
