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

#if !defined(MK_REGISTER_RING)
// Gathers a stream wave's columns into its own rows, as gather_own does: by copies that need no registers, so all are on their
// way at once. A lane looks at what it has copied, and copies again what was not there yet.
template <int phase>
MK_DEVICE void gather_packed(Service& s, int layer, int fill, int wave, char* own) {
  using Columns = OwnColumns<phase, kVector>;
  constexpr int size = cols(phase), items = Columns::kCount, all = items * kBatch;
  static_assert(all <= 32, "vectors of a lane are bits of a word");
  const Columns columns = {fill, arch::unknown(wave), arch::unknown(s.lane)};  // addresses of all phases would fill the registers
  const Packed from = packed_source<phase>(s, layer);
  const char* source[items];
  char* to[items];
  u32 missing = 0;
  MK_UNROLL
  for (int i = 0; i < items; i++) {
    const int at = columns.of_matrix(i);
    source[i] = (const char*)from.site.words + at * kWeightBytes;
    to[i] = own + columns.of_row(i) * kWeightBytes;
    MK_UNROLL
    for (int request = 0; request < kBatch; request++) {
      if (at >= 0 && at < size) missing |= 1u << (i * kBatch + request);
      if (at >= size) *(Vec4*)(to[i] + request * kRowBytes) = zero_vector();  // zeros of the matrix
    }
  }
  auto for_missing = [&](auto use) {
    MK_UNROLL
    for (int k = 0; k < all; k++) {
      if (missing >> k & 1u) use(k, to[k / kBatch] + k % kBatch * kRowBytes, source[k / kBatch] + k % kBatch * packed_line(size));
    }
  };
  arch::Copies<all> copies;
  for (int spins = 1;; spins++) {
    for_missing([&](int k, char* place, const char* of) { copies.start(k, place, of); });
    copies.finish();
    for_missing([&](int k, char* place, const char*) {
      if (all_there(*(const Vec4*)place)) missing &= ~(1u << k);
    });
    if (!arch::any(missing != 0)) break;
    if (spins % kSpinsBetweenLooks == 0 &&
        give_up(s.waiter, from.site, (u32)((const u32*)source[0] - from.site.words), *(const u32*)to[0], spins == kSpinsBetweenLooks)) {
      break;
    }
  }
  arch::wave_sync();
}
#endif

// The ends of rows of all packed hand-offs, by one unit.
MK_DEVICE void start_packed(const Service& s) {
  if constexpr (kPacked) {
    if (s.unit != 0) return;
    auto fill = [&](i64 offset, int size) { fill_row_ends(s.at<char>(offset), size, s.index, kServiceLanes); };
    fill(kWorkspace.attended, kQSize);
    fill(kWorkspace.inner, kInner);
    fill(kWorkspace.projected, kHidden);
    fill(kWorkspace.residual, kHidden);
    fill(kWorkspace.final_, kHidden);
  }
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
