// Attention of one request's query heads that share a key/value head, over one part of its context.
//
// Keys and values are read once for all query heads of the group; a running softmax keeps a maximum and a sum per head.
// The part that ends with the current token also appends that token's key and value to the cache.

constexpr int kPositions = 64;  // of the context, handled at a time

template <typename KV>
struct AttentionTask {
  int64_t row;    // request
  int64_t head;   // key/value head
  int64_t split;  // part of the context
  const KV* keys;  // [capacity, head_dim] of this request, layer and head
  const KV* values;
};

// Scores of `n` positions for one head: dot products of q [d] (f32, rounded to the cache's dtype) with keys [n, d].
template <typename KV>
FORCE void score_block(const float* q, const KV* keys, int64_t d, int64_t n, float* out) {
  for (int64_t t = 0; t < n; t++) {
    const KV* k = keys + t * d;
    Vf a = {}, b = {};
    int64_t i = 0;
    for (; i + 2 * LANES <= d; i += 2 * LANES) {
      a += load(q + i) * load(k + i);
      b += load(q + i + LANES) * load(k + i + LANES);
    }
    if (i + LANES <= d) {
      a += load(q + i) * load(k + i);
      i += LANES;
    }
    float total = sum(a + b);
    for (; i < d; i++) total += q[i] * to_float(k[i]);
    out[t] = total;
  }
}

// acc [d] = acc * scale + sum over n positions of p[t] * values[t].
template <typename KV>
FORCE void value_block(const float* p, const KV* values, int64_t d, int64_t n, float scale, float* acc) {
  int64_t i = 0;
  for (; i + 4 * LANES <= d; i += 4 * LANES) {
    Vf a0 = load(acc + i) * scale, a1 = load(acc + i + LANES) * scale;
    Vf a2 = load(acc + i + 2 * LANES) * scale, a3 = load(acc + i + 3 * LANES) * scale;
    for (int64_t t = 0; t < n; t++) {
      const KV* v = values + t * d + i;
      a0 += p[t] * load(v);
      a1 += p[t] * load(v + LANES);
      a2 += p[t] * load(v + 2 * LANES);
      a3 += p[t] * load(v + 3 * LANES);
    }
    store(acc + i, a0);
    store(acc + i + LANES, a1);
    store(acc + i + 2 * LANES, a2);
    store(acc + i + 3 * LANES, a3);
  }
  for (; i + LANES <= d; i += LANES) {
    Vf a = load(acc + i) * scale;
    for (int64_t t = 0; t < n; t++) a += p[t] * load(values + t * d + i);
    store(acc + i, a);
  }
  for (; i < d; i++) {
    float a = acc[i] * scale;
    for (int64_t t = 0; t < n; t++) a += p[t] * to_float(values[t * d + i]);
    acc[i] = a;
  }
}

// In place: scores -> probabilities relative to `top`, returns their sum. Entries past n are untouched.
FORCE float exponentials(float* s, int64_t n, float top) {
  float total = 0.0f;
  for (int64_t t = 0; t < n; t += LANES) {
    Vf e = vexp(load(s + t) - top);  // s has room for whole vectors
    store(s + t, e);
  }
  for (int64_t t = 0; t < n; t++) total += s[t];
  return total;
}

// Takes one head of a request from the QKV phase's output: per-head norm, rotation.
FORCE void prepare_head(const Program& p, const float* in, const float* norm, const float* angles, float* out) {
  __builtin_memcpy(out, in, (size_t)p.head_dim * 4);
  if (p.qk_norm == 1) rms_norm(p, out, norm, p.head_dim, out);
  if (angles) rotate(out, angles, p.rotary_dim / 2);
}

