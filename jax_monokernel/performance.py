"""How long a token should take: a model of the GPU kernel, from a spec, a kind of plan and a topology's constants.

A layer has a chain of waits and a stream of weights, which overlap, but not wholly:

    chain  = sum of phases (multiply + publish + hand-off + gather) + attention
    stream = bytes / rate
    layer  = (chain^n + stream^n)^(1/n)
    token  = layers * layer + head

`Calibration` holds what one phase of work takes; its defaults were fitted to fourteen measurements on H200s by
benchmarks/calibration.py (docs/performance.md says how well). For other devices they are a guess, and only the
topology's constants are the device's own.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from jax_monokernel.plan import Plan, attention_tasks, geometry, make_plan
from jax_monokernel.topology.model import Topology

if TYPE_CHECKING:
    from jax_monokernel.spec import DecoderSpec

__all__ = ["Calibration", "Phase", "Prediction", "predict"]

Kind = Literal["flat", "hierarchical"]
_BLOCK = 64  # positions that are dealt to a part of the context together (kSplitBlock of the kernel)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """Parts of the work that a topology does not say. Microseconds and GB/s."""

    consume_gb_s: float = 399.0  # weights that a unit multiplies when they are in its ring
    multiply_us: float = 0.3995  # of a phase beside that: first products, sums of waves
    publish_us: float = 0.2484
    gather_gb_s: float = 16.90  # activations that a unit gathers, as they travel, all requests of a batch together
    heads_us: float = 0.2206  # until an attention task's heads are prepared
    round_us: float = 1.069  # of attention, beyond the first one: what a unit's waves look at together
    combine_us: float = 5.870  # of the parts of a context, beside their hand-off
    squares_us: float = 0.919  # of a norm whose sums of squares are a hand-off: with several requests on NVIDIA
    head_us: float = 15.30  # of the LM head beside its stream, the choice of a token and the start of the next
    load_factor: float = 0.8296  # hand-offs in the kernel over those of idle memory
    exponent: float = 1.911  # n above: 1 adds chain and stream, infinity hides the shorter one


@dataclasses.dataclass(frozen=True)
class Phase:
    """One phase of a layer, or the head. Microseconds."""

    name: str
    bytes: int  # of weights
    multiply_us: float
    publish_us: float
    hand_off_us: float  # until a unit has all that it multiplies with

    @property
    def chain_us(self) -> float:
        """Its part of the chain of waits."""
        return self.multiply_us + self.publish_us + self.hand_off_us


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Where the time of a token goes. Microseconds."""

    kind: Kind
    phases: tuple[Phase, ...]  # of a layer
    attention_us: float
    stream_us: float  # of a layer's weights
    layer_us: float
    head_us: float
    layers: int

    @property
    def chain_us(self) -> float:
        """A layer's chain of waits."""
        return self.attention_us + sum(p.chain_us for p in self.phases)

    @property
    def token_us(self) -> float:
        """One token."""
        return self.layers * self.layer_us + self.head_us


