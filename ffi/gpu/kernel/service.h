// The service waves: what a decode step does besides multiplying by weights. State that outlives a phase, and the parts that
// phases share.
#pragma once

#include "control.h"
#include "math/elementary.h"
#include "math/matrix.h"
#include "pages.h"
#include "sync/packed.h"
#include "sync/place.h"

namespace mk {

// Requests are dealt to teams of service waves.
constexpr int kTeamWaves = larger(1, kServiceWaves / kBatch);
constexpr int kTeams = kServiceWaves / kTeamWaves;
constexpr int kTeamLanes = kTeamWaves * arch::kWave;
static_assert(kServiceLanes >= kBatch * kTileRows, "a service lane must have one request only: more service waves are needed");

MK_DEVICE float wave_sum(float v) {
  MK_UNROLL
  for (int step = 1; step < arch::kWave; step *= 2) v += arch::shuffle_xor(v, step);
  return v;
}

// Events of the timeline: a phase's events are kPhaseEvents * phase and what follows.
constexpr int kPhaseEvents = 4;
enum Event : int {
  kGathered,    // the wave's part of the activations is in place
  kFilled,      // service waves that gather: the gate is open; before a norm's products are scaled, all parts are in place
  kMultiplied,  // the segment's products are
  kPublished,
  kPrepared = kPhaseEvents * kPhases,  // p2_attend: heads and cache
  kAttended,
  kCombined,
  kTokenStart,
  kCandidates,
  kChosen,
  kKnown,
};
constexpr int kTraceEvents = 2048;  // of a track
constexpr int kTracks = 2;          // of a unit: the first service wave, the first stream wave
constexpr int kTraceFrom = 16;      // token of the launch

struct Service {
  const Args& args;
  Waiter waiter;
  int unit, wave, lane, index;  // index: of the lane among the service lanes; wave: among the service waves
  int team, team_wave, team_lane;
  int token;  // of this launch
  int squares_set;  // which half of the partial sums of squares is in use; changes with every phase that multiplies
  int layer;
  const float* constants;  // of the layer
  int events;              // of the timeline so far
  int cache_slot;          // CacheCopies: the next slot
  u32 cache_parity;        // and that of its barrier

  // The same, with everything that follows from this lane's place computed anew (arch::kRenew).
  MK_METHOD Service renewed() const {
    if constexpr (!arch::kRenew) return *this;
    Service s(arch::arguments(args));
    s.keep(*this);
    return s;
  }
  // Takes over what another one has changed.
  MK_METHOD void keep(const Service& s) {
    token = s.token;
    squares_set = s.squares_set;
    if constexpr (arch::kRenew) {
      enter_layer(s.layer);
    } else {
      constants = s.constants;
    }
    events = s.events;
    cache_slot = s.cache_slot;
    cache_parity = s.cache_parity;
    waiter.aborted = s.waiter.aborted;
  }

  MK_METHOD explicit Service(const Args& a) : args(a) {
    unit = mk::unit();
    wave = arch::wave() - kWaves;
    lane = arch::lane();
    index = wave * arch::kWave + lane;
    team = wave / kTeamWaves;
    team_wave = wave % kTeamWaves;
    team_lane = team_wave * arch::kWave + lane;
    token = 0;
    squares_set = 0;
    layer = 0;
    constants = nullptr;
    events = 0;
    cache_slot = 0;
    cache_parity = 0;
    waiter = {&a, false};
  }

  template <typename T>
  MK_METHOD T* at(i64 offset) const {
    return (T*)((char*)args.workspace + offset);
  }
  // Whether the unit multiplies the residual stream by anything.
  MK_METHOD bool reads_residual() const {
    return kTiles[kQkv * MK_UNITS + unit].count + kTiles[kGateUp * MK_UNITS + unit].count + kTiles[kHead * MK_UNITS + unit].count > 0;
  }
  MK_METHOD Control& control() const { return *shared_at<Control>(kShared.control); }
  MK_METHOD void sync() const { arch::group_sync<kServiceGroup, kServiceWaves>(); }

