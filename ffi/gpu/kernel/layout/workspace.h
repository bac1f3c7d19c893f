// Where things lie in the workspace. Also included by the host code that allocates it: constexpr, no includes but args.h.
#pragma once

#include "args.h"

namespace mk {

struct Dims {
  i64 batch, units, splits;
  i64 hidden, q_size, qkv_size, heads, vocab;
  i64 own_residual;  // f32 of a unit's private copy of the residual stream; 0: it is in shared memory
  i64 own_angles;    // f32 of RoPE's cosines and sines, which a unit works out for itself; likewise
  i64 groups, attention_groups, mlp_groups;  // 1: none
  i64 inner_cols;                            // of the MLP's inner activations that a group has, or all of them
  i64 packed_bytes;  // of an activation in packed hand-offs (sync/packed.h); 0: there are none
  i64 square_words;  // sums of squares of a unit for each request, only if there are
  i64 dies;  // of which units take numbers; 0: units are where they are
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

// Offsets in bytes from the workspace's start. The first exchange_bytes are zeroed before every launch. What stays inside groups
// is there once for each.
struct Workspace {
  i64 qkv;        // h1: words [attention_groups][batch][qkv_size of a group]
  i64 attended;   // h2: words [attention_groups][batch][q_size of a group]
  i64 partial;    // h3: words [batch][heads][splits][head_dim + 2], only if splits > 1
  i64 projected;  // h4: words [groups][batch][hidden]
  i64 inner;      // h5: words [mlp_groups][batch][inner_cols]
  i64 residual;   // h6: words [groups][batch][hidden]
  i64 final_;     // h9: words [groups][batch][hidden]
  // Without groups, h2, h4, h5, h6 and h9 may be packed: activations [kPackedCopies][batch][columns].
  i64 projected_squares;  // h13: words [batch][units][square_words]
  i64 residual_squares;   // h14: likewise
  i64 final_squares;      // h15: likewise
  i64 candidate;  // h7: words [batch][units][kCandidateWords]
  i64 token;      // h8: words [batch][kTokenWords]
  i64 out_sums;   // h10: words [attention_groups][batch][hidden], only if there are groups
  i64 down_sums;  // h11: words [mlp_groups][batch][hidden], likewise
  i64 places;     // h12: u32 [1 + dies] lines, only where units take numbers
  i64 exchange_bytes;
  i64 adjusted;   // f32 [batch][vocab rounded up to 4], logits after penalties, bias and temperature
  i64 logits;     // f32 likewise, logits as they were computed: for log-probabilities of filtered requests
  i64 own_residual;  // f32 [units][own_residual]
  i64 own_angles;    // f32 [units][own_angles]
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
  const i64 packed = d.packed_bytes;
  auto place_activations = [&](i64 groups, i64 columns) {
    return place(packed > 0 ? kPackedCopies * d.batch * line((columns * packed + 3) / 4) : groups * d.batch * line(columns));
  };
  const i64 squares = packed > 0 ? d.batch * line(d.units * d.square_words) : 0;
  w.qkv = place(d.attention_groups * d.batch * line(d.qkv_size / d.attention_groups));
  w.attended = place_activations(d.attention_groups, d.q_size / d.attention_groups);
  w.partial = place(d.splits > 1 ? d.batch * d.heads * d.splits * line(d.q_size / d.heads + 2) : 0);
  w.projected = place_activations(d.groups, d.hidden);
  w.inner = place_activations(d.mlp_groups, d.inner_cols);
  w.residual = place_activations(d.groups, d.hidden);
  w.final_ = place_activations(d.groups, d.hidden);
  w.projected_squares = place(squares);
  w.residual_squares = place(squares);
  w.final_squares = place(squares);
  w.candidate = place(d.batch * d.units * kCandidateWords);
  w.token = place(d.batch * line(kTokenWords));
  w.out_sums = place(d.groups > 1 ? d.attention_groups * d.batch * line(d.hidden) : 0);
  w.down_sums = place(d.groups > 1 ? d.mlp_groups * d.batch * line(d.hidden) : 0);
  w.places = place(d.dies > 0 ? (1 + d.dies) * 32 : 0);
  w.exchange_bytes = at;
  w.adjusted = place(d.batch * line(d.vocab));
  w.logits = place(d.batch * line(d.vocab));
  w.own_residual = place(d.units * line(d.own_residual));
  w.own_angles = place(d.units * line(d.own_angles));
  w.bytes = at;
  return w;
}

}  // namespace mk
