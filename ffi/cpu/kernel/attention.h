// Attention of one request's query heads that share a key/value head, over one part of its context.
//
// Keys and values are read once for all query heads of the group; a running softmax keeps a maximum and a sum per head.
// The part that ends with the current token also appends that token's key and value to the cache.

constexpr int kPositions = 64;  // of the context, handled at a time

constexpr int kHeads = 4;  // query heads that share the loads of a key or value

// The four sums of four vectors' lanes.
FORCE void sum4(const Vf (&v)[4], float* out) {
#if LANES == 16
#define SHUFFLE(a, b, i) \
  __builtin_shufflevector(a, b, i, i + 16, i + 2, i + 18, i + 4, i + 20, i + 6, i + 22, i + 8, i + 24, i + 10, i + 26, \
                          i + 12, i + 28, i + 14, i + 30)
#define SHUFFLE2(a, b, i)                                                                                             \
  __builtin_shufflevector(a, b, i, i + 1, i + 16, i + 17, i + 4, i + 5, i + 20, i + 21, i + 8, i + 9, i + 24, i + 25, \
                          i + 12, i + 13, i + 28, i + 29)
#elif LANES == 8
#define SHUFFLE(a, b, i) __builtin_shufflevector(a, b, i, i + 8, i + 2, i + 10, i + 4, i + 12, i + 6, i + 14)
#define SHUFFLE2(a, b, i) __builtin_shufflevector(a, b, i, i + 1, i + 8, i + 9, i + 4, i + 5, i + 12, i + 13)
#else
#define SHUFFLE(a, b, i) __builtin_shufflevector(a, b, i, i + 4, i + 2, i + 6)
#define SHUFFLE2(a, b, i) __builtin_shufflevector(a, b, i, i + 1, i + 4, i + 5)
#endif
  Vf low = SHUFFLE(v[0], v[1], 0) + SHUFFLE(v[0], v[1], 1);   // lanes: sums of pairs of v0, v1, v0, v1, ...
  Vf high = SHUFFLE(v[2], v[3], 0) + SHUFFLE(v[2], v[3], 1);  // likewise of v2, v3
  Vf all = SHUFFLE2(low, high, 0) + SHUFFLE2(low, high, 2);   // v0, v1, v2, v3 again and again
#undef SHUFFLE
#undef SHUFFLE2
  typedef float V4 __attribute__((vector_size(16)));
  V4 quarters[LANES / 4];
  __builtin_memcpy(quarters, &all, sizeof(all));
#if LANES == 16
  V4 total = (quarters[0] + quarters[1]) + (quarters[2] + quarters[3]);
#elif LANES == 8
  V4 total = quarters[0] + quarters[1];
#else
  V4 total = quarters[0];
#endif
  __builtin_memcpy(out, &total, sizeof(total));
}

// Queries in the form that score_block multiplies keys with: [head_dim] f32, or bf16 where there is an instruction for it.
#if defined(__AVX512BF16__)
template <typename KV>
constexpr bool kPairedKeys = __is_same(KV, Bf16);
#else
template <typename KV>
constexpr bool kPairedKeys = false;
#endif

