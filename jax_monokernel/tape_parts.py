"""Single layers and rows of a tape: what prefill needs of one, so that weights need not be held by role as well."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jax_monokernel._gpu_tape import from_bits, head_rows, to_bits, unpack_layer_atoms
from jax_monokernel.plan import geometry
from jax_monokernel.tape import Tape, layer_matrices, layer_vectors
from jax_monokernel.weights import LayerWeights

# Elements that streams and layers are whole multiples of. Indices count in these, so that 32 bits are enough for them.
_LINE = 32


def unpack_layer(tape: Tape, index: jax.Array) -> LayerWeights:
    """One layer's weights, without a layer axis, bit for bit. Pure and jittable; copies nothing else of the tape.

    Args:
      tape: packed weights.
      index: int32 scalar, 0 to spec.num_layers - 1.
    """
    spec, plan, geo = tape.spec, tape.plan, geometry(tape.spec, tape.plan)
    start = geo.layer_constants_offset + index * geo.layer_constants
    constants = jax.lax.dynamic_slice_in_dim(tape.constants, start, geo.layer_constants)
    if plan.platform != "cpu":
        matrices = unpack_layer_atoms(spec, plan, tape.streams, tape.pages, index)
    else:
        lines = to_bits(tape.streams).reshape(plan.units, -1, _LINE)
        count = geo.layer_elems // _LINE
        layer = jax.lax.dynamic_slice_in_dim(lines, index * count, count, axis=1)
        matrices = layer_matrices(spec, plan, layer.reshape(plan.units, 1, geo.layer_elems))
    roles = matrices | layer_vectors(spec, plan, constants[None])
    return LayerWeights(**{role: value[0] for role, value in roles.items()})


def embedding_rows(tape: Tape, tokens: jax.Array) -> jax.Array:
    """Rows of the embedding, spec.dtype [..., hidden], for token ids int32 [...]. Pure and jittable."""
    if tape.embedding is not None:
        return tape.embedding[tokens]
    spec, plan = tape.spec, tape.plan
    rows = tokens.reshape(-1)
    if plan.platform != "cpu":
        found = head_rows(spec, plan, tape.streams, tape.pages, rows)
    else:
        found = from_bits(_cpu_head_rows(tape, rows), spec.dtype)
    return found.reshape(*tokens.shape, spec.hidden_size)


def _cpu_head_rows(tape: Tape, rows: jax.Array) -> jax.Array:
    """Bits [n, hidden] for int32 [n]."""
    spec, plan, geo = tape.spec, tape.plan, geometry(tape.spec, tape.plan)
    m, group = geo.matrices["head"], plan.tile_rows * geo.k_group
    tile = rows // plan.tile_rows
    unit = jnp.searchsorted(jnp.array(m.begin[1:]), tile, side="right")
    # A group is k_group columns of a tile's rows; tiles and what is before them are whole groups.
    first = jnp.array(np.array(m.offset) // group)[unit] + (tile - jnp.array(m.begin)[unit]) * (m.tile_elems // group)
    groups = to_bits(tape.streams).reshape(plan.units, -1, plan.tile_rows, geo.k_group)
    at = first[:, None] + jnp.arange(m.cols // geo.k_group)
    found = groups[unit[:, None], at, (rows % plan.tile_rows)[:, None]]
    return found.reshape(rows.shape[0], m.cols)[:, : spec.hidden_size]
