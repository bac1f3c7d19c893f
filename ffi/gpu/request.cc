#include "gpu/request.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <iterator>
#include <limits>

#include "gpu/failure.h"
#include "gpu/kernel/args.h"
#include "read_fields.h"

namespace monokernel::gpu {
namespace {

void require(bool condition, const std::string& message) {
  if (!condition) throw Failure(Code::kInvalid, message);
}

void check_model(const Program& p) {
  for (int64_t size : {p.vocab_size, p.hidden_size, p.intermediate_size, p.num_heads, p.num_kv_heads, p.head_dim,
                       p.num_layers, p.units}) {
    require(size >= 1 && size <= std::numeric_limits<int32_t>::max(), "a model dimension is out of range");
  }
  require(p.num_layers <= 4096 && p.units <= 4096, "the program has too many layers or units");
  // The kernel counts a matrix's rows, columns and words of a hand-off in 32 bits.
  const int64_t most = std::numeric_limits<int32_t>::max() / kMaxBatch / 4;
  require(p.num_heads <= most / p.head_dim && p.num_kv_heads <= most / p.head_dim && p.hidden_size <= most &&
              p.intermediate_size <= most && p.vocab_size <= most,
          "a model dimension is out of range");
  require(p.num_heads % p.num_kv_heads == 0, "num_heads is not a multiple of num_kv_heads");
  require(p.rotary_dim >= 0 && p.rotary_dim % 2 == 0 && p.rotary_dim <= p.head_dim, "rotary_dim is out of range");
  require(p.num_ropes >= 0 && p.num_ropes <= 4096, "num_ropes is out of range");
  require(p.weight_dtype >= kBF16 && p.weight_dtype <= kF32 && p.kv_dtype >= kBF16 && p.kv_dtype <= kF32, "unknown dtype");
  for (int64_t flag : {p.pre_norm, p.post_norm, p.gated, p.tied_head, p.row_major_atom}) {
    require(flag == 0 || flag == 1, "a flag is neither 0 nor 1");
  }
  require(p.qk_norm >= 0 && p.qk_norm <= 2 && p.activation >= 0 && p.activation <= 3, "unknown norm or activation");
}

// Atoms of all streams, one after the other: the tape's size. The tile table must have been checked.
int64_t stream_atoms(const Program& p) {
  const int64_t columns[kPhases] = {p.hidden_size, p.q_size() / p.attention_groups, p.hidden_size, p.inner_cols, p.hidden_size};
  const auto round_up = [](int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; };
  const auto times = [&](int phase) { return phase == kHead ? 1 : p.num_layers; };
  if (p.wave_size == 32) {
    // The matrices with whole slots of all waves in a row, and a slot for units without tiles.
    int64_t sum = p.group_atoms;
    for (int phase = 0; phase < kPhases; phase++) {
      const TileRow& last = p.tile(static_cast<Phase>(phase), p.units - 1);
      const int64_t row = round_up(columns[phase], p.group_atoms * p.atom_cols * p.waves) / p.atom_cols;
      sum += (last.begin + last.count) * row * times(phase);
    }
    return sum;
  }
  constexpr int64_t kSlotAtoms = 8;  // of a ring in registers; each stream is whole slots, and one at least
  int64_t sum = 0;
  for (int64_t wave = 0; wave < p.waves; wave++) {
    int64_t of_tile[kPhases];  // this wave's, in all layers
    for (int phase = 0; phase < kPhases; phase++) {
      const int64_t chunk = p.chunk_cols / p.atom_cols, row = round_up(columns[phase], p.atom_cols) / p.atom_cols;
      const auto run = [&](int64_t atoms) { return atoms * (wave + 1) / p.waves - atoms * wave / p.waves; };
      of_tile[phase] = (row / chunk * run(chunk) + run(row % chunk)) * times(phase);
    }
    for (int64_t unit = 0; unit < p.units; unit++) {
      int64_t atoms = 0;
      for (int phase = 0; phase < kPhases; phase++) atoms += of_tile[phase] * p.tile(static_cast<Phase>(phase), unit).count;
      sum += std::max(round_up(atoms, kSlotAtoms), kSlotAtoms);
    }
  }
  return sum;
}

void check_plan(const Program& p) {
  const int64_t bytes = p.weight_dtype == kF32 ? 4 : 2;
  require(p.wave_size == 32 || p.wave_size == 64, "wave_size is " + std::to_string(p.wave_size) + "; expected 32 or 64");
  require(p.waves >= 1 && p.service_waves >= 1 && p.waves + p.service_waves < 1024 / p.wave_size + (p.wave_size == 64),
          "a unit has too few or too many waves");
  require(p.tile_rows == (p.wave_size == 32 ? 8 : 4) && p.row_major_atom == (p.wave_size == 32) &&
              p.atom_cols * p.tile_rows * bytes == p.wave_size * 16,
          "the atoms are not those of the wave size");
  require(p.chunk_cols >= p.atom_cols && p.chunk_cols % p.atom_cols == 0 && p.chunk_cols <= (1 << 24) &&
              p.segment_tiles >= 1 && p.segment_tiles <= (1 << 16),
          "the chunks or segments are out of range");
  require(p.wave_size == 32 ? p.group_atoms >= 1 && p.group_atoms <= 8 : p.group_atoms == 0, "the slots are out of range");
  require(p.groups >= 1 && p.groups <= kMaxGroups && p.units % p.groups == 0, "the groups are out of range");
  require(p.hidden_size <= std::numeric_limits<int32_t>::max() / kMaxBatch / 4 / p.groups, "the groups are out of range");
  for (int64_t groups : {p.attention_groups, p.mlp_groups}) require(groups == 1 || groups == p.groups, "the groups are out of range");
  require(p.attention_groups == 1 || (p.num_kv_heads % p.attention_groups == 0 && p.qk_norm != 2), "the groups do not hold whole heads");
  require(p.mlp_groups == 1 ? p.inner_cols == p.intermediate_size
                            : p.inner_cols % 4 == 0 && p.inner_cols >= 4 && p.inner_cols <= (1 << 24) &&
                                  p.inner_cols >= (p.intermediate_size + p.mlp_groups - 1) / p.mlp_groups,
          "the inner width is not that of the groups");
  const struct {
    int64_t rows, groups;  // rows of one group
  } matrices[kPhases] = {{(p.q_size() + 2 * p.kv_size()) / p.attention_groups, p.attention_groups},
                         {p.hidden_size, p.attention_groups},
                         {p.inner_cols * (p.gated ? 2 : 1), p.mlp_groups},
                         {p.hidden_size, p.mlp_groups},
                         {p.vocab_size, 1}};
  for (int phase = 0; phase < kPhases; phase++) {
    const int64_t groups = matrices[phase].groups, of_group = (matrices[phase].rows + p.tile_rows - 1) / p.tile_rows;
    const int64_t tiles = of_group * groups;
    int64_t next = 0;
    for (int64_t u = 0; u < p.units; u++) {
      const TileRow& t = p.tile(static_cast<Phase>(phase), u);
      require(t.begin == next && t.count >= 0 && t.count <= tiles, "the tile table is out of range");
      next += t.count;
      // A group's units have its rows and no others'.
      const int64_t members = p.units / groups;
      require((u + 1) % members != 0 || groups == 1 || next == (u + 1) / members * of_group, "the tile table mixes groups");
    }
    require(next == tiles, "the tile table does not cover the matrices");
  }
  // The kernel counts them in 32 bits.
  require(stream_atoms(p) <= std::numeric_limits<int32_t>::max(), "the streams are too long");
}

void check_tables(const Program& p) {
  for (int64_t l = 0; l < p.num_layers; l++) {
    require(p.layers[l].window >= 0 && p.layers[l].window <= std::numeric_limits<int32_t>::max() &&
                p.layers[l].rope >= -1 && p.layers[l].rope < p.num_ropes,
            "the layer table is out of range");
  }
  for (int64_t r = 0; r < p.num_ropes; r++) {
    const RopeRow& rope = p.ropes[r];
    require(rope.scaling == 0 || rope.scaling == 1 || rope.scaling == 2, "the rope table has an unknown scaling");
    for (double value : {rope.theta, rope.factor, rope.original_max_position, rope.attention_factor}) {
      require(std::isfinite(value) && std::abs(value) < 1e30, "the rope table is out of range");
    }
    const double last = rope.inv_freq_row + (rope.scaling == 2 ? 1 : 0);
    require(rope.inv_freq_row >= 0 && rope.inv_freq_row == std::floor(rope.inv_freq_row) && last < 1e6 &&
                p.inv_freq >= 0 &&
                p.inv_freq + (static_cast<int64_t>(last) + 1) * (p.rotary_dim / 2) <= p.constants,
            "the rope table is out of range");
  }
}

void check_constants(const Program& p) {
  struct Vector {
    int64_t offset, size;
    bool needed;
  };
  const bool heads = p.qk_norm == 1;
  for (const Vector& v : {
           Vector{p.attn_norm, p.hidden_size, p.pre_norm != 0},
           Vector{p.mlp_norm, p.hidden_size, p.pre_norm != 0},
           Vector{p.attn_post_norm, p.hidden_size, p.post_norm != 0},
           Vector{p.mlp_post_norm, p.hidden_size, p.post_norm != 0},
           Vector{p.q_norm, heads ? p.head_dim : p.q_size(), p.qk_norm != 0},
           Vector{p.k_norm, heads ? p.head_dim : p.kv_size(), p.qk_norm != 0},
           Vector{p.q_bias, p.q_size() + 2 * p.kv_size(), false},
           Vector{p.o_bias, p.hidden_size, false},
           Vector{p.gate_bias, p.intermediate_size, false},
           Vector{p.up_bias, p.intermediate_size, false},
           Vector{p.down_bias, p.hidden_size, false},
       }) {
    require(v.offset >= 0 || !v.needed, "a norm that the model has is missing from the constants");
    require(v.offset < 0 || v.offset + v.size <= p.layer_constants, "the constants are out of range");
  }
  require(p.final_norm >= 0 && p.final_norm + p.hidden_size <= p.constants && p.layer_constants >= 0 &&
              p.layer_constants_offset >= 0 && p.layer_constants_offset <= p.constants &&
              p.layer_constants <= (p.constants - p.layer_constants_offset) / p.num_layers,
          "the constants are out of range");
}

}  // namespace

Request read_request(const Attributes& a, int64_t batch, int64_t splits, int64_t task_heads) {
  Request request;
  Program& p = request.program;
  const std::string error = read_fields(a.ints, a.floats, &p);
  require(error.empty(), error);
#define X(name) require(std::isfinite(p.name), #name " is not finite");
  MONOKERNEL_FLOAT_FIELDS(X)
#undef X
  require(p.platform != 0, "the weights are packed for the CPU, but this computation runs on a GPU; pack them with a plan for it");
  require(p.platform == 1 || p.platform == 2, "unknown platform");
  check_model(p);
  require(static_cast<int64_t>(a.layers.size()) == p.num_layers * 2, "the layer table has the wrong size");
  require(static_cast<int64_t>(a.ropes.size()) == p.num_ropes * 6, "the rope table has the wrong size");
  require(static_cast<int64_t>(a.tiles.size()) == kPhases * p.units * 3, "the tile table has the wrong size");
  p.layers = reinterpret_cast<const LayerRow*>(a.layers.data());
  p.ropes = reinterpret_cast<const RopeRow*>(a.ropes.data());
  p.tiles = reinterpret_cast<const TileRow*>(a.tiles.data());
  check_plan(p);
  check_tables(p);
  check_constants(p);

  require(batch >= 1 && batch <= kMaxBatch, "a call takes 1 to 16 requests, got " + std::to_string(batch));
  require(splits >= 1 && splits <= kMaxSplits, "splits is " + std::to_string(splits) + "; expected 1 to 4096");
  require(task_heads >= 1 && (p.num_heads / p.num_kv_heads) % task_heads == 0,
          "task_heads is " + std::to_string(task_heads) + "; expected a divisor of num_heads / num_kv_heads");
  require(p.num_heads * (p.head_dim + 64) <= std::numeric_limits<int32_t>::max() / kMaxBatch / splits,
          "splits is too large for the model");
  request.batch = batch;
  request.splits = splits;
  request.task_heads = task_heads;
  return request;
}

void set_capacity(Request& request, int64_t capacity) {
  constexpr int64_t kLong = 512;  // positions; docs/performance-log.md has what was measured
  request.capacity = capacity;
  request.long_parts = request.program.platform == 1 && capacity >= kLong * request.splits;
}

std::vector<int64_t> stream_shape(const Program& p) { return {stream_atoms(p) * p.atom_cols * p.tile_rows}; }

int64_t pages(const Program& p) {
  // NVIDIA's units read larger pieces than pages. A wave's slot of 8 atoms of 64 * 16 bytes is two pages.
  if (p.platform != 2 || p.wave_size != 64) return 0;
  const int64_t places = stream_atoms(p) * (p.wave_size * 16 / mk::kPlaceBytes);
  return places <= std::numeric_limits<int32_t>::max() ? places * mk::kPlaceBytes / mk::kPageBytes : 0;
}

std::string request_key(const Attributes& a, const Request& r) {
  std::string key;
  const int64_t call[] = {r.batch, r.splits, r.task_heads, r.trace, r.near, r.racecheck, r.placed, r.long_parts};
  const auto add = [&key](const void* data, size_t bytes) { key.append(static_cast<const char*>(data), bytes); };
  // The program's first numbers give the sizes of its tables, so that no two requests run together.
  add(a.ints.data(), a.ints.size_bytes());
  add(a.floats.data(), a.floats.size_bytes());
  add(a.layers.data(), a.layers.size_bytes());
  add(a.ropes.data(), a.ropes.size_bytes());
  add(a.tiles.data(), a.tiles.size_bytes());
  add(call, sizeof(call));
  return key;
}

}  // namespace monokernel::gpu
