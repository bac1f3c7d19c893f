"""How the next token is chosen: the options, their operand form, and the definition that every backend follows.

docs/sampling.md has the formulas, the order in which they apply, and what happens to values that make no sense.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry_2x32

from jax_monokernel.generation_config import OPTIONS, GenerationConfig

__all__ = ["GenerationConfig", "SamplingParams", "check_sampling_params", "gumbel_noise", "sample", "sampling_params"]

# Below this a temperature counts as 0. Logits 1e-5 apart then differ by a factor of e^10 in probability.
MIN_TEMPERATURE = 1e-6
_F32_MAX = float(np.finfo(np.float32).max)
_F32_TINY = float(np.finfo(np.float32).tiny)
# The width of SamplingParams.eos_token_id is a multiple of this, so that adding an id does not recompile.
_EOS_SLOTS = 4


@functools.partial(jax.tree_util.register_dataclass)
@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling options as operands: changing a value never recompiles. Every leaf has the batch as its first axis.

    Values out of range are not errors here (they may be computed on a device): docs/sampling.md says what they mean.
    """

    temperature: jax.Array  # f32 [batch], 0: greedy
    top_k: jax.Array  # int32 [batch], 0: off
    top_p: jax.Array  # f32 [batch], 1: off
    min_p: jax.Array  # f32 [batch], 0: off
    repetition_penalty: jax.Array  # f32 [batch], 1: off
    presence_penalty: jax.Array  # f32 [batch], 0: off
    max_new_tokens: jax.Array  # int32 [batch]
    eos_token_id: jax.Array  # int32 [batch, n], -1: unused slot
    logit_bias: jax.Array | None = None  # f32 [batch, vocab], added to the logits


def sampling_params(
    config: GenerationConfig, *, batch: int, vocab_size: int, max_new_tokens: int | Sequence[int] | None = None
) -> SamplingParams:
    """The operands that `config` means.

    Args:
      batch: number of requests; options given per request must have this length.
      vocab_size: width of the logits; token ids must be below it.
      max_new_tokens: used in place of the config's where given.

    Raises:
      ValueError: a per-request option of another length, an id outside the vocabulary, a bias of another shape, or
        max_new_tokens out of range (TypeError: not an integer).
    """
    if max_new_tokens is not None:
        config = dataclasses.replace(config, max_new_tokens=max_new_tokens)
    rows = {name: _per_row(name, getattr(config, name), batch) for name in OPTIONS}
    do_sample = rows.pop("do_sample")
    rows["temperature"] = np.where(do_sample, rows["temperature"], np.float32(0))

    # GenerationConfig keeps a tuple, whatever it was given.
    eos = list(cast(tuple[int, ...], config.eos_token_id or ()))
    for token in eos:
        _check_in_vocab("eos_token_id", token, vocab_size)
    slots = max(1, math.ceil(len(eos) / _EOS_SLOTS)) * _EOS_SLOTS
    eos_row = np.array(eos + [-1] * (slots - len(eos)), np.int32)
    bias = _dense_bias(config.logit_bias, batch, vocab_size)
    return SamplingParams(
        **{name: jnp.asarray(row) for name, row in rows.items()},
        eos_token_id=jnp.asarray(np.tile(eos_row, (batch, 1))),
        logit_bias=None if bias is None else jnp.asarray(bias),
    )


