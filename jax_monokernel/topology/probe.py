"""Runs the probe's launches on a device (ffi/gpu/probe) and gives back times of pairs and rates of reads, by unit.

A unit is named by where it is: its SM, or its XCD, shader engine and compute unit. Which work-group of a launch runs
there differs from launch to launch, so the kernel looks up which unit it is, and all numbers here are of units.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

PLACES = 2048  # that the kernel knows
NO_UNIT = 0xFFFFFFFF
WORD_BYTES = 32  # what places of words are counted in
STEP_BYTES = 4096  # what readers take at once
LOOKS = ("first", "again", "change")  # what `Probe.look` measures, in this order
START_S = 3.0  # that a launch may take beside its work, before it is given up
# What its work may take. Hand-offs and looks were seen to take 0.2 to 1.5 us, units to read 2.5 TB/s together, and 45
# GB/s alone.
_ACCESS_S = 20e-6
_GB_S, _UNIT_GB_S = 100.0, 2.0
_WORK_S = 2.0  # of one launch, by these numbers: longer work is cut into several


class Session(Protocol):
    """What `jax_monokernel._native.GpuProbe` offers."""

    @property
    def name(self) -> str:
        """The device's name."""

    @property
    def arch(self) -> str:
        """Its architecture."""

    @property
    def driver_version(self) -> int:
        """The driver's version."""

    @property
    def units(self) -> int:
        """Multiprocessors or compute units."""

    @property
    def memory_bytes(self) -> int:
        """Bytes that words and blocks are in."""

    @property
    def run(self) -> Callable[..., tuple[Any, Any]]:
        """One launch."""

    def clusters(self, size: int) -> list[int]:
        """SMs that form clusters."""


class ProbeError(RuntimeError):
    """The device did not answer as it should."""


@dataclasses.dataclass(frozen=True, order=True)
class Place:
    """Where a unit is."""

    xcc: int  # XCD; 0 on NVIDIA
    se: int  # shader engine; 0 on NVIDIA
    cu: int  # compute unit of the shader engine (with bit 4: its second array); SM on NVIDIA

    @property
    def number(self) -> int:
        """What the kernel looks its unit up by."""
        return self.xcc << 7 | self.se << 5 | self.cu


def _too_long(doing: str, work_s: float) -> ProbeError:
    limit = START_S + work_s
    return ProbeError(f"{doing} took longer than {limit:.1f} seconds; does something else run on the device?")


def _at_once(accesses: int) -> int:
    """Into how many a launch is cut, of jobs or blocks that take a lane so many accesses each."""
    return max(1, int(_WORK_S / (_ACCESS_S * accesses)))


def places(reports: np.ndarray, platform: str) -> list[Place]:
    """Where each block of a launch ran.

    Args:
      reports: u32 [units, 16] as the probe gives them.
      platform: "cuda" or "rocm". On ROCm the first field is the register HW_ID (CU in bits 11:8, SH in 12, SE in 14:13
        on gfx942; AMD's HIP headers), the second one XCC_ID.
    """
    if platform == "cuda":
        return [Place(0, 0, int(r[0])) for r in reports]
    return [Place(int(r[1]), int(r[0]) >> 13 & 3, int(r[0]) >> 8 & 31) for r in reports]


@dataclasses.dataclass(frozen=True)
class Reads:
    """What one launch of readers did."""

    gb_s: float  # of all units together, from the first that began to the last that ended
    unit_gb_s: np.ndarray  # float [units]; 0 for those that read nothing


