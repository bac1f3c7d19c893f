"""How long a token should take: a model of the GPU kernel, from a spec, a kind of plan and a topology's constants.

A layer has a chain of waits and a stream of weights, which overlap, but not wholly:

    chain  = sum of phases (multiply + publish + hand-off) + attention
    stream = bytes / rate
    layer  = max(chain, stream) + overlap_loss * min(chain, stream)
    token  = layers * layer + head

`Calibration` holds what one phase of work takes; its defaults were fitted to three models on one H200 (batch 1, context
of about 100; docs/performance.md says how well). For other devices they are a guess, and only the topology's constants
are the device's own.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

from jax_monokernel.topology.model import Topology

if TYPE_CHECKING:
    from jax_monokernel.spec import DecoderSpec

Kind = Literal["flat", "hierarchical"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """Parts of the work that a topology does not say. Microseconds and GB/s."""

    consume_gb_s: float = 184.0  # weights that a unit multiplies when they are in its ring
    multiply_us: float = 0.4  # of a phase beside that: first products, sums of waves
    publish_us: float = 0.3
    attention_us: float = 2.7  # at short context: heads prepared, scores, values, sums
    load_factor: float = 1.37  # hand-offs in the kernel over those of idle memory
    words_us: float = 0.11  # a gather for each 1,024 values of 16 bits above 3,072
    head_us: float = 2.0  # candidates and the choice of a token
    overlap_loss: float = 0.4  # of the shorter of chain and stream that the longer does not hide


@dataclasses.dataclass(frozen=True)
class Phase:
    """One phase of a layer, or the head. Microseconds."""

    name: str
    bytes: int  # of weights
    multiply_us: float
    publish_us: float
    hand_off_us: float  # until all readers have what it published

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
    calibration: Calibration | None = None,
    loaded: bool = False,
    local_before: float = 0.0,
    local_after: float = 0.0,
) -> Prediction:
    """The time of a token, batch 1 and short context.

    Flat: every unit holds rows of every matrix; five chip-wide hand-offs a layer. Hierarchical: every group holds whole
    heads and a part of the inner width; two chip-wide hand-offs a layer, after attention's output and after the MLP, in
    which readers add one partial sum of each group in f32, and the others inside groups.

    Args:
      spec: the model.
      topology: the device; needs `stream_device_gb_s` and either `gather_us` or `hand_off_across_groups_us`.
      kind: of plan.
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
    itemsize = 4 if spec.dtype == "float32" else 2
    pair = 2 if spec.gated else 1
    groups = max(1, len(topology.groups()))
    partial = 2 * groups * spec.hidden_size  # f32 sums of all groups, in values of 16 bits
    # (name, weights, values that readers gather afterwards, whether readers are in the same group)
    shapes = (
        ("qkv", (spec.q_size + 2 * spec.kv_size) * spec.hidden_size, spec.q_size + 2 * spec.kv_size, True),
        ("o", spec.hidden_size * spec.q_size, spec.hidden_size, False),
        ("gate_up", pair * spec.intermediate_size * spec.hidden_size, spec.intermediate_size, True),
        ("down", spec.hidden_size * spec.intermediate_size, spec.hidden_size, False),
    )
    phases = []
    for name, weights, values, same_group in shapes:
        size = weights * itemsize
        if kind == "flat":
            hand_off = across + _volume(values, c)
        elif same_group:
            hand_off = inside + _volume(values // groups, c)
        else:
            hand_off = across + _volume(partial, c)
        multiply = size / units / c.consume_gb_s / 1e3 + c.multiply_us
        phases.append(Phase(name, size, multiply, c.publish_us, hand_off))
    attended = (across if kind == "flat" else inside) + _volume(spec.q_size // (1 if kind == "flat" else groups), c)
    attention = c.attention_us + attended
    stream = sum(p.bytes for p in phases) / rate / 1e3
    chain = attention + sum(p.chain_us for p in phases)
    head = spec.vocab_size * spec.hidden_size * itemsize / rate / 1e3 + c.head_us
    return Prediction(
        kind,
        tuple(phases),
        attention,
        stream,
        max(chain, stream) + c.overlap_loss * min(chain, stream),
        head,
        spec.num_layers,
    )


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


def _volume(values: int, c: Calibration) -> float:
    """What a gather of many values takes more than one of few."""
    return max(0, values - 3072) / 1024 * c.words_us
