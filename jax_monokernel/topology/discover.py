"""Which device is here, and what is known of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jax_monokernel import _gpu, _native
from jax_monokernel._gpu_tape import PAGE_BYTES
from jax_monokernel.plan import Platform
from jax_monokernel.topology import store
from jax_monokernel.topology.host import host_topology
from jax_monokernel.topology.measure import MEMORY_BYTES, homes_of_pages, measure
from jax_monokernel.topology.measurement import Measurement, topology_of
from jax_monokernel.topology.model import Topology
from jax_monokernel.topology.parts import part_for


@dataclasses.dataclass(frozen=True)
class Found:
    """A device."""

    topology: Topology
    measurement: Measurement | None  # None: it was not measured with this driver


def gpus() -> list[tuple[Platform, int, dict[str, Any]]]:
    """(platform, ordinal, what the driver says of it) of the GPUs here, NVIDIA's first. Does not start JAX."""
    return _search()[0]


def _search() -> tuple[list[tuple[Platform, int, dict[str, Any]]], list[str]]:
    """The GPUs, and why there are no more."""
    _native.gpu_library_dirs(_gpu.library_dirs())
    platforms: tuple[Platform, ...] = ("cuda", "rocm")
    found: list[tuple[Platform, int, dict[str, Any]]] = []
    problems = []
    for platform in platforms:
        try:
            devices = _native.gpu_devices(platform)
        except (RuntimeError, ValueError) as error:  # no driver, or a device that kernels are not for
            problems.append(str(error))
            continue
        found += [(platform, i, device) for i, device in enumerate(devices)]
    return found, problems


def _pick(platform: Platform | None, device: int) -> tuple[Platform, int, dict[str, Any]] | None:
    """The GPU that is meant; None: the CPUs."""
    if platform == "cpu":
        return None
    here = [g for g in gpus() if platform in (None, g[0])]
    if not here and platform is None:
        return None
    if not 0 <= device < len(here):
        problems = "" if here else ". " + " ".join(_search()[1])
        raise ValueError(f"there is no {platform or 'GPU'} device {device} here; {len(here)} were found{problems}")
    return here[device]


def discover(platform: Platform | None = None, device: int = 0) -> Found:
    """The topology of a device: as measured, if `measure_device` was called for it with its driver, else as published.

    Args:
      platform: "cpu", "cuda" or "rocm"; by default that of the first GPU, or the CPUs where there is none.
      device: its number among the GPUs of that platform.

    Raises:
      ValueError: no such device.
    """
    gpu = _pick(platform, device)
    if gpu is None:
        return Found(host_topology(), None)
    name, _, described = gpu
    found = store.load(described["name"], described["units"], described["driver_version"])
    if found is not None:
        return Found(topology_of(found), found)
    return Found(part_for(described["name"], described["arch"], described["units"], name), None)


def page_homes(array: jax.Array, found: Found) -> np.ndarray:
    """Where the 4 KiB pages of an array on a GPU live: int8 [whole pages] domains, -1 if undecided. For `place_tape`.

    The first page is that which begins at the first multiple of 4096 bytes in the array. Words of the array are written
    while that is found out, and hold again afterwards what they held: nothing else may use the array meanwhile.

    Args:
      array: of any shape, on one GPU.
      found: that GPU, measured.

    Raises:
      ValueError: a device that was not measured, or an array that is not on it.
      RuntimeError: what the device or its driver said.
    """
    m = found.measurement
    if m is None:
        raise ValueError("pages have homes on a device that was measured: jax-monokernel topology --measure")
    devices = list(array.devices())
    if len(devices) != 1 or devices[0].platform != "gpu":
        raise ValueError(f"the array is on {devices}; expected one GPU")
    array.block_until_ready()
    address = array.unsafe_buffer_pointer()
    before = -address % PAGE_BYTES
    size = max(0, array.nbytes - before) // PAGE_BYTES * PAGE_BYTES
    return _homes_at(m, devices[0].local_hardware_id or 0, address + before, size)


def _homes_at(m: Measurement, ordinal: int, address: int, size: int) -> np.ndarray:
    _native.gpu_library_dirs(_gpu.library_dirs())
    session = _native.GpuProbe(m.platform, ordinal, size, address)
    return homes_of_pages(session, m).homes


def measure_device(
    platform: Platform | None = None, device: int = 0, *, report: Callable[[str], None] = lambda text: None
) -> Found:
    """Probes a GPU, in a few seconds, and keeps the result for `discover`. Nothing else should run on it meanwhile.

    Args:
      platform: as `discover`; not "cpu", whose topology the operating system knows.
      device: as `discover`.
      report: is told what is being measured.

    Raises:
      ValueError: no such device.
      RuntimeError: what the device or its driver said, or no compiler.
    """
    gpu = _pick(platform, device)
    if gpu is None:
        problems = "" if platform == "cpu" else ". " + " ".join(_search()[1])
        raise ValueError(
            f"there is no GPU to measure; the topology of CPUs is what the operating system says{problems}"
        )
    name, ordinal, _ = gpu
    session = _native.GpuProbe(name, ordinal, MEMORY_BYTES)
    found = measure(session, name, report=report)
    path = store.save(found)
    report("the result could not be saved" if path is None else f"saved as {path}")
    return Found(topology_of(found), found)
