"""What `jax-monokernel topology --measure` does: the probe's launches in order, and what they amount to."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from jax_monokernel.topology import evaluate, lines
from jax_monokernel.topology.measurement import CLEAR, Measurement
from jax_monokernel.topology.probe import WORD_BYTES, Probe, ProbeError, Session

MEMORY_BYTES = 4 << 30  # that homes are looked for in and that is read: many times what caches hold
_PAGE = 4096
_MOST_PAGES, _MOST_BLOCKS = 1 << 20, 1 << 20  # whose homes are looked for; the second of blocks smaller than a page


_LEAST_CONTRAST = 0.15  # of far words over near ones
_T = TypeVar("_T")


class _Steps:
    """Runs the steps of a measurement. Of one that fails it is noted why, and what the others found is kept."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self.report = report
        self.missing: dict[str, str] = {}  # what was to be measured, and why it was not

    def __call__(self, what: str, step: Callable[[], _T], otherwise: _T) -> _T:
        self.report(what)
        try:
            return step()
        except (RuntimeError, ValueError) as error:
            self.missing[what] = str(error)
            self.report(f"this failed: {error}")
            return otherwise


@dataclasses.dataclass(frozen=True)
class _Near:
    """Which units are near which memory."""

    domains: np.ndarray  # int [units]
    separation: float
    profiles: np.ndarray  # float [units, words]
    homes: evaluate.Homes  # times are of flags
    granule: int = 0  # one domain: 0
    block_bytes: int = _PAGE  # of homes
    looked: Mapping[str, Any] | None = None  # as `lines.Sample`


def measure(
    session: Session, platform: str, *, seed: int = 0, report: Callable[[str], None] = lambda text: None
) -> Measurement:
    """Probes a device, in a few seconds.

    Args:
      session: `_native.GpuProbe`.
      platform: "cuda" or "rocm".
      seed: of the choice of words and partners.
      report: is told what is being measured.

    Returns:
      What was found. `missing` says which steps failed, and why.

    Raises:
      ProbeError, RuntimeError, ValueError: what the device or its driver said of the first launch.
    """
    start = time.monotonic()
    rng = np.random.default_rng(seed)
    probe = Probe(session, platform)
    steps = _Steps(report)
    xcds = len({p.xcc for p in probe.places})
    groups = steps(
        f"{probe.units} compute units on {xcds} XCDs" if platform == "rocm" else f"{probe.units} SMs",
        lambda: _groups(probe),
        np.zeros(probe.units, int),
    )
    near = (_near_by_flags if platform == "rocm" else _near_by_looks)(probe, groups, rng, steps)
    domains, homes = near.domains, near.homes.homes
    unknown = np.full((probe.units, probe.units), np.nan)
    latency = steps(
        "hand-offs between all pairs of units", lambda: _latency(probe, domains, homes, near.block_bytes), unknown
    )
    loaded, load = steps(
        "hand-offs while all units read", lambda: _loaded(probe, domains, homes, near.block_bytes), (unknown, 0.0)
    )
    stream: dict[str, float] = {}
    steps(
        "reads from near and far memory",
        lambda: _streams(probe, domains, groups, homes, near.block_bytes, stream),
        None,
    )
    return Measurement(
        name=session.name,
        platform=platform,
        arch=session.arch,
        driver_version=session.driver_version,
        places=probe.places,
        groups=groups,
        domains=domains,
        domain_separation=near.separation,
        profiles=near.profiles,
        latency=latency,
        latency_loaded=loaded,
        load_gb_s=load,
        granule_bytes=near.granule,
        block_bytes=near.block_bytes,
        homes=homes,
        near_ns=near.homes.near_ns,
        far_ns=near.homes.far_ns,
        home_margin=near.homes.margin,
        looked=near.looked,
        stream=stream,
        seconds=time.monotonic() - start,
        missing=steps.missing,
    )


