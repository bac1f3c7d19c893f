"""Known parts."""

from __future__ import annotations

from jax_monokernel.plan import Platform
from jax_monokernel.topology.model import Group, Interleave, MemoryDomain, Topology


def part_for(name: str, arch: str, units: int, platform: Platform) -> Topology:
    """What is known of a device that was not measured."""
    return Topology(
        name=name,
        platform=platform,
        arch=arch,
        root=Group("device", name, tuple(range(units))),
        group_kind="device",
        domains=(MemoryDomain("memory", 0),),
        interleave=Interleave(0, "unknown", "published", "none"),
    )
