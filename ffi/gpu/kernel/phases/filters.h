// Top-k, top-p and min-p, and the draw among what they keep: one row, by the service lanes of one unit.
//
// All three keep the tokens with z at or above some value, so few tokens matter, and most rows need two looks at the
// vocabulary: the first takes the maximum of each of some hundred groups, which gives a lower bound of that value; the
// second collects the tokens that reach the bound in shared memory, where they are sorted and docs/sampling.md is
// followed to the letter. If too many reach it, `search` finds the value in several more looks, with histograms.
//
// Counts and masses are integers, whose sums do not depend on an order.
#pragma once

#include "phases/sampling.h"

namespace mk {

constexpr int kListSize = 1024;
constexpr int kBins = 1024;

struct FilterScratch {
  union {
    u64 list[kListSize];  // order_key << 32 | ~token, so that sorting puts the lowest token first among equals
    u32 bins[2][kBins];   // low and high half of sums
  };
  u64 sums[MK_SERVICE_WAVES];
  Race races[MK_SERVICE_WAVES];
  u64 above;
  u32 bin;
  u32 count;
};
static_assert(sizeof(FilterScratch) <= 16 * 1024, "docs/kernel.md and config.h promise not to use more");

// Unsigned integers that compare as clean floats do.
MK_DEVICE u32 order_key(float z) {
  const u32 bits = arch::as_u32(z);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}
MK_DEVICE float from_order_key(u32 key) { return arch::as_f32(key ^ (key >> 31 ? 0x80000000u : 0xffffffffu)); }

MK_DEVICE float larger_of(float a, float b) { return a > b ? a : b; }

MK_DEVICE float entry_value(u64 entry) { return from_order_key((u32)(entry >> 32)); }
MK_DEVICE i32 entry_token(u64 entry) { return (i32)~(u32)entry; }

constexpr float kMassScale = 0x1p40f;  // masses as integers

template <int group>
struct Filter {
  static constexpr int kLanes = MK_SERVICE_WAVES * arch::kWave;
  static constexpr int kAhead = 8;  // vectors that a lane requests at once
  static constexpr int kFewAhead = 2;  // where more would make the code too large
  static constexpr int kLaneGroups = kLanes * 4 <= kListSize ? 4 : kLanes * 2 <= kListSize ? 2 : 1;
  static constexpr int kGroups = kLanes * kLaneGroups;
  static_assert(kGroups <= kListSize, "too many service lanes");

  const RowOptions& options;
  const float* logits;  // adjusted
  float best;           // the largest of them, not -inf
  float log_min_p;
  int index;  // of this lane
  FilterScratch& scratch;

  MK_METHOD int place() const { return (int)arch::fresh((u32)index); }
  MK_METHOD void sync() const { arch::group_sync<group, MK_SERVICE_WAVES>(); }
  MK_METHOD u64 mass(float z) const { return (u64)(exp_(z - best) * kMassScale); }

  // ---- Looks at the vocabulary ----

  template <int ahead>
  MK_METHOD void request(int first, Vec4 (&v)[ahead]) const {
    const u32 nothing = arch::as_u32(-kInf);
    MK_UNROLL
    for (int i = 0; i < ahead; i++) {
      const int at = 4 * (first + i * kLanes);
      v[i] = {nothing, nothing, nothing, nothing};
      if (at < MK_VOCAB_SIZE) v[i] = arch::load_shared_data(logits + at);
    }
  }

  // use(token, z[4]) of four tokens at a time. Tokens beyond the vocabulary have -inf.
  template <int ahead, typename Use>
  MK_METHOD void for_logits(Use use) const {
    const int vectors = (MK_VOCAB_SIZE + 3) / 4;
    Vec4 next[ahead];
    const int begin = place();
    request(begin, next);
    for (int first = begin; first < vectors; first += ahead * kLanes) {
      Vec4 now[ahead];
      MK_UNROLL
      for (int i = 0; i < ahead; i++) now[i] = next[i];
      request(first + ahead * kLanes, next);
      MK_UNROLL
      for (int i = 0; i < ahead; i++) {
        const int token = 4 * (first + i * kLanes);
        float z[4] = {arch::as_f32(now[i].x), arch::as_f32(now[i].y), arch::as_f32(now[i].z), arch::as_f32(now[i].w)};
        if (MK_VOCAB_SIZE % 4 != 0) {
          MK_UNROLL
          for (int c = 1; c < 4; c++) z[c] = token + c < MK_VOCAB_SIZE ? z[c] : -kInf;
        }
        use(token, z);
      }
    }
  }

