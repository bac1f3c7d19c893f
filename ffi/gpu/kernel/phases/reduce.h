// p3 and p5 of a plan with groups: every unit hands on its part of a projection, which is a sum over the columns that its group has;
// then the units of every group, each for its share of the rows, add up the groups' parts and hand the result on inside the group.
#pragma once

#include "phases/layer.h"

namespace mk {

template <int phase>
MK_DEVICE Site sums_site(const Service& s, int layer) {
  return phase == kO ? s.site(h10_out_sums, kWorkspace.out_sums, layer) : s.site(h11_down_sums, kWorkspace.down_sums, layer);
}

// By the service waves, for each segment: sums of the unit's rows, for all groups.
template <int phase, typename Wait>
MK_DEVICE void publish_sums(Service& s, int layer, const Tiles& deal, int segment, Wait wait) {
  static_assert(phase == kO || phase == kDown);
  const int group = s.group<groups_of(phase)>(), before = group * round_up(kHidden, kTileRows);  // rows of other groups
  const Site to = sums_site<phase>(s, layer);
  for_products<kTileRows>(
      s, deal, segment, wait,
      [&](int request, int stacked) {
        return (u32*)to.words + (group * kBatch + request) * line(kHidden) + stacked - before;
      },
      [&](u32* word, int stacked, auto sum) {
        if (stacked - before < kHidden) arch::store_word(word, encode(sum(0), to.parity));
      });
}

// By the service waves: adds up the sums of the unit's share of the rows, in the order of the groups; bias, residual.
template <int phase>
MK_DEVICE void reduce_sums(Service& s, int layer) {
  constexpr int groups = groups_of(phase), bias_offset = phase == kO ? MK_O_BIAS : MK_DOWN_BIAS;
  const Site from = sums_site<phase>(s, layer);
  const Site to = phase == kO ? s.site(h4_projected, s.part<kGroups>(kWorkspace.projected, kHidden), layer) : s.residual_site(layer);
  static_assert(is_near(h4_projected) == is_near(h6_residual) && is_near(h6_residual) == is_near(h9_final));
  static_assert(kGroups == 1 || kOwnTileRows == 4);
  const Tiles own = own_rows(s);
  const int vectors = own.count;
  // Whole waves wait together.
  for (int first = s.wave * arch::kWave; first < kBatch * vectors; first += kServiceLanes) {
    const int i = first + s.lane, request = i / vectors, row = i % vectors * 4, column = own.begin * 4 + row;
    const int words = i < kBatch * vectors ? smaller(4, kHidden - column) : 0;
    float biases[4];
    MK_UNROLL
    for (int j = 0; j < 4; j++) biases[j] = j < words ? bias<bias_offset>(s, column + j) : 0.0f;
    Vec4 v[groups];
    wait_words<groups>(s.waiter, from, from.words + (words > 0 ? request * line(kHidden) + column : 0), kBatch * line(kHidden), v,
                       [&](int) { return words; });
    Float4 y = decode4(v[0]);
    MK_UNROLL
    for (int g = 1; g < groups; g++) {
      const Float4 x = decode4(v[g]);
      MK_UNROLL
      for (int j = 0; j < 4; j++) y.v[j] += x.v[j];
    }
    u32* words_to = (u32*)to.words + request * line(kHidden) + column;
    MK_UNROLL
    for (int j = 0; j < 4; j++) {
      if (j >= words) continue;
      y.v[j] += biases[j];
      if constexpr (!kPostNorm) {
        float* residual = s.residual(request) + row + j;
        y.v[j] = *residual + MK_RESIDUAL_MULTIPLIER * y.v[j];
        *residual = y.v[j];
      }
      store_word_of<h4_projected>(words_to + j, encode(y.v[j], to.parity));
    }
  }
}

}  // namespace mk
