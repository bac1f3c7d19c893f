"""The CPUs that a process may use, from Linux's sysfs: packages, NUMA nodes, shared caches, cores."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from pathlib import Path

from jax_monokernel.topology.model import Group, Interleave, MemoryDomain, Topology


def host_topology(sysfs: Path = Path("/sys/devices/system"), cpus: Iterable[int] | None = None) -> Topology:
    """The topology of this machine's CPUs.

    Args:
      sysfs: where the operating system describes it.
      cpus: the system's numbers of the CPUs to be used; by default the process's affinity mask.

    Raises:
      ValueError: no CPU.
    """
    allowed = sorted(available() if cpus is None else set(cpus))
    if not allowed:
        raise ValueError("a topology needs at least one CPU")
    nodes = _nodes(sysfs / "node", allowed)
    packages: dict[int, list[int]] = {}
    for cpu in allowed:
        packages.setdefault(_number(sysfs / "cpu" / f"cpu{cpu}" / "topology" / "physical_package_id"), []).append(cpu)
    node_numbers = list(nodes)
    children = []
    for package, in_package in packages.items():
        inside = []
        for place, node in enumerate(node_numbers):
            in_node = [c for c in in_package if c in nodes[node][0]]
            if in_node:
                inside.append(Group("numa_node", f"node {node}", (), _caches(sysfs, in_node), (place,)))
        children.append(Group("package", f"package {package}", (), tuple(inside)))
    domains = tuple(MemoryDomain(f"node {node}", size) for node, (_, size) in nodes.items())
    return Topology(
        name=_model_name() or platform.machine(),
        platform="cpu",
        arch=platform.machine(),
        root=Group("device", "host", (), tuple(children)),
        group_kind="l3",
        domains=domains,
        interleave=Interleave(0, "unknown" if len(domains) > 1 else "none", "published", "the operating system"),
        notes=_notes(sysfs, nodes),
    )


def available() -> set[int]:
    """The CPUs of the affinity mask, or all where there is none."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def parse_cpu_list(text: str) -> set[int]:
    """The kernel's lists: "0-3,8" -> {0, 1, 2, 3, 8}.

    Raises:
      ValueError: text of another form.
    """
    found: set[int] = set()
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            found.update(range(int(first), int(last or first) + 1))
    return found


def _nodes(folder: Path, allowed: list[int]) -> dict[int, tuple[set[int], int]]:
    """Node -> (its CPUs among the allowed, bytes), for nodes with such CPUs; one node of all if the system has none."""
    nodes, left = {}, set(allowed)
    for path in sorted(folder.glob("node[0-9]*"), key=lambda p: int(p.name[4:])):
        cpus = _list(path / "cpulist") & left
        if cpus:
            nodes[int(path.name[4:])] = (cpus, _total_memory(path / "meminfo"))
            left -= cpus
    if left:
        nodes[max(nodes, default=-1) + 1] = (left, 0)
    return nodes


def _caches(sysfs: Path, cpus: list[int]) -> tuple[Group, ...]:
    """Groups of CPUs that share an L3 cache, and their cores."""
    groups: list[Group] = []
    left = set(cpus)
    for cpu in cpus:
        if cpu not in left:
            continue
        shared, size = _last_level(sysfs / "cpu" / f"cpu{cpu}" / "cache")
        members = sorted((shared or set(cpus)) & left | {cpu})
        left -= set(members)
        title = f"L3 {len(groups)}{f' ({size})' if size else ''}" if shared else "CPUs"
        groups.append(Group("l3", title, (), _cores(sysfs, members)))
    return tuple(groups)


def _last_level(folder: Path) -> tuple[set[int] | None, str]:
    """CPUs of the largest shared cache of level 3 or above, and its size; None: there is none."""
    best: tuple[int, set[int] | None, str] = (2, None, "")
    for index in sorted(folder.glob("index[0-9]*")):
        level = _number(index / "level")
        if level > best[0] and _text(index / "type") != "Instruction":
            best = (level, _list(index / "shared_cpu_list") or None, _text(index / "size"))
    return best[1], best[2]


def _cores(sysfs: Path, cpus: list[int]) -> tuple[Group, ...]:
    groups: list[Group] = []
    left = set(cpus)
    for cpu in cpus:
        if cpu in left:
            siblings = _list(sysfs / "cpu" / f"cpu{cpu}" / "topology" / "thread_siblings_list") & left | {cpu}
            left -= siblings
            groups.append(Group("core", f"core {cpu}", tuple(sorted(siblings))))
    return tuple(groups)


def _notes(sysfs: Path, nodes: dict[int, tuple[set[int], int]]) -> tuple[str, ...]:
    """Distances of NUMA nodes, as the firmware gives them (10: local)."""
    if len(nodes) < 2:
        return ()
    rows = [f"{n}: {_text(sysfs / 'node' / f'node{n}' / 'distance')}" for n in nodes]
    return ("distances of NUMA nodes as the firmware has them, 10 is local: " + "; ".join(rows),)


def _model_name() -> str:
    for line in _text(Path("/proc/cpuinfo")).splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return ""


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _number(path: Path) -> int:
    text = _text(path)
    return int(text) if text.lstrip("-").isdecimal() else 0


def _list(path: Path) -> set[int]:
    try:
        return parse_cpu_list(_text(path))
    except ValueError:
        return set()


def _total_memory(path: Path) -> int:
    for line in _text(path).splitlines():
        if "MemTotal:" in line:
            number = line.split("MemTotal:")[1].split()[0]
            return int(number) * 1024 if number.isdecimal() else 0
    return 0
