// Where streams lie: one after the other, or in pages that lie anywhere (MK_PLACED).
#pragma once

#include "config.h"

namespace mk {

// Elements of all streams before a unit's, and of one of its waves' stream.
#if defined(MK_REGISTER_RING)
MK_DEVICE i64 elems_before(int unit) { return (i64)unit * MK_UNIT_ELEMS; }
MK_DEVICE i64 wave_elems(int) { return MK_WAVE_ELEMS; }
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
#endif

}  // namespace mk

#if defined(MK_PLACED)

namespace mk {

static_assert(arch::kWave == 64, "waves of 32 lanes read their streams in one piece");
static_assert((i64)MK_WAVE_ELEMS * kWeightBytes % (2 * kPageBytes) == 0, "a slot of a stream is two pages");

// Where a page can begin at most, whatever the table says.
constexpr u32 kLastPlace = (u32)((i64)MK_UNITS * MK_UNIT_ELEMS * kWeightBytes / kPlaceBytes);

// Of the pages of a wave's stream.
MK_DEVICE const i32* pages_of(const Args& args, int unit, int wave) {
  return args.pages + (i64)(unit * kWaves + wave) * (MK_WAVE_ELEMS * kWeightBytes / kPageBytes);
}

// What stands at byte `at` of all streams, one after the other.
MK_DEVICE const char* placed(const Args& args, u64 at) {
  const u32 place = (u32)args.pages[at / kPageBytes];
  return (const char*)args.streams + (u64)(place < kLastPlace ? place : kLastPlace) * kPlaceBytes + at % kPageBytes;
}

}  // namespace mk

#endif  // MK_PLACED