def _near_by_flags(probe: Probe, groups: np.ndarray, rng: np.random.Generator, steps: _Steps) -> _Near:
    """By words that two units pass to and fro: on AMD's these go to where their memory is."""
    nobody = _Near(np.zeros(probe.units, int), 0.0, np.zeros((probe.units, 0)), _one_domain(probe, float("nan")))
    profiles = steps("which units are near the same memory", lambda: _profiles(probe, groups, rng), nobody.profiles)
    if not profiles.size:
        return nobody
    found = evaluate.cluster_profiles(profiles)
    domains = np.where(found.labels < 0, 0, found.labels)
    pairs = _witnesses(probe, domains, groups)

    def homes_of_memory() -> _Near:
        granule = _granule(probe, pairs, rng)
        block_bytes = min(max(granule, 128), _PAGE)
        homes = _homes(probe, pairs, block_bytes)
        if found.count > 1 and _holds(found.count, homes):
            return _Near(domains, found.separation, profiles, homes, granule, block_bytes)
        # What looked like domains has no memory of its own: noise, or memory that is equally far from everywhere.
        return dataclasses.replace(nobody, homes=_one_domain(probe, homes.near_ns), profiles=profiles)

    return steps(
        f"{found.count} memory domains; which memory is where",
        homes_of_memory,
        dataclasses.replace(nobody, profiles=profiles),
    )


def _near_by_looks(probe: Probe, groups: np.ndarray, rng: np.random.Generator, steps: _Steps) -> _Near:
    """By hand-offs, which tell the parts of NVIDIA's L2, and by what units of each part wait for lines."""
    one, no_profiles = np.zeros(probe.units, int), np.zeros((probe.units, 0))
    nobody = _Near(one, 0.0, no_profiles, _one_domain(probe, float("nan")))
    latency = steps(
        "which units are near each other",
        lambda: _latency(probe, one, np.zeros(1, np.int8), _PAGE),
        np.full((probe.units, probe.units), np.nan),
    )
    if np.isnan(latency).all():  # a failure, or one unit
        return nobody
    nobody = dataclasses.replace(nobody, homes=_one_domain(probe, float(np.nanmedian(latency))))
    found = evaluate.cluster_latencies(latency)
    if not (2 <= found.count <= 8 and found.separation >= CLEAR and np.bincount(found.labels).min() >= 4):
        return nobody
    sample = steps(
        f"what units wait for {lines.SAMPLED} lines of memory", lambda: lines.look(probe, found.labels, rng), None
    )
    if sample is None:
        return nobody
    nobody = dataclasses.replace(nobody, looked=sample.looked)
    if sample.kind is None:
        return nobody

    def with_homes() -> _Near:
        homes = lines.homes(probe, found.labels, sample, rng)
        if homes is None:
            return dataclasses.replace(nobody, looked=dict(sample.looked) | {"kind": None})
        unknown = dataclasses.replace(homes, near_ns=float("nan"), far_ns=float("nan"))
        granule, block_bytes = sample.granule, sample.block_bytes
        return _Near(found.labels, found.separation, no_profiles, unknown, granule, block_bytes, sample.looked)

    near = steps(
        f"by {sample.kind} looks {sample.granule} bytes live together; "
        f"where {sample.blocks} blocks of {sample.block_bytes} live",
        with_homes,
        nobody,
    )
    if not near.domains.any():
        return near
    near_ns, far_ns = steps(
        "hand-offs over words of each part",
        lambda: _flags(probe, _witnesses(probe, near.domains, groups), near.homes.homes, near.block_bytes),
        (float("nan"), float("nan")),
    )
    return dataclasses.replace(near, homes=dataclasses.replace(near.homes, near_ns=near_ns, far_ns=far_ns))


