"""What `jax-monokernel topology --platform cpu --measure` does: hand-offs and rates of this machine's CPUs."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from jax_monokernel import _native
from jax_monokernel.topology import store
from jax_monokernel.topology.model import Constant, Topology

_PAIRS = 16  # of each kind, at most
_HOW = "jax-monokernel topology --platform cpu --measure"
_BYTES_EACH = 128 << 20  # that a thread reads
_NAMES = (
    "hand_off_in_group_us",
    "hand_off_across_groups_us",
    "stream_unit_gb_s",
    "stream_group_gb_s",
    "stream_device_gb_s",
)


def measure_host(topology: Topology, *, report: Callable[[str], None] = lambda text: None) -> Topology:
    """CPUs with what hand-offs between cores and reads of memory take: medians over some pairs, units and groups.

    Groups are those of an L3 cache. Nothing else should run meanwhile. What cannot be measured is left out.

    Args:
      topology: of this machine, from `host_topology`.
      report: is told what is being measured.
    """
    cores = [[core.units[0] for _, core in group.walk() if core.kind == "core"] for group in topology.groups()]
    inside = [pair for group in cores for pair in itertools.combinations(group, 2)]
    across = [pair for a, b in itertools.combinations(cores, 2) for pair in zip(a, b, strict=False)]
    rng = np.random.default_rng(0)
    values: dict[str, float] = {}
    report("hand-offs between cores")
    for name, pairs in (("hand_off_in_group_us", inside), ("hand_off_across_groups_us", across)):
        chosen = [pairs[i] for i in rng.permutation(len(pairs))[:_PAIRS].tolist()]
        times = [time for pair in chosen if (time := _hand_off_ns(*pair)) is not None]
        if times:
            values[name] = float(np.median(times)) / 1e3
    report("reads of memory")
    largest = max(cores, key=len)
    for name, cpus in (
        ("stream_unit_gb_s", largest[:1]),
        ("stream_group_gb_s", largest),
        ("stream_device_gb_s", list(itertools.chain(*cores))),
    ):
        with contextlib.suppress(MemoryError, OSError):
            values[name] = _rate_gb_s(cpus)
    constants = {name: Constant(round(value, 4), "measured", _HOW) for name, value in values.items()}
    return dataclasses.replace(topology, constants={**topology.constants, **constants})


def _hand_off_ns(cpu: int, other: int) -> float | None:
    try:
        return min(_native.ping_pong(cpu, other, 1000, 10))
    except (RuntimeError, ValueError):  # a CPU that is taken away, or busy
        return None


def _rate_gb_s(cpus: Sequence[int]) -> float:
    with _on(cpus):
        rates = _native.read_bandwidth(_BYTES_EACH * len(cpus), len(cpus), 7)
    return float(np.median(rates)) / 1e9


@contextlib.contextmanager
def _on(cpus: Sequence[int]) -> Iterator[None]:
    """This thread, and those that it starts, run on these CPUs."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


# ---- On disk ----


def _path(topology: Topology) -> Path | None:
    groups = json.dumps([group.all_units() for group in topology.groups()])
    return store.path_of(topology.name, topology.units, 0, f"{zlib.crc32(groups.encode()):08x}", "cpu")


def save_host(topology: Topology) -> Path | None:
    """Keeps the constants for `with_saved`. None if there is no folder that can be written."""
    path = _path(topology)
    values = {name: topology.constants[name].value for name in _NAMES if name in topology.constants}
    return None if path is None else store.write(path, {"version": store.VERSION, "constants": values})


def with_saved(topology: Topology) -> Topology:
    """CPUs with what was measured of these CPUs on a machine of this name, if it was."""
    path = _path(topology)
    data = None if path is None else store.read(path)
    values = data.get("constants") if isinstance(data, dict) else None
    if not isinstance(values, dict):
        return topology
    constants = {
        name: Constant(float(value), "measured", _HOW)
        for name, value in values.items()
        if name in _NAMES and isinstance(value, int | float)
    }
    return dataclasses.replace(topology, constants={**topology.constants, **constants})
