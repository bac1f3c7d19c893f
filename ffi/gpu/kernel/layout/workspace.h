// Where things lie in the workspace. Also included by the host code that allocates it: constexpr, no includes but args.h.
#pragma once

#include "args.h"

namespace mk {

struct Dims {
  i64 batch, units, splits;
  i64 hidden, inner, q_size, qkv_size, heads, vocab;
  i64 own_residual;  // f32 of a unit's private copy of the residual stream; 0: it is in shared memory
};

constexpr int kCandidateWords = 8;
constexpr int kTokenWords = 4;

// Offsets in bytes from the workspace's start. The first exchange_bytes are zeroed before every launch.
struct Workspace {
  i64 qkv;        // h1: words [batch][qkv_size]
  i64 attended;   // h2: words [batch][q_size]
  i64 partial;    // h3: words [batch][heads][splits][head_dim + 2], only if splits > 1
  i64 projected;  // h4: words [batch][hidden]
  i64 inner;      // h5: words [batch][inner]
  i64 residual;   // h6: words [batch][hidden]
  i64 final_;      // h9: words [batch][hidden]
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
  w.attended = place(d.batch * line(d.q_size));
  w.partial = place(d.splits > 1 ? d.batch * d.heads * d.splits * line(d.q_size / d.heads + 2) : 0);
  w.projected = place(d.batch * line(d.hidden));
  w.inner = place(d.batch * line(d.inner));
  w.residual = place(d.batch * line(d.hidden));
  w.final_ = place(d.batch * line(d.hidden));
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
