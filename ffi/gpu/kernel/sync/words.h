// Hand-offs between units: words that carry 31 bits of data and one bit of readiness (docs/kernel.md).
#pragma once

#include "control.h"
#include "layout/workspace.h"

namespace mk {

enum HandOff : u32 {
  h1_qkv = 1,
  h2_attended,
  h3_partial,
  h4_projected,
  h5_inner,
  h6_residual,
  h7_candidate,
  h8_token,
  h9_final,
  h10_out_sums,
  h11_down_sums,
  h12_places,
  h13_projected_squares,
  h14_residual_squares,
  h15_final_squares,
};

// Whether a hand-off's words stay inside a group and go no further than the cache that its units share.
constexpr bool is_near(HandOff h) {
  switch (h) {
    case h1_qkv:
    case h2_attended:
    case h3_partial:
      return MK_NEAR && kAttentionGroups > 1;
    case h5_inner:
      return MK_NEAR && kMlpGroups > 1;
    case h4_projected:
    case h6_residual:
    case h9_final:
      return MK_NEAR && kGroups > 1;
    default:
      return false;
  }
}

template <HandOff h>
MK_DEVICE void store_word_of(u32* p, u32 v) {
#if MK_NEAR
  if constexpr (is_near(h)) {
    arch::store_near_word(p, v);
    return;
  }
#endif
  arch::store_word(p, v);
}

// Loads of words that others may have changed since the last look.
template <bool near>
struct Look {
  MK_METHOD static void again() {
#if MK_NEAR
    if constexpr (near) arch::look_again();
#endif
  }
  MK_METHOD static u32 word(const u32* p) {
#if MK_NEAR
    if constexpr (near) return arch::load_near_word(p);
#endif
    return arch::load_word(p);
  }
  MK_METHOD static Vec4 words(const u32* p) {
#if MK_NEAR
    if constexpr (near) return arch::load_near_words(p);
#endif
    return arch::load_words(p);
  }
};

constexpr Workspace kWorkspace = make_workspace({kBatch, MK_UNITS, kSplits, kHidden, kQSize, kQkvSize, kHeads, kVocab,
                                                 kPostNorm && !kResidualInShared ? kBatch * kHidden : 0, kGroups,
                                                 kAttentionGroups, kMlpGroups, kInnerCols, kPacked ? kWeightBytes : 0, kSquareWords,
                                                 kPlaced ? kDies : kGroups > 1 ? kGroups : 0});

constexpr int line(int words) { return round_up(words, 32); }

// The context of a wait, for reports.
struct Site {
  const u32* words;  // the hand-off's first
  u32 handoff, layer, token, parity;
};

struct Waiter {
  const Args* args;
  u32* abort;  // in the workspace; not 0: nobody waits any more
  u64 deadline;  // of the wait
  bool aborted;
};

MK_DEVICE u32 encode(float value, u32 parity) {
  const u32 bits = value == value ? arch::as_u32(value) : 0x7fc00000u;
  return ((bits + ((bits >> 1) & 1u)) & ~1u) | parity;
}
MK_DEVICE float decode(u32 word) { return arch::as_f32(word & ~1u); }
MK_DEVICE u32 encode_int(u32 value, u32 parity) { return value << 1 | parity; }
MK_DEVICE u32 decode_int(u32 word) { return word >> 1; }

MK_DEVICE bool ready(const Vec4& v, u32 parity) {
  return (((v.x ^ parity) | (v.y ^ parity) | (v.z ^ parity) | (v.w ^ parity)) & 1u) == 0u;
}

// Called now and then by a wave that waits. Returns true when there is no use in waiting.
// The clock of a wait starts with its first look, so that who reports is who misses a word, and not who waits for the waiter.
MK_DEVICE bool give_up(Waiter& waiter, const Site& site, u32 word, u32 seen, bool first) {
  if (waiter.aborted) return true;
  if (first) waiter.deadline = arch::ticks() + waiter.args->timeout_ticks;
  if (arch::load_word(waiter.abort) != 0) {
    waiter.aborted = true;
  } else if (arch::ticks() > waiter.deadline) {
    waiter.aborted = true;
    if (arch::lane() == 0 && arch::claim(waiter.abort)) {
      Report& r = *waiter.args->report;
      r.handoff = site.handoff;
      r.layer = site.layer;
      r.token = site.token;
      r.unit = (u32)unit();
      r.word = word;
      r.expected = site.parity;
      r.seen = seen;
      r.reason = kTimeout;
    }
  }
  waiter.aborted = arch::any(waiter.aborted);
  if (kStreamGathers && waiter.aborted && arch::lane() == 0) shared_at<Control>(kShared.control)->aborted = 1;
  return waiter.aborted;
}

constexpr int kSpinsBetweenLooks = 256;

// Loads `count` vectors of four words, vector i of this lane at place(i), until all are ready; those that are not are asked for
// again. Only the first words_of(i) words of vector i are waited for; the others come out as 0.
template <int count, bool near = false, typename Place, typename WordsOf>
MK_DEVICE void wait_places(Waiter& waiter, const Site& site, Place place, Vec4 (&v)[count], WordsOf words_of) {
  Look<near>::again();
  MK_UNROLL
  for (int i = 0; i < count; i++) {
    v[i] = {site.parity, site.parity, site.parity, site.parity};
    if (words_of(i) > 0) v[i] = Look<near>::words(place(i));
  }
  for (int spins = 1;; spins++) {
    bool missing = false;
    Look<near>::again();
    MK_UNROLL
    for (int i = 0; i < count; i++) {
      if (words_of(i) < 4) v[i].w = site.parity;
      if (words_of(i) < 3) v[i].z = site.parity;
      if (words_of(i) < 2) v[i].y = site.parity;
      if (!ready(v[i], site.parity)) {
        missing = true;
        v[i] = Look<near>::words(place(i));
      }
    }
    if (!arch::any(missing)) return;
    if (spins % kSpinsBetweenLooks == 0 && give_up(waiter, site, (u32)(place(0) - site.words), v[0].x, spins == kSpinsBetweenLooks)) {
      return;
    }
  }
}

// The same where vector i is at p + i * step.
template <int count, bool near = false, typename WordsOf>
MK_DEVICE void wait_words(Waiter& waiter, const Site& site, const u32* p, int step, Vec4 (&v)[count], WordsOf words_of) {
  wait_places<count, near>(waiter, site, [&](int i) { return p + i * step; }, v, words_of);
}

// One word per lane and i, at p + i * step; of those only wanted(i).
template <int count, bool near = false, typename Wanted>
MK_DEVICE void wait_single_words(Waiter& waiter, const Site& site, const u32* p, int step, u32 (&v)[count], Wanted wanted) {
  auto load = [&] {
    bool missing = false;
    Look<near>::again();
    MK_UNROLL
    for (int i = 0; i < count; i++) v[i] = wanted(i) ? Look<near>::word(p + i * step) : site.parity;
    MK_UNROLL
    for (int i = 0; i < count; i++) missing |= ((v[i] ^ site.parity) & 1u) != 0;
    return missing;
  };
  bool missing = load();
  for (int spins = 1; arch::any(missing); spins++) {
    if (missing) missing = load();
    if (spins % kSpinsBetweenLooks == 0 && give_up(waiter, site, (u32)(p - site.words), v[0], spins == kSpinsBetweenLooks)) return;
  }
}

}  // namespace mk
