// The beginning of p2_attend: a task's query heads, key and value, from the words of h1 to shared memory, with norms and
// rotations; the key and the value also go to the cache.
#pragma once

#include "service.h"

namespace mk {

// Scratch in shared memory, in floats.
struct AttentionScratch {
  float* vectors;  // [kTaskHeads q, k, v][kHeadDim], rotated and rounded
  float* parts;    // [wave][kTaskHeads][kHeadDim + 2]: sums, then maximum and sum of weights
  float* squares;  // [2][kServiceWaves]
  u32* packed;     // [kTaskHeads q, k, v][kHeadDim / 2]: the vectors as they are stored
};
MK_DEVICE AttentionScratch attention_scratch() {
  float* base = shared_at<float>(kShared.attention);
  float* parts = base + round_up(kTaskVectors * kHeadDim, 4) + kPackedWords;
  return {base, parts, parts + kServiceWaves * kTaskHeads * (kHeadDim + 2), (u32*)(base + round_up(kTaskVectors * kHeadDim, 4))};
}

// Where word i of a task's vector j stands in `packed`. Of query heads for matrix instructions the middle two of four words change places,
// so that they are an operand as they stand (phases/attend_matrix.h).
MK_DEVICE int packed_place_of(int j, int i) {
  return kMatrixAttention && j < kTaskHeads ? i / 4 * 4 + i % 2 * 2 + i / 2 % 2 : i;
}

// A layer's angles of a request: cosines, then sines.
MK_DEVICE float* angles(const Service& s, int request, int rope) {
  float* all = kAnglesInShared ? shared_at<float>(kShared.angles) : s.at<float>(kWorkspace.own_angles) + (i64)s.unit * round_up(kAngles, 32);
  return all + (request * kRopeRows + rope) * 2 * kHalfRotary;
}

// For the positions of this token. Formulas: jax_monokernel/rope.py.
MK_DEVICE void fill_angles(Service& s) {
  if constexpr (kHalfRotary > 0) {
    for (int i = s.index; i < kBatch * MK_NUM_ROPES * kHalfRotary; i += kServiceLanes) {
      const int request = i / (MK_NUM_ROPES * kHalfRotary), r = i / kHalfRotary % MK_NUM_ROPES, pair = i % kHalfRotary;
      const RopeRow rope = kRopes[r];
      const float position = (float)s.control().position[request], length = position + 1.0f;
      const bool beyond = length > rope.original_max_position;
      const int row = rope.inv_freq_row + (rope.scaling == 2 && beyond ? 1 : 0);
      float inverse = s.args.constants[MK_INV_FREQ + row * kHalfRotary + pair];
      if (rope.scaling == 1 && beyond) {
        const float stretch = rope.factor * length / rope.original_max_position - (rope.factor - 1.0f);
        constexpr float dims = (float)MK_ROTARY_DIM / (float)(MK_ROTARY_DIM > 2 ? MK_ROTARY_DIM - 2 : 1);
        const float growth = log_(stretch > 1.0f ? stretch : 1.0f) * dims;
        inverse = inverse * exp_(-((float)pair / (float)kHalfRotary) * growth);
      }
      float sin, cos;
      sin_cos(position * inverse, &sin, &cos);
      float* to = angles(s, request, r);
      to[pair] = cos * rope.attention_factor;
      to[kHalfRotary + pair] = sin * rope.attention_factor;
    }
  }
}

// h1 of the unit's group: q, k and v of its heads.
MK_DEVICE Site qkv_site(const Service& s, int layer) {
  return s.site(h1_qkv, s.part<kAttentionGroups>(kWorkspace.qkv, kGroupQkvSize), layer);
}

// One head's `size` words, by one wave, to shared memory.
template <int size>
MK_DEVICE void fetch_head(Service& s, const Site& site, const u32* words, float* to) {
  if constexpr (size % 4 == 0) {
    constexpr int count = (size + arch::kWave * 4 - 1) / (arch::kWave * 4);
    Vec4 v[count];
    const int first = s.lane * 4;
    wait_words<count, is_near(h1_qkv)>(s.waiter, site, words + first, arch::kWave * 4, v, [&](int i) { return size - (first + i * arch::kWave * 4); });
    MK_UNROLL
    for (int i = 0; i < count; i++) {
      const int at = first + i * arch::kWave * 4;
      if (at < size) {
        const Float4 x = decode4(v[i]);
        *(Vec4*)(to + at) = {arch::as_u32(x.v[0]), arch::as_u32(x.v[1]), arch::as_u32(x.v[2]), arch::as_u32(x.v[3])};
      }
    }
  } else {
    constexpr int count = (size + arch::kWave - 1) / arch::kWave;
    u32 v[count];
    wait_single_words<count, is_near(h1_qkv)>(s.waiter, site, words + s.lane, arch::kWave, v, [&](int i) { return s.lane + i * arch::kWave < size; });
    MK_UNROLL
    for (int i = 0; i < count; i++) {
      if (s.lane + i * arch::kWave < size) to[s.lane + i * arch::kWave] = decode(v[i]);
    }
  }
  arch::wave_sync();
}

// RMS norm of one head in shared memory, by one wave.
MK_DEVICE void norm_head(const Service& s, float* x, const float* weights, float scale) {
  for (int i = s.lane; i < kHeadDim; i += arch::kWave) x[i] = x[i] * scale * (MK_NORM_OFFSET + weights[i]);
  arch::wave_sync();
}

MK_DEVICE float sum_squares(const Service& s, const float* x) {
  float sum = 0.0f;
  for (int i = s.lane; i < kHeadDim; i += arch::kWave) sum = arch::fma(x[i], x[i], sum);
  return wave_sum(sum);
}

// The norm over all query (or key) heads needs all of them. Returns the scales of q and of k.
MK_DEVICE void full_norm_scales(Service& s, const Site& site, int request, float* squares, float* q_scale, float* k_scale) {
  const u32* row = site.words + request * line(kQkvSize);
  float sums[2] = {0.0f, 0.0f};
  for (int i = s.index; i - s.lane < kQSize + kKvSize; i += kServiceLanes) {
    u32 v[1];
    wait_single_words<1, is_near(h1_qkv)>(s.waiter, site, row + i, 0, v, [&](int) { return i < kQSize + kKvSize; });
    const float x = i < kQSize + kKvSize ? decode(v[0]) : 0.0f;
    if (i < kQSize) {
      sums[0] = arch::fma(x, x, sums[0]);
    } else {
      sums[1] = arch::fma(x, x, sums[1]);
    }
  }
  for (int i = 0; i < 2; i++) {
    const float sum = wave_sum(sums[i]);
    if (s.lane == 0) squares[i * kServiceWaves + s.wave] = sum;
  }
  s.sync();
  for (int i = 0; i < 2; i++) {
    float sum = 0.0f;
    for (int w = 0; w < kServiceWaves; w++) sum += squares[i * kServiceWaves + w];
    const float scale = 1.0f / arch::sqrt(sum / (float)(i == 0 ? kQSize : kKvSize) + MK_NORM_EPS);
    (i == 0 ? *q_scale : *k_scale) = scale;
  }
}

// A lane holds four neighbouring elements of a head, and the lane whose number differs by kPairLanes those that they are
// rotated with.
constexpr int kHeadLanes = kHeadDim / 4, kPairLanes = kHeadDim / 8;
constexpr bool kHeadInLanes = kHeadDim % 8 == 0 && kHeadLanes <= arch::kWave && (kHeadLanes & (kHeadLanes - 1)) == 0 &&
                              (kHalfRotary == 0 || 2 * kHalfRotary == kHeadDim);

MK_DEVICE Float4 load_shared4(const float* p) {
  const Vec4 v = *(const Vec4*)p;
  return {{arch::as_f32(v.x), arch::as_f32(v.y), arch::as_f32(v.z), arch::as_f32(v.w)}};
}

// Head j of a task (q heads, k, v): from h1 to shared memory and, if it is k or v, to the cache at `row`.
MK_DEVICE void prepare_in_lanes(Service& s, const Site& site, int layer, int request, int j, int from, const Norm& norm, char* row) {
  const bool rotates = j <= kTaskHeads && kHalfRotary > 0 && kLayers[layer].rope >= 0;
  const bool active = s.lane < kHeadLanes;
  const int at = active ? s.lane * 4 : 0;
  Float4 weights = {{1.0f, 1.0f, 1.0f, 1.0f}}, cos = {}, sin = {};
  if (norm.weights != nullptr) weights = norm_weights<kHeadDim, false>(norm, at);
  if (rotates) {
    const float* table = angles(s, request, kLayers[layer].rope);
    const int pair = at % (kHalfRotary > 0 ? kHalfRotary : 1);
    cos = load_shared4(table + pair);
    sin = load_shared4(table + kHalfRotary + pair);
  }
  Vec4 v[1];
  wait_words<1, is_near(h1_qkv)>(s.waiter, site, site.words + request * line(kGroupQkvSize) + from + at, 0, v, [&](int) { return active ? 4 : 0; });
  Float4 x = decode4(v[0]);
  if (norm.weights != nullptr) {
    float scale = 1.0f;
    if constexpr (MK_QK_NORM == 1) {
      float sum = 0.0f;
      MK_UNROLL
      for (int i = 0; i < 4; i++) sum = arch::fma(x.v[i], x.v[i], sum);
      scale = arch::fast_rsqrt(wave_sum(active ? sum : 0.0f) * (1.0f / (float)kHeadDim) + MK_NORM_EPS);
    }
    MK_UNROLL
    for (int i = 0; i < 4; i++) x.v[i] = x.v[i] * scale * weights.v[i];
  }
  if (rotates) {
    MK_UNROLL
    for (int i = 0; i < 4; i++) {
      const float other = arch::shuffle_xor(x.v[i], kPairLanes > 0 ? kPairLanes : 1);
      x.v[i] = s.lane < kPairLanes ? x.v[i] * cos.v[i] - other * sin.v[i] : x.v[i] * cos.v[i] + other * sin.v[i];
    }
  }
  if (active) {
    u32* cache = (u32*)(row + at * kKvBytes);
    if constexpr (kKvType == kF32) {
      MK_UNROLL
      for (int i = 0; i < 4; i++) {
        if (row != nullptr) arch::store_word(cache + i, arch::as_u32(x.v[i]));
      }
    } else {
      const u32 low = pack_pair<kKvType>(x.v[0], x.v[1]), high = pack_pair<kKvType>(x.v[2], x.v[3]);
      x = {{low_of<kKvType>(low), high_of<kKvType>(low), low_of<kKvType>(high), high_of<kKvType>(high)}};
      if (row != nullptr) {
        arch::store_word(cache, low);
        arch::store_word(cache + 1, high);
      }
      u32* packed = attention_scratch().packed + j * kHeadDim / 2;
      packed[packed_place_of(j, at / 2)] = low;
      packed[packed_place_of(j, at / 2 + 1)] = high;
    }
    *(Vec4*)(attention_scratch().vectors + j * kHeadDim + at) = {arch::as_u32(x.v[0]), arch::as_u32(x.v[1]), arch::as_u32(x.v[2]),
                                                                 arch::as_u32(x.v[3])};
  }
}

// The same for any head size.
MK_DEVICE void prepare_in_memory(Service& s, const Site& site, int layer, int request, int j, int from, const Norm& norm, char* row) {
  float* x = attention_scratch().vectors + j * kHeadDim;
  const int rope = kLayers[layer].rope;
  fetch_head<kHeadDim>(s, site, site.words + request * line(kGroupQkvSize) + from, x);
  if (norm.weights != nullptr) {
    float scale = norm.scale;
    if constexpr (MK_QK_NORM == 1) scale = arch::fast_rsqrt(sum_squares(s, x) * (1.0f / (float)kHeadDim) + MK_NORM_EPS);
    norm_head(s, x, norm.weights, scale);
  }
  if (j <= kTaskHeads && kHalfRotary > 0 && rope >= 0) {
    const float *cos = angles(s, request, rope), *sin = cos + kHalfRotary;
    for (int i = s.lane; i < kHalfRotary; i += arch::kWave) {
      const float a = x[i], b = x[i + kHalfRotary];
      x[i] = a * cos[i] - b * sin[i];
      x[i + kHalfRotary] = b * cos[i] + a * sin[i];
    }
    arch::wave_sync();
  }
  u32* cache = (u32*)row;
  if constexpr (kKvType == kF32) {
    for (int i = s.lane; i < kHeadDim; i += arch::kWave) {
      if (row != nullptr) arch::store_word(cache + i, arch::as_u32(x[i]));
    }
  } else {
    for (int i = s.lane; i < kHeadDim / 2; i += arch::kWave) {
      const u32 pair = pack_pair<kKvType>(x[2 * i], x[2 * i + 1]);
      x[2 * i] = low_of<kKvType>(pair);
      x[2 * i + 1] = high_of<kKvType>(pair);
      if (row != nullptr) arch::store_word(cache + i, pair);
      attention_scratch().packed[j * kHeadDim / 2 + packed_place_of(j, i)] = pair;
    }
  }
}

// Takes this task's heads from h1: norm, rotation, rounding; appends the key and value to the cache.
MK_DEVICE void prepare_heads(Service& s, const Site& site, int layer, int request, int group, bool append) {
  const int group_kv_head = group * kTaskHeads / (kHeads / kKvHeads);
  const int kv_head = s.group<kAttentionGroups>() * kGroupKvHeads + group_kv_head;
  float q_scale = 1.0f, k_scale = 1.0f;
  if constexpr (MK_QK_NORM == 2) full_norm_scales(s, site, request, attention_scratch().squares, &q_scale, &k_scale);
  const i64 place = (((i64)request * MK_NUM_LAYERS + layer) * kKvHeads + kv_head) * s.args.capacity + s.control().position[request];
  for (int j = s.wave; j < kTaskVectors; j += kServiceWaves) {
    const bool is_q = j < kTaskHeads, is_k = j == kTaskHeads;
    const int from = is_q ? (group * kTaskHeads + j) * kHeadDim : kGroupQSize + (is_k ? 0 : kGroupKvSize) + group_kv_head * kHeadDim;
    Norm norm = {nullptr, 1.0f};
    if constexpr (MK_QK_NORM == 1) {
      if (is_q || is_k) norm.weights = s.constants + (is_q ? MK_Q_NORM : MK_K_NORM);
    }
    if constexpr (MK_QK_NORM == 2) {
      if (is_q || is_k) norm = {s.constants + (is_q ? MK_Q_NORM + from : MK_K_NORM + from - kQSize), is_q ? q_scale : k_scale};
    }
    char* cache = is_q || !append ? nullptr : (char*)(is_k ? s.args.k_cache : s.args.v_cache) + place * kHeadDim * kKvBytes;
    if constexpr (kHeadInLanes) {
      prepare_in_lanes(s, site, layer, request, j, from, norm, cache);
    } else {
      prepare_in_memory(s, site, layer, request, j, from, norm, cache);
    }
  }
#if MK_WAVE_SIZE == 32
  if constexpr (kCopiesCache) arch::publish_to_copies();
#endif
  s.sync();
}

}  // namespace mk