// scratch: floats [group * head_dim + kPositions + LANES + head_dim]
template <typename KV>
static void attend(Job& job, int64_t layer, int64_t row, int64_t head, int64_t split, const float* qkv,
                   const float* constants, const float* angles, float* scratch) {
  const Program& p = job.program;
  const int64_t d = p.head_dim, group = p.num_heads / p.num_kv_heads, position = job.position[row];
  const int64_t cache = (((row * p.num_layers + layer) * p.num_kv_heads) + head) * job.capacity * d;
  KV* keys = (KV*)job.k_cache + cache;
  KV* values = (KV*)job.v_cache + cache;

  const int64_t window = p.layers[layer].window;
  const int64_t first = window > 0 && position + 1 > window ? position + 1 - window : 0;
  const int64_t visible = position + 1 - first;
  const int64_t begin = first + visible * split / job.splits, end = first + visible * (split + 1) / job.splits;

  float* q = scratch;
  float* scores = q + group * d;
  float* fresh = scores + kPositions + LANES;
  if (end == position + 1) {  // never empty: the last part always has the current token
    const float* k_in = qkv + p.q_size() + head * d;
    prepare_head(p, k_in, constants + p.k_norm, angles, fresh);
    for (int64_t i = 0; i < d; i++) round_to(fresh[i], keys + position * d + i);
    const float* v_in = k_in + p.kv_size();
    for (int64_t i = 0; i < d; i++) round_to(v_in[i], values + position * d + i);
  }

  const int64_t out_row = (split * job.batch + row) * p.num_heads + head * group;
  float* attended = job.shared.attended + out_row * d;
  float* softmax = job.shared.softmax + out_row * 2;
  for (int64_t j = 0; j < group; j++) {
    prepare_head(p, qkv + (head * group + j) * d, constants + p.q_norm, angles, q + j * d);
    for (int64_t i = 0; i < d; i++) q[j * d + i] = rounded<KV>(q[j * d + i]);
    for (int64_t i = 0; i < d; i++) attended[j * d + i] = 0.0f;
    softmax[2 * j] = -__builtin_inff();
    softmax[2 * j + 1] = 0.0f;
  }
  for (int64_t t = begin; t < end; t += kPositions) {
    const int64_t n = end - t < kPositions ? end - t : kPositions;
    for (int64_t j = 0; j < group; j++) {
      score_block(q + j * d, keys + t * d, d, n, scores);
      float top = softmax[2 * j];
      for (int64_t i = 0; i < n; i += LANES) {
        Vf s = load(scores + i) * p.attn_scale;
        if (p.attn_softcap > 0.0f) s = p.attn_softcap * vtanh(s / p.attn_softcap);
        store(scores + i, s);
      }
      for (int64_t i = 0; i < n; i++) top = scores[i] > top ? scores[i] : top;
      float scale = t == begin ? 0.0f : __builtin_expf(softmax[2 * j] - top);
      float total = exponentials(scores, n, top);
      softmax[2 * j] = top;
      softmax[2 * j + 1] = softmax[2 * j + 1] * scale + total;
      value_block(scores, values + t * d, d, n, scale, attended + j * d);
    }
  }
}

// Joins the parts of one request: out [q_size].
FORCE void combine_splits(const Job& job, int64_t row, float* out) {
  const Program& p = job.program;
  const int64_t d = p.head_dim;
  for (int64_t h = 0; h < p.num_heads; h++, out += d) {
    const int64_t stride = job.batch * p.num_heads, index = row * p.num_heads + h;
    float top = -__builtin_inff(), total = 0.0f;
    for (int64_t s = 0; s < job.splits; s++) {
      float m = job.shared.softmax[(s * stride + index) * 2];
      top = m > top ? m : top;
    }
    for (int64_t i = 0; i < d; i++) out[i] = 0.0f;
    for (int64_t s = 0; s < job.splits; s++) {
      const float* part = job.shared.softmax + (s * stride + index) * 2;
      if (part[1] == 0.0f) continue;  // an empty part
      float weight = __builtin_expf(part[0] - top);
      total += part[1] * weight;
      const float* values = job.shared.attended + (s * stride + index) * d;
      for (int64_t i = 0; i < d; i++) out[i] += values[i] * weight;
    }
    for (int64_t i = 0; i < d; i++) out[i] /= total;
  }
}