def sample(
    logits: jax.Array, *, seen: jax.Array, key_data: jax.Array, position: jax.Array, params: SamplingParams
) -> tuple[jax.Array, jax.Array]:
    """Chooses one token per row: the definition, for every backend.

    The random numbers depend on the row's key, its position and the token id only: not on the batch, on other rows, on
    earlier calls, or on JAX's PRNG settings.

    Args:
      logits: f32 [batch, vocab]. NaN counts as -inf, +inf as the largest finite number.
      seen: uint8 [batch, vocab], not 0: in the prompt or generated; bit 1: generated.
      key_data: uint32 [batch, 2], threefry keys.
      position: int32 [batch], index of the last token in the sequence.
      params: see there; max_new_tokens and eos_token_id are not used here.

    Returns:
      The tokens, int32 [batch], and log_softmax(logits) at them, f32 [batch]: before penalties, bias, temperature and
      filters. Where every logit is -inf the token is 0 and its log-probability -inf.
    """
    params = _in_range(params)
    greedy = params.temperature == 0
    z = _clean(jax.vmap(_adjusted)(logits.astype(jnp.float32), seen, params))

    def scores() -> jax.Array:
        # The filters need a sort, which costs more than everything else here.
        filtering = ~greedy & ((params.top_k > 0) | (params.top_p < 1) | (params.min_p > 0))
        kept = jax.lax.cond(jnp.any(filtering), lambda: jax.vmap(_filtered)(z, params), lambda: z)
        noise = jax.vmap(gumbel_noise, (0, 0, None))(key_data, position, z.shape[1])
        return jnp.where(greedy[:, None], z, kept + noise)

    token = jnp.argmax(jax.lax.cond(jnp.all(greedy), lambda: z, scores), axis=-1).astype(jnp.int32)
    return token, _log_prob(_clean(logits.astype(jnp.float32)), token)


def gumbel_noise(key_data: jax.Array, position: jax.Array, vocab_size: int) -> jax.Array:
    """f32 [vocab_size]: -log(-log(u)), u uniform on the midpoints of 2^23 equal parts of (0, 1).

    The bits are jax.random.bits(fold_in(key, position), (vocab_size,)) as jax_threefry_partitionable=True gives them,
    whatever the flag is.

    Args:
      key_data: uint32 [2].
      position: int32 scalar.
    """
    step_key = threefry_2x32(key_data, jnp.stack([jnp.uint32(0), position.astype(jnp.uint32)]))
    counters = jnp.arange(vocab_size, dtype=jnp.uint32)
    # threefry_2x32 takes the first words of all blocks, then their second words.
    words = threefry_2x32(step_key, jnp.concatenate([jnp.zeros_like(counters), counters])).reshape(2, vocab_size)
    u = ((words[0] ^ words[1]) >> 9).astype(jnp.float32)
    u = (u + 0.5) * jnp.float32(2**-23)
    return -jnp.log(-jnp.log(u))


def check_sampling_params(params: SamplingParams, *, batch: int, vocab_size: int) -> None:
    """Raises ValueError naming the first leaf of the wrong shape or dtype."""
    for field in dataclasses.fields(SamplingParams):
        name, leaf = field.name, getattr(params, field.name)
        if name == "logit_bias" and leaf is None:
            continue
        dtype = "int32" if name in ("top_k", "max_new_tokens", "eos_token_id") else "float32"
        tails: dict[str, list[Any]] = {"eos_token_id": ["n"], "logit_bias": [vocab_size]}  # n: any number
        tail = tails.get(name, [])
        shape = list(getattr(leaf, "shape", ()))
        fits = hasattr(leaf, "dtype") and leaf.dtype == dtype and shape[:1] == [batch] and len(shape) == 1 + len(tail)
        if not fits or (name == "logit_bias" and shape[1:] != tail):
            have = f"{leaf.dtype}{shape}" if hasattr(leaf, "dtype") else repr(leaf)
            want = f"{dtype}[{', '.join(str(size) for size in [batch, *tail])}]"
            raise ValueError(
                f"sampling.{name} is {have}; expected {want}; sampling_params(config, ...) builds all of them"
            )


def _in_range(params: SamplingParams) -> SamplingParams:
    """Gives every value a meaning. Comparisons with NaN are False, so each test is written for what is accepted.

    Subnormal numbers count as 0, since XLA may treat them so.
    """
    temperature, r = params.temperature, params.repetition_penalty
    return dataclasses.replace(
        params,
        temperature=jnp.where(temperature >= MIN_TEMPERATURE, temperature, 0.0),
        top_p=jnp.where(params.top_p < 1, jnp.maximum(params.top_p, _F32_TINY), 1.0),
        min_p=jnp.where(params.min_p >= _F32_TINY, jnp.minimum(params.min_p, 1.0), 0.0),
        repetition_penalty=jnp.where((r >= _F32_TINY) & (r < jnp.inf), r, 1.0),
        presence_penalty=jnp.nan_to_num(params.presence_penalty, nan=0.0, posinf=jnp.inf, neginf=-jnp.inf),
    )


