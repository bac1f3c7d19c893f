"""Pages of a tape in an order that suits the memory."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from tape_specs import specs

from jax_monokernel._bench.shapes import SHAPES
from jax_monokernel.plan import Plan, geometry
from jax_monokernel.topology import Constant, Group, Interleave, MemoryDomain, Topology, recorded, topology_of
from jax_monokernel.topology.placement import apply_order, page_traffic, place, place_tape, undo_order, why_not


def hashed_homes(pages: int, domains: int, seed: int) -> np.ndarray:
    """Homes as a channel hash gives them: every bit of a home is the parity of some bits of the page's number."""
    rng = np.random.default_rng(seed)
    number = np.arange(pages) + int(rng.integers(1 << 20))
    home = np.zeros(pages, int)
    for bit in range(max(1, (domains - 1).bit_length())):
        mask = (1 << bit) | int(rng.integers(1 << 16)) << 3
        home |= (np.bitwise_count(number & mask).astype(int) & 1) << bit
    return home % domains


@st.composite
def problems(draw):
    """(traffic, homes): mostly one reader a page, now and then two or none; homes hashed or at random, some unknown."""
    domains = draw(st.sampled_from([2, 3, 4, 8]))
    pages = draw(st.integers(1, 300))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    traffic = np.zeros((pages, domains))
    readers = np.sort(rng.integers(domains, size=pages)) if draw(st.booleans()) else rng.integers(domains, size=pages)
    traffic[np.arange(pages), readers] = 4096.0
    if draw(st.booleans()):
        other = rng.random(pages) < 0.2
        traffic[other] = rng.integers(0, 4096, (int(other.sum()), domains))
        traffic[rng.random(pages) < 0.1] = 0
    homes = hashed_homes(pages, domains, seed) if draw(st.booleans()) else rng.integers(-1, domains, pages)
    return traffic, homes


def local(traffic: np.ndarray, homes: np.ndarray) -> float:
    """Slowly, page by page."""
    total = sum(map(sum, traffic.tolist()))
    kept = sum(row[home] for row, home in zip(traffic.tolist(), homes.tolist(), strict=True) if home >= 0)
    return kept / total if total else 1.0


@settings(max_examples=200, deadline=None)
@given(problems())
def test_an_order_is_a_permutation_that_keeps_more_traffic_local(problem):
    traffic, homes = problem
    found = place(traffic, homes)
    assert found.local_before == pytest.approx(local(traffic, homes))
    if found.order is None:
        assert found.local_after == found.local_before
        return
    assert sorted(found.order.tolist()) == list(range(len(homes)))
    assert found.local_after == pytest.approx(local(traffic, homes[found.order]))
    assert found.local_after > found.local_before
    # Stable: who lies well stays, and the same again is the same.
    wanted = traffic.argmax(axis=1)
    stays = (homes == wanted) & (traffic.sum(axis=1) > 0)
    np.testing.assert_array_equal(found.order[stays], np.flatnonzero(stays))
    np.testing.assert_array_equal(place(traffic, homes).order, found.order)
    # What has been put in order needs no further order.
    again = place(traffic[np.argsort(found.order)], homes)
    assert again.local_after == pytest.approx(found.local_after)


@settings(max_examples=100, deadline=None)
@given(problems())
def test_with_one_reader_a_page_no_order_is_better(problem):
    traffic, homes = problem
    traffic = np.where(np.arange(traffic.shape[1]) == traffic.argmax(axis=1)[:, None], 4096.0, 0.0)
    demand = np.bincount(traffic.argmax(axis=1), minlength=traffic.shape[1])
    supply = np.bincount(homes[homes >= 0], minlength=traffic.shape[1])
    best = np.minimum(demand, supply).sum() / len(homes)
    assert place(traffic, homes).local_after == pytest.approx(best)


