"""The GPU kernel's code object for gfx942, instruction by instruction, against the reference; visibility is checked."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import subprocess

import amd_code
import gfx942
import gpu_host
import numpy as np
import pytest
from amd_code import Kernel
from decoding import (
    POSITIONS,
    assert_same_decode,
    decode,
    mixed_params,
    params_of,
    reference,
    reference_of_mixed,
    replace_row,
    rows_of,
    spec_of,
    state_of,
    tape_of,
)
from gpu_decode import gpu_plan, gpu_tape_of
from placed import page_count, scatter

from jax_monokernel import DecoderSpec, LayerSpec, RopeSpec
from jax_monokernel.plan import attention_tasks, make_plan
from jax_monokernel.state import FULL, STOPPED

pytestmark = gfx942.MARKS

# Where 16-bit rounding does not turn a token of the reference into another.
FAMILIES = (
    ("plain", "float32"),
    ("windows", "float16"),
    ("nope", "bfloat16"),
    ("post_norm", "float32"),
    ("longrope", "float32"),
)


def one_chunk(name: str, dtype: str, batch: int) -> Kernel:
    spec = spec_of(name, dtype)
    return Kernel(spec, gpu_plan(spec, 64, 3), batch)


def split_up(name: str, dtype: str, batch: int) -> Kernel:
    """Everything in several parts that can be."""
    spec = spec_of(name, dtype)
    plan = gpu_plan(spec, 64, 7, waves=3, service_waves=3, chunk_atoms=1, segment_tiles=1)
    heads = spec.num_heads // spec.num_kv_heads
    return Kernel(spec, plan, batch, splits=3, task_heads=2 if heads % 2 == 0 else 1)


# Seeds of the order of waves, with the XCD of each work-group: as measured on an MI300X, by turns of two, all on one.
ORDERS = {
    "by_turns": (None, lambda unit: (unit + 6) % 8),
    "seed_1": (1, lambda unit: unit // 2 % 8),
    "seed_2": (2, lambda unit: 3),
}


@pytest.mark.parametrize(("name", "dtype", "batch"), [("nope", "bfloat16", 7), ("windows", "float16", 16)])
def test_many_requests(name, dtype, batch):
    """More than four: matrix instructions take the weights of one half or quarter of the lanes for all of them."""
    kernel = one_chunk(name, dtype, batch)
    state, params = state_of(kernel.spec, tuple(range(0, 2 * batch, 2))), mixed_params(kernel.spec, batch)
    got, run = gfx942.decode_on_emulator(kernel, state, params, 3, seed=1, xcc=lambda unit: unit)
    want = decode(tape_of(kernel.spec, 2), state, params, steps=3)
    assert run.violations == []
    assert run.report["reason"] == 0
    assert_same_decode(got, want, kernel.spec, state)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("make", [one_chunk, split_up])
@pytest.mark.parametrize(("name", "dtype"), FAMILIES, ids=["-".join(family) for family in FAMILIES])
def test_same_as_reference(name, dtype, make, batch, order):
    kernel = make(name, dtype, batch)
    seed, xcc = ORDERS[order]
    # The last requests: what is mixed into the sampling differs between them.
    rows = slice(3 - batch, 3)
    state = state_of(kernel.spec, POSITIONS[rows])
    params, want = rows_of((mixed_params(kernel.spec, 3), reference_of_mixed(kernel.spec)), rows)
    got, run = gfx942.decode_on_emulator(kernel, state, params, want.tokens.shape[1], seed=seed, xcc=xcc)
    assert run.violations == []
    assert run.report["reason"] == 0
    assert_same_decode(got, want, kernel.spec, state)


# Sizes that models have and this repository's families have not, with few layers.
FULL_ROPE = RopeSpec(theta=1e4, rotary_dim=64)
SHAPES = {
    "5_kv_heads": DecoderSpec(
        vocab_size=32003, hidden_size=576, intermediate_size=1000, num_heads=15, num_kv_heads=5, head_dim=64,
        layers=(LayerSpec(rope=0),), ropes=(FULL_ROPE,), tied_head=True, dtype="float32",
    ),
    "14_heads": DecoderSpec(
        vocab_size=1499, hidden_size=896, intermediate_size=304, num_heads=14, num_kv_heads=2, head_dim=64,
        layers=(LayerSpec(rope=0),) * 2, ropes=(FULL_ROPE,), qkv_bias=True, dtype="float32",
    ),
    "head_dim_96": DecoderSpec(
        vocab_size=1000, hidden_size=200, intermediate_size=328, num_heads=10, num_kv_heads=10, head_dim=96,
        layers=(LayerSpec(rope=0, window=7), LayerSpec(rope=0)), ropes=(RopeSpec(theta=1e4, rotary_dim=96),),
        dtype="float32",
    ),
    "head_dim_80": DecoderSpec(
        vocab_size=777, hidden_size=560, intermediate_size=136, num_heads=7, num_kv_heads=7, head_dim=80,
        layers=(LayerSpec(rope=0), LayerSpec(rope=0, window=3)), ropes=(RopeSpec(theta=1e4, rotary_dim=32),),
        attn_softcap=20.0, activation="gelu_tanh", dtype="float32",
    ),
    "28_heads": DecoderSpec(
        vocab_size=515, hidden_size=448, intermediate_size=96, num_heads=28, num_kv_heads=4, head_dim=128,
        layers=(LayerSpec(rope=0),), ropes=(RopeSpec(theta=1e4, rotary_dim=128),), qk_norm="head", dtype="float32",
    ),
}  # fmt: skip
# Options that those have not.
OPTIONS = {
    "norms_after_only": DecoderSpec(
        vocab_size=300, hidden_size=96, intermediate_size=200, num_heads=4, num_kv_heads=4, head_dim=24,
        layers=(LayerSpec(rope=0),) * 2, ropes=(RopeSpec(theta=1e4, rotary_dim=24),), pre_norm=False, post_norm=True,
        qk_norm="full", norm_eps=1e-3, dtype="float32",
    ),
    "no_norms": DecoderSpec(
        vocab_size=100, hidden_size=33, intermediate_size=47, num_heads=3, num_kv_heads=1, head_dim=10,
        layers=(LayerSpec(rope=0, window=1), LayerSpec(rope=None)), ropes=(RopeSpec(theta=1e4, rotary_dim=2),),
        pre_norm=False, gated=False, activation="gelu", mlp_bias=True, residual_multiplier=0.3, dtype="float32",
    ),
    "two_ropes": DecoderSpec(
        vocab_size=513, hidden_size=320, intermediate_size=640, num_heads=4, num_kv_heads=1, head_dim=256,
        layers=(LayerSpec(rope=0, window=5), LayerSpec(rope=1)), post_norm=True, qk_norm="head", norm_offset=1.0,
        ropes=(RopeSpec(theta=1e4, rotary_dim=256), RopeSpec(theta=1e6, rotary_dim=256, scaling="linear", factor=8.0)),
        activation="gelu_tanh", embedding_multiplier=320**0.5, tied_head=True, dtype="float32",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("batch", "kv_dtype"), [(1, "float32"), (3, "bfloat16"), (16, "float32")])
@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_other_models(name, batch, kv_dtype):
    """With the plan that such a GPU gets. Sixteen requests of the last leave no room for angles in shared memory."""
    spec = OPTIONS[name].replace(kv_dtype=kv_dtype)
    plan = make_plan(spec, platform="rocm", units=6)
    kernel = Kernel(spec, plan, batch, *attention_tasks(spec, plan, batch, 40))
    state, params = state_of(spec, tuple(range(3, 3 + 2 * batch, 2))), mixed_params(spec, batch)
    got, run = gfx942.decode_on_emulator(kernel, state, params, 3, seed=batch, xcc=lambda unit: unit % 8)
    assert run.violations == []
    assert run.report["reason"] == 0, run.report
    assert_same_decode(got, decode(tape_of(spec, 2), state, params, steps=3), spec, state)


@pytest.mark.parametrize("splits", [1, 2, 3])
@pytest.mark.parametrize("name", ["plain", "windows"])
def test_contexts_of_several_blocks(name, splits):
    spec = spec_of(name, "float32")
    kernel = Kernel(spec, gpu_plan(spec, 64, 5), 3, splits=splits)
    state, params = state_of(spec, (150, 7, 63), capacity=200), mixed_params(spec, 3)
    got, run = gfx942.decode_on_emulator(kernel, state, params, 3, seed=splits, xcc=lambda unit: unit // 2)
    assert run.violations == []
    assert run.report["reason"] == 0, run.report
    assert_same_decode(got, decode(tape_of(spec, 2), state, params, steps=3), spec, state)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes_of_other_models(name, batch, dtype):
    spec = SHAPES[name].replace(dtype=dtype, kv_dtype=dtype)
    kernel = Kernel(spec, gpu_plan(spec, 64, 5, chunk_atoms=8), batch, splits=1 if batch == 1 else 2)
    state, params = state_of(spec, POSITIONS[3 - batch :]), mixed_params(spec, batch)
    got, run = gfx942.decode_on_emulator(kernel, state, params, 3, seed=batch, xcc=lambda unit: unit // 2 % 8)
    assert run.violations == []
    assert run.report["reason"] == 0, run.report
    assert_same_decode(got, decode(tape_of(spec, 2), state, params, steps=3), spec, state)


# Groups: attention and the MLP; the MLP alone; with post-norms.
GROUPS = {
    "plain": lambda batch: Kernel(spec_of("plain"), gpu_plan(spec_of("plain"), 64, 6, groups=2), batch),
    "nope": lambda batch: Kernel(
        spec_of("nope", "bfloat16"), gpu_plan(spec_of("nope", "bfloat16"), 64, 8, groups=4), batch
    ),
    "windows": lambda batch: Kernel(
        spec_of("windows", "float16"), gpu_plan(spec_of("windows", "float16"), 64, 4, groups=2), batch, splits=3
    ),
}
# For words that stay on dies: by turns with an offset, as on an MI300X; in another order than the work-groups'.
PLACES = {
    "by_turns": lambda unit, plan: (unit + 1) % plan.groups,
    "in_rows": lambda unit, plan: (plan.units - 1 - unit) // plan.members,
}


def decode_with_groups(kernel: Kernel, seed: int | None, xcc, **options):
    rows = slice(3 - kernel.batch, 3)
    state = state_of(kernel.spec, POSITIONS[rows])
    params, want = rows_of((mixed_params(kernel.spec, 3), reference_of_mixed(kernel.spec)), rows)
    got, run = gfx942.decode_on_emulator(kernel, state, params, want.tokens.shape[1], seed=seed, xcc=xcc, **options)
    assert run.violations == []
    return state, want, got, run


@pytest.mark.parametrize("place", ["anywhere", *PLACES])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", GROUPS)
def test_groups(name, batch, place):
    kernel, near = GROUPS[name](batch), place in PLACES
    kernel = dataclasses.replace(kernel, near=near)

    def xcc(unit: int) -> int:
        return PLACES[place](unit, kernel.plan) if near else unit // 2 % 8

    state, want, got, run = decode_with_groups(kernel, None if place == "in_rows" else batch, xcc)
    assert run.report["reason"] == 0, run.report
    assert_same_decode(got, want, kernel.spec, state)


def test_groups_that_are_not_on_one_die_are_noticed():
    kernel = dataclasses.replace(GROUPS["plain"](1), near=True)
    for seed, xcc in enumerate((lambda unit: unit % 8, lambda unit: 0, lambda unit: int(unit > 1))):
        *_, run = decode_with_groups(kernel, seed, xcc)
        assert run.report["reason"] == 4, run.report


def test_groups_on_several_dies_are_noticed_by_the_check():
    """Where words stay on dies that are not the groups', they are not seen by others, or are reported."""
    kernel = dataclasses.replace(GROUPS["plain"](1), near=True)
    state, params = state_of(kernel.spec, (3,)), params_of(kernel.spec, 1)
    _, run = gfx942.decode_on_emulator(kernel, state, params, 16, xcc=lambda unit: unit % 2, dies=lambda unit: unit)
    assert any("has not released" in violation for violation in run.violations)


