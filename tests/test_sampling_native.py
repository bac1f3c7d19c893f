"""The native sampler: the same tokens as the definition, whatever it is given."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sampling_oracle as oracle
from test_sampling import STATISTICS, check_frequencies, check_independent, inputs, jit_sample, keys

native = pytest.importorskip("jax_monokernel._native")


def available(isa: str) -> bool:
    try:
        run_native(*inputs(0, 1, 3), oracle.make_params(1, 3), isa=isa)
    except ValueError:
        return False
    return True


def run_native(logits, seen, key_data, position, params, *, isa=None, log_probs=True):
    options = {name: np.asarray(getattr(params, name)) for name in oracle.OFF}
    return native.sample_rows(
        logits=np.asarray(logits),
        seen=None if seen is None else np.asarray(seen),
        key_data=np.asarray(key_data),
        position=np.asarray(position),
        logit_bias=None if params.logit_bias is None else np.asarray(params.logit_bias),
        isa=isa,
        log_probs=log_probs,
        **options,
    )


def random_params(rng: np.random.Generator, batch: int, vocab: int, bias: bool):
    """Every option on in about half of the rows."""

    def some(values, off):
        return np.where(rng.random(batch) < 0.5, values, off)

    return oracle.make_params(
        batch,
        vocab,
        temperature=np.where(rng.random(batch) < 0.9, np.exp(rng.normal(size=batch) * 0.7), 0),
        top_k=some(np.minimum(np.exp(rng.random(batch) * np.log(vocab + 2)), 2**30), 0),
        top_p=some(1 - rng.random(batch) ** 2, 1),
        min_p=some(rng.random(batch) ** 3, 0),
        repetition_penalty=some(np.exp(rng.normal(size=batch) * 0.4), 1),
        presence_penalty=some(rng.normal(size=batch), 0),
        logit_bias=rng.normal(size=(batch, vocab)) if bias else None,
    )


def random_logits(rng: np.random.Generator, batch: int, vocab: int) -> np.ndarray:
    """Rows of several kinds: normal, nearly flat, flat, with ties, peaked, with holes, heavy-tailed, ordered."""
    kinds = [
        lambda: rng.normal(size=vocab) * 3,
        lambda: rng.normal(size=vocab) * 0.01 + 20,
        lambda: np.full(vocab, rng.normal()),
        lambda: rng.integers(-3, 4, vocab) / 2,
        lambda: np.where(rng.random(vocab) < 20 / vocab, 15.0, -10.0) + rng.normal(size=vocab),
        lambda: np.where(rng.random(vocab) < 0.6, [-np.inf, np.nan][rng.integers(2)], rng.normal(size=vocab) * 4),
        lambda: rng.standard_cauchy(vocab) * 10,
        lambda: np.sort(rng.normal(size=vocab)) * rng.choice([-5, 5]),
    ]
    return np.stack([kinds[i % len(kinds)]() for i in range(batch)]).astype(np.float32)


def random_case(seed: int, batch: int, vocab: int):
    rng = np.random.default_rng(seed)
    seen = (rng.integers(0, 4, (batch, vocab)) * (rng.random((batch, vocab)) < 0.2)).astype(np.uint8)
    position = rng.integers(0, 2**31 - 1, batch).astype(np.int32)
    params = random_params(rng, batch, vocab, bias=bool(seed % 2))
    return random_logits(rng, batch, vocab), seen, keys(seed, batch), position, params


def check_against_definition(logits, seen, key_data, position, params) -> None:
    """Tokens are equal, but for the very few rows (none in most runs) where f32 rounding decides between two."""
    tokens, log_probs = run_native(logits, seen, key_data, position, params)
    want_tokens, want_log_probs = map(np.asarray, jit_sample(logits, seen, key_data, position, params))
    assert np.all((tokens >= 0) & (tokens < logits.shape[1]))
    different = np.flatnonzero(tokens != want_tokens)
    assert len(different) <= 1 + len(tokens) // 1000
    for i in different:
        noise = oracle.noise(key_data, position, logits.shape[1])[i]
        assert not oracle.choose(logits[i], seen[i], noise, oracle.row_params(params, i)).clear
    same = tokens == want_tokens
    np.testing.assert_allclose(log_probs[same], want_log_probs[same], rtol=1e-5, atol=1e-5)


# Around the block (256), group (64) and vector (16) sizes, and odd ones.
@pytest.mark.parametrize("vocab", [1, 2, 15, 17, 63, 65, 255, 256, 257, 1000])
def test_tokens_equal_the_definition(vocab):
    for seed in (2, 3):
        check_against_definition(*random_case(seed, 512, vocab))


@pytest.mark.parametrize(("vocab", "batch"), [(5003, 128), (49_152, 32), (151_936, 16)])
def test_tokens_equal_the_definition_for_large_vocabularies(vocab, batch):
    check_against_definition(*random_case(4, batch, vocab))


@pytest.mark.parametrize("isa", ["base", "avx2", "avx512"])
def test_every_instruction_set_gives_the_same_bits(isa):
    if not available(isa):
        pytest.skip(f"this machine cannot run {isa}")
    for vocab in (17, 1000, 20_011):
        case = random_case(5, 64, vocab)
        want, got = run_native(*case), run_native(*case, isa=isa)
        np.testing.assert_array_equal(got[0], want[0])
        np.testing.assert_array_equal(got[1], want[1])


def test_calls_repeat_exactly():
    case = random_case(6, 64, 3001)
    first = run_native(*case)
    for _ in range(3):
        again = run_native(*case)
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("position", [0, 1, 77, 2**31 - 2])
def test_bits_are_those_of_jax_random(position):
    key = jax.random.key(7)
    with jax.threefry_partitionable(True):
        want = jax.random.bits(jax.random.fold_in(key, position), (1001,), "uint32")
    np.testing.assert_array_equal(native.sample_bits(np.asarray(jax.random.key_data(key)), position, 1001), want)


STRANGE = [np.nan, np.inf, -np.inf, 0.0, -0.0, -1.0, 1e-45, 1e-38, 1e-30, 1e-6, 0.5, 1.0, 2.0, 1e30, 3.4e38]


def test_strange_options_never_matter_more_than_in_the_definition():
    rng = np.random.default_rng(8)
    batch, vocab = 512, 65
    logits, seen, key_data, position, _ = random_case(9, batch, vocab)
    logits[rng.random(logits.shape) < 0.01] = np.inf
    floats = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty")
    options = {name: np.where(rng.random(batch) < 0.4, rng.choice(STRANGE, batch), oracle.OFF[name]) for name in floats}
    options["top_k"] = rng.choice([-(2**31), -1, 0, 1, vocab - 1, vocab, vocab + 1, 2**31 - 1], batch)
    bias = rng.choice([*STRANGE, *[0.0] * 50], (batch, vocab))
    params = oracle.make_params(batch, vocab, logit_bias=bias, **options)
    tokens, _ = run_native(logits, seen, key_data, position, params)
    want, _ = jit_sample(logits, seen, key_data, position, params)
    np.testing.assert_array_equal(tokens, want)


def test_nothing_to_choose_from():
    logits = np.array([[np.nan] * 300, [-np.inf] * 300, [-np.inf, np.nan] * 150], np.float32)
    for temperature in (0, 1):
        params = oracle.make_params(3, 300, temperature=temperature, top_k=2, top_p=0.5, min_p=0.1)
        tokens, log_probs = run_native(logits, None, keys(0, 3), np.zeros(3, np.int32), params)
        np.testing.assert_array_equal(tokens, 0)
        np.testing.assert_array_equal(log_probs, -np.inf)


def test_everything_banned():
    logits, seen, key_data, position, _ = random_case(13, 64, 300)
    params = oracle.make_params(64, 300, temperature=np.resize([0, 1], 64), logit_bias=-np.inf)
    got, want = (
        run_native(logits, seen, key_data, position, params),
        jit_sample(logits, seen, key_data, position, params),
    )
    np.testing.assert_array_equal(got[0], 0)
    np.testing.assert_array_equal(want[0], 0)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5, atol=1e-5)


def test_seen_may_be_left_out():
    logits, seen, key_data, position, params = random_case(10, 64, 300)
    got, want = (run_native(logits, mask, key_data, position, params) for mask in (None, np.zeros_like(seen)))
    np.testing.assert_array_equal(got[0], want[0])


def test_log_probs_are_computed_only_when_asked():
    case = random_case(11, 64, 300)
    tokens, log_probs = run_native(*case, log_probs=False)
    np.testing.assert_array_equal(tokens, run_native(*case)[0])
    np.testing.assert_array_equal(log_probs, 0)


def test_log_probs_of_far_apart_logits():
    """A maximum that comes late must rescale what was summed before."""
    logits = np.linspace(-500, 500, 4099, dtype=np.float32)[None]
    for row in (logits, logits[:, ::-1].copy()):
        params = oracle.make_params(1, 4099, temperature=300.0)
        tokens, log_probs = run_native(row, None, keys(1, 1), np.zeros(1, np.int32), params)
        want = jax.nn.log_softmax(jnp.asarray(row))[0, tokens[0]]
        np.testing.assert_allclose(log_probs[0], want, rtol=1e-6)


@pytest.mark.parametrize("options", STATISTICS.values(), ids=STATISTICS.keys())
def test_frequencies(options):
    """Chi-squared test of 100,000 draws at different positions of one request."""
    n, vocab = 100_000, 300
    logits, seen, key_data, _ = inputs(18, 1, vocab, scale=1.5)
    params = oracle.make_params(n, vocab, **options)
    many = [np.broadcast_to(a, (n, *a.shape[1:])).copy() for a in (logits, seen, key_data)]
    tokens, _ = run_native(*many, np.arange(n, dtype=np.int32), params, log_probs=False)
    p = oracle.probabilities(np.asarray(logits)[0], np.asarray(seen)[0], oracle.row_params(params, 0))
    check_frequencies(tokens, p)


def test_draws_are_independent():
    n = 100_000

    def draws(key: jax.Array) -> np.ndarray:
        data = np.broadcast_to(jax.random.key_data(key), (n, 2)).copy()
        params = oracle.make_params(n, 6)
        return run_native(np.zeros((n, 6), np.float32), None, data, np.arange(n, dtype=np.int32), params)[0]

    key = jax.random.key(19)
    first, second = draws(jax.random.fold_in(key, 0)), draws(jax.random.fold_in(key, 1))
    check_independent(first[:-1], first[1:])
    check_independent(first, second)
    check_independent(draws(key), draws(jax.random.key(20)))


def test_bad_arrays_are_refused():
    logits, seen, key_data, position, params = random_case(12, 4, 30)
    call = functools.partial(run_native, params=params)
    with pytest.raises(ValueError, match=r"seen has another shape than the expected \(4, 30, \)"):
        call(logits, seen[:, :-1].copy(), key_data, position)
    with pytest.raises(ValueError, match="position has another shape"):
        call(logits, seen, key_data, position[:-1])
    with pytest.raises(TypeError):
        call(logits.astype(np.float64), seen, key_data, position)
    with pytest.raises(ValueError, match=r"logits must be \[batch, vocab\]"):
        call(logits[0], seen, key_data, position)
    with pytest.raises(ValueError, match="no instruction set"):
        call(logits, seen, key_data, position, isa="avx9000")
