// Streams of weights: where they are, and the rings through which they come.
#pragma once

#include "control.h"
#include "pages.h"

namespace mk {

#if !defined(MK_REGISTER_RING)
using Ring = arch::Ring<kShared.ring_slots, kGroup>;
#else
using Ring = arch::Ring;
#endif

// Atoms of one token of a wave's stream; in its layers only.
MK_DEVICE int count_atoms(int wave, bool head) {
  int sum = 0;
  for (int p = 0; p < (head ? kPhases : kHead); p++) {
    sum += wave_atoms(p, wave) * kTiles[p * MK_UNITS + unit()].count * (p == kHead ? 1 : MK_NUM_LAYERS);
  }
  return sum;
}
MK_DEVICE u64 stream_bytes(int wave) {
  return (u64)round_up(larger(count_atoms(wave, true), 1), Ring::kSlotAtoms) * arch::kWave * 16;
}
MK_DEVICE const char* stream_of(const Args& args, int wave) {
  return (const char*)args.streams + (elems_before(unit()) + elems_before_wave(unit(), wave)) * kWeightBytes;
}

#if defined(MK_FEED_WAVE)
MK_DEVICE void feed(const Args& args) {
  if (arch::lane() != 0) return;
  auto slots = [](int bytes) { return (u32)larger(1, bytes / Ring::kEntryBytes); };
  Ring::feed(shared_at<char>(kShared.ring), shared_at<char>(kShared.barriers), shared_at<u32>(kShared.stop), stream_of(args, 0),
             (u32)stream_bytes(0), wave_elems(unit()) * kWeightBytes, (u32)count_atoms(0, false) * arch::kWave * 16,
             slots(MK_FLIGHT_BYTES), slots(MK_HEAD_FLIGHT_BYTES), MK_PACE * Ring::kEntryBytes / 1024);
}
#endif

}  // namespace mk
