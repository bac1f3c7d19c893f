// p2_attend and p2_combine.
//
// A task is kTaskHeads query heads of one request that share a key/value head, over one part of the context. Blocks of
// kSplitBlock positions are dealt to the parts by turns, so that a position belongs to the same unit for ever: nobody else
// reads what it appends to the cache. Units that share a key/value head compute and write the same bits of it.
#pragma once

#include "phases/attend_matrix.h"
#include "phases/heads.h"

namespace mk {

constexpr int kGroupTasks = kGroupHeads / kTaskHeads;  // of one request, in a group of units

constexpr int kLaneElems = kLaneVectors * kKvVector;
static_assert(kHeadDim % 2 == 0 || kKvType == kF32, "elements of 16 bits are stored in pairs");

// Elements of this lane of one position, as they are stored.
struct Position {
  Vec4 vectors[kLaneVectors];
};

MK_DEVICE Position load_position(const char* row, int part) {
  Position x;
  MK_UNROLL
  for (int i = 0; i < kLaneVectors; i++) {
    const int vector = part + i * kPositionLanes;
    x.vectors[i] = zero_vector();
    if constexpr (kKvAligned) {
      if (vector < kPositionVectors) x.vectors[i] = arch::load_words((const u32*)(row + vector * 16));
    } else {
      constexpr int words = kHeadDim * kKvBytes / 4;
      const u32* p = (const u32*)row + vector * 4;
      if (vector * 4 + 0 < words) x.vectors[i].x = arch::load_word(p);
      if (vector * 4 + 1 < words) x.vectors[i].y = arch::load_word(p + 1);
      if (vector * 4 + 2 < words) x.vectors[i].z = arch::load_word(p + 2);
      if (vector * 4 + 3 < words) x.vectors[i].w = arch::load_word(p + 3);
    }
  }
  return x;
}

MK_DEVICE void unpack_position(const Position& x, float (&out)[kLaneElems]) {
  MK_UNROLL
  for (int i = 0; i < kLaneVectors; i++) {
    float elements[kKvVector];
    unpack<kKvType>(x.vectors[i], elements);
    MK_UNROLL
    for (int e = 0; e < kKvVector; e++) out[i * kKvVector + e] = elements[e];
  }
}

// The same of a vector in the scratch, which is the position that is not in the cache yet.
MK_DEVICE Position load_own_position(const AttentionScratch& scratch, int vector, int part) {
  Position x;
  MK_UNROLL
  for (int i = 0; i < kLaneVectors; i++) {
    const int at = part + i * kPositionLanes;
    const u32* from = kKvType == kF32 ? (const u32*)scratch.vectors : scratch.packed;
    x.vectors[i] = zero_vector();
    if (at < kPositionVectors) x.vectors[i] = *(const Vec4*)(from + vector * (kHeadDim * kKvBytes / 4) + at * 4);
  }
  return x;
}

MK_DEVICE Position either(bool first, const Position& a, const Position& b) {
  Position x;
  MK_UNROLL
  for (int i = 0; i < kLaneVectors; i++) {
    const Vec4 &v = a.vectors[i], &w = b.vectors[i];
    x.vectors[i] = {first ? v.x : w.x, first ? v.y : w.y, first ? v.z : w.z, first ? v.w : w.w};
  }
  return x;
}

MK_DEVICE void load_own(const float* x, int part, float (&out)[kLaneElems]) {
  MK_UNROLL
  for (int i = 0; i < kLaneVectors; i++) {
    MK_UNROLL
    for (int e = 0; e < kKvVector; e++) {
      const int at = (part + i * kPositionLanes) * kKvVector + e;
      out[i * kKvVector + e] = at < kHeadDim ? x[at] : 0.0f;
    }
  }
}

// A position of a part of the context that one of the lanes looks at, or one that nobody sees.
MK_DEVICE int lane_place(const Part& context, int sub, int i, int u) {
  const int at = (int)arch::fresh((u32)(i + u * kWavePositions + sub));
  const int p = context.position_of(at);
  return at < context.end && p >= context.first ? p : context.position + 1;
}

// What a lane has asked for of the cache.
struct LaneLoads {
  Position keys[kUnroll], values[kUnroll];

