// Attention of a wave to its part of a context by matrix instructions of 16 x 8 x 16: 16-bit caches, heads of 64 or 128.
//
// A wave takes 8 or 16 neighbouring positions at a time. In the first product rows are query heads and columns positions; in the
// second rows are elements of a head and columns query heads, so that what comes out of the first is, rounded, an operand of
// the second. The order of the elements inside a product is free: each lane loads 16 bytes of one position at once.
#pragma once

#include "service.h"

namespace mk {

constexpr int kSplitBlock = 64;
constexpr float kLowest = -1e30f;  // of scores; finite, so that differences are no NaN
constexpr int kEights = kHeadDim <= 64 ? 2 : 1;  // of positions in a step, as the registers allow
constexpr int kBlocks64 = larger(1, kHeadDim / 64);
constexpr int kStepPositions = 8 * kEights;

// What a task's waves know of its part of the context. Places of a part are numbered from 0; blocks of kSplitBlock positions
// are dealt to the parts by turns.
struct Part {
  const char *keys, *values;  // of position 0
  int position;               // of the token that attends; it is not in the cache yet
  int first;                  // position that is visible
  int begin_block;
  int end;  // places

  MK_METHOD int position_of(int place) const {
    return (begin_block + place / kSplitBlock * kSplits) * kSplitBlock + place % kSplitBlock;
  }
  // Of the steps of kStepPositions places the first with one that is seen.
  MK_METHOD int first_step() const { return larger(first - position_of(0), 0) / kStepPositions * kStepPositions; }
  // Whether of a step's positions, which begin at `base`, only that of the token itself is seen.
  MK_METHOD bool is_alone(int base) const { return position <= larger(first, base); }
};

// Whether keys and values are brought nearer before they are asked for: a single request's, whose context is not split, and so short
// that a unit takes few rounds. Of others, what is on its way already is as much as memory gives.
constexpr bool kPrefetches = kBatch == 1 && kSplits == 1;

// Places [begin, begin + count) of a part, as far as they exist; the first does, and all are of one block.
MK_DEVICE void prefetch_places(const Part& part, int begin, int count) {
  constexpr int row = kHeadDim * kKvBytes;
  if constexpr (row % 16 == 0) {
    const int rows = smaller(count, part.end - begin);
    arch::prefetch(part.keys + (i64)part.position_of(begin) * row, rows * row);
    arch::prefetch(part.values + (i64)part.position_of(begin) * row, rows * row);
  }
}

struct WaveSums {
  float top, total;  // of the lane's query head, lane / 4: the largest score, and the sum of weights relative to it
  float out[kBlocks64][4][4];
};

// 16-byte vectors of a lane from some of a step's positions: a first one that depends on the lane, and others as far from it for
// every lane.
template <int rows, int vectors, int stride>
struct Rows {
  static constexpr int kRowBytes = kHeadDim * kKvBytes;
  Vec4 v[rows][vectors];

  // 8 more, or 1, 8 and 9 more.
  static MK_METHOD constexpr int offset(int row) { return rows == kEights ? 8 * row : row / 2 * 8 + row % 2; }

