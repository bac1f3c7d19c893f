"""The tape: weights in the order and layout in which each execution unit consumes them.

A matrix [rows, cols] is cut into tiles of 16 rows. Inside a tile the order is [cols / g][16 rows][g] with g
neighbouring columns together (`Geometry.k_group`), so one 64-byte load of bf16 weights holds two columns of all 16
rows: lanes are rows, products need no sum across lanes, and a unit reads its tiles as one contiguous stream. That is
the CPU's layout; `_gpu_tape` has the one for GPUs.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_monokernel._gpu_tape import PAGE_BYTES, from_bits, pack_atoms, page_count, to_bits, unpack_atoms
from jax_monokernel.plan import PHASES, VECTOR_ROLES, Geometry, Matrix, Plan, geometry, make_plan
from jax_monokernel.rope import inverse_frequencies
from jax_monokernel.spec import DecoderSpec
from jax_monokernel.weights import DecoderWeights, LayerWeights, check_weights, layer_shapes

# Raised whenever the order of bytes in a tape changes.
LAYOUT_VERSION = 2

DIES = 16  # that a device can tell apart; ffi/gpu/kernel/args.h


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["streams", "constants", "embedding", "pages", "die_units"],
    meta_fields=["spec", "plan", "layout_version"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Tape:
    """Packed weights. `spec`, `plan` and `layout_version` are static: a jitted function recompiles when they change."""

    streams: jax.Array  # spec.dtype `Geometry.stream_shape`; if placed, [pages + 1, elements of a page of 4096 bytes]
    constants: jax.Array  # f32: final norm, RoPE frequencies, then every layer's norms and biases
    embedding: jax.Array | None  # spec.dtype [vocab, hidden]; None when tied: rows are then read from the head's tiles
    spec: DecoderSpec
    plan: Plan
    layout_version: int = LAYOUT_VERSION
    # Of a tape that is placed (`topology.pack_near`), else None:
    pages: jax.Array | None = None  # int32 [pages]: where each page of the units' streams begins, in 256 bytes
    die_units: jax.Array | None = None  # int32 [16]: units of each XCD, by XCC_ID; the first units are the first one's

    @property
    def nbytes(self) -> int:
        """Size of all arrays, in bytes."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that one decode step reads, without padding: every matrix and vector once."""
        sizes = layer_shapes(self.spec).values()
        per_layer = sum(int(np.prod(shape)) for shape in sizes)
        head = self.spec.vocab_size * self.spec.hidden_size
        itemsize = jnp.dtype(self.spec.dtype).itemsize
        return (per_layer * self.spec.num_layers + head + self.spec.hidden_size) * itemsize


def pack(spec: DecoderSpec, weights: DecoderWeights, plan: Plan | None = None) -> Tape:
    """Packs weights for decoding. Pure and jittable; `unpack` is its inverse.

    Args:
      spec: the model.
      weights: its weights, of the shapes and dtype that `weight_shapes(spec)` gives.
      plan: device geometry; `make_plan(spec)` by default, which is for where JAX puts arrays.

    Raises:
      ValueError: weights that do not fit the spec, naming the role.
    """
    check_weights(spec, weights)
    plan = make_plan(spec) if plan is None else plan
    geo = geometry(spec, plan)
    if plan.platform != "cpu":
        return _tape(spec, plan, weights, pack_atoms(spec, plan, weights))
    # Moved as integers: XLA's CPU backend widens 16-bit floats to f32 even to copy them, which would double the memory.
    w = jax.tree.map(to_bits, weights.layers)
    stacked = {
        "qkv": jnp.concatenate([w.q, w.k, w.v], axis=1),
        "o": w.o,
        "down": w.down,
        "head": to_bits(weights.output_matrix)[None],
    }
    tiles = {phase: _to_tiles(matrix, geo.matrices[phase], plan, geo) for phase, matrix in stacked.items()}
    tiles["gate_up"] = _pack_gate_up(w, geo.matrices["gate_up"], plan, geo)

    units = []
    for u in range(plan.units):
        parts = [_unit_tiles(tiles[phase], geo.matrices[phase], u) for phase in PHASES[:-1]]
        layers = _pad_last(jnp.concatenate(parts, axis=1), geo.layer_elems).reshape(-1)
        head = _unit_tiles(tiles["head"], geo.matrices["head"], u).reshape(-1)
        units.append(_pad_last(jnp.concatenate([layers, head]), geo.unit_elems))
    return _tape(spec, plan, weights, from_bits(jnp.stack(units), spec.dtype))


