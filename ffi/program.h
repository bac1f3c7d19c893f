// What a decode custom call is told about the model: numbers that Python's plan writes as attributes and every native
// backend reads. The field lists below are the one definition: Python asks the module for these names and fills them in
// by name (jax_monokernel/_program.py), so the two sides cannot drift apart.
#pragma once

#include <cstdint>

// One int64 each. Offsets are in elements; -1 means that the model has no such part.
#define MONOKERNEL_INT_FIELDS(X)                                                                                      \
  X(platform) /* that the weights are packed for: 0 cpu, 1 cuda, 2 rocm */                                            \
  X(vocab_size)                                                                                                       \
  X(hidden_size)                                                                                                      \
  X(intermediate_size)                                                                                                \
  X(num_heads)                                                                                                        \
  X(num_kv_heads)                                                                                                     \
  X(head_dim)                                                                                                         \
  X(num_layers)                                                                                                       \
  X(num_ropes)                                                                                                        \
  X(rotary_dim)                                                                                                       \
  X(units)                                                                                                            \
  X(pre_norm)                                                                                                         \
  X(post_norm)                                                                                                        \
  X(qk_norm)    /* 0 none, 1 over each head, 2 over all heads at once */                                              \
  X(activation) /* 0 silu, 1 gelu, 2 gelu_tanh, 3 relu */                                                             \
  X(gated)                                                                                                            \
  X(tied_head)                                                                                                        \
  X(weight_dtype) /* 0 bfloat16, 1 float16, 2 float32 */                                                              \
  X(kv_dtype)     /* likewise */                                                                                      \
  X(waves)          /* stream waves of a unit; the fields up to inner_cols are those of docs/kernel.md */              \
  X(service_waves)                                                                                                    \
  X(wave_size)                                                                                                        \
  X(tile_rows)                                                                                                        \
  X(atom_cols)                                                                                                        \
  X(row_major_atom)                                                                                                   \
  X(group_atoms)  /* neighbouring atoms of a run that are multiplied together; 0: as the runs happen to be */             \
  X(chunk_cols)                                                                                                       \
  X(segment_tiles)                                                                                                    \
  X(groups)       /* of neighbouring units, all of one size */                                                        \
  X(attention_groups) /* 1, or groups where each holds whole heads */                                                 \
  X(mlp_groups)   /* 1, or groups where each holds inner_cols of the inner width */                                   \
  X(inner_cols)                                                                                                       \
  X(layer_elems)  /* CPU: one layer of one unit's stream */                                                                \
  X(unit_elems)   /* CPU: one unit's stream */                                                                             \
  X(constants)    /* number of f32 constants */                                                                       \
  X(final_norm)                                                                                                       \
  X(inv_freq)                                                                                                         \
  X(layer_constants_offset)                                                                                           \
  X(layer_constants) /* one layer's constants; the offsets below are within them */                                   \
  X(attn_norm)                                                                                                        \
  X(q_bias)                                                                                                           \
  X(q_norm)                                                                                                           \
  X(k_norm)                                                                                                           \
  X(o_bias)                                                                                                           \
  X(attn_post_norm)                                                                                                   \
  X(mlp_norm)                                                                                                         \
  X(gate_bias)                                                                                                        \
  X(up_bias)                                                                                                          \
  X(down_bias)                                                                                                        \
  X(mlp_post_norm)

// One float each. A soft-cap of 0 means none.
#define MONOKERNEL_FLOAT_FIELDS(X)                                                                                    \
  X(norm_eps)                                                                                                         \
  X(norm_offset)                                                                                                      \
  X(attn_scale)                                                                                                       \
  X(attn_softcap)                                                                                                     \
  X(logit_softcap)                                                                                                    \
  X(embedding_multiplier)                                                                                             \
  X(residual_multiplier)                                                                                              \
  X(logit_multiplier)

// Headers shared between builds for different instruction sets must leave no out-of-line copies behind: the linker would keep
// one of them, perhaps the one compiled for instructions that this machine lacks.
#define MONOKERNEL_INLINE inline __attribute__((always_inline))

namespace monokernel {

// Phases of a decode step that multiply by a matrix, in the order of jax_monokernel.plan.PHASES.
enum Phase : int { kQkv, kO, kGateUp, kDown, kHead, kPhases };

enum DType : int64_t { kBF16 = 0, kF16 = 1, kF32 = 2 };

// Columns of the int64 table "layers" [num_layers, 2].
struct LayerRow {
  int64_t window;  // tokens; 0: all
  int64_t rope;    // index; -1: no positions
};

// Columns of the float64 table "ropes" [num_ropes, 6].
struct RopeRow {
  double scaling;  // 0: the frequencies in the constants; 1: dynamic; 2: longrope
  double theta;
  double factor;
  double original_max_position;
  double attention_factor;
  double inv_freq_row;  // first row of this rope in the frequency table
};

// Columns of the int64 table "tiles" [phases, units, 3].
struct TileRow {
  int64_t begin;   // first tile of this unit
  int64_t count;   // its number of tiles
  int64_t offset;  // elements from the start of the layer, or of the unit for the head
};

struct Program {
#define X(name) int64_t name;
  MONOKERNEL_INT_FIELDS(X)
#undef X
#define X(name) float name;
  MONOKERNEL_FLOAT_FIELDS(X)
#undef X
  const LayerRow* layers;
  const RopeRow* ropes;
  const TileRow* tiles;

  MONOKERNEL_INLINE int64_t q_size() const { return num_heads * head_dim; }
  MONOKERNEL_INLINE int64_t kv_size() const { return num_kv_heads * head_dim; }
  MONOKERNEL_INLINE const TileRow& tile(Phase phase, int64_t unit) const {
    return tiles[phase * units + unit];
  }
};

}  // namespace monokernel