def predict(
    spec: DecoderSpec,
    topology: Topology,
    kind: Kind = "flat",
    *,
    batch: int = 1,
    context: int = 96,
    capacity: int = 160,
    calibration: Calibration | None = None,
    loaded: bool = False,
    local_before: float = 0.0,
    local_after: float = 0.0,
) -> Prediction:
    """The time of a token of every request of a batch.

    Flat: every unit holds rows of every matrix; five chip-wide hand-offs a layer. Hierarchical: every group holds whole
    heads and a part of the inner width; two chip-wide hand-offs a layer, after attention's output and after the MLP, in
    which each unit adds up a part of all groups' partial sums and hands it on inside its group, and the others inside
    groups. Where KV heads cannot be dealt evenly to the groups, attention is chip-wide there too, with two more.

    Args:
      spec: the model.
      topology: the device; needs `stream_device_gb_s` and either `gather_us` or `hand_off_across_groups_us`.
      kind: of plan.
      batch: requests.
      context: positions that a request attends to.
      capacity: of its KV cache, which decides how attention is cut.
      calibration: the rest of the work.
      loaded: take chip-wide hand-offs as they were measured while all units read, instead of `load_factor`.
      local_before: share of reads that is near without placement, `Placement.local_before`.
      local_after: and with it; equal values stand for no placement.

    Raises:
      ValueError: a constant that is missing, naming it.
    """
    c = calibration or Calibration()
    across, inside = _hand_offs(topology, c, loaded)
    rate = _rate(topology, local_before, local_after)
    units = topology.units
    flat = kind == "flat"
    plan = _plan(spec, topology, 1 if flat else max(1, len(topology.groups())))
    itemsize = 4 if spec.dtype == "float32" else 2
    geo = geometry(spec, plan)
    sizes = {name: m.rows * m.cols * itemsize for name, m in geo.matrices.items()}
    groups, attention_groups, hidden = plan.groups, geo.attention_groups, spec.hidden_size
    attended = inside if attention_groups > 1 else across

    def sums(parts: int) -> int:  # words that a unit gathers where each has added up its share of `parts` partial sums
        return hidden if groups == 1 else hidden + parts * hidden * groups // units

    # What a unit gathers for a phase, and how long the first word takes.
    added = across if groups == 1 else across + inside
    gathers = {
        "qkv": (sums(geo.mlp_groups), added),
        "o": (spec.q_size // attention_groups, attended),
        "gate_up": (sums(attention_groups), added),
        "down": (geo.inner_cols, inside if geo.mlp_groups > 1 else across),
    }
    packed = plan.platform == "cuda" and groups == 1 and batch > 1 and spec.dtype != "float16" and not spec.post_norm
    element = itemsize if packed else 4
    phases = []
    for name, (values, wait) in gathers.items():
        hand_off = wait + batch * values * element / c.gather_gb_s / 1e3
        multiply = sizes[name] / units / c.consume_gb_s / 1e3 + c.multiply_us
        if packed and name in ("qkv", "gate_up"):
            hand_off += c.squares_us
        phases.append(Phase(name, sizes[name], multiply, c.publish_us, hand_off))
    attention = _attention(spec, plan, batch, context, capacity, attended, c)
    stream = sum(p.bytes for p in phases) / rate / 1e3
    chain = attention + sum(p.chain_us for p in phases)
    layer = (chain**c.exponent + stream**c.exponent) ** (1 / c.exponent)
    head = sizes["head"] / rate / 1e3 + c.head_us
    return Prediction(kind, tuple(phases), attention, stream, layer, head, spec.num_layers)


def _plan(spec: DecoderSpec, topology: Topology, groups: int) -> Plan:
    if topology.platform == "rocm":
        return Plan(platform="rocm", units=topology.units, groups=groups)
    return make_plan(spec, platform="cuda", units=topology.units, groups=groups)


LEAST_GAIN = 0.05  # of the time of a token, that a plan with groups must be predicted to save: the model errs by 6%


def choose_groups(
    spec: DecoderSpec,
    topology: Topology,
    *,
    batch: int = 1,
    context: int = 96,
    capacity: int = 160,
    calibration: Calibration | None = None,
    loaded: bool = False,
) -> int:
    """Groups of the plan for a device: those of its topology if `predict` finds them faster by `LEAST_GAIN`, else 1.

    Also 1 on NVIDIA's devices, where groups were measured to be slower (docs/performance-log.md), where groups are not
    equally large or the model cannot be dealt to them, and where constants are missing.

    Args:
      spec: the model.
      topology: the device.
      batch, context, capacity, calibration, loaded: as for `predict`.
    """
    groups = topology.groups()
    if topology.platform != "rocm" or len(groups) < 2 or len({len(g.all_units()) for g in groups}) > 1:
        return 1
    common: dict[str, Any] = {
        "batch": batch, "context": context, "capacity": capacity, "calibration": calibration, "loaded": loaded
    }  # fmt: skip
    try:
        flat, grouped = (predict(spec, topology, kind, **common).token_us for kind in get_args(Kind))
    except ValueError:
        return 1
    return len(groups) if grouped < flat * (1 - LEAST_GAIN) else 1


def _attention(
    spec: DecoderSpec, plan: Plan, batch: int, context: int, capacity: int, hand_off: float, c: Calibration
) -> float:
    """From the words of q, k and v to those of the attended values, both hand-offs' waits but one."""
    splits, heads = attention_tasks(spec, plan, batch, capacity)
    positions = min(context, -(-context // _BLOCK // splits) * _BLOCK) if splits > 1 else context
    kv_bytes = np.dtype(np.float32 if (spec.kv_dtype or spec.dtype) == "float32" else np.float16).itemsize
    lanes = min(plan.wave_size, 2 ** math.ceil(math.log2(max(1, spec.head_dim * kv_bytes / 16))))  # of a position
    together = plan.service_waves * plan.wave_size // lanes * 4
    turns = -(-batch * spec.num_heads // heads * splits // plan.units)
    rounds = turns * max(1.0, positions / together) - 1
    return c.heads_us + c.round_us * rounds + hand_off + (hand_off + c.combine_us if splits > 1 else 0.0)


def _hand_offs(topology: Topology, c: Calibration, loaded: bool) -> tuple[float, float]:
    """(chip-wide, inside a group), as in the kernel."""
    flag, flag_inside = topology.constant("hand_off_across_groups_us"), topology.constant("hand_off_in_group_us")
    idle = topology.constant("gather_us") or flag
    if idle is None:
        raise ValueError(f"the topology of {topology.name} says neither gather_us nor hand_off_across_groups_us")
    ratio = flag_inside / flag if flag and flag_inside else 1.0
    across, inside = idle * c.load_factor, idle * ratio * c.load_factor
    if loaded:
        found = topology.constant("hand_off_across_groups_loaded_us")
        if found is None:
            raise ValueError(f"the topology of {topology.name} does not say hand_off_across_groups_loaded_us")
        across = max(across, found)
        inside = max(inside, topology.constant("hand_off_in_group_loaded_us") or 0.0)
    return across, inside


def _rate(topology: Topology, before: float, after: float) -> float:
    rate = topology.constant("stream_device_gb_s")
    if rate is None:
        raise ValueError(f"the topology of {topology.name} does not say stream_device_gb_s")
    near = topology.constant("stream_device_near_gb_s")
    if near is None or after <= before:
        return rate
    return rate + (near - rate) * (after - before) / (1 - before)
