// What follows from the stub's defines: dtypes, tables and derived sizes. Everything here is static.
#pragma once

#include "arch/arch.h"
#include "layout/workspace.h"

namespace mk {

// Phases that multiply, in the order of jax_monokernel.plan.PHASES.
enum Phase : int { kQkv, kO, kGateUp, kDown, kHead, kPhases };

enum DType : int { kBF16, kF16, kF32 };

struct Tiles {
  int begin, count;
};
struct LayerRow {
  int window;  // tokens; 0: all
  int rope;    // -1: no positions
};
struct RopeRow {
  int scaling;  // 0: the frequencies in the constants; 1: dynamic; 2: longrope
  float theta, factor, original_max_position, attention_factor;
  int inv_freq_row;
};

MK_CONSTANT const Tiles kTiles[kPhases * MK_UNITS] = MK_TILE_TABLE;
MK_CONSTANT const LayerRow kLayers[MK_NUM_LAYERS] = MK_LAYER_TABLE;
MK_CONSTANT const RopeRow kRopes[] = MK_ROPE_TABLE;

constexpr int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }
constexpr int larger(int a, int b) { return a > b ? a : b; }
constexpr int smaller(int a, int b) { return a < b ? a : b; }
constexpr int common_divisor(int a, int b) { return b == 0 ? a : common_divisor(b, a % b); }

// Whether the streams' pages lie where a table says, and units are dealt to the dies that they are near to (sync/place.h).
#if defined(MK_PLACED)
constexpr bool kPlaced = true;
#else
constexpr bool kPlaced = false;
#endif

constexpr int kBatch = MK_BATCH;
constexpr int kWaves = MK_WAVES;                 // stream waves
constexpr int kServiceWaves = MK_SERVICE_WAVES;  // waves kWaves and up
#if defined(MK_FEED_WAVE)
constexpr int kFeedWaves = 1;
#else
constexpr int kFeedWaves = 0;
#endif
constexpr int kThreads = (kWaves + kServiceWaves + kFeedWaves) * arch::kWave;
constexpr int kServiceLanes = kServiceWaves * arch::kWave;
constexpr int kServiceGroup = 1;  // of group_sync

constexpr int kWeightType = MK_WEIGHT_DTYPE;
constexpr int kKvType = MK_KV_DTYPE;
constexpr int kWeightBytes = kWeightType == kF32 ? 4 : 2;
constexpr int kKvBytes = kKvType == kF32 ? 4 : 2;
constexpr int kVector = 16 / kWeightBytes;  // weights that a lane loads at once

constexpr int kTileRows = MK_TILE_ROWS;
constexpr int kBlocks = arch::kWave / kTileRows;  // k blocks of an atom
constexpr int kAtomCols = MK_ATOM_COLS;
constexpr int kChunkCols = MK_CHUNK_COLS;
constexpr int kChunkAtoms = kChunkCols / kAtomCols;
static_assert(arch::kWave == MK_WAVE_SIZE, "the plan is for another wave size");
static_assert(kBlocks * kVector == kAtomCols, "an atom is one vector a lane");

constexpr int kHidden = MK_HIDDEN_SIZE;
constexpr int kInner = MK_INTERMEDIATE_SIZE;
constexpr int kHeadDim = MK_HEAD_DIM;
constexpr int kHeads = MK_NUM_HEADS;
constexpr int kKvHeads = MK_NUM_KV_HEADS;
constexpr int kQSize = kHeads * kHeadDim;
constexpr int kKvSize = kKvHeads * kHeadDim;
constexpr int kQkvSize = kQSize + 2 * kKvSize;
constexpr int kVocab = MK_VOCAB_SIZE;
constexpr int kHalfRotary = MK_ROTARY_DIM / 2;
constexpr bool kPostNorm = MK_POST_NORM != 0;
constexpr bool kPreNorm = MK_PRE_NORM != 0;
constexpr bool kGated = MK_GATED != 0;

constexpr int kSplits = MK_SPLITS;
constexpr int kTaskHeads = MK_TASK_HEADS;

