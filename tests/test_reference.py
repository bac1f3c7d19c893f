"""decode_reference against a loop without a cache."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from naive import SPECS, VOCAB, NaiveRow, prompt, random_weights, sequence_logits

from jax_monokernel import DecodeState, empty_state
from jax_monokernel.forward import forward
from jax_monokernel.prefill import prefill
from jax_monokernel.reference import decode_reference
from jax_monokernel.sampling import GenerationConfig, sampling_params
from jax_monokernel.state import FULL, RUNNING, STOPPED

pytestmark = pytest.mark.usefixtures("quick_compiles")

CAPACITY = 48
KEY = jax.random.key(11)
LENGTHS = (1, 7, 20)  # prompts of a batch


@functools.partial(jax.jit, static_argnames=("spec", "steps"))
def decode(spec, weights, state, params, steps):
    return decode_reference(spec, weights, state, params, max_new_tokens=steps, return_log_probs=True)


def params_for(batch: int, **options):
    options = {"max_new_tokens": 1000} | options
    return sampling_params(GenerationConfig(**options), batch=batch, vocab_size=VOCAB)


def start(spec, weights, prompts, *, capacity=CAPACITY, key=KEY) -> DecodeState:
    tokens = np.zeros((len(prompts), 32), np.int32)
    for row, ids in zip(tokens, prompts, strict=True):
        row[: len(ids)] = ids
    state = empty_state(spec, batch=len(prompts), capacity=capacity, key=key)
    return prefill(spec, weights, tokens, np.array([len(p) for p in prompts], np.int32), state)


def naive_rows(spec, weights, prompts, state) -> list[NaiveRow]:
    rows = [NaiveRow(spec, weights, np.asarray(key), capacity=state.capacity) for key in state.key_data]
    for row, ids in zip(rows, prompts, strict=True):
        row.say(ids)
    return rows


def assert_same(result, rows, params, steps) -> None:
    """A result equals what naive rows give, states included."""
    for i, row in enumerate(rows):
        tokens, log_probs = row.decode(params, i, steps)
        n = int(result.lengths[i])
        assert result.tokens[i].tolist() == tokens + [-1] * (steps - len(tokens)), f"row {i}"
        assert n == len(tokens)
        np.testing.assert_allclose(result.log_probs[i, :n], log_probs, rtol=1e-4, atol=1e-4)
        assert not np.any(result.log_probs[i, n:])
        assert int(result.state.status[i]) == row.status
        assert int(result.state.position[i]) == len(row.tokens) - 1
        assert int(result.state.last_token[i]) == row.tokens[-1]
        np.testing.assert_array_equal(result.state.seen[i], row.seen)


@pytest.mark.parametrize("name", ["windows", "nope"])
def test_naive_loop_is_the_forward_definition(name):
    spec, weights = SPECS[name], random_weights(SPECS[name])
    tokens = np.array(prompt(64), np.int32)
    np.testing.assert_allclose(
        sequence_logits(spec, weights, tokens, np.full(64, 64, np.int32)),
        jax.jit(forward, static_argnums=0)(spec, weights, tokens[None])[0],
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("name", [name for name in SPECS if name != "post_norm"])  # no other path, and slow enough
def test_greedy_and_sampled_rows_equal_the_naive_loop(name):
    spec, weights = SPECS[name], random_weights(SPECS[name])
    prompts = [prompt(n) for n in LENGTHS]
    state = start(spec, weights, prompts)
    params = params_for(
        3, do_sample=[False, True, True], temperature=[1.0, 0.8, 1.5], top_p=[1.0, 0.9, 1.0], repetition_penalty=1.3
    )
    result = decode(spec, weights, state, params, 16)
    assert_same(result, naive_rows(spec, weights, prompts, state), params, 16)
    assert len(set(result.tokens[1].tolist())) > 3  # not stuck on one token


def test_bfloat16_stays_close_to_the_naive_loop():
    spec = SPECS["windows"].replace(dtype="bfloat16", kv_dtype="bfloat16")
    weights = random_weights(spec)
    prompts = [prompt(n) for n in LENGTHS]
    state = start(spec, weights, prompts)
    result = decode(spec, weights, state, params_for(3), 16)
    assert result.state.k_cache.dtype == jnp.bfloat16
    # Tokens may differ where two logits are closer than bf16's rounding; log-probs along the same tokens may not.
    for i, ids in enumerate(prompts):
        whole = np.zeros(64, np.int32)
        whole[: len(ids) + 16] = ids + result.tokens[i].tolist()
        out = jax.nn.log_softmax(sequence_logits(spec, weights, whole, np.full(64, 64, np.int32)))
        want = out[np.arange(len(ids) - 1, len(ids) + 15), result.tokens[i]]
        np.testing.assert_allclose(result.log_probs[i], want, atol=0.05)


@pytest.mark.parametrize("name", ["windows", "dynamic"])
def test_n_then_m_tokens_equal_n_plus_m(name):
    spec, weights = SPECS[name], random_weights(SPECS[name])
    state = start(spec, weights, [prompt(n) for n in LENGTHS])
    options = {"do_sample": True, "temperature": 2.0, "presence_penalty": 0.5}
    whole = decode(spec, weights, state, params_for(3, **options), 16)
    first = decode(spec, weights, state, params_for(3, max_new_tokens=5, **options), 16)
    second = decode(spec, weights, first.state, params_for(3, max_new_tokens=11, **options), 16)
    assert first.lengths.tolist() == [5] * 3
    for leaf in ("tokens", "log_probs"):
        parts = getattr(first, leaf)[:, :5], getattr(second, leaf)[:, :11]
        np.testing.assert_array_equal(getattr(whole, leaf), np.concatenate(parts, 1))
    jax.tree.map(np.testing.assert_array_equal, whole.state, second.state)


def test_each_row_stops_at_its_own_end():
    spec, weights = SPECS["plain"], random_weights(SPECS["plain"])
    prompts = [prompt(n) for n in LENGTHS]
    state = start(spec, weights, prompts)
    free = decode(spec, weights, state, params_for(3), 16).tokens
    # An id that ends row 0 early, and one that ends row 2 late. Row 1 ends where it happens to meet one of them.
    eos = [int(free[0, 2]), int(free[2, 9])]
    params = params_for(3, eos_token_id=eos)
    result = decode(spec, weights, state, params, 16)
    assert_same(result, naive_rows(spec, weights, prompts, state), params, 16)
    assert STOPPED in result.state.status
    assert int(result.lengths[0]) <= 3  # the end itself is emitted and counted
    assert int(result.tokens[0, int(result.lengths[0]) - 1]) in eos


def test_rows_that_do_not_run_do_not_change():
    spec, weights = SPECS["nope"], random_weights(SPECS["nope"])
    state = start(spec, weights, [prompt(n) for n in LENGTHS])
    state = dataclasses.replace(state, status=jnp.array([STOPPED, RUNNING, FULL]))
    result = decode(spec, weights, state, params_for(3, do_sample=True), 16)
    assert result.lengths.tolist() == [0, 16, 0]
    for row in (0, 2):
        jax.tree.map(lambda new, old, i=row: np.testing.assert_array_equal(new[i], old[i]), result.state, state)
        assert result.tokens[row].tolist() == [-1] * 16


def test_each_row_has_its_own_limit_and_goes_on_from_there():
    spec, weights = SPECS["plain"], random_weights(SPECS["plain"])
    prompts = [prompt(n) for n in LENGTHS]
    state = start(spec, weights, prompts)
    rows = naive_rows(spec, weights, prompts, state)
    params = params_for(3, max_new_tokens=[3, 0, 16])
    result = decode(spec, weights, state, params, 16)
    assert_same(result, rows, params, 16)
    assert result.lengths.tolist() == [3, 0, 16]
    assert result.state.status.tolist() == [RUNNING] * 3
    assert_same(decode(spec, weights, result.state, params, 16), rows, params, 16)


def test_a_full_cache_is_reported_and_never_written_past():
    spec, weights = SPECS["windows"], random_weights(SPECS["windows"])
    prompts = [prompt(n) for n in (18, 24, 3)]
    state = start(spec, weights, prompts, capacity=24)
    rows = naive_rows(spec, weights, prompts, state)
    params = params_for(3)
    result = decode(spec, weights, state, params, 16)
    assert_same(result, rows, params, 16)
    assert result.lengths.tolist() == [24 - 18 + 1, 1, 16]
    assert result.state.status.tolist() == [FULL, FULL, RUNNING]
    # Again: nothing more, and nothing changes but the row that still has room.
    again = decode(spec, weights, result.state, params, 16)
    assert_same(again, rows, params, 16)
    for row in (0, 1):
        jax.tree.map(lambda new, old, i=row: np.testing.assert_array_equal(new[i], old[i]), again.state, result.state)


def test_the_loop_ends_when_no_row_has_work():
    # Far more steps than there is room for: without an early end this would not return in a test's time.
    steps = 2**20
    spec, weights = SPECS["plain"], random_weights(SPECS["plain"])
    state = start(spec, weights, [prompt(20)], capacity=24)
    result = decode(spec, weights, state, params_for(1, max_new_tokens=5), steps)
    # The limit was reached together with the capacity: the row has not been found full yet.
    assert (result.lengths.tolist(), result.state.status.tolist()) == ([5], [RUNNING])
    after = decode(spec, weights, result.state, params_for(1), steps)
    assert (after.lengths.tolist(), after.state.status.tolist()) == ([0], [FULL])


def test_unused_cache_slots_may_hold_anything():
    spec, weights = SPECS["windows"], random_weights(SPECS["windows"])
    prompts = [prompt(n) for n in LENGTHS]
    state = start(spec, weights, prompts)

    def spoil(cache):
        return jnp.where(jnp.arange(CAPACITY)[:, None] < state.position[:, None, None, None, None], cache, jnp.nan)

    spoilt = dataclasses.replace(state, k_cache=spoil(state.k_cache), v_cache=spoil(state.v_cache))
    clean, dirty = (decode(spec, weights, s, params_for(3), 16) for s in (state, spoilt))
    np.testing.assert_array_equal(clean.tokens, dirty.tokens)
    np.testing.assert_array_equal(clean.log_probs, dirty.log_probs)


def test_under_vmap_each_element_is_decoded_as_alone():
    spec, weights = SPECS["plain"], random_weights(SPECS["plain"])
    states = [start(spec, weights, [prompt(n, seed) for n in LENGTHS], key=jax.random.key(seed)) for seed in (4, 9)]
    params = params_for(3, do_sample=True, temperature=1.5, eos_token_id=3)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    result = jax.jit(
        jax.vmap(lambda s, p: decode_reference(spec, weights, s, p, max_new_tokens=16), in_axes=(0, None))
    )(stacked, params)
    for i, state in enumerate(states):
        alone = decode(spec, weights, state, params, 16)
        np.testing.assert_array_equal(result.tokens[i], alone.tokens)
        np.testing.assert_array_equal(result.state.position[i], alone.state.position)
    assert result.log_probs is None


def test_bad_operands_are_named():
    spec, weights = SPECS["plain"], random_weights(SPECS["plain"])
    state = start(spec, weights, [prompt(3)])
    with pytest.raises(ValueError, match=r"max_new_tokens is 0; expected at least 1"):
        decode_reference(spec, weights, state, params_for(1), max_new_tokens=0)
    with pytest.raises(ValueError, match=r"state.k_cache is float32.*ask for"):
        decode_reference(SPECS["nope"], weights, state, params_for(1), max_new_tokens=4)
