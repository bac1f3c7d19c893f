"""Prompts into the KV cache: ordinary JAX, compiled by XLA."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jax_monokernel.attention import cache_bits, cache_values
from jax_monokernel.forward import forward_cached
from jax_monokernel.spec import DecoderSpec
from jax_monokernel.state import FULL, RUNNING, STOPPED, DecodeState, check_state
from jax_monokernel.tape import Tape, check_layout
from jax_monokernel.weights import DecoderWeights, check_weights

# Prompt tokens that go through the model together. Longer chunks hold more activations at once and are hardly faster.
CHUNK = 512
_SMALLEST_BUCKET = 16


def bucket(n: int) -> int:
    """The padded length for n tokens: the next power of two, at least 16. Equal buckets share a compiled program.

    Padding costs time only up to CHUNK tokens: beyond, chunks that hold nothing but padding are not computed.
    """
    return max(_SMALLEST_BUCKET, 1 << (n - 1).bit_length()) if n > 0 else _SMALLEST_BUCKET


def prefill(
    spec: DecoderSpec,
    weights: DecoderWeights | Tape,
    tokens: jax.Array,
    lengths: jax.Array,
    state: DecodeState,
    *,
    chunk: int = CHUNK,
) -> DecodeState:
    """Adds a prompt to each row of a state, after what the row already holds.

    Afterwards the prompt's last token is the row's last_token and everything before it is in the cache, so that every
    new token is chosen by decode. A fresh row (`empty_state`) has nothing before its prompt. Any other row has a
    last_token whose keys and values are not in its cache yet: it is fed first, and the conversation goes on as if all
    of it had been one long prompt. A row is fresh while its position is 0 and its `seen` does not have its last_token.

    - A row with length 0 stays exactly as it is.
    - A row that had STOPPED runs again. A FULL one stays FULL and does not change.
    - A row that would have no room for a new token after its prompt becomes FULL and does not change otherwise.
    - Tokens generated so far count as prompt from now on: bit 1 of `seen` becomes bit 0.
    - Rope scalings that depend on the length (dynamic, longrope) go by the length with the whole prompt; keys that are
      in the cache already keep the rotation they have, as in Hugging Face's cached generation.

    Args:
      spec: the model.
      weights: its weights, as `weight_shapes(spec)` lists them. A tape stands for the weights it was packed from: its
        layers are unpacked one at a time.
      tokens: int32 [batch, width]; of row b the first lengths[b] are its prompt, the rest may be anything.
      lengths: int32 [batch], 0 to width.
      state: where each row stands.
      chunk: prompt tokens that go through the model together (static).

    Raises:
      TypeError: tokens or lengths that are no arrays.
      ValueError: weights of another spec, wrong shapes or dtypes; and, where the values are known (outside jit), token
        ids outside the vocabulary, lengths outside 0 to width, and prompts for which there is no room.
    """
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; expected at least 1")
    if isinstance(weights, Tape):
        check_layout(weights)
        if weights.spec != spec:
            raise ValueError("spec is not the one that the tape was packed for; pass tape.spec")
    else:
        check_weights(spec, weights)
    _check(spec, tokens, lengths, state)
    return _prefill(spec, weights, tokens, lengths, state, chunk)


def is_continued(state: DecodeState) -> jax.Array:
    """bool [batch]: rows whose last_token is a real one, still to be fed."""
    known = jnp.take_along_axis(state.seen, state.last_token[:, None], axis=1)[:, 0] != 0
    return (state.position > 0) | known


@functools.partial(jax.jit, static_argnums=(0, 5))
def _prefill(
    spec: DecoderSpec,
    weights: DecoderWeights | Tape,
    tokens: jax.Array,
    lengths: jax.Array,
    state: DecodeState,
    chunk: int,
) -> DecodeState:
    batch, width = tokens.shape
    tokens, lengths = tokens.astype(jnp.int32), jnp.clip(lengths, 0, width).astype(jnp.int32)
    continued = is_continued(state)
    # Length with the whole prompt, its last token included.
    total = state.position + continued + lengths
    wanted = (lengths > 0) & (state.status != FULL)
    taken = wanted & (total <= state.capacity)

    # What goes into the cache: the pending last_token, if any, and all of the prompt but its last token.
    shifted = jnp.concatenate([state.last_token[:, None], tokens[:, :-1]], axis=1)
    feed = jnp.where(continued[:, None], shifted, tokens)
    count = jnp.where(taken, total - 1 - state.position, 0)
    chunk = min(chunk, width)
    feed = jnp.pad(feed, ((0, 0), (0, -width % chunk)))

    def body(i: jax.Array, caches: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        done = i * chunk
        part = jax.lax.dynamic_slice_in_dim(feed, done, chunk, axis=1)
        here = jnp.clip(count - done, 0, chunk)
        _, *new = forward_cached(spec, weights, *caches, part, state.position + done, here, total)
        return new[0], new[1]

    trips = (jnp.max(count) + chunk - 1) // chunk
    caches = jax.lax.fori_loop(0, trips, body, (cache_bits(state.k_cache), cache_bits(state.v_cache)))

    rows = jnp.arange(batch)[:, None]
    real = (jnp.arange(width) < lengths[:, None]) & taken[:, None]
    # Padding is sent past the end, where the scatter drops it.
    seen = (state.seen != 0).at[rows, jnp.where(real, tokens, spec.vocab_size)].set(True, mode="drop")
    last = jnp.take_along_axis(tokens, jnp.maximum(lengths - 1, 0)[:, None], axis=1)[:, 0]
    status = jnp.where(taken & (state.status == STOPPED), RUNNING, state.status)
    return dataclasses.replace(
        state,
        k_cache=cache_values(spec, caches[0]),
        v_cache=cache_values(spec, caches[1]),
        position=state.position + count,
        last_token=jnp.where(taken, last, state.last_token),
        status=jnp.where(wanted & ~taken, FULL, status),
        seen=jnp.where(taken[:, None], seen.astype(jnp.uint8), state.seen),
    )


def _check(spec: DecoderSpec, tokens: jax.Array, lengths: jax.Array, state: DecodeState) -> None:
    check_state(spec, state)
    for name, array in (("tokens", tokens), ("lengths", lengths)):
        if not isinstance(array, jax.Array | np.ndarray):
            raise TypeError(f"{name} are {type(array).__name__}; expected an array of integers: jnp.asarray({name})")
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"{name} are {array.dtype}; expected integers")
    if tokens.ndim != 2 or tokens.shape[0] != state.batch or tokens.shape[1] < 1:
        raise ValueError(f"tokens have shape {list(tokens.shape)}; expected [batch, width] with batch {state.batch}")
    if lengths.shape != (state.batch,):
        raise ValueError(f"lengths have shape {list(lengths.shape)}; expected [{state.batch}]")
    leaves = (tokens, lengths, state.position, state.last_token, state.status, state.seen)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return
    count, width = np.asarray(lengths), tokens.shape[1]
    if np.any((count < 0) | (count > width)):
        raise ValueError(f"lengths are {count.tolist()}; expected 0 to {width}, the width of tokens")
    ids = np.asarray(tokens)[np.arange(width) < count[:, None]]
    check_ids(spec, ids)
    check_room(state, count)


def check_ids(spec: DecoderSpec, ids: np.ndarray) -> None:
    """Raises ValueError for token ids outside the vocabulary."""
    bad = ids[(ids < 0) | (ids >= spec.vocab_size)]
    if bad.size:
        raise ValueError(f"token id {bad[0]} is outside the vocabulary of {spec.vocab_size} tokens")


def check_room(state: DecodeState, lengths: np.ndarray) -> None:
    """Raises ValueError where prompts of int [batch] tokens leave a row without room for a new token."""
    held = np.asarray(state.position) + np.asarray(is_continued(state))
    for row in np.flatnonzero((lengths > 0) & (held + lengths > state.capacity)):
        raise ValueError(
            f"row {row}'s prompt of {lengths[row]} tokens, after {held[row]} that it holds already, does not fit a "
            f"capacity of {state.capacity} tokens; start from a state with a larger capacity"
        )
