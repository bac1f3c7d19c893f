"""The definition of sampling against an independent oracle, its limits, and its randomness."""

from __future__ import annotations

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sampling_oracle as oracle
from scipy import stats

from jax_monokernel import sample
from jax_monokernel.sampling import MIN_TEMPERATURE, _adjusted, _filtered, gumbel_noise

VOCAB = 37
BATCH = 64

jit_sample = jax.jit(
    lambda logits, seen, key_data, position, params: sample(
        logits, seen=seen, key_data=key_data, position=position, params=params
    )
)


def keys(seed: int, batch: int) -> jax.Array:
    return jax.random.key_data(jax.random.split(jax.random.key(seed), batch))


def inputs(seed: int, batch: int = BATCH, vocab: int = VOCAB, scale: float = 3.0):
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=(batch, vocab)) * scale).astype(np.float32)
    seen = (rng.integers(0, 4, (batch, vocab)) * (rng.random((batch, vocab)) < 0.4)).astype(np.uint8)
    position = rng.integers(0, 100_000, batch).astype(np.int32)
    return jnp.asarray(logits), jnp.asarray(seen), keys(seed, batch), jnp.asarray(position)


def check_rows(logits, seen, key_data, position, params) -> int:
    """Compares every row with the oracle; returns how many rows had one right answer."""
    tokens, log_probs = map(np.asarray, jit_sample(logits, seen, key_data, position, params))
    noise = oracle.noise(key_data, position, logits.shape[1])
    clear = 0
    for i, (row, mask) in enumerate(zip(np.asarray(logits), np.asarray(seen), strict=True)):
        options = oracle.row_params(params, i)
        want = oracle.choose(row, mask, noise[i], options)
        if want.clear:
            clear += 1
            assert tokens[i] == want.token, options
            np.testing.assert_allclose(log_probs[i], want.log_prob, rtol=3e-6, atol=3e-6)
    return clear


ALONE = {
    "greedy": {"temperature": 0.0},
    "temperature-low": {"temperature": 0.3},
    "temperature-high": {"temperature": 2.5},
    "top_k-1": {"top_k": 1},
    "top_k-5": {"top_k": 5},
    "top_k-all": {"top_k": VOCAB},
    "top_k-beyond": {"top_k": 10 * VOCAB},
    "top_p-half": {"top_p": 0.5},
    "top_p-most": {"top_p": 0.97},
    "top_p-tiny": {"top_p": 1e-6},
    "min_p-tenth": {"min_p": 0.1},
    "min_p-one": {"min_p": 1.0},
    "repetition": {"repetition_penalty": 1.4},
    "repetition-reward": {"repetition_penalty": 0.7},
    "presence": {"presence_penalty": 2.5},
    "presence-reward": {"presence_penalty": -2.5},
    "greedy-penalties": {"temperature": 0.0, "repetition_penalty": 1.8, "presence_penalty": 1.0},
    "everything": {
        "temperature": 0.8,
        "top_k": 12,
        "top_p": 0.9,
        "min_p": 0.05,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
    },
}


@pytest.mark.parametrize("options", ALONE.values(), ids=ALONE.keys())
def test_option_against_oracle(options):
    assert check_rows(*inputs(1), oracle.make_params(BATCH, VOCAB, **options)) > BATCH * 0.9


def test_logit_bias_against_oracle():
    bias = np.random.default_rng(3).normal(size=(BATCH, VOCAB)) * 2
    bias[:, ::5] = -np.inf
    args = inputs(2)
    params = oracle.make_params(BATCH, VOCAB, logit_bias=bias, temperature=0.9)
    assert check_rows(*args, params) > BATCH * 0.9
    assert not np.any(np.asarray(jit_sample(*args, params)[0]) % 5 == 0)