  // at: of the first row in the step; element: of its vectors. Instead of rows that are not in the cache, or that nobody sees, the
  // step's nearest one that is both: choosing between what was loaded and zeros would wait for it.
  MK_METHOD void load(const Part& part, const char* cache, int step, int at, int element) {
    const int base = part.position_of(step), low = larger(part.first, base), high = smaller(part.position, base + kStepPositions) - 1;
    MK_UNROLL
    for (int i = 0; i < rows; i++) {
      const char* from = cache + (i64)larger(smaller(base + at + offset(i), high), low) * kRowBytes + element * kKvBytes;
      MK_UNROLL
      for (int c = 0; c < vectors; c++) v[i][c] = arch::load_words((const u32*)(from + c * stride * kKvBytes));
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

// Elements of two positions at the same place, the even one or the odd one of a word, side by side.
MK_DEVICE u32 even_halves(u32 a, u32 b) { return (a & 0xffffu) | b << 16; }
MK_DEVICE u32 odd_halves(u32 a, u32 b) { return a >> 16 | (b & 0xffff0000u); }
MK_DEVICE u32 word_of(const Vec4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// What a lane has asked for of the cache.
struct MatrixLoads {
  KeyRows keys;
  ValueRows values;

  MK_METHOD void start(const Service& s, const Part& part) {
    const int own = part.first_step() + s.wave * kStepPositions;
    if (own >= part.end) return;
    keys.load(part, part.keys, own, s.lane / 4, s.lane % 4 * 8);
    values.load(part, part.values, own, s.lane % 4 * 2, s.lane / 4 * 8);
  }
};

#if MK_WAVE_SIZE == 32

// packed: the query heads, the key and the value of the token that attends, [kTaskHeads + 2][kHeadDim / 2]. loads: has been
// started.
template <typename Loads>
MK_DEVICE WaveSums attend_by_matrix(Service& s, const Part& part, const u32* packed, Loads& loads) {
  constexpr bool bf16 = kKvType == kBF16;
  const int g = s.lane / 4, t = s.lane % 4;
  const int stride = kServiceWaves * kStepPositions, own = part.first_step() + s.wave * kStepPositions;
  KeyRows& keys = loads.keys;
  ValueRows& values = loads.values;
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
  const u32 *query = packed + smaller(g, kTaskHeads - 1) * kHeadDim / 2, *own_key = packed + kTaskHeads * kHeadDim / 2;
  const u32* own_value = own_key + kHeadDim / 2;
  for (int step = own; step < part.end; step += stride) {
    const int base = part.position_of(step);
    if (part.position >= base && part.position < base + kStepPositions) {
      keys.put_own(part, step, g, 8 * t, own_key);
      values.put_own(part, step, 2 * t, 8 * g, own_value);
    }
    // Both instructions have the same first operand: words 0 and 2 as its rows 0 to 7, words 1 and 3 as rows 8 to 15.
    float low[kEights][4] = {}, high[kEights][4] = {};
    MK_UNROLL
    for (int c = 0; c < (2 * kBlocks64); c++) {
      const Vec4 q = *(const Vec4*)(query + 16 * c + 4 * t);
      const u32 x[4] = {q.x, q.z, q.y, q.w};
      MK_UNROLL
      for (int r = 0; r < kEights; r++) {
        arch::mma_16x8x16<bf16>(low[r], x, keys.v[r][c].x, keys.v[r][c].y);
        arch::mma_16x8x16<bf16>(high[r], x, keys.v[r][c].z, keys.v[r][c].w);
      }
    }
    const bool more = step + stride < part.end;
    if (more) keys.load(part, part.keys, step + stride, g, 8 * t);

    float score[2 * kEights];
    float higher = sums.top;
    bool seen[2 * kEights];
    MK_UNROLL
    for (int i = 0; i < 2 * kEights; i++) {
      score[i] = (low[i / 2][i % 2] + high[i / 2][2 + i % 2]) * MK_ATTN_SCALE;
      if constexpr (MK_ATTN_SOFTCAP > 0.0f) score[i] = soft_cap(score[i], MK_ATTN_SOFTCAP);
      const int at = 2 * t + ValueRows::offset(i);
      seen[i] = step + at < part.end && base + at >= part.first;
      if (seen[i] && score[i] > higher) higher = score[i];
    }
    MK_UNROLL
    for (int mask = 1; mask < 4; mask *= 2) {
      const float other = arch::shuffle_xor(higher, mask);
      higher = other > higher ? other : higher;
    }
    const float fade = fast_exp(sums.top - higher);
    sums.top = higher;
    sums.total *= fade;
    MK_UNROLL
    for (int i = 0; i < 2 * kEights; i++) {
      score[i] = seen[i] ? fast_exp(score[i] - higher) : 0.0f;
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
    MK_UNROLL
    for (int b = 0; b < kBlocks64; b++) {
      MK_UNROLL
      for (int j = 0; j < 4; j++) {
        u32 x[4] = {};
        MK_UNROLL
        for (int i = 0; i < kEights; i++) {
          const u32 w0 = word_of(values.v[2 * i][b], j), w1 = word_of(values.v[2 * i + 1][b], j);
          x[2 * i] = even_halves(w0, w1);
          x[2 * i + 1] = odd_halves(w0, w1);
        }
        arch::mma_16x8x16<bf16>(sums.out[b][j], x, weights[0], weights[1]);
        arch::mma_16x8x16<bf16>(sums.out[b][j], x, rest[0], rest[1]);
      }
    }
    if (more) values.load(part, part.values, step + stride, 2 * t, 8 * g);
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
