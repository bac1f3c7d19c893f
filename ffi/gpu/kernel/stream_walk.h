// The stream waves where rings are registers: what each has to do next follows from its place on its stream.
#pragma once

#include "activations.h"
#include "stream.h"

namespace mk {

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
      deal = kTiles[phase * MK_UNITS + unit()];
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
    left = round_up(total, Ring::kSlotAtoms) - total;
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
    if constexpr (atom + kGroup < Ring::kAtoms) turn<atom + kGroup>(activations, running);
  }

  MK_METHOD void run(const Args& args) {
    wave = arch::wave();
    lane = arch::lane();
    total = count_atoms(wave, true);
    token = 0;
#if defined(MK_PLACED)
    ring.start((const char*)args.streams, pages_of(args, unit(), wave), kLastPlace, stream_bytes(wave));
#else
    ring.start(shared_at<char>(kShared.ring), shared_at<char>(kShared.barriers), stream_of(args, wave),
               stream_bytes(wave));
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
