// Attention of a wave to its part of a context by matrix instructions of 16 x 8 x 16: 16-bit caches, heads of 64 or 128.
//
// A wave takes 8 or 16 neighbouring positions at a time. In the first product rows are query heads and columns positions; in the
// second rows are elements of a head and columns query heads, so that what comes out of the first is, rounded, an operand of
// the second. The order of the elements inside a product is free: each lane loads 16 bytes of one position at once.
#pragma once

#include "phases/cache.h"

namespace mk {

constexpr int kBlocks64 = larger(1, kHeadDim / 64);

struct WaveSums {
  float top, total;  // of the lane's query head, lane / 4: the largest score, and the sum of weights relative to it
  float out[kBlocks64][4][4];
};

// 16-byte vectors of a lane from some of a step's positions: a first one that depends on the lane, and others as far from it for
// every lane.
template <int rows, int vectors, int stride>
struct Rows {
  Vec4 v[rows][vectors];

  // 8 more, or 1, 8 and 9 more.
  static MK_METHOD constexpr int offset(int row) { return rows == kEights ? 8 * row : row / 2 * 8 + row % 2; }

  // at: of the first row in the step; element: of its vectors. Instead of rows that are not in the cache, or that nobody sees, the
  // step's nearest one that is both: choosing between what was loaded and zeros would wait for it.
  // first: the position whose row is at `memory`.
  template <typename Load>
  MK_METHOD void load(const Part& part, const char* memory, int first, int step, int at, int element, Load load_vector) {
    const int base = part.position_of(step), low = larger(part.first, base), high = smaller(part.position, base + kStepPositions) - 1;
    MK_UNROLL
    for (int i = 0; i < rows; i++) {
      const int row = larger(smaller(base + at + offset(i), high), low) - first;
      const char* from = memory + (i64)row * kCacheRowBytes + element * kKvBytes;
      MK_UNROLL
      for (int c = 0; c < vectors; c++) v[i][c] = load_vector(from + c * stride * kKvBytes);
    }
  }
  MK_METHOD void load(const Part& part, const char* cache, int step, int at, int element) {
    load(part, cache, 0, step, at, element, [](const char* from) { return arch::load_words((const u32*)from); });
  }
  // The same from a copy of the step's rows in shared memory. full: all are seen.
  template <bool full>
  MK_METHOD void take(const Part& part, const char* copy, int step, int at, int element) {
    if constexpr (full) {
      const char* from = copy + at * kCacheRowBytes + element * kKvBytes;
      MK_UNROLL
      for (int i = 0; i < rows; i++) {
        MK_UNROLL
        for (int c = 0; c < vectors; c++) v[i][c] = *(const Vec4*)(from + offset(i) * kCacheRowBytes + c * stride * kKvBytes);
      }
    } else {
      load(part, copy, part.position_of(step), step, at, element, [](const char* from) { return *(const Vec4*)from; });
    }
  }