// Groups of neighbouring units. Where attention is in groups, each holds whole heads; where the MLP is, each holds kInnerCols of
// the inner width. Matrices of both are then stacked: first a group's rows, then those of the next one; of o and down, all rows for
// the columns of each group.
constexpr int kGroups = MK_GROUPS, kMembers = MK_UNITS / kGroups;
constexpr int kAttentionGroups = MK_ATTENTION_GROUPS, kMlpGroups = MK_MLP_GROUPS;
constexpr int groups_of(int phase) {
  return phase == kQkv || phase == kO ? kAttentionGroups : phase == kGateUp || phase == kDown ? kMlpGroups : 1;
}
constexpr int kInnerCols = MK_INNER_COLS;
constexpr int kGroupHeads = kHeads / kAttentionGroups, kGroupKvHeads = kKvHeads / kAttentionGroups;
constexpr int kGroupQSize = kQSize / kAttentionGroups, kGroupKvSize = kKvSize / kAttentionGroups;
constexpr int kGroupQkvSize = kGroupQSize + 2 * kGroupKvSize;
static_assert(MK_UNITS % kGroups == 0 && kKvHeads % kAttentionGroups == 0 && (MK_QK_NORM != 2 || kAttentionGroups == 1),
              "the plan's groups do not fit");
// The units among which attention's tasks of one group are dealt.
constexpr int kAttentionUnits = MK_UNITS / kAttentionGroups;
constexpr int kTasks = kBatch * (kGroupHeads / kTaskHeads) * kSplits;

// Columns of a phase's matrix, real and padded to whole atoms.
constexpr int cols(int phase) { return phase == kO ? kGroupQSize : phase == kDown ? kInnerCols : kHidden; }
#if defined(MK_REGISTER_RING)
constexpr int kAlignAtoms = 1;
#else
constexpr int kAlignAtoms = kWaves * MK_GROUP_ATOMS;  // so that all waves have the same to do
#endif
constexpr int atoms(int phase) { return round_up(cols(phase), kAlignAtoms * kAtomCols) / kAtomCols; }
constexpr int padded_cols(int phase) { return atoms(phase) * kAtomCols; }
constexpr int chunk_count(int phase) { return (atoms(phase) + kChunkAtoms - 1) / kChunkAtoms; }
constexpr int kWidest = larger(larger(padded_cols(kQkv), padded_cols(kO)), padded_cols(kDown));

constexpr int most_tiles(int phase) {
  constexpr Tiles table[kPhases * MK_UNITS] = MK_TILE_TABLE;
  int most = 0;
  for (int u = 0; u < MK_UNITS; u++) most = larger(most, table[phase * MK_UNITS + u].count);
  return most;
}

// Tiles of a segment. Products of a segment take shared memory from the ring, many requests' most of it. Where each of its tiles
// is in one chunk, or one segment has all tiles, the stream is the same for shorter ones.
#if !defined(MK_PRODUCTS_BYTES)
#define MK_PRODUCTS_BYTES (larger(8, 2 * kBatch) * 1024)  // at most, where that can be
#endif
constexpr bool can_have_segments_of(int tiles) {
  for (int phase = 0; phase < kPhases; phase++) {
    if (chunk_count(phase) > 1 && most_tiles(phase) > tiles) return false;
  }
  return tiles > 0;
}
constexpr int find_segment_tiles() {
  int tiles = MK_SEGMENT_TILES;
#if !defined(MK_REGISTER_RING)
  while (2 * tiles * kBatch * kTileRows * kWaves * 4 > MK_PRODUCTS_BYTES && tiles % 2 == 0 && can_have_segments_of(tiles / 2)) tiles /= 2;
#endif
  return tiles;
}
constexpr int kSegmentTiles = find_segment_tiles();

// Atoms of chunk `chunk` of a phase that wave `wave` multiplies: begin within the row, and number.
struct Run {
  int begin, count;
};
constexpr Run run_of(int phase, int chunk, int wave) {
  const int start = chunk * kChunkAtoms;
  const int n = smaller(kChunkAtoms, atoms(phase) - start);
  const int begin = n * wave / kWaves, end = n * (wave + 1) / kWaves;
  return {start + begin, end - begin};
}

// Atoms of one row of tiles that wave `wave` multiplies.
MK_METHOD constexpr int wave_atoms(int phase, int wave) {
  int n = 0;
  for (int chunk = 0; chunk < chunk_count(phase); chunk++) n += run_of(phase, chunk, wave).count;
  return n;
}

