"""Requests in mid-flight for tests of decode: random caches, so that no prompt has to be run through a model."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from naive import SPECS as NAIVE_SPECS
from naive import random_weights

from jax_monokernel import DecoderSpec, DecodeState, SamplingParams
from jax_monokernel import tape as tape_module
from jax_monokernel.decode import decode as decode_any
from jax_monokernel.plan import Plan
from jax_monokernel.reference import decode_reference
from jax_monokernel.state import DecodeResult
from jax_monokernel.tape import Tape, pack

SPECS = NAIVE_SPECS | {
    "post_norm": NAIVE_SPECS["plain"].replace(
        pre_norm=False,
        post_norm=True,
        qk_norm="full",
        gated=False,
        activation="relu",
        num_kv_heads=4,
        tied_head=False,
    )
}
STEPS = 16
CAPACITY = 40
# JAX raises an error of the native side as the first where a computation is short, as the second from block_until_ready
# where it ran in the background.
DECODE_ERRORS = (jax.errors.JaxRuntimeError, ValueError)
POSITIONS = (0, 7, 20)  # tokens in the caches of a batch


@functools.cache
def spec_of(name: str, dtype: str = "float32", kv_dtype: str | None = None) -> DecoderSpec:
    return SPECS[name].replace(dtype=dtype, kv_dtype=kv_dtype or dtype)


@functools.cache
def weights_of(spec: DecoderSpec):
    return random_weights(spec)


@functools.cache
def tape_of(spec: DecoderSpec, units: int) -> Tape:
    with numpy_in_place_of_jax():
        tape = pack(spec, jax.tree.map(np.asarray, weights_of(spec)), Plan(platform="cpu", units=units))
    return jax.tree.map(jnp.asarray, tape)


@contextlib.contextmanager
def numpy_in_place_of_jax():
    """Packing uses functions that NumPy has under the same names. Without compiling, a thousand shapes take seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tape_module, "jnp", np)
        patch.setattr(jax.lax, "bitcast_convert_type", lambda x, dtype: np.ascontiguousarray(x).view(dtype))
        yield


def state_of(
    spec: DecoderSpec, positions: Sequence[int] = POSITIONS, *, capacity: int = CAPACITY, seed: int = 0
) -> DecodeState:
    """Requests that hold random keys and values up to their positions, and NaN after them: nothing may read that.

    A request depends on `seed` and its position only, not on those beside it.
    """
    rows = [_row(spec, position, capacity, seed) for position in positions]
    return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *rows)


def _row(spec: DecoderSpec, position: int, capacity: int, seed: int) -> DecodeState:
    rng = np.random.default_rng([seed, position])
    shape = (spec.num_layers, spec.num_kv_heads, capacity, spec.head_dim)
    caches = rng.standard_normal((2, *shape), np.float32)
    caches[..., position:, :] = np.nan
    return DecodeState(
        k_cache=caches[0].astype(spec.kv_dtype),
        v_cache=caches[1].astype(spec.kv_dtype),
        position=np.int32(position),
        last_token=rng.integers(0, spec.vocab_size, dtype=np.int32),
        key_data=rng.integers(0, 2**32, 2, dtype=np.uint32),
        status=np.int32(0),
        seen=rng.choice(np.array([0, 0, 0, 1, 2, 3], np.uint8), spec.vocab_size),
    )


def params_of(spec: DecoderSpec, batch: int, **options) -> SamplingParams:
    """Greedy, unless told otherwise. An option is one value or one per request; eos_token_id is a list per request."""
    defaults = {
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "max_new_tokens": 1000,
    }
    eos, bias = options.pop("eos_token_id", [-1, -1]), options.pop("logit_bias", None)
    leaves = {}
    for name, default in defaults.items():
        value = np.asarray(options.pop(name, default), np.int32 if isinstance(default, int) else np.float32)
        leaves[name] = jnp.asarray(np.array(np.broadcast_to(value, (batch,))))
    assert not options
    ids = np.asarray(eos, np.int32)
    return SamplingParams(
        **leaves,
        eos_token_id=jnp.asarray(np.array(np.broadcast_to(ids, (batch, ids.shape[-1])))),
        logit_bias=None if bias is None else jnp.asarray(bias, jnp.float32),
    )


