// Tiles of 16 rows times one to a few vectors: the part of a decode that reads the weights.
//
// A tile is [cols / g][16 rows][g]: lanes are rows, so products need no sum across lanes, and the order of additions of a
// row depends neither on the batch nor on the number of threads.

// Distance ahead of the loads at which lines are requested. Hardware prefetchers stop at 4 KiB pages; this does not.
constexpr int64_t kPrefetchBytes = 4096;

#if defined(__AVX512BF16__)
// Activations are kept as bf16 pairs, the second operand of vdpbf16ps.
constexpr bool kBf16Pairs = true;
#else
constexpr bool kBf16Pairs = false;
#endif

// Chains of independent sums per row, to hide the latency of a multiply-add; and vectors per pass over a tile.
#if LANES == 16
constexpr int kChains = 4, kBlock = 4;
#elif LANES == 8
constexpr int kChains = 2, kBlock = 2;
#else
constexpr int kChains = 1, kBlock = 2;
#endif
constexpr int kParts = 16 / LANES;

// Activations of one row as the kernels read them: f32 values already rounded to the weights' dtype, or bf16 pairs.
template <typename W>
struct Activations {
  using Element = float;
  static constexpr int64_t floats(int64_t cols) { return cols; }
};
#if defined(__AVX512BF16__)
template <>
struct Activations<Bf16> {
  using Element = uint16_t;
  static constexpr int64_t floats(int64_t cols) { return (cols + 1) / 2; }
};
#endif

// Rounds `count` values to the weights' dtype and zero-fills up to `cols`.
template <typename W>
FORCE void pack_activations(const float* x, int64_t count, int64_t cols, float* out) {
  int64_t i = 0;
#if defined(__AVX512BF16__)
  if constexpr (__is_same(W, Bf16)) {
    auto* pairs = (uint16_t*)out;
    for (; i + 16 <= count; i += 16) {
      __m256bh h = _mm512_cvtneps_pbh(_mm512_loadu_ps(x + i));
      __builtin_memcpy(pairs + i, &h, 32);
    }
    for (; i < count; i++) {
      Bf16 b;
      round_to(x[i], &b);
      pairs[i] = b.bits;
    }
    for (; i < cols; i++) pairs[i] = 0;
    return;
  }
#endif
  for (; i < count; i++) out[i] = rounded<W>(x[i]);
  for (; i < cols; i++) out[i] = 0.0f;
}

// One step of one chain: all 16 rows, one column (f32, f16) or two (bf16).
template <typename W, int NB>
FORCE void accumulate(const W* w, const float* const* x, int64_t group, Vf (&acc)[NB][kParts]) {
  if constexpr (__is_same(W, Bf16)) {
#if defined(__AVX512BF16__)
    __m512bh weights = (__m512bh)_mm512_loadu_si512(w + group * 32);
#pragma GCC unroll 16
    for (int b = 0; b < NB; b++) {
      __m512bh pair = (__m512bh)_mm512_set1_epi32(((const int32_t*)x[b])[group]);
      acc[b][0] = (Vf)_mm512_dpbf16_ps((__m512)acc[b][0], weights, pair);
    }
#else
#pragma GCC unroll 16
    for (int part = 0; part < kParts; part++) {
      Vu both = load_as<Vu>(w + group * 32 + part * LANES * 2);
      Vf first = (Vf)(both << 16), second = (Vf)(both & 0xffff0000u);
#pragma GCC unroll 16
      for (int b = 0; b < NB; b++) {
        acc[b][part] += first * x[b][2 * group];
        acc[b][part] += second * x[b][2 * group + 1];
      }
    }
#endif
  } else {
#pragma GCC unroll 16
    for (int part = 0; part < kParts; part++) {
      Vf weights = load(w + group * 16 + part * LANES);
#pragma GCC unroll 16
      for (int b = 0; b < NB; b++) acc[b][part] += weights * x[b][group];
    }
  }
}

// out[b][0..15] = tile times x[b], for NB vectors.
template <typename W, int NB>
FORCE void multiply_block(const W* tile, int64_t cols, const float* const* x, float (*out)[16]) {
  constexpr int64_t kGroup = __is_same(W, Bf16) ? 2 : 1;
  constexpr int64_t kStep = 16 * kGroup;  // elements of one group
  const int64_t groups = cols / kGroup;
  Vf acc[kChains][NB][kParts] = {};
  int64_t i = 0;
  for (; i + kChains <= groups; i += kChains) {
#pragma GCC unroll 16
    for (int c = 0; c < kChains; c++) {
      __builtin_prefetch((const char*)(tile + (i + c) * kStep) + kPrefetchBytes);
      accumulate<W, NB>(tile, x, i + c, acc[c]);
    }
  }
  for (int c = 0; i < groups; i++, c++) accumulate<W, NB>(tile, x, i, acc[c]);
#pragma GCC unroll 16
  for (int b = 0; b < NB; b++) {
#pragma GCC unroll 16
    for (int part = 0; part < kParts; part++) {
      Vf total = acc[0][b][part];
#pragma GCC unroll 16
      for (int c = 1; c < kChains; c++) total += acc[c][b][part];
      store(out[b] + part * LANES, total);
    }
  }
}

// out[b][0..15] = tile times x[b] for any number of vectors, a few at a time: the first pass brings the tile into the
// cache, the others find it there.
template <typename W>
FORCE void multiply_tile(const W* tile, int64_t cols, const float* const* x, int64_t count, float (*out)[16]) {
  int64_t b = 0;
  for (; b + kBlock <= count; b += kBlock) multiply_block<W, kBlock>(tile, cols, x + b, out + b);
#if LANES == 16
  if (count - b == 3) return multiply_block<W, 3>(tile, cols, x + b, out + b);
  if (count - b == 2) return multiply_block<W, 2>(tile, cols, x + b, out + b);
#endif
  if (count - b == 1) multiply_block<W, 1>(tile, cols, x + b, out + b);
}
