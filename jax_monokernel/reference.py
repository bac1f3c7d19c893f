"""The definition of a decode, in plain JAX: what every backend must compute, on any platform that XLA knows."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_monokernel.attention import cache_bits, cache_values
from jax_monokernel.forward import forward_cached, logits
from jax_monokernel.mailbox import open_mail, post
from jax_monokernel.sampling import SamplingParams, sample
from jax_monokernel.spec import DecoderSpec
from jax_monokernel.state import FULL, RUNNING, STOPPED, DecodeResult, DecodeState, check_state
from jax_monokernel.weights import DecoderWeights


class _Loop(NamedTuple):
    step: jax.Array  # int32 scalar
    tokens: jax.Array
    lengths: jax.Array
    log_probs: jax.Array | None
    go: jax.Array | None  # bool scalar: whoever listens wants more; None: nobody listens
    state: DecodeState  # its caches as cache_bits


def decode_reference(
    spec: DecoderSpec,
    weights: DecoderWeights,
    state: DecodeState,
    params: SamplingParams,
    *,
    max_new_tokens: int,
    return_log_probs: bool = False,
    mailbox: jax.Array | None = None,
) -> DecodeResult:
    """Generates up to `max_new_tokens` tokens per row; works under jit and vmap.

    One step of a row that is RUNNING and has made fewer than params.max_new_tokens tokens in this call: if position has
    reached the cache's capacity, the row is FULL and makes no token. Else last_token goes through the model, its keys
    and values into slot `position`, and the token chosen after it is emitted and becomes last_token; if that is one of
    params.eos_token_id, the row has STOPPED. Other rows do nothing, and nothing of their state changes. The loop ends
    as soon as no row has anything left to do.

    Args:
      spec: the model.
      weights: its weights, as `weight_shapes(spec)` lists them.
      state: where each row stands; it is not changed, the result has the new one.
      params: sampling options, one per row.
      max_new_tokens: static width of the result, at least 1.
      return_log_probs: whether the result has log-probabilities: log-softmax of the raw logits at the chosen tokens.
      mailbox: int32 [batch, 2], where to leave each token as soon as it is known (`jax_monokernel.mailbox`), through a
        callback to Python for each step; the loop ends early when the reader says so.

    Raises:
      ValueError: max_new_tokens is below 1, or the state is another model's.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; expected at least 1")
    check_state(spec, state)
    batch, rows = state.batch, jnp.arange(state.batch)
    limit = jnp.minimum(params.max_new_tokens, max_new_tokens)

    def has_work(loop: _Loop) -> jax.Array:
        return (loop.state.status == RUNNING) & (loop.lengths < limit)

    def mark_full(loop: _Loop) -> _Loop:
        full = has_work(loop) & (loop.state.position >= loop.state.capacity)
        return loop._replace(state=dataclasses.replace(loop.state, status=jnp.where(full, FULL, loop.state.status)))

    def body(loop: _Loop) -> _Loop:
        old, active = loop.state, has_work(loop)
        x, k_cache, v_cache = forward_cached(
            spec,
            weights,
            old.k_cache,
            old.v_cache,
            old.last_token[:, None],
            old.position,
            active.astype(jnp.int32),
            old.position + 1,
        )
        token, log_prob = sample(
            logits(spec, weights, x[:, 0]),
            seen=old.seen,
            key_data=old.key_data,
            position=old.position,
            params=params,
        )
        go = loop.go
        if mailbox is not None and go is not None:
            go = post(mailbox, token, log_prob if return_log_probs else jnp.zeros(batch), active, go)
        stop = active & jnp.any(token[:, None] == params.eos_token_id, axis=1)
        # A row that works has worked in every step before, so its next token belongs in column `step`.
        column = loop.step
        log_probs = loop.log_probs
        if log_probs is not None:
            log_probs = log_probs.at[:, column].set(jnp.where(active, log_prob, 0.0))
        seen = old.seen.at[rows, token].set(old.seen[rows, token] | jnp.where(active, 2, 0).astype(jnp.uint8))
        state = DecodeState(
            k_cache=k_cache,
            v_cache=v_cache,
            position=old.position + active,
            last_token=jnp.where(active, token, old.last_token),
            key_data=old.key_data,
            status=jnp.where(stop, STOPPED, old.status),
            seen=seen,
        )
        return mark_full(
            _Loop(
                column + 1,
                loop.tokens.at[:, column].set(jnp.where(active, token, -1)),
                loop.lengths + active,
                log_probs,
                go,
                state,
            )
        )

    start = _Loop(
        step=jnp.int32(0),
        tokens=jnp.full((batch, max_new_tokens), -1, jnp.int32),
        lengths=jnp.zeros(batch, jnp.int32),
        log_probs=jnp.zeros((batch, max_new_tokens), jnp.float32) if return_log_probs else None,
        go=None if mailbox is None else open_mail(mailbox, steps=max_new_tokens),
        state=dataclasses.replace(state, k_cache=cache_bits(state.k_cache), v_cache=cache_bits(state.v_cache)),
    )

    def goes_on(loop: _Loop) -> jax.Array:
        work = jnp.any(has_work(loop))
        return work if loop.go is None else work & loop.go

    end = jax.lax.while_loop(goes_on, body, mark_full(start))
    k_cache, v_cache = (cache_values(spec, cache) for cache in (end.state.k_cache, end.state.v_cache))
    return DecodeResult(
        tokens=end.tokens,
        lengths=end.lengths,
        log_probs=end.log_probs,
        state=dataclasses.replace(end.state, k_cache=k_cache, v_cache=v_cache),
    )
