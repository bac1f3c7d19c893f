"""Known parts, as their makers and others describe them. What was measured on the device at hand replaces this."""

from __future__ import annotations

import dataclasses
import re

from jax_monokernel.plan import Platform
from jax_monokernel.topology.model import Constant, Group, Interleave, MemoryDomain, Topology
from jax_monokernel.topology.partition import Partition

_GIB = 1 << 30
# XCDs of a compute partition, as a divisor of all, and the memory partitions that go with it: the amdgpu driver's rule
# (drivers/gpu/drm/amd/amdgpu/aqua_vanjaram.c of Linux). With gfx950, and in some versions on virtual functions, NPS2
# goes with QPX and CPX too.
COMPUTE_MODES: dict[str, tuple[int, tuple[str, ...]]] = {
    "SPX": (1, ("NPS1",)),
    "DPX": (2, ("NPS1", "NPS2")),
    "TPX": (3, ("NPS1", "NPS4")),
    "QPX": (4, ("NPS1", "NPS4")),
    "CPX": (0, ("NPS1", "NPS4")),  # one XCD each
}
_NUMBERS = "public measurements on one MI300X (cklxx/etx-megakernel, cklxx/fleet-mi300x)"
_OURS = "this project's microbenchmarks on one H200 SXM, driver 580 (docs/topology.md)"


@dataclasses.dataclass(frozen=True)
class Part:
    """One product. Sizes are of the whole package."""

    name: str
    platform: Platform
    arch: str
    match: str  # regular expression over the driver's name of the device
    units: int
    iods: int  # dies that memory hangs on; of NVIDIA's L2 partitions or dies
    xcds: int  # 0: groups are not known by number
    stacks: int
    bytes: int
    compute: tuple[str, ...] = ()  # partition modes; none: it has no partitions
    memory: tuple[str, ...] = ()
    constants: tuple[tuple[str, float, str], ...] = ()
    granule_bytes: int = 0
    interleave_source: str = "not published"
    iod_xcds: tuple[int, ...] = ()  # XCDs on each IOD, if not the same on all


_AMD_INTERLEAVE = (
    "channel hash of the amdgpu driver (umc_v12_0): 4 KiB pages go round the dies' stacks; confirmed by page on MI350 "
    "(ROCm/fleet-chiplet-megakernel)"
)
_MI300X_CONSTANTS = (
    ("hand_off_in_group_us", 0.642, f"one flag, same XCD; {_NUMBERS}"),
    ("hand_off_across_groups_us", 0.742, f"one flag, other XCD, no payload; {_NUMBERS}"),
    ("hand_off_across_groups_loaded_us", 3.2, f"half of an event's 5.9-6.8 us there and back, all reading; {_NUMBERS}"),
    ("gather_us", 0.9, "data polled by all units, 0.85-0.9 us (Kog AI, as cited in public)"),
    ("stream_unit_gb_s", 63.0, "MI308X, 64 CUs reach 4.07 TB/s (ROCm/rocm-systems PR 8480)"),
    ("stream_device_gb_s", 4240.0, f"304 x 256 threads, 8 loads of 16 bytes a lane; {_NUMBERS}"),
    ("memory_peak_gb_s", 5300.0, "AMD data sheet"),
)
_MI350_CONSTANTS = (
    ("near_word_us", 0.346, "flag ping-pong of two XCDs, 692 ns there and back (ROCm/fleet-chiplet-megakernel)"),
    ("far_word_us", 0.59, "likewise over a page of the other half, 1,180 ns (ROCm/fleet-chiplet-megakernel)"),
    ("stream_device_gb_s", 6900.0, "MI350X, 6.91-7.20 TB/s (ROCm/rocm-systems PR 8480)"),
    ("memory_peak_gb_s", 8000.0, "AMD data sheet"),
)
_HOPPER_CONSTANTS = (
    ("hand_off_in_group_us", 0.25, f"one flag, relaxed, two units of one half of the L2; {_OURS}"),
    ("hand_off_across_groups_us", 0.40, f"one flag, relaxed, of two halves; {_OURS}"),
    ("gather_us", 0.83, f"1,024 to 3,072 values of 16 bits by 132 units, 0.78-0.88 us; {_OURS}"),
)

