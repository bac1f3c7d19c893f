// The stream waves: they multiply what comes along on their stream, phase after phase.
#pragma once

#include "math/matrix.h"

namespace mk {

// Written by the service waves before the barrier that starts a token.
struct Control {
  int go[2];  // for tokens of even and of odd number; 0: the launch is over
  int position[kBatch];
  int token[kBatch];
  int status[kBatch];
  int live[kBatch];
  int emitted[kBatch];
};

enum Status : int { kRunning, kStopped, kFull, kInvalidRequest /* inside the kernel only */ };

MK_DEVICE int segment_count(const Tiles& t) { return (t.count + kSegmentTiles - 1) / kSegmentTiles; }

#if !defined(MK_REGISTER_RING)
using Ring = arch::Ring<kShared.ring_slots, kSlotAtoms>;
constexpr int kTurnAtoms = Ring::kSlotAtoms;  // atoms between two looks at the ring
#else
using Ring = arch::Ring;
constexpr int kTurnAtoms = Ring::kAtoms;
#endif

// Walks the stream: what the next atoms of this wave are. The order is that of jax_monokernel/_gpu_tape.py.
struct StreamWave {
  Ring ring;
  Sums sums;
  int wave, lane;
  int left;    // atoms of this run
  int column;  // of what is resident, where the run goes on

  int layer, phase, segment, fill, chunk, tile;
  int tiles;  // of this segment
  Tiles deal;
  bool padding;  // the atoms at the end of the stream
  int total;     // atoms of a token that are no padding
  int token;     // of this launch

  MK_METHOD float* products() { return shared_at<float>(kShared.products) + (segment & 1) * kSegmentTiles * kBatch * kTileRows * kWaves; }

  MK_METHOD void enter_run() {
    const Run run = run_of(phase, chunk, wave);
    left = run.count;
    column = (run.begin - fill * kResident * kChunkAtoms) * kAtomCols;
    clear(sums);
  }

  MK_METHOD void enter_segment() {
    tiles = smaller(kSegmentTiles, deal.count - segment * kSegmentTiles);
    chunk = fill * kResident;
    tile = 0;
    arch::unit_sync();  // A: activations are in place, products are free
    enter_run();
  }

  // Goes to the first phase at or after this one in which the unit has tiles. False at the end of a token.
  MK_METHOD bool enter_phase() {
    for (;;) {
      if (phase == kHead && layer < MK_NUM_LAYERS - 1) {
        phase = kQkv;
        layer++;
      }
      if (phase == kPhases) return false;
      deal = kTiles[phase * MK_UNITS + arch::unit()];
      if (deal.count > 0) break;
      phase++;
    }
    segment = fill = 0;
    enter_segment();
    return true;
  }

  // After T. The service waves may be one token ahead by now, where a unit has nothing to multiply, but not two.
  MK_METHOD bool goes_on() {
    const bool go = shared_at<Control>(kShared.control)->go[token & 1] != 0;
    token++;
    return go;
  }

  // Returns false when the launch is over.
  MK_METHOD bool start_token() {
    arch::unit_sync();  // T: control is set
    if (!goes_on()) return false;
    layer = 0;
    phase = kQkv;
    padding = false;
    if (!enter_phase()) start_padding();
    return true;
  }

  MK_METHOD void start_padding() {
    padding = true;
    left = round_up(total, 8) - total;
  }

  // After the last atom of a run, until there is one to multiply. False when the launch is over.
  MK_METHOD bool advance() {
    while (left == 0) {
      if (padding) {
        if (!start_token()) return false;
        continue;
      }
      flush(sums, products(), tile, wave, lane, chunk > 0);
      if (++tile < tiles) {
        enter_run();
        continue;
      }
      tile = 0;
      if (++chunk < smaller(chunk_count(phase), (fill + 1) * kResident)) {
        enter_run();
        continue;
      }
      arch::unit_sync();  // B: products are in place
      if (chunk < chunk_count(phase)) {
        fill++;
        enter_segment();
        continue;
      }
      fill = 0;
      if (++segment < segment_count(deal)) {
        enter_segment();
        continue;
      }
      phase++;
      if (!enter_phase()) start_padding();
    }
    return true;
  }

  // Atoms of one token.
  MK_METHOD int count_atoms() {
    int sum = 0;
    for (int p = 0; p < kPhases; p++) {
      sum += wave_atoms(p, wave) * kTiles[p * MK_UNITS + arch::unit()].count * (p == kHead ? 1 : MK_NUM_LAYERS);
    }
    return sum;
  }

  // From an atom of the ring to its last. No loop: compilers refuse to unroll one that is so long.
  template <int atom>
  MK_METHOD void turn(const char* activations, bool& running) {
    Vec4 w[kGroup];
    ring.template read<kGroup>(atom, w);
    if (running && !padding) {
      MK_UNROLL
      for (int i = 0; i < kGroup; i++) {
        multiply(sums, w[i], load_fragments(activations, column + i * kAtomCols, lane));
      }
    }
    ring.template done<kGroup>(atom);  // what comes next is requested before this wave waits for others
    if (running) {
      column += kGroup * kAtomCols;
      left -= kGroup;
      running = advance();
    }
    if constexpr (atom + kGroup < kTurnAtoms) turn<atom + kGroup>(activations, running);
  }

#if !defined(MK_REGISTER_RING)
  // ---- Even streams: loops instead of a walk. The barriers are those of the walk. ----