option_values = {
    "temperature": st.one_of(st.just(0.0), st.floats(0.05, 4)),
    "top_k": st.integers(0, VOCAB + 3),
    "top_p": st.one_of(st.just(1.0), st.floats(0.01, 1)),
    "min_p": st.one_of(st.just(0.0), st.floats(0.001, 1)),
    "repetition_penalty": st.one_of(st.just(1.0), st.floats(0.5, 3)),
    "presence_penalty": st.one_of(st.just(0.0), st.floats(-3, 3)),
}


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    options=st.lists(st.fixed_dictionaries(option_values), min_size=4, max_size=4),
    seed=st.integers(0, 2**31 - 1),
    # Logits on a coarse grid have many ties, which continuous values never have.
    grid=st.sampled_from([0.0, 0.25, 2.0]),
    banned=st.sampled_from([0.0, 0.3, 0.97]),
)
def test_rows_of_different_options_against_oracle(options, seed, grid, banned):
    logits, seen, key_data, position = inputs(seed)
    if grid:
        logits = jnp.round(logits / grid) * grid
    logits = jnp.where(np.random.default_rng(seed).random(logits.shape) < banned, -jnp.inf, logits)
    columns = {name: [options[i % 4][name] for i in range(BATCH)] for name in option_values}
    check_rows(logits, seen, key_data, position, oracle.make_params(BATCH, VOCAB, **columns))


def filtered(z: list[float], **options) -> list[int]:
    """Ids of the tokens that the filters keep."""
    params = jax.tree.map(lambda leaf: leaf[0], oracle.make_params(1, len(z), **options))
    return np.flatnonzero(np.isfinite(_filtered(jnp.asarray(z, jnp.float32), params))).tolist()


@pytest.mark.parametrize(
    ("z", "options", "kept"),
    [
        ([1, 3, 2, 2, 0], {"top_k": 2}, [1, 2, 3]),
        ([5, 5, 5, 5], {"top_k": 1}, [0, 1, 2, 3]),
        ([-0.0, 0.0, -1], {"top_k": 1}, [0, 1]),
        (np.log([0.5, 0.2, 0.2, 0.1]).tolist(), {"top_p": 0.6}, [0, 1, 2]),
        (np.log([0.5, 0.2, 0.2, 0.1]).tolist(), {"top_p": 0.4}, [0]),
        ([2, 2, 2, 2], {"top_p": 0.1}, [0, 1, 2, 3]),
        # Of the two that top-k keeps the best has 5/7 = 0.71 of the mass.
        (np.log([0.5, 0.2, 0.17, 0.13]).tolist(), {"top_p": 0.7, "top_k": 2}, [0]),
        (np.log([0.5, 0.2, 0.17, 0.13]).tolist(), {"top_p": 0.73, "top_k": 2}, [0, 1]),
        ([0, -1, -1, -2], {"min_p": 0.3}, [0, 1, 2]),
        ([0, 0, -0.001], {"min_p": 1.0}, [0, 1]),
        ([-np.inf, 1, -np.inf], {"top_k": 3, "top_p": 0.9, "min_p": 0.1}, [1]),
    ],
)
def test_filters_on_small_cases(z, options, kept):
    assert filtered(z, **options) == kept


def test_greedy_takes_the_first_of_equals():
    logits, seen, key_data, position = inputs(4)
    tied = jnp.where(jnp.arange(VOCAB) % 7 == 5, 9.0, jnp.minimum(logits, 8.0))
    tokens, _ = jit_sample(tied, seen, key_data, position, oracle.make_params(BATCH, VOCAB, temperature=0.0))
    np.testing.assert_array_equal(tokens, 5)


MIXED = {
    "temperature": np.resize([0, 0.5, 1, 1.5, 0, 2], BATCH),
    "top_k": np.resize([0, 3, 0, 0, 2, 9], BATCH),
    "top_p": np.resize([1, 1, 0.6, 1, 0.2, 0.9, 1], BATCH),
}


