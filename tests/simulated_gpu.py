"""A device for the topology probe that is numpy only: distances, page homes and rates are made up, with noise."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass
class SimulatedGpu:
    """What `_native.GpuProbe` offers, of a device with units in groups, and those in domains."""

    platform: str = "cuda"
    group_of: tuple[int, ...] = (0,) * 6 + (1,) * 6  # XCD or GPC of each unit
    domain_of: tuple[int, ...] = (0, 1)  # of each group
    granule: int = 4096
    masks: tuple[int, ...] = (0b1011,)  # for each bit of a home, address bits above the granule whose parity it is
    noise: float = 0.03
    rotate: bool = False  # blocks of each launch start one group later, as on an MI300X
    memory_bytes: int = 1 << 25
    near_ns: float = 120.0
    far_ns: float = 200.0
    in_xcd_ns: float = 300.0
    near_gain: float = 1.2  # rate from near memory over that from far memory
    unit_gb_s: float = 60.0
    across_ns: float = 120.0  # of flags between NVIDIA's domains, wherever the word is
    tells: tuple[str, ...] = ("first", "change")  # looks at lines that depend on their home
    slice_ns: float = 0.0  # units of a group are by so much nearer to some slices of the cache than to others
    slow: float = 1.0  # hand-offs and looks take so many times as long
    seed: int = 0
    name: str = "Simulated"
    driver_version: int = 13000

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        self.launches = 0
        self.longest_s = 0.0  # of all launches
        self.slices = self.slice_ns * self.rng.standard_normal((max(self.group_of) + 1, 80))
        self.arch = "sm_90" if self.platform == "cuda" else "gfx942"
        # Numbers of SMs and compute units have nothing to do with groups, and have holes.
        self.number = self.rng.permutation(2 * self.units)[: self.units]
        if self.platform == "rocm":
            seen: dict[int, int] = {}
            for u, g in enumerate(self.group_of):
                k = seen[g] = seen.get(g, -1) + 1
                self.number[u] = (k // 10) << 13 | (k % 10 + (k % 10 > 4)) << 8 | 5

    @property
    def units(self) -> int:
        return len(self.group_of)

    def place_numbers(self) -> np.ndarray:
        if self.platform == "cuda":
            return self.number
        return np.asarray(self.group_of) << 7 | self.number >> 8 & 0x7F

    def domain(self, units: np.ndarray) -> np.ndarray:
        return np.asarray(self.domain_of)[np.asarray(self.group_of)[units]]

    def home(self, address: np.ndarray) -> np.ndarray:
        block = np.asarray(address, np.int64) // self.granule
        home = np.zeros(block.shape, int)
        for bit, mask in enumerate(self.masks):
            home |= (np.bitwise_count(block & mask).astype(int) & 1) << bit
        return home

    def run(self, **work: Any) -> tuple[np.ndarray, np.ndarray]:
        self.launches += 1
        block_at = np.arange(self.units)  # where block i of this launch runs
        if self.rotate:
            block_at = np.roll(block_at, self.launches * 7)
        unit_of = block_at  # at which place the unit that the caller calls i is
        if len(work["unit_of"]):
            unit_of = np.argsort(np.asarray(work["unit_of"])[self.place_numbers()])
        jobs, rounds = work["jobs"], work["rounds"]
        a, b = unit_of[jobs[:, 0] & 0xFFFF], unit_of[jobs[:, 0] >> 16]
        home = self.home(jobs[:, 1].astype(np.int64) * 32)
        reach = lambda u: np.where(self.domain(u) == home, self.near_ns, self.far_ns)  # noqa: E731
        own = 2.0 * np.arange(self.units) / self.units  # a unit's own part
        place = jobs[:, 1].astype(np.int64) // 4 * 2654435761 % 80  # the slice of a word's 128 bytes
        near_slice = lambda u: self.slices[np.asarray(self.group_of)[u], place]  # noqa: E731
        time = reach(a) + reach(b) + own[a] + own[b] + near_slice(a) + near_slice(b)
        if self.platform == "cuda":
            base = 2 * self.near_ns + np.where(self.domain(a) == self.domain(b), 0, self.across_ns)
            time = base + own[a] + own[b] + near_slice(a) + near_slice(b)
        if self.platform == "rocm":
            group = np.asarray(self.group_of)
            time = np.where(group[a] == group[b], self.in_xcd_ns, time + 200)
        time *= 1 + self.noise * self.rng.standard_normal(len(time)).clip(-3, 3)
        load = len(work["blocks"]) > 0
        time *= self.slow * (4 if load else 1)
        ns_per_tick = 10.0 if self.platform == "rocm" else 0.5
        best = time * 2 * rounds / ns_per_tick
        results = np.stack([best, best * work["batches"] * 1.1], axis=1).astype(np.uint32)

        reports = np.zeros((self.units, 16), np.uint32)
        reports[:, 0] = self.number[unit_of]
        reports[:, 1] = np.asarray(self.group_of)[unit_of] if self.platform == "rocm" else 0
        wide = reports.view(np.uint64)
        took = np.full(self.units, max(time.sum() * 2 * rounds * work["batches"], 1e6))
        busy = np.zeros(self.units)  # seconds
        values = 2 * (work["warm_up"] + work["batches"] * rounds)
        words = [jobs[begin : begin + count, 1] for begin, count in work["tracks"].tolist()]
        many = np.unique(np.concatenate([np.unique(w) for w in words]), return_counts=True) if words else ((), ())
        shared = [word for word, tracks in zip(*many, strict=True) if tracks > 1]
        for track, (begin, count) in enumerate(work["tracks"].tolist()):
            ends = np.cumsum(time[begin : begin + count]) * values / 1e9
            # Who waits over a word that another track writes to waits until the end.
            ends[np.logical_or.accumulate(np.isin(words[track], shared))] = np.inf
            mine = work["track_of"] == track
            reports[mine, 3] = np.count_nonzero(ends <= work["limit_s"])
            busy[mine] = ends[-1] if count else 0
        if work["looks"]:
            results = np.full((len(work["blocks"]), 4), 0xFFFFFFFF, np.uint32)
            for unit, (begin, count) in enumerate(work["readings"]):
                address = work["blocks"][begin : begin + count].astype(np.int64) << work["block_shift"]
                at = unit_of[unit]
                far = self.home(address) != self.domain(at)
                slices = self.slices[self.group_of[at], address // 128 * 2654435761 % 80]
                for k, (kind, ns) in enumerate(
                    (("first", 600.0), ("again", 150.0), ("change", 300.0))[: work["looks"]]
                ):
                    waited = (
                        ns + own[at] * 5 + slices + (far * (self.far_ns - self.near_ns) if kind in self.tells else 0)
                    )
                    noise = 1 + self.noise * self.rng.standard_normal(count).clip(-3, 3)
                    if kind == "first":  # memory is refreshed now and then
                        noise += self.rng.random(count) < 0.03
                    waited = waited * noise * self.slow
                    results[begin : begin + count, k] = waited / ns_per_tick
                    busy[unit] += waited.sum() * (rounds if k else 2 if work["touch"] else 1) / 1e9
            took[:] = 1e6
        elif work["steps"]:
            for block, (begin, count) in enumerate(work["readings"]):
                if count:
                    blocks = work["blocks"][begin : begin + count].astype(np.int64) << work["block_shift"]
                    near = np.mean(self.home(blocks[:512]) == self.domain(unit_of[block]))
                    rate = self.unit_gb_s * (near * self.near_gain + 1 - near)
                    took[block] = work["steps"] * 4096 / rate
                    busy[block] = took[block] / 1e9
                    wide[block, 5] = work["steps"] * min(1, work["limit_s"] / busy[block])
        elif load:
            wide[:, 5] = (took * self.unit_gb_s / 4096).astype(np.uint64)
        reports[:, 2] = busy > work["limit_s"]
        self.longest_s = max(self.longest_s, float(busy.max()))
        wide[:, 2] = (took / ns_per_tick).astype(np.uint64)
        wide[:, 3] = 1_000_000
        wide[:, 4] = 1_000_000 + took.astype(np.uint64)
        return results, reports

    def clusters(self, size: int) -> list[int]:
        if self.platform == "rocm":
            return []
        found, number = [], 0
        group = np.asarray(self.group_of)
        for g in np.unique(group):
            units = self.rng.permutation(np.flatnonzero(group == g))
            for i in range(0, len(units) - size + 1, size):
                for u in units[i : i + size]:
                    found += [int(self.number[u]), number]
                number += 1
        return found
