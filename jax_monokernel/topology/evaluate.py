"""What raw numbers of the probe mean: pure functions of arrays. Times are in nanoseconds.

A ping-pong between units a and b over one word takes, one way, about `d(a, home) + d(b, home)`: each of them reaches
the memory that the word lives in. So a unit's distance to many words is known up to constants from games with a few
partners (`unit_profiles`), units that are near the same words belong together (`cluster_profiles`), and a block of
memory lives where the pair of units is that plays fastest over it (`block_homes`).
"""

from __future__ import annotations

import dataclasses

import numpy as np


def unit_profiles(times: np.ndarray, rounds: int = 8) -> np.ndarray:
    """How far each unit is from each word, up to a constant of the unit and one of the word.

    Args:
      times: float [units, partners, words]; NaN where nothing was measured, as with oneself.
      rounds: of the alternating medians.

    Returns:
      float [units, words], with a median of 0 along each row; NaN for a unit that was never measured.
    """
    with np.errstate(all="ignore"):
        own = np.zeros((times.shape[0], times.shape[2]))
        for _ in range(rounds):
            partner = _nanmedian(times - own[:, None, :], 0)  # what a partner adds, for each word
            own = _nanmedian(times - partner[None], 1)
        return own - _nanmedian(own, 1)[:, None]


@dataclasses.dataclass(frozen=True)
class Clusters:
    """Labels of items, and how sure they are."""

    labels: np.ndarray  # int [items], 0 upwards in the order of first appearance; -1: unknown
    count: int
    separation: float  # distance of the two clusters that are nearest, over the spread inside clusters; 0 for one


def cluster_profiles(profiles: np.ndarray, most: int = 8, least_separation: float = 2.5) -> Clusters:
    """Which rows are alike.

    The number of clusters is the one whose clusters are farthest apart beyond twice their spread; one, if they are less
    than `least_separation` spreads apart.

    Args:
      profiles: float [items, features]; fewer than 6 items are one cluster.
      most: clusters.
      least_separation: see `Clusters.separation`.
    """
    from scipy.cluster.hierarchy import fcluster, linkage

    known = ~np.isnan(profiles).any(axis=1)
    labels = np.full(len(profiles), -1)
    rows = profiles[known]
    if len(rows) < 6:
        labels[known] = 0
        return Clusters(labels, 1, 0.0)
    tree = linkage(rows, "average")
    best, separation, lead = np.zeros(len(rows), int), 0.0, 0.0
    for cut in range(2, min(3 * most, len(rows) - 1) + 1):
        found = _without_outliers(rows, fcluster(tree, cut, "maxclust") - 1)
        if not 2 <= found.max() + 1 <= most:
            continue
        apart, inside = _separation(rows, found)
        # Groups inside groups are seen too: the outermost is meant, whose clusters are the farthest apart.
        if apart >= least_separation * inside and apart - 2 * inside > lead:
            best, separation, lead = found, apart / max(inside, 1e-9), apart - 2 * inside
    labels[known] = _in_order(best)
    return Clusters(labels, int(labels.max()) + 1, separation)