PARTS: tuple[Part, ...] = (
    Part(
        "MI300X", "rocm", "gfx942", r"MI300X", 304, 4, 8, 8, 192 * _GIB,
        ("SPX", "DPX", "QPX", "CPX"), ("NPS1", "NPS2", "NPS4"), _MI300X_CONSTANTS, 4096, _AMD_INTERLEAVE,
    ),
    Part(
        "MI325X", "rocm", "gfx942", r"MI325X", 304, 4, 8, 8, 256 * _GIB,
        ("SPX", "DPX", "QPX", "CPX"), ("NPS1", "NPS2", "NPS4"),
        (*_MI300X_CONSTANTS[:5], ("memory_peak_gb_s", 6000.0, "AMD data sheet")), 4096, _AMD_INTERLEAVE,
    ),
    Part(
        "MI300A", "rocm", "gfx942", r"MI300A", 228, 4, 6, 8, 128 * _GIB,
        ("SPX", "TPX", "CPX"), ("NPS1", "NPS4"),
        (*_MI300X_CONSTANTS[:4], ("memory_peak_gb_s", 5300.0, "AMD data sheet")), 4096, _AMD_INTERLEAVE, (2, 2, 2, 0),
    ),
    Part(
        "MI350X", "rocm", "gfx950", r"MI350X", 256, 2, 8, 8, 288 * _GIB,
        ("SPX", "DPX", "QPX", "CPX"), ("NPS1", "NPS2"), _MI350_CONSTANTS, 4096, _AMD_INTERLEAVE,
    ),
    Part(
        "MI355X", "rocm", "gfx950", r"MI355X", 256, 2, 8, 8, 288 * _GIB,
        ("SPX", "DPX", "QPX", "CPX"), ("NPS1", "NPS2"), _MI350_CONSTANTS, 4096, _AMD_INTERLEAVE,
    ),
    Part(
        "H100 SXM", "cuda", "sm_90", r"H100.*(SXM|HBM3)", 132, 2, 0, 5, 80 * _GIB,
        constants=(*_HOPPER_CONSTANTS, ("memory_peak_gb_s", 3350.0, "NVIDIA data sheet")),
    ),
    Part(
        "H100 PCIe", "cuda", "sm_90", r"H100.*PCIe", 114, 2, 0, 5, 80 * _GIB,
        constants=(*_HOPPER_CONSTANTS, ("memory_peak_gb_s", 2000.0, "NVIDIA data sheet")),
    ),
    Part(
        "H200", "cuda", "sm_90", r"H200", 132, 2, 0, 6, 141 * 10**9,
        constants=(
            *_HOPPER_CONSTANTS,
            ("stream_device_gb_s", 4680.0, f"bulk copies into shared memory; {_OURS}"),
            ("memory_peak_gb_s", 4800.0, "NVIDIA data sheet"),
        ),
    ),
    Part(
        "B200", "cuda", "sm_100", r"B200", 148, 2, 0, 8, 180 * 10**9,
        constants=(("memory_peak_gb_s", 8000.0, "NVIDIA data sheet"),),
    ),
)  # fmt: skip


def part_names() -> list[str]:
    """Names that `part` knows."""
    return [p.name for p in PARTS]


def modes(name: str) -> list[str]:
    """The partition modes of a part: "SPX/NPS1", ...; none for parts without.

    Raises:
      ValueError: an unknown part.
    """
    p = _find(name)
    return [f"{c}/{m}" for c in p.compute if _is_valid(p, c) for m in p.memory if m in _memory_modes(p, c)]