constexpr int most_run(int phase) {
  int most = 0;
  for (int wave = 0; wave < kWaves; wave++) most = larger(most, run_of(phase, 0, wave).count);
  return most;
}

// Every run is a multiple of kGroup atoms, so that a wave looks for the end of a run only that often.
#if defined(MK_REGISTER_RING)
constexpr int find_group() {
  int group = 8;
  for (int phase = 0; phase < kPhases; phase++) {
    for (int chunk = 0; chunk < chunk_count(phase); chunk++) {
      for (int wave = 0; wave < kWaves; wave++) group = common_divisor(group, run_of(phase, chunk, wave).count);
    }
  }
  return group;
}
constexpr int kGroup = find_group();
constexpr int find_least_run() {
  int least = kChunkAtoms;
  for (int phase = 0; phase < kPhases; phase++) {
    for (int chunk = 0; chunk < chunk_count(phase); chunk++) {
      for (int wave = 0; wave < kWaves; wave++) least = smaller(least, run_of(phase, chunk, wave).count);
    }
  }
  return least;
}
constexpr int kLeastRun = find_least_run();  // 0: a row has fewer atoms than there are waves
#else
constexpr int kGroup = MK_GROUP_ATOMS;  // one slot of a wave's ring
static_assert(kGroup >= 1 && kGroup <= 4 && kChunkAtoms % kAlignAtoms == 0, "the plan has chunks that waves cannot share evenly");
#endif

// How a unit's weights are requested in the layers, where hand-offs wait behind all that is on its way, and in the head. What
// served best on one H200 (docs/performance-log.md): a layer that takes its hand-offs' time anyway leaves memory time to idle,
// one that fits in the ring or is long does not need to.
constexpr i64 kLayerBytes =
    ((i64)kQkvSize * kHidden + (i64)kHidden * kQSize + (i64)(kGated ? 3 : 2) * kHidden * kInner) * kWeightBytes / MK_UNITS;  // of a unit
constexpr bool kLongLayers = kLayerBytes >= 512 * 1024;
constexpr bool kPaced = kLayerBytes > 128 * 1024 && !kLongLayers;
#if !defined(MK_FLIGHT_BYTES)
#define MK_FLIGHT_BYTES (kPaced ? 32 * 1024 : 64 * 1024)  // on their way at most
#endif
#if !defined(MK_PACE)
#define MK_PACE (kPaced ? 64 : 0)  // clock ticks for a KiB at least
#endif
#if !defined(MK_HEAD_FLIGHT_BYTES)
#define MK_HEAD_FLIGHT_BYTES (96 * 1024)
#endif
// With several requests fewer while waves use the last MK_CALM_BEFORE_BYTES before a hand-off that all wait for: what they then look at comes sooner.
// Which phases are followed by one: bits 1 << Phase.
#if !defined(MK_CALM_PHASES)
#define MK_CALM_PHASES (kBatch == 1 || !kLongLayers ? 0 : 1 << kQkv | 1 << kO | 1 << kDown | (kBatch > 4 ? 1 << kGateUp : 0))
#endif
#if !defined(MK_CALM_BEFORE_BYTES)
#define MK_CALM_BEFORE_BYTES (64 * 1024)
#endif
#if !defined(MK_CALM_FLIGHT_BYTES)
#define MK_CALM_FLIGHT_BYTES ((kBatch > 8 ? 16 : 32) * 1024)
#endif

// Whether sums of squares are looked for only after the activations that they belong to. Where layers are long there is time for that.
#if !defined(MK_LATE_SQUARES)
#define MK_LATE_SQUARES kLongLayers
#endif
constexpr bool kLateSquares = MK_LATE_SQUARES;

// How long stream waves wait before they first look for packed activations, which are not there yet as a rule. Looks in vain hold up
// other units' words, and all that memory brings.
#if !defined(MK_FIRST_LOOK_NS)
#define MK_FIRST_LOOK_NS (kBatch > 4 ? 800 : 500)
#endif

// Registers of a stream wave's lane where it gives some of its 128 to the service waves, which attend: 0, none. With several
// requests it needs them itself.
#if !defined(MK_STREAM_REGISTERS)
#define MK_STREAM_REGISTERS 112
#endif
constexpr int kStreamRegisters = kBatch == 1 && kWaves == 8 && kServiceWaves + kFeedWaves == 8 ? MK_STREAM_REGISTERS : 0;