@functools.cache
def mixed_params(spec: DecoderSpec, batch: int) -> SamplingParams:
    """Other options for each of three kinds of request: greedy, filtered, and penalised."""
    kind = np.arange(batch) % 3
    bias = np.random.default_rng(3).standard_normal((batch, spec.vocab_size))
    return params_of(
        spec,
        batch,
        temperature=np.choose(kind, [0.0, 0.9, 1.4]),
        top_k=np.choose(kind, [0, 20, 0]),
        top_p=np.choose(kind, [1.0, 0.95, 1.0]),
        min_p=np.choose(kind, [0.0, 0.0, 0.02]),
        repetition_penalty=np.choose(kind, [1.2, 1.0, 1.3]),
        presence_penalty=np.choose(kind, [0.1, 0.0, 0.4]),
        logit_bias=np.where(kind[:, None] == 2, bias, 0),
    )


@functools.partial(jax.jit, static_argnames=("steps", "backend"))
def decode(
    tape: Tape, state: DecodeState, params: SamplingParams, steps: int = STEPS, backend: str | None = None
) -> DecodeResult:
    return decode_any(tape, state, params, max_new_tokens=steps, return_log_probs=True, backend=backend)


# Compiling is what takes the time here.
@functools.partial(jax.jit, static_argnames=("spec", "steps"), compiler_options={"xla_backend_optimization_level": 0})
def _reference(spec, weights, state, params, steps):
    return decode_reference(spec, weights, state, params, max_new_tokens=steps, return_log_probs=True)


def reference(spec: DecoderSpec, state: DecodeState, params: SamplingParams, weights=None) -> DecodeResult:
    return _reference(spec, weights_of(spec) if weights is None else weights, state, params, STEPS)


@functools.cache
def reference_of_mixed(spec: DecoderSpec) -> DecodeResult:
    """What three mixed requests should give."""
    return reference(spec, state_of(spec), mixed_params(spec, 3))


def rows_of(tree, rows):
    return jax.tree.map(lambda leaf: leaf[rows], tree)


def assert_bit_equal(got, want) -> None:
    """Every leaf has the same bits, NaN included."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        name = jax.tree_util.keystr(path)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        a, b = (np.asarray(x).view(f"u{x.dtype.itemsize}") for x in (a, b))
        np.testing.assert_array_equal(a, b, err_msg=name)


def assert_same_decode(got: DecodeResult, want: DecodeResult, spec: DecoderSpec, before: DecodeState) -> None:
    """Two backends agree: tokens and bookkeeping exactly, numbers up to rounding. Other cache slots are as before."""
    # In 16 bits a sum that is ordered otherwise may be rounded to the neighbouring number.
    tolerance = {"float32": 2e-4, "float16": 0.02, "bfloat16": 0.15}[max(spec.dtype, spec.kv_dtype or "", key=_coarse)]
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_array_equal(got.lengths, want.lengths)
    assert got.log_probs is not None
    np.testing.assert_allclose(got.log_probs, want.log_probs, rtol=0, atol=tolerance)
    for name in ("position", "last_token", "key_data", "status", "seen"):
        np.testing.assert_array_equal(getattr(got.state, name), getattr(want.state, name), err_msg=name)
    for name in ("k_cache", "v_cache"):
        a, b, old = (np.asarray(getattr(s, name), np.float32) for s in (got.state, want.state, before))
        for row, end in enumerate(np.asarray(want.state.position)):
            start = int(before.position[row])
            np.testing.assert_allclose(a[row, :, :, start:end], b[row, :, :, start:end], rtol=tolerance, atol=tolerance)
            for unchanged in (slice(0, start), slice(end, None)):
                np.testing.assert_array_equal(a[row, :, :, unchanged], old[row, :, :, unchanged], err_msg=name)


def _coarse(dtype: str) -> int:
    return ["", "float32", "float16", "bfloat16"].index(dtype)


def replace_row(state: DecodeState, row: int, **values) -> DecodeState:
    """A state with some values of one request changed."""
    leaves = {name: getattr(state, name).at[row].set(value) for name, value in values.items()}
    return dataclasses.replace(state, **leaves)


def long_decode(tokens: int, capacity: int = 200_000) -> int:
    """Decodes many tokens with one request, and returns how many there were. All that fit in its cache take minutes."""
    spec = spec_of("plain")
    # Not state_of: a cache this large takes too long to fill with random numbers. Its contents do not matter.
    shape = (1, spec.num_layers, spec.num_kv_heads, capacity, spec.head_dim)
    small = state_of(spec, (3,))
    state = dataclasses.replace(small, k_cache=jnp.ones(shape), v_cache=jnp.ones(shape))
    params = params_of(spec, 1, temperature=1.0, max_new_tokens=tokens)
    return int(jax.block_until_ready(decode(tape_of(spec, 2), state, params, steps=capacity)).lengths[0])
