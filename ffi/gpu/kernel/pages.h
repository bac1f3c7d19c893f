// Where streams lie: one after the other, or in pages that lie anywhere (MK_PLACED).
#pragma once

#include "config.h"

namespace mk {

#if defined(MK_REGISTER_RING)

constexpr int kSlotBytes = arch::Ring::kSlotAtoms * arch::kWave * 16;

// Where the stream of each wave of each unit begins, in slots, and the last one ends.
struct StreamBegins {
  i32 slots[MK_UNITS * kWaves + 1];
};
constexpr StreamBegins find_stream_begins() {
  constexpr Tiles table[kPhases * MK_UNITS] = MK_TILE_TABLE;
  int of_tile[kPhases][kWaves] = {};  // atoms, in all layers
  for (int p = 0; p < kPhases; p++) {
    for (int chunk = 0; chunk < chunk_count(p); chunk++) {
      for (int wave = 0; wave < kWaves; wave++) of_tile[p][wave] += run_of(p, chunk, wave).count * (p == kHead ? 1 : MK_NUM_LAYERS);
    }
  }
  StreamBegins begins{};
  for (int unit = 0; unit < MK_UNITS; unit++) {
    for (int wave = 0; wave < kWaves; wave++) {
      int n = 0;
      for (int p = 0; p < kPhases; p++) n += of_tile[p][wave] * table[p * MK_UNITS + unit].count;
      // A wave without atoms reads a slot all the same.
      const int i = unit * kWaves + wave;
      begins.slots[i + 1] = begins.slots[i] + larger(1, (n + arch::Ring::kSlotAtoms - 1) / arch::Ring::kSlotAtoms);
    }
  }
  return begins;
}
MK_CONSTANT const StreamBegins kStreamBegins = find_stream_begins();
constexpr i64 kStreamBytes = (i64)find_stream_begins().slots[MK_UNITS * kWaves] * kSlotBytes;  // of all of them

// Elements of all streams before a unit's, and of a unit's before one of its waves'.
MK_DEVICE i64 elems_before(int unit) { return (i64)kStreamBegins.slots[unit * kWaves] * (kSlotBytes / kWeightBytes); }
MK_DEVICE i64 elems_before_wave(int unit, int wave) {
  return (i64)(kStreamBegins.slots[unit * kWaves + wave] - kStreamBegins.slots[unit * kWaves]) * (kSlotBytes / kWeightBytes);
}

#else

// All waves have the same to do, in whole slots, and tiles are dealt in order.
MK_DEVICE i64 elems_before(int unit) {
  i64 rows = 0;  // of tiles, one atom wide
  MK_UNROLL
  for (int p = 0; p < kPhases; p++) rows += (i64)kTiles[p * MK_UNITS + unit].begin * (atoms(p) * (p == kHead ? 1 : MK_NUM_LAYERS));
  return rows * arch::kWave * kVector;
}
MK_DEVICE i64 wave_elems(int unit) {
  int rows = 0;
  MK_UNROLL
  for (int p = 0; p < kPhases; p++) rows += kTiles[p * MK_UNITS + unit].count * (atoms(p) / kWaves) * (p == kHead ? 1 : MK_NUM_LAYERS);
  return (i64)rows * arch::kWave * kVector;
}
MK_DEVICE i64 elems_before_wave(int unit, int wave) { return wave * wave_elems(unit); }

#endif

}  // namespace mk

#if defined(MK_PLACED)

namespace mk {

static_assert(arch::kWave == 64, "waves of 32 lanes read their streams in one piece");
static_assert(kSlotBytes == 2 * kPageBytes, "a slot of a stream is two pages");

// Where a page can begin at most, whatever the table says.
constexpr u32 kLastPlace = (u32)(kStreamBytes / kPlaceBytes);

// Of the pages of a wave's stream.
MK_DEVICE const i32* pages_of(const Args& args, int unit, int wave) {
  return args.pages + (i64)kStreamBegins.slots[unit * kWaves + wave] * (kSlotBytes / kPageBytes);
}

// What stands at byte `at` of all streams, one after the other.
MK_DEVICE const char* placed(const Args& args, u64 at) {
  const u32 place = (u32)args.pages[at / kPageBytes];
  return (const char*)args.streams + (u64)(place < kLastPlace ? place : kLastPlace) * kPlaceBytes + at % kPageBytes;
}

}  // namespace mk

#endif  // MK_PLACED
