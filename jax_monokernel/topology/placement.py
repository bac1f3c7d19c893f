"""Which page of a tape lies where, so that units read from the memory that is near them.

Pure functions of a tape's layout and of where pages live. `pack_near` uses them (docs/topology.md).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from jax_monokernel._gpu_tape import PAGE_BYTES
from jax_monokernel.plan import Plan, geometry, make_plan
from jax_monokernel.topology.model import Topology

if TYPE_CHECKING:
    from jax_monokernel.spec import DecoderSpec
    from jax_monokernel.topology.discover import Found

LEAST_GAIN = 1.02  # of reads from near memory over reads from all of it, below which nothing is moved


@dataclasses.dataclass(frozen=True)
class Placement:
    """An order of pages, and what it is worth."""

    order: np.ndarray | None  # int32 [pages]: the place of each page of the tape; None: every page stays where it is
    local_before: float  # share of the traffic that stays in its own domain with every page where it is
    local_after: float  # and with this order
    reason: str

    def source(self) -> np.ndarray | None:
        """The inverse of `order`: which page of the tape lies at each place. None: every page stays where it is."""
        if self.order is None:
            return None
        inverse = np.empty_like(self.order)
        inverse[self.order] = np.arange(len(self.order), dtype=self.order.dtype)
        return inverse

    def describe(self) -> str:
        """One line."""
        if self.order is None:
            known = 0 < self.local_before < 1  # neither one domain, nor homes that nobody knows
            share = f", traffic {_shares(self.local_before)}" if known else ""
            return f"pages stay where they are{share}: {self.reason}"
        return f"traffic {_shares(self.local_before)} -> {_shares(self.local_after)}: {self.reason}"


def page_traffic(
    spec: DecoderSpec, plan: Plan, near: np.ndarray, domains: int, page_bytes: int = PAGE_BYTES
) -> np.ndarray:
    """Bytes of each page of a tape's streams that units near each memory domain read in one token.

    Args:
      spec: the model.
      plan: how it is cut.
      near: int [plan.units]: the memory domain that is near each unit.
      domains: how many there are.
      page_bytes: bytes of a page.

    Returns:
      float [pages, domains]. Streams stand one after the other, and every unit reads its own once.

    Raises:
      ValueError: not one domain for each unit.
    """
    near = np.asarray(near)
    if near.shape != (plan.units,) or (near < 0).any() or (near >= domains).any():
        raise ValueError(f"near must have one of {domains} domains for each of the {plan.units} units")
    itemsize = 4 if spec.dtype == "float32" else 2
    geo = geometry(spec, plan)
    traffic = np.zeros((-(-math.prod(geo.stream_shape) * itemsize // page_bytes), domains))
    for unit, (begin, end) in enumerate(itertools.pairwise(n * itemsize for n in geo.unit_begin)):
        if begin == end:
            continue
        first, last = begin // page_bytes, (end - 1) // page_bytes
        traffic[first : last + 1, near[unit]] += page_bytes
        traffic[first, near[unit]] -= begin - first * page_bytes
        traffic[last, near[unit]] -= (last + 1) * page_bytes - end
    return traffic


def place(traffic: np.ndarray, homes: np.ndarray) -> Placement:
    """Orders pages so that as much traffic as possible stays in its own domain.

    A page that lies in the domain where most of its readers are stays. Others go to the free places of that domain, in
    order, as far as these reach; those left over take the places left over, in order. So the same arguments give the
    same result, and no page moves without need. If that would not keep more traffic local, nothing moves.

    Args:
      traffic: float [pages, domains] bytes that units near a domain read of a page.
      homes: int [pages] domain of each place; -1: unknown, and local to nobody.

    Raises:
      ValueError: not one home for each page, or a home that is no domain.
    """
    traffic = np.asarray(traffic, float)
    homes = np.asarray(homes)
    pages, domains = traffic.shape
    if homes.shape != (pages,) or (homes < -1).any() or (homes >= domains).any():
        raise ValueError(f"homes must have one of {domains} domains, or -1, for each of the {pages} pages")
    before = _local(traffic, homes)
    wanted = np.where(traffic.sum(axis=1) > 0, traffic.argmax(axis=1), -1)
    order = np.full(pages, -1, np.int32)
    taken = np.zeros(pages, bool)
    stays = (wanted == homes) & (homes >= 0)
    order[stays] = np.flatnonzero(stays)
    taken |= stays
    for d in range(domains):
        moving = np.flatnonzero((wanted == d) & (order < 0))
        # The pages that are read most come first where places are too few.
        moving = moving[np.argsort(-traffic[moving, d], kind="stable")]
        free = np.flatnonzero((homes == d) & ~taken)
        count = min(len(moving), len(free))
        order[np.sort(moving[:count])] = free[:count]
        taken[free[:count]] = True
    left = np.flatnonzero(order < 0)
    stay = left[~taken[left]]  # their own place is free
    order[stay] = stay
    taken[stay] = True
    order[order < 0] = np.flatnonzero(~taken)
    after = _local(traffic, homes[order])
    if after <= before:
        return Placement(None, before, before, "no order keeps more traffic local")
    moved = int(np.count_nonzero(order != np.arange(pages)))
    return Placement(order, before, after, f"{moved} of {pages} pages move")


def place_tape(
    spec: DecoderSpec, plan: Plan, topology: Topology, homes: np.ndarray, *, unit_of: np.ndarray | None = None
) -> Placement:
    """The order of a tape's pages on a device, if the probe has shown there that near memory is faster.

    Args:
      spec: the model.
      plan: how it is cut; of as many units as `unit_of` or the topology has.
      topology: the device, as measured.
      homes: int [pages] domain of each 4 KiB of the memory that the tape's streams have; -1: unknown.
      unit_of: int [plan.units] where each of the plan's units runs, as a unit of the topology; by default as numbered.

    Raises:
      ValueError: homes or units that do not fit.
    """
    reason = why_not(topology)
    near_of = topology.near_domain()
    places = np.arange(plan.units) if unit_of is None else np.asarray(unit_of)
    try:
        near = np.array([near_of[int(u)] for u in places])
    except KeyError as error:
        raise ValueError(f"{topology.name} has no unit {error}; say with unit_of where units run") from None
    traffic = page_traffic(spec, plan, near, len(topology.domains))
    if len(homes) != len(traffic):
        raise ValueError(f"the tape has {len(traffic)} pages, and there are homes of {len(homes)}")
    if reason is not None:
        share = _local(traffic, np.asarray(homes))
        return Placement(None, share, share, reason)
    # A last page that is not whole cannot change places with others.
    itemsize = 4 if spec.dtype == "float32" else 2
    whole = math.prod(geometry(spec, plan).stream_shape) * itemsize // PAGE_BYTES
    placed = place(traffic[:whole], np.asarray(homes)[:whole])
    if whole == len(traffic):
        return placed
    order = None if placed.order is None else np.append(placed.order, np.int32(whole))
    before, after = (
        _local(traffic, np.asarray(homes)[o]) for o in (slice(None), slice(None) if order is None else order)
    )
    return Placement(order, before, after, placed.reason)


def report(spec: DecoderSpec, found: Found) -> str:
    """What placement would be worth for a model on a device, if its tape lay as the probe's memory did: one line."""
    topology, m = found.topology, found.measurement
    plan = make_plan(spec, platform=topology.platform, units=topology.units, groups=1)
    ranks = np.array(topology.root.all_units())  # CPUs have the system's numbers
    near_of = topology.near_domain()
    pages = len(page_traffic(spec, plan, np.array([near_of[int(u)] for u in ranks]), len(topology.domains)))
    homes = np.full(pages, -1)
    if m is not None and m.block_bytes == PAGE_BYTES:
        homes = np.resize(m.homes, pages)
    if len(topology.domains) == 1:
        homes = np.zeros(pages, int)
    return place_tape(spec, plan, topology, homes, unit_of=ranks).describe()