  MK_METHOD void load(const Part& context, int lane, int i, const char* cache, Position (&to)[kUnroll]) {
    MK_UNROLL
    for (int u = 0; u < kUnroll; u++) {
      const int p = lane_place(context, lane / kPositionLanes, i, u);
      to[u] = {};
      if (p < context.position) to[u] = load_position(cache + (i64)p * kCacheRowBytes, lane % kPositionLanes);
    }
  }
  MK_METHOD void start(Service& s, const Part& context) {
    load(context, s.lane, s.wave * kStepPlaces, context.keys, keys);
    load(context, s.lane, s.wave * kStepPlaces, context.values, values);
  }
  // As of MatrixLoads.
  MK_METHOD void get_keys(Service&, const Part&, int) {}
  MK_METHOD void keys_used(Service& s, const Part& context, int step) { load(context, s.lane, step + kStepsApart, context.keys, keys); }
  MK_METHOD void get_values(Service&, const Part&, int) {}
  MK_METHOD void values_used(Service& s, const Part& context, int step) { load(context, s.lane, step + kStepsApart, context.values, values); }
};

#if MK_WAVE_SIZE == 32

// The same, copied to shared memory.
struct LaneCopies {
  Position keys[kUnroll], values[kUnroll];

  static MK_METHOD void take(const Service& s, const Part& context, int step, const char* copy, Position (&to)[kUnroll]) {
    const int base = context.position_of(step), part = s.lane % kPositionLanes;
    MK_UNROLL
    for (int u = 0; u < kUnroll; u++) {
      const int p = lane_place(context, s.lane / kPositionLanes, step, u);
      to[u] = {};
      if (p >= context.position) continue;
      MK_UNROLL
      for (int i = 0; i < kLaneVectors; i++) {
        const int vector = part + i * kPositionLanes;
        if (vector < kPositionVectors) to[u].vectors[i] = *(const Vec4*)(copy + (p - base) * kCacheRowBytes + vector * 16);
      }
    }
  }
  MK_METHOD void start(Service& s, const Part& context) { CacheCopies::start(s, context, s.wave * kStepPlaces); }
  MK_METHOD void get_keys(Service& s, const Part& context, int step) {
    if (!context.is_alone(context.position_of(step))) CacheCopies::await(s);
    take(s, context, step, CacheCopies::keys(s, s.cache_slot), keys);
  }
  MK_METHOD void keys_used(Service&, const Part&, int) {}
  MK_METHOD void get_values(Service& s, const Part& context, int step) {
    take(s, context, step, CacheCopies::values(s, s.cache_slot), values);
  }
  MK_METHOD void values_used(Service& s, const Part& context, int step) {
    if (!context.is_alone(context.position_of(step))) CacheCopies::used(s, context, step);
  }
};

#endif  // MK_WAVE_SIZE == 32

// Attention without matrix instructions, for any head and cache: a position's elements over neighbouring lanes, which hold f32
// sums. Stores them to scratch.parts. raw: has been started.
template <typename Loads>
MK_DEVICE void attend_by_lanes(Service& s, const Part& context, Loads& raw) {
  const AttentionScratch scratch = attention_scratch();
  const int part = s.lane % kPositionLanes, sub = s.lane / kPositionLanes;
  [[maybe_unused]] const float *own_key = scratch.vectors + kTaskHeads * kHeadDim, *own_value = own_key + kHeadDim;
  const int position = context.position;
  auto place = [&](int i, int u) { return lane_place(context, sub, i, u); };
  Position new_key, new_value;  // where whole vectors can be taken instead of those of the cache
  if constexpr (kKvAligned) {
    new_key = load_own_position(scratch, kTaskHeads, part);
    new_value = load_own_position(scratch, kTaskHeads + 1, part);
  }

  float q[kTaskHeads][kLaneElems], sums[kTaskHeads][kLaneElems], top[kTaskHeads], total[kTaskHeads];
  MK_UNROLL
  for (int h = 0; h < kTaskHeads; h++) {
    load_own(scratch.vectors + h * kHeadDim, part, q[h]);
    top[h] = kLowest;
    total[h] = 0.0f;
    MK_UNROLL
    for (int e = 0; e < kLaneElems; e++) sums[h][e] = 0.0f;
  }
  for (int i = s.wave * kStepPlaces; i < context.end; i += kStepsApart) {
    raw.get_keys(s, context, i);
    bool seen[kUnroll];
    float score[kTaskHeads][kUnroll];
    MK_UNROLL
    for (int u = 0; u < kUnroll; u++) {
      const int p = place(i, u);
      seen[u] = p <= position;
      float k[kLaneElems];
      if constexpr (kKvAligned) {
        unpack_position(either(p == position, new_key, raw.keys[u]), k);
      } else {
        unpack_position(raw.keys[u], k);
        if (p == position) load_own(own_key, part, k);
      }
      MK_UNROLL
      for (int h = 0; h < kTaskHeads; h++) {
        score[h][u] = 0.0f;
        MK_UNROLL
        for (int e = 0; e < kLaneElems; e++) score[h][u] = arch::fma(q[h][e], k[e], score[h][u]);
      }
    }
    raw.keys_used(s, context, i);
    float fade[kTaskHeads];
    MK_UNROLL
    for (int h = 0; h < kTaskHeads; h++) {
      MK_UNROLL
      for (int step = 1; step < kPositionLanes; step *= 2) {
        MK_UNROLL
        for (int u = 0; u < kUnroll; u++) score[h][u] += arch::shuffle_xor(score[h][u], step);
      }
      float higher = top[h];
      MK_UNROLL
      for (int u = 0; u < kUnroll; u++) {
        score[h][u] = scaled_score(score[h][u]);
        if (seen[u] && score[h][u] > higher) higher = score[h][u];
      }
      fade[h] = weight_of(top[h] - higher);
      top[h] = higher;
      total[h] *= fade[h];
      MK_UNROLL
      for (int u = 0; u < kUnroll; u++) {
        score[h][u] = seen[u] ? weight_of(score[h][u] - higher) : 0.0f;
        total[h] += score[h][u];
      }
      MK_UNROLL
      for (int e = 0; e < kLaneElems; e++) sums[h][e] *= fade[h];
    }
    raw.get_values(s, context, i);
    MK_UNROLL
    for (int u = 0; u < kUnroll; u++) {
      float v[kLaneElems];
      if constexpr (kKvAligned) {
        unpack_position(either(place(i, u) == position, new_value, raw.values[u]), v);
      } else {
        unpack_position(raw.values[u], v);
        if (place(i, u) == position) load_own(own_value, part, v);
      }
      MK_UNROLL
      for (int h = 0; h < kTaskHeads; h++) {
        MK_UNROLL
        for (int e = 0; e < kLaneElems; e++) sums[h][e] = arch::fma(score[h][u], v[e], sums[h][e]);
      }
    }
    raw.values_used(s, context, i);
  }

  // Positions of one wave, then those of all waves.
  MK_UNROLL
  for (int h = 0; h < kTaskHeads; h++) {
    MK_UNROLL
    for (int step = kPositionLanes; step < arch::kWave; step *= 2) {
      const float other_top = arch::shuffle_xor(top[h], step), other_total = arch::shuffle_xor(total[h], step);
      const float higher = other_top > top[h] ? other_top : top[h];
      const float mine = weight_of(top[h] - higher), theirs = weight_of(other_top - higher);
      top[h] = higher;
      total[h] = total[h] * mine + other_total * theirs;
      MK_UNROLL
      for (int e = 0; e < kLaneElems; e++) {
        sums[h][e] = sums[h][e] * mine + arch::shuffle_xor(sums[h][e], step) * theirs;
      }
    }
    float* to = scratch.parts + (s.wave * kTaskHeads + h) * (kHeadDim + 2);
    if (sub == 0) {
      MK_UNROLL
      for (int i = 0; i < kLaneVectors; i++) {
        MK_UNROLL
        for (int e = 0; e < kKvVector; e++) {
          const int at = (part + i * kPositionLanes) * kKvVector + e;
          if (at < kHeadDim) to[at] = sums[h][i * kKvVector + e];
        }
      }
      if (part == 0) {
        to[kHeadDim] = top[h];
        to[kHeadDim + 1] = total[h];
      }
    }
  }
}

template <typename Loads>
MK_DEVICE void attend_part(Service& s, const Part& context, Loads& loads) {
  if constexpr (kMatrixAttention) {
    const AttentionScratch scratch = attention_scratch();
    store_sums(s, attend_by_matrix(s, context, scratch.packed, loads), scratch.parts + s.wave * kTaskHeads * (kHeadDim + 2));
  } else {
    attend_by_lanes(s, context, loads);
  }
}

template <bool, typename A, typename B>
struct Choice {
  using Type = A;
};
template <typename A, typename B>
struct Choice<false, A, B> {
  using Type = B;
};
#if MK_WAVE_SIZE == 32
using CacheLoads = Choice<kMatrixAttention, Choice<kCopiesCache, MatrixCopies, MatrixLoads>::Type,
                          Choice<kCopiesCache, LaneCopies, LaneLoads>::Type>::Type;
#else
using CacheLoads = LaneLoads;
#endif

// h2 of a request, of the heads of the unit's group.
MK_DEVICE u32* attended_words(const Service& s, int request) {
  return s.at<u32>(s.part<kAttentionGroups>(kWorkspace.attended, kGroupQSize)) + request * line(kGroupQSize);
}
// A head of the unit's group among those of all requests.
MK_DEVICE int number_of_head(const Service& s, int request, int head) {
  return request * kHeads + s.group<kAttentionGroups>() * kGroupHeads + head;
}

// A task, and its part of the context.
struct Task {
  int request, group, split;  // group: of heads, among those of the units' group
  bool live, owns_last;
  Part part;
};

MK_DEVICE Task find_task(const Service& s, int layer, int number) {
  Task task;
  task.split = number % kSplits;
  task.group = number / kSplits % kGroupTasks;
  task.request = number / (kSplits * kGroupTasks);
  task.live = s.control().live[task.request] != 0;
  const int position = s.control().position[task.request];
  const int window = kLayers[layer].window;
  const int first = window > 0 && position + 1 > window ? position + 1 - window : 0;
  const int last_block = position / kSplitBlock;
  task.owns_last = last_block % kSplits == task.split;
  const int kv_head = s.group<kAttentionGroups>() * kGroupKvHeads + task.group * kTaskHeads / (kHeads / kKvHeads);
  const i64 head = ((i64)task.request * MK_NUM_LAYERS + layer) * kKvHeads + kv_head;
  const i64 base = head * s.args.capacity * kHeadDim * kKvBytes;
  const int first_block = first / kSplitBlock;
  const int begin_block = first_block + (task.split - first_block % kSplits + kSplits) % kSplits;
  const int blocks = task.live && begin_block <= last_block ? (last_block - begin_block) / kSplits + 1 : 0;
  // Without the places after the last position.
  const int end = task.owns_last && blocks > 0 ? (blocks - 1) * kSplitBlock + position % kSplitBlock + 1 : blocks * kSplitBlock;
  task.part = {(const char*)s.args.k_cache + base, (const char*)s.args.v_cache + base, position, first, begin_block, end};
  return task;
}

// Brings a part of the context nearer.
MK_DEVICE void prefetch_part(const Service& s, const Part& part) {
  if (!kPrefetches || s.wave != 0) return;
  for (int block = s.lane; block * kSplitBlock < part.end; block += arch::kWave) prefetch_places(part, block * kSplitBlock, kSplitBlock);
}

// Asks for what the unit's first task reads of the cache before its query is there. Loads long before: where words are waited for, those that
// were asked for just before would hold up the first look. Copies when there is room for them, and AMD's loads when there are registers.
MK_DEVICE void start_first_task(Service& s, int layer, CacheLoads& loads) {
  const int place = s.member<kAttentionGroups>();
  if (place >= kTasks) return;
  const Part part = find_task(s, layer, place).part;
  loads.start(s, part);
  prefetch_part(s, part);
}

// h2 where hand-offs are packed.
MK_DEVICE void publish_attended(const Service& s, int layer, int request, int column, float y) {
  const Packed to = s.packed(h2_attended, kWorkspace.attended, kQSize, layer);
  publish_packed(packed_place(to, request, kQSize, column), to.clears, y);
}

MK_DEVICE void attend(Service& s, int layer, const Task& task, CacheLoads& loads) {
  const int group = task.group, request = task.request;
  [[maybe_unused]] const int split = task.split;
  [[maybe_unused]] const u32 parity = qkv_site(s, layer).parity;
  const AttentionScratch scratch = attention_scratch();
  renew(s, [&](Service& now) {
    prepare_heads(now, qkv_site(now, layer), layer, request, group, task.live && task.owns_last);
  });
  s.mark(kPrepared);
  attend_part(s, task.part, loads);
  s.sync();
  for (int i = s.index; i < kTaskHeads * kHeadDim; i += kServiceLanes) {
    const int h = i / kHeadDim, d = i % kHeadDim, head = group * kTaskHeads + h;
    const float* from = scratch.parts + h * (kHeadDim + 2);
    constexpr int stride = kTaskHeads * (kHeadDim + 2);
    float highest = kLowest;
    MK_UNROLL
    for (int w = 0; w < kServiceWaves; w++) {
      const float t = from[w * stride + kHeadDim];
      highest = t > highest ? t : highest;
    }
    float sum = 0.0f, weights = 0.0f;
    MK_UNROLL
    for (int w = 0; w < kServiceWaves; w++) {
      const float weight = weight_of(from[w * stride + kHeadDim] - highest);
      sum = arch::fma(weight, from[w * stride + d], sum);
      weights = arch::fma(weight, from[w * stride + kHeadDim + 1], weights);
    }
    if constexpr (kSplits == 1) {
      const float y = task.live ? sum / weights : 0.0f;
      if constexpr (kPacked) {
        publish_attended(s, layer, request, head * kHeadDim + d, y);
      } else {
        store_word_of<h2_attended>(attended_words(s, request) + head * kHeadDim + d, encode(y, parity));
      }
    } else {
      u32* to = s.at<u32>(kWorkspace.partial) + (number_of_head(s, request, head) * kSplits + split) * line(kHeadDim + 2);
      store_word_of<h3_partial>(to + d, encode(sum, parity));
      if (d == 0) {
        store_word_of<h3_partial>(to + kHeadDim, encode(highest, parity));
        store_word_of<h3_partial>(to + kHeadDim + 1, encode(weights, parity));
      }
    }
  }
  s.sync();  // the scratch is free
  s.mark(kAttended);
}

// loads: those of the first task have been started.
MK_DEVICE void p2_attend(Service& s, int layer, CacheLoads& loads) {
  const int place = s.member<kAttentionGroups>();
  for (int number = place; number < kTasks; number += kAttentionUnits) {
    const Task task = find_task(s, layer, number);
    if (number != place) {
      loads.start(s, task.part);
      if constexpr (kTasks > kAttentionUnits) prefetch_part(s, task.part);
    }
    attend(s, layer, task, loads);
  }
}

// Joins the parts of the context: one head of one request after the other, one lane per element.
MK_DEVICE void p2_combine(Service& s, int layer) {
  if constexpr (kSplits > 1) {
    const Site site = s.site(h3_partial, kWorkspace.partial, layer);
    constexpr int pieces = (kHeadDim + arch::kWave - 1) / arch::kWave;
    constexpr int at_once = kSplits < 8 ? kSplits : 8;
    const int first = s.member<kAttentionGroups>() + kAttentionUnits * s.wave;
    for (int i = first; i < kBatch * kGroupHeads * pieces; i += kAttentionUnits * kServiceWaves) {
      const int head = i / pieces, d = i % pieces * arch::kWave + s.lane;  // head: of all requests, in the units' group
      const int among_all = kAttentionGroups == 1 ? head : number_of_head(s, head / kGroupHeads, head % kGroupHeads);
      const u32* words = site.words + among_all * kSplits * line(kHeadDim + 2);
      float sum = 0.0f, weights = 0.0f, top = kLowest;
      for (int split = 0; split < kSplits; split += at_once) {
        u32 v[3 * at_once];  // of each part: the value, the highest score, the sum of weights; all at once, as each look is a round trip
        const u32* from = words + split * line(kHeadDim + 2);
        auto in_head = [&](int j) { return split + j < kSplits; };
        auto place = [&](int i) { return from + i / 3 * line(kHeadDim + 2) + (i % 3 > 0 ? kHeadDim - 1 + i % 3 : d < kHeadDim ? d : 0); };
        wait_word_places<3 * at_once, is_near(h3_partial)>(s.waiter, site, place, v, [&](int i) { return in_head(i / 3); });
        MK_UNROLL
        for (int j = 0; j < at_once; j++) {
          if (!in_head(j)) continue;
          const float t = decode(v[3 * j + 1]), higher = t > top ? t : top;
          const float fade = weight_of(top - higher), weight = weight_of(t - higher);
          sum = sum * fade + decode(v[3 * j]) * weight;
          weights = weights * fade + decode(v[3 * j + 2]) * weight;
          top = higher;
        }
      }
      const int request = head / kGroupHeads;
      const float y = s.control().live[request] != 0 ? sum / weights : 0.0f;
      if constexpr (kPacked) {
        if (d < kHeadDim) publish_attended(s, layer, request, head % kHeads * kHeadDim + d, y);
      } else if (d < kHeadDim) {
        store_word_of<h2_attended>(attended_words(s, request) + head % kGroupHeads * kHeadDim + d, encode(y, site.parity));
      }
    }
  }
}

}  // namespace mk
