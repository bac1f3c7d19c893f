"""The streams of a tape for GPUs: atoms in the order in which each stream wave consumes them (docs/kernel.md)."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jax_monokernel.plan import PHASES, Plan, chunks, geometry
from jax_monokernel.spec import DecoderSpec
from jax_monokernel.weights import DecoderWeights, layer_shapes

# Of streams that are placed (docs/topology.md): what lies together, and what its place is counted in.
PAGE_BYTES = 4096
PLACE_BYTES = 256
_PAGE_LINES = PAGE_BYTES // PLACE_BYTES


def to_bits(x: jax.Array) -> jax.Array:
    """A float array as integers of its width."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16 if x.dtype.itemsize == 2 else jnp.uint32)


def from_bits(x: jax.Array, dtype: str) -> jax.Array:
    """The inverse of `to_bits`."""
    return jax.lax.bitcast_convert_type(x, dtype)


def page_count(spec: DecoderSpec, plan: Plan) -> int:
    """Pages of a tape's streams, if they can be placed; else 0. ffi/gpu/request.cc has the same rule."""
    if plan.platform != "rocm" or plan.wave_size != 64:
        return 0  # NVIDIA's units read larger pieces
    # Streams are whole slots of two pages, so that no atom is on two of them.
    size = math.prod(geometry(spec, plan).stream_shape) * _itemsize(spec)
    return size // PAGE_BYTES if size // PLACE_BYTES < 2**31 else 0


