"""How a decode is laid over a device: the geometry that packing and the kernels share.

Nothing here depends on weights. A `Plan` is small, hashable and static; `Geometry` is what follows from it and a spec.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import jax
import numpy as np

from jax_monokernel import _native
from jax_monokernel.spec import DecoderSpec
from jax_monokernel.weights import layer_shapes

if TYPE_CHECKING:
    from jax_monokernel.topology import Topology

Platform = Literal["cpu", "cuda", "rocm"]

# Matrices in the order in which a decode step consumes them: the last one, the LM head, once per step, the others per
# layer.
PHASES = ("qkv", "o", "gate_up", "down", "head")

# Per-layer vectors in the order in which they stand in the tape's constants. q, k and v biases are neighbours because
# their phase sees them as one vector.
VECTOR_ROLES = (
    "attn_norm",
    "q_bias",
    "k_bias",
    "v_bias",
    "q_norm",
    "k_norm",
    "o_bias",
    "attn_post_norm",
    "mlp_norm",
    "gate_bias",
    "up_bias",
    "down_bias",
    "mlp_post_norm",
)


_GPU_DEFAULTS = {
    "cuda": {"wave_size": 32, "waves": 8, "service_waves": 7, "chunk_atoms": 64, "segment_tiles": 8},
    "rocm": {"wave_size": 64, "waves": 4, "service_waves": 4, "chunk_atoms": 8, "segment_tiles": 8},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How weights are cut and ordered for one kind of device."""

    platform: Platform
    units: int  # execution units (CPU threads, GPU multiprocessors or compute units); each has its own weight stream
    # What follows is for GPUs (docs/kernel.md); 0 stands for the platform's own value.
    wave_size: int = 0  # lanes
    waves: int = 0  # stream waves of a unit
    service_waves: int = 0
    chunk_atoms: int = 0  # atoms of a chunk; the columns that stay in shared memory at the largest batch
    segment_tiles: int = 0
    # Units are in groups of neighbouring numbers; more than one makes a hierarchical plan. What stays inside a group:
    groups: int = 1
    group_attention: bool = True  # attention, where the KV heads can be dealt evenly and no norm is over all of them
    group_mlp: bool = True  # the MLP's inner activations

    def __post_init__(self) -> None:
        if self.platform not in get_args(Platform):
            raise ValueError(f"Plan.platform is {self.platform!r}; expected one of {get_args(Platform)}")
        if not 1 <= self.units <= 4096:
            raise ValueError(f"Plan.units is {self.units}; expected 1 to 4096")
        for name, value in _GPU_DEFAULTS.get(self.platform, {}).items():
            if getattr(self, name) == 0:
                object.__setattr__(self, name, value)
            if getattr(self, name) < 1:
                raise ValueError(f"Plan.{name} is {getattr(self, name)}; expected at least 1, or 0 for {value}")
        if self.platform != "cpu" and (self.wave_size not in (32, 64) or self.waves + self.service_waves > 16):
            raise ValueError("a GPU plan has waves of 32 or 64 lanes, and at most 16 of them in a unit")
        if not 1 <= self.groups <= 64 or self.units % self.groups or (self.platform == "cpu" and self.groups > 1):
            raise ValueError(
                f"Plan.groups is {self.groups}, for {self.units} units on {self.platform}; expected 1, or on a GPU up "
                "to 64 groups of equally many units"
            )
        if self.groups > 1 and not (self.group_attention or self.group_mlp):
            raise ValueError("a plan with groups has attention or the MLP in groups")

    @property
    def tile_rows(self) -> int:
        """Matrix rows whose products a unit accumulates side by side."""
        return {0: 16, 32: 8, 64: 4}[self.wave_size]

    @property
    def members(self) -> int:
        """Units of a group."""
        return self.units // self.groups


