"""Weights whose pages lie anywhere, on the CPU that runs the GPU kernel: the same tokens, read where they are near."""

from __future__ import annotations

import dataclasses
import functools

import gpu_host
import numpy as np
import pytest
from decoding import (
    POSITIONS,
    assert_bit_equal,
    assert_same_decode,
    mixed_params,
    reference,
    rows_of,
    spec_of,
    state_of,
)
from gpu_decode import Kernel, decode_on_host, gpu_plan, gpu_tape_of
from gpu_host import HostError
from placed import PAGE, page_count, scatter
from test_topology_placement import hashed_homes

from jax_monokernel import _gpu_tape
from jax_monokernel.plan import Plan, geometry
from jax_monokernel.tape import DIES
from jax_monokernel.topology.placement import page_traffic, place

MISPLACED = 4


def make(name: str, units: int, batch: int, *, dtype: str = "float32", **options) -> Kernel:
    of_kernel = {k: options.pop(k) for k in ("splits", "near", "sanitize", "source") if k in options}
    spec = spec_of(name, dtype)
    return Kernel(spec, gpu_plan(spec, 64, units, **options), batch, placed=True, **of_kernel)


CASES = {
    "flat": make("plain", 6, 1),
    "flat-batch_3-in_parts": make("windows", 7, 3, waves=3, service_waves=3, chunk_atoms=1, segment_tiles=1, splits=3),
    "flat-16_bit-checked": make("post_norm", 4, 3, dtype="float16", sanitize=True),
    "groups": make("plain", 4, 3, groups=2),
    "groups-near": make("plain", 4, 3, groups=2, near=True),
}


@functools.cache
def requests(spec, batch):
    """As in test_gpu_groups.py: state, parameters, and the reference."""
    rows = slice(3 - batch, 3)
    state, params = state_of(spec, POSITIONS[rows]), rows_of(mixed_params(spec, 3), rows)
    return state, params, reference(spec, state, params)


def run(kernel: Kernel, tape, **options):
    state, params, want = requests(kernel.spec, kernel.batch)
    return decode_on_host(kernel, state, params, want.tokens.shape[1], tape=tape, **options)


def check(kernel: Kernel, tape, **options):
    state, _, want = requests(kernel.spec, kernel.batch)
    got, done = run(kernel, tape, **options)
    assert done.report["reason"] == 0, done.report
    assert_same_decode(got, want, kernel.spec, state)
    return done