def pack_atoms(spec: DecoderSpec, plan: Plan, weights: DecoderWeights, pages: jax.Array | None = None) -> jax.Array:
    """The streams of all units. Jittable.

    Args:
      spec: the model.
      plan: how it is cut.
      weights: of the model.
      pages: int32 [pages] where each page of the streams is to begin, in PLACE_BYTES; no two overlap.

    Returns:
      spec.dtype `Geometry.stream_shape`; with `pages`, [pages + 1, elements of a page], where what is no page's is 0.
    """
    geo = geometry(spec, plan)
    w = jax.tree.map(to_bits, weights.layers)
    attention, mlp, inner = geo.attention_groups, geo.mlp_groups, geo.inner_cols
    qkv = jnp.concatenate([_in_groups(x, attention, x.shape[1] // attention) for x in (w.q, w.k, w.v)], axis=2)
    up = _in_groups(w.up, mlp, inner)
    if w.gate is not None:
        up = _interleave(_in_groups(w.gate, mlp, inner), up, plan.tile_rows // 2)
    stacked = {
        "qkv": _stack(qkv, plan),
        "o": _stack(_columns_in_groups(w.o, attention, spec.q_size // attention), plan),
        "gate_up": _stack(up, plan),
        "down": _stack(_columns_in_groups(w.down, mlp, inner), plan),
    }
    layers = jnp.concatenate([_to_atoms(stacked[p], spec, plan, p) for p in PHASES[:-1]], axis=1)
    head = _to_atoms(to_bits(weights.output_matrix)[None], spec, plan, "head")
    atoms = jnp.concatenate([layers.reshape(-1, layers.shape[2]), head[0], jnp.zeros_like(head[0, :1])])
    places = _places(spec, plan)
    if pages is None:
        return from_bits(atoms[places].reshape(geo.stream_shape), spec.dtype)
    lines = atoms.reshape(-1, _line(spec))
    per_atom = lines.shape[0] // atoms.shape[0]
    wanted = (places.reshape(-1, 1) * per_atom + jnp.arange(per_atom)).reshape(-1, _PAGE_LINES)
    nothing = jnp.full((len(pages) + 1) * _PAGE_LINES, lines.shape[0] - 1, wanted.dtype)
    source = nothing.at[pages[:, None] + jnp.arange(_PAGE_LINES)].set(wanted)
    return from_bits(lines[source].reshape(len(pages) + 1, -1), spec.dtype)


def unpack_atoms(
    spec: DecoderSpec, plan: Plan, streams: jax.Array, pages: jax.Array | None = None
) -> tuple[dict[str, jax.Array], jax.Array]:
    """The matrices of the layers by role, and the head: the inverse of `pack_atoms`. Jittable."""
    per_layer, last = _atom_counts(spec, plan)
    places = _places(spec, plan)
    total = per_layer * spec.num_layers + last
    if pages is None:
        bits = to_bits(streams).reshape(*places.shape, -1)
    else:
        bits = _atoms_at(spec, plan, streams, pages, jnp.arange(places.size))
    atoms = jnp.zeros((total + 1, bits.shape[-1]), bits.dtype).at[places].set(bits)
    layers = atoms[: per_layer * spec.num_layers].reshape(spec.num_layers, per_layer, -1)
    head = _from_atoms(atoms[None, per_layer * spec.num_layers : total], spec, plan, "head")[0]
    return _by_role(layers, spec, plan), from_bits(head[: spec.vocab_size, : spec.hidden_size], spec.dtype)


def unpack_layer_atoms(
    spec: DecoderSpec, plan: Plan, streams: jax.Array, pages: jax.Array | None, index: jax.Array
) -> dict[str, jax.Array]:
    """The matrices of one layer by role, [1, out, in]. Jittable; nothing else of the streams is moved."""
    first, step, _ = _atom_places(spec, plan)
    at = jnp.asarray(first) + index * jnp.asarray(step)
    return _by_role(_atoms_at(spec, plan, streams, pages, at)[None], spec, plan)


def head_rows(spec: DecoderSpec, plan: Plan, streams: jax.Array, pages: jax.Array | None, rows: jax.Array) -> jax.Array:
    """Rows of the head, spec.dtype [n, hidden], for int [n]. Jittable."""
    geo, v, m = geometry(spec, plan), _vector(spec), geometry(spec, plan).matrices["head"]
    per_tile = m.cols // geo.atom_cols
    atoms = (rows // plan.tile_rows)[:, None] * per_tile + jnp.arange(per_tile)
    at = jnp.asarray(_atom_places(spec, plan)[2])[atoms]
    k_blocks = geo.atom_cols // v
    inner = (plan.tile_rows, k_blocks, v) if row_major(plan) else (k_blocks, plan.tile_rows, v)
    found = _atoms_at(spec, plan, streams, pages, at).reshape(*at.shape, *inner)
    row = (rows % plan.tile_rows).reshape(-1, 1, 1, 1, 1)
    found = jnp.take_along_axis(found, row, axis=2 if row_major(plan) else 3)
    return from_bits(found.reshape(rows.shape[0], m.cols)[:, : spec.hidden_size], spec.dtype)


def _atoms_at(spec: DecoderSpec, plan: Plan, streams: jax.Array, pages: jax.Array | None, at: jax.Array) -> jax.Array:
    """Atoms as bits [*at.shape, elements of an atom], of the streams of all waves one after the other."""
    size = plan.wave_size * _vector(spec)
    if pages is None:
        return to_bits(streams).reshape(-1, size)[at]
    lines = to_bits(streams).reshape(-1, _line(spec))
    per_atom = size // _line(spec)
    per_page = _PAGE_LINES // per_atom
    first = pages[at // per_page] + at % per_page * per_atom
    return lines[first[..., None] + jnp.arange(per_atom)].reshape(*at.shape, size)


def _itemsize(spec: DecoderSpec) -> int:
    return 4 if spec.dtype == "float32" else 2


def _line(spec: DecoderSpec) -> int:
    """Elements of PLACE_BYTES."""
    return PLACE_BYTES // _itemsize(spec)


def _by_role(layers: jax.Array, spec: DecoderSpec, plan: Plan) -> dict[str, jax.Array]:
    """Matrices [layers, out, in] from the atoms of layers in the order of `_to_atoms`, bits [layers, atoms, elems]."""
    geo = geometry(spec, plan)
    found, start = {}, 0
    for p in PHASES[:-1]:
        count = _phase_atoms(spec, plan, p)
        found[p] = _from_atoms(layers[:, start : start + count], spec, plan, p)
        start += count
    shapes = layer_shapes(spec)
    attention, mlp, inner = geo.attention_groups, geo.mlp_groups, geo.inner_cols
    for p, groups in (("qkv", attention), ("o", attention), ("gate_up", mlp), ("down", mlp)):
        found[p] = found[p].reshape(found[p].shape[0], groups, -1, found[p].shape[2])
    q, kv = spec.q_size // attention, spec.kv_size // attention
    out = {}
    out["q"], out["k"], out["v"] = map(_rows, jnp.split(found["qkv"][:, :, : q + 2 * kv], (q, q + kv), axis=2))
    out["o"] = _columns(found["o"][:, :, : spec.hidden_size, :q])
    out["down"] = _columns(found["down"][:, :, : spec.hidden_size, :inner])
    if spec.gated:
        gate, up = _split_pairs(found["gate_up"], plan.tile_rows // 2)
        out["gate"], out["up"] = _rows(gate[:, :, :inner]), _rows(up[:, :, :inner])
    else:
        out["up"] = _rows(found["gate_up"][:, :, :inner])
    return {role: from_bits(x[:, : shapes[role][0], : shapes[role][1]], spec.dtype) for role, x in out.items()}


def _in_groups(x: jax.Array, groups: int, rows: int) -> jax.Array:
    """[layers, rows, cols] -> [layers, groups, rows of a group, cols], padded with zeros."""
    x = jnp.pad(x, ((0, 0), (0, groups * rows - x.shape[1]), (0, 0)))
    return x.reshape(x.shape[0], groups, rows, x.shape[2])


def _columns_in_groups(x: jax.Array, groups: int, cols: int) -> jax.Array:
    """[layers, rows, cols] -> [layers, groups, rows, cols of a group], padded with zeros."""
    x = jnp.pad(x, ((0, 0), (0, 0), (0, groups * cols - x.shape[2])))
    return x.reshape(*x.shape[:2], groups, cols).transpose(0, 2, 1, 3)


def _stack(x: jax.Array, plan: Plan) -> jax.Array:
    """[layers, groups, rows, cols] -> [layers, rows of all groups, cols]; each group has whole tiles."""
    x = jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % plan.tile_rows), (0, 0)))
    return _rows(x)


def _rows(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0], -1, x.shape[3])


def _columns(x: jax.Array) -> jax.Array:
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)


def _interleave(gate: jax.Array, up: jax.Array, half: int) -> jax.Array:
    """[layers, groups, rows, cols] twice -> [layers, groups, tiles * 2 * half, cols]: half a tile of gate, then up."""
    layers, groups, rows, cols = gate.shape
    pad = ((0, 0), (0, 0), (0, -rows % half), (0, 0))
    gate, up = (jnp.pad(x, pad).reshape(layers, groups, -1, 1, half, cols) for x in (gate, up))
    return jnp.concatenate([gate, up], axis=3).reshape(layers, groups, -1, cols)


def _split_pairs(x: jax.Array, half: int) -> tuple[jax.Array, jax.Array]:
    layers, groups, _, cols = x.shape
    pairs = x.reshape(layers, groups, -1, 2, half, cols)
    return pairs[:, :, :, 0].reshape(layers, groups, -1, cols), pairs[:, :, :, 1].reshape(layers, groups, -1, cols)


def _vector(spec: DecoderSpec) -> int:
    return 4 if spec.dtype == "float32" else 8


def _to_atoms(x: jax.Array, spec: DecoderSpec, plan: Plan, phase: str) -> jax.Array:
    """[layers, rows, cols] -> [layers, tiles * atoms of a row, elements of an atom], padded with zeros."""
    geo, v, rows = geometry(spec, plan), _vector(spec), plan.tile_rows
    m = geo.matrices[phase]
    x = jnp.pad(x, ((0, 0), (0, m.rows - x.shape[1]), (0, m.cols - x.shape[2])))
    x = x.reshape(x.shape[0], m.tiles, rows, m.cols // geo.atom_cols, geo.atom_cols // v, v)
    order = (0, 1, 3, 2, 4, 5) if row_major(plan) else (0, 1, 3, 4, 2, 5)
    return x.transpose(order).reshape(x.shape[0], -1, rows * geo.atom_cols)


def _from_atoms(x: jax.Array, spec: DecoderSpec, plan: Plan, phase: str) -> jax.Array:
    geo, v, rows = geometry(spec, plan), _vector(spec), plan.tile_rows
    m = geo.matrices[phase]
    k_blocks = geo.atom_cols // v
    inner = (rows, k_blocks, v) if row_major(plan) else (k_blocks, rows, v)
    x = x.reshape(x.shape[0], m.tiles, m.cols // geo.atom_cols, *inner)
    order = (0, 1, 3, 2, 4, 5) if row_major(plan) else (0, 1, 4, 2, 3, 5)
    return x.transpose(order).reshape(x.shape[0], m.rows, m.cols)


def row_major(plan: Plan) -> bool:
    """Whether an atom is [rows][k blocks], as waves of 32 lanes read it, and not [k blocks][rows]."""
    return plan.wave_size == 32


def _phase_atoms(spec: DecoderSpec, plan: Plan, phase: str) -> int:
    geo = geometry(spec, plan)
    m = geo.matrices[phase]
    return m.tiles * (m.cols // geo.atom_cols)


def _atom_counts(spec: DecoderSpec, plan: Plan) -> tuple[int, int]:
    """(atoms of a layer, atoms of the head)."""
    return sum(_phase_atoms(spec, plan, p) for p in PHASES[:-1]), _phase_atoms(spec, plan, "head")


@functools.lru_cache(maxsize=8)
def _stream_orders(spec: DecoderSpec, plan: Plan) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """For every wave of every unit: atoms of a layer in the order of its stream, and atoms of the head."""
    geo = geometry(spec, plan)
    layer_parts: list[list[np.ndarray]] = [[] for _ in range(plan.units * plan.waves)]
    head_parts: list[list[np.ndarray]] = [[] for _ in range(plan.units * plan.waves)]
    start = 0
    for phase in PHASES:
        m = geo.matrices[phase]
        per_row = m.cols // geo.atom_cols
        if phase == "head":
            start = 0
        deal = chunks(m.cols, geo.atom_cols, geo.chunk_cols, plan.waves)
        for u in range(plan.units):
            for first in range(m.begin[u], m.begin[u + 1], plan.segment_tiles):
                tiles = np.arange(first, min(first + plan.segment_tiles, m.begin[u + 1]))
                for chunk in deal:
                    for w, (a, b) in enumerate(chunk):
                        atoms = (start + tiles[:, None] * per_row + np.arange(a, b)).reshape(-1)
                        (head_parts if phase == "head" else layer_parts)[u * plan.waves + w].append(atoms)
        start += m.tiles * per_row
    none = np.zeros(0, np.int64)
    return [np.concatenate([none, *p]) for p in layer_parts], [np.concatenate([none, *p]) for p in head_parts]


@functools.lru_cache(maxsize=8)
def _atom_places(spec: DecoderSpec, plan: Plan) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The inverse of `_places`, int32, as rows of `_as_atoms`.

    Returns:
      Where each atom of the first layer is, [atoms of a layer]; how far it moves from layer to layer, likewise; and
      where each atom of the head is, [atoms of the head].
    """
    per_layer, last = _atom_counts(spec, plan)
    begins = _stream_begins(spec, plan)
    first, step, head = (np.zeros(n, np.int32) for n in (per_layer, per_layer, last))
    for stream, (layer, after) in enumerate(zip(*_stream_orders(spec, plan), strict=True)):
        first[layer] = begins[stream] + np.arange(len(layer))
        step[layer] = len(layer)
        head[after] = begins[stream] + len(layer) * spec.num_layers + np.arange(len(after))
    return first, step, head


def _stream_begins(spec: DecoderSpec, plan: Plan) -> np.ndarray:
    """Where the stream of each wave of each unit begins, in atoms, and the last one ends; int [units * waves + 1]."""
    geo = geometry(spec, plan)
    # What may stand behind the last one is counted with it.
    return np.append(geo.wave_begin[:-1], geo.stream_shape) // (plan.wave_size * _vector(spec))


def _places(spec: DecoderSpec, plan: Plan) -> jax.Array:
    """int32 [atoms of all streams]: which of all atoms, layers first, then head, stands there.

    Padding at a stream's end points behind the last atom. Computed from one layer's order, so that a jitted pack has no
    constant of the size of all layers.
    """
    per_layer, last = _atom_counts(spec, plan)
    layer_orders, head_orders = _stream_orders(spec, plan)
    begins = _stream_begins(spec, plan)

    def table(orders: list[np.ndarray]) -> tuple[jax.Array, jax.Array]:
        sizes = np.array([len(o) for o in orders], np.int32)
        out = np.zeros((len(orders), max(1, sizes.max())), np.int32)
        for i, order in enumerate(orders):
            out[i, : len(order)] = order
        return jnp.asarray(out), jnp.asarray(sizes)

    layer_table, layer_sizes = table(layer_orders)
    head_table, head_sizes = table(head_orders)
    at = jnp.arange(begins[-1], dtype=jnp.int32)
    stream = jnp.searchsorted(jnp.asarray(begins[1:-1], jnp.int32), at, side="right")
    at = at - jnp.asarray(begins[:-1], jnp.int32)[stream]
    size = jnp.maximum(layer_sizes, 1)[stream]
    in_layer = layer_table[stream, at % size] + at // size * per_layer
    after = at - layer_sizes[stream] * spec.num_layers
    in_head = head_table[stream, jnp.clip(after, 0, head_table.shape[1] - 1)] + per_layer * spec.num_layers
    in_head = jnp.where(after < head_sizes[stream], in_head, per_layer * spec.num_layers + last)
    return jnp.where(after < 0, in_layer, in_head)