def _tape(spec: DecoderSpec, plan: Plan, weights: DecoderWeights, streams: jax.Array) -> Tape:
    vectors = [v for v in (getattr(weights.layers, role) for role in VECTOR_ROLES) if v is not None]
    per_layer = [jnp.concatenate([v.astype(jnp.float32) for v in vectors], axis=1).reshape(-1)] if vectors else []
    frequencies = [jnp.asarray(inverse_frequencies(rope)).reshape(-1) for rope in spec.ropes]
    constants = jnp.concatenate([weights.final_norm.astype(jnp.float32), *frequencies, *per_layer])
    return Tape(
        streams=streams,
        constants=constants,
        embedding=None if spec.tied_head else weights.embedding,
        spec=spec,
        plan=plan,
    )


def pack_placed(spec: DecoderSpec, weights: DecoderWeights, plan: Plan, pages: jax.Array, die_units: jax.Array) -> Tape:
    """As `pack`, with the pages of the streams in other places. Pure and jittable.

    Args:
      spec: the model.
      weights: its weights.
      plan: device geometry, for ROCm.
      pages: int32 [pages] where each begins, as in `Tape`; no two overlap.
      die_units: int32 [16] as in `Tape`.

    Raises:
      ValueError: weights that do not fit the spec, or a plan whose pages cannot be placed.
    """
    check_weights(spec, weights)
    if page_count(spec, plan) != len(pages):
        raise ValueError(f"the plan's streams have {page_count(spec, plan)} pages that can be placed, not {len(pages)}")
    tape = _tape(spec, plan, weights, pack_atoms(spec, plan, weights, pages))
    return dataclasses.replace(tape, pages=pages, die_units=die_units)


def unpack(tape: Tape) -> DecoderWeights:
    """The weights a tape was packed from, bit for bit. Pure and jittable.

    Raises:
      ValueError: a tape of another layout version.
    """
    check_layout(tape)
    spec, plan, geo = tape.spec, tape.plan, geometry(tape.spec, tape.plan)
    if plan.platform != "cpu":
        layers, head = unpack_atoms(spec, plan, tape.streams, tape.pages)
    else:
        bits, m = to_bits(tape.streams), geo.matrices["head"]
        size = geo.layer_elems * spec.num_layers
        layers = layer_matrices(spec, plan, [stream[:size].reshape(spec.num_layers, -1) for stream in bits])
        ends = [size + (b - a) * m.tile_elems for a, b in itertools.pairwise(m.begin)]
        heads = [stream[None, size:end] for stream, end in zip(bits, ends, strict=True)]
        head = from_bits(_rows(heads, m, plan, geo)[0, : spec.vocab_size, : spec.hidden_size], spec.dtype)
    constants = tape.constants[geo.layer_constants_offset :].reshape(spec.num_layers, geo.layer_constants)
    return DecoderWeights(
        embedding=head if tape.embedding is None else tape.embedding,
        layers=LayerWeights(**layers, **layer_vectors(spec, plan, constants)),
        final_norm=tape.constants[: spec.hidden_size].astype(spec.dtype),
        head=None if spec.tied_head else head,
    )


def layer_matrices(spec: DecoderSpec, plan: Plan, streams: Sequence[jax.Array] | jax.Array) -> dict[str, jax.Array]:
    """Matrices of some layers by role, [layers, out, in], from a CPU tape.

    Args:
      spec: the model.
      plan: what the tape is packed for.
      streams: each unit's part of these layers, as bits [layers, layer_elems].
    """
    geo, shapes = geometry(spec, plan), layer_shapes(spec)

    def rows(phase: str) -> jax.Array:
        m = geo.matrices[phase]
        sizes = [(b - a) * m.tile_elems for a, b in itertools.pairwise(m.begin)]
        runs = [s[:, start : start + n] for s, start, n in zip(streams, m.offset, sizes, strict=True)]
        return _rows(runs, m, plan, geo)

    q, kv = spec.q_size, spec.kv_size
    qkv = rows("qkv")[:, : q + 2 * kv]
    layers = {"o": rows("o"), "down": rows("down"), "up": rows("gate_up")}
    layers["q"], layers["k"], layers["v"] = jnp.split(qkv, (q, q + kv), axis=1)
    if spec.gated:
        up = layers["up"]
        pairs = up.reshape(up.shape[0], -1, 2, plan.tile_rows, up.shape[2])
        layers["gate"], layers["up"] = (pairs[:, :, i].reshape(up.shape[0], -1, up.shape[2]) for i in (0, 1))
    return {role: from_bits(x[:, : shapes[role][0], : shapes[role][1]], spec.dtype) for role, x in layers.items()}