def test_rows_do_not_depend_on_each_other():
    args = (*inputs(5), oracle.make_params(BATCH, VOCAB, **MIXED))
    tokens, log_probs = jit_sample(*args)
    for i in range(14):
        alone = jit_sample(*jax.tree.map(lambda leaf: leaf[i : i + 1], args))  # noqa: B023
        assert alone[0][0] == tokens[i]
        np.testing.assert_allclose(alone[1][0], log_probs[i], rtol=1e-6)


def test_vmap_equals_batch():
    args = (*inputs(6), oracle.make_params(BATCH, VOCAB, **MIXED))
    want = jit_sample(*args)
    got = jax.vmap(jit_sample)(*jax.tree.map(lambda leaf: leaf.reshape(2, BATCH // 2, *leaf.shape[1:]), args))
    np.testing.assert_array_equal(np.ravel(got[0]), want[0])
    np.testing.assert_allclose(np.ravel(got[1]), want[1], rtol=1e-6)


def test_new_values_do_not_recompile():
    traces = 0

    @jax.jit
    def counted(logits, seen, key_data, position, params):
        nonlocal traces
        traces += 1
        return sample(logits, seen=seen, key_data=key_data, position=position, params=params)

    for seed, options in enumerate(ALONE.values()):
        counted(*inputs(seed), oracle.make_params(BATCH, VOCAB, **options))
    assert traces == 1


def test_constant_options_give_the_same_tokens():
    args = inputs(7)
    params = oracle.make_params(BATCH, VOCAB, temperature=0.7, repetition_penalty=1.3, top_p=0.9)
    inside = jax.jit(lambda *a: sample(a[0], seen=a[1], key_data=a[2], position=a[3], params=params))
    np.testing.assert_array_equal(inside(*args)[0], jit_sample(*args, params)[0])


def test_logits_are_adjusted_as_f32_arithmetic_says():
    """No fused multiply-adds and no reciprocals: other backends repeat these roundings exactly."""
    logits, seen, *_ = inputs(8, 8, 5000)
    bias = np.random.default_rng(1).normal(size=(8, 5000)).astype(np.float32)
    temperature = np.linspace(0.3, 2.1, 8, dtype=np.float32)
    params = oracle.make_params(
        8, 5000, temperature=temperature, repetition_penalty=1.3, presence_penalty=0.7, logit_bias=bias
    )
    got = np.asarray(jax.jit(jax.vmap(_adjusted))(logits, seen, params))
    z, s = np.asarray(logits), np.asarray(seen)
    z = np.where(s != 0, np.where(z > 0, z / np.float32(1.3), z * np.float32(1.3)), z)
    z = np.where(s & 2, z - np.float32(0.7), z) + bias
    np.testing.assert_array_equal(got, z / temperature[:, None])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "logits",
    [
        [np.nan] * VOCAB,
        [-np.inf] * VOCAB,
        [np.nan, -np.inf] + [np.nan] * (VOCAB - 2),
    ],
    ids=["nan", "-inf", "mixed"],
)
def test_nothing_to_choose_from(logits, temperature):
    _, seen, key_data, position = inputs(9)
    params = oracle.make_params(BATCH, VOCAB, temperature=temperature, top_p=0.9, top_k=3, min_p=0.1)
    tokens, log_probs = jit_sample(
        jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (BATCH, VOCAB)), seen, key_data, position, params
    )
    np.testing.assert_array_equal(tokens, 0)
    np.testing.assert_array_equal(log_probs, -np.inf)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_nan_is_never_chosen_and_inf_always(temperature):
    logits, seen, key_data, position = inputs(10)
    seen = jnp.zeros_like(seen)
    params = oracle.make_params(BATCH, VOCAB, temperature=temperature)
    holes = logits.at[:, ::2].set(jnp.nan)
    tokens, log_probs = jit_sample(holes, seen, key_data, position, params)
    assert np.all(np.asarray(tokens) % 2 == 1)
    assert np.all(np.isfinite(log_probs))
    tokens, log_probs = jit_sample(holes.at[:, 11].set(jnp.inf), seen, key_data, position, params)
    np.testing.assert_array_equal(tokens, 11)
    np.testing.assert_array_equal(log_probs, 0)


NONSENSE = {
    "temperature-nan": ({"temperature": np.nan}, {"temperature": 0.0}),
    "temperature-negative": ({"temperature": -1.0}, {"temperature": 0.0}),
    "temperature-tiny": ({"temperature": MIN_TEMPERATURE / 2}, {"temperature": 0.0}),
    "top_k-negative": ({"top_k": -5}, {}),
    "top_p-nan": ({"top_p": np.nan}, {}),
    "top_p-above": ({"top_p": 7.0}, {}),
    "top_p-zero": ({"top_p": 0.0}, {"top_k": 1}),
    "top_p-negative": ({"top_p": -3.0}, {"top_k": 1}),
    "min_p-nan": ({"min_p": np.nan}, {}),
    "min_p-negative": ({"min_p": -0.5}, {}),
    "min_p-above": ({"min_p": 9.0}, {"min_p": 1.0}),
    "repetition-zero": ({"repetition_penalty": 0.0}, {}),
    "repetition-negative": ({"repetition_penalty": -2.0}, {}),
    "repetition-nan": ({"repetition_penalty": np.nan}, {}),
    "repetition-inf": ({"repetition_penalty": np.inf}, {}),
    "presence-nan": ({"presence_penalty": np.nan}, {}),
}


@pytest.mark.parametrize(("nonsense", "meaning"), NONSENSE.values(), ids=NONSENSE.keys())
def test_options_out_of_range_have_a_meaning(nonsense, meaning):
    args = inputs(11)
    got = jit_sample(*args, oracle.make_params(BATCH, VOCAB, **nonsense))
    want = jit_sample(*args, oracle.make_params(BATCH, VOCAB, **meaning))
    np.testing.assert_array_equal(got[0], want[0])


@pytest.mark.parametrize("vocab", [1, 2, 1001])
def test_noise_is_that_of_jax_random(vocab):
    key = jax.random.key(12)
    for position in (0, 5, 2**31 - 2):
        with jax.threefry_partitionable(True):
            bits = np.asarray(jax.random.bits(jax.random.fold_in(key, position), (vocab,), "uint32"))
        want = -np.log(-np.log(((bits >> 9) + 0.5) * 2.0**-23))
        got = gumbel_noise(jax.random.key_data(key), jnp.int32(position), vocab)
        np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.parametrize(("partitionable", "impl"), [(False, "threefry2x32"), (True, "rbg")])
def test_jax_prng_settings_do_not_matter(partitionable, impl):
    args = inputs(13)
    params = oracle.make_params(BATCH, VOCAB, temperature=1.5)
    want = jit_sample(*args, params)
    with jax.threefry_partitionable(partitionable), jax.default_prng_impl(impl):
        got = jit_sample(*args, params)  # compiled again: these settings are part of jit's cache key
    np.testing.assert_array_equal(got[0], want[0])


STATISTICS = {
    "plain": {},
    "cool": {"temperature": 0.6},
    "hot": {"temperature": 1.7},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "penalties": {"repetition_penalty": 1.5, "presence_penalty": 0.5},
    "together": {"temperature": 0.9, "top_k": 20, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.1},
}


@pytest.mark.parametrize("options", STATISTICS.values(), ids=STATISTICS.keys())
def test_frequencies(options):
    """Chi-squared test of 30,000 draws at different positions of one request."""
    n = 30_000
    logits, seen, key_data, _ = inputs(14, 1, scale=1.5)
    params = oracle.make_params(n, VOCAB, **options)
    many = [jnp.broadcast_to(a, (n, *a.shape[1:])) for a in (logits, seen, key_data)]
    tokens, _ = jit_sample(*many, jnp.arange(n, dtype=jnp.int32), params)
    p = oracle.probabilities(np.asarray(logits)[0], np.asarray(seen)[0], oracle.row_params(params, 0))
    check_frequencies(np.asarray(tokens), p)


def check_frequencies(tokens: np.ndarray, p: np.ndarray) -> None:
    n = len(tokens)
    counts = np.bincount(tokens, minlength=len(p))
    assert not np.any(counts[p == 0])
    often = p * n >= 10
    observed, expected = counts[often], p[often] * n
    if n - expected.sum() >= 10:
        observed, expected = np.append(observed, n - observed.sum()), np.append(expected, n - expected.sum())
    else:
        expected = expected * (observed.sum() / expected.sum())
    assert stats.chisquare(observed, expected).pvalue > 1e-3


def check_independent(a: np.ndarray, b: np.ndarray) -> None:
    table = np.zeros((6, 6))
    np.add.at(table, (a, b), 1)
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_draws_are_independent():
    """Between positions, between requests, and between requests of neighbouring seeds."""
    n = 30_000
    flat = jnp.zeros((n, 6), jnp.float32)
    position = jnp.arange(n, dtype=jnp.int32)
    params = oracle.make_params(n, 6)

    def draws(key: jax.Array) -> np.ndarray:
        data = jnp.broadcast_to(jax.random.key_data(key), (n, 2))
        return np.asarray(jit_sample(flat, jnp.zeros((n, 6), jnp.uint8), data, position, params)[0])

    key = jax.random.key(15)
    first, second = draws(jax.random.fold_in(key, 0)), draws(jax.random.fold_in(key, 1))
    check_independent(first[:-1], first[1:])
    check_independent(first[:-2], first[2:])
    check_independent(first, second)
    check_independent(draws(key), draws(jax.random.key(16)))


def test_agrees_with_transformers():
    torch = pytest.importorskip("torch")
    logits_process = pytest.importorskip("transformers.generation.logits_process")
    batch, vocab = 16, 300
    logits, _, _, _ = inputs(16, batch, vocab)
    history = np.random.default_rng(17).integers(0, vocab, (batch, 60))
    seen = np.zeros((batch, vocab), np.uint8)
    np.put_along_axis(seen, history, 1, axis=1)
    ids = torch.tensor(history)

    stages = {
        "repetition_penalty": (1.3, logits_process.RepetitionPenaltyLogitsProcessor),
        "temperature": (0.7, logits_process.TemperatureLogitsWarper),
        "top_k": (40, logits_process.TopKLogitsWarper),
        "top_p": (0.85, logits_process.TopPLogitsWarper),
        "min_p": (0.02, logits_process.MinPLogitsWarper),
    }
    options: dict = {}
    theirs = torch.tensor(np.asarray(logits))
    for name, (value, processor) in stages.items():
        options[name] = value
        theirs = processor(value)(ids, theirs)
        params = oracle.make_params(batch, vocab, **options)
        ours = jax.vmap(_filtered)(jax.vmap(_adjusted)(logits, jnp.asarray(seen), params), params)
        np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs.numpy()), err_msg=name)
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6, err_msg=name)
        # Each alone, too: its border must not be hidden by an earlier one.
        params = oracle.make_params(batch, vocab, **{name: value})
        ours = jax.vmap(_filtered)(jax.vmap(_adjusted)(logits, jnp.asarray(seen), params), params)
        alone = processor(value)(ids, torch.tensor(np.asarray(logits)))
        np.testing.assert_allclose(ours, alone.numpy(), rtol=1e-6, err_msg=name)


def test_operands_are_a_pytree_with_leading_batch():
    params = oracle.make_params(3, VOCAB, logit_bias=np.zeros(VOCAB))
    leaves = jax.tree.leaves(params)
    assert len(leaves) == len(dataclasses.fields(params))
    assert all(leaf.shape[0] == 3 for leaf in leaves)