  // A chunk of kGroup * steps atoms for `count` tiles side by side: sums that do not depend on each other.
  template <int steps, int count>
  MK_METHOD void multiply_tiles(const Vec4 (&x)[kGroup * steps], const char* activations, int first, bool add) {
    Sums s[count];
    MK_UNROLL
    for (int t = 0; t < count; t++) {
      clear(s[t]);
      MK_UNROLL
      for (int step = 0; step < steps; step++) {
        Vec4 w[kGroup];
        ring.wait();
        ring.template read<kGroup>(0, w);
        MK_UNROLL
        for (int i = 0; i < kGroup; i++) {
          if constexpr (kFragments == 1) {
            multiply_one(s[t], w[i], x[step * kGroup + i]);
          } else {
            multiply(s[t], w[i], load_fragments(activations, column + (step * kGroup + i) * kAtomCols, lane));
          }
        }
        ring.template done<kGroup>(0);
        ring.next();
      }
    }
    MK_UNROLL
    for (int t = 0; t < count; t++) flush(s[t], products(), first + t, wave, lane, add);
  }

  template <int steps>
  MK_METHOD void multiply_chunk(const char* activations, bool add) {
    Vec4 x[kGroup * steps];
    if constexpr (kFragments == 1) {
      MK_UNROLL
      for (int i = 0; i < kGroup * steps; i++) x[i] = load_fragments(activations, column + i * kAtomCols, lane).x[0];
    }
    int t = 0;
    for (; t + 2 <= tiles; t += 2) multiply_tiles<steps, 2>(x, activations, t, add);
    if (t < tiles) multiply_tiles<steps, 1>(x, activations, t, add);
  }

  template <int p>
  MK_METHOD void multiply_phase() {
    deal = kTiles[p * MK_UNITS + arch::unit()];
    const char* activations = shared_at<char>(kShared.activations);
    constexpr int whole = kChunkAtoms / kWaves / kGroup, rest = atoms(p) % kChunkAtoms / kWaves / kGroup;
    constexpr int chunks = chunk_count(p);
    for (segment = 0; segment < segment_count(deal); segment++) {
      tiles = smaller(kSegmentTiles, deal.count - segment * kSegmentTiles);
      for (int first = 0; first < chunks; first += kResident) {
        arch::unit_sync();  // A
        for (int c = first; c < smaller(chunks, first + kResident); c++) {
          const int begin = (c - first) * kChunkAtoms;
          if (rest == 0 || c < chunks - 1) {
            column = (begin + kChunkAtoms / kWaves * wave) * kAtomCols;
            if constexpr (atoms(p) >= kChunkAtoms && whole > 0) multiply_chunk<whole>(activations, c > 0);
          } else {
            column = (begin + atoms(p) % kChunkAtoms / kWaves * wave) * kAtomCols;
            if constexpr (rest > 0) multiply_chunk<rest>(activations, c > 0);
          }
        }
        arch::unit_sync();  // B
      }
    }
  }

  MK_METHOD void run_even() {
    for (;;) {
      arch::unit_sync();  // T
      if (!goes_on()) return;
      for (int l = 0; l < MK_NUM_LAYERS; l++) {
        multiply_phase<kQkv>();
        multiply_phase<kO>();
        multiply_phase<kGateUp>();
        multiply_phase<kDown>();
      }
      multiply_phase<kHead>();
      // What fills the stream's end up to SLOT_ATOMS of jax_monokernel/plan.py.
      for (int i = total; i % 8 != 0; i += kSlotAtoms) {
        ring.wait();
        ring.template done<kGroup>(0);
        ring.next();
      }
    }
  }
#endif

  MK_METHOD void run(const Args& args) {
    wave = arch::wave();
    lane = arch::lane();
    total = count_atoms();
    token = 0;
    const u64 bytes = (u64)round_up(larger(total, 1), 8) * arch::kWave * 16;
    const i64 stream = (i64)(arch::unit() * kWaves + wave) * MK_WAVE_ELEMS * kWeightBytes;
    ring.start(shared_at<char>(kShared.ring) + wave * Ring::kBytes, shared_at<char>(kShared.barriers) + wave * Ring::kBarrierBytes,
               (const char*)args.streams + stream, bytes);
#if !defined(MK_REGISTER_RING)
    if constexpr (kEven) {
      run_even();
      ring.drain();
      return;
    }
#endif
    const char* activations = shared_at<char>(kShared.activations);
    if (start_token() && advance()) {
      for (bool running = true; running;) {
        ring.wait();
        turn<0>(activations, running);
        ring.next();
      }
    }
    ring.drain();
  }
};

}  // namespace mk
