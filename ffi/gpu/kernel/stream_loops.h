// The stream waves where rings are shared memory: all waves of a unit have the same to do, in loops.
#pragma once

#include "packed_activations.h"
#include "stream.h"

namespace mk {

// Slots whose weights a wave holds in registers at once, of `slots`. They are given back together, so the ring must have as many.
constexpr int slots_at_once(int slots) {
  int n = smaller(smaller(slots, kShared.ring_slots), larger(1, 8 / kGroup));
  while (slots % n != 0) n--;
  return n;
}

struct StreamWave {
  Ring ring;
  int wave, lane;
  int column;  // of its activations, where the next chunk begins
  int layer, phase, segment, fill;
  int tiles;  // of this segment
  int token;  // of this launch
  Service* service;   // where this wave is in the decode, if it gathers
  char* activations;  // that this wave multiplies with

  MK_METHOD float* products() { return shared_at<float>(kShared.products) + (segment & 1) * kSegmentTiles * kBatch * kTileRows * kWaves; }

  // T: control is set. Returns false when the launch is over. The service waves may be one token ahead afterwards, where a unit
  // has nothing to multiply, but not two.
  MK_METHOD bool goes_on() {
    arch::pass_gate();
    arch::hand_over();
    const bool go = shared_at<Control>(kShared.control)->go[token & 1] != 0;
    if constexpr (kStreamGathers) service->token = token;
    token++;
    return go;
  }

  // Gathers what is multiplied next, if this wave does so, and tells the service waves when it has what a norm's scale belongs to.
  template <int p>
  MK_METHOD void gather() {
    if constexpr (kStreamGathers) {
      if (fill_count(p) > 1 || segment == 0) {
        if (segment == 0 && fill == 0) {
          service->squares_set ^= 1;
          service->enter_layer(layer);
        }
        if (p == kQkv && layer == 0) {
          gather_own_embedding(*service, fill, wave, activations);
        } else if constexpr (kPacked) {
          gather_packed<p>(*service, p == kHead ? MK_NUM_LAYERS : layer, fill, wave, activations);
        } else {
          gather_own<p>(*service, p == kHead ? MK_NUM_LAYERS : layer, fill, wave, activations);
        }
        service->mark(kPhaseEvents * p + kGathered);
        if (tells_of_squares(p, layer) && segment == 0 && fill == fill_count(p) - 1) arch::hand_over_squares();  // Q
      }
    }
  }

  template <int p>
  MK_METHOD VectorsAhead<p> vectors_ahead(int next_fill) const {
    return {packed_source<p>(*service, layer), packed_columns<p>(*service, next_fill, wave), 0, 0};
  }
  // Asks for the next fill; puts it in its place when the one before has been multiplied.
  template <int p, int count>
  MK_METHOD void ask_ahead(Vec4 (&held)[count]) const {
    VectorsAhead<p> vectors = vectors_ahead<p>(fill + 1);
    vectors.ask();
    MK_UNROLL
    for (int i = 0; i < count; i++) held[i] = vectors.v[i];
  }
  template <int p, int count>
  MK_METHOD void put_ahead(const Vec4 (&held)[count]) {
    VectorsAhead<p> vectors = vectors_ahead<p>(fill);
    MK_UNROLL
    for (int i = 0; i < count; i++) vectors.v[i] = held[i];
    vectors.put(service->waiter, activations);
    arch::wave_sync();
    service->mark(kPhaseEvents * p + kGathered);
  }

  MK_METHOD void finish_segment() {
    if constexpr (kStreamGathers) service->mark(kPhaseEvents * phase + kMultiplied);
    arch::hand_over();  // B: products are in place
  }

  // The next slots of the ring.
  template <int count>
  MK_METHOD void read_slots(Vec4 (&w)[count][kGroup], u32 (&freed)[count]) {
    MK_UNROLL
    for (int k = 0; k < count; k++) {
      ring.wait();
      ring.template read<kGroup>(0, w[k]);
      ring.template done<kGroup>(0);
      freed[k] = ring.next();
    }
  }

  // Multiplies slot `slot` of a chunk's row; x: the chunk's activations, where all requests fit in one fragment.
  template <int size>
  MK_METHOD void multiply_slot(Sums& sums, const Vec4 (&w)[kGroup], const Vec4 (&x)[size], int slot) {
    MK_UNROLL
    for (int i = 0; i < kGroup; i++) {
      const int atom = slot * kGroup + i;
      if constexpr (kFragments == 1) {
        multiply_one(sums, w[i], x[atom]);
      } else {
        multiply(sums, w[i], load_fragments(activations, column + atom * kAtomCols, lane));
      }
    }
  }

  template <int size>
  MK_METHOD void load_chunk(Vec4 (&x)[size]) {
    if constexpr (kFragments == 1) {
      MK_UNROLL
      for (int i = 0; i < size; i++) x[i] = load_fragments(activations, column + i * kAtomCols, lane).x[0];
    }
  }

  // A row of `steps` slots for each of `count` tiles, with sums that do not depend on each other.
  template <int steps, int count>
  MK_METHOD void multiply_tiles(const Vec4 (&x)[kGroup * steps], int first, bool add) {
    constexpr int chains = steps > 1 && count == 1 ? 2 : 1;
    constexpr int at_once = slots_at_once(steps * count);
    Sums sums[count][chains];
    MK_UNROLL
    for (int k = 0; k < count * chains; k++) clear(sums[k / chains][k % chains]);
    MK_UNROLL
    for (int slot = 0; slot < steps * count; slot += at_once) {
      Vec4 w[at_once][kGroup];
      u32 freed[at_once];
      read_slots<at_once>(w, freed);
      MK_UNROLL
      for (int k = 0; k < at_once; k++) {
        const int at = slot + k;
        multiply_slot(sums[at / steps][at % chains], w[k], x, at % steps);
      }
      ring.give_back(freed);
    }
    MK_UNROLL
    for (int t = 0; t < count; t++) {
      if constexpr (chains > 1) join(sums[t][0], sums[t][1]);
      flush(sums[t][0], products(), first + t, wave, lane, add);
    }
  }

