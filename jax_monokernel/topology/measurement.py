"""What the probe found of a device, and the model that follows from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jax_monokernel.topology import evaluate, lines
from jax_monokernel.topology.model import Constant, Group, Interleave, MemoryDomain, Topology
from jax_monokernel.topology.probe import Place

_HOW = "jax-monokernel topology --measure"
CLEAR = 3.0  # `evaluate.Clusters.separation` from which units are told apart by their hand-offs alone


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """Everything that the probe found. Times are nanoseconds one way, rates GB/s."""

    name: str
    platform: str
    arch: str
    driver_version: int
    places: list[Place]  # of the units
    groups: np.ndarray  # int [units]: XCDs, or SMs that form clusters; one group where neither is known
    domains: np.ndarray  # int [units]: nearest memory domain
    domain_separation: float  # `evaluate.Clusters.separation`
    profiles: np.ndarray  # float [units, words]: how far units are from some words (`evaluate.unit_profiles`)
    latency: np.ndarray  # float [units, units], from asking to answering, over a word near the one that asks
    latency_loaded: np.ndarray  # float [units, units], while all units read; the same both ways
    load_gb_s: float  # what they read meanwhile
    granule_bytes: int  # of the interleave
    block_bytes: int  # of `homes`: granule_bytes, at most a page
    homes: np.ndarray  # int8 [blocks], of the start of the probe's memory; -1: undecided
    near_ns: float
    far_ns: float
    home_margin: float  # `evaluate.Homes.margin`
    stream: Mapping[str, float]  # medians by name: unit, group, domain, device, with _near and _far; device_mixed, _sum
    seconds: float
    device_id: str = ""  # which device it was: its UUID, or where it has none its PCI address
    mode: str = ""  # partition mode, as `Topology.mode`
    looked: Mapping[str, Any] | None = None  # NVIDIA: what units wait for lines (`lines.Sample`)
    missing: Mapping[str, str] = dataclasses.field(default_factory=dict)  # steps that failed, and why

    def to_json(self) -> dict[str, Any]:
        """What `from_json` takes. Latencies are rounded to nanoseconds; of homes the first 65,536 are kept."""
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        out["places"] = [[p.xcc, p.se, p.cu] for p in self.places]
        for key in ("latency", "latency_loaded"):
            values = np.nan_to_num(out[key], nan=-1.0)
            out[key] = np.round(values).astype(int).tolist()
        out["profiles"] = np.round(np.nan_to_num(self.profiles)).astype(int).tolist()
        for key in ("near_ns", "far_ns"):
            out[key] = None if np.isnan(out[key]) else out[key]
        out["homes"] = self.homes[:65536].tolist()
        for key in ("groups", "domains"):
            out[key] = out[key].tolist()
        return out

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Measurement:
        """The inverse of `to_json`, up to its rounding.

        Raises:
          ValueError: data of another version.
        """
        try:
            found = dict(data)
            found["places"] = [Place(*p) for p in found["places"]]
            for key in ("latency", "latency_loaded"):
                values = np.array(found[key], float)
                found[key] = np.where(values < 0, np.nan, values)
            found["homes"] = np.array(found["homes"], np.int8)
            found["profiles"] = np.array(found["profiles"], float)
            for key in ("near_ns", "far_ns"):
                found[key] = float("nan") if found[key] is None else found[key]
            for key in ("groups", "domains"):
                found[key] = np.array(found[key], int)
            return cls(**found)
        except (TypeError, KeyError) as error:
            raise ValueError(f"this is no measurement of this version: {error}") from error


def halves(found: Measurement) -> np.ndarray | None:
    """Units that are nearer to each other, 0 or 1 for each, if hand-offs fall into two clear kinds."""
    if np.isnan(found.latency[~np.eye(len(found.latency), dtype=bool)]).any():  # `found.missing` says why
        return None
    near = evaluate.cluster_latencies(found.latency)
    if near.count != 2 or near.separation < CLEAR:
        return None
    # Units that share a cluster are near each other, so what would take them apart is noise.
    split = any(len(set(near.labels[found.groups == g].tolist())) > 1 for g in set(found.groups.tolist()))
    return None if split else near.labels


def topology_of(found: Measurement) -> Topology:
    """The model of a device that was measured.

    NVIDIA's SMs are shown by the clusters in which they were seen; those of one GPC may be in several.
    """
    count = int(found.domains.max()) + 1
    kind = "xcd" if found.platform == "rocm" else "cluster"
    names = {"xcd": "XCD", "cluster": "cluster"}
    many = int(found.groups.max()) + 1 > 1
    source = f"{_HOW}, driver {found.driver_version}"

    def leaf(units: np.ndarray, number: int) -> Group:
        label = found.places[int(units[0])].xcc if kind == "xcd" else number
        return Group(kind, f"{names[kind]} {label}", tuple(units.tolist()))

    def leaves(of: np.ndarray) -> tuple[Group, ...]:
        out = []
        for g in range(int(found.groups.max()) + 1):
            units = np.flatnonzero((found.groups == g) & of)
            if len(units):
                out.append(leaf(units, g))
        return tuple(out)

    if count > 1:
        level, title = ("iod", "IOD") if found.platform == "rocm" else ("l2_half", "L2 half")
        if found.platform == "cuda" and count > 2:
            level, title = "l2_part", "L2 part"
        children = tuple(Group(level, f"{title} {d}", (), leaves(found.domains == d), (d,)) for d in range(count))
    elif found.platform == "cuda" and many and (parts := halves(found)) is not None:
        # No memory was found to be nearer to one of them, but each other's units are.
        children = tuple(Group("l2_half", f"L2 half {h}", (), leaves(parts == h)) for h in range(2))
    else:
        children = leaves(np.ones(len(found.domains), bool))
    labels = found.groups if many else found.domains
    idle = evaluate.pair_times(found.latency, labels)
    loaded = evaluate.pair_times(found.latency_loaded, labels)
    values = {
        "hand_off_in_group_us": idle.inside / 1e3,
        "hand_off_across_groups_us": idle.across / 1e3,
        "hand_off_in_group_loaded_us": loaded.inside / 1e3,
        "hand_off_across_groups_loaded_us": loaded.across / 1e3,
        "stream_unit_gb_s": found.stream.get("unit"),
        "stream_group_gb_s": found.stream.get("group"),
        "stream_domain_gb_s": found.stream.get("domain"),
        "stream_device_gb_s": found.stream.get("device"),
        "stream_device_near_gb_s": found.stream.get("device_near"),
        "stream_device_far_gb_s": found.stream.get("device_far"),
        "stream_domain_near_gb_s": found.stream.get("domain_near"),
        "stream_domain_far_gb_s": found.stream.get("domain_far"),
        "near_word_us": found.near_ns / 1e3 if count > 1 else None,
        "far_word_us": found.far_ns / 1e3 if count > 1 else None,
    }
    constants = {
        name: Constant(round(float(value), 4), "measured", source)
        for name, value in values.items()
        if value is not None and np.isfinite(value)
    }
    notes = [f"not measured: {what}: {why}" for what, why in found.missing.items()]
    if not np.isnan(found.latency_loaded).all():
        notes.append(f"in the loaded case all units together read {found.load_gb_s:.0f} GB/s")
    device, own = found.stream.get("device", 0.0), found.stream.get("device_sum", 0.0)
    if own > 1.03 * device:
        notes.append(f"units are not equally fast: the sum of what each reads in its own time is {own:.0f} GB/s")
    if count > 1:
        undecided = float(np.mean(found.homes < 0))
        apart = "profiles" if found.platform == "rocm" else "hand-offs"
        notes.append(
            f"memory domains are {found.domain_separation:.1f} times as far apart as their units' {apart} spread; "
            f"homes of blocks are clear by {found.home_margin:.1f} times the noise, {undecided:.1%} are undecided"
        )
    if found.looked is not None:
        notes += lines.describe(found.looked)
    split = [g for g in range(int(found.groups.max()) + 1) if len(set(found.domains[found.groups == g].tolist())) > 1]
    if split and count > 1:
        notes.append(f"{len(split)} groups have units in more than one memory domain, and are shown in each")
    return Topology(
        name=found.name,
        platform=found.platform,  # type: ignore[arg-type]
        arch=found.arch,
        mode=found.mode,
        root=Group("device", found.name, (), children),
        group_kind=kind,
        domains=tuple(MemoryDomain(f"domain {d}", 0) for d in range(count)),
        interleave=Interleave(
            found.granule_bytes if count > 1 else 0, "hashed" if count > 1 else "unknown", "measured", source
        ),
        constants=constants,
        notes=tuple(notes),
    )
