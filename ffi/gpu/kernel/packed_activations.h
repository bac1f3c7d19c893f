// Packed activations on their way into shared memory, and the sums of squares that come beside them.
#pragma once

#include "activations.h"

namespace mk {

template <int phase>
MK_DEVICE Packed packed_source(const Service& s, int layer) {
  if constexpr (phase == kO) return s.packed(h2_attended, kWorkspace.attended, kQSize, layer);
  if constexpr (phase == kGateUp) return s.packed(h4_projected, kWorkspace.projected, kHidden, layer);
  if constexpr (phase == kDown) return s.packed(h5_inner, kWorkspace.inner, kInner, layer);
  return s.packed_residual(layer - 1);
}

// Gathers a stream wave's columns into its own rows, as gather_own does.
template <int phase>
MK_DEVICE void gather_packed(Service& s, int layer, int fill, int wave, char* own) {
  using Columns = OwnColumns<phase, kVector>;
  constexpr int size = cols(phase), at_once = 8;  // vectors of a lane
  constexpr int items = Columns::at_once(at_once), requests = smaller(kBatch, at_once / items);
  constexpr bool bare = Columns::kAll && Columns::kCount % items == 0;  // nothing to check
  const Columns columns = {fill, arch::unknown(wave), arch::unknown(s.lane)};  // addresses of all phases would fill the registers
  const Packed from = packed_source<phase>(s, layer);
  MK_NO_UNROLL
  for (int first_request = 0; first_request < kBatch; first_request += requests) {
    MK_NO_UNROLL
    for (int first_item = 0; first_item < Columns::kCount; first_item += items) {
      Vec4 v[requests * items];
      int at[items];
      MK_UNROLL
      for (int i = 0; i < items; i++) at[i] = columns.of_matrix(first_item + i);
      auto request_of = [&](int i) { return first_request + i / items; };
      auto wanted = [&](int i) { return (bare || at[i % items] >= 0) && (kBatch % requests == 0 || request_of(i) < kBatch); };
      wait_packed<requests * items>(
          s.waiter, from.site, [&](int i) { return (const u32*)packed_place(from, request_of(i), size, at[i % items]); }, v,
          [&](int i) {
            if (bare && size == padded_cols(phase)) return kVector;
            const int left = size - at[i % items];
            return !wanted(i) ? 0 : size % kVector == 0 && left > 0 ? kVector : left;
          });
      MK_UNROLL
      for (int i = 0; i < requests * items; i++) {
        if (!wanted(i)) continue;
        char* to = own + request_of(i) * kRowBytes + columns.of_row(first_item + i % items) * kWeightBytes;
        if constexpr (kSwapped) {
          *(Vec4*)to = {v[i].x, v[i].z, v[i].y, v[i].w};
        } else {
          *(Vec4*)to = v[i];
        }
      }
    }
  }
  arch::wave_sync();
}

// The sums of squares of what a phase multiplies, from all units; by the service waves.
template <int phase>
MK_DEVICE void gather_squares(Service& s, int layer) {
  constexpr int from = phase == kGateUp ? kO : kDown;  // the phase that left them
  constexpr int words = MK_UNITS * kSquareWords, count = (words + arch::kWave - 1) / arch::kWave;
  constexpr int at_once = smaller(count, 10);
  const Site site = phase == kGateUp ? s.site(h13_projected_squares, kWorkspace.projected_squares, layer) : s.residual_squares_site(layer - 1);
  for (int request = s.wave; request < kBatch; request += kServiceWaves) {
    float sum = 0.0f;
    MK_UNROLL
    for (int first = 0; first < count; first += at_once) {
      u32 v[at_once];
      const int own = first * arch::kWave + s.lane;
      wait_single_words<at_once>(s.waiter, site, site.words + request * line(words) + own, arch::kWave, v, [&](int i) {
        const int word = own + i * arch::kWave;
        return word < words && (kAllHaveRows || kTiles[from * MK_UNITS + word / kSquareWords].count > 0);
      });
      MK_UNROLL
      for (int i = 0; i < at_once; i++) sum += decode(v[i]);
    }
    sum = wave_sum(sum);
    if (s.lane == 0) *s.squares(request) = sum;
  }
  s.sync();
}

}  // namespace mk