  // Timeline: what the first lane of a track's wave has just finished.
  MK_METHOD void mark(int event) {
#if MK_TRACE
    const int track = wave == 0 ? 0 : 1;
    if ((wave == 0 || wave == -kWaves) && lane == 0 && token >= kTraceFrom && events < kTraceEvents) {
      u64* to = (u64*)args.trace + (((i64)unit * kTracks + track) * kTraceEvents + events++) * 2;
      to[0] = arch::ticks() << 8 | (u64)event;
      to[1] = arch::wall_clock();
    }
#endif
  }

  MK_METHOD void next_cache_slot() {
    if (++cache_slot < kCacheSlots) return;
    cache_slot = 0;
    cache_parity ^= 1;
  }

  MK_METHOD void enter_layer(int now) {
    layer = now;
    constants = arch::arguments(args).constants + MK_LAYER_CONSTANTS_OFFSET + (i64)layer * MK_LAYER_CONSTANTS;
  }
  // The unit's group, of `groups`: 1 or kGroups.
  template <int groups>
  MK_METHOD int group() const {
    static_assert(groups == 1 || groups == kGroups);
    return groups == 1 ? 0 : (int)(arch::fresh((u32)unit) / kMembers);
  }
  // The unit's place in that group.
  template <int groups>
  MK_METHOD int member() const {
    return groups == 1 ? unit : unit % kMembers;
  }
  // Where its group's words of a hand-off begin: of `size` for each request.
  template <int groups>
  MK_METHOD i64 part(i64 offset, int size) const {
    return groups == 1 ? offset : offset + (i64)group<groups>() * kBatch * line(size) * 4;
  }
  // Uses of a layer's hand-offs are counted over all tokens.
  MK_METHOD Site site(HandOff handoff, i64 offset, int layer) const {
    return {at<u32>(offset), handoff, (u32)layer, (u32)token, (u32)(token * MK_NUM_LAYERS + layer + 1) & 1u};
  }
  // The residual stream after a layer. What the last layer leaves has other readers, so it goes elsewhere: every reader of
  // a hand-off must read every use of it.
  MK_METHOD Site residual_site(int layer) const {
    if (layer == MK_NUM_LAYERS - 1) return token_site(h9_final, part<kGroups>(kWorkspace.final_, kHidden));
    Site s = site(h6_residual, part<kGroups>(kWorkspace.residual, kHidden), layer);
    s.parity = (u32)(token * (MK_NUM_LAYERS - 1) + layer + 1) & 1u;
    return s;
  }
  MK_METHOD Site token_site(HandOff handoff, i64 offset) const {
    return {at<u32>(offset), handoff, 0, (u32)token, (u32)(token + 1) & 1u};
  }
  // The packed hand-offs: those of a layer, and the residual stream after it.
  MK_METHOD Packed packed(HandOff handoff, i64 offset, int size, int layer) const {
    return packed_use(at<char>(offset), handoff, size, layer, token, (u32)(token * MK_NUM_LAYERS + layer));
  }
  MK_METHOD Packed packed_residual(int layer) const {
    const bool last = layer == MK_NUM_LAYERS - 1;
    return packed_use(at<char>(last ? kWorkspace.final_ : kWorkspace.residual), last ? h9_final : h6_residual, kHidden, layer, token,
                      (u32)(last ? token : token * (MK_NUM_LAYERS - 1) + layer));
  }
  // Sums of squares of the residual stream after a layer.
  MK_METHOD Site residual_squares_site(int layer) const {
    if (layer == MK_NUM_LAYERS - 1) return token_site(h15_final_squares, kWorkspace.final_squares);
    Site s = residual_site(layer);
    s.words = at<u32>(kWorkspace.residual_squares);
    s.handoff = h14_residual_squares;
    return s;
  }

  // The f32 residual stream: of the unit's own rows, or all of it where there are post-norms.
  MK_METHOD float* residual(int request) const {
    if constexpr (!kPostNorm) return shared_at<float>(kShared.residual) + request * kOwnRows;
    if constexpr (kResidualInShared) return shared_at<float>(kShared.residual) + request * kHidden;
    return at<float>(kWorkspace.own_residual) + (i64)unit * round_up(kBatch * kHidden, 32) + request * kHidden;
  }