# XCDs of work-groups: as dealt and measured; one has more work-groups than units, which take what is left over.
PLACED = {
    "flat": (one_chunk("plain", "float32", 3), {0: 2, 5: 1}, lambda unit: 0 if unit else 5),
    "flat-others": (split_up("windows", "float16", 1), {0: 3, 1: 4}, lambda unit: unit // 5),
    "flat-elsewhere": (one_chunk("nope", "bfloat16", 1), {0: 3}, lambda unit: 7),
    "groups": (GROUPS["nope"](3), {0: 3, 1: 5}, lambda unit: unit // 2 % 8),
    "groups-near": (
        dataclasses.replace(GROUPS["plain"](1), near=True),
        {2: 3, 7: 3},
        lambda unit: 7 if unit % 2 else 2,
    ),
}


@pytest.mark.parametrize("case", PLACED)
def test_placed(case):
    """Pages in any order, from any 256 bytes on; work-groups take their units by where they are."""
    kernel, die_units, xcc = PLACED[case]
    kernel = dataclasses.replace(kernel, placed=True)
    tape = gpu_tape_of(kernel.spec, kernel.plan)
    number = list(PLACED).index(case)
    order = np.random.default_rng(number).permutation(page_count(tape))
    tape = scatter(tape, order, die_units, skip=256 * number)
    state, want, got, run = decode_with_groups(kernel, number or None, xcc, tape=tape)
    assert run.report["reason"] == 0, run.report
    assert_same_decode(got, want, kernel.spec, state)


def test_a_wrong_page_is_noticed():
    kernel, die_units, xcc = PLACED["flat"]
    tape = gpu_tape_of(kernel.spec, kernel.plan)
    used = np.flatnonzero(np.asarray(tape.streams).view(np.uint8).reshape(page_count(tape), -1).any(axis=1))
    order = np.arange(page_count(tape))
    placed = scatter(tape, order, die_units)
    placed.pages[used[[0, -1]]] = placed.pages[used[[-1, 0]]]
    _, want, got, _ = decode_with_groups(dataclasses.replace(kernel, placed=True), 1, xcc, tape=placed)
    assert (np.asarray(got.tokens) != np.asarray(want.tokens)).any()


def test_placed_groups_that_are_not_on_one_die_are_noticed():
    kernel = dataclasses.replace(GROUPS["plain"](1), near=True, placed=True)
    tape = gpu_tape_of(kernel.spec, kernel.plan)
    for units in ({0: 3, 1: 3}, {0: 4, 1: 2}):
        placed = scatter(tape, np.arange(page_count(tape)), units)
        *_, run = decode_with_groups(kernel, 1, lambda unit: int(unit > 1), tape=placed)
        assert run.report["reason"] == 4, run.report


@pytest.mark.parametrize(("groups", "placed"), [(1, False), (8, False), (1, True)])
def test_whole_chip(groups, placed):
    """As many work-groups as an MI300X has compute units, one on each; in groups, those that it has."""
    spec = spec_of("nope", "bfloat16")
    kernel = Kernel(spec, gpu_plan(spec, 64, 304, groups=groups), batch=3, near=groups > 1, placed=placed)
    tape = gpu_tape_of(spec, kernel.plan)
    if placed:
        order = np.random.default_rng(8).permutation(page_count(tape))
        tape = scatter(tape, order, dict.fromkeys(range(8), 38), skip=1024)
    state, params = state_of(spec, POSITIONS), mixed_params(spec, 3)
    xcc = lambda unit: (unit + 6) % 8  # noqa: E731
    got, run = gfx942.decode_on_emulator(kernel, state, params, 16, seed=1, xcc=xcc, tape=tape)
    assert run.violations == []
    assert_same_decode(got, reference_of_mixed(spec), spec, state)


def test_ends_of_requests():
    """One request is full, one stops at an end token, one is asked for fewer tokens."""
    spec = spec_of("plain")
    kernel = one_chunk("plain", "float32", 3)
    state = replace_row(state_of(spec, POSITIONS), 0, status=FULL)
    end = int(reference(spec, state, params_of(spec, 3)).tokens[1, 0])
    params = params_of(spec, 3, eos_token_id=[[-1], [end], [-1]], max_new_tokens=[16, 16, 3])
    want = reference(spec, state, params)
    got, run = gfx942.decode_on_emulator(kernel, state, params, 16, seed=3)
    assert run.violations == []
    assert want.lengths.tolist() == [0, 1, 3]
    assert want.state.status.tolist()[:2] == [FULL, STOPPED]
    assert_same_decode(got, want, spec, state)


def test_nothing_to_do():
    """No request runs: work-groups end at once, some before others have begun."""
    spec = spec_of("plain")
    kernel = one_chunk("plain", "float32", 1)
    state = replace_row(state_of(spec, (3,)), 0, status=FULL)
    want = reference(spec, state, params_of(spec, 1))
    got, run = gfx942.decode_on_emulator(kernel, state, params_of(spec, 1), 16)
    assert run.violations == []
    assert_same_decode(got, want, spec, state)


def test_lost_word_is_noticed():
    """The check of visibility works: without sc1, words are not seen by others, or are reported."""
    kernel = one_chunk("plain", "float32", 1)
    text = kernel.assembly.read_text()
    broken = kernel.assembly.with_name(f"{kernel.assembly.stem}-broken.s")
    broken.write_text(gfx942.without_scope(text))
    object.__setattr__(kernel, "assembly", broken)  # a cached property
    state = state_of(kernel.spec, (3,))
    _, run = gfx942.decode_on_emulator(kernel, state, params_of(kernel.spec, 1), 16)
    assert any("has not released" in violation for violation in run.violations)


MATH = """
#include "math/elementary.h"
using namespace mk;
MK_DEVICE void functions(float x, float y, float* out) {
  out[0] = exp_(x);
  out[1] = log_(x);
  out[2] = tanh_(x);
  out[3] = erf_(x);
  sin_cos(x, out + 4, out + 5);
  out[6] = arch::sqrt(x);
  out[7] = x / y;
  out[8] = (float)arch::sqrt((double)x);
  out[9] = arch::fma(x, y, x);
}
"""
FUNCTIONS = 10
ON_DEVICE = """
MK_KERNEL(64) void math(const float* x, const float* y, float* out) {
  const int i = arch::unit() * 64 + arch::lane();
  functions(x[i], y[i], out + i * 10);
}
"""
ON_HOST = """
extern "C" __attribute__((visibility("default"))) void math(const float* x, const float* y, float* out, long n) {
  for (long i = 0; i < n; i++) functions(x[i], y[i], out + i * 10);
}
"""


def test_elementary_functions_are_those_of_the_host(tmp_path):
    """Bit for bit, as for tokens that are the same on every machine they must be."""
    defines = "".join(f"#define MK_{name} 1\n" for name in ("UNITS", "WAVES", "SERVICE_WAVES"))
    defines += "#define MK_WAVE_SIZE 64\n#define MK_SHARED_BYTES 1024\n"
    device = amd_code.link(amd_code.compile_source(defines + MATH + ON_DEVICE, "gfx942"), "gfx942")
    source, library = tmp_path / "math.cc", tmp_path / "math.so"
    source.write_text("#define MK_HOST\n" + defines + MATH + ON_HOST)
    flags = ("-std=c++20", "-O1", "-ffp-contract=off", "-fPIC", "-shared", f"-I{gpu_host.KERNEL}")
    subprocess.run([os.environ.get("CXX", "g++"), *flags, source, "-o", library], check=True)

    rng = np.random.default_rng(0)
    n = 4096
    x, y = (rng.integers(0, 2**32, n, np.uint32).view(np.float32) for _ in range(2))
    x[: n // 2] = rng.standard_normal(n // 2) * np.exp2(rng.integers(-8, 7, n // 2))
    got, want = np.zeros((2, n, FUNCTIONS), np.float32)
    gfx942.emulator().run(str(device), "math", n // 64, 64, [x, y, got])
    pointers = (array.ctypes.data_as(ctypes.c_void_p) for array in (x, y, want))
    ctypes.CDLL(str(library)).math(*pointers, ctypes.c_long(n))
    for function in range(FUNCTIONS):
        a, b = got[:, function], want[:, function]
        same = (a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b))
        assert same.all(), (function, x[~same][:3], y[~same][:3], a[~same][:3], b[~same][:3])