  // ---- All lanes together ----

  // The sum of v over the lanes before this one; `total`: over all.
  MK_METHOD u64 sum_before(u64 v, u64& total) const {
    const int lane = arch::lane(), wave = index / arch::kWave;
    u64 sum = v;
    MK_UNROLL
    for (int step = 1; step < arch::kWave; step *= 2) {
      const int from = lane >= step ? lane - step : lane;
      const u64 other = (u64)arch::shuffle((u32)(sum >> 32), from) << 32 | arch::shuffle((u32)sum, from);
      sum += lane >= step ? other : 0;
    }
    if (lane == arch::kWave - 1) scratch.sums[wave] = sum;
    sync();
    u64 before = sum - v;
    total = 0;
    for (int w = 0; w < MK_SERVICE_WAVES; w++) {
      if (w < wave) before += scratch.sums[w];
      total += scratch.sums[w];
    }
    sync();
    return before;
  }

  MK_METHOD Race winner(Race race) const {
    MK_UNROLL
    for (int mask = 1; mask < arch::kWave; mask *= 2) {
      const float score = arch::shuffle_xor(race.score, mask);
      const i32 token = (i32)arch::shuffle_xor((u32)race.token, mask);
      if (beats(score, token, race)) race = {score, token};
    }
    if (arch::lane() == 0) scratch.races[index / arch::kWave] = race;
    sync();
    for (int w = 0; w < MK_SERVICE_WAVES; w++) {
      if (beats(scratch.races[w].score, scratch.races[w].token, race)) race = scratch.races[w];
    }
    sync();
    return race;
  }

  // Sorts the list's first n entries, largest first (bitonic sort). What follows them is overwritten.
  MK_METHOD void sort(int n) const {
    int size = 2;
    while (size < n) size *= 2;
    const int own = place();
    for (int i = n + own; i < size; i += kLanes) scratch.list[i] = 0;
    sync();
    for (int width = 2; width <= size; width *= 2) {
      for (int stride = width / 2; stride > 0; stride /= 2) {
        for (int t = own; t < size / 2; t += kLanes) {
          const int i = 2 * t - (t & (stride - 1)), j = i + stride;
          const u64 a = scratch.list[i], b = scratch.list[j];
          if ((a < b) == ((i & width) == 0)) {
            scratch.list[i] = b;
            scratch.list[j] = a;
          }
        }
        // Up to this stride, a wave's pairs are neighbours that no other wave touches.
        const int next = stride > 1 ? stride / 2 : width;
        if (stride > arch::kWave || next > arch::kWave) {
          sync();
        } else {
          arch::wave_sync();
        }
      }
    }
    sync();
  }

  // ---- Lists ----

  // Of the sorted list's first n entries, those with less than share * whole before them, in order; at least one.
  // whole: a sum of masses, or 0 for the entries' own. `reached`: the entries have that much together.
  MK_METHOD int nucleus(int n, float share, double whole, bool& reached) const {
    const int chunk = (n + kLanes - 1) / kLanes;
    const int begin = place() * chunk, end = begin + chunk < n ? begin + chunk : n;
    u64 own = 0, total, count = 0;
    for (int i = begin; i < end; i++) own += mass(entry_value(scratch.list[i]));
    u64 before = sum_before(own, total);
    const double limit = (double)share * (whole > 0.0 ? whole : (double)total);
    reached = (double)total >= limit;
    for (int i = begin; i < end; i++) {
      if ((double)before < limit) count++;
      before += mass(entry_value(scratch.list[i]));
    }
    sum_before(count, total);
    return total > 0 ? (int)total : 1;
  }

  MK_METHOD double whole_mass(float sum) const { return (double)sum * (double)kMassScale; }

