"""A topology as text."""

from __future__ import annotations

from jax_monokernel.topology.model import CONSTANTS, Group, Topology


def tree(topology: Topology) -> str:
    """The groups as a tree, then memory, constants and notes: a few dozen lines."""
    head = f"{topology.name} ({topology.platform}, {topology.arch}{', ' + topology.mode if topology.mode else ''})"
    lines = [f"{head}: {topology.units} units"]
    lines += _branches(topology, topology.root, "")
    inter = topology.interleave
    granule = f" of {inter.granule_bytes} bytes" if inter.granule_bytes else ""
    if len(topology.domains) > 1:
        spread = f"interleave {inter.pattern}{granule} ({inter.basis}: {inter.source})"
        lines.append(f"memory: {len(topology.domains)} domains, {spread}")
    else:
        lines.append("memory: one domain")
    for name in CONSTANTS:
        if name in topology.constants:
            c = topology.constants[name]
            lines.append(f"{name:34} {c.value:>10.6g}  {c.basis}: {c.source}")
    lines += [f"note: {note}" for note in topology.notes]
    return "\n".join(lines)


def _branches(topology: Topology, group: Group, indent: str) -> list[str]:
    lines = []
    for i, child in enumerate(group.children):
        last = i == len(group.children) - 1
        near = ", near " + ", ".join(topology.domains[d].name for d in child.near) if child.near else ""
        units = child.all_units()
        what = f"{len(units)} units" if len(units) != 1 else "1 unit"
        span = f" ({_ranges(units)})" if child.units else ""
        lines.append(f"{indent}{'└─' if last else '├─'} {child.name}: {what}{span}{near}")
        lines += _branches(topology, child, indent + ("   " if last else "│  "))
    return lines


def _ranges(numbers: tuple[int, ...]) -> str:
    """(0, 1, 2, 5) -> "0-2, 5"."""
    parts: list[list[int]] = []
    for n in sorted(numbers):
        if parts and n == parts[-1][1] + 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    text = [str(a) if a == b else f"{a}-{b}" for a, b in parts]
    return ", ".join(text[:6]) + (f", … {len(parts) - 6} more" if len(text) > 6 else "")
