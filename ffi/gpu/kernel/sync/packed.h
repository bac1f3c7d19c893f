// Hand-offs of activations that stream waves gather: in the dtype in which they are multiplied (docs/kernel.md).
#pragma once

#include "math/matrix.h"
#include "sync/words.h"

namespace mk {

// Elements are 16 or 32 bits, and 0 is one that is not there yet: what is 0 goes as -0, which no sum can tell from it. An array has
// kPackedCopies copies, taken by turns. Who writes an element for one use clears that of the use after the next, which is
// the one of the use before.
struct Packed {
  Site site;   // words: the copy of this use
  i64 clears;  // bytes from there to the copy that is cleared
};

constexpr int packed_line(int size) { return line((size * kWeightBytes + 3) / 4) * 4; }  // bytes of a row

// use: number of the use, from 0.
MK_DEVICE Packed packed_use(char* copies, HandOff handoff, int size, int layer, int token, u32 use) {
  const int copy = (int)(use % kPackedCopies), bytes = kBatch * packed_line(size);
  return {{(const u32*)(copies + copy * bytes), handoff, (u32)layer, (u32)token, 1}, copy == 0 ? (kPackedCopies - 1) * bytes : -bytes};
}

MK_DEVICE char* packed_place(const Packed& to, int request, int size, int column) {
  return (char*)to.site.words + request * packed_line(size) + column * kWeightBytes;
}

// The element at `place`.
MK_DEVICE void publish_packed(char* place, i64 clears, float value) {
  if constexpr (kWeightType == kF32) {
    const u32 bits = arch::as_u32(value);
    arch::store_word((u32*)place, bits == 0 ? 0x80000000u : bits);
    arch::store_word((u32*)(place + clears), 0);
  } else {
    const u32 bits = pack_pair<kWeightType>(value, 0.0f);
    arch::store_half((u16*)place, bits == 0 ? 0x8000u : bits);
    arch::store_half((u16*)(place + clears), 0);
  }
}

// The first `count` elements, and `fill` instead of the others.
MK_DEVICE u32 with_elements(u32 word, int count, u32 fill) {
  constexpr int here = 4 / kWeightBytes;
  return count >= here ? word : count <= 0 ? fill : (word & 0xffffu) | (fill & 0xffff0000u);
}
MK_DEVICE Vec4 with_elements(const Vec4& v, int count, u32 fill) {
  constexpr int here = 4 / kWeightBytes;
  return {with_elements(v.x, count, fill), with_elements(v.y, count - here, fill), with_elements(v.z, count - 2 * here, fill),
          with_elements(v.w, count - 3 * here, fill)};
}

// Whether none of the elements of four words is missing.
MK_DEVICE bool all_there(const Vec4& v) {
  if constexpr (kWeightType == kF32) return v.x != 0 && v.y != 0 && v.z != 0 && v.w != 0;
  return arch::halves_not_zero(v);
}

// A word of the first `count` elements at `place` of which an element is missing.
MK_DEVICE Missing missing_of_packed(const Site& site, const u32* place, int count) {
  Missing first = {kNoWord, kNotZero, 0};
  if (count <= 0) return first;
  const Vec4 v = with_elements(arch::load_words(place), count, ~0u);
  const u32 words[4] = {v.x, v.y, v.z, v.w};
  MK_UNROLL
  for (int j = 3; j >= 0; j--) {
    if (!all_there({words[j], ~0u, ~0u, ~0u})) first = {(u32)(place - site.words) + j, kNotZero, words[j]};
  }
  return first;
}

// Asks for `count` vectors of four words, vector i of this lane at place(i), of which elements_of(i) are wanted.
template <int count, typename Place, typename ElementsOf>
MK_DEVICE void ask_packed(Place place, Vec4 (&v)[count], ElementsOf elements_of) {
  MK_UNROLL
  for (int i = 0; i < count; i++) {
    v[i] = {~0u, ~0u, ~0u, ~0u};
    if (elements_of(i) > 0) v[i] = arch::load_words(place(i));
  }
}

// Waits until all elements are there, those of the vectors that were asked for; those that are not are asked for again. The first
// elements_of(i) elements of vector i are waited for; the others come out as 0.
template <int count, typename Place, typename ElementsOf>
MK_DEVICE void await_packed(Waiter& waiter, const Site& site, Place place, Vec4 (&v)[count], ElementsOf elements_of) {
  u64 deadline = 0;
  for (int spins = 1;; spins++) {
    bool missing = false;
    MK_UNROLL
    for (int i = 0; i < count; i++) {
      if (!all_there(with_elements(v[i], elements_of(i), ~0u))) {
        missing = true;
        v[i] = arch::load_words(place(i));
      }
    }
    if (!arch::any(missing)) break;
    if (spins % kSpinsBetweenLooks == 0 && give_up(waiter, site, spins == kSpinsBetweenLooks, deadline, look_later)) break;
  }
  MK_UNROLL
  for (int i = 0; i < count; i++) v[i] = with_elements(v[i], elements_of(i), 0);
}

}  // namespace mk