def _divide(z: jax.Array, by: jax.Array) -> jax.Array:
    """z / by, for a scalar `by`. XLA would multiply by 1 / by, which rounds differently; the barrier prevents that."""
    return z / jax.lax.optimization_barrier(jnp.broadcast_to(by, z.shape))


def _adjusted(z: jax.Array, seen: jax.Array, params: SamplingParams) -> jax.Array:
    """One row's logits after penalties, bias and temperature."""
    r = params.repetition_penalty
    z = jnp.where(seen != 0, jnp.where(z > 0, _divide(z, r), z * r), z)
    z = jnp.where(seen & 2 != 0, z - params.presence_penalty, z)
    if params.logit_bias is not None:
        z = z + params.logit_bias
    return _divide(z, jnp.where(params.temperature == 0, 1.0, params.temperature))


def _clean(z: jax.Array) -> jax.Array:
    return jnp.where(jnp.isnan(z), -jnp.inf, jnp.minimum(z, _F32_MAX))


def _filtered(z: jax.Array, params: SamplingParams) -> jax.Array:
    """One row with -inf for the tokens that top-k, then top-p, then min-p remove."""
    ordered = jnp.sort(z, descending=True)
    best = ordered[0]
    k = jnp.where(params.top_k > 0, jnp.minimum(params.top_k, z.shape[0]), z.shape[0])
    kth = ordered[k - 1]

    # Not divided by their sum: the best token's is 1.
    mass = jnp.where(ordered >= kth, jnp.exp(ordered - best), 0.0)
    running = jnp.cumsum(mass)
    above = jnp.concatenate([jnp.zeros(1), running[:-1]])
    # Equal logits: the first of them in order decides for all, as only tokens strictly above it are summed.
    nucleus = jnp.min(jnp.where(above < params.top_p * running[-1], ordered, jnp.inf))
    nucleus = jnp.where(params.top_p < 1, nucleus, -jnp.inf)

    keep = (z >= kth) & (z >= nucleus) & (z - best >= jnp.log(params.min_p))
    return jnp.where(keep, z, -jnp.inf)


def _log_prob(z: jax.Array, token: jax.Array) -> jax.Array:
    """log_softmax(z) at one token per row; -inf, not NaN, where everything is -inf."""
    chosen = jnp.take_along_axis(z, token[:, None], axis=-1)[:, 0]
    best = jnp.max(z, axis=-1)
    best = jnp.where(jnp.isneginf(best), 0.0, best)
    total = jnp.sum(jnp.exp(z - best[:, None]), axis=-1)
    return jnp.where(jnp.isneginf(chosen), -jnp.inf, chosen - best - jnp.log(total))


def _check_in_vocab(name: str, token: int, vocab_size: int) -> None:
    if not 0 <= token < vocab_size:
        raise ValueError(f"{name} {token} is outside the vocabulary of {vocab_size} tokens (ids 0 to {vocab_size - 1})")


def _per_row(name: str, value: Any, batch: int) -> np.ndarray:
    """[batch], from one value or one per request."""
    dtype = {int: np.int32, float: np.float32, bool: np.bool_}[OPTIONS[name][0]]
    if isinstance(value, tuple) and len(value) != batch:
        raise ValueError(f"{name} has {len(value)} values; expected one, or one for each of the {batch} requests")
    return np.array(np.broadcast_to(np.asarray(value, dtype), (batch,)))


def _dense_bias(bias: Any, batch: int, vocab_size: int) -> np.ndarray | None:
    """f32 [batch, vocab], from what _checked_bias returns."""
    if bias is None:
        return None
    if isinstance(bias, Mapping):
        row = np.zeros(vocab_size, np.float32)
        for token, value in bias.items():
            _check_in_vocab("logit_bias's key", token, vocab_size)
            row[token] = value
        bias = row
    if bias.shape not in ((vocab_size,), (batch, vocab_size)):
        raise ValueError(
            f"logit_bias has shape {list(bias.shape)}; expected [vocab] = {[vocab_size]} or [batch, vocab] = "
            f"{[batch, vocab_size]}"
        )
    return np.array(np.broadcast_to(bias, (batch, vocab_size)))
