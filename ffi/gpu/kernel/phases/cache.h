// What p2_attend reads of the KV cache: parts of a context, and copies of a wave's steps in shared memory.
#pragma once

#include "service.h"

namespace mk {

constexpr int kSplitBlock = 64;
constexpr int kStepsApart = kServiceWaves * kStepPlaces;  // places from a step of a wave to its next one

// Scores are those of which weights are powers of e, or with 16-bit caches of 2: that is exact enough for them, and faster.
constexpr bool kPowersOf2 = kKvType != kF32;
constexpr float kLog2E = 1.44269502f, kLowest = -1e30f;  // the latter finite, so that differences are no NaN
MK_DEVICE float scaled_score(float product) {
  if constexpr (MK_ATTN_SOFTCAP > 0.0f) return soft_cap(product * MK_ATTN_SCALE, MK_ATTN_SOFTCAP) * (kPowersOf2 ? kLog2E : 1.0f);
  return product * (kPowersOf2 ? MK_ATTN_SCALE * kLog2E : MK_ATTN_SCALE);
}
MK_DEVICE float weight_of(float score) { return kPowersOf2 ? arch::fast_exp2(score) : fast_exp(score); }

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
  // Whether all of a step's positions are seen, and in the cache.
  MK_METHOD bool is_full(int base) const { return base >= first && base + kStepPlaces <= position; }
};

// Whether keys and values are brought nearer before they are asked for: a single request's, whose context is not split, and so short
// that a unit takes few rounds. Of others, what is on its way already is as much as memory gives.
constexpr bool kPrefetches = kBatch == 1 && kSplits == 1 && !kCopiesCache;

// Places [begin, begin + count) of a part, as far as they exist; the first does, and all are of one block.
MK_DEVICE void prefetch_places(const Part& part, int begin, int count) {
  if constexpr (kKvAligned) {
    const int bytes = smaller(count, part.end - begin) * kCacheRowBytes;
    const i64 from = (i64)part.position_of(begin) * kCacheRowBytes;
    arch::prefetch(part.keys + from, bytes);
    arch::prefetch(part.values + from, bytes);
  }
}

#if MK_WAVE_SIZE == 32

// Copies of a wave's steps: kStepPlaces neighbouring places each, kStepsApart from one to the next. A wave has kCacheSlots slots,
// which take turns. A step of which nothing that is seen is in the cache has no copy.
struct CacheCopies {
  static MK_METHOD char* keys(const Service& s, int slot) {
    return shared_at<char>(kShared.cache) + (s.wave * kCacheSlots + slot) * 2 * kCacheCopyBytes;
  }
  static MK_METHOD char* values(const Service& s, int slot) { return keys(s, slot) + kCacheCopyBytes; }
  static MK_METHOD u64* barrier(const Service& s, int slot) {
    return shared_at<u64>(kShared.cache_barriers) + s.wave * kCacheSlots + slot;
  }

  static MK_METHOD void request(const Service& s, const Part& part, int step, int slot) {
    if (step >= part.end || s.lane != 0) return;
    const int base = part.position_of(step);
    if (part.is_alone(base)) return;
    const int bytes = smaller(kStepPlaces, part.position - base) * kCacheRowBytes;
    const i64 from = (i64)base * kCacheRowBytes;
    arch::announce_copies(barrier(s, slot), 2 * bytes);
    arch::copy_in(keys(s, slot), part.keys + from, bytes, barrier(s, slot));
    arch::copy_in(values(s, slot), part.values + from, bytes, barrier(s, slot));
  }

  // Requests the first ones.
  static MK_METHOD void start(const Service& s, const Part& part, int first) {
    arch::leave_to_copies();
    MK_UNROLL
    for (int i = 0; i < kCacheSlots; i++) request(s, part, first + i * kStepsApart, (s.cache_slot + i) % kCacheSlots);
  }
  // For each step that has a copy: waits for the next slot.
  static MK_METHOD void await(const Service& s) { arch::await_copies(barrier(s, s.cache_slot), s.cache_parity); }
  // What was in it is in registers.
  static MK_METHOD void used(Service& s, const Part& part, int step) {
    arch::leave_to_copies();
    arch::wave_sync();
    request(s, part, step + kCacheSlots * kStepsApart, s.cache_slot);
    s.next_cache_slot();
  }
};

// By each wave that attends, at the beginning.
MK_DEVICE void make_cache_barriers(const Service& s) {
  if constexpr (kCopiesCache) {
    if (s.lane < kCacheSlots) arch::make_copy_barrier(CacheCopies::barrier(s, s.lane));
    arch::wave_sync();
  }
}

#endif  // MK_WAVE_SIZE == 32

}  // namespace mk
