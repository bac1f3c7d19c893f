"""Counters of energy: RAPL for CPUs, NVML and ROCm SMI for GPUs. Where there is none that can be read, that is said."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Meter:
    """A counter that never goes down."""

    source: str  # what it counts, and who says so
    joules: Callable[[], float]


class NotReported(Exception):
    """There is no counter here, and why."""


def find_meter(device: jax.Device) -> Meter:
    """The counter of a device.

    Raises:
      NotReported: there is none that can be read.
    """
    if device.platform != "gpu":
        return rapl()
    from jax_monokernel import _gpu, _native

    platform = "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"
    try:
        _native.gpu_library_dirs(_gpu.library_dirs())
        bus = _native.gpu_describe(platform)[device.local_hardware_id or 0]["bus"]
        if platform == "cuda":
            return nvml(ctypes.CDLL("libnvidia-ml.so.1"), bus)
        return rocm_smi(open_rocm_smi(_gpu.library_dirs()), bus)
    except (OSError, RuntimeError, ValueError, LookupError, AttributeError) as error:
        raise NotReported(f"the driver's library cannot be used: {error}") from error


def find_meter_or_reason(find: Callable[[], Meter]) -> tuple[Meter | None, str]:
    """What `find` gives with its source; or None, and for results the reason why there is none."""
    try:
        meter = find()
    except NotReported as error:
        return None, f"not reported: {error}"
    return meter, meter.source


def rapl(root: Path = Path("/sys/class/powercap")) -> Meter:
    """All packages of this machine, by Linux's powercap interface, whatever runs on them.

    Raises:
      NotReported: no such counters, or none that this user may read.
    """
    # intel-rapl:0 is a package (also of AMD's CPUs), intel-rapl:0:0 a part of it.
    packages = sorted(path for path in root.glob("intel-rapl:*") if path.name.count(":") == 1)
    if not packages:
        raise NotReported("this system has no RAPL counters")
    try:
        ranges = [int((path / "max_energy_range_uj").read_text()) for path in packages]
        last = [int((path / "energy_uj").read_text()) for path in packages]
    except OSError as error:
        raise NotReported(f"RAPL's counters may not be read by this user ({error.strerror})") from error
    total = [0]

    def joules() -> float:
        for i, path in enumerate(packages):
            now = int((path / "energy_uj").read_text())
            total[0] += (now - last[i]) % (ranges[i] + 1)  # the counter begins again after its range
            last[i] = now
        return total[0] / 1e6

    return Meter(f"RAPL, {len(packages)} package{'s' * (len(packages) > 1)}, with all that runs there", joules)


def nvml(library: Any, bus: str) -> Meter:
    """A GPU of NVIDIA's, by nvmlDeviceGetTotalEnergyConsumption: millijoules since the driver was loaded.

    Raises:
      NotReported: what the library said.
    """
    handle, value = ctypes.c_void_p(), ctypes.c_ulonglong()

    def check(status: int, what: str) -> None:
        if status:
            raise NotReported(f"NVML cannot {what} (error {status})")

    check(library.nvmlInit_v2(), "start")
    check(library.nvmlDeviceGetHandleByPciBusId_v2(bus.encode(), ctypes.byref(handle)), "find the device")

    def joules() -> float:
        check(library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(value)), "read the energy counter")
        return value.value / 1e3

    joules()
    return Meter("NVML, the whole board", joules)


# Of ROCm SMI, what is called: arguments; each returns rsmi_status_t, 0 for success. tests/test_hip_headers.py holds
# them against AMD's header.
ROCM_SMI: dict[str, tuple[Any, ...]] = {
    "rsmi_init": (ctypes.c_uint64,),
    "rsmi_num_monitor_devices": (ctypes.POINTER(ctypes.c_uint32),),
    "rsmi_dev_pci_id_get": (ctypes.c_uint32, ctypes.POINTER(ctypes.c_uint64)),
    "rsmi_dev_energy_count_get": (
        ctypes.c_uint32,
        ctypes.POINTER(ctypes.c_uint64),
        ctypes.POINTER(ctypes.c_float),
        ctypes.POINTER(ctypes.c_uint64),
    ),
}


def open_rocm_smi(folders: Iterable[str]) -> Any:
    """The library, from one of the folders or where ROCm 6 and 7 have it.

    Raises:
      OSError: it is in none of these places.
    """
    found = [
        str(path) for folder in (*folders, "/opt/rocm/lib") for path in sorted(Path(folder).glob("librocm_smi64.so*"))
    ]
    for name in (*found, "librocm_smi64.so.7", "librocm_smi64.so.1"):
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        for function, arguments in ROCM_SMI.items():
            getattr(library, function).argtypes = arguments
        return library
    return ctypes.CDLL("librocm_smi64.so")


def rocm_smi(library: Any, bus: str) -> Meter:
    """A GPU of AMD's, by rsmi_dev_energy_count_get: ticks of so many microjoules. Not tried on a device.

    Raises:
      NotReported: what the library said.
    """

    def check(status: int, what: str) -> None:
        if status:
            raise NotReported(f"ROCm SMI cannot {what} (error {status})")

    domain, bus_number, rest = bus.lower().split(":")
    wanted = int(domain, 16) << 32 | int(bus_number, 16) << 8 | int(rest.partition(".")[0], 16) << 3
    count, found = ctypes.c_uint32(), ctypes.c_uint64()
    check(library.rsmi_init(ctypes.c_uint64(0)), "start")
    check(library.rsmi_num_monitor_devices(ctypes.byref(count)), "count devices")
    for index in range(count.value):
        check(library.rsmi_dev_pci_id_get(index, ctypes.byref(found)), "name a device")
        # Bits 28 to 31 may hold a partition, the lowest three a function.
        if found.value & ~0xF0000007 == wanted:
            break
    else:
        raise NotReported(f"ROCm SMI does not know the device at {bus}")
    ticks, microjoules, time = ctypes.c_uint64(), ctypes.c_float(), ctypes.c_uint64()

    def joules() -> float:
        status = library.rsmi_dev_energy_count_get(
            index, ctypes.byref(ticks), ctypes.byref(microjoules), ctypes.byref(time)
        )
        check(status, "read the energy counter")
        return ticks.value * microjoules.value / 1e6

    joules()
    return Meter("ROCm SMI, the whole device", joules)
