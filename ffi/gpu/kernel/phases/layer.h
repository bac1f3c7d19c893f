// The phases that multiply: p1_norm_qkv, p3_project_out, p4_gate_up, p5_down, and what they share with p6_head.
#pragma once

#include "service.h"

namespace mk {

constexpr Float4 kZero4 = {{0.0f, 0.0f, 0.0f, 0.0f}};

// ---- Residual stream ----

MK_DEVICE Float4 residual4(const Service& s, int request, int column) {
  Float4 f;
  MK_UNROLL
  for (int i = 0; i < 4; i++) f.v[i] = column + i < kHidden ? s.residual(request)[column + i] : 0.0f;
  return f;
}

// Before the first layer.
MK_DEVICE void start_residual(Service& s) {
  if constexpr (kPostNorm) {
    for_team_requests(s, [&](int request) {
      const int token = s.control().token[request];
      const HeadRow row = find_head_row(s.args, token);
      for (int column = s.team_lane * 4; column < kHidden; column += kTeamLanes * 4) {
        const Float4 x = embedding4(s, token, row, column);
        for (int i = 0; i < 4 && column + i < kHidden; i++) s.residual(request)[column + i] = x.v[i];
      }
    });
  } else {
    const Tiles own = kTiles[kO * MK_UNITS + s.unit];
    const int rows = own.count * kTileRows;
    for (int i = s.index; i < kBatch * (rows / 4); i += kServiceLanes) {
      const int request = i / (rows / 4), row = i % (rows / 4) * 4, column = own.begin * kTileRows + row;
      const int token = s.control().token[request];
      Float4 x = kZero4;
      if (column < kHidden) x = embedding4(s, token, find_head_row(s.args, token), column);
      MK_UNROLL
      for (int j = 0; j < 4; j++) s.residual(request)[row + j] = x.v[j];
    }
  }
  s.sync();
}

// With post-norms: residual += multiplier * norm(projection) * weight, in the unit's own copy.
MK_DEVICE void add_projection(Service& s, const Site& site, const float* weights) {
  s.squares_set ^= 1;
  Input in = {nullptr, MK_NORM_OFFSET, 1.0f, kHidden};
  for (int pass = 0; pass < 2; pass++) {  // the first for the sum of squares
    for_team_requests(s, [&](int request) {
      if (pass == 1) {
        in.weights = weights;
        in.scale = s.norm_scale(request, kHidden);
      }
      float sum = 0.0f;
      float* x = s.residual(request);
      gather_words(s, site, site.words + request * line(kHidden), in, 0, kHidden,
                   [&](int column, const Float4& y, const Float4& w) {
                     for (int i = 0; i < 4 && column + i < kHidden; i++) {
                       if (pass == 0) {
                         sum = arch::fma(y.v[i], y.v[i], sum);
                       } else {
                         x[column + i] = x[column + i] + MK_RESIDUAL_MULTIPLIER * (y.v[i] * w.v[i]);
                       }
                     }
                   });
      if (pass == 0) set_squares(s, request, sum, false);
    });
    s.sync();
  }
}

// ---- What a phase multiplies ----

struct Source {
  Site site;             // words null: the residual stream is at hand, in the unit's own copy or the embedding
  int stride;            // words of a request's row
  int size;              // columns
  const float* weights;  // of the norm; null: none
};

// Columns [begin, end) of a request's row: use(column, value, weight).
template <typename Use>
MK_DEVICE void for_source(Service& s, const Source& source, int request, const Input& in, int begin, int end, Use use) {
  if (source.site.words != nullptr) {
    gather_words(s, source.site, source.site.words + request * source.stride, in, begin, end, use);
    return;
  }
  const int token = s.control().token[request];
  HeadRow row = {};
  if constexpr (!kPostNorm && MK_TIED_HEAD) row = find_head_row(s.args, token);
  for (int column = begin + s.team_lane * 4; column < end; column += kTeamLanes * 4) {
    Float4 x = kZero4, w = kZero4;
    if (column < kHidden) {
      if constexpr (kPostNorm) {
        x = residual4(s, request, column);
      } else {
        x = embedding4(s, token, row, column);
      }
    }
    if (in.weights != nullptr) w = input_weights(in, column);
    use(column, x, w);
  }
}

MK_DEVICE void fill_activations(Service& s, const Source& source, int fill) {
  const int begin = fill * kResident * kChunkCols;
  const int end = smaller(round_up(source.size, kAtomCols), begin + kResident * kChunkCols);
  char* activations = shared_at<char>(kShared.activations);
  const bool norm = source.weights != nullptr;
  if constexpr (!kScaleAfter) {
    if (norm && fill == 0) {
      for_team_requests(s, [&](int request) {
        float sum = 0.0f;
        for_source(s, source, request, {nullptr, 0.0f, 1.0f, source.size}, 0, source.size,
                   [&](int, const Float4& x, const Float4&) {
                     MK_UNROLL
                     for (int i = 0; i < 4; i++) sum = arch::fma(x.v[i], x.v[i], sum);
                   });
        set_squares(s, request, sum, false);
      });
      s.sync();
    }
  }
  for_team_requests(s, [&](int request) {
    char* row = activations + request * kRowBytes;
    float sum = 0.0f;
    const float scale = !kScaleAfter && norm ? s.norm_scale(request, kHidden) : 1.0f;
    for_source(s, source, request, {source.weights, MK_NORM_OFFSET, scale, source.size}, begin, end,
               [&](int column, Float4 x, const Float4& weight) {
                 if (norm) {
                   MK_UNROLL
                   for (int i = 0; i < 4; i++) {
                     sum = arch::fma(x.v[i], x.v[i], sum);
                     x.v[i] *= weight.v[i];
                   }
                 }
                 store_activations(row, column - begin, x);
               });
    if (kScaleAfter && norm) set_squares(s, request, sum, fill > 0);
  });
}

MK_DEVICE Source source_of(const Service& s, int phase, int layer) {
  if (phase == kO) return {s.site(h2_attended, kWorkspace.attended, layer), line(kQSize), kQSize, nullptr};
  if (phase == kDown) return {s.site(h5_inner, kWorkspace.inner, layer), line(kInner), kInner, nullptr};
  Source source = {{}, line(kHidden), kHidden, nullptr};
  if constexpr (!kPostNorm) {
    if (phase == kGateUp) {
      source.site = s.site(h4_projected, kWorkspace.projected, layer);
    } else if (layer > 0) {
      source.site = s.residual_site(layer - 1);
    }
  }
  if (phase == kHead) {
    source.weights = s.args.constants + MK_FINAL_NORM;
  } else if constexpr (kPreNorm) {
    source.weights = s.constants + (phase == kQkv ? MK_ATTN_NORM : MK_MLP_NORM);
  }
  return source;
}

// What a phase's products are to be multiplied with, for the only request of this lane; rows: outputs of a tile.
MK_DEVICE float products_scale(const Service& s, const Source& source, int rows) {
  if (!kScaleAfter || source.weights == nullptr) return 1.0f;
  return s.norm_scale(s.index % (kBatch * rows) / rows, kHidden);
}

// ---- What becomes of the products ----

MK_DEVICE float bias(const Service& s, int offset, int row) { return offset < 0 ? 0.0f : s.constants[offset + row]; }

MK_DEVICE float activate(float x) {
  if constexpr (MK_ACTIVATION == 0) return x / (1.0f + exp_(-x));
  if constexpr (MK_ACTIVATION == 1) return 0.5f * x * (1.0f + erf_(x * 0.70710678118654752f));
  if constexpr (MK_ACTIVATION == 2) {
    return 0.5f * x * (1.0f + tanh_(0.7978845608028654f * arch::fma(0.044715f * x * x, x, x)));
  }
  return x != x || x > 0.0f ? x : 0.0f;
}

// p1, p3 and p5: bias, residual, and off to the others.
MK_DEVICE void publish_rows(Service& s, const Source& source, int phase, int layer, const Tiles& deal, int segment) {
  const int size = phase == kQkv ? kQkvSize : kHidden;
  const int bias_offset = phase == kQkv ? MK_Q_BIAS : phase == kO ? MK_O_BIAS : MK_DOWN_BIAS;
  const Site to = phase == kQkv ? s.site(h1_qkv, kWorkspace.qkv, layer)
                  : phase == kO ? s.site(h4_projected, kWorkspace.projected, layer)
                                : s.residual_site(layer);
  const float scale = products_scale(s, source, kTileRows);
  for_products<kTileRows>(s, deal, segment, [&](int request, int out, int row, auto sum) {
    if (out >= size) return;
    float y = sum(row) * scale + bias(s, bias_offset, out);
    if (!kPostNorm && phase != kQkv) {
      float& x = s.residual(request)[out - deal.begin * kTileRows];
      y = x + MK_RESIDUAL_MULTIPLIER * y;
      x = y;
    }
    arch::store_word((u32*)to.words + request * line(size) + out, encode(y, to.parity));
  });
}

// p4: activation.
MK_DEVICE void publish_inner(Service& s, const Source& source, int layer, const Tiles& deal, int segment) {
  constexpr int rows = kGated ? kTileRows / 2 : kTileRows;
  const Site to = s.site(h5_inner, kWorkspace.inner, layer);
  const float scale = products_scale(s, source, rows);
  for_products<rows>(s, deal, segment, [&](int request, int out, int row, auto sum) {
    if (out >= kInner) return;
    float y;
    if constexpr (kGated) {
      const float gate = sum(row) * scale + bias(s, MK_GATE_BIAS, out);
      y = activate(gate) * (sum(row + rows) * scale + bias(s, MK_UP_BIAS, out));
    } else {
      y = activate(sum(row) * scale + bias(s, MK_UP_BIAS, out));
    }
    arch::store_word((u32*)to.words + request * line(kInner) + out, encode(y, to.parity));
  });
}

// A phase's multiplications: fills, barriers, and use(deal, segment) for what comes out. A unit without tiles does nothing.
template <typename Use>
MK_DEVICE void run_phase(Service& s, const Source& source, int phase, Use use) {
  const Tiles deal = kTiles[phase * MK_UNITS + s.unit];
  if (deal.count == 0) return;
  s.squares_set ^= 1;
  const int segments = segment_count(deal);
  const int fills = (StreamWave::chunk_count_of(phase) + kResident - 1) / kResident;
  for (int segment = 0; segment < segments; segment++) {
    for (int fill = 0; fill < fills; fill++) {
      if (fills > 1 || segment == 0) {
        fill_activations(s, source, fill);
        s.mark(kPhaseEvents * phase + kGathered);
        arch::unit_sync();  // A
        s.mark(kPhaseEvents * phase + kFilled);
      }
      arch::unit_sync();  // B
      s.mark(kPhaseEvents * phase + kMultiplied);
    }
    // What comes next is in place already: let the stream waves go on before looking at what came out.
    if (fills == 1 && segment + 1 < segments) arch::unit_sync();  // A
    use(deal, segment);
    s.mark(kPhaseEvents * phase + kPublished);
  }
}

}  // namespace mk