  // A value that the filters' border is not below. sum: of exp(z - best) over all tokens, if options.wants_mass.
  MK_METHOD float lower_bound(float sum) const {
    float bound = -kLargest;
    const bool by_count = options.top_k < MK_VOCAB_SIZE, by_mass = options.top_p < 1.0f;
    // Top-p's sum is over all that top-k keeps.
    if (options.min_p > 0.0f && !(by_count && by_mass)) {
      bound = larger_of(bound, best + log_min_p - 1e-6f * (magnitude(best) + magnitude(log_min_p)));
    }
    if (MK_VOCAB_SIZE <= kListSize || !(by_count ? options.top_k <= kGroups : by_mass)) return bound;

    float top[4] = {-kInf, -kInf, -kInf, -kInf};
    for_logits<kAhead>([&](int, const float(&z)[4]) {
      MK_UNROLL
      for (int c = 0; c < 4; c++) top[c % kLaneGroups] = larger_of(top[c % kLaneGroups], z[c]);
    });
    MK_UNROLL
    for (int c = 0; c < kLaneGroups; c++) scratch.list[c * kLanes + index] = (u64)order_key(top[c]) << 32;
    sort(kGroups);
    bool found = true;
    int rank = options.top_k;  // at least k tokens reach the k-th largest maximum
    // When the maxima from one of them up have top-p's share, what is below that one is not kept.
    if (!by_count) rank = nucleus(kGroups, options.top_p, whole_mass(sum) * 1.00001, found);
    if (found) bound = larger_of(bound, entry_value(scratch.list[rank - 1]));
    sync();
    return bound;
  }

  // Puts the tokens with z >= bound in the list, in any order. Returns their number, or more than kListSize.
  MK_METHOD int collect(float bound) const {
    if (index == 0) scratch.count = 0;
    sync();
    bool full = false;
    for_logits<kAhead>([&](int token, const float(&z)[4]) {
      if (larger_of(larger_of(z[0], z[1]), larger_of(z[2], z[3])) < bound || full) return;
      MK_UNROLL
      for (int c = 0; c < 4; c++) {
        if (z[c] < bound) continue;
        const u32 slot = arch::shared_add(&scratch.count, 1u);
        full = slot >= kListSize;
        if (!full) scratch.list[slot] = (u64)order_key(z[c]) << 32 | ~(u32)(token + c);
      }
    });
    sync();
    const int count = (int)scratch.count;
    sync();
    return count;
  }

  MK_METHOD i32 draw_from_list(int n, float sum) const {
    sort(n);
    float cut = -kInf;
    if (options.top_k < n) {
      cut = entry_value(scratch.list[options.top_k - 1]);
      u64 kept = 0, total;
      for (int i = place(); i < n; i += kLanes) kept += entry_value(scratch.list[i]) >= cut;
      sum_before(kept, total);
      n = (int)total;
    }
    if (options.top_p < 1.0f) {
      bool reached;
      const double whole = options.wants_mass ? whole_mass(sum) : 0.0;
      cut = entry_value(scratch.list[nucleus(n, options.top_p, whole, reached) - 1]);
    }
    Race race = no_race();
    for (int i = place(); i < n; i += kLanes) {
      const float z = entry_value(scratch.list[i]);
      if (z >= cut && z - best >= log_min_p) enter(race, options.step_key, entry_token(scratch.list[i]), z);
    }
    return winner(race).token;
  }

  // ---- Searches ----

  // Bins of 1/32, the last one for all that is left. Never decreases when z decreases.
  MK_METHOD int linear_bin(float z) const {
    const float scaled = (best - z) * 32.0f;
    return scaled < (float)(kBins - 1) ? (int)scaled : kBins - 1;
  }

