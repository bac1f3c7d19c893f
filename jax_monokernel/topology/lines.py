"""Where lines of memory live behind an L2 of several parts: what single units wait for them. NVIDIA.

Each half of the L2 of an H100 or H200 serves the SMs of its own side, and keeps copies of lines whose memory is on the
other side. So a word that two units of one half pass to and fro stays in their half, wherever its memory is, and flags
tell nothing of homes. Three other things might, and all are tried: the first look at a line after the caches were
emptied, which comes from its memory or what the half there still has; further looks, if there were no copies; and
atomic changes, which are made where the line is at home. What tells is decided by the numbers: homes found from half
of the passes must be those found from the others.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from jax_monokernel.topology import evaluate
from jax_monokernel.topology.probe import LOOKS, Probe

LINE_BYTES, PAGE_BYTES = 128, 4096
_RUN_BYTES, _RUNS = 16384, 48  # of the sample
_MOST_BYTES = 512 << 20  # whose homes are looked for, if they are smaller than a page's: several times an L2
_LEAST_CONTRAST_NS = (
    25.0  # of far over near: some 50 cycles; the way to one slice of a cache or another differs by less
)
_LEAST_AGREEMENT = 0.9  # of homes from even and odd passes over the sample
_PASSES = 24, 12  # over the sample, and over all blocks
_FLUSH_BYTES = 512 << 20  # several times an L2


SAMPLED = _RUNS * _RUN_BYTES // LINE_BYTES
NAMES = {"first": "a first look at a line", "again": "a line of the L2", "change": "an atomic change"}  # of `LOOKS`


@dataclasses.dataclass(frozen=True)
class Sample:
    """What looks at some lines said.

    `looked` is made for JSON: {"kind": of `LOOKS`, by which homes were found, or None, "lines": how many were
    looked at, "kinds": {of `LOOKS`: {"ns": [domains][homes] medians, or [domains][1] if it tells no homes,
    "contrast_ns": between far and near, "agreement": share, "tells": bool, "lead_ns": for each line what the units of
    domain 0 waited longer than those of 1}}, "page_shares": for each page of the sample, if the homes of three quarters
    of its lines are known, the share of those that live in domain 0}.
    """

    kind: str | None  # of `LOOKS`, which tells homes
    granule: int  # 0: no kind tells
    blocks: int  # how many at the start of memory homes can be found of
    block_bytes: int
    looked: Mapping[str, Any]


def look(probe: Probe, domains: np.ndarray, rng: np.random.Generator) -> Sample:
    """Looks at some lines, and whether that tells where they live.

    Args:
      probe: of an NVIDIA device. Nothing else may use its memory, of which the second half is read to empty the caches.
      domains: int [units]: which units are near each other.
      rng: chooses the lines.
    """
    half = probe.session.memory_bytes // 2
    runs = half // _RUN_BYTES // 2  # every other one, as those between are touched
    starts = np.sort(rng.choice(runs, size=min(_RUNS, runs), replace=False)) * (2 * _RUN_BYTES // LINE_BYTES)
    sample = (starts[:, None] + np.arange(_RUN_BYTES // LINE_BYTES)).reshape(-1)
    levels, times = _look(
        probe, domains, sample, LINE_BYTES, kinds=[0, 1, 2], passes=_PASSES[0], rng=rng, touch=_RUN_BYTES
    )
    found = [evaluate.line_homes(level) for level in levels]
    count = levels.shape[2]
    tells = [_tells(f, count) for f in found]
    kind = max(
        (k for k, yes in enumerate(tells) if yes),
        key=lambda k: (round(found[k].agreement, 2), found[k].homes.margin),
        default=None,
    )
    looked: dict[str, Any] = {
        "lines": len(sample),
        "kind": None if kind is None else LOOKS[kind],
        "kinds": {
            name: _summary(found[k], times[k], tells[k], levels[k], found[k if kind is None else kind].homes.homes)
            for k, name in enumerate(LOOKS)
        },
        "page_shares": [],
    }
    if kind is None:
        return Sample(None, 0, 0, PAGE_BYTES, looked)
    homes = found[kind].homes.homes
    pages = np.where(homes < 0, np.nan, homes == 0).reshape(-1, PAGE_BYTES // LINE_BYTES)
    known = np.count_nonzero(~np.isnan(pages), axis=1) >= 0.75 * pages.shape[1]
    looked["page_shares"] = [round(float(x), 4) for x in np.nanmean(pages[known], axis=1)]
    granule = evaluate.granule(homes.reshape(len(starts), -1), LINE_BYTES)
    block_bytes = min(granule, PAGE_BYTES)
    blocks = (half if block_bytes == PAGE_BYTES else min(half, _MOST_BYTES)) // block_bytes
    return Sample(LOOKS[kind], granule, blocks, block_bytes, looked)


def homes(probe: Probe, domains: np.ndarray, sample: Sample, rng: np.random.Generator) -> evaluate.Homes | None:
    """The homes of the first `sample.blocks` blocks of memory; None if they are not clear.

    Args:
      probe: as `look`.
      domains: as `look`.
      sample: with a kind that tells.
      rng: deals the blocks.
    """
    assert sample.kind is not None
    kind = LOOKS.index(sample.kind)
    blocks = np.arange(sample.blocks)
    touch = PAGE_BYTES // 2 if sample.block_bytes == PAGE_BYTES else 0  # smaller ones are so close that few wait
    levels, _ = _look(probe, domains, blocks, sample.block_bytes, kinds=[kind], passes=_PASSES[1], rng=rng, touch=touch)
    found = evaluate.line_homes(levels[0])
    return found.homes if _tells(found, levels.shape[2], least=0.7) else None  # agreement is of fewer passes


def _look(
    probe: Probe,
    domains: np.ndarray,
    blocks: np.ndarray,
    block_bytes: int,
    *,
    kinds: list[int],
    passes: int,
    rng: np.random.Generator,
    touch: int,
) -> tuple[np.ndarray, np.ndarray]:
    """What the units of each domain wait for blocks: float32 [kinds, passes, domains, blocks] nanoseconds.

    `kinds` are ascending indices of `LOOKS`. The first array is without each unit's own part, a low quantile of what it
    waits; the second as measured. In a launch each domain has its own part of the blocks, and before each launch the
    caches are emptied.
    """
    count = int(domains.max()) + 1
    times = np.full((len(kinds), passes, count, len(blocks)), np.nan, np.float32)
    levels = times.copy()
    order = rng.permutation(len(blocks))
    shift = block_bytes.bit_length() - 1
    units = [np.flatnonzero(domains == d) for d in range(count)]
    parts = [  # [turns][domains][units]; ascending, so that looks are not far from each other
        [
            [np.sort(order[(d + turn) % count :: count][i :: len(mine)]) for i in range(len(mine))]
            for d, mine in enumerate(units)
        ]
        for turn in range(count)
    ]
    for p, turn in itertools.product(range(passes), range(count)):
        _empty_caches(probe)
        chosen: list[np.ndarray] = [np.zeros(0, int)] * probe.units
        for mine, of_domain in zip(units, parts[turn], strict=True):
            for unit, part in zip(np.roll(mine, 5 * p).tolist(), of_domain, strict=True):
                chosen[unit] = part
        waited = probe.look([blocks[c] for c in chosen], shift=shift, kinds=kinds[-1] + 1, touch=touch)
        for unit, (c, all_kinds) in enumerate(zip(chosen, waited, strict=True)):
            if len(c):
                took = all_kinds[kinds]
                times[:, p, domains[unit], c] = took
                levels[:, p, domains[unit], c] = took - np.quantile(took, 0.5 / count, axis=1, keepdims=True)
    return levels, times


def _empty_caches(probe: Probe) -> None:
    """Reads what nobody looks at: the second half of memory."""
    pages = probe.session.memory_bytes // PAGE_BYTES
    last = np.arange(max(pages // 2, pages - _FLUSH_BYTES // PAGE_BYTES), pages)
    parts = [part[: len(part) // 2 * 2] for part in np.array_split(last, probe.units)]
    probe.read(parts, bytes_each=len(parts[0]) * PAGE_BYTES)


def _tells(found: evaluate.LineHomes, count: int, least: float = _LEAST_AGREEMENT) -> bool:
    """Whether homes were found, and not noise or the way to one slice of a cache and another."""
    homes, share = found.homes, found.homes.share
    even = len(share) == count and float(share.min()) > 0.25 / count
    clear = homes.far_ns - homes.near_ns > _LEAST_CONTRAST_NS
    return even and clear and found.agreement > least and float(np.mean(homes.homes >= 0)) > 0.5


def _summary(
    found: evaluate.LineHomes, times: np.ndarray, tells: bool, levels: np.ndarray, homes: np.ndarray
) -> dict[str, Any]:
    middle = np.nanmedian(times, axis=0)  # [domains, lines]
    count = len(middle)
    by_home = [[_median(row[homes == h]) for h in range(count)] if tells else [_median(row)] for row in middle]
    level = np.nanmedian(levels, axis=0)
    lead = level[0] - level[1] if count > 1 else level[0]
    return {
        "ns": by_home,
        "contrast_ns": round(float(found.homes.far_ns - found.homes.near_ns), 1),
        "agreement": round(found.agreement, 4),
        "tells": tells,
        "lead_ns": np.round(np.nan_to_num(lead)).astype(int).tolist(),
    }


def _median(x: np.ndarray) -> float | None:
    return round(float(np.nanmedian(x)), 1) if x.size else None


def waits(looked: Mapping[str, Any], kind: str) -> tuple[float, float]:
    """What units wait for lines near them and elsewhere, in nanoseconds, by a kind of look that tells."""
    table = looked["kinds"][kind]["ns"]
    near = np.mean([row[d] for d, row in enumerate(table)])
    far = np.mean([x for d, row in enumerate(table) for h, x in enumerate(row) if h != d])
    return float(near), float(far)


def describe(looked: Mapping[str, Any]) -> list[str]:
    """What looks said, as sentences."""
    out = []
    for kind, what in NAMES.items():
        of = looked["kinds"][kind]
        table = of["ns"]
        if of["tells"]:
            near, far = waits(looked, kind)
            out.append(f"{what}: a unit waits {near:.0f} ns near it and {far:.0f} ns elsewhere")
        else:
            each = " and ".join(f"{row[0]:.0f}" for row in table)
            out.append(f"{what}: units of each part wait {each} ns, and that does not tell where the line lives")
    if looked["kind"] is None:
        out.append("no home of any memory was found")
        return out
    shares = np.array(looked["page_shares"])
    whole = int(np.count_nonzero(np.abs(shares - 0.5) > 0.43))  # two of 32 lines may be mistaken
    low, middle, high = (f"{q:.0%}" for q in np.quantile(shares, [0, 0.5, 1])) if len(shares) else ("", "", "")
    if whole == len(shares):
        out.append(f"all {whole} pages of 4 KiB that were looked at line by line have one home each")
    else:
        out.append(
            f"pages of 4 KiB have no home of their own: of {len(shares)} that were looked at {whole} have all lines "
            f"in one part; {low} to {high} are in the first, in the median {middle}"
        )
    return out
