// The phases that multiply: p1_norm_qkv, p3_project_out, p4_gate_up, p5_down, and what they share with p6_head.
#pragma once

#include "activations.h"

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
MK_DEVICE float products_scale(const Service& s) {
  if constexpr (!kScaleAfter || !has_norm(phase)) return 1.0f;
  // All parts of the sum of squares are there.
  if constexpr (kStreamGathers) {
    arch::take_over_squares();  // Q
  } else {
    s.sync();
  }
  constexpr int rows = output_rows(phase);
  return s.norm_scale(s.index % (kBatch * rows) / rows, kHidden);
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

// A row of qkv of a group, among the rows of all groups: q, then k, then v.
MK_DEVICE int qkv_row(const Service& s, int row) {
  if constexpr (kAttentionGroups == 1) return row;
  const int group = s.group<kAttentionGroups>();
  if (row < kGroupQSize) return group * kGroupQSize + row;
  if (row < kGroupQSize + kGroupKvSize) return kQSize + group * kGroupKvSize + row - kGroupQSize;
  return kQSize + kKvSize + group * kGroupKvSize + row - kGroupQSize - kGroupKvSize;
}

// p1, and without groups p3 and p5: bias, residual, and off to the others.
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
  const int group = s.group<kMlpGroups>(), before = group * round_up(kInnerCols, rows);  // outputs of other groups
  struct Row {
    u32* word;
    float gate_bias, up_bias;
  };
  for_products<rows>(
      s, deal, segment, wait,
      [&](int request, int stacked) -> Row {
        const int out = stacked - before, among_all = group * kInnerCols + out;
        const bool real = among_all < kInner;
        return {(u32*)to.words + request * line(kInnerCols) + out, real ? bias<MK_GATE_BIAS>(s, among_all) : 0.0f,
                real ? bias<MK_UP_BIAS>(s, among_all) : 0.0f};
      },
      [&](const Row& row, int stacked, auto sum) {
        if (stacked - before >= kInnerCols) return;
        float y;
        if constexpr (kGated) {
          y = activate(sum(0) * scale + row.gate_bias) * (sum(rows) * scale + row.up_bias);
        } else {
          y = activate(sum(0) * scale + row.up_bias);
        }
        store_word_of<h5_inner>(row.word, encode(y, to.parity));
      });
}

// A phase's multiplications: gates, fills if the service waves gather, and use(s, deal, segment, scale, wait) for what comes out,
// which is to be scaled; it has come when use has called wait(s). A unit without tiles does nothing. opened: the first gate is
// open already.
template <int phase, typename Use>
MK_DEVICE void run_phase(Service& s, int layer, Use use, bool opened = false) {
  const Tiles deal = kTiles[phase * MK_UNITS + unit()];
  if (deal.count == 0) return;
  s.squares_set ^= 1;
  const int segments = segment_count(deal);
  constexpr int fills = kStreamGathers ? 1 : fill_count(phase);
  float scale = 1.0f;
  for (int segment = 0; segment < segments; segment++) {
    for (int fill = 0; fill < fills; fill++) {
      if (fills > 1 || segment == 0) {
        if constexpr (!kStreamGathers) {
          renew(s, [&](Service& now) { fill_activations<phase>(now, source_of<phase>(now, layer), fill); });
          s.mark(kPhaseEvents * phase + kGathered);
        }
        if (!opened) arch::open_gate();  // A
        if (fill == fills - 1) renew(s, [&](Service& now) { scale = products_scale<phase>(now); });
        s.mark(kPhaseEvents * phase + kFilled);
      }
      if (fill < fills - 1) arch::take_over();  // B
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

}  // namespace mk
