"""Weights packed near the units that read them, on a device where the probe has found that this is faster."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jax_monokernel._gpu_tape import PAGE_BYTES, PLACE_BYTES, page_count
from jax_monokernel._packing import pack_jitted, pack_over
from jax_monokernel.plan import Plan, make_plan
from jax_monokernel.spec import DecoderSpec
from jax_monokernel.tape import DIES, Tape
from jax_monokernel.topology.discover import Found, discover, page_homes
from jax_monokernel.topology.measurement import Measurement
from jax_monokernel.topology.placement import Placement, place_tape, why_not
from jax_monokernel.weights import DecoderWeights


def pack_near(
    spec: DecoderSpec, weights: DecoderWeights, plan: Plan | None = None, *, found: Found | None = None
) -> tuple[Tape, Placement]:
    """Packs weights, each page near the units that will read it: `pack` for a GPU on which that is faster.

    Memory is taken first, the homes of its pages are looked up, which takes the device for itself for a moment, and the
    weights are packed into it. The tape is used as any other. What is not local then is in the placement. Where
    placing does not pay or cannot be, this is `pack`, and the placement says why.

    Args:
      spec: the model.
      weights: its weights, on one device.
      plan: device geometry; `make_plan(spec)` by default.
      found: the device; by default what `discover` knows of it.

    Raises:
      ValueError: weights that do not fit the spec, or no such device.
      RuntimeError: what the device or its driver said when homes were looked for.
    """
    plan = make_plan(spec) if plan is None else plan
    if (pages := page_count(spec, plan)) == 0:
        return _as_it_is(spec, weights, plan, f"units on {plan.platform} read larger pieces than pages")
    devices = {d for leaf in jax.tree.leaves(weights) if isinstance(leaf, jax.Array) for d in leaf.devices()}
    device = min(devices, key=lambda d: d.id, default=None)
    found = found or discover(plan.platform, 0 if device is None else device.local_hardware_id or 0)
    reason = _cannot(plan, found) or ("the weights are on several devices" if len(devices) > 1 else None)
    if reason is not None:
        return _as_it_is(spec, weights, plan, reason)
    assert found.measurement is not None

    dtype = jnp.dtype(spec.dtype)
    memory = jnp.zeros((pages + 1, PAGE_BYTES // dtype.itemsize), dtype, device=device)
    address = memory.block_until_ready().unsafe_buffer_pointer()
    homes = page_homes(memory, found)[:pages]
    die_units, unit_of = deal_units(found.measurement)
    placement = place_tape(spec, plan, found.topology, homes, unit_of=unit_of)
    if placement.order is None:
        del memory
        return pack_jitted(spec, weights, plan), placement
    # XLA's arrays begin at multiples of 256 bytes, homes at pages.
    begins = placement.order * (PAGE_BYTES // PLACE_BYTES) + -address % PAGE_BYTES // PLACE_BYTES
    table, units = (jax.device_put(x.astype(np.int32), device) for x in (begins, die_units))
    tape = pack_over(spec, weights, plan, (memory,), table, units)
    if tape.streams.unsafe_buffer_pointer() != address:
        del tape
        return _as_it_is(spec, weights, plan, "XLA did not pack the weights into the memory that was looked at")
    return tape, placement


def deal_units(measurement: Measurement) -> tuple[np.ndarray, np.ndarray]:
    """A plan's units on the XCDs of a device that was measured, as the kernel of a placed tape deals them.

    Returns:
      int [16]: units of each XCD, by XCC_ID. And int [units]: for each of the plan's units, a unit of the topology that
      is near the same memory as the XCD where it runs: on which compute unit of it is not known.
    """
    dies = np.array([place.xcc for place in measurement.places])
    counts = np.bincount(dies, minlength=DIES)
    unit_of = []
    for die in np.flatnonzero(counts):
        units = np.flatnonzero(dies == die)
        near = measurement.domains[units]
        unit_of.append(np.resize(units[near == np.bincount(near).argmax()], len(units)))
    return counts, np.concatenate(unit_of)


def _as_it_is(spec: DecoderSpec, weights: DecoderWeights, plan: Plan, reason: str) -> tuple[Tape, Placement]:
    return pack_jitted(spec, weights, plan), Placement(None, float("nan"), float("nan"), reason)


def _cannot(plan: Plan, found: Found) -> str | None:
    """Why the device is not one to place pages on; None if it is."""
    topology, measurement = found.topology, found.measurement
    if measurement is None or topology.platform != plan.platform:
        return "the device was not measured (jax-monokernel topology --measure)"
    if (reason := why_not(topology)) is not None:
        return reason
    if plan.units != topology.units:
        return f"the plan has {plan.units} units and the device {topology.units}"
    if any(not 0 <= place.xcc < DIES for place in measurement.places):
        return f"the device has XCDs of other numbers than 0 to {DIES - 1}"
    return None