class Probe:
    """A device under the probe."""

    def __init__(self, session: Session, platform: str) -> None:
        self.session, self.platform = session, platform
        self.launches = 0
        self._unit_of = np.zeros(0, np.uint32)
        self.places: list[Place] = []
        found = places(self._run()[1], platform)
        if len(set(found)) != len(found):
            raise ProbeError(
                f"{session.name} put two work-groups on one unit of {len(found)}; the probe needs a device whose units "
                "are all free"
            )
        self.places = sorted(found)
        self._number = {place: i for i, place in enumerate(self.places)}
        self._unit_of = np.full(PLACES, NO_UNIT, np.uint32)
        for unit, place in enumerate(self.places):
            if place.number >= PLACES:
                raise ProbeError(f"{session.name} has a unit at {place}, which the probe cannot number")
            self._unit_of[place.number] = unit

    @property
    def units(self) -> int:
        """How many there are."""
        return len(self.places)

    def _run(self, work_s: float = 0.0, **work: Any) -> tuple[np.ndarray, np.ndarray]:
        """One launch, which the device ends when it has taken `START_S` and, at most, `work_s` seconds."""
        empty = np.zeros((0, 2), np.uint32)
        arguments = {
            "unit_of": self._unit_of,
            "jobs": empty,
            "tracks": empty,
            "track_of": np.zeros(0, np.int32),
            "blocks": np.zeros(0, np.uint32),
            "readings": empty,
            "block_shift": 12,
            "steps": 0,
            "batches": 1,
            "rounds": 1,
            "warm_up": 0,
            "touch": 0,
            "looks": 0,
            "limit_s": START_S + work_s,
        }
        self.launches += 1
        results, reports = (np.asarray(x) for x in self.session.run(**arguments | work))
        if self.places and places(reports, self.platform) != self.places:
            raise ProbeError("the device's units changed between two launches; does something else run on it?")
        return results, reports

    def play(
        self,
        tracks: Sequence[np.ndarray],
        *,
        batches: int = 3,
        rounds: int = 6,
        warm_up: int = 3,
        load: np.ndarray | None = None,
        load_shift: int = 12,
    ) -> tuple[list[np.ndarray], float]:
        """Plays ping-pong.

        Args:
          tracks: for each track int [jobs, 3]: the unit that asks, the one that answers, the place of the word in units
            of 32 bytes. The jobs of a track run one after the other, tracks side by side; no unit may be in two, and no
            word: each pair would wait for values that the other one has written over.
          batches: of which the fastest counts.
          rounds: there and back, in a batch.
          warm_up: rounds before the first batch.
          load: blocks that the units read meanwhile, each its part of them; none by default.
          load_shift: binary logarithm of the bytes of such a block.

        Returns:
          For each track float [jobs]: nanoseconds one way; and GB/s of what all units read meanwhile.

        Raises:
          ProbeError: a wait that did not end in time.
        """
        times = [np.full(len(t), np.nan) for t in tracks]
        rates = []
        accesses = 2 * (warm_up + batches * rounds) + 4  # of a job, with the word's own value and the turn
        at_once, longest = _at_once(accesses), max(map(len, tracks), default=0)
        for first in range(0, longest, at_once):
            asked, track_of, ranges, begin = [], np.full(self.units, -1, np.int32), [], 0
            for number, track in enumerate(tracks):
                jobs = track[first : first + at_once]
                track_of[jobs[:, 0]] = track_of[jobs[:, 1]] = number
                asked.append(np.stack([jobs[:, 0] | jobs[:, 1] << 16, jobs[:, 2]], axis=1))
                ranges.append([begin, len(jobs)])
                begin += len(jobs)
            if load is not None:
                track_of[track_of < 0] = 0  # they read until the first track is done
            work_s = min(at_once, longest - first) * accesses * _ACCESS_S
            results, reports = self._run(
                work_s,
                jobs=np.concatenate(asked).astype(np.uint32),
                tracks=np.array(ranges, np.uint32),
                track_of=track_of,
                **self._reading(load, load_shift),
                batches=batches,
                rounds=rounds,
                warm_up=warm_up,
            )
            failed = np.flatnonzero(reports[:, 2])
            if len(failed):
                unit = int(failed[reports[failed, 3].argmin()])  # others may only have waited for their turn
                job = first + int(reports[unit, 3])
                a, b, word = tracks[track_of[unit]][job].tolist()
                raise _too_long(f"job {job}, of units {a} and {b} over the word at byte {word * WORD_BYTES},", work_s)
            ns, read = self._clock(reports)
            rates.append(read)
            for number, (start, count) in enumerate(ranges):
                times[number][first : first + count] = results[start : start + count, 0] * ns / (2 * rounds)
        return times, float(np.median(rates)) if rates else 0.0

    def read(self, blocks_of: Sequence[np.ndarray], *, shift: int = 12, bytes_each: int = 64 << 20) -> Reads:
        """Lets units read blocks.

        Args:
          blocks_of: for each unit the numbers of its blocks; none: it reads nothing. At least 8 KiB otherwise.
          shift: binary logarithm of a block's bytes, 7 to 12.
          bytes_each: how much each unit reads, going round its blocks.
        """
        steps = max(bytes_each // STEP_BYTES // 32, 1) * 32  # what both readers take at once
        lists = [np.asarray(blocks, np.uint32) for blocks in blocks_of]
        sizes = np.array([len(x) for x in lists], np.uint32)
        readings = np.stack([np.cumsum(sizes) - sizes, sizes], axis=1).astype(np.uint32)
        active = sizes > 0
        own = steps * STEP_BYTES / 1e9
        work_s = max(own * np.count_nonzero(active) / _GB_S, own / _UNIT_GB_S)
        _, reports = self._run(work_s, blocks=np.concatenate(lists), readings=readings, block_shift=shift, steps=steps)
        wide = reports.view(np.uint64)
        begin, end, done = wide[:, 3].astype(np.int64), wide[:, 4].astype(np.int64), wide[:, 5].astype(np.int64)
        if (done[active] < steps).any():
            raise _too_long("reading memory", work_s)
        rates = np.where(active, done * STEP_BYTES / np.maximum(end - begin, 1), 0.0)
        total = done[active].sum() * STEP_BYTES / max(int(end[active].max() - begin[active].min()), 1)
        return Reads(float(total), rates)

    def look(
        self, blocks_of: Sequence[np.ndarray], *, shift: int, kinds: int = 1, rounds: int = 6, touch: int = 0
    ) -> list[np.ndarray]:
        """Lets units look at the first word of blocks, one after the other.

        Args:
          blocks_of: for each unit the numbers of its blocks.
          shift: binary logarithm of a block's bytes, 7 to 12.
          kinds: how many of `LOOKS`: the first look, further ones, and atomic changes that leave the word as it is.
          rounds: of the last two kinds, of which the fastest counts.
          touch: bits by which another word's place differs that is read before, so that no look waits for a page's
            translation; 0: none is.

        Returns:
          For each unit float [kinds, blocks]: nanoseconds.

        Raises:
          ProbeError: it did not end in time.
        """
        lists = [np.asarray(blocks, np.uint32) for blocks in blocks_of]
        found = [np.zeros((kinds, len(x))) for x in lists]
        accesses = 2 + bool(touch) + (kinds - 1) * rounds  # of a block, with its number
        at_once, longest = _at_once(accesses), max(map(len, lists), default=0)
        for first in range(0, longest, at_once):
            parts = [x[first : first + at_once] for x in lists]
            ends = np.cumsum([len(x) for x in parts])
            work_s = min(at_once, longest - first) * accesses * _ACCESS_S
            lines, reports = self._run(
                work_s,
                blocks=np.concatenate(parts),
                readings=np.array([[end - len(x), len(x)] for x, end in zip(parts, ends, strict=True)], np.uint32),
                block_shift=shift,
                rounds=rounds,
                touch=touch,
                looks=kinds,
            )
            if reports[:, 2].any():
                raise _too_long("looking at memory", work_s)
            ns, _ = self._clock(reports)
            for of_unit, part, end in zip(found, parts, ends, strict=True):
                of_unit[:, first : first + len(part)] = (lines[end - len(part) : end, :kinds] * ns).T
        return found

    def clusters(self, size: int) -> list[list[int]]:
        """Units that were seen in one cluster of this size; none on ROCm."""
        found = np.asarray(self.session.clusters(size), int).reshape(-1, 2)
        by_cluster: dict[int, list[int]] = {}
        for sm, cluster in found.tolist():
            unit = self._number.get(Place(0, 0, sm))
            if unit is not None:
                by_cluster.setdefault(cluster, []).append(unit)
        return list(by_cluster.values())

    def _reading(self, load: np.ndarray | None, shift: int) -> dict[str, Any]:
        if load is None:
            return {}
        part = len(load) // self.units
        if part < (2 * STEP_BYTES) >> shift:
            return {}
        readings = np.array([[i * part, part] for i in range(self.units)], np.uint32)
        return {"blocks": np.asarray(load, np.uint32), "readings": readings, "block_shift": shift}

    @staticmethod
    def _clock(reports: np.ndarray) -> tuple[float, float]:
        """Nanoseconds of a tick, and GB/s of all reads."""
        wide = reports.view(np.uint64)
        spent = (wide[:, 4] - wide[:, 3]).astype(float)
        ticks = wide[:, 2].astype(float)
        ns = float(spent.sum() / max(ticks.sum(), 1))
        return ns, float((wide[:, 5].astype(float) * STEP_BYTES / np.maximum(spent, 1)).sum())