  // A chunk of `steps` slots in a row.
  template <int steps>
  MK_METHOD void multiply_chunk(bool add) {
    Vec4 x[kGroup * steps];
    load_chunk(x);
    constexpr int at_once = steps > 1 ? 1 : 2;  // tiles
    int t = 0;
    MK_NO_UNROLL
    for (; t + at_once <= tiles; t += at_once) multiply_tiles<steps, at_once>(x, t, add);
    if (t < tiles) multiply_tiles<steps, 1>(x, t, add);
  }

  // The same of a phase with few tiles, whose sums stay in registers until the last chunk.
  template <int steps, int most>
  MK_METHOD void add_chunk(Sums (&held)[most][2]) {
    Vec4 x[kGroup * steps];
    load_chunk(x);
    constexpr int at_once = most > 1 ? 1 : slots_at_once(steps);  // registers hold the sums too
    MK_UNROLL
    for (int t = 0; t < most; t++) {
      if (t >= tiles) break;
      MK_UNROLL
      for (int slot = 0; slot < steps; slot += at_once) {
        Vec4 w[at_once][kGroup];
        u32 freed[at_once];
        read_slots<at_once>(w, freed);
        MK_UNROLL
        for (int k = 0; k < at_once; k++) multiply_slot(held[t][(slot + k) % 2], w[k], x, slot + k);
        ring.give_back(freed);
      }
    }
  }

  template <int p>
  MK_METHOD void multiply_phase() {
    phase = p;
    const Tiles deal = kTiles[p * MK_UNITS + unit()];
    constexpr int whole = kChunkAtoms / kAlignAtoms, rest = atoms(p) % kChunkAtoms / kAlignAtoms;  // slots
    constexpr int chunks = chunk_count(p);
    constexpr bool hold = chunks > 1 && most_tiles(p) <= 2;
    constexpr int most = hold ? most_tiles(p) : 1;
    for (segment = 0; segment < segment_count(deal); segment++) {
      tiles = smaller(kSegmentTiles, deal.count - segment * kSegmentTiles);
      [[maybe_unused]] Sums held[most][2];
      if constexpr (hold) {
        MK_UNROLL
        for (int t = 0; t < 2 * most; t++) clear(held[t / 2][t % 2]);
      }
      [[maybe_unused]] Vec4 ahead[gathers_ahead<p>() ? kBatch * OwnColumns<p, kVector>::kCount : 1];
      for (int first = 0; first < chunks; first += kResident) {
        if (!kStreamGathers || first == 0) arch::pass_gate();  // A: products are free, and activations in place if others gather
        fill = first / kResident;
        if (kStreamGathers && fill > 0) arch::wave_sync();  // all lanes have read the fill before
        if (!gathers_ahead<p>() || fill == 0) gather<p>();
        if constexpr (gathers_ahead<p>()) {
          if (fill > 0) put_ahead<p>(ahead);
          if (first + kResident < chunks) ask_ahead<p>(ahead);
        }
        for (int c = first; c < smaller(chunks, first + kResident); c++) {
          const bool full = rest == 0 || c < chunks - 1;
          column = kStreamGathers ? own_column(c, first, wave)
                                  : ((c - first) * kChunkAtoms + (full ? kChunkAtoms : atoms(p) % kChunkAtoms) / kWaves * wave) * kAtomCols;
          if (full) {
            if constexpr (atoms(p) >= kChunkAtoms && hold) add_chunk<whole>(held);
            if constexpr (atoms(p) >= kChunkAtoms && !hold) multiply_chunk<whole>(c > 0);
          } else {
            if constexpr (rest > 0 && hold) add_chunk<rest>(held);
            if constexpr (rest > 0 && !hold) multiply_chunk<rest>(c > 0);
          }
        }
        if (!kStreamGathers && first + kResident < chunks) arch::hand_over();  // B: activations are free
      }
      if constexpr (hold) {
        MK_UNROLL
        for (int t = 0; t < most; t++) {
          if (t >= tiles) break;
          join(held[t][0], held[t][1]);
          flush(held[t][0], products(), t, wave, lane, false);
        }
      }
      finish_segment();
    }
  }

  MK_METHOD void run(const Args& args) {
    Service own(args);
    service = &own;
    wave = arch::wave();
    lane = arch::lane();
    token = 0;
    activations = shared_at<char>(kShared.activations) + (kStreamGathers ? wave * kBatch * kRowBytes : 0);
    ring.start(shared_at<char>(kShared.ring), shared_at<char>(kShared.barriers), stream_of(args, wave), stream_bytes(wave));
    while (goes_on()) {
      for (layer = 0; layer < MK_NUM_LAYERS; layer++) {
        multiply_phase<kQkv>();
        multiply_phase<kO>();
        multiply_phase<kGateUp>();
        multiply_phase<kDown>();
      }
      multiply_phase<kHead>();
    }
    ring.drain();
#if defined(MK_FEED_WAVE)
    if (wave == 0 && lane == 0) arch::shared_add(shared_at<u32>(kShared.stop), 1);
#endif
  }
};

}  // namespace mk