@pytest.mark.parametrize("domains", [2, 4, 8])
def test_eight_hashed_domains_become_local(domains):
    pages = 4096
    traffic = np.zeros((pages, domains))
    traffic[np.arange(pages), np.arange(pages) * domains // pages] = 4096
    found = place(traffic, hashed_homes(pages, domains, 5))
    assert found.local_before == pytest.approx(1 / domains, abs=0.05)
    assert found.local_after > 0.95
    assert "pages move" in found.describe()


def test_applying_and_undoing():
    traffic = np.eye(2).repeat(50, axis=0)
    found = place(traffic, hashed_homes(100, 2, 1))
    pages = np.random.default_rng(0).integers(0, 256, (100, 16), np.uint8)
    moved = apply_order(pages, found)
    assert (moved != pages).any()
    np.testing.assert_array_equal(undo_order(moved, found), pages)
    np.testing.assert_array_equal(moved[found.order], pages)  # page i lies at order[i]
    nothing = dataclasses.replace(found, order=None)
    assert apply_order(pages, nothing) is pages
    assert undo_order(pages, nothing) is pages


@pytest.mark.parametrize("homes", [np.zeros(3, int), np.full(4, 2), np.full(4, -2)], ids=["count", "high", "low"])
def test_wrong_homes(homes):
    with pytest.raises(ValueError, match="homes must have one of 2 domains"):
        place(np.ones((4, 2)), homes)


@settings(max_examples=30, deadline=None)
@given(specs(), st.integers(1, 9), st.sampled_from(["cpu", "cuda", "rocm"]))
def test_traffic_counts_every_byte_of_every_stream_once(spec, units, platform):
    plan = Plan(platform=platform, units=units)
    near = np.random.default_rng(units).integers(0, 3, units)
    try:
        geo = geometry(spec, plan)
    except ValueError:
        return  # a head dimension that GPUs do not do
    traffic = page_traffic(spec, plan, near, 3)
    itemsize = 4 if spec.dtype == "float32" else 2
    assert (traffic >= 0).all()
    assert (traffic.sum(axis=1) <= 4096).all()
    assert len(traffic) == -(-math.prod(geo.stream_shape) * itemsize // 4096)
    expected = np.bincount(near, np.diff(geo.unit_begin), minlength=3) * itemsize
    np.testing.assert_allclose(traffic.sum(axis=0), expected)


RATES = {"stream_device_gb_s": 1000.0, "stream_device_near_gb_s": 1100.0}


def measured(**changes) -> Topology:
    groups = tuple(Group("l2_half", f"half {d}", tuple(range(d, 8, 2)), (), (d,)) for d in range(2))
    made = Topology(
        name="Simulated",
        platform="cuda",
        arch="sm_90",
        root=Group("device", "Simulated", (), groups),
        group_kind="l2_half",
        domains=(MemoryDomain("a", 0), MemoryDomain("b", 0)),
        interleave=Interleave(4096, "hashed", "measured", "test"),
        constants={k: Constant(v, "measured", "test") for k, v in RATES.items()},
    )
    return dataclasses.replace(made, **changes)


def test_a_tape_on_a_device_where_near_memory_is_faster():
    from decoding import spec_of

    spec, plan = spec_of("windows", "bfloat16"), Plan(platform="cuda", units=8)
    pages = len(page_traffic(spec, plan, np.zeros(8, int), 1))
    homes = hashed_homes(pages, 2, 3)
    found = place_tape(spec, plan, measured(), homes)
    assert found.local_before < 0.75 < found.local_after
    with pytest.raises(ValueError, match=f"the tape has {pages} pages"):
        place_tape(spec, plan, measured(), homes[1:])
    with pytest.raises(ValueError, match="no unit 8"):
        place_tape(spec, Plan(platform="cuda", units=9), measured(), homes)


def test_a_last_page_that_is_not_whole_stays():
    from decoding import spec_of

    spec, plan = spec_of("windows", "bfloat16"), Plan(platform="cpu", units=8)
    total = geometry(spec, plan).unit_elems * 8 * 2
    assert total % 4096 != 0
    pages = -(-total // 4096)
    found = place_tape(spec, plan, measured(), 1 - hashed_homes(pages, 2, 3))
    assert found.order is not None
    assert found.order[-1] == pages - 1
    assert sorted(found.order.tolist()) == list(range(pages))
    assert found.local_after > found.local_before


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"constants": {}}, "was not measured"),
        (
            {"constants": dict.fromkeys(RATES, Constant(1000.0, "measured", "test"))},
            "near memory is not faster by 2%: all units read 1,000 GB/s from it and 1,000 from all memory",
        ),
        ({"interleave": Interleave(4096, "hashed", "published", "test")}, "was not measured"),
        ({"interleave": Interleave(512, "hashed", "measured", "test")}, "finer than a page"),
        (
            {"domains": (MemoryDomain("a", 0),), "root": Group("device", "x", tuple(range(8)))},
            "equally far",
        ),
    ],
    ids=["unknown", "rates", "published", "fine", "one"],
)
def test_nothing_moves_where_it_cannot_help(changes, reason):
    from decoding import spec_of

    topology = measured(**changes)
    assert reason in why_not(topology)
    spec, plan = spec_of("windows", "bfloat16"), Plan(platform="cuda", units=8)
    pages = len(page_traffic(spec, plan, np.zeros(8, int), 1))
    found = place_tape(spec, plan, topology, np.zeros(pages, int))
    assert found.order is None
    assert found.source() is None
    assert reason in found.describe()


def test_on_the_h200_that_was_measured_pages_would_come_near_and_gain_too_little():
    """What docs/topology.md says of it."""
    folder = Path(__file__).parents[1] / "benchmarks" / "results" / "topology"
    found = recorded(folder / "h200-71c8866.json.gz")
    topology = topology_of(found)
    plan, spec = Plan(platform="cuda", units=132), SHAPES["qwen3-0.6b"].spec()
    near = topology.near_domain()
    traffic = page_traffic(spec, plan, np.array([near[u] for u in range(132)]), 2)
    homes = np.resize(found.homes, len(traffic))  # the file has those of the first 256 MiB
    placed = place(traffic, homes)
    assert (round(placed.local_before, 3), round(placed.local_after, 3)) == (0.497, 0.993)
    said = place_tape(spec, plan, topology, homes).describe()
    assert said == (
        "pages stay where they are, traffic local 49.7%, remote 50.3%: near memory is not faster by 2%: "
        "all units read 4,404 GB/s from it and 4,336 from all memory"
    )
    # The link between the halves would carry more than a half of each unit's reads.
    rates = found.stream
    assert 0.8 * rates["device_far"] < rates["device"] / 2 < 0.9 * rates["device_far"]
    assert rates["domain_far"] == pytest.approx(rates["device_far"] / 2, rel=0.01)
    assert rates["domain_near"] == pytest.approx(rates["device_near"] / 2, rel=0.01)