def part(name: str, *, compute: str = "SPX", memory: str = "NPS1") -> Topology:
    """A known part, or the first of the devices that a partition mode makes of it.

    Args:
      name: one of `part_names()`.
      compute: "SPX", "DPX", "TPX", "QPX" or "CPX"; of no meaning to NVIDIA's parts.
      memory: "NPS1", "NPS2" or "NPS4"; likewise.

    Raises:
      ValueError: an unknown part, or a mode that it does not have.
    """
    p = _find(name)
    if not p.compute:
        if (compute, memory) != ("SPX", "NPS1"):
            raise ValueError(f"{p.name} has no partitions")
        return _flat(p, f"NVIDIA {p.name}", p.units)
    if f"{compute}/{memory}" not in modes(name):
        raise ValueError(f"{p.name} has no mode {compute}/{memory}; its modes are {', '.join(modes(name))}")
    return _partition(p, f"AMD Instinct {p.name}", compute, memory, p.xcds // _divisor(p, compute), p.units // p.xcds)


def part_for(name: str, arch: str, units: int, platform: Platform, partition: Partition | None = None) -> Topology:
    """What is published of a device that was not measured.

    Args:
      name: as its driver says.
      arch: likewise.
      units: likewise; a partition, or a device with fewer active units than its part has, is recognised by it.
      platform: "cuda" or "rocm".
      partition: what the system says of how the GPU is divided (`partition_of`). Units have the last word: where they
        contradict it, it is not used, and a note says so.
    """
    found = next((p for p in PARTS if p.platform == platform and re.search(p.match, name)), None)
    if found is None or found.arch != arch:
        return _unknown(name, arch, units, platform)
    if not found.compute:
        return _flat(found, name, units)
    known = partition or Partition()
    notes = []
    wrong = _contradiction(found, known, units)
    if wrong:
        notes.append(f"{wrong}: what the system says of partitions is not used")
        known = Partition()
    compute = known.compute or _compute_mode(found, units, known.xcds)
    xcds = known.xcds or (found.xcds // _divisor(found, compute) if compute else found.xcds)
    if units % xcds:
        note = f"a {found.name} has {found.units} units. The probe says where these are"
        return _with_notes(_unknown(name, arch, units, platform), [*notes, note])
    compute = compute or "SPX"
    if not known.memory and compute != "SPX":
        notes.append("the memory partition is not known, NPS1 is assumed")
    if units * _divisor(found, compute) != found.units:
        counted = f"{xcds} XCDs, by the driver's count," if known.xcds else "XCDs"
        spread = f"; {counted} are taken to have as many each. The probe counts them" if xcds > 1 else ""
        notes.append(f"{units} of {found.units // _divisor(found, compute)} units are active{spread}")
    return _with_notes(_partition(found, name, compute, known.memory or "NPS1", xcds, units // xcds), notes)


def _divisor(p: Part, compute: str) -> int:
    """Devices that a compute mode makes of a part."""
    return COMPUTE_MODES[compute][0] or p.xcds


def _compute_mode(p: Part, units: int, xcds: int) -> str:
    """The mode whose devices have so many XCDs, or if that is not known so many units; "" if there is none."""
    fits = (c for c in p.compute if (xcds or units) * _divisor(p, c) == (p.xcds if xcds else p.units))
    return next(fits, "")


def _contradiction(p: Part, known: Partition, units: int) -> str:
    """Why `known` cannot be true of a device of so many units, or ""."""
    if known.units and known.units != units:
        return f"KFD counts {known.units} compute units and HIP {units}"
    if known.compute and (known.compute not in COMPUTE_MODES or p.xcds % _divisor(p, known.compute)):
        return f"a {p.name} has no compute partition mode {known.compute}"
    if known.memory and known.memory not in p.memory:
        return f"a {p.name} has no memory partition mode {known.memory}"
    if not known.compute:
        return f"{known.xcds} XCDs are not those of a {p.name}" if known.xcds > p.xcds else ""
    most = p.units // _divisor(p, known.compute)
    if units > most:
        return f"{known.compute} gives a device of a {p.name} at most {most} compute units, and it has {units}"
    if known.xcds and known.xcds * _divisor(p, known.compute) != p.xcds:
        return (
            f"{known.compute} gives a device {p.xcds // _divisor(p, known.compute)} XCDs, and KFD counts {known.xcds}"
        )
    return ""


def _find(name: str) -> Part:
    for p in PARTS:
        if p.name.lower() == name.lower():
            return p
    raise ValueError(f"{name} is not a part that is known; these are: {', '.join(part_names())}")


def _memory_modes(p: Part, compute: str) -> tuple[str, ...]:
    more = ("NPS2",) if p.arch == "gfx950" and compute in ("QPX", "CPX") else ()
    return COMPUTE_MODES[compute][1] + more


def _is_valid(p: Part, compute: str) -> bool:
    return p.xcds % _divisor(p, compute) == 0


def _constants(p: Part, whole: bool) -> dict[str, Constant]:
    """Of a partition the numbers that do not depend on its size."""
    return {
        key: Constant(value, "published", source)
        for key, value, source in p.constants
        if whole or not key.startswith(("stream_device", "memory_peak", "gather"))
    }


def _partition(p: Part, name: str, compute: str, memory: str, xcds: int, each: int) -> Topology:
    """The first partition: XCDs 0 to xcds - 1, with the memory that its memory partition gives it."""
    on = p.iod_xcds or (p.xcds // p.iods,) * p.iods
    parts = int(memory[3:])
    visible = p.iods // parts if parts <= p.iods else 1
    domains = tuple(
        MemoryDomain(f"IOD {d}'s stacks", p.bytes // p.iods, p.stacks // p.iods) for d in range(max(visible, 1))
    )
    groups, xcd = [], 0
    for iod, count in enumerate(on):
        inside = []
        for _ in range(count):
            if xcd < xcds:
                inside.append(Group("xcd", f"XCD {xcd}", tuple(range(xcd * each, (xcd + 1) * each))))
                xcd += 1
        if inside:
            near = (iod,) if iod < len(domains) and len(domains) > 1 else ()
            groups.append(Group("iod", f"IOD {iod}", (), tuple(inside), near))
    alone = len(domains) == 1
    whole = xcds * each == p.units
    return Topology(
        name=name,
        platform="rocm",
        arch=p.arch,
        mode=f"{compute}/{memory}",
        root=Group("device", name, (), tuple(groups)),
        group_kind="xcd",
        domains=(dataclasses.replace(domains[0], name="memory"),) if alone else domains,
        interleave=Interleave(
            0 if alone else p.granule_bytes, "none" if alone else "hashed", "published", p.interleave_source
        ),
        constants=_constants(p, whole),
    )


def _flat(p: Part, name: str, units: int) -> Topology:
    """A part whose groups are not known by number."""
    what = "dies" if p.arch == "sm_100" else "halves of the L2"
    note = f"which SMs share a GPC, and which are near which of the {p.iods} {what}, differs from chip to chip: measure"
    return Topology(
        name=name,
        platform=p.platform,
        arch=p.arch,
        root=Group("device", name, tuple(range(units))),
        group_kind="device",
        domains=(MemoryDomain("memory", p.bytes, p.stacks),),
        interleave=Interleave(0, "unknown", "published", "not published"),
        constants=_constants(p, units == p.units),
        notes=(note,),
    )


def _unknown(name: str, arch: str, units: int, platform: Platform) -> Topology:
    return Topology(
        name=name,
        platform=platform,
        arch=arch,
        root=Group("device", name, tuple(range(units))),
        group_kind="device",
        domains=(MemoryDomain("memory", 0),),
        interleave=Interleave(0, "unknown", "published", "not published"),
        notes=("nothing is known of this device but its number of units: measure",),
    )


def _with_notes(topology: Topology, notes: list[str]) -> Topology:
    return dataclasses.replace(topology, notes=(*topology.notes, *notes))
