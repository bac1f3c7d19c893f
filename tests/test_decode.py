"""decode on the native CPU backend against the reference, and as a citizen of JAX."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding import (
    CAPACITY,
    DECODE_ERRORS,
    SPECS,
    STEPS,
    assert_bit_equal,
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
    weights_of,
)
from jax.sharding import Mesh, PartitionSpec

from jax_monokernel import _native, empty_state
from jax_monokernel.decode import decode as decode_any
from jax_monokernel.plan import Plan
from jax_monokernel.sampling import SamplingParams
from jax_monokernel.state import FULL, RUNNING, STOPPED
from jax_monokernel.tape import pack

PLAIN = spec_of("plain")
DTYPES = ["float32", "bfloat16", "float16"]


@pytest.fixture(autouse=True)
def _more_threads_than_cores(environment):
    """As many threads as a tape has units, whatever this machine has."""
    environment("MONOKERNEL_THREADS", "8")


# ---- The same results as the reference ----


@pytest.mark.parametrize("units", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SPECS)
def test_native_decode_equals_the_reference(name, dtype, units):
    spec = spec_of(name, dtype)
    state, params, want = state_of(spec), mixed_params(spec, 3), reference_of_mixed(spec)
    got = decode(tape_of(spec, units), state, params)
    assert_same_decode(got, want, spec, state)
    assert got.lengths.tolist() == [STEPS] * 3
    assert len(set(np.asarray(got.tokens).ravel().tolist())) > 5  # not stuck on one token


@pytest.mark.parametrize("units", [1, 2, 3])
@pytest.mark.parametrize("name", SPECS)
def test_a_single_request_equals_the_reference(name, units):
    # The reference gives rows of one batch independently, so its batch of three serves again.
    spec = spec_of(name)
    state = state_of(spec)
    for row in range(3):
        one = slice(row, row + 1)
        got = decode(tape_of(spec, units), rows_of(state, one), rows_of(mixed_params(spec, 3), one))
        assert_same_decode(got, rows_of(reference_of_mixed(spec), one), spec, rows_of(state, one))


def test_the_reference_backend_of_a_tape_is_the_reference():
    state, params = state_of(PLAIN), mixed_params(PLAIN, 3)
    got = decode(tape_of(PLAIN, 2), state, params, backend="reference")
    assert_same_decode(got, reference_of_mixed(PLAIN), PLAIN, state)


@pytest.mark.parametrize("units", [1, 3])
def test_every_request_ends_in_its_own_way(units):
    """End-of-sequence ids, limits, full caches, and requests that do not run, all in one batch."""
    spec = PLAIN
    state = state_of(spec, (0, 7, 20, CAPACITY - 3, CAPACITY, 5, 9, 11))
    state = replace_row(state, 5, status=STOPPED)
    state = replace_row(state, 6, status=FULL)
    free = decode(tape_of(spec, units), state, params_of(spec, 8, temperature=1.0))
    eos = np.full((8, 3), -1, np.int32)
    eos[0] = [free.tokens[0, 4], -1, free.tokens[0, 9]]
    eos[1] = [-1, -1, free.tokens[1, 0]]
    eos[7] = free.tokens[0, 4]
    params = params_of(spec, 8, temperature=1.0, eos_token_id=eos, max_new_tokens=[16, 16, 5, 16, 16, 16, 16, 0])
    got, want = decode(tape_of(spec, units), state, params), reference(spec, state, params)
    assert_same_decode(got, want, spec, state)
    assert got.lengths.tolist() == [5, 1, 5, 3, 0, 0, 0, 0]
    assert got.state.status.tolist() == [STOPPED, STOPPED, RUNNING, FULL, FULL, STOPPED, FULL, RUNNING]
    assert got.tokens[0, 4] == eos[0, 0]  # the end itself is emitted
    for row in (5, 6, 7):
        assert_bit_equal(rows_of(got.state, row), rows_of(state, row))
    # Once more: only the request that met its limit goes on.
    again = decode(tape_of(spec, units), got.state, params)
    assert again.lengths.tolist() == [0, 0, 5, 0, 0, 0, 0, 0]


def test_without_end_of_sequence_ids():
    state = state_of(PLAIN, (7,))
    params = dataclasses.replace(params_of(PLAIN, 1), eos_token_id=jnp.zeros((1, 0), jnp.int32))
    assert decode(tape_of(PLAIN, 2), state, params).lengths.tolist() == [STEPS]


# ---- Bits ----


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["windows", "dynamic"])
def test_n_then_m_tokens_equal_n_plus_m(name, dtype):
    spec = spec_of(name, dtype)
    tape, state, params = tape_of(spec, 2), state_of(spec), mixed_params(spec, 3)
    limit = functools.partial(dataclasses.replace, params)
    whole = decode(tape, state, params)
    first = decode(tape, state, limit(max_new_tokens=jnp.array([5, 9, 0])))
    second = decode(tape, first.state, limit(max_new_tokens=jnp.array([11, 7, 16])))
    for row, n in enumerate([5, 9, 0]):
        for name in ("tokens", "log_probs"):
            a, b, c = (getattr(r, name)[row] for r in (whole, first, second))
            np.testing.assert_array_equal(a, np.concatenate([b[:n], c[: STEPS - n]]), err_msg=f"{name} of row {row}")
    assert_bit_equal(second.state, whole.state)


@pytest.mark.parametrize("units", [1, 2, 3, 5])
@pytest.mark.parametrize(("name", "dtype"), [("plain", "float32"), ("nope", "bfloat16"), ("windows", "float16")])
def test_a_request_gives_the_same_bits_in_any_batch_and_with_any_number_of_units(name, dtype, units):
    spec = spec_of(name, dtype)
    positions = (0, 7, 20, 21, 3)
    together = decode(tape_of(spec, units), state_of(spec, positions), mixed_params(spec, 5))
    for row, position in enumerate(positions):
        alone = decode(
            tape_of(spec, 1), state_of(spec, (position,)), rows_of(mixed_params(spec, 5), slice(row, row + 1))
        )
        assert_bit_equal(rows_of(together, row), rows_of(alone, 0))


@pytest.mark.sanitize
def test_a_long_context_gives_the_same_bits_in_any_batch_and_with_any_number_of_units():
    # Long enough for its parts to go to different threads.
    positions, capacity = (1500, 3, 700), 1600
    alone = [
        decode(tape_of(PLAIN, 1), state_of(PLAIN, (p,), capacity=capacity), params_of(PLAIN, 1)) for p in positions
    ]
    for units in (1, 2, 3, 8):
        together = decode(tape_of(PLAIN, units), state_of(PLAIN, positions, capacity=capacity), params_of(PLAIN, 3))
        for row, want in enumerate(alone):
            assert_bit_equal(rows_of(together, row), rows_of(want, 0))


def test_repeats_are_bit_equal():
    spec = spec_of("windows", "bfloat16")
    results = [decode(tape_of(spec, 3), state_of(spec), mixed_params(spec, 3)) for _ in range(20)]
    for result in results[1:]:
        assert_bit_equal(result, results[0])


@pytest.mark.sanitize
def test_more_requests_than_one_call_takes():
    batch = _native.MAX_BATCH + 3
    positions = tuple(range(batch))
    whole = decode(tape_of(PLAIN, 2), state_of(PLAIN, positions), mixed_params(PLAIN, batch))
    assert whole.tokens.shape == (batch, STEPS)
    for row in (0, _native.MAX_BATCH - 1, _native.MAX_BATCH, batch - 1):
        one = rows_of(mixed_params(PLAIN, batch), slice(row, row + 1))
        assert_bit_equal(rows_of(whole, row), rows_of(decode(tape_of(PLAIN, 2), state_of(PLAIN, (row,)), one), 0))


# ---- JAX ----


def test_eagerly_inside_a_larger_jit_and_in_a_loop():
    tape, state, params = tape_of(PLAIN, 2), state_of(PLAIN), mixed_params(PLAIN, 3)
    want = decode(tape, state, params)
    assert_bit_equal(decode_any(tape, state, params, max_new_tokens=STEPS, return_log_probs=True), want)
    without = decode_any(tape, state, params, max_new_tokens=STEPS)
    assert without.log_probs is None
    assert_bit_equal(without.tokens, want.tokens)

    @jax.jit
    def in_a_larger_function(tape, state, params):
        params = dataclasses.replace(params, temperature=params.temperature * 2 / 2)
        result = decode_any(tape, state, params, max_new_tokens=STEPS)
        return jnp.where(result.tokens < 0, 0, result.tokens) + 1

    np.testing.assert_array_equal(in_a_larger_function(tape, state, params), want.tokens + 1)

    @jax.jit
    def in_a_loop(tape, state, params):
        def step(state, _):
            result = decode_any(tape, state, params, max_new_tokens=4)
            return result.state, result.tokens

        state, tokens = jax.lax.scan(step, state, length=STEPS // 4)
        return state, jnp.concatenate(list(tokens), axis=1)

    state, tokens = in_a_loop(tape, state, params)
    np.testing.assert_array_equal(tokens, want.tokens)
    assert_bit_equal(state, want.state)


def folded(count: int):
    """`count` states of two requests, stacked; one state of them all; and its parameters."""
    positions = tuple(range(2 * count))
    whole = state_of(PLAIN, positions)
    return jax.tree.map(lambda x: x.reshape(count, 2, *x.shape[1:]), whole), whole, mixed_params(PLAIN, 2)


def tile(params: SamplingParams, times: int) -> SamplingParams:
    return jax.tree.map(lambda x: jnp.tile(x, (times,) + (1,) * (x.ndim - 1)), params)


def test_vmap_folds_into_the_batch():
    stacked, whole, params = folded(3)
    tape = tape_of(PLAIN, 2)
    want = decode(tape, whole, tile(params, 3))
    got = jax.jit(jax.vmap(lambda s, p: decode(tape, s, p), in_axes=(0, None)))(stacked, params)
    assert_bit_equal(jax.tree.map(lambda x: x.reshape(6, *x.shape[2:]), got), want)
    # As a batch axis somewhere else, and with a state that has none.
    moved = jax.tree.map(lambda x: jnp.moveaxis(x, 0, -1), stacked)
    assert_bit_equal(jax.vmap(lambda s: decode(tape, s, params), in_axes=-1)(moved), got)
    many = jax.tree.map(lambda x: jnp.stack([x, x]), params)
    many = dataclasses.replace(many, temperature=jnp.array([[0.0, 0.0], [1.0, 2.0]]))
    got = jax.vmap(lambda p: decode(tape, rows_of(stacked, 1), p))(many)
    for i in range(2):
        assert_bit_equal(rows_of(got, i), decode(tape, rows_of(stacked, 1), rows_of(many, i)))


def test_nested_vmap_folds_into_the_batch():
    stacked, whole, params = folded(4)
    tape = tape_of(PLAIN, 2)
    want = decode(tape, whole, tile(params, 4))
    nested = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), stacked)
    two = jax.vmap(jax.vmap(lambda s, p: decode(tape, s, p), in_axes=(0, None)), in_axes=(0, None))
    got = two(nested, params)
    assert_bit_equal(jax.tree.map(lambda x: x.reshape(8, *x.shape[3:]), got), want)
    lowered = jax.jit(two).lower(nested, params).as_text()
    assert lowered.count("custom_call @jax_monokernel_decode") == 1


def test_vmap_over_weights_is_refused():
    tape, state, params = tape_of(PLAIN, 2), state_of(PLAIN), mixed_params(PLAIN, 3)
    tapes = jax.tree.map(lambda x: jnp.stack([x, x]), tape)
    with pytest.raises(ValueError, match=r"decode cannot be vmapped over weights.* Loop over the tapes"):
        jax.vmap(lambda t: decode(t, state, params))(tapes)


def test_shard_map_over_the_batch():
    mesh = Mesh(np.array(jax.devices("cpu")[:4]), ("batch",))
    spread, everywhere = PartitionSpec("batch"), PartitionSpec()
    positions = tuple(range(8))
    state, params, tape = state_of(PLAIN, positions), mixed_params(PLAIN, 8), tape_of(PLAIN, 2)
    want = decode(tape, state, params)
    sharded = jax.jit(
        jax.shard_map(
            lambda t, s, p: decode_any(t, s, p, max_new_tokens=STEPS, return_log_probs=True),
            mesh=mesh,
            in_specs=(everywhere, spread, spread),
            out_specs=spread,
            check_vma=False,
        )
    )
    got = sharded(tape, state, params)
    assert got.tokens.sharding.is_equivalent_to(jax.NamedSharding(mesh, spread), 2)
    assert_bit_equal(jax.device_get(got), jax.device_get(want))


@pytest.mark.sanitize
def test_a_donated_cache_is_written_in_place():
    tape, params = tape_of(PLAIN, 2), mixed_params(PLAIN, 3)
    want = decode(tape, state_of(PLAIN), params)
    donating = jax.jit(
        lambda t, s, p: decode_any(t, s, p, max_new_tokens=STEPS, return_log_probs=True), donate_argnames="s"
    )
    state = state_of(PLAIN)
    names = ("k_cache", "v_cache", "seen")
    before = {name: getattr(state, name).unsafe_buffer_pointer() for name in names}
    got = donating(tape, state, params)
    assert {name: getattr(got.state, name).unsafe_buffer_pointer() for name in names} == before
    assert state.k_cache.is_deleted()
    assert_bit_equal(got, want)
    # Not even a copy that is made and thrown away again.
    memory = donating.lower(tape, state_of(PLAIN), params).compile().memory_analysis()
    assert memory.temp_size_in_bytes < state_of(PLAIN).k_cache.nbytes


def test_a_fresh_state_can_be_donated():
    state = empty_state(PLAIN, batch=3, capacity=CAPACITY, key=jax.random.key(5))
    donating = jax.jit(lambda t, s, p: decode_any(t, s, p, max_new_tokens=STEPS), donate_argnames="s")
    assert donating(tape_of(PLAIN, 2), state, params_of(PLAIN, 3)).lengths.tolist() == [STEPS] * 3


def test_a_state_that_is_not_donated_stays():
    state = state_of(PLAIN)
    copy = jax.tree.map(lambda x: np.array(x), state)
    decode(tape_of(PLAIN, 2), state, mixed_params(PLAIN, 3)).tokens.block_until_ready()
    assert_bit_equal(jax.tree.map(np.asarray, state), copy)


def test_new_sampling_values_keys_and_ends_do_not_recompile():
    traces = []

    @jax.jit
    def run(tape, state, params):
        traces.append(1)
        return decode_any(tape, state, params, max_new_tokens=STEPS)

    tape, state = tape_of(PLAIN, 2), state_of(PLAIN)
    tokens = [
        run(tape, dataclasses.replace(state, key_data=state.key_data + key), params_of(PLAIN, 3, **options)).tokens
        for key, options in [
            (0, {}),
            (1, {"temperature": 1.5}),
            (2, {"temperature": 1.5, "top_k": 3, "top_p": 0.5, "min_p": 0.1}),
            (2, {"repetition_penalty": 2.0, "presence_penalty": 1.0, "max_new_tokens": 3}),
            (2, {"eos_token_id": [3, 4]}),
        ]
    ]
    assert len(traces) == 1
    assert run._cache_size() == 1
    assert len({np.asarray(t).tobytes() for t in tokens}) >= 4


# ---- Bad operands ----


def bad_state(**values):
    return lambda state, params: (
        dataclasses.replace(state, **{k: f(getattr(state, k)) for k, f in values.items()}),
        params,
    )


def bad_params(**values):
    return lambda state, params: (
        state,
        dataclasses.replace(params, **{k: f(getattr(params, k)) for k, f in values.items()}),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (bad_state(k_cache=lambda x: x[0]), r"state.k_cache"),
        (bad_state(k_cache=lambda x: x.astype(jnp.bfloat16)), r"state.k_cache is bfloat16.*float32\[3, 2, 2, 40, 8\]"),
        (bad_state(v_cache=lambda x: x[:, :, :, 1:]), r"state.v_cache is float32\[3, 2, 2, 39, 8\]"),
        (bad_state(position=lambda x: x[:2]), r"state.(position|k_cache) is"),
        (bad_state(last_token=lambda x: x.astype(jnp.int16)), r"state.last_token is int16\[3\]; .*int32\[3\]"),
        (bad_state(key_data=lambda x: x[:, :1]), r"state.key_data is uint32\[3, 1\]"),
        (bad_state(seen=lambda x: x[:, 1:]), r"state.seen is uint8\[3, 36\]"),
        (bad_params(top_k=lambda x: x.astype(jnp.float32)), r"sampling.top_k is float32\[3\]; expected int32\[3\]"),
        (bad_params(temperature=lambda x: x[0]), r"sampling.temperature is float32\[\]; expected float32\[3\]"),
        (bad_params(eos_token_id=lambda x: x[:, 0]), r"sampling.eos_token_id is int32\[3\]"),
        (bad_params(logit_bias=lambda x: jnp.zeros(37)), r"sampling.logit_bias is float32\[37\]; .*float32\[3, 37\]"),
    ],
    ids=lambda value: None if callable(value) else value.split(" ")[0],
)
def test_operands_of_the_wrong_shape_or_dtype_are_named(change, message):
    state, params = change(state_of(PLAIN), params_of(PLAIN, 3))
    with pytest.raises(ValueError, match=message):
        decode_any(tape_of(PLAIN, 2), state, params, max_new_tokens=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; expected at least 1"),
        ({"max_new_tokens": -3}, "max_new_tokens is -3; expected at least 1"),
        ({"backend": "tpu"}, "backend is 'tpu'; expected one of"),
        (
            {"backend": "cuda"},
            r"packed for cpu; (JAX sees no cuda device here|to decode on cuda, .* make_plan\(spec, platform='cuda'\))",
        ),
        ({"spec": SPECS["nope"]}, "spec is not the one that the tape was packed for"),
    ],
    ids=["none", "negative", "unknown-backend", "backend", "spec"],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        decode_any(tape_of(PLAIN, 2), state_of(PLAIN), params_of(PLAIN, 3), **{"max_new_tokens": 4, **options})


def test_a_tape_of_another_layout_is_refused():
    tape = dataclasses.replace(tape_of(PLAIN, 2), layout_version=0)
    with pytest.raises(ValueError, match="layout version 0"):
        decode_any(tape, state_of(PLAIN), params_of(PLAIN, 3), max_new_tokens=4)


def test_a_gpu_tape_does_not_run_on_the_cpu():
    tape = jax.jit(lambda w: pack(PLAIN, w, Plan(platform="cuda", units=2)))(weights_of(PLAIN))
    with pytest.raises(DECODE_ERRORS, match="packed for cuda, but this computation runs on the CPU"):
        jax.block_until_ready(decode_any(tape, state_of(PLAIN), params_of(PLAIN, 3), max_new_tokens=4))


@pytest.mark.sanitize
@pytest.mark.parametrize("token", [37, -1, 2**31 - 1, -(2**31)])
def test_a_last_token_outside_the_vocabulary_is_an_error(token):
    state = replace_row(state_of(PLAIN), 1, last_token=token)
    with pytest.raises(DECODE_ERRORS, match=rf"last_token of request 1 is {token}; expected 0 to 36"):
        jax.block_until_ready(decode(tape_of(PLAIN, 2), state, params_of(PLAIN, 3)))
    # Of a request that does not run, nothing is read.
    state = replace_row(state, 1, status=STOPPED)
    assert decode(tape_of(PLAIN, 2), state, params_of(PLAIN, 3)).lengths.tolist() == [STEPS, 0, STEPS]


@pytest.mark.sanitize
def test_positions_outside_the_cache():
    state = replace_row(state_of(PLAIN), 2, position=-1)
    with pytest.raises(DECODE_ERRORS, match=r"position of request 2 is -1; expected at least 0"):
        jax.block_until_ready(decode(tape_of(PLAIN, 2), state, params_of(PLAIN, 3)))
    state = replace_row(state, 2, position=2**31 - 1)
    assert decode(tape_of(PLAIN, 2), state, params_of(PLAIN, 3)).state.status.tolist() == [RUNNING, RUNNING, FULL]
