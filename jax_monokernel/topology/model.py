"""The model of a device: groups of units, memory domains, and constants that say where they come from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal

Basis = Literal["measured", "published", "derived"]

# Names of constants and their units. "group" is `Topology.group_kind`.
CONSTANTS = {
    "hand_off_in_group_us": "one flag, one way, between two units of a group; nothing else runs",
    "hand_off_across_groups_us": "the same between units of different groups",
    "hand_off_in_group_loaded_us": "in a group while all units read memory",
    "hand_off_across_groups_loaded_us": "across groups while all units read memory",
    "gather_us": "every unit publishes a part of 1,024 to 3,072 16-bit values and reads all; nothing else runs",
    "near_word_us": "one flag, one way, between units of one memory domain, over a word that lives there",
    "far_word_us": "the same over a word that lives in another domain",
    "stream_unit_gb_s": "reads of one unit that is alone",
    "stream_group_gb_s": "reads of all units of one group that are alone",
    "stream_domain_gb_s": "reads of all units of one memory domain that are alone",
    "stream_device_gb_s": "reads of all units",
    "stream_device_near_gb_s": "reads of all units, each from its own memory domain",
    "stream_device_far_gb_s": "reads of all units, each from other memory domains",
    "stream_domain_near_gb_s": "reads of the units of one memory domain, alone, from it",
    "stream_domain_far_gb_s": "reads of the units of one memory domain, alone, from others",
    "memory_peak_gb_s": "the memory's data sheet rate",
}


@dataclasses.dataclass(frozen=True)
class Constant:
    """One number of a device."""

    value: float  # in the unit that its name ends with
    basis: Basis
    source: str  # who measured it and how, or where it is published

    def __post_init__(self) -> None:
        if not self.source:
            raise ValueError("a constant says where it comes from")


@dataclasses.dataclass(frozen=True)
class Group:
    """Units that belong together on some level, and the groups inside."""

    kind: str  # device, package, iod, xcd, l2_half, die, cluster, numa_node, l3, core, ...
    name: str
    units: tuple[int, ...] = ()  # of a group without groups inside: dense numbers; on CPUs the system's numbers
    children: tuple[Group, ...] = ()
    near: tuple[int, ...] = ()  # memory domains that are nearest; empty: those of the group around it

    def __post_init__(self) -> None:
        if self.units and self.children:
            raise ValueError(f"group {self.name} has units and groups: units belong to the innermost group")

    def all_units(self) -> tuple[int, ...]:
        """Its units and those of the groups inside."""
        return self.units + tuple(u for child in self.children for u in child.all_units())

    def walk(self, depth: int = 0) -> Iterator[tuple[int, Group]]:
        """This group and all inside, with their depths."""
        yield depth, self
        for child in self.children:
            yield from child.walk(depth + 1)


@dataclasses.dataclass(frozen=True)
class MemoryDomain:
    """Memory whose distance differs from group to group."""

    name: str
    bytes: int  # 0: unknown
    stacks: int = 0  # HBM stacks or DIMM channels; 0: unknown


@dataclasses.dataclass(frozen=True)
class Interleave:
    """How addresses are spread over the memory domains."""

    granule_bytes: int  # this many bytes at a multiple of this live in one domain; 0: unknown
    pattern: Literal["none", "round_robin", "hashed", "unknown"]
    basis: Basis
    source: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """A device as programs see it: one partition of a GPU, or the CPUs that a process may use."""

    name: str  # "AMD Instinct MI300X", as the driver says it if it was asked
    platform: Literal["cpu", "cuda", "rocm"]
    arch: str  # sm_90, gfx942, x86_64
    mode: str = ""  # compute and memory partition, such as SPX/NPS1; "" where there are none
    root: Group
    group_kind: str  # the level whose units have the cheap hand-offs
    domains: tuple[MemoryDomain, ...]
    interleave: Interleave
    constants: Mapping[str, Constant] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        units = self.root.all_units()
        if len(set(units)) != len(units):
            raise ValueError(f"the topology of {self.name} has a unit in two groups")
        unknown = set(self.constants) - set(CONSTANTS)
        if unknown:
            raise ValueError(f"constants are {', '.join(CONSTANTS)}; not {', '.join(sorted(unknown))}")
        for _, group in self.root.walk():
            if any(not 0 <= d < len(self.domains) for d in group.near):
                raise ValueError(f"group {group.name} is near a memory domain that {self.name} does not have")

    @property
    def units(self) -> int:
        """Execution units."""
        return len(self.root.all_units())

    def groups(self, kind: str | None = None) -> list[Group]:
        """All groups of a kind, by default of `group_kind`, in order."""
        return [g for _, g in self.root.walk() if g.kind == (kind or self.group_kind)]

    def near_domain(self) -> dict[int, int]:
        """For each unit the first of its nearest memory domains."""
        found: dict[int, int] = {}

        def visit(group: Group, near: tuple[int, ...]) -> None:
            near = group.near or near
            for unit in group.units:
                found[unit] = near[0] if near else 0
            for child in group.children:
                visit(child, near)

        visit(self.root, ())
        return found

    def constant(self, name: str) -> float | None:
        """A constant's value, or None if it is not known."""
        found = self.constants.get(name)
        return None if found is None else found.value

    def to_json(self) -> dict[str, Any]:
        """What `from_json` takes."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Topology:
        """The inverse of `to_json`, also after a way through JSON text.

        Raises:
          ValueError: data of another version.
        """
        try:
            return cls(
                **{
                    **data,
                    "root": _group(data["root"]),
                    "domains": tuple(MemoryDomain(**d) for d in data["domains"]),
                    "interleave": Interleave(**data["interleave"]),
                    "constants": {k: Constant(**v) for k, v in data["constants"].items()},
                    "notes": tuple(data["notes"]),
                }
            )
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"this is no topology of this version: {error}") from error


def _group(data: Mapping[str, Any]) -> Group:
    return Group(
        kind=data["kind"],
        name=data["name"],
        units=tuple(data["units"]),
        children=tuple(_group(child) for child in data["children"]),
        near=tuple(data["near"]),
    )
