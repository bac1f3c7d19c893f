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

// Packed vectors of a lane on their way: `items` of the wave's columns, from `first_item` on, of `requests` requests from `first_request`
// on.
template <int phase, int requests, int items>
struct PackedVectors {
  using Columns = OwnColumns<phase, kVector>;
  static constexpr int kSize = cols(phase);
  static constexpr bool kBare = Columns::kAll && Columns::kCount % items == 0;  // nothing to check

  Packed from;
  Columns columns;
  int first_request, first_item;
  int at[items];
  Vec4 v[requests * items];

  MK_METHOD PackedVectors(const Packed& source, const Columns& own, int request, int item) : from(source), columns(own), first_request(request), first_item(item) {
    MK_UNROLL
    for (int i = 0; i < items; i++) at[i] = columns.of_matrix(first_item + i);
  }
  MK_METHOD int request_of(int i) const { return first_request + i / items; }
  MK_METHOD bool wanted(int i) const { return (kBare || at[i % items] >= 0) && (kBatch % requests == 0 || request_of(i) < kBatch); }
  MK_METHOD const u32* place(int i) const { return (const u32*)packed_place(from, request_of(i), kSize, at[i % items]); }
  MK_METHOD int elements_of(int i) const {
    if (kBare && kSize == padded_cols(phase)) return kVector;
    const int left = kSize - at[i % items];
    return !wanted(i) ? 0 : kSize % kVector == 0 && left > 0 ? kVector : left;
  }

  MK_METHOD void ask() {
    ask_packed([&](int i) { return place(i); }, v, [&](int i) { return elements_of(i); });
  }
  // Waits for them and puts them into the wave's own rows.
  MK_METHOD void put(Waiter& waiter, char* own) {
    await_packed(waiter, from.site, [&](int i) { return place(i); }, v, [&](int i) { return elements_of(i); });
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
};

template <int phase>
MK_DEVICE OwnColumns<phase, kVector> packed_columns(const Service& s, int fill, int wave) {
  return {fill, arch::unknown(wave), arch::unknown(s.lane)};  // addresses of all phases would fill the registers
}

template <int phase>
MK_DEVICE void name_missing_packed(const Service& s, const Packed& from, const OwnColumns<phase, kVector>& columns) {
  constexpr int count = OwnColumns<phase, kVector>::kCount;
  name_missing(s.waiter, from.site, kBatch * count, [&](int i) -> Missing {
    const int at = columns.of_matrix(i % count);
    if (at < 0) return {kNoWord, 0, 0};
    return missing_of_packed(from.site, (const u32*)packed_place(from, i / count, cols(phase), at), smaller(kVector, cols(phase) - at));
  });
}

// Gathers a stream wave's columns into its own rows, as gather_own does.
template <int phase>
MK_DEVICE void gather_packed(Service& s, int layer, int fill, int wave, char* own) {
  using Columns = OwnColumns<phase, kVector>;
  constexpr int at_once = 8;  // vectors of a lane
  constexpr int items = Columns::at_once(at_once), requests = smaller(kBatch, at_once / items);
  const Columns columns = packed_columns<phase>(s, fill, wave);
  const Packed from = packed_source<phase>(s, layer);
  if (phase != kO && fill == 0) arch::pause(MK_FIRST_LOOK_NS);  // the gate of o is opened after attention
  MK_NO_UNROLL
  for (int request = 0; request < kBatch; request += requests) {
    MK_NO_UNROLL
    for (int item = 0; item < Columns::kCount; item += items) {
      PackedVectors<phase, requests, items> vectors(from, columns, request, item);
      vectors.ask();
      vectors.put(s.waiter, own);
    }
  }
  name_missing_packed<phase>(s, from, columns);
  arch::wave_sync();
}

// The vectors of a fill that a lane holds while the fill before is multiplied.
template <int phase>
using VectorsAhead = PackedVectors<phase, kBatch, OwnColumns<phase, kVector>::kCount>;
template <int phase>
constexpr bool gathers_ahead() {
  return comes_ahead(phase) && fill_count(phase) > 1 && kBatch * OwnColumns<phase, kVector>::kCount <= MK_AHEAD_VECTORS;
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