// Where one matrix instruction takes all requests, half its rows are free: the second instruction of an atom uses them, with
// the same registers, if the middle words of every 16 bytes of activations are swapped (math/matrix.h).
constexpr bool kSwapped = arch::kWave == 32 && kWeightType != kF32 && kBatch <= 8;

// f16 has too small a range for values that are scaled only after the multiplication.
constexpr bool kScaleAfter = kWeightType != kF16;

// Whether each stream wave gathers the activations that it multiplies with, for itself alone; elsewhere the service waves gather
// for all. A wave whose ring is registers has no time to wait for anything else. A norm that is not applied afterwards and the
// residual stream of post-norms need whole rows.
#if defined(MK_REGISTER_RING)
constexpr bool kStreamGathers = false;
#else
constexpr bool kStreamGathers = kScaleAfter && !kPostNorm;
#endif

// Whether what they gather is packed (sync/packed.h). For one request, whose words are few, the sums of squares that then have to
// come by a way of their own take longer than that saves.
constexpr bool kPacked = has_packed_hand_offs(kStreamGathers && kGroups == 1, kBatch);

// ---- Shared memory ----

// Atoms of the first `chunks` chunks of a phase that a wave multiplies, at most.
constexpr int most_atoms(int chunks) {
  int most = 0;
  for (int phase = 0; phase < kPhases; phase++) {
    for (int wave = 0; wave < kWaves; wave++) {
      int n = 0;
      for (int chunk = 0; chunk < smaller(chunks, chunk_count(phase)); chunk++) n += run_of(phase, chunk, wave).count;
      most = larger(most, n);
    }
  }
  return most;
}

// Activations: rows of all requests, for each stream wave if it gathers its own. The rest of 64 modulo 128 bytes spreads the
// lanes' rows over all banks.
constexpr int kResidentLimitBytes = 64 * 1024;
constexpr int kHolders = kStreamGathers ? kWaves : 1;
constexpr int row_bytes(int chunks) {
  const int columns = kStreamGathers ? most_atoms(chunks) * kAtomCols : smaller(chunks * kChunkCols, kWidest);
  return round_up(columns * kWeightBytes, 128) + 64;
}
// Packed rows of o and down, if they are multiplied once, come chunk by chunk, each while the one before is multiplied, if a lane's part of
// all requests' next chunk is no more than these vectors, which it holds in registers meanwhile.
#if !defined(MK_AHEAD_VECTORS)
#define MK_AHEAD_VECTORS (kSwapped && kBatch <= 4 ? 4 : 0)
#endif
constexpr bool comes_ahead(int phase) {
  return kPacked && MK_AHEAD_VECTORS > 0 && (phase == kO || phase == kDown) && most_tiles(phase) <= kSegmentTiles;
}
constexpr int find_resident() {  // chunks that are in shared memory at once
  int chunks = 1;
  for (int phase = 0; phase < kPhases; phase++) chunks = larger(chunks, comes_ahead(phase) ? 1 : chunk_count(phase));
  const int limit = smaller(kResidentLimitBytes, MK_SHARED_BYTES / 3);
  while (chunks > 1 && kHolders * kBatch * row_bytes(chunks) > limit) chunks--;
  return chunks;
}
constexpr int kResident = find_resident();
constexpr int kRowBytes = row_bytes(kResident);
constexpr int fill_count(int phase) { return (chunk_count(phase) + kResident - 1) / kResident; }

constexpr bool all_have_rows() {
  constexpr Tiles table[kPhases * MK_UNITS] = MK_TILE_TABLE;
  for (int u = 0; u < MK_UNITS; u++) {
    if (table[kO * MK_UNITS + u].count == 0) return false;
  }
  return true;
}
constexpr bool kAllHaveRows = all_have_rows();  // of the residual stream
// The residual stream's rows that a unit adds to: those of its tiles of o and down; or, where there are groups, each of which has a
// copy of the residual stream, its share of all rows.
constexpr int kHiddenVectors = (kHidden + 3) / 4;
constexpr int kOwnRows = kGroups == 1 ? most_tiles(kO) * kTileRows : (kHiddenVectors + kMembers - 1) / kMembers * 4;  // at most