def _one_domain(probe: Probe, near_ns: float) -> evaluate.Homes:
    count = min(probe.session.memory_bytes // _PAGE, _MOST_PAGES)
    return evaluate.Homes(np.zeros(count, np.int8), near_ns, float("nan"), 0.0)


def _flags(
    probe: Probe, pairs: list[list[tuple[int, int]]], homes: np.ndarray, block_bytes: int
) -> tuple[float, float]:
    """Medians of flags inside domains, over words that live there and elsewhere."""
    chosen = np.flatnonzero(homes >= 0)[:2048:4]
    times, _ = _play_words(probe, pairs, chosen * (block_bytes // WORD_BYTES))
    near = homes[chosen][None] == np.arange(len(times))[:, None]
    return float(np.nanmedian(times[near])), float(np.nanmedian(times[~near]))


def homes_of_pages(session: Session, found: Measurement) -> evaluate.Homes:
    """Homes of the 4 KiB pages of a session's memory, on a device that was measured.

    Args:
      session: `_native.GpuProbe` over the memory; what its words hold stays.
      found: of the same device.

    Raises:
      ProbeError: what the device said, or it has other units than were measured.
    """
    probe = Probe(session, found.platform)
    if probe.places != found.places:
        raise ProbeError(f"{session.name} has other units than were measured; measure it again")
    if found.platform == "cuda" and found.domains.any():
        raise ProbeError(f"pages of arrays on {session.name} cannot be looked up: flags do not tell their homes there")
    pairs = _witnesses(probe, found.domains, found.groups)
    places = np.arange(session.memory_bytes // _PAGE) * (_PAGE // WORD_BYTES)
    if len(pairs) < 2:
        return evaluate.Homes(np.zeros(len(places), np.int8), found.near_ns, found.far_ns, 0.0)
    return evaluate.block_homes(*_play_words(probe, pairs, places))


def _groups(probe: Probe) -> np.ndarray:
    """XCDs, or SMs that are seen in one cluster."""
    if probe.platform == "rocm":
        return np.unique([p.xcc for p in probe.places], return_inverse=True)[1]
    pairs = []
    for size, repeats in ((8, 4), (4, 2), (2, 2)):
        for _ in range(repeats):
            try:
                clusters = probe.clusters(size)
            except RuntimeError:  # a part of a device on which none of this size fits
                break
            for cluster in clusters:
                pairs += [(cluster[0], other) for other in cluster[1:]]
    if not pairs:
        return np.zeros(probe.units, int)
    return evaluate.union_groups(np.array(pairs), probe.units)


def _profiles(probe: Probe, groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """How far units are from some words. A partner in the XCD of a unit tells nothing: their words stay in its L2."""
    pages = probe.session.memory_bytes // _PAGE
    words = rng.choice(pages, size=min(32, pages), replace=False) * (_PAGE // WORD_BYTES)
    partners: list[int] = []
    for unit in rng.permutation(probe.units).tolist():
        if len(partners) < 4 and groups[unit] not in groups[partners]:
            partners.append(unit)
    wanted, where = [], []
    for u in range(probe.units):
        for i, partner in enumerate(partners):
            if groups[u] == groups[partner]:
                continue
            for w, word in enumerate(words.tolist()):
                wanted.append((u, partner, word))
                where.append((u, i, w))
    times = np.full((probe.units, max(len(partners), 1), len(words)), np.nan)
    if wanted:
        (found,), _ = probe.play([np.array(wanted)])
        times[tuple(np.array(where).T)] = found
    return evaluate.unit_profiles(times)


def _witnesses(probe: Probe, domains: np.ndarray, groups: np.ndarray, most: int = 16) -> list[list[tuple[int, int]]]:
    """For each domain disjoint pairs of its units; of different XCDs, because inside one the memory is not reached."""
    pairs: list[list[tuple[int, int]]] = []
    for d in range(int(domains.max()) + 1):
        units = np.flatnonzero(domains == d).tolist()
        if probe.platform == "rocm":
            by_group = [[u for u in units if groups[u] == g] for g in sorted(set(groups[units].tolist()))]
            found = list(zip(by_group[0], by_group[1], strict=False)) if len(by_group) > 1 else []
        else:
            half = len(units) // 2
            found = list(zip(units[:half], units[half:], strict=False))
        pairs.append(found[:most])
    if any(not p for p in pairs):
        return [list(itertools.islice(zip(range(0, probe.units - 1, 2), range(1, probe.units, 2), strict=False), most))]
    return pairs


def _play_words(probe: Probe, pairs: list[list[tuple[int, int]]], places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Times [domains, words] of one pair of each domain over every word, and which pair it was."""
    # Dealt at random, so that every pair meets words of every home.
    order = np.random.default_rng(len(places)).permutation(len(places))
    times = np.full((len(pairs), len(places)), np.nan)
    players = np.zeros((len(pairs), len(places)), int)
    for turn in range(len(pairs)):
        tracks, at = [], []
        for d, of_domain in enumerate(pairs):
            part = order[(d + turn) % len(pairs) :: len(pairs)]  # no word is in two tracks of a launch
            of_domain = of_domain[: max(1, len(places) // 128)]  # each meets enough to know its near time
            for i, (a, b) in enumerate(of_domain):
                chosen = np.sort(part[i :: len(of_domain)])
                tracks.append(np.stack([np.full(len(chosen), a), np.full(len(chosen), b), places[chosen]], axis=1))
                at.append((d, i, chosen))
        found, _ = probe.play(tracks, batches=3, rounds=4, warm_up=2)
        for (d, i, chosen), values in zip(at, found, strict=True):
            times[d, chosen] = values
            players[d, chosen] = i
    return times, players


def _granule(probe: Probe, pairs: list[list[tuple[int, int]]], rng: np.random.Generator) -> int:
    """Bytes that live together: from words 128 bytes apart in 48 runs of 16 KiB."""
    if len(pairs) < 2:
        return 0
    run, step = 4 * _PAGE, 128
    runs = probe.session.memory_bytes // run
    starts = rng.choice(runs, size=min(48, runs), replace=False)
    places = (starts[:, None] * (run // WORD_BYTES) + np.arange(run // step) * (step // WORD_BYTES)).reshape(-1)
    homes = evaluate.block_homes(*_play_words(probe, pairs, places)).homes
    return evaluate.granule(homes.reshape(len(starts), -1), step)


def _homes(probe: Probe, pairs: list[list[tuple[int, int]]], block_bytes: int) -> evaluate.Homes:
    most = _MOST_PAGES if block_bytes == _PAGE else _MOST_BLOCKS  # in all several times an L2
    count = min(probe.session.memory_bytes // block_bytes, most)
    if len(pairs) < 2:
        places = np.arange(0, count, max(count // 1024, 1)) * (block_bytes // WORD_BYTES)
        found = evaluate.block_homes(*_play_words(probe, pairs, places))
        return dataclasses.replace(found, homes=np.zeros(count, np.int8))
    return evaluate.block_homes(*_play_words(probe, pairs, np.arange(count) * (block_bytes // WORD_BYTES)))


def _holds(count: int, homes: evaluate.Homes) -> bool:
    """Whether blocks really have homes in all domains, which they are seen to have."""
    share = homes.share
    if homes.far_ns - homes.near_ns < _LEAST_CONTRAST * homes.near_ns:
        return False  # units that are a little nearer to some slices of the same cache
    even = len(share) == count and float(share.min()) > 0.25 / count
    return even and float(np.mean(homes.homes >= 0)) > 0.5 and homes.margin > 2


def _near_words(domains: np.ndarray, homes: np.ndarray, block_bytes: int) -> np.ndarray:
    """For each domain the place of a word that lives in it."""
    first = [int(np.argmax(homes == d)) for d in range(int(domains.max()) + 1)]
    return np.array(first) * (block_bytes // WORD_BYTES)


def _latency(probe: Probe, domains: np.ndarray, homes: np.ndarray, block_bytes: int) -> np.ndarray:
    words = _near_words(domains, homes, block_bytes)
    a, b = np.nonzero(~np.eye(probe.units, dtype=bool))
    (times,), _ = probe.play([np.stack([a, b, words[domains[a]]], axis=1)])
    found = np.full((probe.units, probe.units), np.nan)
    found[a, b] = times
    return found


def _loaded(probe: Probe, domains: np.ndarray, homes: np.ndarray, block_bytes: int) -> tuple[np.ndarray, float]:
    words = _near_words(domains, homes, block_bytes)
    a, b = np.nonzero(np.triu(np.ones((probe.units, probe.units), bool), 1))
    jobs = np.stack([a, b, words[domains[a]]], axis=1)
    # All memory, page after page: of a part of it the caches would hold much.
    pages = np.arange(probe.session.memory_bytes // _PAGE)
    (times,), rate = probe.play([jobs], batches=2, rounds=3, warm_up=1, load=pages)
    found = np.full((probe.units, probe.units), np.nan)
    found[a, b] = found[b, a] = times
    return found, rate


def _streams(
    probe: Probe,
    domains: np.ndarray,
    groups: np.ndarray,
    homes: np.ndarray,
    block_bytes: int,
    found: dict[str, float],
    repeats: int = 3,
) -> None:
    """Adds rates of units, groups, domains and the device to `found`; but for groups from near and far memory too.

    Each unit reads its part of the blocks in their order, as a kernel reads its weights. Where blocks are smaller than
    a page, those that have homes are a small part of memory, in small pieces: then "mixed" is what near and far ones
    are to be compared with.
    """
    count = int(domains.max()) + 1
    blocks = np.arange(len(homes))
    near_of = [np.flatnonzero(homes == d) for d in range(count)]
    far_of = [np.flatnonzero((homes != d) & (homes >= 0)) for d in range(count)]
    whole = count == 1 or block_bytes < _PAGE
    everything = np.arange(probe.session.memory_bytes // _PAGE) if whole else blocks
    page_shift, shift = _PAGE.bit_length() - 1, block_bytes.bit_length() - 1

    def deal(source: Callable[[int], np.ndarray], chosen: np.ndarray) -> list[np.ndarray]:
        """Each domain's chosen units share its source."""
        out = [np.zeros(0, np.uint32)] * probe.units
        for d in range(count):
            mine = chosen & (domains == d)
            if mine.any():
                dealt = _deal_to(mine, source(d), 8192 >> shift)
                out = [b if chosen_ else a for a, b, chosen_ in zip(out, dealt, mine, strict=True)]
        return out

    def reads(blocks_of: list[np.ndarray], shift: int) -> tuple[float, float]:
        """Of all bytes until the last unit ends; and the sum of units' own rates."""
        # Long enough for a clock that ticks every few microseconds. Each time from elsewhere: caches may hold what was
        # read last.
        rates = []
        for i in range(repeats):
            rolled = [np.roll(b, -(len(b) * i // repeats)) for b in blocks_of]
            found = probe.read(rolled, shift=shift, bytes_each=128 << 20)
            rates.append((found.gb_s, found.unit_gb_s.sum()))
        together, alone = np.median(rates, axis=0)
        return float(together), float(alone)

    def rate(blocks_of: list[np.ndarray]) -> float:
        return reads(blocks_of, shift)[0]

    def of_all(chosen: np.ndarray) -> tuple[float, float]:
        return reads(_deal_to(chosen, everything, 8192 >> page_shift), page_shift)

    def rate_of_all(chosen: np.ndarray) -> float:
        return of_all(chosen)[0]

    everyone = np.ones(probe.units, bool)
    # Who reads everything deals it among all units, not among those of each domain.
    found["device"], found["device_sum"] = of_all(everyone)
    largest = np.bincount(groups)
    if len(largest) > 1:
        # Of whole groups, four at most: others are alike. They read all memory.
        several = np.flatnonzero(largest == largest.max())[:4]
        found["group"] = float(np.median([rate_of_all(groups == g) for g in several]))
    first = np.array([int(np.argmax(domains == d)) for d in range(count)])
    sources = {}
    if count > 1:
        sources = {"near": lambda d: near_of[d], "far": lambda d: far_of[d]}
        if block_bytes < _PAGE:
            found["device_mixed"] = rate(_deal_to(everyone, blocks, 8192 >> shift))
        found["device_near"] = rate(deal(sources["near"], everyone))
        found["device_far"] = rate(deal(_dealt_far(far_of, near_of), everyone))
    for kind in ("", *sources):
        units: list[float] = []
        parts: list[float] = []
        for d in range(count):
            asked = [(units, np.arange(probe.units) == first[d])]
            if count > 1:
                asked.append((parts, domains == d))
            for rates, chosen in asked:
                rates.append(rate(deal(sources[kind], chosen)) if kind else rate_of_all(chosen))
        suffix = f"_{kind}" if kind else ""
        found[f"unit{suffix}"] = float(np.median(units))
        if parts:
            found[f"domain{suffix}"] = float(np.median(parts))


def _deal_to(chosen: np.ndarray, blocks: np.ndarray, least: int) -> list[np.ndarray]:
    """Blocks for each unit: those that are chosen share them, in whole multiples of `least`."""
    out = [np.zeros(0, np.uint32)] * len(chosen)
    units = np.flatnonzero(chosen)
    for unit, part in zip(units, np.array_split(blocks, len(units)), strict=True):
        out[unit] = part[: len(part) // least * least]
    return out


def _dealt_far(far_of: list[np.ndarray], near_of: list[np.ndarray]) -> Callable[[int], np.ndarray]:
    """Far blocks such that no two domains read the same: of each domain's blocks every other one reads its own part."""
    count = len(near_of)
    if count == 2:
        return lambda d: far_of[d]
    parts = [np.array_split(blocks, count - 1) for blocks in near_of]
    return lambda d: np.concatenate([parts[o][(d - o - 1) % count] for o in range(count) if o != d])