def default_platform() -> Platform:
    """Where JAX puts arrays by default: `jax_default_device` if it is set, else the default backend."""
    device = getattr(jax.config, "jax_default_device", None)
    if device is None:
        device = jax.local_devices()[0]
    elif isinstance(device, str):
        device = jax.local_devices(backend=device)[0]
    if device.platform != "gpu":
        return "cpu"
    return "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"


def make_plan(
    spec: DecoderSpec, *, platform: Platform | None = None, units: int | None = None, groups: int | None = None
) -> Plan:
    """The default plan for `spec` on a platform.

    On CUDA, units have 8 stream waves, or 7 or 6 where the model's rows are padded less for those. On ROCm, chunks have
    16 atoms where the device here, or the part that has so many units, has the shared memory for it (gfx950), else 8.

    Args:
      platform: where decode will run; by default where JAX puts arrays (`default_platform`).
      units: execution units to cut the weights for. By default, on the CPU: `MONOKERNEL_THREADS` if set, else the CPUs
        this process may use, but no more than the smallest matrix has row tiles. On a GPU: all multiprocessors or
        compute units of the first device of that platform.
      groups: of units (docs/kernel.md); 1 for none. By default, on ROCm: what `performance.choose_groups` says of the
        device here, as measured or published, or of the part that has so many units; elsewhere 1.

    Raises:
      ValueError: units or groups out of range, or units not given where JAX sees no device of that platform; for CUDA
        also a model that its kernels cannot have.
    """
    platform = platform or default_platform()
    if platform not in get_args(Platform):
        raise ValueError(f"platform is {platform!r}; expected one of {', '.join(get_args(Platform))}")
    if units is None:
        units = _default_threads(spec) if platform == "cpu" else _device_units(platform)
    if platform == "cuda":
        return _cuda_plan(spec, units, 1 if groups is None else groups)
    if platform == "cpu":
        return Plan(platform=platform, units=units, groups=1 if groups is None else groups)
    topology = _rocm_topology(units)
    if groups is None:
        groups = _default_groups(spec, topology)
    return Plan(platform=platform, units=units, groups=groups, chunk_atoms=_default_chunk(topology))


def _cuda_plan(spec: DecoderSpec, units: int, groups: int) -> Plan:
    """With 8 stream waves, or 7 or 6 where rows are padded less for those: all of them must have the same to do.

    Measured on an H200 (docs/performance-log.md): bytes less are time less.
    """

    def weights(plan: Plan) -> float:
        times = {phase: 1 if phase == "head" else spec.num_layers for phase in PHASES}
        return sum(m.rows * m.cols * times[phase] for phase, m in geometry(spec, plan).matrices.items())

    plans = [Plan(platform="cuda", units=units, groups=groups, waves=waves) for waves in (8, 7, 6)]
    # Fewer waves have more to multiply each, for which a byte less in fifty is too little.
    return min(plans, key=lambda plan: weights(plan) * (1 + 0.02 * (8 - plan.waves)))


def _rocm_topology(units: int) -> Topology | None:
    """Of the device here, or else of the first part that has so many units."""
    # Not above: it takes time to import, and uses this module. So does performance.
    from jax_monokernel.topology import discover, part, part_names

    try:
        topology = discover("rocm").topology
    except (ValueError, RuntimeError):  # no such device here
        topology = None
    if topology is None or topology.units != units:
        known = (part(name) for name in part_names())
        topology = next((p for p in known if p.platform == "rocm" and p.units == units), None)
    return topology


def _default_groups(spec: DecoderSpec, topology: Topology | None) -> int:
    from jax_monokernel.performance import choose_groups

    return 1 if topology is None else choose_groups(spec, topology)


def _default_chunk(topology: Topology | None) -> int:
    """Atoms of a chunk, as many as 16 requests' activations have room for in shared memory; 0 if that is not known."""
    return 16 if topology is not None and _native.gpu_shared_bytes(topology.arch) >= 128 * 1024 else 0


