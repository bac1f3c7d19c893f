// Between a raw logit and the chosen token: options, penalties, noise and the running best, as docs/sampling.md has
// them. Top-k, top-p and min-p are in phases/filters.h.
#pragma once

#include "arch/arch.h"
#include "math/elementary.h"
#include "math/threefry.h"

namespace mk {

constexpr float kInf = __builtin_bit_cast(float, 0x7f800000u);
constexpr float kLargest = 3.40282347e38f;
constexpr float kSmallestNormal = 1.17549435e-38f;
constexpr float kMinTemperature = 1e-6f;

// ---- Options ----

// One request's options brought into range.
struct RowOptions {
  float temperature;  // 0: greedy
  i32 top_k;          // the vocabulary's size: off
  float top_p;        // 1: off
  float min_p;        // 0: off
  float repetition;
  float presence;
  Key step_key;
  bool greedy;
  bool penalised;
  bool biased;
  bool filtered;        // not greedy and some filter is on: the token is chosen by sample_filtered
  bool wants_mass;      // the filter needs the sum of exp(z - best) over the vocabulary
  bool wants_log_prob;
};

MK_DEVICE RowOptions row_options(const Args& a, int row, i32 position) {
  // Comparisons with NaN are false, so each test is written for what is accepted. Subnormal numbers count as 0.
  RowOptions o;
  const float t = a.temperature[row];
  o.temperature = t >= kMinTemperature ? t : 0.0f;
  const i32 k = a.top_k[row];
  o.top_k = k > 0 && k < MK_VOCAB_SIZE ? k : MK_VOCAB_SIZE;
  const float top_p = a.top_p[row];
  o.top_p = top_p < 1.0f ? (top_p > kSmallestNormal ? top_p : kSmallestNormal) : 1.0f;
  const float min_p = a.min_p[row];
  o.min_p = min_p >= kSmallestNormal ? (min_p < 1.0f ? min_p : 1.0f) : 0.0f;
  const float r = a.repetition_penalty[row];
  o.repetition = r >= kSmallestNormal && r <= kLargest ? r : 1.0f;
  const float presence = a.presence_penalty[row];
  o.presence = magnitude(presence) >= kSmallestNormal ? presence : 0.0f;
  o.step_key = fold_in({a.key_data[2 * row], a.key_data[2 * row + 1]}, (u32)position);
  o.greedy = o.temperature == 0.0f;
  o.penalised = o.repetition != 1.0f || o.presence != 0.0f;
  o.biased = a.logit_bias != nullptr;
  o.filtered = !o.greedy && (o.top_k < MK_VOCAB_SIZE || o.top_p < 1.0f || o.min_p > 0.0f);
  o.wants_mass = o.filtered && o.top_p < 1.0f && o.top_k == MK_VOCAB_SIZE;
  o.wants_log_prob = a.log_probs != nullptr;
  return o;
}

// ---- Logits ----

// NaN becomes -inf, +inf the largest finite number, -0 becomes 0.
MK_DEVICE float clean(float z) {
  z = z > kLargest ? kLargest : z;
  return (z == z ? z : -kInf) + 0.0f;
}

// A byte of seen, not from a stale cache.
MK_DEVICE u32 load_seen(const Args& a, int row, i32 token) { return arch::load_byte(a.seen + (i64)row * MK_VOCAB_SIZE + token); }

// Steps 1 to 4: penalties, bias, temperature.
MK_DEVICE float adjust(const RowOptions& o, const Args& a, int row, i32 token, float raw) {
  float z = raw;
  if (o.penalised) {
    const u32 seen = load_seen(a, row, token);
    if (seen != 0) z = z > 0.0f ? z / o.repetition : z * o.repetition;
    if (seen & 2u) z = z - o.presence;
  }
  if (o.biased) z = z + a.logit_bias[(i64)row * MK_VOCAB_SIZE + token];
  if (!o.greedy && o.temperature != 1.0f) z = z / o.temperature;
  return clean(z);
}

// ---- Noise ----

constexpr float kMaxNoise = 16.64f;  // above -log(-log(u)) for the largest u, 1 - 2^-24

MK_DEVICE float gumbel_noise(u32 bits) {
  const float u = ((float)(bits >> 9) + 0.5f) * 0x1p-23f;
  return -log_(-log_(u));
}

// At least gumbel_noise, without logarithms: -log(u) >= 1 - u, and a float's bits, read as an integer, are 2^23 times a
// lower bound of 127 + log2 of it.
MK_DEVICE float noise_bound(u32 bits) {
  const float one_minus_u = (8388607.5f - (float)(bits >> 9)) * 0x1p-23f;
  return arch::fma((float)arch::as_u32(one_minus_u), -8.2629586e-8f, 88.0296919f);  // -log(2) 2^-23, 127 log(2)
}

// ---- The best token so far ----

struct Race {
  float score;  // z, plus noise when it is drawn
  i32 token;    // the lowest among equals
};

// In place of a token where there is none. Loses against every token.
constexpr i32 kNoToken = 0x3ffffff;

MK_DEVICE Race no_race() { return {-kInf, kNoToken}; }

MK_DEVICE bool beats(float score, i32 token, const Race& best) {
  return score > best.score || (score == best.score && token < best.token);
}

// A draw's entry. True if the token is the best so far; the noise of one that cannot be is not computed.
MK_DEVICE bool enter(Race& best, Key step_key, i32 token, float z) {
  // Scores below this lose, whatever was rounded on the way.
  const float edge = best.score - (2e-5f + 4e-7f * magnitude(best.score));
  if (z + kMaxNoise < edge) return false;
  const u32 bits = random_bits(step_key, (u32)token);
  if (z + noise_bound(bits) < edge) return false;
  const float score = z + gumbel_noise(bits);
  if (!beats(score, token, best)) return false;
  best = {score, token};
  return true;
}

// ---- Sums of exponentials, relative to their largest term ----

MK_DEVICE void add_exp(float& top, float& sum, float x) {
  if (x == -kInf) return;
  const float lead = x - top;  // +inf at first
  const float e = exp_(-magnitude(lead));
  sum = lead > 0.0f ? arch::fma(sum, e, 1.0f) : sum + e;
  top = lead > 0.0f ? x : top;
}

MK_DEVICE void add_exps(float& top, float& sum, float other_top, float other_sum) {
  const float larger = top > other_top ? top : other_top;
  if (larger == -kInf) return;
  sum = sum * exp_(top - larger) + other_sum * exp_(other_top - larger);
  top = larger;
}

// ---- Candidates: what a part of the vocabulary has to say about the next token ----

struct Candidate {
  Race best;   // for filtered rows the score is the largest z; sample_filtered chooses
  float raw;   // clean logit of the best token
  float top;   // largest clean logit, if log-probabilities are wanted
  float sum;   // of exp(logit - top), likewise
  float mass;  // of exp(z - best.score), if options.wants_mass
};

MK_DEVICE Candidate no_candidate() { return {no_race(), -kInf, -kInf, 0.0f, 0.0f}; }

// raw: the logit as it was computed; z: adjust() of it. In any order of tokens, but the same order gives the same bits.
MK_DEVICE void offer(Candidate& c, const RowOptions& o, i32 token, float raw, float z) {
  raw = clean(raw);
  if (o.wants_log_prob) add_exp(c.top, c.sum, raw);
  bool best;
  if (o.greedy || o.filtered) {
    best = beats(z, token, c.best);
    float top = c.best.score;
    if (o.wants_mass) add_exp(top, c.mass, z);
    if (best) c.best = {z, token};
  } else {
    best = enter(c.best, o.step_key, token, z);
  }
  if (best) c.raw = raw;
}

// Gives the same bits whichever of the two comes first.
MK_DEVICE void merge(Candidate& c, const Candidate& other) {
  if (!(c.sum + other.sum == 0.0f)) add_exps(c.top, c.sum, other.top, other.sum);  // 0: nobody wants log-probabilities
  if (c.mass + other.mass > 0.0f) {
    float top = c.best.score;
    add_exps(top, c.mass, other.best.score, other.mass);
  }
  if (beats(other.best.score, other.best.token, c.best)) {
    c.best = other.best;
    c.raw = other.raw;
  }
}

// Both lanes whose numbers differ by `mask` get the merge of their two.
MK_DEVICE void merge_lanes(Candidate& c, int mask) {
  Candidate other;
  other.best.score = arch::shuffle_xor(c.best.score, mask);
  other.best.token = (i32)arch::shuffle_xor((u32)c.best.token, mask);
  other.raw = arch::shuffle_xor(c.raw, mask);
  other.top = arch::shuffle_xor(c.top, mask);
  other.sum = arch::shuffle_xor(c.sum, mask);
  other.mass = arch::shuffle_xor(c.mass, mask);
  merge(c, other);
}

// A candidate as integers of 31 bits, without loss: each float's lowest bit goes with the token.
constexpr int kPackedCandidate = 6;

MK_DEVICE void pack(const Candidate& c, u32 (&words)[kPackedCandidate]) {
  const float fields[] = {c.best.score, c.raw, c.top, c.sum, c.mass};
  u32 rest = (u32)c.best.token;
  MK_UNROLL
  for (int i = 0; i < 5; i++) {
    const u32 bits = arch::as_u32(fields[i]);
    words[1 + i] = bits >> 1;
    rest = rest << 1 | (bits & 1u);
  }
  words[0] = rest;
}

MK_DEVICE Candidate unpack(const u32 (&words)[kPackedCandidate]) {
  float fields[5];
  MK_UNROLL
  for (int i = 0; i < 5; i++) fields[i] = arch::as_f32(words[1 + i] << 1 | (words[0] >> (4 - i) & 1u));
  return {{fields[0], (i32)(words[0] >> 5)}, fields[1], fields[2], fields[3], fields[4]};
}

// log_softmax of the raw logits at a token. raw: its logit; top and sum: the whole vocabulary's.
MK_DEVICE float log_prob(float raw, float top, float sum) {
  raw = clean(raw);
  return raw == -kInf ? -kInf : raw - top - log_(sum);
}

// ---- After the choice ----

constexpr i32 kNoEos = -1;

// The EOS token of a request that a lane looks at first.
MK_DEVICE i32 first_eos(const Args& a, int row, int lane) { return lane < a.eos_count ? a.eos_token_id[row * a.eos_count + lane] : kNoEos; }

// Whether it is among those that a lane looks at.
MK_DEVICE bool is_eos(const Args& a, int row, i32 token, i32 first, int lane) {
  bool found = first == token;
  for (int i = lane + arch::kWave; i < a.eos_count; i += arch::kWave) found |= a.eos_token_id[row * a.eos_count + i] == token;
  return found;
}

}  // namespace mk
