"""Which device is here, and what is known of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_monokernel import _gpu, _native
from jax_monokernel._gpu_tape import PAGE_BYTES
from jax_monokernel.plan import Platform
from jax_monokernel.topology import store
from jax_monokernel.topology.host import host_topology
from jax_monokernel.topology.measure import MEMORY_BYTES, homes_of_pages, measure
from jax_monokernel.topology.measure_host import measure_host, save_host, with_saved
from jax_monokernel.topology.measurement import Measurement, topology_of
from jax_monokernel.topology.model import Topology
from jax_monokernel.topology.partition import Partition, partition_of
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
        found += [(platform, device["ordinal"], device) for device in devices]
    return found, problems


def _pick(platform: Platform | None, device: int) -> tuple[Platform, int, dict[str, Any]] | None:
    """The GPU that is meant; None: the CPUs."""
    if platform == "cpu":
        return None
    here = [g for g in gpus() if platform in (None, g[0])]
    if not here and platform is None:
        return None
    mine = [g for g in here if g[1] == device] or (here if device == 0 else [])
    if not mine:
        problems = "" if here else ". " + " ".join(_search()[1])
        raise ValueError(f"there is no {platform or 'GPU'} device {device} here; {len(here)} were found{problems}")
    return mine[0]


def discover(platform: Platform | None = None, device: int = 0, *, sysfs: Path = Path("/sys")) -> Found:
    """The topology of a device: as measured, if `measure_device` was called for it with its driver, else as published.

    Constants that the probe does not measure are those that are published.

    Args:
      platform: "cpu", "cuda" or "rocm"; by default that of the first GPU, or the CPUs where there is none.
      device: its number among the GPUs of that platform, the driver's. 0 is the first that kernels are for.
      sysfs: where the partition mode of an AMD GPU is looked for.

    Raises:
      ValueError: no such device.
    """
    gpu = _pick(platform, device)
    if gpu is None:
        return Found(with_saved(host_topology()), None)
    name, _, described = gpu
    partition = _partition(gpu, sysfs)
    found = store.load(
        described["name"], described["units"], described["driver_version"], _device_id(described), partition.mode
    )
    published = part_for(described["name"], described["arch"], described["units"], name, partition)
    if found is None:
        return Found(published, None)
    measured = topology_of(found)
    # The probe does not measure all that the model of a token's time can use.
    constants = {**published.constants, **measured.constants}
    return Found(dataclasses.replace(measured, constants=constants), found)


def _partition(gpu: tuple[Platform, int, dict[str, Any]], sysfs: Path) -> Partition:
    return partition_of(gpu[2]["bus"], sysfs) if gpu[0] == "rocm" else Partition()


def _device_id(described: dict[str, Any]) -> str:
    return described["uuid"] or described["bus"]


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
    _check_device(m, devices[0])
    array.block_until_ready()
    address = array.unsafe_buffer_pointer()
    before = -address % PAGE_BYTES
    size = max(0, array.nbytes - before) // PAGE_BYTES * PAGE_BYTES
    return _homes_at(m, devices[0].local_hardware_id or 0, address + before, size)


def _homes_at(m: Measurement, ordinal: int, address: int, size: int) -> np.ndarray:
    _native.gpu_library_dirs(_gpu.library_dirs())
    session = _native.GpuProbe(m.platform, ordinal, size, address)
    return homes_of_pages(session, m).homes


def _check_device(m: Measurement, device: jax.Device) -> None:
    """That the device is the one that was measured, and not another of its kind."""
    ordinal = device.local_hardware_id or 0
    here = [_device_id(described) for platform, i, described in gpus() if (platform, i) == (m.platform, ordinal)]
    if m.device_id and here and here[0] != m.device_id:
        raise ValueError(f"the array is on device {ordinal}; another {m.name} was measured: discover(device={ordinal})")


def measure_device(
    platform: Platform | None = None,
    device: int = 0,
    *,
    report: Callable[[str], None] = lambda text: None,
    sysfs: Path = Path("/sys"),
) -> Found:
    """Probes a GPU, in a few seconds, and keeps the result for `discover`. Nothing else should run on it meanwhile.

    A result with `Measurement.missing`, of which some steps failed, is given back and not kept.

    Args:
      platform: as `discover`. With "cpu", hand-offs between this machine's cores and reads of its memory are measured.
      device: as `discover`.
      report: is told what is being measured.
      sysfs: as `discover`.

    Raises:
      ValueError: no such device.
      RuntimeError: what the device or its driver said, or no compiler.
    """
    gpu = _pick(platform, device)
    if platform == "cpu":
        host = measure_host(host_topology(), report=report)
        _report_path(save_host(host), report)
        return Found(host, None)
    if gpu is None:
        raise ValueError(f"there is no GPU to measure. {' '.join(_search()[1])}")
    name, ordinal, described = gpu
    session = _native.GpuProbe(name, ordinal, MEMORY_BYTES)
    found = measure(session, name, report=report)
    found = dataclasses.replace(found, device_id=_device_id(described), mode=_partition(gpu, sysfs).mode)
    if found.missing:
        report("not kept, as something is missing")
    else:
        _report_path(store.save(found), report)
    return Found(topology_of(found), found)


def _report_path(path: Path | None, report: Callable[[str], None]) -> None:
    report("the result could not be saved" if path is None else f"saved as {path}")
