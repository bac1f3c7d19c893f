"""The partition mode of an AMD GPU, as Linux's drivers tell it: amdgpu's sysfs files, and KFD's nodes.

- `/sys/bus/pci/devices/BUS/current_compute_partition` holds SPX, DPX, TPX, QPX or CPX, `current_memory_partition` NPS1,
  NPS2, ... (Linux, Documentation/gpu/amdgpu). Both are of the whole package; drivers before 6.5, and those for devices
  without partitions, have neither.
- `/sys/class/kfd/kfd/topology/nodes/N/properties` has lines of a name and a number. A GPU's node, one for each
  partition, has `domain` and `location_id` (bus << 8 | device << 3 | function), `simd_count` / `simd_per_cu` compute
  units, and since Linux 6.5 `num_xcc`, its XCDs. The partition's number is in bits 28 to 31 of `location_id`, in
  other versions in those of the function, from where HIP may take it into the address that it tells.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

_BUS = re.compile(r"([0-9a-f]{4,8}):([0-9a-f]{2}):([0-9a-f]{2})\.([0-7])")


@dataclasses.dataclass(frozen=True)
class Partition:
    """What is known of how a GPU is divided. Empty or 0: the system does not say."""

    compute: str = ""  # "SPX", "DPX", "TPX", "QPX", "CPX"
    memory: str = ""  # "NPS1", "NPS2", ...
    xcds: int = 0  # of one of its devices
    units: int = 0  # likewise, by KFD's count

    @property
    def mode(self) -> str:
        """As `Topology.mode`: "SPX/NPS1", "" if neither is known."""
        return "/".join(filter(None, (self.compute, self.memory)))


def partition_of(bus: str, sysfs: Path = Path("/sys")) -> Partition:
    """How the GPU at a PCI address is divided.

    Args:
      bus: as the driver says it: "0000:c1:00.0".
      sysfs: where the operating system describes itself.
    """
    match = _BUS.fullmatch(bus.lower())
    if match is None:
        return Partition()
    devices = sysfs / "bus" / "pci" / "devices"
    folder = devices / bus.lower()
    if not folder.exists():
        folder = devices / (bus.lower()[:-1] + "0")  # the function is a partition
    compute, memory = (_text(folder / f"current_{kind}_partition").upper() for kind in ("compute", "memory"))
    domain, number, slot, _ = (int(part, 16) for part in match.groups())
    xcds, units = _node(sysfs, domain, number << 8 | slot << 3)
    return Partition(
        compute if re.fullmatch(r"[A-Z]PX", compute) else "",
        memory if re.fullmatch(r"NPS\d+", memory) else "",
        xcds,
        units,
    )


def _node(sysfs: Path, domain: int, location: int) -> tuple[int, int]:
    """XCDs and compute units of the KFD nodes of a device; 0 where they are unknown or differ."""
    found = set()
    for path in (sysfs / "class" / "kfd" / "kfd" / "topology" / "nodes").glob("*/properties"):
        lines = (line.split() for line in _text(path).splitlines())
        node = {line[0]: int(line[1]) for line in lines if len(line) == 2 and line[1].isdecimal()}
        simds = node.get("simd_count", 0)
        at = (node.get("domain", 0), node.get("location_id", 7) & 0xFFF8)
        if simds and at == (domain, location):
            found.add((node.get("num_xcc", 0), simds // max(node.get("simd_per_cu", 0), 1)))
    return found.pop() if len(found) == 1 else (0, 0)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