constexpr int kTaskVectors = kTaskHeads + 2;  // q heads, then k and v
constexpr int kRopeRows = MK_NUM_ROPES > 0 ? MK_NUM_ROPES : 1;
constexpr int kAngles = kBatch * kRopeRows * 2 * kHalfRotary;

// Parts of a request's sum of squares in shared memory. Stream waves leave a single request's to the service waves lane by lane, as
// adding them up takes a wave long.
constexpr bool kLaneSquares = kStreamGathers && kBatch == 1;
constexpr int kSquareParts = !kStreamGathers ? kServiceWaves : kLaneSquares ? kWaves * arch::kWave : kWaves;
// Sums of squares that a unit publishes of each request.
constexpr int kSquareWords = (int)square_words(kBatch, kTileRows, arch::kWave, kServiceWaves, most_tiles(kO));

// Offsets in bytes. Lives for the whole launch unless said otherwise.
struct SharedLayout {
  int activations;  // weights' dtype [kHolders][batch], rows of kRowBytes
  int cache;        // keys and values in p2_attend: [service waves][kCacheSlots][2][kCacheCopyBytes]
  int attention;    // scratch of p2_attend. Both are in place of activations, of which there are none between the products of qkv and
                    // the gate of o
  int products;     // f32 [2][kSegmentTiles][batch][kTileRows][kWaves]
  int squares;      // f32 [2][batch][kSquareParts]: partial sums of squares
  int residual;     // f32 [batch][own rows], or with post-norms [batch][kHidden], if kResidualInShared
  int angles;       // f32 [batch][ropes][2][kHalfRotary]: cosines, then sines; if kAnglesInShared
  int sampling;     // scratch of p6 and p7
  int control;      // struct Control
  int stop;         // u32: the feed wave is to stop
  int meeting;      // u64: where service waves meet, for racecheck
  int place;        // int [2]: the unit's number; not 0: it has one (sync/place.h)
  int barriers;     // the ring's
  int cache_barriers;  // u64 [service waves][kCacheSlots]
  int ring;
  int ring_slots;  // of each stream wave
};

// Whether matrix instructions attend (phases/attend_matrix.h). For a single query head they are slower.
constexpr bool kMatrixAttention =
    arch::kWave == 32 && kKvType != kF32 && (kHeadDim == 64 || kHeadDim == 128) && kTaskHeads >= 2 && kTaskHeads <= 8;
constexpr int kEights = kHeadDim <= 64 ? 2 : 1;  // of positions in a step of such a wave, as the registers allow
constexpr int kStepPositions = 8 * kEights;

// Elsewhere a position's elements are spread over lanes (phases/attention.h).
constexpr int power_of_two(int n) { return n <= 1 ? 1 : 2 * power_of_two((n + 1) / 2); }
constexpr int kKvVector = 16 / kKvBytes;  // elements that a lane loads at once
constexpr int kPositionVectors = (kHeadDim + kKvVector - 1) / kKvVector;
constexpr int kPositionLanes = smaller(arch::kWave, power_of_two(kPositionVectors));
constexpr int kLaneVectors = (kPositionVectors + kPositionLanes - 1) / kPositionLanes;
constexpr int kWavePositions = arch::kWave / kPositionLanes;  // that a wave looks at together
constexpr int kUnroll = kLaneVectors > 1 ? 2 : 4;
constexpr int kCacheRowBytes = kHeadDim * kKvBytes;  // a position's key, or its value
constexpr bool kKvAligned = kCacheRowBytes % 16 == 0;

// Neighbouring positions that a wave takes at a time.
constexpr int kStepPlaces = kMatrixAttention ? kStepPositions : kWavePositions * kUnroll;

// Whether waves that attend have keys and values copied to shared memory, kCacheSlots steps ahead, instead of loading those of one
// step to registers. What served best on one H200 (docs/performance-log.md): copies make the ring smaller, which a single request's
// long layers feel, and with more than two requests short parts are in registers anyway by the time their queries are there.
#if defined(MK_LONG_PARTS)
constexpr bool kLongParts = true;
#else
constexpr bool kLongParts = false;
#endif
#if !defined(MK_COPY_CACHE)
#define MK_COPY_CACHE (kLongParts || (kBatch == 1 && kSplits == 1 && !kLongLayers) || (kBatch == 2 && kLongLayers))
#endif
constexpr bool kCopiesCache = arch::kWave == 32 && kKvAligned && kStepPlaces <= 64 && MK_COPY_CACHE;  // 64: kSplitBlock
#if !defined(MK_CACHE_SLOTS)
#define MK_CACHE_SLOTS (kLongParts ? 2 : 1)
#endif
constexpr int kCacheSlots = MK_CACHE_SLOTS;
constexpr int kCacheCopyBytes = kStepPlaces * kCacheRowBytes;  // a step's keys, or its values
constexpr int kCacheBytes = kCopiesCache ? kServiceWaves * kCacheSlots * 2 * kCacheCopyBytes : 0;

