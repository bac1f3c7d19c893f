"""The GPU kernel's source, run on this CPU, with a model of every family and with options that no test model has.

Families decode as transformers did (golden/), with waves of 32 and 64 lanes, the plan that a GPU gets and a small one,
one request and three: each family twice, so that all pairs of these occur. MONOKERNEL_TEST_ALL=1 has them all together.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding import STEPS, assert_same_decode, mixed_params, params_of, reference, rows_of, state_of
from golden.cases import CASES
from golden.models import golden_model, quick_jit
from gpu_decode import Kernel, decode_on_host, gpu_pack, gpu_plan
from gpu_host import POLICIES, STORES
from naive import SPECS

from jax_monokernel import LayerSpec, empty_state, prefill
from jax_monokernel.plan import Plan, make_plan

ORDERS = list(itertools.product(POLICIES, STORES))
SHARED_BYTES = {32: 232448, 64: 64 * 1024}  # of an H100, and of an MI300

# ---- Families ----

ONE_EACH = {case.config["model_type"]: name for name, case in reversed(CASES.items())}
TOKENS = 6
STARTS = (0, 7, 21)  # tokens of transformers that three requests begin after
ALL = list(itertools.product([32, 64], [1, 3], ["small", "default"]))


def runs() -> list[tuple[str, int, int, str]]:
    """(case, wave, batch, plan): a family has another batch and another plan with waves of 64 than with waves of 32."""
    if os.environ.get("MONOKERNEL_TEST_ALL") == "1":
        return [(name, *run) for name in sorted(ONE_EACH.values()) for run in ALL]
    plans = [(1, "small"), (3, "default"), (1, "default"), (3, "small")]
    turns = [(plans[i % 4], plans[i % 4 ^ 1]) for i in range(len(ONE_EACH))]
    return [
        (name, wave, *turn)
        for name, both in zip(sorted(ONE_EACH.values()), turns, strict=True)
        for wave, turn in zip((32, 64), both, strict=True)
    ]


def plan_of(spec, wave: int, kind: str):
    """Of three units."""
    if kind == "small":
        return gpu_plan(spec, wave, 3)
    return make_plan(spec, platform="cuda" if wave == 32 else "rocm", units=3)


@functools.lru_cache(maxsize=1)
def family(name: str):
    """A golden case, its model, and three requests, each with a part of what transformers generated as its prompt."""
    case = golden.read(name)
    model = golden_model(case)
    lengths = np.array([len(case.prompt) + start for start in STARTS])
    tokens = np.tile(np.array([*case.prompt, *case.greedy[: max(STARTS)]], np.int32), (len(STARTS), 1))
    state = empty_state(model.spec, batch=len(STARTS), capacity=max(lengths) + TOKENS, key=jax.random.key(0))
    fill = quick_jit(prefill, static_argnums=0)
    return case, model, fill(model.spec, model.decoder_weights(), tokens, jnp.asarray(lengths), state)


@pytest.mark.parametrize(("name", "wave", "batch", "plan"), runs())
def test_every_family_gives_the_tokens_of_transformers(name, wave, batch, plan):
    case, model, states = family(name)
    spec, number = model.spec, sorted(ONE_EACH.values()).index(name)
    kernel = Kernel(spec, plan_of(spec, wave, plan), batch, shared_bytes=SHARED_BYTES[wave])
    first = number % (len(STARTS) + 1 - batch)
    state = rows_of(states, slice(first, first + batch))
    policy, stores = ORDERS[(5 * number + wave + batch) % len(ORDERS)]
    tape = gpu_pack(spec, model.decoder_weights(), kernel.plan)
    got, run = decode_on_host(
        kernel, state, params_of(spec, batch), TOKENS, tape=tape, policy=policy, stores=stores, seed=number
    )
    assert run.report["reason"] == 0, run.report
    for row, start in enumerate(STARTS[first : first + batch]):
        assert got.tokens[row].tolist() == case.greedy[start : start + TOKENS]
        np.testing.assert_allclose(got.log_probs[row], case.log_probs[start : start + TOKENS], rtol=0, atol=1e-3)


# ---- Options ----

BASE = SPECS["plain"].replace(tied_head=False)
# Where heads have 9 or 10 dimensions, rows of the cache are no whole number of 16 bytes.
UNUSUAL = {
    "no norms": BASE.replace(
        pre_norm=False,
        gated=False,
        activation="gelu",
        mlp_bias=True,
        num_heads=6,
        head_dim=10,
        hidden_size=23,
        intermediate_size=45,
        residual_multiplier=0.6,
        norm_eps=0.3,
        kv_dtype="bfloat16",
    ),
    "norms after": BASE.replace(
        layers=(LayerSpec(), LayerSpec(window=1)),
        pre_norm=False,
        post_norm=True,
        qk_norm="full",
        norm_eps=0.1,
        head_dim=9,
        hidden_size=51,
        intermediate_size=77,
        dtype="bfloat16",
        kv_dtype="float32",
    ),
    "large heads": BASE.replace(
        layers=(LayerSpec(window=1), LayerSpec(), LayerSpec(window=9)),
        head_dim=256,
        qk_norm="head",
        activation="gelu",
        hidden_size=97,
        dtype="float16",
        kv_dtype="float32",
    ),
    "no positions": BASE.replace(
        layers=(LayerSpec(rope=None), LayerSpec(window=1, rope=None), LayerSpec(window=4, rope=None)),
        ropes=(),
        head_dim=10,
        qkv_bias=True,
        hidden_size=33,
        vocab_size=131,
        norm_eps=0.2,
        dtype="bfloat16",
        kv_dtype="bfloat16",
    ),
}


@functools.lru_cache(maxsize=1)
def eight_tokens(name: str):
    """Three kinds of requests, their parameters, and what the reference gives."""
    spec = UNUSUAL[name]
    params = dataclasses.replace(mixed_params(spec, 3), max_new_tokens=jnp.full(3, 8, jnp.int32))
    return state_of(spec), params, reference(spec, state_of(spec), params)


@pytest.mark.parametrize("wave", [32, 64])
@pytest.mark.parametrize("name", UNUSUAL)
def test_options_that_no_test_model_has(name, wave):
    """Three requests with a small plan, and with the other waves one, in two parts, with all the waves of a GPU.

    The latter is watched for races and for accesses out of bounds.
    """
    spec, number = UNUSUAL[name], list(UNUSUAL).index(name)
    if (number + wave // 32) % 2:
        plan, rows = gpu_plan(spec, wave, 3), slice(3)
        kernel = Kernel(spec, plan, batch=3, shared_bytes=SHARED_BYTES[wave])
    else:
        plan, rows = Plan(platform="cuda" if wave == 32 else "rocm", units=3), slice(number % 3, number % 3 + 1)
        heads = spec.num_heads // spec.num_kv_heads
        kernel = Kernel(spec, plan, batch=1, splits=2, task_heads=heads, shared_bytes=SHARED_BYTES[wave], sanitize=True)
    state, params, want = (rows_of(x, rows) for x in eight_tokens(name))
    policy, stores = ORDERS[(7 * number + wave) % len(ORDERS)]
    got, run = decode_on_host(kernel, state, params, STEPS, policy=policy, stores=stores, seed=number)
    assert run.report["reason"] == 0, run.report
    assert_same_decode(got, want, spec, state)
    tolerance = {"float32": 5e-5, "float16": 2e-3, "bfloat16": 0.06}[spec.dtype]
    np.testing.assert_allclose(got.log_probs, want.log_probs, rtol=0, atol=tolerance)
