"""Generation options: what they accept, what they refuse, and the operands that they become."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_monokernel import GenerationConfig, SamplingParams, sample, sampling_params
from jax_monokernel.sampling import check_sampling_params

BATCH, VOCAB = 3, 50


def operands(**options) -> SamplingParams:
    return sampling_params(GenerationConfig(**options), batch=BATCH, vocab_size=VOCAB)


def test_defaults_are_greedy_and_off():
    params = operands()
    assert params.logit_bias is None
    for name, value in [("temperature", 0), ("top_k", 0), ("top_p", 1), ("min_p", 0), ("presence_penalty", 0)]:
        np.testing.assert_array_equal(getattr(params, name), [value] * BATCH)
    np.testing.assert_array_equal(params.repetition_penalty, 1)
    np.testing.assert_array_equal(params.eos_token_id, -1)


def test_scalars_and_rows():
    params = operands(
        do_sample=True,
        temperature=[0.5, 0, 2],
        top_k=np.array([1, 2, 3]),
        top_p=jnp.float32(0.25),
        min_p=np.float64(0.125),
        repetition_penalty=(1, 2, 3),
        presence_penalty=-1,
        max_new_tokens=[7, 0, 9],
    )
    check_sampling_params(params, batch=BATCH, vocab_size=VOCAB)
    np.testing.assert_array_equal(params.temperature, np.float32([0.5, 0, 2]))
    np.testing.assert_array_equal(params.top_k, [1, 2, 3])
    np.testing.assert_array_equal(params.top_p, np.float32([0.25] * BATCH))
    np.testing.assert_array_equal(params.min_p, np.float32([0.125] * BATCH))
    np.testing.assert_array_equal(params.repetition_penalty, [1, 2, 3])
    np.testing.assert_array_equal(params.presence_penalty, [-1] * BATCH)
    np.testing.assert_array_equal(params.max_new_tokens, [7, 0, 9])


def test_do_sample_false_is_temperature_0():
    np.testing.assert_array_equal(operands(temperature=0.7).temperature, 0)
    rows = operands(do_sample=[True, False, True], temperature=0.5).temperature
    np.testing.assert_array_equal(rows, np.float32([0.5, 0, 0.5]))


def test_max_new_tokens_can_be_given_at_the_call():
    config = GenerationConfig(max_new_tokens=5)
    params = sampling_params(config, batch=BATCH, vocab_size=VOCAB, max_new_tokens=[1, 2, 3])
    np.testing.assert_array_equal(params.max_new_tokens, [1, 2, 3])
    with pytest.raises(ValueError, match="max_new_tokens is -1"):
        sampling_params(config, batch=BATCH, vocab_size=VOCAB, max_new_tokens=-1)


@pytest.mark.parametrize(
    ("ids", "row"),
    [
        (None, [-1, -1, -1, -1]),
        (7, [7, -1, -1, -1]),
        ([7, 3], [7, 3, -1, -1]),
        (np.array([1, 2, 3, 4, 5]), [1, 2, 3, 4, 5, -1, -1, -1]),
        ([], [-1, -1, -1, -1]),
    ],
)
def test_eos_ids(ids, row):
    np.testing.assert_array_equal(operands(eos_token_id=ids).eos_token_id, [row] * BATCH)


def test_logit_bias_forms():
    mapping = np.asarray(operands(logit_bias={4: 2.5, np.int64(9): -np.inf}).logit_bias)
    assert mapping.shape == (BATCH, VOCAB)
    np.testing.assert_array_equal(mapping[:, 4], 2.5)
    np.testing.assert_array_equal(mapping[:, 9], -np.inf)
    assert np.count_nonzero(mapping) == 2 * BATCH
    row = np.random.default_rng(0).normal(size=VOCAB)
    np.testing.assert_array_equal(operands(logit_bias=row).logit_bias, np.tile(np.float32(row), (BATCH, 1)))
    matrix = jnp.asarray(np.random.default_rng(1).normal(size=(BATCH, VOCAB)), jnp.float32)
    np.testing.assert_array_equal(operands(logit_bias=matrix).logit_bias, matrix)


def test_the_config_keeps_its_own_bias():
    row = np.zeros(VOCAB)
    config = GenerationConfig(logit_bias=row)
    row[:] = 5
    assert not np.any(sampling_params(config, batch=1, vocab_size=VOCAB).logit_bias)


def test_frozen_and_replaceable():
    config = GenerationConfig(top_k=5, eos_token_id=[1, 2], logit_bias={3: 1.0})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.top_k = 6
    changed = dataclasses.replace(config, top_k=6)
    assert changed == GenerationConfig(top_k=6, eos_token_id=(1, 2), logit_bias={3: 1.0})
    assert changed != config


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": -0.1}, ValueError, r"temperature is -0.1; expected a finite number of at least 0"),
        ({"temperature": float("nan")}, ValueError, "temperature is nan"),
        ({"temperature": float("inf")}, ValueError, "temperature is inf"),
        ({"temperature": 1e39}, ValueError, "temperature is 1e"),
        ({"temperature": 10**400}, ValueError, "temperature is 1000"),
        ({"temperature": "0.5"}, TypeError, "temperature is '0.5'"),
        ({"temperature": None}, TypeError, "temperature is None"),
        ({"temperature": [0.5, -1, 0.5]}, ValueError, r"temperature\[1\] is -1"),
        ({"temperature": [[0.5]]}, TypeError, r"temperature\[0\] is \[0.5\]"),
        ({"temperature": True}, TypeError, "temperature is True"),
        ({"temperature": 1j}, TypeError, "temperature is 1j"),
        ({"top_k": -1}, ValueError, "top_k is -1; expected an integer from 0"),
        ({"top_k": 2.0}, TypeError, "top_k is 2.0"),
        ({"top_k": 2**31}, ValueError, "top_k is 2147483648"),
        ({"top_p": 0}, ValueError, "top_p is 0; expected a number above 0 and at most 1"),
        ({"top_p": 1.01}, ValueError, "top_p is 1.01"),
        ({"top_p": float("nan")}, ValueError, "top_p is nan"),
        ({"min_p": -0.01}, ValueError, "min_p is -0.01"),
        ({"min_p": 1.5}, ValueError, "min_p is 1.5"),
        ({"repetition_penalty": 0}, ValueError, "repetition_penalty is 0"),
        ({"repetition_penalty": -1.0}, ValueError, "repetition_penalty is -1.0"),
        ({"presence_penalty": float("inf")}, ValueError, "presence_penalty is inf"),
        ({"max_new_tokens": -1}, ValueError, "max_new_tokens is -1"),
        ({"max_new_tokens": 1.5}, TypeError, "max_new_tokens is 1.5"),
        ({"do_sample": 1}, TypeError, "do_sample is 1; expected True or False"),
        ({"eos_token_id": -1}, ValueError, "eos_token_id is -1"),
        ({"eos_token_id": "</s>"}, TypeError, "eos_token_id is '</s>'"),
        ({"eos_token_id": [1, 2.5]}, TypeError, "eos_token_id is 2.5"),
        ({"logit_bias": {-1: 0.5}}, ValueError, "logit_bias's key is -1"),
        ({"logit_bias": {"a": 0.5}}, TypeError, "logit_bias's key is 'a'"),
        ({"logit_bias": {1: float("nan")}}, ValueError, r"logit_bias\[1\] is nan"),
        ({"logit_bias": {1: float("inf")}}, ValueError, r"logit_bias\[1\] is inf"),
        ({"logit_bias": 3.0}, ValueError, r"logit_bias has shape \[\]"),
        ({"logit_bias": "abc"}, TypeError, "logit_bias is neither a mapping"),
        ({"logit_bias": [[1.0], [1.0, 2.0]]}, TypeError, "logit_bias is neither a mapping"),
        ({"logit_bias": [0.0, float("nan")]}, ValueError, "logit_bias has NaN"),
        ({"logit_bias": [0.0, 1e300]}, ValueError, "logit_bias has NaN or"),
    ],
    ids=str,
)
def test_bad_values_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        GenerationConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": [0.5, 0.5]}, "temperature has 2 values; expected one, or one for each of the 3 requests"),
        ({"do_sample": [True]}, "do_sample has 1 values"),
        ({"top_k": []}, "top_k has 0 values"),
        ({"eos_token_id": [3, VOCAB]}, r"eos_token_id 50 is outside the vocabulary of 50 tokens \(ids 0 to 49\)"),
        ({"logit_bias": {VOCAB: 1.0}}, "logit_bias's key 50 is outside the vocabulary"),
        ({"logit_bias": np.zeros(VOCAB + 1)}, r"logit_bias has shape \[51\]"),
        ({"logit_bias": np.zeros((BATCH + 1, VOCAB))}, r"logit_bias has shape \[4, 50\]"),
    ],
    ids=str,
)
def test_what_does_not_fit_the_batch_or_vocabulary_is_refused(options, message):
    config = GenerationConfig(**options)
    with pytest.raises(ValueError, match=message):
        sampling_params(config, batch=BATCH, vocab_size=VOCAB)


def test_traced_values_are_refused_with_advice():
    with pytest.raises(TypeError, match="build SamplingParams from them"):
        jax.jit(lambda t: GenerationConfig(temperature=t).temperature)(0.5)
    with pytest.raises(TypeError, match="build SamplingParams from them"):
        jax.jit(lambda b: GenerationConfig(logit_bias=b).top_k)(jnp.zeros(VOCAB))


def test_every_choice_of_options_compiles_once():
    traces = 0

    @jax.jit
    def choose(logits, params):
        nonlocal traces
        traces += 1
        seen, key_data = jnp.zeros((BATCH, VOCAB), jnp.uint8), jnp.ones((BATCH, 2), jnp.uint32)
        return sample(logits, seen=seen, key_data=key_data, position=jnp.arange(BATCH), params=params)[0]

    logits = jnp.asarray(np.random.default_rng(2).normal(size=(BATCH, VOCAB)), jnp.float32)
    for options in ({}, {"eos_token_id": [1, 2]}, {"do_sample": True, "top_p": 0.5}, {"max_new_tokens": [1, 2, 3]}):
        choose(logits, operands(**options))
    assert traces == 1


@pytest.mark.parametrize(
    ("name", "leaf", "expected"),
    [
        ("temperature", jnp.zeros(BATCH + 1), r"sampling.temperature is float32\[4\]; expected float32\[3\]"),
        ("top_k", jnp.zeros(BATCH), r"sampling.top_k is float32\[3\]; expected int32\[3\]"),
        ("eos_token_id", jnp.zeros(BATCH, jnp.int32), r"sampling.eos_token_id is int32\[3\]; expected int32\[3, n\]"),
        ("logit_bias", jnp.zeros((BATCH, VOCAB - 1)), r"expected float32\[3, 50\]"),
        ("min_p", None, "sampling.min_p is None"),
    ],
)
def test_operands_are_checked(name, leaf, expected):
    params = dataclasses.replace(operands(), **{name: leaf})
    with pytest.raises(ValueError, match=expected):
        check_sampling_params(params, batch=BATCH, vocab_size=VOCAB)
