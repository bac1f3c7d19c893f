// Matrix instructions, from the lanes' registers.
#include <cstring>

#include "machine.h"

namespace mk::host {

namespace {

float from_bits(u32 bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Element 0 (low half) or 1 of a register.
float element(bool bf16, u32 pair, u32 half) {
  const u32 bits = pair >> (16 * half) & 0xffff;
  if (bf16) return from_bits(bits << 16);
  const u32 sign = bits >> 15 << 31, exponent = bits >> 10 & 31, mantissa = bits & 1023;
  if (exponent == 31) return from_bits(sign | 0x7f800000u | mantissa << 13);
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * static_cast<float>(mantissa) * 0x1p-24f;
  return from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
}

// PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type". g = lane / 4, t = lane % 4:
//   A [16][16]: a0 row g, a1 row g + 8, columns 2t and 2t + 1; a2, a3 likewise, columns 2t + 8 and 2t + 9
//   B [16][8]:  b0 rows 2t and 2t + 1, b1 rows 2t + 8 and 2t + 9, column g
//   C [16][8]:  c0, c1 row g, c2, c3 row g + 8, columns 2t and 2t + 1
void multiply_16x8x16(bool bf16, Lane* lanes) {
  float a[16][16], b[16][8];
  for (u32 lane = 0; lane < 32; lane++) {
    const Matrices& m = *lanes[lane].matrices;
    const u32 g = lane / 4, t = lane % 4;
    for (u32 i = 0; i < 4; i++) {
      for (u32 half = 0; half < 2; half++) a[g + i % 2 * 8][2 * t + i / 2 * 8 + half] = element(bf16, m.a[i], half);
    }
    for (u32 i = 0; i < 2; i++) {
      for (u32 half = 0; half < 2; half++) b[2 * t + i * 8 + half][g] = element(bf16, m.b[i], half);
    }
  }
  for (u32 lane = 0; lane < 32; lane++) {
    float* c = lanes[lane].matrices->c;
    for (u32 i = 0; i < 4; i++) {
      const u32 row = lane / 4 + i / 2 * 8, col = lane % 4 * 2 + i % 2;
      float sum = c[i];
      for (u32 k = 0; k < 16; k++) sum += a[row][k] * b[k][col];
      c[i] = sum;
    }
  }
}

// CDNA3 ISA, V_MFMA_F32_4X4X4_16B: 16 independent products of 4x4 matrices. Lane l belongs to block l / 4 and holds
//   A: row l % 4, all four k; B: column l % 4, all four k; D: column l % 4, register i is row i
// BLGP has all lanes take B from the lanes of one half or quarter.
void multiply_4x4x4(bool bf16, Lane* lanes) {
  for (u32 block = 0; block < 16; block++) {
    Lane* of = lanes + block * 4;
    for (u32 col = 0; col < 4; col++) {
      const Matrices& to = *of[col].matrices;
      const Matrices& b = *lanes[(block * 4 + col) % to.b_lanes + to.b_first].matrices;
      for (u32 row = 0; row < 4; row++) {
        const Matrices& a = *of[row].matrices;
        float sum = to.c[row];
        for (u32 k = 0; k < 4; k++) sum += element(bf16, a.a[k / 2], k % 2) * element(bf16, b.b[k / 2], k % 2);
        to.c[row] = sum;
      }
    }
  }
}

void instruction(Meeting meeting, bool bf16, Matrices& matrices, Where where) {
  machine->lane().matrices = &matrices;
  if (!machine->meet(meeting, bf16, where)) return;
  Wave& wave = *machine->lane().home;
  (meeting == Meeting::kMma ? multiply_16x8x16 : multiply_4x4x4)(bf16, wave.lanes);
  wave.busy = true;
  machine->part();
}

}  // namespace

void mma_16x8x16(bool bf16, Matrices& matrices, Where where) { instruction(Meeting::kMma, bf16, matrices, where); }
void mfma_4x4x4(bool bf16, Matrices& matrices, Where where) { instruction(Meeting::kMfma, bf16, matrices, where); }

}  // namespace mk::host
