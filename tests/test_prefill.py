"""Prefill: what it leaves in a state, whatever way the prompt comes."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from naive import SPECS, VOCAB, NaiveRow, prompt, random_weights

from jax_monokernel import DecoderSpec, DecodeState, empty_state
from jax_monokernel.prefill import bucket, prefill
from jax_monokernel.reference import decode_reference
from jax_monokernel.sampling import GenerationConfig, sampling_params
from jax_monokernel.state import FULL, RUNNING, STOPPED

pytestmark = pytest.mark.usefixtures("quick_compiles")

CAPACITY = 48
WIDTH = 32
KEY = jax.random.key(5)


def empty(spec: DecoderSpec, batch: int, capacity: int = CAPACITY) -> DecodeState:
    return empty_state(spec, batch=batch, capacity=capacity, key=KEY)


def padded(prompts, width: int = WIDTH, fill: int = 0) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.full((len(prompts), width), fill, np.int32)
    for row, ids in zip(tokens, prompts, strict=True):
        row[: len(ids)] = ids
    return tokens, np.array([len(ids) for ids in prompts], np.int32)


@functools.partial(jax.jit, static_argnums=0)
def decode(spec, weights, state, params):
    return decode_reference(spec, weights, state, params, max_new_tokens=8)


def greedy(batch: int, **options):
    return sampling_params(GenerationConfig(**options), batch=batch, vocab_size=VOCAB)


def assert_same_state(got: DecodeState, want: DecodeState, *, tolerance: float = 1e-5) -> None:
    """Equal states, as far as anything is in their caches."""
    for name in ("position", "last_token", "key_data", "status", "seen"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)
    assert int(jnp.sum(want.position)) > 0
    for name in ("k_cache", "v_cache"):
        for row, n in enumerate(want.position.tolist()):
            pair = (getattr(state, name)[row, :, :, :n].astype(jnp.float32) for state in (got, want))
            np.testing.assert_allclose(*pair, rtol=tolerance, atol=tolerance, err_msg=f"{name}, row {row}")


def rows_of(state: DecodeState, *rows: int) -> DecodeState:
    return jax.tree.map(lambda leaf: leaf[jnp.array(rows)], state)


@pytest.mark.parametrize(("n", "padded_to"), [(1, 16), (16, 16), (17, 32), (512, 512), (513, 1024), (100_000, 131_072)])
def test_buckets(n, padded_to):
    assert bucket(n) == padded_to


def test_what_a_prompt_leaves_in_the_state():
    spec, weights = SPECS["plain"], random_weights(SPECS["plain"])
    prompts = [[5, 9, 5, 30], [7]]
    tokens, lengths = padded(prompts)
    state = prefill(spec, weights, tokens, lengths, empty(spec, 2))
    assert state.position.tolist() == [3, 0]
    assert state.last_token.tolist() == [30, 7]
    assert state.status.tolist() == [RUNNING, RUNNING]
    for row, ids in enumerate(prompts):
        assert np.flatnonzero(state.seen[row]).tolist() == sorted(set(ids))
        assert int(jnp.max(state.seen[row])) == 1
        # Nothing is written past the tokens.
        assert not np.any(state.k_cache[row, :, :, len(ids) - 1 :])
        assert np.all(np.any(state.k_cache[row, :, :, : len(ids) - 1], axis=-1))


@pytest.mark.parametrize("name", ["windows", "dynamic"])
def test_a_batch_of_different_lengths_equals_each_alone(name):
    spec, weights = SPECS[name], random_weights(SPECS[name])
    prompts = [prompt(n) for n in (1, 2, 13, 32)]
    # Padding may hold anything: ids outside the vocabulary too.
    together = jax.jit(prefill, static_argnums=0)(spec, weights, *padded(prompts, fill=-77), empty(spec, 4))
    for row, ids in enumerate(prompts):
        alone = prefill(spec, weights, *padded([ids]), rows_of(empty(spec, 4), row))
        if len(ids) == 1:
            assert not np.any(together.k_cache[row])
        else:
            assert_same_state(rows_of(together, row), alone)


@pytest.mark.parametrize("name", ["windows", "longrope"])
def test_chunks_equal_the_whole_prompt_at_once(name):
    # Longer than a block of the cache, so that later chunks look at several.
    spec, weights = SPECS[name], random_weights(SPECS[name])
    batch = padded([prompt(600), prompt(129), prompt(385)], 600)
    state = empty(spec, 3, 640)
    whole = prefill(spec, weights, *batch, state, chunk=1024)
    assert_same_state(prefill(spec, weights, *batch, state, chunk=128), whole, tolerance=1e-4)


@pytest.mark.parametrize("name", ["plain", "nope"])
def test_several_turns_equal_one_long_prompt(name):
    spec, weights = SPECS[name], random_weights(SPECS[name])
    turns = [[prompt(6), prompt(1), prompt(9)], [prompt(3, 1), prompt(2, 1), []]]
    state = empty(spec, 3)
    said: list[list[int]] = [[], [], []]
    for turn in turns:
        state = prefill(spec, weights, *padded(turn), state)
        result = decode(spec, weights, state, greedy(3, max_new_tokens=[4, 0, 8]))
        state = result.state
        for row in range(3):
            said[row] += turn[row] + result.tokens[row, : int(result.lengths[row])].tolist()
    last = [prompt(5, 2), prompt(4, 2), prompt(1, 2)]
    state = prefill(spec, weights, *padded(last), state)
    once = prefill(spec, weights, *padded([a + b for a, b in zip(said, last, strict=True)]), empty(spec, 3))
    assert_same_state(state, once)


def test_later_turns_go_by_the_whole_length_where_rope_does():
    spec, weights = SPECS["dynamic"], random_weights(SPECS["dynamic"])
    state = empty(spec, 2)
    rows = [NaiveRow(spec, weights, np.asarray(key), capacity=CAPACITY) for key in state.key_data]
    params = greedy(2, max_new_tokens=[3, 8])
    for seed in range(2):
        turn = [prompt(7, seed), prompt(4, seed)]
        state = prefill(spec, weights, *padded(turn), state)
        result = decode(spec, weights, state, params)
        state = result.state
        for i, row in enumerate(rows):
            row.say(turn[i])
            tokens, _ = row.decode(params, i, 8)
            assert result.tokens[i, : len(tokens)].tolist() == tokens


def test_rows_without_a_prompt_stay_and_stopped_rows_run_again():
    spec, weights = SPECS["plain"], random_weights(SPECS["plain"])
    state = prefill(spec, weights, *padded([prompt(5), prompt(6), prompt(7)]), empty(spec, 3))
    state = dataclasses.replace(state, status=jnp.array([STOPPED, STOPPED, FULL], jnp.int32))
    after = prefill(spec, weights, *padded([prompt(3), [], prompt(3)]), state)
    assert after.status.tolist() == [RUNNING, STOPPED, FULL]
    assert after.position.tolist() == [4 + 3, 5, 6]
    jax.tree.map(np.testing.assert_array_equal, rows_of(after, 1, 2), rows_of(state, 1, 2))


def test_a_prompt_without_room_is_an_error_outside_jit_and_full_inside():
    spec, weights = SPECS["plain"], random_weights(SPECS["plain"])
    batch = padded([prompt(24), prompt(25), prompt(32), prompt(3)])
    state = empty(spec, 4, capacity=24)
    # Garbage in the caches shows any write.
    state = dataclasses.replace(state, k_cache=state.k_cache + 7, v_cache=state.v_cache + jnp.nan)
    with pytest.raises(ValueError, match=r"row 1's prompt of 25 tokens.*does not fit a capacity of 24"):
        prefill(spec, weights, *batch, state)
    after = jax.jit(prefill, static_argnums=0)(spec, weights, *batch, state)
    assert after.status.tolist() == [RUNNING, FULL, FULL, RUNNING]
    assert after.position.tolist() == [23, 0, 0, 2]
    changed = dataclasses.replace(after, status=state.status)
    jax.tree.map(np.testing.assert_array_equal, rows_of(changed, 1, 2), rows_of(state, 1, 2))

    # The next turn counts what is in the cache and the token that is still to be fed.
    fits, too_long = padded([[1], [], [], prompt(21)]), padded([[1], [], [], prompt(22)])
    after = dataclasses.replace(after, position=after.position.at[0].set(20))
    assert prefill(spec, weights, *fits, after).status.tolist() == [RUNNING, FULL, FULL, RUNNING]
    with pytest.raises(ValueError, match=r"row 3's prompt of 22 tokens, after 3 that it holds"):
        prefill(spec, weights, *too_long, after)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": np.zeros((2, 4), np.float32)}, r"tokens are float32; expected integers"),
        ({"tokens": np.zeros((3, 4), np.int32)}, r"tokens have shape \[3, 4\].*batch 2"),
        ({"tokens": np.zeros((2, 0), np.int32)}, r"tokens have shape \[2, 0\]"),
        ({"tokens": np.array([[1, VOCAB, 0], [0, 0, 0]])}, rf"token id {VOCAB} is outside the vocabulary of {VOCAB}"),
        ({"tokens": np.array([[1, 2, 0], [-1, 0, 0]])}, r"token id -1 is outside the vocabulary"),
        ({"lengths": np.array([1, 2, 1])}, r"lengths have shape \[3\]; expected \[2\]"),
        ({"lengths": np.array([1, 4])}, r"lengths are \[1, 4\]; expected 0 to 3"),
        ({"lengths": np.array([1, -1])}, r"lengths are \[1, -1\]"),
        ({"chunk": 0}, r"chunk is 0; expected at least 1"),
        ({"state": empty(SPECS["nope"], 2)}, r"state.k_cache is float32.*ask for"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_named(change, message):
    spec = SPECS["plain"]
    arguments = {
        "tokens": np.array([[1, 2, 0], [3, 0, 0]]),
        "lengths": np.array([2, 1]),
        "state": empty(spec, 2),
    } | change
    with pytest.raises(ValueError, match=message):
        prefill(spec, random_weights(spec), **arguments)
