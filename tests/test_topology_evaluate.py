"""What the numbers of the topology probe mean: on numbers that are made up, with noise, and on those of an H200."""

from __future__ import annotations

import re
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from jax_monokernel.topology import evaluate, recorded, topology_of, tree


def same_partition(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two labellings make the same groups."""
    pairs = set(zip(a.tolist(), b.tolist(), strict=True))
    return len(pairs) == len(set(a.tolist())) == len(set(b.tolist()))


def distances(units: np.ndarray, words: np.ndarray, near: float, far: float) -> np.ndarray:
    """[units, words]: near in the own domain; on a ring of domains farther from the opposite one."""
    count = int(max(units.max(), words.max())) + 1
    hops = np.abs(units[:, None] - words[None])
    hops = np.minimum(hops, count - hops)
    return np.where(hops == 0, near, far + 20.0 * np.maximum(hops - 1, 0))


@pytest.mark.parametrize("domains", [1, 2, 4, 8])
@pytest.mark.parametrize("noise", [1.0, 8.0])
def test_units_that_are_near_the_same_words(domains, noise):
    rng = np.random.default_rng(domains)
    units = rng.permutation(np.arange(96) % domains)
    words = rng.permutation(np.arange(48) % domains)
    near = distances(units, words, 120, 200)
    own = rng.normal(0, 15, len(units))  # some units are slower than others, whatever the word
    partners = rng.choice(96, 3, replace=False)
    times = near[:, None] + near[partners][None] + own[:, None, None] + own[partners][None, :, None]
    times += (
        rng.normal(0, noise, times.shape) + rng.exponential(noise, times.shape) * (rng.random(times.shape) < 0.02) * 50
    )
    for i, p in enumerate(partners):
        times[p, i] = np.nan
    found = evaluate.cluster_profiles(evaluate.unit_profiles(times))
    assert found.count == domains
    assert same_partition(found.labels, units)
    assert (found.separation > 2.5) == (domains > 1)


def test_units_that_were_not_measured_are_unknown():
    times = np.full((8, 2, 6), np.nan)
    times[:7] = (
        100 + 50 * (np.arange(7) % 2)[:, None, None] * (np.arange(6) % 2) + np.random.default_rng(0).random((7, 2, 6))
    )
    found = evaluate.cluster_profiles(evaluate.unit_profiles(times))
    assert found.labels[7] == -1
    assert same_partition(found.labels[:7], np.arange(7) % 2)


def test_one_unit_apart_from_all_others_is_no_group():
    profiles = np.random.default_rng(0).normal(0, 1, (40, 12))
    profiles[17] += 100 * (np.arange(12) % 2)
    assert evaluate.cluster_profiles(profiles).count == 1


@pytest.mark.parametrize("sizes", [(38,) * 8, (30, 36, 38, 38, 12, 38, 38, 26), (5, 5), (1, 3, 4)], ids=str)
def test_groups_from_latencies(sizes):
    rng = np.random.default_rng(1)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    rng.shuffle(labels)
    same = labels[:, None] == labels[None]
    times = np.where(same, 642.0, 742.0) + rng.normal(0, 4, same.shape)
    np.fill_diagonal(times, np.nan)
    times[0, 1] = np.nan  # the way back is known
    found = evaluate.cluster_latencies(times)
    assert same_partition(found.labels, labels)
    sums = evaluate.pair_times(times, found.labels)
    assert sums.inside == pytest.approx(642, abs=3)
    assert sums.across == pytest.approx(742, abs=3)
    assert np.nanmax(np.abs(np.diag(sums.groups) - 642)) < 15


def test_latencies_without_groups():
    times = np.random.default_rng(1).normal(700, 5, (30, 30))
    assert evaluate.cluster_latencies(times).count == 1
    sums = evaluate.pair_times(times, np.zeros(30, int))
    assert np.isnan(sums.across)
    with pytest.raises(ValueError, match="were not measured"):
        evaluate.cluster_latencies(np.full((5, 5), np.nan))


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 60), st.integers(1, 8), st.integers(0, 2**32 - 1))
def test_groups_from_what_was_seen_together(units, groups, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(groups, size=units)
    pairs = []
    for g in range(groups):
        members = rng.permutation(np.flatnonzero(labels == g))
        pairs += list(zip(members[:-1].tolist(), members[1:].tolist(), strict=True))
    found = evaluate.union_groups(np.array(pairs, int).reshape(-1, 2), units)
    assert same_partition(found, labels)
    assert found[0] == 0


@pytest.mark.parametrize("domains", [2, 4, 8])
@pytest.mark.parametrize("noise", [2.0, 10.0])
def test_homes_of_blocks(domains, noise):
    rng = np.random.default_rng(domains)
    homes = rng.integers(domains, size=4000)
    times = 2 * distances(np.arange(domains), homes, 120, 200)
    players = rng.integers(5, size=times.shape)
    times = (
        times + rng.normal(0, 30, (domains, 5))[np.arange(domains)[:, None], players]
    )  # every pair has a time of its own
    times += rng.normal(0, noise, times.shape)
    times[0, 7] = np.nan
    found = evaluate.block_homes(times, players)
    assert found.homes[7] == -1
    known = found.homes >= 0
    assert known.mean() > 0.97
    assert np.mean(found.homes[known] == homes[known]) > 0.999
    assert found.far_ns - found.near_ns == pytest.approx(160, rel=0.35)
    np.testing.assert_allclose(found.share, 1 / domains, atol=0.04)
    assert found.margin > 3


def test_homes_with_one_pair_and_with_noise_alone():
    rng = np.random.default_rng(0)
    alone = evaluate.block_homes(rng.normal(300, 5, (1, 50)))
    assert (alone.homes == 0).all()
    assert alone.margin == 0
    assert evaluate.block_homes(rng.normal(300, 5, (2, 2000))).margin < 2


@pytest.mark.parametrize("size", [128, 256, 512, 1024, 4096, 8192, 16384])
def test_the_granule_of_an_interleave(size):
    rng = np.random.default_rng(size)
    blocks = 16384 // 128
    # The first and the second half of every 2 * size bytes are apart, and runs differ.
    homes = (np.arange(blocks) * 128 // size + rng.integers(2, size=(48, 1))) % 2
    homes[rng.random(homes.shape) < 0.002] ^= 1
    homes[rng.random(homes.shape) < 0.01] = -1
    assert evaluate.granule(homes.astype(np.int8), 128) == size


def test_homes_that_are_parities_of_address_bits():
    number = np.arange(1024)
    masks = [0b0000101101, 0b1000010010]
    homes = sum((np.bitwise_count(number & m).astype(int) & 1) << i for i, m in enumerate(masks)) ^ 2
    homes[::77] = -1
    assert evaluate.xor_bits(homes, 4) == masks
    assert evaluate.xor_bits(np.random.default_rng(0).integers(4, size=1024), 4) is None
    assert evaluate.xor_bits(homes[:1000], 4) is None


RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "topology"


@pytest.mark.parametrize("file", sorted(RESULTS.glob("h200-*.json.gz")), ids=lambda p: p.name)
def test_the_halves_of_an_h200(file):
    found = recorded(file)
    near = evaluate.cluster_latencies(found.latency)
    assert near.count == 2
    assert np.bincount(near.labels).tolist() == [66, 66]
    device = topology_of(found)
    assert [g.name for g in device.root.children] == ["L2 half 0", "L2 half 1"]
    assert device.units == 132
    assert all(len({int(near.labels[u]) for u in g.units}) == 1 for g in device.groups())
    same = near.labels[:, None] == near.labels[None]
    assert np.nanmedian(found.latency[same]) < 0.75 * np.nanmedian(found.latency[~same])
    # Each half has memory of its own, page by page, and all kinds of looks that tell say the same of each line.
    np.testing.assert_array_equal(found.domains, near.labels)
    assert (found.block_bytes, len(device.domains)) == (4096, 2)
    assert np.abs(np.bincount(found.homes[found.homes >= 0]) / len(found.homes) - 0.5).max() < 0.01
    assert found.looked is not None
    leads = [np.array(kind["lead_ns"]) for kind in found.looked["kinds"].values() if kind["tells"]]
    assert len(leads) == 2
    np.testing.assert_array_equal(leads[0] > 0, leads[1] > 0)
    # Inside 4 MiB a page's home is the parity of some bits of its address: almost all pages that were looked at fit.
    runs = found.homes.reshape(-1, 1024)
    bits = [evaluate.xor_bits(run, 2) for run in runs]
    assert bits == [[0b1010101011]] * len(runs)
    odd = (runs & 1) ^ (np.bitwise_count(np.arange(1024) & bits[0][0]) & 1)
    ones = np.count_nonzero((odd == 1) & (runs >= 0), axis=1)
    assert np.minimum(ones, np.count_nonzero(runs >= 0, axis=1) - ones).sum() < 0.004 * found.homes.size


def test_recorded_measurements_are_in_the_docs():
    """docs/topology.md has what `topology --recorded FILE` prints, for every file that there is and no other."""
    text = (Path(__file__).parents[1] / "docs" / "topology.md").read_text()
    shown = re.findall(r"topology --recorded (\S+)\n```\n\n```text\n(.*?)\n```", text, re.DOTALL)
    files = {f"benchmarks/results/topology/{file.name}": file for file in RESULTS.iterdir()}
    assert {name for name, _ in shown} == set(files)
    for name, printed in shown:
        assert printed == tree(topology_of(recorded(files[name]))), name


# ---- Homes of lines, by several passes ----


def levels(homes: np.ndarray, contrast: float, noise: float, passes: int = 6) -> np.ndarray:
    rng = np.random.default_rng(len(homes))
    far = np.arange(2)[:, None] != homes[None]
    return contrast * far[None] + rng.normal(0, noise, (passes, 2, len(homes)))


def test_homes_of_lines_are_found_again():
    homes = np.random.default_rng(0).integers(2, size=3000)
    found = evaluate.line_homes(levels(homes, 100, 25))
    known = found.homes.homes >= 0
    assert known.mean() > 0.95
    assert np.mean(found.homes.homes[known] == homes[known]) > 0.995
    assert found.agreement > 0.95
    assert found.homes.far_ns - found.homes.near_ns == pytest.approx(100, rel=0.1)


def test_noise_has_no_homes_that_are_found_again():
    assert evaluate.line_homes(levels(np.zeros(3000, int), 0, 25)).agreement == pytest.approx(0.5, abs=0.05)
