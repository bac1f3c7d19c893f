// The sampler of one row. Included by sampling.cc only, which compiles it for several instruction sets.
//
// Everything works on blocks of kBlock logits with loops of constant length, which compilers vectorise. What would be
// costly for a whole vocabulary is avoided without changing the result:
//   - top-k and top-p need no sort: a histogram finds the bin that holds the threshold, and only that bin is refined;
//   - Gumbel noise is at most kMaxNoise, and a cheap upper bound of it (no logarithms) shows for nearly every token that
//     it cannot win, so that exact noise is computed for a few tokens only.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cpu/sampling.h"
#include "cpu/sampling_math.h"

namespace monokernel::cpu::sampling {

constexpr int kBlock = 256;
constexpr int kLanes = 16;
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kMinTemperature = 1e-6f;

// One row with its options brought into range.
struct Row {
  const float* logits;
  const uint8_t* seen;  // nullptr: no penalties
  const float* bias;    // nullptr: none
  int64_t vocab;
  float temperature;  // 0: greedy
  int64_t top_k;      // vocab: off
  float top_p;        // 1: off
  float min_p;        // 0: off
  float repetition;
  float presence;
  uint32_t step_key[2];
  float* z;  // [vocab], the logits after penalties, bias and temperature
};

// ---- Options and blocks ----

MONOKERNEL_INLINE float clean(float z) {
  z = z > std::numeric_limits<float>::max() ? std::numeric_limits<float>::max() : z;
  z = z == z ? z : -kInf;
  return z + 0.0f;  // -0 becomes 0
}

MONOKERNEL_INLINE Row make_row(const float* logits, int64_t vocab, const uint8_t* seen, int32_t position,
                               const SampleParams& p, float* scratch) {
  // Comparisons with NaN are false, so each test is written for what is accepted. Subnormal numbers count as 0.
  constexpr float kTiny = std::numeric_limits<float>::min();
  Row row;
  row.logits = logits;
  row.vocab = vocab;
  row.bias = p.logit_bias;
  row.temperature = p.temperature >= kMinTemperature ? p.temperature : 0.0f;
  row.top_k = p.top_k > 0 && p.top_k < vocab ? p.top_k : vocab;
  row.top_p = p.top_p < 1.0f ? std::fmax(p.top_p, kTiny) : 1.0f;
  row.min_p = p.min_p >= kTiny ? std::fmin(p.min_p, 1.0f) : 0.0f;
  row.repetition = p.repetition_penalty >= kTiny && p.repetition_penalty < kInf ? p.repetition_penalty : 1.0f;
  row.presence = p.presence_penalty == p.presence_penalty ? p.presence_penalty : 0.0f;
  row.seen = row.repetition != 1.0f || row.presence != 0.0f ? seen : nullptr;
  row.step_key[0] = p.key[0];
  row.step_key[1] = p.key[1];
  fold_in(row.step_key, static_cast<uint32_t>(position));
  row.z = scratch;
  return row;
}

MONOKERNEL_INLINE int block_size(int64_t n, int64_t base) {
  return static_cast<int>(n - base < kBlock ? n - base : kBlock);
}

// kBlock values from `from`, or `n` of them and then `fill` in `padded`. Never reads past from + n.
template <typename T>
MONOKERNEL_INLINE const T* load_block(const T* from, int n, T fill, T* padded) {
  if (n == kBlock) return from;
  for (int i = n; i < kBlock; i++) padded[i] = fill;
  std::memcpy(padded, from, n * sizeof(T));
  return padded;
}

// out[kBlock]: logits after penalties, bias and temperature; -inf past the end of the vocabulary.
MONOKERNEL_INLINE void adjust_block(const Row& row, int64_t base, float* out) {
  const int n = block_size(row.vocab, base);
  float padded_logits[kBlock], padded_bias[kBlock];
  uint8_t padded_seen[kBlock];
  const float* logits = load_block(row.logits + base, n, -kInf, padded_logits);
  for (int i = 0; i < kBlock; i++) out[i] = logits[i];
  if (row.seen) {
    const uint8_t* seen = load_block(row.seen + base, n, uint8_t{0}, padded_seen);
    const float repetition = row.repetition, presence = row.presence;
    for (int i = 0; i < kBlock; i++) {
      const float z = out[i];
      const float divided = z / repetition, multiplied = z * repetition;
      const float repeated = z > 0.0f ? divided : multiplied;
      const float penalised = seen[i] != 0 ? repeated : z;
      const float present = penalised - presence;
      out[i] = (seen[i] & 2) != 0 ? present : penalised;
    }
  }
  if (row.bias) {
    const float* bias = load_block(row.bias + base, n, 0.0f, padded_bias);
    for (int i = 0; i < kBlock; i++) out[i] += bias[i];
  }
  if (row.temperature != 0.0f) {
    const float temperature = row.temperature;
    for (int i = 0; i < kBlock; i++) out[i] = clean(out[i] / temperature);
  } else {
    for (int i = 0; i < kBlock; i++) out[i] = clean(out[i]);
  }
}

template <int count>
MONOKERNEL_INLINE int32_t max_key(const float* z) {
  int32_t best = std::numeric_limits<int32_t>::min();
  for (int i = 0; i < count; i++) {
    const int32_t key = to_key(z[i]);
    best = key > best ? key : best;
  }
  return best;
}

struct Best {
  int64_t token;
  float z;
};

// The largest adjusted logit, lowest index first. Keeps the logits in row.z if `keep`.
template <bool keep>
MONOKERNEL_INLINE Best adjust_row(const Row& row) {
  alignas(64) float z[kBlock];
  int32_t best = std::numeric_limits<int32_t>::min();
  int64_t where = 0;
  for (int64_t base = 0; base < row.vocab; base += kBlock) {
    adjust_block(row, base, z);
    if (keep) std::memcpy(row.z + base, z, block_size(row.vocab, base) * sizeof(float));
    const int32_t top = max_key<kBlock>(z);
    where = top > best ? base : where;
    best = top > best ? top : best;
  }
  adjust_block(row, where, z);
  int i = 0;
  while (i + 1 < block_size(row.vocab, where) && to_key(z[i]) != best) i++;
  return {where + i, from_key(best)};
}

// log_softmax of the logits at `token`; sums are rescaled whenever a block has a new maximum.
MONOKERNEL_INLINE float log_prob_of(const Row& row, int64_t token) {
  const float chosen = clean(row.logits[token]);
  if (chosen == -kInf) return -kInf;
  alignas(64) float z[kBlock];
  float padded[kBlock];
  double total = 0.0;
  float top = -kInf;
  for (int64_t base = 0; base < row.vocab; base += kBlock) {
    const float* logits = load_block(row.logits + base, block_size(row.vocab, base), -kInf, padded);
    for (int i = 0; i < kBlock; i++) z[i] = clean(logits[i]);
    const float block_top = from_key(max_key<kBlock>(z));
    if (block_top == -kInf) continue;
    if (block_top > top) {
      total *= std::exp(static_cast<double>(top) - block_top);
      top = block_top;
    }
    float sums[kLanes] = {};
    for (int i = 0; i < kBlock; i += kLanes) {
      for (int lane = 0; lane < kLanes; lane++) sums[lane] += exp_negative(z[i + lane] - top);
    }
    for (int lane = 0; lane < kLanes; lane++) total += sums[lane];
  }
  return static_cast<float>(static_cast<double>(chosen) - top - std::log(total));
}

// ---- Filters ----

constexpr int kBins = 2048;
constexpr float kBinsPerUnit = 64.0f;
constexpr int kListSize = 4096;

// Some tokens of a row: values, and their ids (nullptr: the whole row).
struct View {
  const float* z;
  const int32_t* ids;
  int64_t size;
};

MONOKERNEL_INLINE int32_t bin_of(float z, float best) {
  const float scaled = (best - z) * kBinsPerUnit;
  return static_cast<int32_t>(scaled < kBins - 1 ? scaled : kBins - 1);
}

// The first bin at which the running sum reaches `limit`, or -1. Leaves the sum before it in `above`.
MONOKERNEL_INLINE int find_bin(const double* bins, double limit, double& above) {
  for (int b = 0; b < kBins; b++) {
    if (above + bins[b] >= limit) return b;
    above += bins[b];
  }
  return -1;
}

// Finds the threshold among values whose keys lie in [low, high]: radix select, 11 bits of the range at a time.
template <bool by_mass>
MONOKERNEL_INLINE float refine(const float* z, int64_t n, float best, int32_t low, int32_t high, double limit,
                               double above, double* bins) {
  while (low != high) {
    const uint32_t range = static_cast<uint32_t>(high) - static_cast<uint32_t>(low);
    int shift = 0;
    while ((range >> shift) >= kBins) shift++;
    std::memset(bins, 0, kBins * sizeof(double));
    for (int64_t i = 0; i < n; i++) {
      const int32_t key = to_key(z[i]);
      if (key < low || key > high) continue;
      const uint32_t below = static_cast<uint32_t>(high) - static_cast<uint32_t>(key);
      bins[below >> shift] += by_mass ? exp_negative(z[i] - best) : 1.0f;
    }
    // The same values in another grouping may sum to a little less than the limit: then the last bin holds it.
    int b = find_bin(bins, limit, above);
    if (b < 0) b = static_cast<int>(range >> shift);
    high = static_cast<int32_t>(static_cast<uint32_t>(high) - (static_cast<uint32_t>(b) << shift));
    const uint32_t width = (1u << shift) - 1;
    const uint32_t left = static_cast<uint32_t>(high) - static_cast<uint32_t>(low);
    low = width < left ? static_cast<int32_t>(static_cast<uint32_t>(high) - width) : low;
  }
  return from_key(low);
}

// The smallest value that is kept when a value is kept iff the total weight of strictly larger ones is below the limit.
// by_mass: weights are exp(z - best) and the limit is `amount` of their sum; otherwise each is 1 and the limit `amount`.
template <bool by_mass>
MONOKERNEL_INLINE float threshold(const View& view, float best, double amount) {
  alignas(64) double bins[kBins] = {};
  alignas(64) float weights[kBlock];
  alignas(64) int32_t index[kBlock];
  float padded[kBlock];
  for (int64_t base = 0; base < view.size; base += kBlock) {
    const int n = block_size(view.size, base);
    const float* z = load_block(view.z + base, n, -kInf, padded);
    for (int i = 0; i < kBlock; i++) index[i] = bin_of(z[i], best);
    if (by_mass) {
      for (int i = 0; i < kBlock; i++) weights[i] = exp_negative(z[i] - best);
      for (int i = 0; i < n; i++) bins[index[i]] += weights[i];
    } else {
      for (int i = 0; i < n; i++) bins[index[i]] += 1.0;
    }
  }
  double limit = amount;
  if (by_mass) {
    double total = 0.0;
    for (int b = 0; b < kBins; b++) total += bins[b];
    limit *= total;
  }
  double above = 0.0;
  const int b = find_bin(bins, limit, above);
  if (b < 0) return -kInf;

  // The bin's values, as long as they fit, and the range of their keys.
  alignas(64) float list[kListSize];
  int64_t count = 0;
  int32_t low = std::numeric_limits<int32_t>::max(), high = std::numeric_limits<int32_t>::min();
  for (int64_t base = 0; base < view.size; base += kLanes) {
    const int n = static_cast<int>(view.size - base < kLanes ? view.size - base : kLanes);
    const float* z = view.z + base;
    if (n == kLanes) {
      int32_t hits = 0;
      for (int i = 0; i < kLanes; i++) hits += bin_of(z[i], best) == b;
      if (hits == 0) continue;
    }
    for (int i = 0; i < n; i++) {
      if (bin_of(z[i], best) != b) continue;
      const int32_t key = to_key(z[i]);
      low = key < low ? key : low;
      high = key > high ? key : high;
      if (count < kListSize) list[count] = z[i];
      count++;
    }
  }
  const bool fits = count <= kListSize;
  return refine<by_mass>(fits ? list : view.z, fits ? count : view.size, best, low, high, limit, above, bins);
}

// Tokens with z >= cut, at most kListSize of them; returns their number, or -1 if there are more. The view may be of the
// outputs themselves.
MONOKERNEL_INLINE int64_t collect(const View& view, float cut, float* z_out, int32_t* ids_out) {
  int64_t count = 0;
  for (int64_t base = 0; base < view.size; base += kLanes) {
    const int n = static_cast<int>(view.size - base < kLanes ? view.size - base : kLanes);
    const float* z = view.z + base;
    if (n == kLanes) {
      int32_t hits = 0;
      for (int i = 0; i < kLanes; i++) hits += z[i] >= cut;
      if (hits == 0) continue;
    }
    for (int i = 0; i < n; i++) {
      if (!(z[i] >= cut)) continue;
      if (count == kListSize) return -1;
      z_out[count] = z[i];
      ids_out[count] = view.ids ? view.ids[base + i] : static_cast<int32_t>(base + i);
      count++;
    }
  }
  return count;
}

// A lower bound of the k-th largest value, found from the maxima of groups: k groups have a value at least as large.
MONOKERNEL_INLINE float top_k_bound(const Row& row, const Best& best) {
  constexpr int kGroup = 64;
  const int64_t groups = row.vocab / kGroup;
  if (row.top_k > groups || groups > kListSize) return -kInf;
  alignas(64) float maxima[kListSize];
  for (int64_t g = 0; g < groups; g++) maxima[g] = from_key(max_key<kGroup>(row.z + g * kGroup));
  return threshold<false>({maxima, nullptr, groups}, best.z, static_cast<double>(row.top_k));
}

// ---- Drawing ----

// The best z + noise so far.
struct Race {
  float score;
  int64_t token;
  // Tokens with z + noise below this cannot win, whatever was rounded on the way.
  float edge;
};

MONOKERNEL_INLINE void enter(Race& race, int64_t token, float z, uint32_t bits) {
  const float score = z + gumbel_noise(bits);
  if (score < race.score || (score == race.score && token > race.token)) return;
  race.score = score;
  race.token = token;
  race.edge = score - (1e-5f + 4e-7f * std::fabs(score));
}

// Noise is at most -log(1 - u), since -log(u) >= 1 - u; so a token can win only if 1 - u <= e^(z - edge), with a margin for
// the rounding of both sides.
MONOKERNEL_INLINE float may_win_below(float z, float edge) {
  const float lead = z - edge;
  return exp_negative(lead < 0.0f ? lead : 0.0f) * 1.0001f;
}

MONOKERNEL_INLINE bool may_win(float z, float edge, uint32_t bits) {
  return one_minus_u(bits) <= may_win_below(z, edge);
}

// argmax of z + noise over the view's tokens with z >= cut and z - best.z >= log_min_p.
MONOKERNEL_INLINE int64_t draw(const Row& row, const View& view, const Best& best, float cut, float log_min_p) {
  Race race = {-kInf, row.vocab, -kInf};
  enter(race, best.token, best.z, random_bits(row.step_key, static_cast<uint32_t>(best.token)));
  alignas(64) uint32_t bits[kBlock];
  float padded[kBlock];
  for (int64_t base = 0; base < view.size; base += kBlock) {
    const int n = block_size(view.size, base);
    const float* z = load_block(view.z + base, n, -kInf, padded);
    const float top = from_key(max_key<kBlock>(z));
    if (top < cut || !(top - best.z >= log_min_p) || top < race.edge - kMaxNoise) continue;
    if (view.ids) {
      int32_t padded_ids[kBlock];
      const int32_t* ids = load_block(view.ids + base, n, int32_t{0}, padded_ids);
      for (int i = 0; i < kBlock; i++) bits[i] = random_bits(row.step_key, static_cast<uint32_t>(ids[i]));
    } else {
      const uint32_t first = static_cast<uint32_t>(base);
      for (int i = 0; i < kBlock; i++) bits[i] = random_bits(row.step_key, first + static_cast<uint32_t>(i));
    }
    // may_win for the block's largest z, in integers.
    const float least = 8388606.5f - may_win_below(top, race.edge) * 0x1p23f;
    const uint32_t least_bits = least > 0.0f ? static_cast<uint32_t>(least) << 9 : 0;
    uint32_t hits = 0;
    for (int i = 0; i < kBlock; i++) hits += bits[i] >= least_bits;
    if (hits == 0) continue;
    for (int i = 0; i < n; i++) {
      if (bits[i] < least_bits || z[i] < cut || !(z[i] - best.z >= log_min_p) || !may_win(z[i], race.edge, bits[i])) continue;
      enter(race, view.ids ? view.ids[base + i] : base + i, z[i], bits[i]);
    }
  }
  return race.token;
}

MONOKERNEL_INLINE int64_t choose(const Row& row) {
  if (row.temperature == 0.0f) return adjust_row<false>(row).token;
  const Best best = adjust_row<true>(row);
  if (best.z == -kInf) return 0;

  View view = {row.z, nullptr, row.vocab};
  float cut = -kInf;
  alignas(64) float list[kListSize];
  int32_t ids[kListSize];
  if (row.top_k < row.vocab) {
    const double k = static_cast<double>(row.top_k);
    int64_t count = collect(view, top_k_bound(row, best), list, ids);
    if (count >= 0) view = {list, ids, count};
    cut = threshold<false>(view, best.z, k);
    count = collect(view, cut, list, ids);
    if (count >= 0) {
      view = {list, ids, count};
    } else if (row.top_p < 1.0f) {
      // Too many for the list; the others must not count in top-p's sum.
      for (int64_t i = 0; i < row.vocab; i++) row.z[i] = row.z[i] >= cut ? row.z[i] : -kInf;
    }
  }
  if (row.top_p < 1.0f) cut = std::fmax(cut, threshold<true>(view, best.z, row.top_p));
  const float log_min_p = row.min_p > 0.0f ? static_cast<float>(std::log(static_cast<double>(row.min_p))) : -kInf;
  return draw(row, view, best, cut, log_min_p);
}

MONOKERNEL_INLINE Sampled sample(const Row& row, bool want_log_prob) {
  const int64_t token = choose(row);
  return {static_cast<int32_t>(token), want_log_prob ? log_prob_of(row, token) : 0.0f};
}

}  // namespace monokernel::cpu::sampling