  // The largest key in [low, high] whose linear bin is `bin` or later. There must be one.
  MK_METHOD u32 last_key(u32 low, u32 high, int bin) const {
    while (low < high) {
      const u32 middle = high - (high - low) / 2;
      if (linear_bin(from_order_key(middle)) >= bin) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }

  // The smallest z that is kept when a z is kept iff the weight of strictly larger ones is below the limit. by_mass:
  // weights are masses and the limit is `amount` of their sum; otherwise each is 1 and the limit `amount`. Tokens below
  // `lowest` do not count.
  template <bool by_mass>
  MK_METHOD float search(double amount, float lowest) const {
    if (by_mass) lowest = larger_of(lowest, best - 27.75f);  // where masses are 0
    u32 low = order_key(lowest), high = order_key(best);
    double limit = amount;
    u64 above = 0;
    for (bool linear = true; linear || low != high; linear = false) {
      int shift = 0;
      while (((high - low) >> shift) >= (u32)kBins) shift++;
      for (int i = place(); i < kBins; i += kLanes) scratch.bins[0][i] = scratch.bins[1][i] = 0;
      sync();
      for_logits<kFewAhead>([&](int, const float(&z)[4]) {
        MK_UNROLL
        for (int c = 0; c < 4; c++) {
          const u32 key = order_key(z[c]);
          if (key < low || key > high) continue;
          const u32 bin = linear ? (u32)linear_bin(z[c]) : (high - key) >> shift;
          const u64 weight = by_mass ? mass(z[c]) : 1u;
          const u32 old = arch::shared_add(&scratch.bins[0][bin], (u32)weight);
          const u32 rest = (u32)(weight >> 32) + (old + (u32)weight < old ? 1u : 0u);
          if (rest != 0) arch::shared_add(&scratch.bins[1][bin], rest);
        }
      });
      sync();

      // The first bin at which the running sum reaches the limit.
      constexpr int kChunk = (kBins + kLanes - 1) / kLanes;
      const int mine = place();
      auto bin_sum = [&](int i) { return i < kBins ? (u64)scratch.bins[1][i] << 32 | scratch.bins[0][i] : 0; };
      u64 own = 0, total;
      for (int i = 0; i < kChunk; i++) own += bin_sum(mine * kChunk + i);
      u64 running = sum_before(own, total) + above;
      if (linear && by_mass) limit = amount * (double)total;
      if (!(limit > 0.0 && (double)(above + total) >= limit)) return lowest;  // fewer than k tokens
      for (int i = 0; i < kChunk; i++) {
        const u64 before = running;
        running += bin_sum(mine * kChunk + i);
        if ((double)before < limit && (double)running >= limit) {
          scratch.bin = (u32)(mine * kChunk + i);
          scratch.above = before;
        }
      }
      sync();
      const u32 bin = scratch.bin;
      above = scratch.above;
      sync();

      if (linear) {
        const u32 end = last_key(low, high, (int)bin);
        if (linear_bin(from_order_key(low)) > (int)bin) low = last_key(low, high, (int)bin + 1) + 1;
        high = end;
      } else {
        high -= bin << shift;
        const u32 width = (1u << shift) - 1;
        low = high - low > width ? high - width : low;
      }
    }
    return from_order_key(low);
  }

  MK_METHOD i32 draw_from_all() const {
    float cut = -kLargest;
    if (options.top_k < MK_VOCAB_SIZE) cut = search<false>((double)options.top_k, cut);
    if (options.top_p < 1.0f) cut = search<true>((double)options.top_p, cut);
    Race race = no_race();
    for_logits<kFewAhead>([&](int token, const float(&z)[4]) {
      MK_UNROLL
      for (int c = 0; c < 4; c++) {
        if (z[c] >= cut && z[c] - best >= log_min_p) enter(race, options.step_key, token + c, z[c]);
      }
    });
    return winner(race).token;
  }
};

// Chooses the token of a row whose options are `filtered`. To be called by all service lanes of one unit, in step.
// After an aborted wait the candidate and the logits may be anything: then it is some token.
//   best: the merge of all units' candidates
//   logits: adjusted, of the whole vocabulary, 16-byte aligned, with room for whole vectors; visible to this unit
//   memory: shared, room for a FilterScratch
//   index: of this lane among the service lanes
//   group: of group_sync, for all service waves
template <int group = 1>
MK_DEVICE i32 sample_filtered(const RowOptions& options, const Candidate& best, const float* logits, void* memory,
                              int index) {
  if (best.best.score == -kInf) return 0;
  const float log_min_p = options.min_p > 0.0f ? log_(options.min_p) : -kInf;
  const Filter<group> filter{options, logits, best.best.score, log_min_p, index, *(FilterScratch*)memory};
  const int n = filter.collect(filter.lower_bound(best.mass));
  const i32 token = n <= kListSize ? filter.draw_from_list(n, best.mass) : filter.draw_from_all();
  return token < MK_VOCAB_SIZE ? token : 0;
}

}  // namespace mk