def _device_units(platform: Platform) -> int:
    try:
        return jax.local_devices(backend=platform)[0].core_count
    except (RuntimeError, AttributeError) as error:
        raise ValueError(
            f"JAX sees no {platform} device here, so a plan for it needs units=, the number of its multiprocessors or "
            "compute units"
        ) from error


def _default_threads(spec: DecoderSpec) -> int:
    override = os.environ.get("MONOKERNEL_THREADS")
    if override is not None:
        if not override.isdecimal() or int(override) < 1:
            raise ValueError(f"MONOKERNEL_THREADS is {override!r}; expected a positive whole number")
        return int(override)
    tiles = min(math.ceil(rows / 16) for rows in (spec.hidden_size, spec.intermediate_size, spec.q_size))
    return max(1, min(available_cpus(), tiles))


def available_cpus() -> int:
    """CPUs this process may use: its affinity mask, cut down by a cgroup CPU quota if there is one."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for path in ("/sys/fs/cgroup/cpu.max", "/sys/fs/cgroup/cpu/cpu.cfs_quota_us"):
        try:
            with open(path) as file:
                quota, *period = file.read().split()
            if not period:  # cgroup v1 keeps the period in a file of its own
                with open("/sys/fs/cgroup/cpu/cpu.cfs_period_us") as file:
                    period = [file.read()]
            if quota not in ("max", "-1"):
                cpus = min(cpus, math.ceil(int(quota) / int(period[0])))
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return max(1, cpus)


@dataclasses.dataclass(frozen=True)
class Matrix:
    """One phase's matrix as it lies in the tape: tiles of `tile_rows` rows, dealt to units in contiguous runs."""

    rows: int  # including padding to whole tiles
    cols: int  # including padding to a whole number of k-groups
    tiles: int  # per layer; for gate_up on the CPU a gate tile is followed by its up tile and both go to the same unit
    begin: tuple[int, ...]  # [units + 1]; unit u holds tiles begin[u] to begin[u + 1] - 1
    offset: tuple[int, ...]  # [units], in elements: from the start of the layer, or of the unit for the head; 0 on GPUs

    @property
    def tile_elems(self) -> int:
        """Elements of one tile."""
        return self.rows // self.tiles * self.cols


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Sizes and offsets that follow from a spec and a plan, in elements of their arrays."""

    k_group: int  # CPU: neighbouring columns kept together: 2 for bf16, whose dot-product instructions take pairs
    matrices: dict[str, Matrix]
    layer_elems: int  # CPU: one layer of one unit's stream
    unit_elems: int  # CPU: one unit's stream: every layer, then its part of the head
    atom_cols: int  # GPU
    group_atoms: int  # waves of 32: atoms of a slot of a wave's ring, of which every run is a multiple; else 0
    chunk_cols: int  # GPU
    unit_begin: tuple[int, ...]  # [units + 1]: where each unit's stream begins, and the last one ends
    wave_begin: tuple[int, ...]  # GPU: [units * waves + 1], likewise for the streams of a unit's waves
    stream_shape: tuple[int, ...]  # of all streams: CPU: [units, unit_elems]; GPU: one after the other, in one piece
    attention_groups: int  # 1, or plan.groups where each holds whole heads: its rows of qkv, its columns of o
    mlp_groups: int  # 1, or plan.groups where each holds a part of the inner width
    inner_cols: int  # of that part, including padding
    vector_offset: dict[str, int]  # role -> offset in a layer's constants; -1: the spec has no such part
    final_norm_offset: int
    inv_freq_offset: int
    layer_constants_offset: int
    layer_constants: int  # one layer's constants
    constants: int  # all of them


def _deal(items: int, units: int) -> tuple[int, ...]:
    return tuple(items * u // units for u in range(units + 1))


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


@functools.lru_cache(maxsize=64)
def geometry(spec: DecoderSpec, plan: Plan) -> Geometry:
    """Lays the weights of `spec` out for `plan`."""
    if plan.platform != "cpu":
        return _gpu_geometry(spec, plan)
    k_group = 2 if spec.dtype == "bfloat16" else 1
    tile = plan.tile_rows
    hidden, inter = spec.hidden_size, spec.intermediate_size
    pair = 2 if spec.gated else 1
    shapes = {
        "qkv": (spec.q_size + 2 * spec.kv_size, hidden, 1),
        "o": (hidden, spec.q_size, 1),
        "gate_up": (inter, hidden, pair),
        "down": (hidden, inter, 1),
        "head": (spec.vocab_size, hidden, 1),
    }
    matrices = {}
    fill = [0] * plan.units
    layer_elems = 0
    for phase in PHASES:
        rows, cols, together = shapes[phase]
        groups = -(-rows // tile)
        cols = _round_up(cols, k_group)
        begin = tuple(b * together for b in _deal(groups, plan.units))
        if phase == "head":
            # Streams of all units have one length, in whole cache lines of 64 bytes whatever the dtype.
            layer_elems = _round_up(max(fill), 32)
            fill = [layer_elems * spec.num_layers] * plan.units
        matrices[phase] = Matrix(groups * tile * together, cols, groups * together, begin, tuple(fill))
        fill = [f + (begin[u + 1] - begin[u]) * tile * cols for u, f in enumerate(fill)]

    unit_elems = _round_up(max(fill), 32)
    return _with_constants(
        spec,
        k_group=k_group,
        matrices=matrices,
        layer_elems=layer_elems,
        unit_elems=unit_elems,
        unit_begin=tuple(u * unit_elems for u in range(plan.units + 1)),
        wave_begin=(),
        stream_shape=(plan.units, unit_elems),
        atom_cols=0,
        group_atoms=0,
        chunk_cols=0,
        attention_groups=1,
        mlp_groups=1,
        inner_cols=inter,
    )


def _with_constants(spec: DecoderSpec, **streams: Any) -> Geometry:
    """The geometry of the streams, completed by that of the constants, which is the same for all platforms."""
    vectors = layer_shapes(spec)
    offsets, size = {}, 0
    for role in VECTOR_ROLES:
        offsets[role] = size if role in vectors else -1
        size += int(np.prod(vectors.get(role, (0,))))
    inv_freq_rows = sum(2 if rope.scaling == "longrope" else 1 for rope in spec.ropes)
    before = spec.hidden_size + inv_freq_rows * (spec.rotary_dim // 2)
    return Geometry(
        **streams,
        vector_offset=offsets,
        final_norm_offset=0,
        inv_freq_offset=spec.hidden_size,
        layer_constants_offset=before,
        layer_constants=size,
        constants=before + size * spec.num_layers,
    )


SLOT_ATOMS = 8  # atoms that a ring in registers requests together; a wave's stream is a whole number of them


def chunks(cols: int, geo_atom_cols: int, chunk_cols: int, waves: int) -> list[list[tuple[int, int]]]:
    """For each chunk of a matrix of `cols` columns, the atoms [begin, end) of its rows that each wave reads."""
    atoms = cols // geo_atom_cols
    step = chunk_cols // geo_atom_cols
    starts = range(0, atoms, step)
    sizes = [min(step, atoms - start) for start in starts]
    return [
        [(start + n * w // waves, start + n * (w + 1) // waves) for w in range(waves)]
        for start, n in zip(starts, sizes, strict=True)
    ]


def _gpu_geometry(spec: DecoderSpec, plan: Plan) -> Geometry:
    if spec.head_dim % 2 and spec.kv_dtype != "float32":
        raise ValueError(
            f"GPU kernels store a KV cache of 16-bit elements in pairs, and head_dim is {spec.head_dim}; "
            'use kv_dtype="float32"'
        )
    vector = 16 // np.dtype(np.float32 if spec.dtype == "float32" else np.float16).itemsize
    atom_cols = plan.wave_size // plan.tile_rows * vector
    hidden, inter, qkv = spec.hidden_size, spec.intermediate_size, spec.q_size + 2 * spec.kv_size
    pair = 2 if spec.gated else 1
    whole_heads = spec.num_kv_heads % plan.groups == 0 and spec.qk_norm != "full"
    attention = plan.groups if plan.group_attention and whole_heads else 1
    mlp = plan.groups if plan.group_mlp else 1
    inner = _round_up(-(-inter // mlp), 4) if mlp > 1 else inter
    # A group's rows of a matrix, its columns, and the number of groups that have their own.
    parts = {
        "qkv": (qkv // attention, hidden, attention),
        "o": (hidden, spec.q_size // attention, attention),
        "gate_up": (inner * pair, hidden, mlp),
        "down": (hidden, inner, mlp),
        "head": (spec.vocab_size, hidden, 1),
    }
    shapes = {p: (_round_up(rows, plan.tile_rows) * n, cols) for p, (rows, cols, n) in parts.items()}
    group, align, chunk_atoms = 0, 1, plan.chunk_atoms
    if plan.wave_size == 32:
        times = {p: 1 if p == "head" else spec.num_layers for p in shapes}
        group = _group_atoms([(times[p] * r, -(-c // atom_cols)) for p, (r, c) in shapes.items()], plan.waves)
        align = group * plan.waves
        chunk_atoms = max(1, plan.chunk_atoms // align) * align
    chunk_cols = atom_cols * chunk_atoms
    padded = {p: (_round_up(r, plan.tile_rows), _round_up(c, atom_cols * align)) for p, (r, c) in shapes.items()}
    tiles = {p: r // plan.tile_rows for p, (r, _) in padded.items()}
    width = {p: c for p, (_, c) in padded.items()}

    # A phase takes as long as its busiest unit, so tiles are dealt evenly; those left over go to units that have least
    # so far. Without groups, rows of o and down are the same residuals: one deal.
    load = [0] * plan.units
    if plan.groups == 1:
        counts = {"o": _deal_tiles(tiles["o"], width["o"] + width["down"], load, plan)}
        counts["down"] = counts["o"]
    else:
        counts = {phase: _deal_tiles(tiles[phase], width[phase], load, plan) for phase in ("down", "o")}
    for phase in ("gate_up", "qkv"):
        counts[phase] = _deal_tiles(tiles[phase], width[phase], load, plan)
        if tiles[phase] < plan.groups:  # who reads what a group adds up must be waited for (docs/kernel.md)
            raise ValueError(f"{phase} has {tiles[phase]} tiles, too few for {plan.groups} groups")
    # With post-norms every unit with a part of the head follows the residual stream through all layers. Others wait
    # only for units that give them something in each layer, so it must be one of those.
    among = [u for u in range(plan.units) if not spec.post_norm or counts["gate_up"][u] + counts["qkv"][u] > 0]
    counts["head"] = _deal_tiles(tiles["head"], width["head"], load, plan, among)

    matrices = {
        p: Matrix(*padded[p], tiles[p], tuple(np.cumsum([0, *counts[p]]).tolist()), (0,) * plan.units) for p in PHASES
    }
    # Atoms of each stream, [units, waves].
    lengths = np.zeros((plan.units, plan.waves), np.int64)
    for p in PHASES:
        deal = chunks(width[p], atom_cols, chunk_cols, plan.waves)
        of_row = np.array([[end - begin for begin, end in chunk] for chunk in deal]).sum(axis=0)
        lengths += np.outer(counts[p], of_row) * (1 if p == "head" else spec.num_layers)
    spare = group  # a unit without tiles reads a slot all the same
    if not group:
        # Runs are as they happen to be, so streams are rounded up, and each has the slot that its wave reads.
        lengths = np.maximum(1, -(-lengths // SLOT_ATOMS)) * SLOT_ATOMS
    wave_begin = tuple((np.cumsum([0, *lengths.reshape(-1)]) * plan.wave_size * vector).tolist())
    return _with_constants(
        spec,
        k_group=1,
        matrices=matrices,
        layer_elems=0,
        unit_elems=0,
        unit_begin=wave_begin[:: plan.waves],
        wave_begin=wave_begin,
        stream_shape=(wave_begin[-1] + spare * plan.wave_size * vector,),
        atom_cols=atom_cols,
        group_atoms=group,
        chunk_cols=chunk_cols,
        attention_groups=attention,
        mlp_groups=mlp,
        inner_cols=inner,
    )


def _group_atoms(weights: Sequence[tuple[int, int]], waves: int) -> int:
    """Atoms of a slot where all waves of a unit have the same to do: rows are padded to whole slots of all waves.

    A turn of a wave at its ring costs it about as much as a tenth of an atom takes to arrive.

    Args:
      weights: rows of each matrix in all layers, and atoms of a row.
      waves: stream waves of a unit.
    """

    def cost(group: int) -> float:
        return sum(rows * _round_up(atoms, waves * group) for rows, atoms in weights) * (1 + 0.1 / group)

    return min((4, 3, 2, 1), key=cost)


def _deal_tiles(tiles: int, cost: int, load: list[int], plan: Plan, among: Sequence[int] | None = None) -> list[int]:
    """Deals tiles evenly among groups, in neighbouring runs, and then among the units of each; see `_deal_least`."""
    among = range(plan.units) if among is None else among
    counts = [0] * plan.units
    for group, (begin, end) in enumerate(itertools.pairwise(_deal(tiles, plan.groups))):
        dealt = _deal_least(end - begin, cost, load, [u for u in among if u // plan.members == group])
        counts = [a + b for a, b in zip(counts, dealt, strict=True)]
    return counts


def _deal_least(tiles: int, cost: int, load: list[int], among: Sequence[int]) -> list[int]:
    """Deals tiles evenly among some units; those left over to the units with the least load.

    Adds the cost of all to the load.
    """
    counts = [0] * len(load)
    for place, u in enumerate(sorted(among, key=lambda u: (load[u], u))):
        counts[u] = tiles // len(among) + (place < tiles % len(among))
        load[u] += counts[u] * cost
    return counts


@functools.lru_cache(maxsize=64)
def attention_tasks(spec: DecoderSpec, plan: Plan, batch: int, capacity: int) -> tuple[int, int]:
    """How attention is cut into tasks on a GPU: (parts of the context, query heads of a task).

    Depends on the cache's capacity and not on the tokens in it, so that decoding N and then M tokens adds up scores in
    the same order as N + M at once.
    """
    group = spec.num_heads // spec.num_kv_heads
    most = 1 if capacity <= WHOLE_CONTEXT else -(-capacity // SPLIT_POSITIONS)
    choices = {}
    for heads in (h for h in range(_most_heads(group, spec.head_dim), 0, -1) if group % h == 0):
        tasks = spec.num_heads // heads * batch
        parts = max(1, min(plan.units // tasks, most))
        choices[parts, heads] = tasks * parts / -(-tasks * parts // plan.units)  # units that attend, on average
    # Query heads together read a key once; but that units idle costs more.
    return next(cut for cut, units in choices.items() if units >= 0.9 * max(choices.values()))


def _most_heads(group: int, head_dim: int) -> int:
    """Query heads that share the loads of a key: what registers and, on AMD, shared memory have room for."""
    return next(h for h in (4, 3, 2, 1) if group % h == 0 and (h == 1 or h * head_dim <= 1024))


WHOLE_CONTEXT = 256  # positions of cache up to which the context is not split: joining parts takes a hand-off
SPLIT_POSITIONS = 128  # fewest positions worth a part