// Dot products of NH queries with NT consecutive keys (NT: 1 or 4): out[j * stride + t].
template <int NH, int NT, typename KV>
FORCE void score_keys(const float* q, const KV* keys, int64_t d, float* out, int64_t stride) {
  Vf acc[NH][4] = {};
  int64_t i = 0;
#if defined(__AVX512BF16__)
  if constexpr (kPairedKeys<KV>) {
    for (; i + 32 <= d; i += 32) {
#pragma GCC unroll 4
      for (int j = 0; j < NH; j++) {
        __m512bh query = (__m512bh)_mm512_loadu_si512((const uint16_t*)(q + j * d) + i);
#pragma GCC unroll 4
        for (int t = 0; t < NT; t++) {
          __m512bh key = (__m512bh)_mm512_loadu_si512(keys + t * d + i);
          acc[j][t] = (Vf)_mm512_dpbf16_ps((__m512)acc[j][t], query, key);
        }
      }
    }
    for (; i < d; i++) {  // head sizes that are no multiple of 32
      for (int j = 0; j < NH; j++) {
        Bf16 query;
        __builtin_memcpy(&query, (const uint16_t*)(q + j * d) + i, 2);
        for (int t = 0; t < NT; t++) acc[j][t][0] += to_float(query) * to_float(keys[t * d + i]);
      }
    }
  }
#endif
  if constexpr (!kPairedKeys<KV>) {
    for (; i + LANES <= d; i += LANES) {
      Vf key[4];
#pragma GCC unroll 4
      for (int t = 0; t < NT; t++) key[t] = load(keys + t * d + i);
#pragma GCC unroll 4
      for (int j = 0; j < NH; j++) {
        Vf query = load(q + j * d + i);
#pragma GCC unroll 4
        for (int t = 0; t < NT; t++) acc[j][t] += query * key[t];
      }
    }
    for (; i < d; i++) {
      for (int j = 0; j < NH; j++) {
        for (int t = 0; t < NT; t++) acc[j][t][0] += q[j * d + i] * to_float(keys[t * d + i]);
      }
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < NH; j++) {
    float sums[4];
    sum4(acc[j], sums);
    for (int t = 0; t < NT; t++) out[j * stride + t] = sums[t];
  }
}

// Scores of n positions for NH heads, [NH][kScoreStride]. The values of the same positions are requested meanwhile.
constexpr int64_t kScoreStride = kPositions + LANES;
template <int NH, typename KV>
FORCE void score_block(const float* q, const KV* keys, const KV* values, int64_t d, int64_t n, float* out) {
  int64_t t = 0;
  for (; t + 4 <= n; t += 4) {
    for (int64_t ahead = 0; ahead < 4 * d * (int64_t)sizeof(KV); ahead += 64) {
      __builtin_prefetch((const char*)(values + t * d) + ahead);
    }
    score_keys<NH, 4>(q, keys + t * d, d, out + t, kScoreStride);
  }
  for (; t < n; t++) score_keys<NH, 1>(q, keys + t * d, d, out + t, kScoreStride);
}

// acc [NH][d] = acc * scale[j] + sum over n positions of p[j][t] * values[t]. The keys that follow are requested meanwhile.
template <int NH, int NV, typename KV>
FORCE void value_columns(const float* p, const KV* values, int64_t d, int64_t n, const float* scale, float* acc) {
  Vf sums[NH][NV];
#pragma GCC unroll 4
  for (int j = 0; j < NH; j++) {
#pragma GCC unroll 4
    for (int c = 0; c < NV; c++) sums[j][c] = load(acc + j * d + c * LANES) * scale[j];
  }
  for (int64_t t = 0; t < n; t++) {
    Vf value[NV];
#pragma GCC unroll 4
    for (int c = 0; c < NV; c++) value[c] = load(values + t * d + c * LANES);
#pragma GCC unroll 4
    for (int j = 0; j < NH; j++) {
#pragma GCC unroll 4
      for (int c = 0; c < NV; c++) sums[j][c] += p[j * kScoreStride + t] * value[c];
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < NH; j++) {
#pragma GCC unroll 4
    for (int c = 0; c < NV; c++) store(acc + j * d + c * LANES, sums[j][c]);
  }
}

template <int NH, typename KV>
FORCE void value_block(const float* p, const KV* values, const KV* next_keys, int64_t d, int64_t n, const float* scale,
                       float* acc) {
  for (int64_t ahead = 0; ahead < n * d * (int64_t)sizeof(KV); ahead += 64) {
    __builtin_prefetch((const char*)next_keys + ahead);
  }
  int64_t i = 0;
  for (; i + 2 * LANES <= d; i += 2 * LANES) value_columns<NH, 2>(p, values + i, d, n, scale, acc + i);
  for (; i + LANES <= d; i += LANES) value_columns<NH, 1>(p, values + i, d, n, scale, acc + i);
  for (; i < d; i++) {
    for (int j = 0; j < NH; j++) {
      float total = acc[j * d + i] * scale[j];
      for (int64_t t = 0; t < n; t++) total += p[j * kScoreStride + t] * to_float(values[t * d + i]);
      acc[j * d + i] = total;
    }
  }
}

// Takes one head of a request from the QKV phase's output: per-head norm, rotation.
FORCE void prepare_head(const Program& p, const float* in, const float* norm, const float* angles, float* out) {
  __builtin_memcpy(out, in, (size_t)p.head_dim * 4);
  if (p.qk_norm == 1) rms_norm(p, out, norm, p.head_dim, out);
  if (angles) rotate(out, angles, p.rotary_dim / 2);
}

// Runs NH heads over the positions begin to end - 1: unnormalised sums to attended [NH][d], (maximum, sum) to softmax.
template <int NH, typename KV>
static void attend_heads(const Program& p, const float* q, const KV* keys, const KV* values, int64_t begin, int64_t end,
                         float* scores, float* attended, float* softmax) {
  const int64_t d = p.head_dim;
  for (int j = 0; j < NH; j++) {
    for (int64_t i = 0; i < d; i++) attended[j * d + i] = 0.0f;
    softmax[2 * j] = -__FLT_MAX__;  // not -inf: scores of -inf have no weight, even where there are no others
    softmax[2 * j + 1] = 0.0f;
  }
  for (int64_t t = begin; t < end; t += kPositions) {
    const int64_t n = end - t < kPositions ? end - t : kPositions;
    score_block<NH>(q, keys + t * d, values + t * d, d, n, scores);
    float scale[NH];
    for (int j = 0; j < NH; j++) {
      float* s = scores + j * kScoreStride;
      for (int64_t i = n; i % LANES; i++) s[i] = -__builtin_inff();  // up to whole vectors
      Vf tops = splat(softmax[2 * j]);
      for (int64_t i = 0; i < n; i += LANES) {
        Vf v = load(s + i) * p.attn_scale;
        if (p.attn_softcap > 0.0f) v = p.attn_softcap * vtanh(v / p.attn_softcap);
        store(s + i, v);
      }
      // A soft-cap makes -inf finite again.
      for (int64_t i = n; i % LANES; i++) s[i] = -__builtin_inff();
      for (int64_t i = 0; i < n; i += LANES) tops = vmax(tops, load(s + i));
      float top = tops[0];
      for (int i = 1; i < LANES; i++) top = tops[i] > top ? tops[i] : top;
      Vf sums = {};
      for (int64_t i = 0; i < n; i += LANES) {
        Vf e = vexp(load(s + i) - top);
        store(s + i, e);
        sums += e;
      }
      scale[j] = t == begin ? 0.0f : __builtin_expf(softmax[2 * j] - top);
      softmax[2 * j] = top;
      softmax[2 * j + 1] = softmax[2 * j + 1] * scale[j] + sum(sums);
    }
    value_block<NH>(scores, values + t * d, keys + (t + n) * d, d, n, scale, attended);
  }
}

// What a request's token sees in a layer: positions first to end - 1, in `splits` parts.
struct Context {
  int64_t first, end, first_split, splits;

  Context(const Job& job, int64_t layer, int64_t row) {
    const int64_t window = job.program.layers[layer].window;
    end = job.position[row] + 1;
    first = window > 0 && end > window ? end - window : 0;
    first_split = first / kSplitPositions;
    splits = (end - 1) / kSplitPositions + 1 - first_split;
  }
  int64_t begin_of(int64_t split) const {
    const int64_t begin = (first_split + split) * kSplitPositions;
    return begin < first ? first : begin;
  }
  int64_t end_of(int64_t split) const { return split + 1 == splits ? end : (first_split + split + 1) * kSplitPositions; }
};

// scratch: floats [(group + 1) * head_dim + kHeads * kScoreStride]
template <typename KV>
static void attend(Job& job, const Context& context, int64_t layer, int64_t row, int64_t head, int64_t split,
                   const float* qkv, const float* constants, const float* angles, float* scratch) {
  const Program& p = job.program;
  const int64_t d = p.head_dim, group = p.num_heads / p.num_kv_heads, position = job.position[row];
  const int64_t cache = (((row * p.num_layers + layer) * p.num_kv_heads) + head) * job.capacity * d;
  KV* keys = (KV*)job.k_cache + cache;
  KV* values = (KV*)job.v_cache + cache;

  const int64_t begin = context.begin_of(split), end = context.end_of(split);
  float* scores = scratch;
  float* fresh = scores + kHeads * kScoreStride;
  float* q = fresh + d;
  if (end == position + 1) {  // the last part always has the current token
    const float* k_in = qkv + p.q_size() + head * d;
    prepare_head(p, k_in, constants + p.k_norm, angles, fresh);
    for (int64_t i = 0; i < d; i++) round_to(fresh[i], keys + position * d + i);
    const float* v_in = k_in + p.kv_size();
    for (int64_t i = 0; i < d; i++) round_to(v_in[i], values + position * d + i);
  }
  for (int64_t j = 0; j < group; j++) {
    prepare_head(p, qkv + (head * group + j) * d, constants + p.q_norm, angles, fresh);
    if constexpr (kPairedKeys<KV>) {
      for (int64_t i = 0; i < d; i++) round_to(fresh[i], (KV*)(q + j * d) + i);
    } else {
      for (int64_t i = 0; i < d; i++) q[j * d + i] = rounded<KV>(fresh[i]);
    }
  }

  const int64_t out_row = (split * job.batch + row) * p.num_heads + head * group;
  float* attended = job.shared.attended + out_row * d;
  float* softmax = job.shared.softmax + out_row * 2;
  for (int64_t j = 0; j < group; j += kHeads) {
    auto run = group - j >= 4   ? attend_heads<4, KV>
               : group - j == 3 ? attend_heads<3, KV>
               : group - j == 2 ? attend_heads<2, KV>
                                : attend_heads<1, KV>;
    run(p, q + j * d, keys, values, begin, end, scores, attended + j * d, softmax + j * 2);
  }
}

// Joins the parts of one request: out [q_size].
FORCE void combine_splits(const Job& job, const Context& context, int64_t row, float* out) {
  const Program& p = job.program;
  const int64_t d = p.head_dim;
  for (int64_t h = 0; h < p.num_heads; h++, out += d) {
    const int64_t stride = job.batch * p.num_heads, index = row * p.num_heads + h;
    float top = -__builtin_inff(), total = 0.0f;
    for (int64_t s = 0; s < context.splits; s++) {
      float m = job.shared.softmax[(s * stride + index) * 2];
      top = m > top ? m : top;
    }
    for (int64_t i = 0; i < d; i++) out[i] = 0.0f;
    for (int64_t s = 0; s < context.splits; s++) {
      const float* part = job.shared.softmax + (s * stride + index) * 2;
      float weight = __builtin_expf(part[0] - top);
      total += part[1] * weight;
      const float* values = job.shared.attended + (s * stride + index) * d;
      for (int64_t i = 0; i < d; i++) out[i] += values[i] * weight;
    }
    total = total < __FLT_MIN__ ? __FLT_MIN__ : total;  // and a NaN stays one
    for (int64_t i = 0; i < d; i++) out[i] /= total;
  }
}
