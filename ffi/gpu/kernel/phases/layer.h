// The phases of a layer that multiply: p1_norm_qkv, p3_project_out, p4_gate_up, p5_down.
#pragma once

#include "service.h"

namespace mk {

// ---- Where activations come from: source(request, begin, end, use(column, value, weight)) ----

struct NormWeight {
  const float* weights;  // [size]
  float scale;           // 1, or what the value is scaled by before the multiplication
};

template <int size, bool aligned>
MK_DEVICE Float4 load_norm_weight(const NormWeight& w, int column) {
  Float4 f = load_constants<aligned>(w.weights + column, size - column);
  MK_UNROLL
  for (int i = 0; i < 4; i++) f.v[i] = (f.v[i] + MK_NORM_OFFSET) * w.scale;
  return f;
}

// Columns of a vector that the unit itself holds.
template <typename Value, typename Use>
MK_DEVICE void for_columns(const Service& s, int begin, int end, Value value, Use use) {
  for (int column = begin + s.team_lane * 4; column < end; column += kTeamLanes * 4) use(column, value(column));
}

MK_DEVICE Float4 residual4(const Service& s, int request, int column) {
  Float4 f;
  MK_UNROLL
  for (int i = 0; i < 4; i++) f.v[i] = column + i < kHidden ? s.residual(request)[column + i] : 0.0f;
  return f;
}

// The residual stream as input of a phase: from the embedding (site.words null), from a hand-off, or the unit's own copy.
template <typename Use>
MK_DEVICE void residual_values(Service& s, const Site& site, int request, int begin, int end, Use use) {
  if constexpr (kPostNorm) {
    for_columns(s, begin, end, [&](int column) { return residual4(s, request, column); }, use);
  } else if (site.words == nullptr) {
    const int token = s.control().token[request];
    const HeadRow row = find_head_row(s.args, token);
    for_columns(
        s, begin, end,
        [&](int column) {
          return column < kHidden ? embedding4(s, token, row, column) : Float4{{0.0f, 0.0f, 0.0f, 0.0f}};
        },
        use);
  } else {
    gather_words<kHidden>(s, site, request, begin, end, [](int) { return Nothing{}; },
                          [&](int column, const Float4& x, Nothing) { use(column, x); });
  }
}

// Fills activations with norm(residual) * weight; a model without pre-norms uses the residual itself.
template <int phase, bool aligned>
MK_DEVICE void fill_residual(Service& s, const Site& site, const float* weights, int fill) {
  constexpr bool norm = kPreNorm || phase == kHead;
  if constexpr (norm && !kScaleAfter) {
    if (fill == 0) {
      for_team_requests(s, [&](int request) {
        float sum = 0.0f;
        residual_values(s, site, request, 0, padded_cols(phase), [&](int, const Float4& x) {
          MK_UNROLL
          for (int i = 0; i < 4; i++) sum = arch::fma(x.v[i], x.v[i], sum);
        });
        sum = wave_sum(sum);
        if (s.lane == 0) s.squares(request)[s.team_wave] = sum;
      });
      s.sync();
    }
  }
  fill_activations<phase, norm>(s, fill, [&](int request, int begin, int end, auto use) {
    NormWeight weight = {weights, 1.0f};
    if constexpr (norm && !kScaleAfter) weight.scale = s.norm_scale(request, kHidden);
    if constexpr (norm && !kPostNorm) {
      if (site.words != nullptr) {  // the weights are on their way while the words are not ready
        gather_words<kHidden>(s, site, request, begin, end,
                              [&](int column) { return load_norm_weight<kHidden, aligned>(weight, column); }, use);
        return;
      }
    }
    residual_values(s, site, request, begin, end, [&](int column, const Float4& x) {
      Float4 w = {};
      if constexpr (norm) w = load_norm_weight<kHidden, aligned>(weight, column);
      use(column, x, w);
    });
  });
}

// What a phase's products are to be multiplied with, for the only request of this lane.
template <int phase>
MK_DEVICE float products_scale(const Service& s, int rows) {
  if constexpr (!(kPreNorm || phase == kHead) || !kScaleAfter) return 1.0f;
  return s.norm_scale(s.index % (kBatch * rows) / rows, kHidden);
}

// ---- Residual stream ----

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
      Float4 x = {};
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
  s.squares_set ^= 1;
  for_team_requests(s, [&](int request) {
    float sum = 0.0f;
    gather_words<kHidden>(s, site, request, 0, kHidden, [](int) { return Nothing{}; }, [&](int, const Float4& y, Nothing) {
      MK_UNROLL
      for (int i = 0; i < 4; i++) sum = arch::fma(y.v[i], y.v[i], sum);
    });
    sum = wave_sum(sum);
    if (s.lane == 0) s.squares(request)[s.team_wave] = sum;
  });
  s.sync();
  for_team_requests(s, [&](int request) {
    const NormWeight weight = {weights, s.norm_scale(request, kHidden)};
    float* x = s.residual(request);
    gather_words<kHidden>(
        s, site, request, 0, kHidden, [&](int column) { return load_norm_weight<kHidden, aligned>(weight, column); },
        [&](int column, const Float4& y, const Float4& w) {
          for (int i = 0; i < 4 && column + i < kHidden; i++) {
            x[column + i] = x[column + i] + MK_RESIDUAL_MULTIPLIER * (y.v[i] * w.v[i]);
          }
        });
  });
  s.sync();
}