  // The row of the position that is not in the cache. If it is alone, the others are zeros.
  MK_METHOD void put_own(const Part& part, int step, int at, int element, const u32* packed) {
    const int base = part.position_of(step), own = part.position - base - at;
    MK_UNROLL
    for (int i = 0; i < rows; i++) {
      if (own != offset(i) && !part.is_alone(base)) continue;
      MK_UNROLL
      for (int c = 0; c < vectors; c++) {
        v[i][c] = zero_vector();
        if (own == offset(i)) v[i][c] = *(const Vec4*)(packed + (element + c * stride) / 2);
      }
    }
  }
};
using KeyRows = Rows<kEights, (2 * kBlocks64), 32>;    // from position lane / 4; of 32 elements those from lane % 4 * 8
using ValueRows = Rows<2 * kEights, kBlocks64, 64>;  // from position lane % 4 * 2; of 64 elements those from lane / 4 * 8

MK_DEVICE u32 word_of(const Vec4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

MK_DEVICE int own_step(const Service& s, const Part& part) { return part.first_step() + s.wave * kStepPositions; }

// Keys and values of a wave's steps, the next one in registers.
struct MatrixLoads {
  KeyRows keys;
  ValueRows values;

  MK_METHOD void load_keys(const Service& s, const Part& part, int step) {
    if (step < part.end) keys.load(part, part.keys, step, s.lane / 4, s.lane % 4 * 8);
  }
  MK_METHOD void load_values(const Service& s, const Part& part, int step) {
    if (step < part.end) values.load(part, part.values, step, s.lane % 4 * 2, s.lane / 4 * 8);
  }

  // Asks for the first one.
  MK_METHOD void start(Service& s, const Part& part) {
    load_keys(s, part, own_step(s, part));
    load_values(s, part, own_step(s, part));
  }
  // For each step in this order: waits for its keys; they are used; waits for its values; they are used. full: see Part.
  template <bool full>
  MK_METHOD void get_keys(Service&, const Part&, int) {}
  MK_METHOD void keys_used(Service& s, const Part& part, int step) { load_keys(s, part, step + kStepsApart); }
  template <bool full>
  MK_METHOD void get_values(Service&, const Part&, int) {}
  template <bool full>
  MK_METHOD void values_used(Service& s, const Part& part, int step) { load_values(s, part, step + kStepsApart); }
};

#if MK_WAVE_SIZE == 32

// The same, copied to shared memory.
struct MatrixCopies {
  KeyRows keys;
  ValueRows values;

  MK_METHOD void start(Service& s, const Part& part) { CacheCopies::start(s, part, own_step(s, part)); }
  template <bool full>
  MK_METHOD void get_keys(Service& s, const Part& part, int step) {
    if (!full && part.is_alone(part.position_of(step))) return;
    CacheCopies::await(s);
    keys.take<full>(part, CacheCopies::keys(s, s.cache_slot), step, s.lane / 4, s.lane % 4 * 8);
  }
  MK_METHOD void keys_used(Service&, const Part&, int) {}
  template <bool full>
  MK_METHOD void get_values(Service& s, const Part& part, int step) {
    if (!full && part.is_alone(part.position_of(step))) return;
    values.take<full>(part, CacheCopies::values(s, s.cache_slot), step, s.lane % 4 * 2, s.lane / 4 * 8);
  }
  template <bool full>
  MK_METHOD void values_used(Service& s, const Part& part, int step) {
    if (full || !part.is_alone(part.position_of(step))) CacheCopies::used(s, part, step);
  }
};

// One step. full: of Part. packed: the query heads, the key and the value of the token that attends, [kTaskHeads + 2][kHeadDim / 2].
template <bool full, typename Loads>
MK_DEVICE void attend_step(Service& s, const Part& part, int step, const u32* packed, Loads& loads, WaveSums& sums) {
  constexpr bool bf16 = kKvType == kBF16;
  const int g = s.lane / 4, t = s.lane % 4, base = part.position_of(step);
  const u32 *query = packed + smaller(g, kTaskHeads - 1) * kHeadDim / 2, *own_key = packed + kTaskHeads * kHeadDim / 2;
  const bool has_own = !full && part.position >= base && part.position < base + kStepPositions;
  KeyRows& keys = loads.keys;
  ValueRows& values = loads.values;
  loads.template get_keys<full>(s, part, step);
  if (has_own) keys.put_own(part, step, g, 8 * t, own_key);
  // Both instructions have the same first operand: words 0 and 2 as its rows 0 to 7, words 1 and 3 as rows 8 to 15. They stand in
  // this order (packed_place_of).
  float low[kEights][4] = {}, high[kEights][4] = {};
  MK_UNROLL
  for (int c = 0; c < (2 * kBlocks64); c++) {
    const Vec4 q = *(const Vec4*)(query + 16 * c + 4 * t);
    const u32 x[4] = {q.x, q.y, q.z, q.w};
    MK_UNROLL
    for (int r = 0; r < kEights; r++) {
      arch::mma_16x8x16<bf16>(low[r], x, keys.v[r][c].x, keys.v[r][c].y);
      arch::mma_16x8x16<bf16>(high[r], x, keys.v[r][c].z, keys.v[r][c].w);
    }
  }
  loads.keys_used(s, part, step);

  float score[2 * kEights];
  float higher = sums.top;
  bool seen[2 * kEights];
  MK_UNROLL
  for (int i = 0; i < 2 * kEights; i++) {
    score[i] = scaled_score(low[i / 2][i % 2] + high[i / 2][2 + i % 2]);
    const int at = 2 * t + ValueRows::offset(i);
    seen[i] = full || (step + at < part.end && base + at >= part.first);
    if (seen[i] && score[i] > higher) higher = score[i];
  }
  MK_UNROLL
  for (int mask = 1; mask < 4; mask *= 2) {
    const float other = arch::shuffle_xor(higher, mask);
    higher = other > higher ? other : higher;
  }
  const float fade = weight_of(sums.top - higher);
  sums.top = higher;
  sums.total *= fade;
  MK_UNROLL
  for (int i = 0; i < 2 * kEights; i++) {
    score[i] = seen[i] ? weight_of(score[i] - higher) : 0.0f;
    sums.total += score[i];
  }
  if (arch::any(fade != 1.0f)) {
    // Columns of the sums are heads 2 t and 2 t + 1.
    const float fades[2] = {arch::shuffle(fade, 8 * t), arch::shuffle(fade, 8 * t + 4)};
    MK_UNROLL
    for (int b = 0; b < kBlocks64; b++) {
      MK_UNROLL
      for (int j = 0; j < 4; j++) {
        MK_UNROLL
        for (int e = 0; e < 4; e++) sums.out[b][j][e] *= fades[e % 2];
      }
    }
  }
  // A weight as the sum of two numbers of 16 bits.
  u32 weights[2] = {}, rest[2] = {};
  MK_UNROLL
  for (int i = 0; i < kEights; i++) {
    weights[i] = pack_pair<kKvType>(score[2 * i], score[2 * i + 1]);
    rest[i] = pack_pair<kKvType>(score[2 * i] - low_of<kKvType>(weights[i]), score[2 * i + 1] - high_of<kKvType>(weights[i]));
  }
  loads.template get_values<full>(s, part, step);
  if (has_own) values.put_own(part, step, 2 * t, 8 * g, own_key + kHeadDim / 2);
  MK_UNROLL
  for (int b = 0; b < kBlocks64; b++) {
    MK_UNROLL
    for (int j = 0; j < 4; j++) {
      u32 x[4] = {};
      MK_UNROLL
      for (int i = 0; i < kEights; i++) {
        const u32 w0 = word_of(values.v[2 * i][b], j), w1 = word_of(values.v[2 * i + 1][b], j);
        x[2 * i] = arch::low_halves(w0, w1);  // elements of two positions at the same place
        x[2 * i + 1] = arch::high_halves(w0, w1);
      }
      arch::mma_16x8x16<bf16>(sums.out[b][j], x, weights[0], weights[1]);
      arch::mma_16x8x16<bf16>(sums.out[b][j], x, rest[0], rest[1]);
    }
  }
  loads.template values_used<full>(s, part, step);
}

// loads: has been started.
template <typename Loads>
MK_DEVICE WaveSums attend_by_matrix(Service& s, const Part& part, const u32* packed, Loads& loads) {
  WaveSums sums;
  sums.top = kLowest;
  sums.total = 0.0f;
  MK_UNROLL
  for (int b = 0; b < kBlocks64; b++) {
    MK_UNROLL
    for (int j = 0; j < 4; j++) {
      MK_UNROLL
      for (int e = 0; e < 4; e++) sums.out[b][j][e] = 0.0f;
    }
  }
  for (int step = own_step(s, part); step < part.end; step += kStepsApart) {
    // Most steps are full where copies are made.
    if (kCopiesCache && part.is_full(part.position_of(step))) {
      attend_step<true>(s, part, step, packed, loads, sums);
    } else {
      attend_step<false>(s, part, step, packed, loads, sums);
    }
  }
  sums.total += arch::shuffle_xor(sums.total, 1);
  sums.total += arch::shuffle_xor(sums.total, 2);
  return sums;
}

// parts: [kTaskHeads][kHeadDim + 2] of this wave.
MK_DEVICE void store_sums(const Service& s, const WaveSums& sums, float* parts) {
  const int g = s.lane / 4, t = s.lane % 4;
  MK_UNROLL
  for (int e = 0; e < 2; e++) {
    if (2 * t + e >= kTaskHeads) continue;
    float* to = parts + (2 * t + e) * (kHeadDim + 2) + 8 * g;
    MK_UNROLL
    for (int b = 0; b < kBlocks64; b++) {
      MK_UNROLL
      for (int j = 0; j < 4; j++) {
        to[64 * b + 2 * j] = sums.out[b][j][e];
        to[64 * b + 2 * j + 1] = sums.out[b][j][2 + e];
      }
    }
  }
  if (t == 0 && g < kTaskHeads) {
    parts[g * (kHeadDim + 2) + kHeadDim] = sums.top;
    parts[g * (kHeadDim + 2) + kHeadDim + 1] = sums.total;
  }
}

#endif  // MK_WAVE_SIZE == 32

}  // namespace mk
