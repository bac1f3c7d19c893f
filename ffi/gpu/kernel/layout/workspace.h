// Where things lie in the workspace. Also included by the host code that allocates it: constexpr, no includes but args.h.
#pragma once

#include "args.h"

namespace mk {

struct Dims {
  i64 batch, units, splits;
  i64 hidden, inner, q_size, qkv_size, heads, vocab;
  i64 own_residual;  // f32 of a unit's private copy of the residual stream; 0: it is in shared memory
  i64 packed_bytes;  // of an activation in packed hand-offs (sync/packed.h); 0: there are none
  i64 square_words;  // sums of squares of a unit for each request, only if there are
};

constexpr int kCandidateWords = 8;
constexpr int kTokenWords = 4;
constexpr int kPackedCopies = 3;

constexpr bool has_packed_hand_offs(bool stream_gathers, i64 batch) { return stream_gathers && batch > 1; }

// How many sums of squares a unit leaves for each request: `tile_rows` service lanes together have one request each, and the
// lanes of a wave that have the same request are added up where they are regularly apart.
constexpr i64 tiles_together(i64 batch, i64 tile_rows, i64 wave_size) {
  const i64 per_tile = batch * tile_rows;
  return per_tile <= wave_size && wave_size % per_tile == 0 ? wave_size / per_tile : 1;
}
constexpr i64 square_words(i64 batch, i64 tile_rows, i64 wave_size, i64 service_waves, i64 most_tiles) {
  const i64 at_once = service_waves * wave_size / (batch * tile_rows), together = tiles_together(batch, tile_rows, wave_size);
  return ((most_tiles < at_once ? most_tiles : at_once) + together - 1) / together;
}

// Offsets in bytes from the workspace's start. The first exchange_bytes are zeroed before every launch.
struct Workspace {
  i64 qkv;        // h1: words [batch][qkv_size]
  i64 attended;   // h2: words [batch][q_size]
  i64 partial;    // h3: words [batch][heads][splits][head_dim + 2], only if splits > 1
  i64 projected;  // h4: words [batch][hidden]
  i64 inner;      // h5: words [batch][inner]
  i64 residual;   // h6: words [batch][hidden]
  i64 final_;      // h9: words [batch][hidden]
  // Where h2, h4, h5, h6 and h9 are packed, they are activations [kPackedCopies][batch][columns].
  i64 projected_squares;  // h10: words [batch][units][square_words]
  i64 residual_squares;   // h11: likewise
  i64 final_squares;      // h12: likewise
  i64 candidate;  // h7: words [batch][units][kCandidateWords]
  i64 token;      // h8: words [batch][kTokenWords]
  i64 exchange_bytes;
  i64 adjusted;   // f32 [batch][vocab rounded up to 4], logits after penalties, bias and temperature
  i64 logits;     // f32 likewise, logits as they were computed: for log-probabilities of filtered requests
  i64 own_residual;  // f32 [units][own_residual]
  i64 abort;      // u32, zeroed with the exchange part: see sync/words.h
  i64 bytes;
};

constexpr Workspace make_workspace(Dims d) {
  Workspace w{};
  i64 at = 0;
  // Rows start on lines of 128 bytes.
  auto place = [&at](i64 words) {
    const i64 start = at;
    at += (words * 4 + 127) / 128 * 128;
    return start;
  };
  auto line = [](i64 n) { return (n + 31) / 32 * 32; };
  w.abort = place(32);
  w.qkv = place(d.batch * line(d.qkv_size));
  const i64 packed = d.packed_bytes;
  auto place_activations = [&](i64 columns) {
    return place(packed > 0 ? kPackedCopies * d.batch * line((columns * packed + 3) / 4) : d.batch * line(columns));
  };
  const i64 squares = packed > 0 ? d.batch * line(d.units * d.square_words) : 0;
  w.attended = place_activations(d.q_size);
  w.partial = place(d.splits > 1 ? d.batch * d.heads * d.splits * line(d.q_size / d.heads + 2) : 0);
  w.projected = place_activations(d.hidden);
  w.inner = place_activations(d.inner);
  w.residual = place_activations(d.hidden);
  w.final_ = place_activations(d.hidden);
  w.projected_squares = place(squares);
  w.residual_squares = place(squares);
  w.final_squares = place(squares);
  w.candidate = place(d.batch * d.units * kCandidateWords);
  w.token = place(d.batch * line(kTokenWords));
  w.exchange_bytes = at;
  w.adjusted = place(d.batch * line(d.vocab));
  w.logits = place(d.batch * line(d.vocab));
  w.own_residual = place(d.units * line(d.own_residual));
  w.bytes = at;
  return w;
}

}  // namespace mk
