"""How a decode is laid over a device: the geometry that packing and the kernels share.

Nothing here depends on weights. A `Plan` is small, hashable and static; `Geometry` is what follows from it and a spec.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from typing import Literal, get_args

import numpy as np

from jax_monokernel.spec import DecoderSpec
from jax_monokernel.weights import layer_shapes

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How weights are cut and ordered for one kind of device."""

    platform: Platform
    units: int  # execution units (CPU threads, GPU multiprocessors or compute units); each has its own weight stream
    tile_rows: int = 16  # matrix rows whose products a unit accumulates side by side

    def __post_init__(self) -> None:
        if self.platform not in get_args(Platform):
            raise ValueError(f"Plan.platform is {self.platform!r}; expected one of {get_args(Platform)}")
        if not 1 <= self.units <= 4096:
            raise ValueError(f"Plan.units is {self.units}; expected 1 to 4096")
        if self.tile_rows != 16:
            raise ValueError(f"Plan.tile_rows is {self.tile_rows}; the kernels here are built for 16")


def make_plan(spec: DecoderSpec, *, platform: Platform = "cpu", units: int | None = None) -> Plan:
    """The default plan for `spec` on a platform.

    Args:
      platform: where decode will run.
      units: execution units to cut the weights for. By default, on the CPU: `MONOKERNEL_THREADS` if set, else the CPUs
        this process may use, but no more than the smallest matrix has row tiles.

    Raises:
      ValueError: units out of range, or needed and not given.
    """
    if units is None:
        if platform != "cpu":
            raise ValueError(f"a plan for {platform} needs units=, the number of multiprocessors or compute units")
        units = _default_threads(spec)
    return Plan(platform=platform, units=units)


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
        except (OSError, ValueError):
            continue
    return max(1, cpus)


@dataclasses.dataclass(frozen=True)
class Matrix:
    """One phase's matrix as it lies in the tape: tiles of `tile_rows` rows, dealt to units in contiguous runs."""

    rows: int  # including padding to whole tiles
    cols: int  # including padding to a whole number of k-groups
    tiles: int  # per layer; for gate_up a gate tile is followed by its up tile and both go to the same unit
    begin: tuple[int, ...]  # [units + 1]; unit u holds tiles begin[u] to begin[u + 1] - 1
    offset: tuple[int, ...]  # [units], in elements: from the start of the layer, or of the unit for the head

    @property
    def tile_elems(self) -> int:
        """Elements of one tile."""
        return self.rows // self.tiles * self.cols


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Sizes and offsets that follow from a spec and a plan, in elements of their arrays."""

    k_group: int  # neighbouring columns kept together: 2 for bf16, whose dot-product instructions take pairs
    matrices: dict[str, Matrix]
    layer_elems: int  # one layer of one unit's stream
    unit_elems: int  # one unit's stream: every layer, then its part of the head
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

    vectors = layer_shapes(spec)
    offsets, size = {}, 0
    for role in VECTOR_ROLES:
        offsets[role] = size if role in vectors else -1
        size += int(np.prod(vectors.get(role, (0,))))
    inv_freq_rows = sum(2 if rope.scaling == "longrope" else 1 for rope in spec.ropes)
    before = hidden + inv_freq_rows * (spec.rotary_dim // 2)
    return Geometry(
        k_group=k_group,
        matrices=matrices,
        layer_elems=layer_elems,
        unit_elems=_round_up(max(fill), 32),
        vector_offset=offsets,
        final_norm_offset=0,
        inv_freq_offset=hidden,
        layer_constants_offset=before,
        layer_constants=size,
        constants=before + size * spec.num_layers,
    )