  MK_METHOD float* squares(int request) const {
    return shared_at<float>(kShared.squares) + (squares_set * kBatch + request) * kSquareParts;
  }
  // 1 / RMS of a request's last gathered vector of `size` elements.
  MK_METHOD float norm_scale(int request, int size) const { return scale_of(square_sum(squares(request)), size); }
  static MK_METHOD float scale_of(float sum, int size) { return arch::fast_rsqrt(sum * (1.0f / (float)size) + MK_NORM_EPS); }

  MK_METHOD float square_sum(const float* parts) const {
    float sum = 0.0f;
    if constexpr (kLaneSquares) {
      MK_UNROLL
      for (int i = 0; i < kSquareParts; i += arch::kWave) sum += parts[i + lane];
      return wave_sum(sum);
    }
    MK_UNROLL
    for (int i = 0; i < (kStreamGathers ? kWaves : kTeamWaves); i++) sum += parts[i];
    return sum;
  }
};

// Calls use(s) with a renewed service.
template <typename Use>
MK_DEVICE void renew(Service& service, Use use) {
  if constexpr (!arch::kRenew) {
    use(service);
  } else {
    Service s = service.renewed();
    use(s);
    service.keep(s);
  }
}

MK_DEVICE float soft_cap(float x, float cap) { return cap * tanh_(x / cap); }

struct Float4 {
  float v[4];
};

MK_DEVICE Float4 decode4(const Vec4& w) { return {{decode(w.x), decode(w.y), decode(w.z), decode(w.w)}}; }

constexpr bool aligned_in_layer(int offset) {
  return offset % 4 == 0 && MK_LAYER_CONSTANTS_OFFSET % 4 == 0 && MK_LAYER_CONSTANTS % 4 == 0;
}

// Writes four activations, rounded to the weights' dtype.
MK_DEVICE void store_activations(char* row, int column, const Float4& x) {
  char* to = row + column * kWeightBytes;
  if constexpr (kWeightType == kF32) {
    *(Vec4*)to = {arch::as_u32(x.v[0]), arch::as_u32(x.v[1]), arch::as_u32(x.v[2]), arch::as_u32(x.v[3])};
  } else {
    struct alignas(8) Pair {
      u32 low, high;
    };
    if constexpr (kSwapped) {
      u32* words = (u32*)(row + column / 8 * 16) + column / 4 % 2;
      words[0] = pack_pair<kWeightType>(x.v[0], x.v[1]);
      words[2] = pack_pair<kWeightType>(x.v[2], x.v[3]);
      return;
    }
    *(Pair*)to = {pack_pair<kWeightType>(x.v[0], x.v[1]), pack_pair<kWeightType>(x.v[2], x.v[3])};
  }
}

// ---- Embedding ----

// Row `token` of a tied embedding, inside the head's tiles.
struct HeadRow {
#if defined(MK_PLACED)
  const Args* args;
#else
  const char* unit_stream;
#endif
  int tile, row, tiles_of_segment, unit;
};

MK_DEVICE HeadRow find_head_row(const Args& args, int token) {
  const int tile = token / kTileRows;
  // The last unit that begins at or before the tile. Tiles are dealt almost evenly, so it is near.
  int unit = (int)((u32)tile * MK_UNITS / (u32)(round_up(kVocab, kTileRows) / kTileRows));
  while (unit > 0 && kTiles[kHead * MK_UNITS + unit].begin > tile) unit--;
  while (unit + 1 < MK_UNITS && kTiles[kHead * MK_UNITS + unit + 1].begin <= tile) unit++;
  HeadRow r;
  const Tiles t = kTiles[kHead * MK_UNITS + unit];
  r.unit = unit;
  r.tile = tile - t.begin;
  r.row = token % kTileRows;
  r.tiles_of_segment = smaller(kSegmentTiles, t.count - r.tile / kSegmentTiles * kSegmentTiles);
#if defined(MK_PLACED)
  r.args = &args;
#else
  r.unit_stream = (const char*)args.streams + elems_before(unit) * kWeightBytes;
#endif
  return r;
}

// Four neighbouring elements of that row as raw bits, 16 or 32 bits each.
MK_DEVICE Vec4 load_head_row(const HeadRow& r, int column) {
  const int atom = column / kAtomCols, chunk = atom / kChunkAtoms, in_chunk = atom % kChunkAtoms;
  const int n = smaller(kChunkAtoms, atoms(kHead) - chunk * kChunkAtoms);
  const int wave = ((in_chunk + 1) * kWaves - 1) / n;
  const Run run = run_of(kHead, chunk, wave);
  int before = 0;  // atoms of the wave that stand before
  MK_UNROLL
  for (int p = 0; p < kHead; p++) {
    before += (kAlignAtoms > 1 ? atoms(p) / kWaves : wave_atoms(p, wave)) * kTiles[p * MK_UNITS + r.unit].count;
  }
  before *= MK_NUM_LAYERS;
  before += r.tile / kSegmentTiles * kSegmentTiles * wave_atoms(kHead, wave);
  for (int c = 0; c < chunk; c++) before += r.tiles_of_segment * run_of(kHead, c, wave).count;
  before += r.tile % kSegmentTiles * run.count + atom - run.begin;
  const int block = column % kAtomCols / kVector, element = column % kVector;
  const int place = (MK_ROW_MAJOR_ATOM ? r.row * kBlocks + block : block * kTileRows + r.row) * kVector + element;
  const i64 in_unit = elems_before_wave(r.unit, wave) + (i64)before * arch::kWave * kVector + place;
#if defined(MK_PLACED)
  const char* p = placed(*r.args, (u64)(elems_before(r.unit) + in_unit) * kWeightBytes);
#else
  const char* p = r.unit_stream + in_unit * kWeightBytes;
#endif
  if constexpr (kWeightType == kF32) return *(const Vec4*)p;
  const u32* pair = (const u32*)p;
  return {pair[0], pair[1], 0, 0};
}

MK_DEVICE Float4 embedding4(const Service& s, int token, const HeadRow& head_row, int column) {
  Float4 f;
  if constexpr (MK_TIED_HEAD) {
    const Vec4 v = load_head_row(head_row, column);
    if constexpr (kWeightType == kF32) {
      f = {{arch::as_f32(v.x), arch::as_f32(v.y), arch::as_f32(v.z), arch::as_f32(v.w)}};
    } else {
      f = {{low_of<kWeightType>(v.x), high_of<kWeightType>(v.x), low_of<kWeightType>(v.y), high_of<kWeightType>(v.y)}};
    }
  } else {
    MK_UNROLL
    for (int i = 0; i < 4; i++) {
      const i64 place = (i64)token * kHidden + column + i;
      f.v[i] = 0.0f;
      if (column + i < kHidden) {
        if constexpr (kWeightType == kF32) {
          f.v[i] = ((const float*)s.args.embedding)[place];
        } else {
          const u32 bits = ((const u16*)s.args.embedding)[place];
          f.v[i] = low_of<kWeightType>(bits);
        }
      }
    }
  }
  MK_UNROLL
  for (int i = 0; i < 4; i++) f.v[i] *= MK_EMBEDDING_MULTIPLIER;
  return f;
}

// ---- Activations ----

// A norm's weights: (offset + weight) * scale is what values are multiplied with.
struct Norm {
  const float* weights;
  float scale;
};

template <int size, bool aligned>
MK_DEVICE Float4 norm_weights(const Norm& norm, int column) {
  Float4 f;
  if constexpr (aligned && size % 4 == 0) {
    if (column < size) {
      const Vec4 v = arch::load_once(norm.weights + column);
      f = {{arch::as_f32(v.x), arch::as_f32(v.y), arch::as_f32(v.z), arch::as_f32(v.w)}};
    }
  } else {
    MK_UNROLL
    for (int i = 0; i < 4; i++) f.v[i] = column + i < size ? norm.weights[column + i] : 0.0f;
  }
  MK_UNROLL
  for (int i = 0; i < 4; i++) f.v[i] = (f.v[i] + MK_NORM_OFFSET) * norm.scale;
  return f;
}

struct NoWeights {
  MK_METHOD Float4 operator()(int) const { return {}; }
};

// Calls use(column, value, weight) for the columns [begin, end) of a request that fall to this lane; columns from `size` on are 0.
// whole: begin and end are those of the row.
template <int size, bool whole, bool near, typename Weights, typename Use>
MK_DEVICE void gather_words(Service& s, const Site& site, const u32* row, int begin, int end, Weights weights_of, Use use) {
  constexpr int step = kTeamLanes * 4, padded = round_up(size, kAlignAtoms * kAtomCols);
  constexpr int most = (padded + step - 1) / step, count = most < 4 ? most : 4;
  constexpr bool bare = whole && size == padded && size % step == 0 && most % count == 0;  // nothing to check
  const int own = (int)arch::fresh((u32)s.team_lane) * 4;
  for (int column = begin + own; column - own < end; column += count * step) {
    Vec4 v[count];
    Float4 weights[count];
    MK_UNROLL
    for (int i = 0; i < count; i++) {  // on their way while the words are not ready
      if (bare || column + i * step < end) weights[i] = weights_of(column + i * step);
    }
    wait_words<count, near>(s.waiter, site, row + column, step, v,
                      [&](int i) {
                        const int left = smaller(end, size) - (column + i * step);
                        return bare ? 4 : size % 4 != 0 ? left : left > 0 ? 4 : 0;
                      });
    MK_UNROLL
    for (int i = 0; i < count; i++) {
      if (bare || column + i * step < end) use(column + i * step, decode4(v[i]), weights[i]);
    }
    if (most <= count) break;
  }
}

template <typename Use>
MK_DEVICE void for_team_requests(const Service& s, Use use) {
  for (int request = s.team; request < kBatch; request += kTeams) {
    if (s.team < kTeams) use(request);
  }
}

// The sum of squares of a request, from its lanes' parts.
MK_DEVICE void set_squares(const Service& s, int request, float sum, bool add) {
  sum = wave_sum(sum);
  if (s.lane == 0) {
    float* to = s.squares(request) + s.team_wave;
    *to = add ? *to + sum : sum;
  }
}

// The outputs of a segment that fall to this lane; a lane always has the same request. rows: outputs of a tile. What follows
// from an output's place, prepare(request, out), is done before wait(), which waits for the products, and what remains in
// finish(prepared, out, sum), where sum(r) is the product of the row of the tile that is r after the output's.
template <int rows, typename Wait, typename Prepare, typename Finish>
MK_DEVICE void for_products(Service& s, const Tiles& deal, int segment, Wait wait, Prepare prepare, Finish finish) {
  constexpr int per_tile = kBatch * rows;
  constexpr int active = kServiceLanes / per_tile * per_tile;
  const float* products = shared_at<float>(kShared.products) + (segment & 1) * kSegmentTiles * kBatch * kTileRows * kWaves;
  const int all = smaller(kSegmentTiles, deal.count - segment * kSegmentTiles) * per_tile;
  const int first_tile = deal.begin + segment * kSegmentTiles;
  const int request = s.index % per_tile / rows, row = s.index % rows;
  auto out_of = [&](int i) { return (first_tile + i / per_tile) * rows + row; };
  auto prepared = prepare(request, out_of(s.index));
  wait(s);
  if (s.index >= active) return;
  for (int i = s.index; i < all;) {
    const float* from = products + ((i / per_tile * kBatch + request) * kTileRows + row) * kWaves;
    finish(prepared, out_of(i), [&](int r) {
      const float* p = from + r * kWaves;
      if constexpr (kWaves % 4 == 0) {
        float v = 0.0f;
        MK_UNROLL
        for (int w = 0; w < kWaves; w += 4) {
          const Vec4 x = *(const Vec4*)(p + w);
          v += (arch::as_f32(x.x) + arch::as_f32(x.y)) + (arch::as_f32(x.z) + arch::as_f32(x.w));
        }
        return v;
      }
      float v = p[0];
      MK_UNROLL
      for (int w = 1; w < kWaves; w++) v += p[w];
      return v;
    });
    i += active;
    if (i < all) prepared = prepare(request, out_of(i));
  }
}

}  // namespace mk
