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
using Ring = arch::Ring<kShared.ring_slots, kSlotAtoms, kEven>;
constexpr int kTurnAtoms = Ring::kSlotAtoms;  // atoms between two looks at the ring
#else
using Ring = arch::Ring;
constexpr int kTurnAtoms = Ring::kAtoms;
#endif

// Atoms of one token of a wave's stream; in its layers only.
MK_DEVICE int count_atoms(int wave, bool head) {
  int sum = 0;
  for (int p = 0; p < (head ? kPhases : kHead); p++) {
    sum += wave_atoms(p, wave) * kTiles[p * MK_UNITS + arch::unit()].count * (p == kHead ? 1 : MK_NUM_LAYERS);
  }
  return sum;
}
MK_DEVICE u64 stream_bytes(int wave) { return (u64)round_up(larger(count_atoms(wave, true), 1), 8) * arch::kWave * 16; }
MK_DEVICE const char* stream_of(const Args& args, int wave) {
  return (const char*)args.streams + (i64)(arch::unit() * kWaves + wave) * MK_WAVE_ELEMS * kWeightBytes;
}

#if defined(MK_FEED_WAVE)
MK_DEVICE void feed(const Args& args) {
  const int ring = arch::lane();
  if (ring >= Ring::kRings) return;
  auto share = [&](int bytes) { return (u32)larger(1, (bytes / Ring::kEntryBytes + ring) / Ring::kRings); };  // entries
  Ring::feed(Ring::memory_of(shared_at<char>(kShared.ring), ring), Ring::barriers_of(shared_at<char>(kShared.barriers), ring),
             shared_at<u32>(kShared.stop), stream_of(args, ring), (u32)stream_bytes(ring), (i64)MK_WAVE_ELEMS * kWeightBytes,
             (u32)count_atoms(ring, false) * arch::kWave * 16, share(MK_FLIGHT_BYTES), share(MK_HEAD_FLIGHT_BYTES),
             MK_PACE * Ring::kEntryBytes / 1024 * Ring::kRings);
}
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
    arch::pass_gate();  // A: activations are in place, products are free
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

  // T: control is set. Returns false when the launch is over. The service waves may be one token ahead afterwards, where a unit
  // has nothing to multiply, but not two.
  MK_METHOD bool goes_on() {
    arch::pass_gate();
    arch::hand_over();
    const bool go = shared_at<Control>(kShared.control)->go[token & 1] != 0;
    token++;
    return go;
  }

  // Returns false when the launch is over.
  MK_METHOD bool start_token() {
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
      arch::hand_over();  // B: products are in place
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

  // `count` slots one after the other, of count / steps tiles, with sums that do not depend on each other.
  template <int steps, int count>
  MK_METHOD void multiply_slots(const Vec4 (&x)[kGroup * steps], const char* activations, int first, bool add) {
    Sums s[count];
    Vec4 w[count][kGroup];
    MK_UNROLL
    for (int k = 0; k < count; k++) {
      clear(s[k]);
      ring.wait();
      ring.template read<kGroup>(0, w[k]);
      ring.template done<kGroup>(0);
      ring.next();
    }
    MK_UNROLL
    for (int i = 0; i < kGroup; i++) {
      MK_UNROLL
      for (int k = 0; k < count; k++) {
        const int atom = k % steps * kGroup + i;
        if constexpr (kFragments == 1) {
          multiply_one(s[k], w[k][i], x[atom]);
        } else {
          multiply(s[k], w[k][i], load_fragments(activations, column + atom * kAtomCols, lane));
        }
      }
    }
    MK_UNROLL
    for (int k = 0; k < count; k += steps) {
      MK_UNROLL
      for (int j = 1; j < steps; j++) join(s[k], s[k + j]);
      flush(s[k], products(), first + k / steps, wave, lane, add);
    }
  }

  // A chunk of kGroup * steps atoms.
  template <int steps>
  MK_METHOD void multiply_chunk(const char* activations, bool add) {
    Vec4 x[kGroup * steps];
    if constexpr (kFragments == 1) {
      MK_UNROLL
      for (int i = 0; i < kGroup * steps; i++) x[i] = load_fragments(activations, column + i * kAtomCols, lane).x[0];
    }
    constexpr int at_once = steps > 1 ? 1 : 2;  // tiles
    int t = 0;
    MK_NO_UNROLL
    for (; t + at_once <= tiles; t += at_once) multiply_slots<steps, at_once * steps>(x, activations, t, add);
    if (t < tiles) multiply_slots<steps, steps>(x, activations, t, add);
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
        arch::pass_gate();  // A
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
        arch::hand_over();  // B
      }
    }
  }

  MK_METHOD void run_even() {
    for (;;) {
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

  MK_METHOD void finish() {
    ring.drain();
#if defined(MK_FEED_WAVE)
    if (wave == 0 && lane == 0) *shared_at<volatile u32>(kShared.stop) = 1;
#endif
  }

  MK_METHOD void run(const Args& args) {
    wave = arch::wave();
    lane = arch::lane();
    total = count_atoms(wave, true);
    token = 0;
    ring.start(shared_at<char>(kShared.ring), shared_at<char>(kShared.barriers), stream_of(args, wave),
               stream_bytes(wave));
#if !defined(MK_REGISTER_RING)
    if constexpr (kEven) {
      run_even();
      finish();
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
    finish();
  }
};

}  // namespace mk