def _without_outliers(rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Labels in which items that are alone, or almost, are given to the nearest cluster of the others."""
    counts = np.bincount(labels)
    kept = np.flatnonzero(counts >= max(2, 0.1 * counts.max()))
    centres = np.stack([np.median(rows[labels == c], axis=0) for c in kept])
    return np.argmin(np.abs(rows[:, None] - centres[None]).sum(axis=2), axis=1)


def _separation(rows: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Distance of the two clusters that are nearest, and spread of the least even cluster, root mean squares."""
    counts = np.bincount(labels)
    centres = np.stack([np.median(rows[labels == c], axis=0) for c in range(len(counts))])
    apart = min(_rms(centres[a] - centres[b]) for a in range(len(counts)) for b in range(a))
    # Without the few numbers that are far off for reasons of their own.
    inside = max(_trimmed_rms(rows[labels == c] - centres[c]) for c in range(len(counts)))
    return apart, inside


def cluster_latencies(times: np.ndarray, most: int = 64, least_step: float = 1.1) -> Clusters:
    """Groups of units that are nearer to each other than to the rest.

    Args:
      times: float [units, units] from the first to the second, NaN where unknown (such as on the diagonal).
      most: groups.
      least_step: ratio of the times across and inside groups below which there is one group.
    """
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    n = len(times)
    if n < 3:
        return Clusters(np.zeros(n, int), 1, 0.0)
    both = _nanmean_pair(times)
    np.fill_diagonal(both, 0)
    if np.isnan(both).any():
        raise ValueError("some pairs of units were not measured, neither one way nor the other")
    tree = linkage(squareform(both, checks=False), "average")
    heights = tree[:, 2]
    # Merges inside groups are at one height, those of groups higher: cut where the step is largest.
    first = max(1, n - most)
    steps = heights[first:] / np.maximum(heights[first - 1 : -1], 1e-9)
    if not len(steps) or steps.max() < least_step:
        return Clusters(np.zeros(n, int), 1, 0.0)
    cut = first + int(steps.argmax())
    labels = _in_order(fcluster(tree, n - cut, "maxclust") - 1)
    same = labels[:, None] == labels[None]
    np.fill_diagonal(same, False)
    across = both[labels[:, None] != labels[None]]
    inside = both[same]
    if not len(inside):
        return Clusters(np.zeros(n, int), 1, 0.0)
    spread = float(np.median(np.abs(inside - np.median(inside)))) * 1.4826
    separation = float((np.median(across) - np.median(inside)) / max(spread, 1e-9))
    return Clusters(labels, int(labels.max()) + 1, separation)


def union_groups(pairs: np.ndarray, units: int) -> np.ndarray:
    """Groups from what was seen together: int [units] labels in the order of first appearance.

    Args:
      pairs: int [n, 2] units that belong together.
      units: how many there are; one that is in no pair is a group of its own.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    pairs = np.asarray(pairs, int).reshape(-1, 2)
    graph = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(units, units))
    return _in_order(connected_components(graph, directed=False)[1])


@dataclasses.dataclass(frozen=True)
class Homes:
    """Where blocks of memory live."""

    homes: np.ndarray  # int8 [blocks]: a domain; -1: undecided
    near_ns: float  # median time of a pair over a block of its own domain
    far_ns: float  # and over others; NaN with one domain
    margin: float  # median advantage of the home over the next best domain, over the noise; 0 with one domain

    @property
    def share(self) -> np.ndarray:
        """float [domains]: shares of the decided blocks."""
        known = self.homes[self.homes >= 0]
        return np.bincount(known) / max(len(known), 1)


def block_homes(times: np.ndarray, players: np.ndarray | None = None, least_margin: float = 0.25) -> Homes:
    """The home of each block from ping-pong times of one pair of units in every domain.

    A pair's own constant is taken off first: its near time, a low quantile of its times over many blocks.

    Args:
      times: float [domains, blocks]; NaN where nothing was measured.
      players: int [domains, blocks] which pair of a domain played; one for all by default.
      least_margin: share of the contrast between near and far by which a block's home must be ahead; other blocks are
        undecided.
    """
    domains, blocks = times.shape
    if domains == 1:
        return Homes(np.zeros(blocks, np.int8), float(np.nanmedian(times)), float("nan"), 0.0)
    level = np.array(times, float)
    bases = []
    for d in range(domains):
        played_by = np.zeros(blocks, int) if players is None else players[d]
        for player in np.unique(played_by):
            chosen = (played_by == player) & ~np.isnan(times[d])
            if chosen.any():
                base = np.quantile(times[d][chosen], 0.5 / domains)
                level[d][chosen] -= base
                bases.append(base)
    unknown = np.isnan(level).any(axis=0)
    level[:, unknown] = 0
    order = np.sort(level, axis=0)
    homes = np.argmin(level, axis=0).astype(np.int8)
    lead = order[1] - order[0]
    contrast = float(np.median((order[1:].mean(axis=0) - order[0])[~unknown])) if (~unknown).any() else 0.0
    homes[unknown | (lead < least_margin * contrast)] = -1
    known = homes >= 0
    at_home = np.take_along_axis(level, np.maximum(homes, 0)[None].astype(int), 0)[0]
    noise = float(np.median(np.abs(at_home[known] - np.median(at_home[known])))) * 1.4826 if known.any() else 1.0
    near = float(np.median(bases))
    margin = float(np.median(lead[known])) / max(noise, 1e-9) if known.any() else 0.0
    return Homes(homes, near, near + contrast, margin)


@dataclasses.dataclass(frozen=True)
class LineHomes:
    """Homes, and whether they are found again."""

    homes: Homes
    agreement: float  # share of blocks that have the same home by even passes as by odd ones; 1 / domains for noise


def line_homes(levels: np.ndarray) -> LineHomes:
    """The home of each block from what units of every domain waited for it, several times.

    Args:
      levels: float [passes, domains, blocks] without each unit's own part; NaN where nothing was measured.
    """
    whole = block_homes(_nanmedian(levels, 0))
    even, odd = (block_homes(_nanmedian(levels[i::2], 0), least_margin=0).homes for i in (0, 1))
    return LineHomes(whole, float(np.mean(even == odd)))


def granule(homes: np.ndarray, block_bytes: int, least_share: float = 0.97) -> int:
    """The largest power of two of bytes whose aligned blocks live in one place; at least `block_bytes`.

    Args:
      homes: int [runs, blocks] of consecutive blocks of `block_bytes`; -1: undecided.
      block_bytes: the resolution.
      least_share: of the blocks that must have the home that most have in their larger block.
    """
    best, size = block_bytes, 2
    while size <= homes.shape[1]:
        parts = homes[:, : homes.shape[1] // size * size].reshape(-1, size)
        counts = np.stack([np.count_nonzero(parts == d, axis=1) for d in range(int(homes.max()) + 1)])
        decided = np.count_nonzero(parts >= 0)
        if decided == 0 or counts.max(axis=0).sum() < least_share * decided:
            break
        best, size = block_bytes * size, size * 2
    return best


@dataclasses.dataclass(frozen=True)
class PairTimes:
    """Medians of a latency matrix over the pairs inside groups and across them, in nanoseconds."""

    inside: float  # NaN if every group has one unit
    across: float  # NaN if there is one group
    groups: np.ndarray  # float [groups, groups]


def pair_times(times: np.ndarray, labels: np.ndarray) -> PairTimes:
    """Sums a latency matrix up.

    Args:
      times: float [units, units]; NaN where unknown.
      labels: int [units]; -1 is left out.
    """
    count = int(labels.max()) + 1
    table = np.full((count, count), np.nan)
    off = ~np.eye(len(times), dtype=bool)
    for a in range(count):
        for b in range(count):
            part = times[(labels == a)[:, None] & (labels == b)[None] & off]
            if part.size and not np.isnan(part).all():
                table[a, b] = np.nanmedian(part)
    known = (labels >= 0)[:, None] & (labels >= 0)[None] & off & ~np.isnan(times)
    same = labels[:, None] == labels[None]

    def median(chosen: np.ndarray) -> float:
        return float(np.median(times[chosen])) if chosen.any() else float("nan")

    return PairTimes(median(known & same), median(known & ~same), table)


def xor_bits(homes: np.ndarray, domains: int) -> list[int] | None:
    """The address bits of each bit of a home, if homes are XORs of address bits: masks over the block number.

    Args:
      homes: int [blocks], a power of two of them, of consecutive blocks; -1 (undecided) fits everything.
      domains: a power of two.

    Returns:
      For each bit of the home a mask of block number bits whose parity it is, up to a constant; None if there are none.
    """
    blocks = len(homes)
    if blocks & (blocks - 1) or domains & (domains - 1) or blocks < 2 or domains < 2:
        return None
    number = np.arange(blocks)
    masks = []
    for bit in range(domains.bit_length() - 1):
        known = homes >= 0
        values = (homes >> bit) & 1
        mask = 0
        for address_bit in range(blocks.bit_length() - 1):
            partner = number ^ (1 << address_bit)
            both = known & known[partner]
            if both.any() and np.mean(values[both] != values[partner][both]) > 0.5:
                mask |= 1 << address_bit
        parity = np.bitwise_count(number & mask) & 1
        wrong = np.mean((values ^ parity)[known] != np.median((values ^ parity)[known])) if known.any() else 1.0
        if wrong > 0.02:
            return None
        masks.append(mask)
    return masks


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def _trimmed_rms(x: np.ndarray, share: float = 0.95) -> float:
    sizes = np.sort(np.abs(x), axis=None)
    return _rms(sizes[: max(1, int(len(sizes) * share))])


def _nanmedian(x: np.ndarray, axis: int) -> np.ndarray:
    import warnings

    if not np.isnan(x).any():
        return np.median(x, axis)  # many times as fast

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of slices without a number, which give NaN
        return np.nanmedian(x, axis=axis)


def _nanmean_pair(times: np.ndarray) -> np.ndarray:
    there, back = times, times.T
    return np.where(np.isnan(there), back, np.where(np.isnan(back), there, (there + back) / 2))


def _in_order(labels: np.ndarray) -> np.ndarray:
    """Labels renumbered by first appearance."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    rank = np.empty(len(first), int)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse]
