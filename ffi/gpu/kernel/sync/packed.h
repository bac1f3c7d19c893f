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

// Where a column's element is in its row: the order of words inside 16 bytes is that in which they are multiplied.
constexpr int packed_index(int column) {
  if (!kSwapped) return column;
  const int word = column / 2 % 4;
  return column / 8 * 8 + (word == 1 ? 2 : word == 2 ? 1 : word) * 2 + column % 2;
}

MK_DEVICE char* packed_place(const Packed& to, int request, int size, int column) {
  return (char*)to.site.words + request * packed_line(size) + packed_index(column) * kWeightBytes;
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

// Whether none of the elements of four words is missing.
MK_DEVICE bool all_there(const Vec4& v) {
  if constexpr (kWeightType == kF32) return v.x != 0 && v.y != 0 && v.z != 0 && v.w != 0;
  return arch::halves_not_zero(v);
}

// What is behind a row's last column, up to whole vectors of 16 bytes, in all copies: it is there from the start. By one unit's
// service lanes.
MK_DEVICE void fill_row_ends(char* copies, int size, int index, int lanes) {
  const int end = round_up(size, kVector), rest = end - size, rows = kPackedCopies * kBatch;
  for (int i = index; i < rows * rest; i += lanes) {
    char* place = copies + i / (rest > 0 ? rest : 1) * packed_line(size) + packed_index(size + i % (rest > 0 ? rest : 1)) * kWeightBytes;
    if constexpr (kWeightType == kF32) {
      arch::store_word((u32*)place, 0x80000000u);
    } else {
      arch::store_half((u16*)place, 0x8000u);
    }
  }
}

}  // namespace mk
