// The phases that multiply: p1_norm_qkv, p3_project_out, p4_gate_up, p5_down, and what they share with p6_head.
#pragma once

#include "packed_activations.h"

namespace mk {

// ---- Residual stream ----

// The rows that the unit adds to, without post-norms, in tiles of kOwnTileRows.
constexpr int kOwnTileRows = kGroups == 1 ? kTileRows : 4;
MK_DEVICE Tiles own_rows(const Service& s) {
  if constexpr (kGroups == 1) {
    return kTiles[kO * MK_UNITS + s.unit];
  } else {
    const int member = s.member<kGroups>(), begin = kHiddenVectors * member / kMembers;
    return {begin, kHiddenVectors * (member + 1) / kMembers - begin};
  }
}

// Before the first layer.
MK_DEVICE void start_residual(Service& s) {
  if constexpr (kPostNorm) {
    for_team_requests(s, [&](int request) {
      const int token = s.control().token[request];
      const HeadRow row = find_head_row(s.args, token);
      for (int column = s.team_lane * 4; column < kHidden; column += kTeamLanes * 4) {
        const Float4 x = embedding4(s, token, row, column);
        MK_UNROLL
        for (int i = 0; i < 4; i++) {
          if (column + i < kHidden) s.residual(request)[column + i] = x.v[i];
        }
      }
    });
  } else {
    const Tiles own = own_rows(s);
    const int rows = own.count * kOwnTileRows;
    for (int i = s.index; i < kBatch * (rows / 4); i += kServiceLanes) {
      const int request = i / (rows / 4), row = i % (rows / 4) * 4, column = own.begin * kOwnTileRows + row;
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
template <bool aligned>
MK_DEVICE void add_projection(Service& s, const Site& site, const float* weights) {
  if (!s.reads_residual()) return;
  s.squares_set ^= 1;
  for_team_requests(s, [&](int request) {
    float sum = 0.0f;
    gather_words<kHidden, true, is_near(h4_projected)>(s, site, site.words + request * line(kHidden), 0, kHidden, NoWeights{},
                                [&](int, const Float4& y, const Float4&) {
                                  MK_UNROLL
                                  for (int i = 0; i < 4; i++) sum = arch::fma(y.v[i], y.v[i], sum);
                                });
    set_squares(s, request, sum, false);
  });
  s.sync();
  for_team_requests(s, [&](int request) {
    const Norm norm = {weights, s.norm_scale(request, kHidden)};
    float* x = s.residual(request);
    gather_words<kHidden, true, is_near(h4_projected)>(s, site, site.words + request * line(kHidden), 0, kHidden,
                                [&](int column) { return norm_weights<kHidden, aligned>(norm, column); },
                                [&](int column, const Float4& y, const Float4& w) {
                                  MK_UNROLL
                                  for (int i = 0; i < 4; i++) {
                                    if (column + i >= kHidden) continue;
                                    x[column + i] = x[column + i] + MK_RESIDUAL_MULTIPLIER * (y.v[i] * w.v[i]);
                                  }
                                });
  });
  s.sync();
}

// Outputs of a tile.
constexpr int output_rows(int phase) { return phase == kGateUp && kGated ? kTileRows / 2 : kTileRows; }

// What a phase's products are to be multiplied with, for the only request of this lane.
template <int phase>
MK_DEVICE float products_scale(Service& s, int layer) {
  if constexpr (!kScaleAfter || !has_norm(phase)) return 1.0f;
  constexpr int rows = output_rows(phase);
  const int request = s.index % (kBatch * rows) / rows;
  if constexpr (!kStreamGathers) {
    s.sync();  // all parts of the sum of squares are there
  } else if (tells_of_squares(phase, layer)) {
    arch::take_over_squares();  // Q
  }
  if constexpr (kPacked) {
    if (phase != kQkv || layer > 0) {
      gather_squares<phase>(s, layer);
      return s.scale_of(*s.squares(request), kHidden);
    }
  }
  return s.norm_scale(request, kHidden);
}

// ---- What becomes of the products ----

template <int offset>
MK_DEVICE float bias(const Service& s, int row) {
  if constexpr (offset < 0) return 0.0f;
  return s.constants[offset + row];
}

MK_DEVICE float activate(float x) {
  if constexpr (MK_ACTIVATION == 0) return arch::fast_divide(x, 1.0f + fast_exp(-x));
  if constexpr (MK_ACTIVATION == 1) return 0.5f * x * (1.0f + erf_(x * 0.70710678118654752f));
  if constexpr (MK_ACTIVATION == 2) {
    return 0.5f * x * (1.0f + tanh_(0.7978845608028654f * arch::fma(0.044715f * x * x, x, x)));
  }
  return x != x || x > 0.0f ? x : 0.0f;
}

// The norm's weights by which stream waves will see the residual stream multiplied after p3 or p5; null: none.
template <int phase>
MK_DEVICE const float* next_norm(const Service& s, int layer) {
  if (phase == kDown && layer == MK_NUM_LAYERS - 1) return s.args.constants + MK_FINAL_NORM;
  if (!has_norm(phase == kO ? kGateUp : kQkv)) return nullptr;
  return phase == kO ? s.constants + MK_MLP_NORM : s.constants + MK_LAYER_CONSTANTS + MK_ATTN_NORM;
}

// p3 and p5 where hand-offs are packed: bias, residual, norm's weight, and off to the others. squares: of this lane's rows so far.
template <int phase, typename Wait>
MK_DEVICE void publish_residual(Service& s, int layer, const Tiles& deal, int segment, float& squares, Wait wait) {
  constexpr int bias_offset = phase == kO ? MK_O_BIAS : MK_DOWN_BIAS;
  const Packed to = phase == kO ? s.packed(h4_projected, kWorkspace.projected, kHidden, layer) : s.packed_residual(layer);
  const float* norm = next_norm<phase>(s, layer);
  struct Row {
    char* place;
    float* residual;
    float bias, weight;
  };
  for_products<kTileRows>(
      s, deal, segment, wait,
      [&](int request, int out) -> Row {
        const bool real = out < kHidden;
        return {packed_place(to, request, kHidden, out), s.residual(request) + out - deal.begin * kTileRows,
                real ? bias<bias_offset>(s, out) : 0.0f, real && norm != nullptr ? MK_NORM_OFFSET + norm[out] : 1.0f};
      },
      [&](const Row& row, int out, auto sum) {
        if (out >= kHidden) return;
        const float y = *row.residual + MK_RESIDUAL_MULTIPLIER * (sum(0) + row.bias);
        *row.residual = y;
        publish_packed(row.place, to.clears, y * row.weight);
        squares = arch::fma(y, y, squares);
      });
}

// The sums of squares of this unit's rows of the residual stream, from those of the lanes.
template <int phase>
MK_DEVICE void publish_squares(const Service& s, int layer, float sum) {
  constexpr int per_tile = kBatch * kTileRows, together = (int)tiles_together(kBatch, kTileRows, arch::kWave);
  MK_UNROLL
  for (int step = 1; step < kTileRows; step *= 2) sum += arch::shuffle_xor(sum, step);
  MK_UNROLL
  for (int step = per_tile; step < per_tile * together; step *= 2) sum += arch::shuffle_xor(sum, step);
  const int word = s.index / (per_tile * together), request = s.index % per_tile / kTileRows;
  if (s.index % (per_tile * together) >= per_tile || s.index % kTileRows != 0 || word >= kSquareWords) return;
  const Site to = phase == kO ? s.site(h13_projected_squares, kWorkspace.projected_squares, layer) : s.residual_squares_site(layer);
  arch::store_word((u32*)to.words + request * line(MK_UNITS * kSquareWords) + s.unit * kSquareWords + word, encode(sum, to.parity));
}

// A row of qkv of a group, among the rows of all groups: q, then k, then v.
MK_DEVICE int qkv_row(const Service& s, int row) {
  if constexpr (kAttentionGroups == 1) return row;
  const int group = s.group<kAttentionGroups>();
  if (row < kGroupQSize) return group * kGroupQSize + row;
  if (row < kGroupQSize + kGroupKvSize) return kQSize + group * kGroupKvSize + row - kGroupQSize;
  return kQSize + kKvSize + group * kGroupKvSize + row - kGroupQSize - kGroupKvSize;
}

// p1, and without groups or packed hand-offs p3 and p5: bias, residual, and off to the others.
template <int phase, typename Wait>
MK_DEVICE void publish_rows(Service& s, int layer, const Tiles& deal, int segment, float scale, Wait wait) {
  constexpr int size = phase == kQkv ? kGroupQkvSize : kHidden;
  constexpr int bias_offset = phase == kQkv ? MK_Q_BIAS : phase == kO ? MK_O_BIAS : MK_DOWN_BIAS;
  constexpr bool adds = !kPostNorm && phase != kQkv;
  static_assert(kGroups == 1 || phase == kQkv);
  constexpr HandOff handoff = phase == kQkv ? h1_qkv : phase == kO ? h4_projected : h6_residual;  // or h9, of the same scope
  const int before = phase == kQkv ? s.group<kAttentionGroups>() * round_up(size, kTileRows) : 0;  // rows of other groups
  const Site to = phase == kQkv ? s.site(h1_qkv, s.part<kAttentionGroups>(kWorkspace.qkv, size), layer)
                  : phase == kO ? s.site(h4_projected, kWorkspace.projected, layer)
                                : s.residual_site(layer);
  struct Row {
    u32* word;
    float* residual;
    float bias;
  };
  for_products<kTileRows>(
      s, deal, segment, wait,
      [&](int request, int stacked) -> Row {
        const int out = stacked - before;
        return {(u32*)to.words + request * line(size) + out, adds ? s.residual(request) + out - deal.begin * kTileRows : nullptr,
                out < size ? bias<bias_offset>(s, phase == kQkv ? qkv_row(s, out) : out) : 0.0f};
      },
      [&](const Row& row, int stacked, auto sum) {
        if (stacked - before >= size) return;
        float y = sum(0) * scale + row.bias;
        if constexpr (adds) {
          y = *row.residual + MK_RESIDUAL_MULTIPLIER * y;
          *row.residual = y;
        }
        store_word_of<handoff>(row.word, encode(y, to.parity));
      });
}

// p4: activation.
template <typename Wait>
MK_DEVICE void publish_inner(Service& s, int layer, const Tiles& deal, int segment, float scale, Wait wait) {
  constexpr int rows = output_rows(kGateUp);
  const Site to = s.site(h5_inner, s.part<kMlpGroups>(kWorkspace.inner, kInnerCols), layer);
  const Packed packed = s.packed(h5_inner, kWorkspace.inner, kInner, layer);
  const int group = s.group<kMlpGroups>(), before = group * round_up(kInnerCols, rows);  // outputs of other groups
  struct Row {
    char* place;
    float gate_bias, up_bias;
  };
  for_products<rows>(
      s, deal, segment, wait,
      [&](int request, int stacked) -> Row {
        const int out = stacked - before, among_all = group * kInnerCols + out;
        const bool real = among_all < kInner;
        return {kPacked ? packed_place(packed, request, kInner, out) : (char*)(to.words + request * line(kInnerCols) + out),
                real ? bias<MK_GATE_BIAS>(s, among_all) : 0.0f, real ? bias<MK_UP_BIAS>(s, among_all) : 0.0f};
      },
      [&](const Row& row, int stacked, auto sum) {
        if (stacked - before >= kInnerCols) return;
        float y;
        if constexpr (kGated) {
          y = activate(sum(0) * scale + row.gate_bias) * (sum(rows) * scale + row.up_bias);
        } else {
          y = activate(sum(0) * scale + row.up_bias);
        }
        if constexpr (kPacked) {
          publish_packed(row.place, packed.clears, y);
        } else {
          store_word_of<h5_inner>((u32*)row.place, encode(y, to.parity));
        }
      });
}

// A phase's multiplications: gates, fills if the service waves gather, and use(s, deal, segment, scale, wait) for what comes out,
// which is to be scaled; it has come when use has called wait(s). A unit without tiles does nothing but before(s), which is called
// once, before anything is waited for. opened: the first gate is open already.
template <int phase, typename Before, typename Use>
MK_DEVICE void run_phase(Service& s, int layer, bool opened, Before before, Use use) {
  const Tiles deal = kTiles[phase * MK_UNITS + unit()];
  const int segments = segment_count(deal);
  constexpr int fills = kStreamGathers ? 1 : fill_count(phase);
  float scale = 1.0f;
  if (deal.count > 0) s.squares_set ^= 1;
  before(s);
  if constexpr (kPacked) {
    if (deal.count > 0) {
      if (!opened) arch::open_gate();  // A
      scale = products_scale<phase>(s, layer);
      s.mark(kPhaseEvents * phase + kFilled);
    }
  }
  for (int segment = 0; segment < segments; segment++) {
    if constexpr (!kPacked) {
      for (int fill = 0; fill < fills; fill++) {
        if (fills > 1 || segment == 0) {
          if constexpr (!kStreamGathers) {
            renew(s, [&](Service& now) { fill_activations<phase>(now, source_of<phase>(now, layer), fill); });
            s.mark(kPhaseEvents * phase + kGathered);
          }
          if (!opened) arch::open_gate();  // A
          if (fill == fills - 1) renew(s, [&](Service& now) { scale = products_scale<phase>(now, layer); });
          s.mark(kPhaseEvents * phase + kFilled);
        }
        if (fill < fills - 1) arch::take_over();  // B
      }
    }
    renew(s, [&](Service& now) {
      use(now, deal, segment, scale, [&](Service& waiting) {
        arch::take_over();  // B
        waiting.mark(kPhaseEvents * phase + kMultiplied);
        // What comes next is in place already: let the stream waves go on before looking at what came out.
        if (fills == 1 && segment + 1 < segments) arch::open_gate();  // A
      });
    });
    s.mark(kPhaseEvents * phase + kPublished);
  }
}

struct Nothing {
  MK_METHOD void operator()(Service&) const {}
};

}  // namespace mk
