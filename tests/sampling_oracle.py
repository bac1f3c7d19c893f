"""Sampling in float64 NumPy, written from docs/sampling.md alone: sorts, sums and logarithms done the plain way."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jax_monokernel import SamplingParams

OFF = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
}


@dataclasses.dataclass
class Choice:
    """What the oracle would choose, and whether rounding to f32 could make another choice right as well."""

    token: int
    clear: bool
    log_prob: float


def make_params(batch: int, vocab: int, **rows) -> SamplingParams:
    """SamplingParams from scalars or rows; options that are not given are off."""
    values = OFF | rows
    bias = values.pop("logit_bias", None)
    leaves = {
        name: jnp.asarray(np.broadcast_to(np.asarray(v, np.int32 if name == "top_k" else np.float32), (batch,)))
        for name, v in values.items()
    }
    return SamplingParams(
        **leaves,
        max_new_tokens=jnp.zeros(batch, jnp.int32),
        eos_token_id=jnp.zeros((batch, 0), jnp.int32),
        logit_bias=None if bias is None else jnp.asarray(np.broadcast_to(np.float32(bias), (batch, vocab))),
    )


def row_params(params: SamplingParams, row: int) -> dict:
    """One row of every option, as Python numbers (f32 values, exactly) and the bias as f64."""
    out = {name: getattr(params, name)[row].item() for name in OFF}
    return out | {"logit_bias": None if params.logit_bias is None else np.float64(params.logit_bias[row])}


def noise(key_data: jax.Array, position: jax.Array, vocab: int) -> np.ndarray:
    """f64 [batch, vocab] standard Gumbel noise, from jax.random itself."""
    with jax.threefry_partitionable(True):
        bits = np.asarray(_bits(key_data, position, vocab))
    return -np.log(-np.log(((bits >> 9) + 0.5) * 2.0**-23))


@functools.partial(jax.jit, static_argnums=2)
def _bits(key_data: jax.Array, position: jax.Array, vocab: int) -> jax.Array:
    keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(key_data, impl="threefry2x32"), position)
    return jax.vmap(lambda key: jax.random.bits(key, (vocab,), "uint32"))(keys)


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - np.max(z))
    return e / np.sum(e)


def clean(z: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(z), -np.inf, np.minimum(z, np.finfo(np.float32).max))


def process(logits: np.ndarray, seen: np.ndarray, options: dict) -> np.ndarray:
    """f64 [vocab]: logits after penalties, bias and temperature."""
    z = np.float64(logits)
    r = options["repetition_penalty"]
    z = np.where(seen != 0, np.where(z > 0, z / r, z * r), z)
    z = np.where(seen & 2, z - options["presence_penalty"], z)
    if options["logit_bias"] is not None:
        z = z + options["logit_bias"]
    return clean(z if options["temperature"] == 0 else z / options["temperature"])


def keep(z: np.ndarray, options: dict, slack: float = 0.0) -> np.ndarray:
    """bool [vocab]: tokens that the filters keep.

    `slack` moves every border by so much, to find what is near one; being exactly on it is no matter of rounding.
    """
    kept = np.ones(z.shape, bool)
    margin = slack * np.maximum(1.0, np.abs(np.maximum(z, -1e30)))  # not 0 * inf
    if options["top_k"] > 0:
        kth = np.sort(z)[::-1][min(options["top_k"], len(z)) - 1]
        kept &= (z + margin >= kth) | (z == kth)
    if options["top_p"] < 1:
        p = softmax(np.where(kept, z, -np.inf))
        order = np.argsort(-z, kind="stable")
        mass_before = np.concatenate([[0.0], np.cumsum(p[order])])[:-1]
        first_of_tie = np.searchsorted(-z[order], -z, side="left")
        kept &= (mass_before[first_of_tie] < options["top_p"] + slack) | (z == np.max(z))
    if options["min_p"] > 0:
        kept &= (z - np.max(z) + margin >= np.log(options["min_p"])) | (z == np.max(z))
    return kept


def probabilities(logits: np.ndarray, seen: np.ndarray, options: dict) -> np.ndarray:
    """f64 [vocab]: how often each token must be chosen."""
    z = process(logits, seen, options)
    return softmax(np.where(keep(z, options), z, -np.inf))


def choose(logits: np.ndarray, seen: np.ndarray, gumbel: np.ndarray, options: dict) -> Choice:
    """The token for one row, given its noise, f64 [vocab]."""
    z = process(logits, seen, options)
    raw = clean(np.float64(logits))
    if np.isneginf(np.max(z)):
        return Choice(0, True, log_prob_of(raw, 0))
    greedy = options["temperature"] == 0
    score = z if greedy else np.where(keep(z, options), z + gumbel, -np.inf)
    token = int(np.argmax(score))

    # Everything that could be the winner if borders and scores were off by f32 rounding.
    slack = 2e-5
    if not greedy:
        widest = np.where(keep(z, options, slack), z + gumbel, -np.inf)
        narrow = bool(keep(z, options, -slack)[token])
    else:
        widest, narrow = z, True
    margin = slack * max(1.0, abs(score[token]))
    rivals = np.flatnonzero(widest >= score[token] - margin)
    same = z[rivals] == z[token]  # exact ties, where no noise separates them, are the rule's to decide
    clear = narrow and (len(rivals) == 1 or (greedy and bool(np.all(same))))
    return Choice(token, clear, log_prob_of(raw, token))


def log_prob_of(raw: np.ndarray, token: int) -> float:
    return (
        -np.inf
        if np.isneginf(raw[token])
        else float(raw[token] - np.max(raw) - np.log(np.sum(np.exp(raw - np.max(raw)))))
    )
