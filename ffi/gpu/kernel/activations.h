// What a phase multiplies its weights with: where it comes from, and its way into shared memory.
#pragma once

#include "service.h"

namespace mk {

constexpr Float4 kZero4 = {{0.0f, 0.0f, 0.0f, 0.0f}};

MK_DEVICE Float4 residual4(const Service& s, int request, int column) {
  Float4 f;
  MK_UNROLL
  for (int i = 0; i < 4; i++) f.v[i] = column + i < kHidden ? s.residual(request)[column + i] : 0.0f;
  return f;
}

constexpr bool has_norm(int phase) { return phase == kHead || (kPreNorm && (phase == kQkv || phase == kGateUp)); }
// Whether the service waves wait for the stream waves' word (Q) before they have the sum of squares that a norm needs: it is the
// stream waves that work it out, or looking for it, of all units' words, would hold up what those look for.
MK_METHOD constexpr bool tells_of_squares(int phase, int layer) {
  return has_norm(phase) && (!kPacked || kLateSquares || (phase == kQkv && layer == 0));
}
constexpr int norm_offset(int phase) { return phase == kQkv ? MK_ATTN_NORM : MK_MLP_NORM; }
template <int phase>
constexpr bool kNormAligned = phase == kHead ? MK_FINAL_NORM % 4 == 0 : aligned_in_layer(norm_offset(phase));

template <int phase>
MK_DEVICE const float* norm_of(const Service& s) {
  return phase == kHead ? s.args.constants + MK_FINAL_NORM : s.constants + norm_offset(phase);
}

// Where a phase's input comes from. words null: the residual stream is at hand, in the unit's own copy or the embedding.
template <int phase>
MK_DEVICE Site source_of(const Service& s, int layer) {
  if constexpr (phase == kO) return s.site(h2_attended, s.part<kAttentionGroups>(kWorkspace.attended, cols(kO)), layer);
  if constexpr (phase == kDown) return s.site(h5_inner, s.part<kMlpGroups>(kWorkspace.inner, cols(kDown)), layer);
  if constexpr (!kPostNorm) {
    if constexpr (phase == kGateUp) return s.site(h4_projected, s.part<kGroups>(kWorkspace.projected, kHidden), layer);
    if (phase == kHead || layer > 0) return s.residual_site(layer - 1);
  }
  return {};
}

constexpr HandOff source_handoff(int phase) {
  return phase == kO ? h2_attended : phase == kDown ? h5_inner : phase == kGateUp ? h4_projected : h6_residual;
}

// Columns [begin, end) of a request's row: use(column, value, weight).
template <int phase, typename Weights, typename Use>
MK_DEVICE void for_source(Service& s, const Site& site, int request, int begin, int end, Weights weights_of, Use use) {
  if (phase == kO || phase == kDown || site.words != nullptr) {
    gather_words<cols(phase), fill_count(phase) == 1, is_near(source_handoff(phase))>(s, site, site.words + request * line(cols(phase)), begin, end,
                                                      weights_of, use);
    return;
  }
  if constexpr (phase == kQkv || kPostNorm) {
    const int token = s.control().token[request];
    HeadRow row = {};
    if constexpr (!kPostNorm && MK_TIED_HEAD) row = find_head_row(s.args, token);
    for (int column = begin + (int)arch::fresh((u32)s.team_lane) * 4; column < end; column += kTeamLanes * 4) {
      Float4 x = kZero4;
      if (column < kHidden) {
        if constexpr (kPostNorm) {
          x = residual4(s, request, column);
        } else {
          x = embedding4(s, token, row, column);
        }
      }
      use(column, x, weights_of(column));
    }
  }
}

template <int phase>
MK_DEVICE void fill_activations(Service& s, const Site& site, int fill) {
  const int begin = fill_count(phase) == 1 ? 0 : fill * kResident * kChunkCols;
  const int end = fill_count(phase) == 1 ? padded_cols(phase) : smaller(padded_cols(phase), begin + kResident * kChunkCols);
  char* activations = shared_at<char>(kShared.activations);
  constexpr bool norm = has_norm(phase);
  if constexpr (norm && !kScaleAfter) {
    if (fill == 0) {
      for_team_requests(s, [&](int request) {
        float sum = 0.0f;
        for_source<phase>(s, site, request, 0, padded_cols(phase), NoWeights{}, [&](int, const Float4& x, const Float4&) {
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
    if constexpr (norm) {
      float sum = 0.0f;
      const Norm weights = {norm_of<phase>(s), kScaleAfter ? 1.0f : s.norm_scale(request, kHidden)};
      for_source<phase>(s, site, request, begin, end,
                        [&](int column) { return norm_weights<kHidden, kNormAligned<phase>>(weights, column); },
                        [&](int column, Float4 x, const Float4& weight) {
                          MK_UNROLL
                          for (int i = 0; i < 4; i++) {
                            sum = arch::fma(x.v[i], x.v[i], sum);
                            x.v[i] = column + i < kHidden ? x.v[i] * weight.v[i] : 0.0f;
                          }
                          store_activations(row, column - begin, x);
                        });
      if constexpr (kScaleAfter) set_squares(s, request, sum, fill > 0);
    } else {
      for_source<phase>(s, site, request, begin, end, NoWeights{},
                        [&](int column, const Float4& x, const Float4&) { store_activations(row, column - begin, x); });
    }
  });
}

// ---- By a stream wave for itself ----

// The first column in a wave's own rows of what it multiplies of chunk `chunk`, where those rows begin with chunk `first`.
MK_DEVICE int own_column(int chunk, int first, int wave) {
  return (chunk - first) * (kChunkAtoms * (wave + 1) / kWaves - kChunkAtoms * wave / kWaves) * kAtomCols;
}

// Four columns from `at` to the wave's own row at `to`; adds to a norm's sum of squares.
template <int phase>
MK_DEVICE void put_own(char* row, int to, int at, Float4 x, const Float4& weight, float& squares) {
  if constexpr (has_norm(phase)) {
    MK_UNROLL
    for (int i = 0; i < 4; i++) {
      squares = arch::fma(x.v[i], x.v[i], squares);
      x.v[i] = at + i < kHidden ? x.v[i] * weight.v[i] : 0.0f;
    }
  }
  store_activations(row, to, x);
}

MK_DEVICE void put_squares(const Service& s, int request, int wave, float sum, bool add) {
  if constexpr (!kLaneSquares) sum = wave_sum(sum);
  float* part = s.squares(request) + (kLaneSquares ? wave * arch::kWave + s.lane : wave);
  if (kLaneSquares || s.lane == 0) *part = add ? *part + sum : sum;
}

// The columns of fill `fill` that stream wave `wave` multiplies. Every lane takes `lane_columns` neighbouring columns of a run and,
// where runs are longer than a wave, others beside them: `pieces` in a run. Columns are numbered by i.
template <int phase, int lane_columns>
struct OwnColumns {
  static constexpr int kStep = arch::kWave * lane_columns, kPieces = (most_run(phase) * kAtomCols + kStep - 1) / kStep;
  static constexpr int kCount = smaller(kResident, chunk_count(phase)) * kPieces;
  // Whether those before kCount exist for every lane.
  static constexpr bool kAll = fill_count(phase) == 1 && most_run(phase) * kAtomCols % kStep == 0 &&
                               run_of(phase, chunk_count(phase) - 1, 0).count == most_run(phase) &&
                               run_of(phase, chunk_count(phase) - 1, kWaves - 1).count == most_run(phase);
  int fill, wave, lane;

  // How many are gathered at once, of `most`, so that no turn has much fewer than another.
  static constexpr int at_once(int most) {
    const int turns = (kCount + most - 1) / most;
    return (kCount + turns - 1) / turns;
  }

  // The column in the matrix, or -1 if there is none.
  MK_METHOD int of_matrix(int i) const {
    const int chunk = fill * kResident + i / kPieces, in_run = lane * lane_columns + i % kPieces * kStep;
    const Run run = run_of(phase, chunk, wave);
    if constexpr (kAll) return i < kCount ? run.begin * kAtomCols + in_run : -1;
    return i < kCount && chunk < chunk_count(phase) && in_run < run.count * kAtomCols ? run.begin * kAtomCols + in_run : -1;
  }
  MK_METHOD int of_row(int i) const {
    return own_column(fill * kResident + i / kPieces, fill * kResident, wave) + lane * lane_columns + i % kPieces * kStep;
  }
};

MK_DEVICE void gather_own_embedding(Service& s, int fill, int wave, char* own) {
  using Columns = OwnColumns<kQkv, 4>;
  const Columns columns = {fill, arch::unknown(wave), arch::unknown(s.lane)};
  const Norm norm = {norm_of<kQkv>(s), 1.0f};
  MK_NO_UNROLL
  for (int request = 0; request < kBatch; request++) {
    const int token = s.control().token[request];
    HeadRow row = {};
    if constexpr (MK_TIED_HEAD) row = find_head_row(s.args, token);
    float squares = 0.0f;
    MK_NO_UNROLL
    for (int i = 0; i < Columns::kCount; i++) {
      const int at = columns.of_matrix(i);
      if (at < 0) continue;
      Float4 weight = kZero4;
      if constexpr (has_norm(kQkv)) weight = norm_weights<kHidden, kNormAligned<kQkv>>(norm, at);
      put_own<kQkv>(own + request * kRowBytes, columns.of_row(i), at, at < kHidden ? embedding4(s, token, row, at) : kZero4, weight, squares);
    }
    if constexpr (has_norm(kQkv)) put_squares(s, request, wave, squares, fill > 0);
  }
  arch::wave_sync();
}

// Gathers them into the wave's own rows.
template <int phase>
MK_DEVICE void gather_own(Service& s, int layer, int fill, int wave, char* own) {
  using Columns = OwnColumns<phase, 4>;
  constexpr bool norm = has_norm(phase);
  constexpr int size = cols(phase), at_once = norm ? 4 : 8;  // vectors of a lane
  constexpr int items = Columns::at_once(at_once), requests = smaller(kBatch, at_once / items);
  constexpr bool bare = Columns::kAll && Columns::kCount % items == 0;  // nothing to check
  const Columns columns = {fill, arch::unknown(wave), arch::unknown(s.lane)};  // addresses of all phases would fill the registers
  const Site site = source_of<phase>(s, layer);
  const Norm weights_of = {norm ? norm_of<phase>(s) : nullptr, 1.0f};
  MK_NO_UNROLL
  for (int first_request = 0; first_request < kBatch; first_request += requests) {
    float squares[requests] = {};
    MK_NO_UNROLL
    for (int first_item = 0; first_item < Columns::kCount; first_item += items) {
      Vec4 v[requests * items];
      Float4 weights[items];
      int at[items];
      MK_UNROLL
      for (int i = 0; i < items; i++) {
        at[i] = columns.of_matrix(first_item + i);
        weights[i] = kZero4;
        if (norm && (bare || at[i] >= 0)) weights[i] = norm_weights<kHidden, kNormAligned<phase>>(weights_of, at[i]);
      }
      auto request_of = [&](int i) { return first_request + i / items; };
      auto wanted = [&](int i) { return (bare || at[i % items] >= 0) && (kBatch % requests == 0 || request_of(i) < kBatch); };
      wait_places<requests * items, is_near(source_handoff(phase))>(
          s.waiter, site, [&](int i) { return site.words + request_of(i) * line(size) + at[i % items]; }, v, [&](int i) {
            const int left = size - at[i % items];
            return !wanted(i) ? 0 : (bare && size == padded_cols(phase)) || (size % 4 == 0 && left > 0) ? 4 : left;
          }, look_later);
      MK_UNROLL
      for (int i = 0; i < requests * items; i++) {
        if (!wanted(i)) continue;
        put_own<phase>(own + request_of(i) * kRowBytes, columns.of_row(first_item + i % items), at[i % items], decode4(v[i]),
                       weights[i % items], squares[i / items]);
      }
    }
    if constexpr (norm) {
      MK_UNROLL
      for (int i = 0; i < requests; i++) {
        if (first_request + i < kBatch) put_squares(s, first_request + i, wave, squares[i], fill > 0);
      }
    }
  }
  name_missing(s.waiter, site, kBatch * Columns::kCount, [&](int i) -> Missing {
    const int request = i / Columns::kCount, at = columns.of_matrix(i % Columns::kCount);
    if (at < 0 || at >= size) return {kNoWord, 0, 0};
    const int word = request * line(size) + at;
    return missing_of(arch::load_words(site.words + word), smaller(4, size - at), (u32)word, site.parity);
  });
  arch::wave_sync();
}

}  // namespace mk