constexpr int kPackedWords = kKvType == kF32 ? 0 : round_up(kTaskVectors * kHeadDim / 2, 4);  // of vectors as they are stored

constexpr int kAttentionFloats =
    kPackedWords + 4 + kTaskVectors * kHeadDim + kServiceWaves * kTaskHeads * (kHeadDim + 2) + 2 * kServiceWaves + 8;
constexpr int kSamplingBytes = 16 * 1024;
constexpr int kSlotsBytes = kWaves * kGroup * arch::kWave * 16;  // a slot of each stream wave
#if defined(MK_REGISTER_RING)
constexpr int kMostSlots = 0;
#else
constexpr int kMostSlots = smaller(256, MK_SHARED_BYTES / kSlotsBytes);
#endif

// residual, angles: whether those are in shared memory, too.
constexpr SharedLayout make_shared_layout(bool residual, bool angles) {
  SharedLayout s{};
  int at = 0;
  s.activations = s.cache = at;
  s.attention = at + round_up(kCacheBytes, 128);
  at = round_up(larger(larger(kHolders * kBatch * kRowBytes, kSamplingBytes), s.attention + kAttentionFloats * 4), 128);
  s.products = at;
  at += round_up(2 * kSegmentTiles * kBatch * kTileRows * kWaves * 4, 128);
  s.squares = at;
  at += round_up(2 * kBatch * kSquareParts * 4, 128);
  s.residual = at;
  at += residual ? round_up(kBatch * (kPostNorm ? kHidden : kOwnRows) * 4, 128) : 0;
  s.sampling = s.activations;  // between the products of the head and the next token
  s.angles = at;
  at += angles ? round_up(kAngles * 4, 128) : 0;
  s.control = at;
  at += round_up(64 + kBatch * 64, 128);  // checked in control.h
  s.stop = at;
  s.meeting = at + 32;
  s.place = at + 64;
  at += 128;
  s.barriers = at;
  at += round_up(kMostSlots * 16, 128);
  s.cache_barriers = at;
  at += kCopiesCache ? round_up(kServiceWaves * kCacheSlots * 8, 128) : 0;
  s.ring = at;
  s.ring_slots = smaller((MK_SHARED_BYTES - at) / kSlotsBytes, kMostSlots);
  return s;
}
constexpr bool fits(const SharedLayout& s) {
#if !defined(MK_REGISTER_RING)
  return s.ring_slots >= 2;
#else
  return s.ring + arch::kReservedShared <= MK_SHARED_BYTES;
#endif
}
// Where many requests leave no room, a unit's own copy of the residual stream and its angles are in the workspace; so is a large copy.
constexpr bool kResidualInShared = !kPostNorm || (kBatch * kHidden * 4 <= 32 * 1024 && fits(make_shared_layout(true, false)));
constexpr bool kAnglesInShared = fits(make_shared_layout(kResidualInShared, true));
constexpr SharedLayout kShared = make_shared_layout(kResidualInShared, kAnglesInShared);
static_assert(fits(kShared), "too little shared memory for this batch: the plan's chunk_atoms or segment_tiles must be smaller");

template <typename T>
MK_DEVICE T* shared_at(int offset) {
  return (T*)(arch::shared() + offset);
}

#if defined(MK_FEED_WAVE)
namespace arch {
MK_DEVICE u64* meeting() { return shared_at<u64>(kShared.meeting); }
}  // namespace arch
#endif

// The unit that this work-group is: its number, or what it has found at the start (sync/place.h).
MK_DEVICE int unit() {
#if MK_NEAR || defined(MK_PLACED)
  return arch::shared_number(shared_at<int>(kShared.place));
#else
  return arch::unit();
#endif
}

}  // namespace mk
