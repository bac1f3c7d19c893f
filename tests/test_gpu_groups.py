"""Plans with groups, on the CPU that runs the GPU kernel: the same tokens in every order and at every place."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from concurrent.futures import ThreadPoolExecutor

import gpu_host
import numpy as np
import pytest
from decoding import (
    POSITIONS,
    STEPS,
    assert_bit_equal,
    assert_same_decode,
    mixed_params,
    reference,
    rows_of,
    spec_of,
    state_of,
)
from gpu_decode import Kernel, decode_on_host, gpu_plan
from gpu_host import POLICIES, STORES, Fault, HostError

from jax_monokernel.plan import geometry

ORDERS = list(itertools.product(POLICIES, STORES))
MISPLACED = 4


def make(name: str, wave: int, units: int, groups: int, batch: int = 1, *, dtype: str = "float32", **options) -> Kernel:
    """`options` are those of Kernel, Plan and DecoderSpec."""
    of_kernel = {k: options.pop(k) for k in ("splits", "task_heads", "near", "sanitize", "source") if k in options}
    spec = spec_of(name, dtype)
    sizes = {k: options.pop(k) for k in [f.name for f in dataclasses.fields(spec)] if k in options}
    spec = spec.replace(**sizes) if sizes else spec
    return Kernel(spec, gpu_plan(spec, wave, units, groups=groups, **options), batch, **of_kernel)


ALL_IN_PARTS = {"waves": 3, "service_waves": 3, "chunk_atoms": 1, "segment_tiles": 1, "splits": 3}
# (kernel, groups of attention, groups of the MLP)
CASES = {
    "plain-64": (make("plain", 64, 6, 2, 3, num_kv_heads=4), 2, 2),
    "plain-32-in_parts": (make("plain", 32, 10, 2, **ALL_IN_PARTS, task_heads=2), 2, 2),
    "eight_of_one-32": (make("plain", 32, 8, 8, num_heads=8, num_kv_heads=8), 8, 8),
    "seven_kv_heads-64": (make("nope", 64, 8, 4, num_heads=14, num_kv_heads=7), 1, 4),
    "five_kv_heads-32-checked": (make("nope", 32, 4, 2, num_heads=10, num_kv_heads=5, sanitize=True), 1, 2),
    "attention_only-64": (make("windows", 64, 6, 2, group_mlp=False), 2, 1),
    "post_norm-64-in_parts": (make("post_norm", 64, 10, 2, **ALL_IN_PARTS), 1, 2),  # a norm over all heads
    "post_norm-16_bit-32": (make("windows", 32, 6, 2, 3, dtype="float16"), 2, 2),
    "odd_width-64": (make("longrope", 64, 16, 2, hidden_size=18), 2, 2),  # units without a share of the sums
}
NEAR = {
    "plain-64": make("plain", 64, 4, 2, near=True),
    "post_norm-64-checked": make("windows", 64, 6, 2, 3, near=True, sanitize=True),
}


@pytest.fixture(scope="module", autouse=True)
def _compile_ahead(request):
    """Compiles kernels while the first tests run, if most of them are to run."""
    if sum(item.module is request.module for item in request.session.items) < 12:
        yield
        return
    pool = ThreadPoolExecutor(2)
    for kernel in (*(kernel for kernel, _, _ in CASES.values()), *NEAR.values()):
        pool.submit(lambda kernel=kernel: kernel.library)
    yield
    pool.shutdown(cancel_futures=True)


@functools.cache
def requests(spec, batch):
    """The last requests of three, as what is mixed into the sampling differs: state, parameters, and the reference."""
    rows = slice(3 - batch, 3)
    state, params = state_of(spec, POSITIONS[rows]), rows_of(mixed_params(spec, 3), rows)
    return state, params, reference(spec, state, params)


def run(kernel: Kernel, steps: int = STEPS, **options):
    state, params, _ = requests(kernel.spec, kernel.batch)
    return decode_on_host(kernel, state, params, steps, **options)


def check(kernel: Kernel, **options) -> None:
    state, _, want = requests(kernel.spec, kernel.batch)
    got, done = run(kernel, **options)
    assert done.report["reason"] == 0, done.report
    assert_same_decode(got, want, kernel.spec, state)


@pytest.mark.parametrize("name", CASES)
def test_tokens_equal_the_reference(name):
    kernel, attention, mlp = CASES[name]
    geo = geometry(kernel.spec, kernel.plan)
    assert (geo.attention_groups, geo.mlp_groups) == (attention, mlp)
    number = list(CASES).index(name)
    for turn in range(2):
        policy, stores = ORDERS[(7 * number + 5 * turn) % len(ORDERS)]
        check(kernel, policy=policy, stores=stores, seed=10 * number + turn, unit=turn)


def test_results_have_the_same_bits_in_every_order():
    kernel, *_ = CASES["plain-64"]
    want, _ = run(kernel, 4, policy="round_robin", stores="now")
    for seed, (policy, stores) in enumerate(ORDERS):
        got, _ = run(kernel, 4, policy=policy, stores=stores, seed=seed, unit=seed % 6)
        assert_bit_equal(got, want)


# ---- Words that stay on a die ----


@pytest.mark.parametrize("name", NEAR)
def test_work_groups_find_their_groups(name):
    """A word that is read on another die than it was written on is an error of the executor."""
    kernel = NEAR[name]
    units = kernel.plan.units
    for seed, dies in enumerate(([0, 1] * units, [1] * (units // 2) + [0] * units)):
        check(kernel, dies=dies[:units], policy=("random", "starve")[seed], stores=("random", "late")[seed], seed=seed)


@pytest.mark.parametrize("dies", [(0, 1, 0, 0), (0, 0, 0, 0), (0, 1, 2, 3), (1, 15, 0, 1)], ids=str)
def test_groups_that_are_not_on_one_die_are_another_plan(dies):
    kernel = NEAR["plain-64"]
    state, _, _ = requests(kernel.spec, kernel.batch)
    for seed in range(3):
        got, done = run(kernel, dies=dies, seed=seed)
        assert done.report["reason"] == MISPLACED
        assert_bit_equal(got.state, state)  # nothing has been done yet, so another kernel can do it
    check(dataclasses.replace(kernel, near=False), dies=dies)


# ---- Waits that cannot be satisfied, and mistakes ----


@pytest.mark.parametrize("kind", ["drop", "hold", "flip"])
@pytest.mark.parametrize(("field", "number"), [("out_sums", 10), ("down_sums", 11)])
def test_a_word_that_never_comes_is_reported(field, number, kind):
    kernel, *_ = CASES["plain-32-in_parts"]
    begin = kernel.workspace[field]
    size = 4 * 32 * kernel.plan.groups  # words of 20 values, in lines of 32
    words = run(kernel, 2, fault=Fault("none", begin=begin, end=begin + size))[1].watched
    fault = Fault(kind, nth=words + words // 7, begin=begin, end=begin + size)
    got, done = run(kernel, fault=fault, timeout_ticks=60_000, seed=1)
    assert done.faults == 1
    if kind == "hold" and done.report["reason"] == 0:
        # Each group has one reader of such a word. In its own group that may be the unit that it comes from.
        np.testing.assert_array_equal(got.tokens, requests(kernel.spec, 1)[2].tokens)
        return
    assert (done.report["reason"], done.report["token"]) == (1, 2), done.report
    length = int(got.lengths[0])
    np.testing.assert_array_equal(got.tokens[0, :length], requests(kernel.spec, 1)[2].tokens[0, :length])


# File, what is replaced, by what, and whether words stay on dies.
MISTAKES = {
    "a group's sums are left out": ("phases/reduce.h", r"g < groups;", "g < groups - 1;", False),
    "groups read each other's words": ("service.h", r"group<groups>\(\) \* kBatch", "0 * kBatch", True),
    "a word of several dies stays on one": (
        "phases/reduce.h",
        r"arch::store_word\(word",
        "arch::store_near_word(word",
        True,
    ),
    "bias is added by every group": ("phases/reduce.h", r"encode\(sum\(0\)", r"encode(sum(0) + 0.25f", False),
    "a place that nobody takes": ("sync/place.h", r"!= MK_UNITS; spins", "!= MK_UNITS + 1; spins", True),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_broken_kernel_is_noticed(mistake, tmp_path):
    file, old, new, near = MISTAKES[mistake]
    source = gpu_host.broken_copy(tmp_path, file, old, new)
    kernel = make("plain", 64, 4, 2, near=near, source=source)
    for seed in range(3):
        try:
            got, done = run(kernel, seed=seed, dies=(0, 1, 0, 1), timeout_ticks=60_000, max_steps=10**6)
        except HostError:
            return
        if done.report["reason"] != 0 or not np.array_equal(got.tokens, requests(kernel.spec, 1)[2].tokens):
            return
    pytest.fail("nothing was noticed")
