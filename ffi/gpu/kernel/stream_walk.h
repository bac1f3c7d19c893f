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
  int run_atoms, run_column;  // of all runs of this chunk, at their beginning
  int place;     // of this lane in products of a tile
  int products;  // of this tile, where they begin

  int layer, phase, segment, fill, chunk, tile;
  int tiles;  // of this segment
  Tiles deal;
  bool padding;  // the atoms at the end of the stream, or after the launch's last token
  bool over;     // the launch
  int total;     // atoms of a token that are no padding
  int token;     // of this launch

  MK_METHOD void enter_run() {
    left = run_atoms;
    column = run_column;
  }

  MK_METHOD void enter_chunk() {
    const Run run = run_of(phase, chunk, wave);
    run_atoms = run.count;
    run_column = (run.begin - fill * kResident * kChunkAtoms) * kAtomCols;
    tile = 0;
    products = (segment & 1) * kSegmentTiles * kTileProducts;
    enter_run();
  }

  MK_METHOD void enter_segment() {
    tiles = smaller(kSegmentTiles, deal.count - segment * kSegmentTiles);
    chunk = fill * kResident;
    arch::pass_gate();  // A: activations are in place, products are free
    enter_chunk();
  }

  // Finds the first phase at or after this one in which the unit has tiles. False at the end of a token.
  MK_METHOD bool find_phase() {
    segment = fill = 0;
    for (;;) {
      if (phase == kHead && layer < MK_NUM_LAYERS - 1) {
        phase = kQkv;
        layer++;
      }
      if (phase == kPhases) return false;
      deal = kTiles[phase * MK_UNITS + unit()];
      if (deal.count > 0) return true;
      phase++;
    }
  }

  // T: control is set. Returns false when the launch is over. The service waves may be one token ahead afterwards, where a unit
  // has nothing to multiply, but not two.
  MK_METHOD bool goes_on() {
    arch::pass_gate();
    arch::hand_over();
    const bool go = arch::shared_number(&shared_at<Control>(kShared.control)->go[token & 1]) != 0;
    token++;
    return go;
  }

  // Or ends: what is in the ring then is left out.
  MK_METHOD void start_token() {
    padding = false;
    if (!goes_on()) {
      over = padding = true;
      left = 1 << 30;
      return;
    }
    layer = 0;
    phase = kQkv;
    if (find_phase()) {
      enter_segment();
    } else {
      start_padding();
    }
  }

  MK_METHOD void start_padding() {
    padding = true;
    left = round_up(total, Ring::kSlotAtoms) - total;
  }

  // Goes on where all tiles of a chunk are done.
  MK_METHOD void leave_chunk() {
    if (++chunk < smaller(chunk_count(phase), (fill + 1) * kResident)) {
      enter_chunk();
      return;
    }
    arch::hand_over();  // B: products are in place
    if (chunk < chunk_count(phase)) {
      fill++;
    } else {
      fill = 0;
      if (++segment == segment_count(deal)) {
        phase++;
        if (!find_phase()) {
          start_padding();
          return;
        }
      }
    }
    enter_segment();
  }

  // Whether there certainly is one to multiply then.
  MK_METHOD bool end_run() {
    flush(sums, shared_at<float>(kShared.products) + products + place, lane, chunk > 0);
    clear_again(sums);
    if (++tile < tiles) {
      products += kTileProducts;
      enter_run();
      return kLeastRun > 0;
    }
    leave_chunk();
    return false;
  }

  // After the last atom of a run, until there is one to multiply or to leave out.
  MK_METHOD void advance() {
    if constexpr (kLeastRun > 0) {
      if (!padding && end_run()) return;
      while (left == 0) start_token();
    } else {
      do {
        if (padding) {
          start_token();
        } else {
          end_run();
        }
      } while (left == 0);
    }
  }

  // From an atom of the ring to its last. No loop: compilers refuse to unroll one that is so long.
  template <int atom>
  MK_METHOD void turn(const char* activations) {
    if constexpr (atom < Ring::kAtoms) {
      Vec4 w[kGroup];
      ring.template read<kGroup>(atom, w);
      if (!padding) {
        constexpr int at_once = smaller(kGroup, larger(1, 16 / kFragments));  // as registers allow
        MK_UNROLL
        for (int first = 0; first < kGroup; first += at_once) {
          Fragments x[at_once];
          MK_UNROLL
          for (int i = 0; i < at_once; i++) x[i] = load_fragments(activations, column + (first + i) * kAtomCols, lane);
          arch::keep_order();  // all are on their way before the first is waited for
          MK_UNROLL
          for (int i = 0; i < at_once; i++) multiply(sums, w[first + i], x[i]);
        }
      }
      ring.template done<kGroup>(atom);  // what comes next is requested before this wave waits for others
      column += kGroup * kAtomCols;
      left -= kGroup;
      if (left == 0) advance();
      turn<atom + kGroup>(activations);
    }
  }

  MK_METHOD void run(const Args& args) {
    wave = arch::wave();
    lane = arch::lane();
    total = count_atoms(wave, true);
    token = 0;
    over = false;
    place = product_place(wave, lane);
#if defined(MK_PLACED)
    ring.start((const char*)args.streams, pages_of(args, unit(), wave), kLastPlace, stream_bytes(wave));
#else
    ring.start(shared_at<char>(kShared.ring), shared_at<char>(kShared.barriers), stream_of(args, wave),
               stream_bytes(wave));
#endif
    clear(sums);
    const char* activations = shared_at<char>(kShared.activations);
    start_token();
    if (left == 0) advance();
    while (!over) {
      ring.wait();
      turn<0>(activations);
      ring.next();
    }
    ring.drain();
  }
};

}  // namespace mk
