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
// Follows the stream waves from slot to slot, a ring behind what is requested.
struct PhaseEnds {
  int at, in_layer;   // slots: of the token; of the layer
  int token, layers;  // slots of a token; of them in layers
  int ends[kHead];    // slots of a layer: where phases end

  MK_METHOD PhaseEnds() : at(-kShared.ring_slots), in_layer(0) {
    token = (int)(stream_bytes(0) / (kGroup * arch::kWave * 16));
    layers = count_atoms(0, false) / kGroup;
    int end = 0;
    for (int p = 0; p < kHead; p++) ends[p] = end += wave_atoms(p, 0) / kGroup * kTiles[p * MK_UNITS + unit()].count;
  }
  // For each entry that is requested: whether what it takes the place of was near the end of a phase after which all wait.
  MK_METHOD bool next() {
    if constexpr (MK_CALM_PHASES == 0) return false;
    if (++at < 0) return false;  // the ring's first filling
    if (at == token) at = 0;
    in_layer = at == 0 || in_layer + 1 == ends[kDown] ? 0 : in_layer + 1;
    bool near_end = false;
    MK_UNROLL
    for (int p = 0; p < kHead; p++) {
      constexpr int near = MK_CALM_BEFORE_BYTES / Ring::kEntryBytes;
      if (MK_CALM_PHASES >> p & 1) near_end |= in_layer < ends[p] && in_layer >= ends[p] - near;
    }
    return near_end && at < layers;
  }
};

MK_DEVICE void feed(const Args& args) {
  if (arch::lane() != 0) return;
  auto slots = [](int bytes) { return (u32)larger(1, bytes / Ring::kEntryBytes); };
  const arch::Flight flight = {slots(MK_FLIGHT_BYTES), slots(MK_HEAD_FLIGHT_BYTES), slots(MK_CALM_FLIGHT_BYTES)};
  PhaseEnds ends;
  Ring::feed(shared_at<char>(kShared.ring), shared_at<char>(kShared.barriers), shared_at<u32>(kShared.stop), stream_of(args, 0),
             (u32)stream_bytes(0), wave_elems(unit()) * kWeightBytes, (u32)count_atoms(0, false) * arch::kWave * 16, flight,
             MK_PACE * Ring::kEntryBytes / 1024, [&] { return ends.next(); });
}
#endif

}  // namespace mk