// ---- Phases ----

template <int offset>
MK_DEVICE float bias(const Service& s, int row) {
  if constexpr (offset < 0) return 0.0f;
  return s.constants[offset + row];
}

MK_DEVICE void p1_norm_qkv(Service& s, int layer) {
  Site from = s.residual_site(layer - 1);
  if (layer == 0) from.words = nullptr;
  const u32 parity = s.site(h1_qkv, kWorkspace.qkv, layer).parity;
  u32* to = s.at<u32>(kWorkspace.qkv);
  run_phase<kQkv>(
      s, [&](int fill) { fill_residual<kQkv, aligned_in_layer(MK_ATTN_NORM)>(s, from, s.constants + MK_ATTN_NORM, fill); },
      [&](const Tiles& deal, int segment) {
        const float scale = products_scale<kQkv>(s, kTileRows);
        for_products<kTileRows>(s, deal, segment, [&](int request, int out, int row, auto sum) {
          if (out >= kQkvSize) return;
          const float y = sum(row) * scale + bias<MK_Q_BIAS>(s, out);
          arch::store_word(to + request * line(kQkvSize) + out, encode(y, parity));
        });
      });
}

// The end of p3 and p5: bias, residual, and off to the others.
template <int bias_offset>
MK_DEVICE void publish_projection(Service& s, const Tiles& deal, int segment, u32* to, u32 parity) {
  for_products<kTileRows>(s, deal, segment, [&](int request, int out, int row, auto sum) {
    if (out >= kHidden) return;
    float y = sum(row) + bias<bias_offset>(s, out);
    if constexpr (!kPostNorm) {
      float& x = s.residual(request)[out - deal.begin * kTileRows];
      y = x + MK_RESIDUAL_MULTIPLIER * y;
      x = y;
    }
    arch::store_word(to + request * line(kHidden) + out, encode(y, parity));
  });
}

MK_DEVICE void p3_project_out(Service& s, int layer) {
  const Site from = s.site(h2_attended, kWorkspace.attended, layer);
  run_phase<kO>(
      s,
      [&](int fill) {
        fill_activations<kO, false>(s, fill, [&](int request, int begin, int end, auto use) {
          gather_words<kQSize>(s, from, request, begin, end, [](int) { return Float4{}; }, use);
        });
      },
      [&](const Tiles& deal, int segment) {
        publish_projection<MK_O_BIAS>(s, deal, segment, s.at<u32>(kWorkspace.projected), from.parity);
      });
}

MK_DEVICE float activate(float x) {
  if constexpr (MK_ACTIVATION == 0) return x / (1.0f + exp_(-x));
  if constexpr (MK_ACTIVATION == 1) return 0.5f * x * (1.0f + erf_(x * 0.70710678118654752f));
  if constexpr (MK_ACTIVATION == 2) {
    return 0.5f * x * (1.0f + tanh_(0.7978845608028654f * arch::fma(0.044715f * x * x, x, x)));
  }
  return x != x || x > 0.0f ? x : 0.0f;
}

MK_DEVICE void p4_gate_up(Service& s, int layer) {
  const Site from = s.site(h4_projected, kWorkspace.projected, layer);
  if constexpr (kPostNorm) {
    add_projection<aligned_in_layer(MK_ATTN_POST_NORM)>(s, from, s.constants + MK_ATTN_POST_NORM);
  }
  u32* to = s.at<u32>(kWorkspace.inner);
  constexpr int rows = kGated ? kTileRows / 2 : kTileRows;
  run_phase<kGateUp>(
      s, [&](int fill) { fill_residual<kGateUp, aligned_in_layer(MK_MLP_NORM)>(s, from, s.constants + MK_MLP_NORM, fill); },
      [&](const Tiles& deal, int segment) {
        const float scale = products_scale<kGateUp>(s, rows);
        for_products<rows>(s, deal, segment, [&](int request, int out, int row, auto sum) {
          if (out >= kInner) return;
          float y;
          if constexpr (kGated) {
            const float gate = sum(row) * scale + bias<MK_GATE_BIAS>(s, out);
            y = activate(gate) * (sum(row + rows) * scale + bias<MK_UP_BIAS>(s, out));
          } else {
            y = activate(sum(row) * scale + bias<MK_UP_BIAS>(s, out));
          }
          arch::store_word(to + request * line(kInner) + out, encode(y, from.parity));
        });
      });
}

MK_DEVICE void p5_down(Service& s, int layer) {
  const Site from = s.site(h5_inner, kWorkspace.inner, layer);
  run_phase<kDown>(
      s,
      [&](int fill) {
        fill_activations<kDown, false>(s, fill, [&](int request, int begin, int end, auto use) {
          gather_words<kInner>(s, from, request, begin, end, [](int) { return Float4{}; }, use);
        });
      },
      [&](const Tiles& deal, int segment) {
        const Site to = s.residual_site(layer);
        publish_projection<MK_DOWN_BIAS>(s, deal, segment, (u32*)to.words, to.parity);
      });
}

// After a layer, before the next one or the head.
MK_DEVICE void finish_layer(Service& s, int layer) {
  if constexpr (kPostNorm) {
    add_projection<aligned_in_layer(MK_MLP_POST_NORM)>(s, s.residual_site(layer), s.constants + MK_MLP_POST_NORM);
  }
}

}  // namespace mk