def why_not(topology: Topology) -> str | None:
    """Why an order of pages is of no use on a device; None if the probe says that it is."""
    if len(topology.domains) < 2:
        return "all memory is equally far"
    if topology.interleave.basis != "measured":
        return "the device was not measured (jax-monokernel topology --measure)"
    if topology.interleave.granule_bytes < PAGE_BYTES:
        return f"memory is interleaved by {topology.interleave.granule_bytes} bytes, finer than a page"
    near, mixed = topology.constant("stream_device_near_gb_s"), topology.constant("stream_device_gb_s")
    if near is None or mixed is None:
        return "how fast near memory is read was not measured"
    if near < LEAST_GAIN * mixed:
        rates = f"all units read {near:,.0f} GB/s from it and {mixed:,.0f} from all memory"
        return f"near memory is not faster by {LEAST_GAIN - 1:.0%}: {rates}"
    return None


def apply_order(pages: Any, placement: Placement) -> Any:
    """Moves pages, [pages, ...], to their places. Works on numpy's and JAX's arrays; jittable."""
    source = placement.source()
    return pages if source is None else pages[source]


def undo_order(pages: Any, placement: Placement) -> Any:
    """The inverse of `apply_order`."""
    return pages if placement.order is None else pages[placement.order]


def _shares(local: float) -> str:
    return f"local {local:.1%}, remote {1 - local:.1%}"


def _local(traffic: np.ndarray, homes: np.ndarray) -> float:
    """Share of the traffic that stays in its own domain, if page i lies in homes[i]."""
    known = homes >= 0
    total = traffic.sum()
    return float(traffic[np.flatnonzero(known), homes[known]].sum() / total) if total > 0 else 1.0