# Units of two dies, of which those with groups are one half each, and the dies of work-groups 0, 1, ... by turns.
def halves(kernel: Kernel) -> tuple[dict[int, int], list[int]]:
    units = kernel.plan.units
    return {0: units // 2, 1: units - units // 2}, [(i + 1) % 2 for i in range(units)]


def test_which_tapes_can_be_placed():
    """A wave's stream is a whole number of pairs of pages, whatever the model, so that no atom is on two pages."""
    for name in ("plain", "windows", "longrope"):
        for dtype in ("float32", "bfloat16"):
            spec, plan = spec_of(name, dtype), gpu_plan(spec_of(name), 64, 5, waves=3)
            tape = gpu_tape_of(spec, plan)
            assert _gpu_tape.page_count(spec, plan) == page_count(tape)
            lengths = np.diff(geometry(spec, plan).wave_begin) * (4 if dtype == "float32" else 2)
            assert len(lengths) == plan.waves * plan.units
            assert (lengths > 0).all()
            assert (lengths % (2 * PAGE) == 0).all()
    assert _gpu_tape.page_count(spec, Plan(platform="cuda", units=5)) == 0
    assert _gpu_tape.page_count(spec, Plan(platform="cpu", units=5)) == 0


@pytest.mark.parametrize("name", CASES)
def test_pages_in_any_order_give_the_same_tokens(name):
    kernel = CASES[name]
    tape = gpu_tape_of(kernel.spec, kernel.plan)
    rng = np.random.default_rng(list(CASES).index(name))
    units, dies = halves(kernel)
    for turn, skip in enumerate((0, 256 * int(rng.integers(1, 16)))):
        placed = scatter(tape, rng.permutation(page_count(tape)), units, skip=skip)
        check(kernel, placed, dies=dies, seed=turn, policy=("random", "starve")[turn], stores=("random", "late")[turn])


# ---- Where units are ----


def spread(kernel: Kernel, domains: int, homes: np.ndarray):
    """(the placement, the placed tape, where work-groups are) with as many dies as domains, each near its own."""
    tape, units = gpu_tape_of(kernel.spec, kernel.plan), kernel.plan.units
    near = np.arange(units) * domains // units
    placement = place(page_traffic(kernel.spec, kernel.plan, near, domains), homes)
    share = {2 * die: int(count) for die, count in enumerate(np.bincount(near))}
    dies = [2 * int(near[(5 * i + 3) % units]) for i in range(units)]
    return placement, tape, share, dies


@pytest.mark.parametrize(("name", "domains"), [("flat", 2), ("groups", 2), ("groups-near", 2), ("eight", 8)])
def test_units_read_what_is_near_them(name, domains):
    """Counted from where units ran and what they read, over memory whose pages go round the domains by a hash."""
    kernel = make("plain", 8, 1) if name == "eight" else CASES[name]
    if name == "groups-near":  # whose dies must be those of its groups
        domains = kernel.plan.groups
    pages = page_count(gpu_tape_of(kernel.spec, kernel.plan))
    homes = hashed_homes(pages, domains, 5)
    placement, tape, share, dies = spread(kernel, domains, homes)
    near_of_dies = np.arange(DIES) // 2
    read = {}
    for order in (np.arange(pages), placement.order):
        done = check(
            kernel, scatter(tape, order, share), dies=dies, homes=np.append(homes, 255), near=near_of_dies, seed=domains
        )
        read[len(read)] = done.near / (done.near + done.far)
    # Pages of whole slots are counted, which a wave does not always fill; so nearly.
    assert read[0] == pytest.approx(placement.local_before, abs=0.1)
    assert read[1] == pytest.approx(placement.local_after, abs=0.1)
    assert read[1] > read[0] + 0.3


UNEXPECTED = {
    "all on one": (0, 0, 0, 0, 0, 0),
    "one too many": (0, 1, 1, 0, 1, 1),
    "another die": (0, 15, 0, 1, 1, 1),
    "nobody where units are": (7, 8, 9, 10, 11, 12),
}


@pytest.mark.parametrize("dies", UNEXPECTED)
def test_dies_of_unexpected_size_cost_nothing_but_speed(dies):
    kernel = CASES["flat"]
    tape, where = gpu_tape_of(kernel.spec, kernel.plan), UNEXPECTED[dies]
    pages = page_count(tape)
    reader = (np.arange(pages) >= pages // 2).astype(int)
    for seed in range(2):
        # What each die's units read is near it alone.
        done = check(
            kernel,
            scatter(tape, np.arange(pages), {0: 3, 1: 3}),
            dies=where,
            seed=seed,
            homes=np.append(reader, 255),
            near=np.arange(DIES),
        )
        right = sum(min(3, where.count(die)) for die in (0, 1))
        assert done.near / (done.near + done.far) == pytest.approx(right / 6, abs=0.1)


def test_groups_that_are_not_on_one_die_are_another_plan():
    kernel = CASES["groups-near"]
    tape = gpu_tape_of(kernel.spec, kernel.plan)
    state, _, _ = requests(kernel.spec, kernel.batch)
    order = np.random.default_rng(0).permutation(page_count(tape))
    shares = [({0: 2, 1: 2}, (0, 1, 0, 0)), ({0: 3, 1: 1}, (0, 1, 0, 0)), ({1: 4}, (1, 1, 1, 1)), ({}, (0, 0, 1, 1))]
    for share, dies in shares:
        placed = scatter(tape, order, share)
        got, done = run(kernel, placed, dies=dies)
        assert done.report["reason"] == MISPLACED
        assert_bit_equal(got.state, state)
        check(dataclasses.replace(kernel, near=False), placed, dies=dies)
    for share, dies in (({0: 2, 1: 2}, (1, 0, 0, 1)), ({3: 2, 15: 2}, (15, 3, 15, 3))):
        check(kernel, scatter(tape, order, share), dies=dies)


# ---- Tables that are wrong ----


@pytest.mark.parametrize("table", [(-5, 2**31 - 1, 3), (0, 0, 0), (-(2**31), -1, 2**31 - 1), (1, 1, 1)], ids=str)
def test_every_unit_has_one_place_whatever_is_said_of_dies(table):
    kernel = CASES["flat"]
    tape = gpu_tape_of(kernel.spec, kernel.plan)
    placed = scatter(tape, np.arange(page_count(tape)), {})
    placed.die_units[:3] = table
    check(kernel, placed, dies=(0, 1, 2, 0, 1, 2))


def test_no_table_of_pages_leads_out_of_the_weights():
    kernel = CASES["flat-16_bit-checked"]  # every access is watched
    tape = gpu_tape_of(kernel.spec, kernel.plan)
    placed = scatter(tape, np.arange(page_count(tape)), halves(kernel)[0])
    placed.pages[:] = np.resize([2**31 - 1, -1, -(2**31), 10**6, 5], placed.pages.shape)
    placed.streams[:] = 0.25
    _, done = run(kernel, placed)
    assert done.report["reason"] == 0


def test_one_wrong_page_is_noticed():
    kernel = CASES["flat"]
    tape = gpu_tape_of(kernel.spec, kernel.plan)
    placed = scatter(tape, np.random.default_rng(3).permutation(page_count(tape)), halves(kernel)[0])
    used = np.flatnonzero(np.asarray(tape.streams).view(np.uint8).reshape(len(placed.pages), -1).any(axis=1))
    for a, b in ((0, -1), (5, 6)):
        wrong = placed.pages.copy()
        wrong[[used[a], used[b]]] = wrong[[used[b], used[a]]]
        with pytest.raises(AssertionError, match="not equal"):
            check(kernel, dataclasses.replace(placed, pages=wrong))


# File, what is replaced, by what, and where work-groups are.
MISTAKES = {
    "the embedding is looked for where it would be": (
        "pages.h",
        r"args\.pages\[at / kPageBytes\]",
        "(at / kPlaceBytes)",
        "by turns",
    ),
    "another unit's pages": ("pages.h", r"(return args\.pages.*)unit \* kWaves", r"\1(unit ^ 1) * kWaves", "by turns"),
    "two have one number": ("sync/place.h", r"begin \+ used \+ nth", "begin + used", "all on one"),
    "numbers of a die are counted from 0": ("sync/place.h", r"share\.begin \+ number", "number", "by turns"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_broken_kernel_is_noticed(mistake, tmp_path):
    file, old, new, where = MISTAKES[mistake]
    source = gpu_host.broken_copy(tmp_path, file, old, new)
    kernel = dataclasses.replace(CASES["flat"], source=source)
    tape = gpu_tape_of(kernel.spec, kernel.plan)
    placed = scatter(tape, np.random.default_rng(4).permutation(page_count(tape)), {0: 3, 1: 3})
    dies = halves(kernel)[1] if where == "by turns" else UNEXPECTED[where]
    try:
        got, done = run(kernel, placed, dies=dies, timeout_ticks=60_000, max_steps=10**6)
    except HostError:
        return
    want = requests(kernel.spec, kernel.batch)[2]
    assert done.report["reason"] != 0 or not np.array_equal(got.tokens, want.tokens), "nothing was noticed"
