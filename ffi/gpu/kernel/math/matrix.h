// Products of weights with up to 16 requests' activations, one atom at a time.
//
// The activations of an atom are read as 16-byte fragments: a lane's k block of the request (or requests) that it stands for.
// Sums are f32. After the last atom of a run the lanes' sums go to shared memory: products [tile][batch][row][wave].
//
// With waves of 64 the matrix instruction has 16 blocks of 4 requests and 4 rows. Up to four requests have a k block in each. With more,
// a half or a quarter of the wave's lanes has four of the requests, and takes the weights of all k blocks, a half or a quarter of
// them by each instruction: then fewer lanes have sums of the same product to add up.
#pragma once

#include "config.h"

namespace mk {

MK_DEVICE float bf16_low(u32 pair) { return arch::as_f32(pair << 16); }
MK_DEVICE float bf16_high(u32 pair) { return arch::as_f32(pair & 0xffff0000u); }

MK_DEVICE float from_f16(u32 half) {
  const u32 sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u) return arch::as_f32(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // The exponent is put right by a multiplication, which is exact and handles subnormal numbers too.
  return arch::as_f32(sign | arch::as_u32(arch::as_f32(magnitude << 13) * 0x1p112f));
}

MK_DEVICE u32 to_f16(float v) {
  const u32 bits = arch::as_u32(v), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7e00u;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and above
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 rounds at 2^-24
    return sign | (arch::as_u32(arch::as_f32(magnitude) + 0.5f) - 0x3f000000u);
  }
  return sign | ((magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13);
}

// The f32 value of a stored element, and the reverse.
template <int type>
MK_DEVICE u32 pack_pair(float low, float high) {
  if constexpr (type == kBF16) return arch::pack_bf16(low, high);
  return to_f16(low) | to_f16(high) << 16;
}
template <int type>
MK_DEVICE float low_of(u32 pair) {
  if constexpr (type == kBF16) return bf16_low(pair);
  return from_f16(pair & 0xffffu);
}
template <int type>
MK_DEVICE float high_of(u32 pair) {
  if constexpr (type == kBF16) return bf16_high(pair);
  return from_f16(pair >> 16);
}
template <int type>
MK_DEVICE float rounded(float v) {
  if constexpr (type == kBF16) return bf16_low(arch::pack_bf16(v, 0.0f));
  if constexpr (type == kF16) return from_f16(to_f16(v));
  return v;
}
template <int type>
MK_DEVICE void unpack(const Vec4& v, float (&out)[type == kF32 ? 4 : 8]) {
  if constexpr (type == kF32) {
    out[0] = arch::as_f32(v.x);
    out[1] = arch::as_f32(v.y);
    out[2] = arch::as_f32(v.z);
    out[3] = arch::as_f32(v.w);
  } else {
    out[0] = low_of<type>(v.x);
    out[1] = high_of<type>(v.x);
    out[2] = low_of<type>(v.y);
    out[3] = high_of<type>(v.y);
    out[4] = low_of<type>(v.z);
    out[5] = high_of<type>(v.z);
    out[6] = low_of<type>(v.w);
    out[7] = high_of<type>(v.w);
  }
}

// Where a lane's weights stand in an atom.
MK_DEVICE int lane_row(int lane) { return MK_ROW_MAJOR_ATOM ? lane / kBlocks : lane % kTileRows; }
MK_DEVICE int lane_block(int lane) { return MK_ROW_MAJOR_ATOM ? lane % kBlocks : lane / kTileRows; }

constexpr bool kMatrixUnit = kWeightType != kF32;
// Requests that one matrix instruction takes, and how many fragments of activations an atom so needs.
constexpr int kColumns = !kMatrixUnit ? 1 : arch::kWave == 32 ? 8 : 4;
#if MK_WAVE_SIZE == 32
constexpr int kFragments = (kBatch + kColumns - 1) / kColumns;
#else
constexpr int kFragments = !kMatrixUnit ? kBatch : kBatch <= 4 ? 1 : kBatch <= 8 ? 2 : 4;
constexpr int kParts = kMatrixUnit ? kFragments : 1;  // of the lanes
constexpr int kPartBlocks = kBlocks / kParts;         // k blocks that a part has at once
constexpr int kPartLanes = arch::kWave / kParts;
#endif

struct Fragments {
  Vec4 x[kFragments];
};

MK_DEVICE Vec4 zero_vector() { return {0, 0, 0, 0}; }

// Activations of this lane's k block of an atom whose first column is `column` of what is resident.
MK_DEVICE Fragments load_fragments(const char* activations, int column, int lane) {
  Fragments f;
#if MK_WAVE_SIZE == 64
  if constexpr (kMatrixUnit) {
    // Lanes without a request may have anything: theirs are sums that nobody looks at.
    const int request = smaller(lane / kPartLanes * kColumns + lane_row(lane), kBatch - 1);
    const char* at = activations + request * kRowBytes + (column + lane_block(lane) % kPartBlocks * kVector) * kWeightBytes;
    MK_UNROLL
    for (int i = 0; i < kFragments; i++) f.x[i] = *(const Vec4*)(at + i * kPartBlocks * 16);
    return f;
  }
#endif
  const char* at = activations + (column + lane_block(lane) * kVector) * kWeightBytes;
  MK_UNROLL
  for (int i = 0; i < kFragments; i++) {
    // Rows of a matrix without a request may hold anything: theirs are sums that nobody looks at.
    const int request = smaller(i * kColumns + (kMatrixUnit ? lane_row(lane) : 0), kBatch - 1);
    f.x[i] = *(const Vec4*)(at + request * kRowBytes);
  }
  return f;
}

// Sums of a lane. Two sets, used by turns, so that an instruction need not wait for the one before.
constexpr int kSums = kMatrixUnit ? 4 : kBatch;

struct Sums {
  float even[kSums], odd[kSums];
};

MK_DEVICE void clear(Sums& s) {
  MK_UNROLL
  for (int i = 0; i < kSums; i++) s.even[i] = s.odd[i] = 0.0f;
}

#if MK_WAVE_SIZE == 64
// The same, where the compiler would take other registers, to move what comes into them later.
MK_DEVICE void clear_again(Sums& s) {
  MK_UNROLL
  for (int i = 0; i < kSums; i++) {
    s.even[i] = arch::as_f32(arch::fresh(0u));
    s.odd[i] = arch::as_f32(arch::fresh(0u));
  }
}
#endif

MK_DEVICE void join(Sums& s, const Sums& other) {
  MK_UNROLL
  for (int i = 0; i < kSums; i++) {
    s.even[i] += other.even[i];
    s.odd[i] += other.odd[i];
  }
}

#if MK_WAVE_SIZE == 64
// Requests are rows and weights columns of the instruction, so that a lane has sums of one row of weights.
template <int part, typename AnySums>
MK_DEVICE void multiply_parts(AnySums& s, const Vec4& w, const Fragments& f) {
  if constexpr (part < kParts) {
    const u32 x0[2] = {f.x[part].x, f.x[part].y}, x1[2] = {f.x[part].z, f.x[part].w}, w0[2] = {w.x, w.y}, w1[2] = {w.z, w.w};
    arch::mfma_4x4x4<kWeightType == kBF16, kParts, part>(s.even, x0, w0);
    arch::mfma_4x4x4<kWeightType == kBF16, kParts, part>(s.odd, x1, w1);
    multiply_parts<part + 1>(s, w, f);
  }
}
#endif

// A template, so that the instructions of the other kind of weights need not exist.
template <typename AnySums>
MK_DEVICE void multiply(AnySums& s, const Vec4& w, const Fragments& f) {
  if constexpr (!kMatrixUnit) {
    MK_UNROLL
    for (int b = 0; b < kBatch; b++) {
      s.even[b] = arch::fma(arch::as_f32(w.x), arch::as_f32(f.x[b].x), s.even[b]);
      s.odd[b] = arch::fma(arch::as_f32(w.y), arch::as_f32(f.x[b].y), s.odd[b]);
      s.even[b] = arch::fma(arch::as_f32(w.z), arch::as_f32(f.x[b].z), s.even[b]);
      s.odd[b] = arch::fma(arch::as_f32(w.w), arch::as_f32(f.x[b].w), s.odd[b]);
    }
  } else {
#if MK_WAVE_SIZE == 32
    // Any order of the columns will do, if it is the same for both operands: here lane block q holds columns 8q to 8q + 7,
    // of which the first instruction takes four and the second the others.
    if constexpr (kSwapped) {
      // Rows 0 to 7 of the first operand are words 0 and 2 of the requests' activations, rows 8 to 15 words 1 and 3.
      const u32 x[4] = {f.x[0].x, f.x[0].y, f.x[0].z, f.x[0].w};
      arch::mma_16x8x16<kWeightType == kBF16>(s.even, x, w.x, w.y);
      arch::mma_16x8x16<kWeightType == kBF16>(s.odd, x, w.z, w.w);
      return;
    }
    const Vec4 top = f.x[0], bottom = kFragments > 1 ? f.x[kFragments - 1] : zero_vector();
    const u32 first[4] = {top.x, bottom.x, top.y, bottom.y}, second[4] = {top.z, bottom.z, top.w, bottom.w};
    arch::mma_16x8x16<kWeightType == kBF16>(s.even, first, w.x, w.y);
    arch::mma_16x8x16<kWeightType == kBF16>(s.odd, second, w.z, w.w);
#else
    multiply_parts<0>(s, w, f);
#endif
  }
}

// Of one fragment, where all requests fit in one.
template <typename AnySums>
MK_DEVICE void multiply_one(AnySums& s, const Vec4& w, const Vec4& x) {
  Fragments f;
  f.x[0] = x;
  multiply(s, w, f);
}

#if MK_WAVE_SIZE == 64

constexpr int kTileProducts = kBatch * kTileRows * kWaves;

// The lanes of a row of weights are 4 apart, and each has sums of all requests of its part of the lanes. Of 16 lanes those of a
// row take one of four requests each.
MK_DEVICE int lane_request(int lane) { return lane / kPartLanes * kColumns + lane / 4 % 4; }

// The lane's place in products of a tile.
MK_DEVICE int product_place(int wave, int lane) { return (lane_request(lane) * kTileRows + lane_row(lane)) * kWaves + wave; }

// Adds a run's sums to products, or starts them. to: the lane's place.
template <typename AnySums>
MK_DEVICE void flush(const AnySums& s, float* to, int lane, bool add) {
  constexpr int count = kMatrixUnit ? smaller(kBatch, kColumns) : kBatch;
  MK_UNROLL
  for (int first = 0; first < count; first += 4) {
    const bool puts = lane % kPartLanes < 16 && first + lane_request(lane) < kBatch;
    float* place = to + first * kTileRows * kWaves;
    const float before = puts && add ? *place : 0.0f;
    float sum = 0.0f;
    MK_UNROLL
    for (int i = 0; i < 4; i++) {
      if (first + i >= count) continue;
      const float v = arch::sum_fours(s.even[first + i] + s.odd[first + i]);
      sum = i == 0 || i == lane / 4 % 4 ? v : sum;
    }
    if constexpr (kPartLanes == 64) sum = arch::sum_quarters(sum);
    if constexpr (kPartLanes == 32) sum += arch::shuffle_xor(sum, 16);
    if (puts) *place = before + sum;
  }
}

#else

// Adds a run's sums to products of `tile`, or starts them.
template <typename AnySums>
MK_DEVICE void flush(const AnySums& s, float* products, int tile, int wave, int lane, bool add) {
  auto put = [&](int request, int row, float v) {
    float* to = products + ((tile * kBatch + request) * kTileRows + row) * kWaves + wave;
    *to = add ? *to + v : v;
  };
  if constexpr (!kMatrixUnit) {
    MK_UNROLL
    for (int b = 0; b < kBatch; b++) {
      float v = s.even[b] + s.odd[b];
      // The lanes of a row are neighbours.
      MK_UNROLL
      for (int i = 1; i < kBlocks; i *= 2) v += arch::shuffle_xor(v, i);
      if (lane_block(lane) == 0) put(b, lane_row(lane), v);
    }
  } else {
    const int request = lane / 4, row = lane % 4 * 2;
    if (request < kBatch) {
      put(request, row, s.even[0] + s.odd[kSwapped ? 2 : 0]);
      put(request, row + 1, s.even[1] + s.odd[kSwapped ? 3 : 1]);
    }
    if (kBatch > 8 && request + 8 < kBatch) {
      put(request + 8, row, s.even[2] + s.odd[2]);
      put(request + 8, row + 1, s.even[3] + s.odd[3]);
    }
  }
}

#endif

}  // namespace mk
