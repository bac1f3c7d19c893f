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
                                                 kPostNorm && !kResidualInShared ? kBatch * kHidden : 0, kAnglesInShared ? 0 : kAngles, kGroups,
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
  bool aborted;

  // In the workspace; not 0: nobody waits any more.
  MK_METHOD u32* abort() const { return (u32*)((char*)args->workspace + kWorkspace.abort); }
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

// A word that a lane still waits for, for the report.
constexpr u32 kNoWord = ~0u;
struct Missing {
  u32 word, expected, seen;
};

// A word of 4, of which `count` are waited for, that is missing; expected in its lowest bit.
MK_DEVICE Missing missing_of(const Vec4& v, int count, u32 word, u32 expected) {
  // Branches would take scalar registers, of which AMD's have few.
  const u32 x = count > 0 ? v.x ^ expected : 0, y = count > 1 ? v.y ^ expected : 0, z = count > 2 ? v.z ^ expected : 0,
            w = count > 3 ? v.w ^ expected : 0;
  const u32 which = x & 1u ? 0 : y & 1u ? 1 : z & 1u ? 2 : 3;
  const bool any = ((x | y | z | w) & 1u) != 0;
  return {any ? word + which : kNoWord, expected, (which == 0 ? x : which == 1 ? y : which == 2 ? z : w) ^ expected};
}

// The first that a lane misses of `count` places; of(i): of the ith.
template <bool near, typename Of>
MK_DEVICE Missing first_missing(int count, Of of) {
  Missing first = {kNoWord, 0, 0};
  Look<near>::again();
  MK_NO_UNROLL
  for (int i = count - 1; i >= 0; i--) {
    const Missing here = of(i);
    const bool any = here.word != kNoWord;  // field by field: a choice of structs goes through memory
    first.word = any ? here.word : first.word;
    first.expected = any ? here.expected : first.expected;
    first.seen = any ? here.seen : first.seen;
  }
  return first;
}

// Called now and then by a wave that waits. Returns true when there is no use in waiting. find: what this lane misses; only called
// when the time is over. deadline: of this wait.
// The clock of a wait starts with its first look, so that who reports is who misses a word, and not who waits for the waiter.
template <typename Find>
MK_DEVICE bool give_up(Waiter& waiter, const Site& site, bool first, u64& deadline, Find find) {
  if (waiter.aborted) return true;
  if (first) deadline = arch::ticks() + waiter.args->timeout_ticks;
  if (arch::load_word(waiter.abort()) != 0) {
    waiter.aborted = true;
  } else if (arch::ticks() > deadline) {
    const Missing missing = find();
    waiter.aborted = missing.word != kNoWord;
    if (missing.word != kNoWord && arch::claim(waiter.abort())) {
      Report& r = *waiter.args->report;
      r.handoff = site.handoff;
      r.layer = site.layer;
      r.token = site.token;
      r.unit = (u32)unit();
      r.word = missing.word;
      r.expected = missing.expected;
      r.seen = missing.seen;
      r.reason = kTimeout;
    }
  }
  waiter.aborted = arch::any(waiter.aborted);
  if (kStreamGathers && waiter.aborted && arch::lane() == 0) shared_at<Control>(kShared.control)->aborted = 1;
  return waiter.aborted;
}

// For waves that have no registers to spare while they wait: they give up without saying what they miss, and look for it afterwards.
MK_DEVICE Missing look_later() { return {arch::lane() == 0 ? kNotLooked : kNoWord, 0, 0}; }

// find(i): what this lane misses of the ith of `count` places.
template <typename Find>
MK_DEVICE void name_missing(const Waiter& waiter, const Site& site, int count, Find find) {
  if (!waiter.aborted) return;
  Report& r = *waiter.args->report;
  MK_NO_UNROLL
  for (int i = 0; i < count; i++) {
    const Missing missing = find(i);
    if (missing.word == kNoWord || arch::load_word(&r.word) != kNotLooked || arch::load_word(&r.handoff) != site.handoff ||
        arch::load_word(&r.unit) != (u32)unit() || !arch::claim(waiter.abort() + 2)) {
      continue;
    }
    r.word = missing.word;
    r.expected = missing.expected;
    r.seen = missing.seen;
  }
}

constexpr int kSpinsBetweenLooks = 256;

// Loads `count` vectors of four words, vector i of this lane at place(i), until all are ready; those that are not are asked for
// again. Only the first words_of(i) words of vector i are waited for; the others come out as 0. find: as of give_up.
template <int count, bool near = false, typename Place, typename WordsOf, typename Find>
MK_DEVICE void wait_places(Waiter& waiter, const Site& site, Place place, Vec4 (&v)[count], WordsOf words_of, Find find) {
  Look<near>::again();
  MK_UNROLL
  for (int i = 0; i < count; i++) {
    v[i] = {site.parity, site.parity, site.parity, site.parity};
    if (words_of(i) > 0) v[i] = Look<near>::words(place(i));
  }
  u64 deadline = 0;
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
    if (spins % kSpinsBetweenLooks == 0 && give_up(waiter, site, spins == kSpinsBetweenLooks, deadline, find)) return;
  }
}

// The same where vector i is at p + i * step.
template <int count, bool near = false, typename WordsOf>
MK_DEVICE void wait_words(Waiter& waiter, const Site& site, const u32* p, int step, Vec4 (&v)[count], WordsOf words_of) {
  wait_places<count, near>(waiter, site, [&](int i) { return p + i * step; }, v, words_of, [&] {
    return first_missing<near>(count, [&](int i) {
      Vec4 now = {};
      if (words_of(i) > 0) now = Look<near>::words(p + i * step);
      return missing_of(now, words_of(i), (u32)(p + i * step - site.words), site.parity);
    });
  });
}

// One word per lane and i, at place(i); of those only wanted(i).
template <int count, bool near = false, typename Place, typename Wanted>
MK_DEVICE void wait_word_places(Waiter& waiter, const Site& site, Place place, u32 (&v)[count], Wanted wanted) {
  auto load = [&] {
    bool missing = false;
    Look<near>::again();
    MK_UNROLL
    for (int i = 0; i < count; i++) v[i] = wanted(i) ? Look<near>::word(place(i)) : site.parity;
    MK_UNROLL
    for (int i = 0; i < count; i++) missing |= ((v[i] ^ site.parity) & 1u) != 0;
    return missing;
  };
  bool missing = load();
  u64 deadline = 0;
  for (int spins = 1; arch::any(missing); spins++) {
    if (missing) missing = load();
    const auto find = [&] {
      return first_missing<near>(count, [&](int i) {
        Vec4 now = {};
        if (wanted(i)) now.x = Look<near>::word(place(i));
        return missing_of(now, wanted(i), (u32)(place(i) - site.words), site.parity);
      });
    };
    if (spins % kSpinsBetweenLooks == 0 && give_up(waiter, site, spins == kSpinsBetweenLooks, deadline, find)) return;
  }
}

// The same at p + i * step.
template <int count, bool near = false, typename Wanted>
MK_DEVICE void wait_single_words(Waiter& waiter, const Site& site, const u32* p, int step, u32 (&v)[count], Wanted wanted) {
  wait_word_places<count, near>(waiter, site, [&](int i) { return p + i * step; }, v, wanted);
}

}  // namespace mk
