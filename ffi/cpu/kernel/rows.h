// Work on one row of activations: norms, rotation.

FORCE float sum_of_squares(const float* x, int64_t n) {
  Vf a = {}, b = {};
  int64_t i = 0;
  for (; i + 2 * LANES <= n; i += 2 * LANES) {
    Vf u = load(x + i), v = load(x + i + LANES);
    a += u * u;
    b += v * v;
  }
  float total = sum(a + b);
  for (; i < n; i++) total += x[i] * x[i];
  return total;
}

// out = x / sqrt(mean(x^2) + eps) * (offset + weight); out may be x.
FORCE void rms_norm(const Program& p, const float* x, const float* weight, int64_t n, float* out) {
  float scale = 1.0f / __builtin_sqrtf(sum_of_squares(x, n) / (float)n + p.norm_eps);
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store(out + i, load(x + i) * scale * (p.norm_offset + load(weight + i)));
  for (; i < n; i++) out[i] = x[i] * scale * (p.norm_offset + weight[i]);
}

// Cosines then sines of one row's angles for every rope: [ropes][2][rotary_dim / 2]. jax_monokernel/rope.py has the formulas.
static void fill_angles(const Job& job, int32_t position, float* out) {
  const Program& p = job.program;
  const int64_t half = p.rotary_dim / 2;
  const float length = (float)position + 1.0f;
  for (int64_t r = 0; r < p.num_ropes; r++, out += 2 * half) {
    const RopeRow& rope = p.ropes[r];
    const bool beyond = length > (float)rope.original_max_position;
    int64_t row = (int64_t)rope.inv_freq_row + (rope.scaling == 2 && beyond ? 1 : 0);
    const float* table = job.constants + p.inv_freq + row * half;
    const bool stretched = rope.scaling == 1 && beyond;
    float log_stretch = 0.0f;
    if (stretched) {
      float stretch = (float)rope.factor * length / (float)rope.original_max_position - ((float)rope.factor - 1.0f);
      float dims = (float)p.rotary_dim / (float)(p.rotary_dim > 2 ? p.rotary_dim - 2 : 1);
      log_stretch = __builtin_logf(stretch > 1.0f ? stretch : 1.0f) * dims;
    }
    for (int64_t i = 0; i < half; i++) {
      float inv = stretched ? table[i] * __builtin_expf(-((float)i / (float)half) * log_stretch) : table[i];
      float angle = (float)position * inv;
      out[i] = __builtin_cosf(angle) * (float)rope.attention_factor;
      out[half + i] = __builtin_sinf(angle) * (float)rope.attention_factor;
    }
  }
}

// Turns the leading rotary dimensions of one head in place.
FORCE void rotate(float* x, const float* angles, int64_t half) {
  const float *cos = angles, *sin = angles + half;
  for (int64_t i = 0; i < half; i++) {
    float a = x[i], b = x[i + half];
    x[i] = a * cos[i] - b * sin[i];
    x[i + half] = b * cos[i] + a * sin[i];
  }
}