def _rows(runs: Sequence[jax.Array], m: Matrix, plan: Plan, geo: Geometry) -> jax.Array:
    """Units' runs of tiles, each [layers, elems], as a matrix [layers, rows, cols], padding included."""
    tiles = [run.reshape(run.shape[0], -1, m.cols // geo.k_group, plan.tile_rows, geo.k_group) for run in runs]
    return jnp.concatenate(tiles, axis=1).transpose(0, 1, 3, 2, 4).reshape(runs[0].shape[0], m.rows, m.cols)


def layer_vectors(spec: DecoderSpec, plan: Plan, constants: jax.Array) -> dict[str, jax.Array]:
    """Norms and biases of some layers by role, [layers, size], from their constants f32 [layers, layer_constants]."""
    geo, shapes = geometry(spec, plan), layer_shapes(spec)
    start = geo.vector_offset
    return {
        role: constants[:, start[role] : start[role] + shapes[role][0]].astype(spec.dtype)
        for role in VECTOR_ROLES
        if role in shapes
    }


def check_layout(tape: Tape) -> None:
    """Raises ValueError for a tape whose layout version, shapes or dtypes are not those of this package's plan."""
    if not isinstance(tape, Tape):
        raise ValueError(f"tape is {type(tape).__name__}; expected a Tape: pack(spec, weights), or prepare(model).tape")
    if tape.layout_version != LAYOUT_VERSION:
        raise ValueError(
            f"the tape has layout version {tape.layout_version}, this jax_monokernel reads version {LAYOUT_VERSION}; "
            "pack the weights again"
        )
    spec, geo = tape.spec, geometry(tape.spec, tape.plan)
    if (tape.embedding is None) != spec.tied_head:
        raise ValueError("tape.embedding must be None exactly when the spec ties the head to the embedding")
    if (tape.pages is None) != (tape.die_units is None):
        raise ValueError("a tape has both of pages and die_units, if it is placed, or none")
    want: dict[str, tuple[tuple[int, ...], str]] = {
        "streams": (geo.stream_shape, spec.dtype),
        "constants": ((geo.constants,), "float32"),
    }
    if tape.pages is not None:
        pages = page_count(spec, tape.plan)
        if pages == 0:
            raise ValueError(f"the tape is placed, but is packed for {tape.plan.platform}; only ROCm's can be")
        want["streams"] = ((pages + 1, PAGE_BYTES // jnp.dtype(spec.dtype).itemsize), spec.dtype)
        want |= {"pages": ((pages,), "int32"), "die_units": ((DIES,), "int32")}
    if not spec.tied_head:
        want["embedding"] = ((spec.vocab_size, spec.hidden_size), spec.dtype)
    for name, (shape, dtype) in want.items():
        have = getattr(tape, name)
        if have.shape != shape or have.dtype != dtype:
            raise ValueError(
                f"tape.{name} is {have.dtype}{list(have.shape)}; spec and plan ask for {dtype}{list(shape)}"
            )


def _pad_last(x: jax.Array, size: int) -> jax.Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])])


def _to_tiles(x: jax.Array, m: Matrix, plan: Plan, geo: Geometry) -> jax.Array:
    """[layers, rows, cols] -> [layers, tiles, tile_elems], padded with zeros."""
    x = jnp.pad(x, ((0, 0), (0, m.rows - x.shape[1]), (0, m.cols - x.shape[2])))
    x = x.reshape(x.shape[0], m.tiles, plan.tile_rows, m.cols // geo.k_group, geo.k_group)
    return x.transpose(0, 1, 3, 2, 4).reshape(x.shape[0], m.tiles, m.tile_elems)


def _pack_gate_up(w: LayerWeights, m: Matrix, plan: Plan, geo: Geometry) -> jax.Array:
    if w.gate is None:
        return _to_tiles(w.up, m, plan, geo)
    half = dataclasses.replace(m, rows=m.rows // 2, tiles=m.tiles // 2)
    gate, up = (_to_tiles(x, half, plan, geo) for x in (w.gate, w.up))
    return jnp.stack([gate, up], axis=2).reshape(gate.shape[0], m.tiles, m.tile_elems)


def _unit_tiles(tiles: jax.Array, m: Matrix, unit: int) -> jax.Array:
    """The unit's run of tiles, [layers, elems]."""
    return tiles[:, m.begin[unit] : m.begin[unit + 1]].reshape(tiles.shape[0], -1)
