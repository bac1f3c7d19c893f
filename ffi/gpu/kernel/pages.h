// Streams whose pages lie anywhere (MK_PLACED): the table that says where.
#pragma once

#include "config.h"

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
