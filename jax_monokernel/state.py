"""What a decode carries from call to call."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jax_monokernel.spec import DecoderSpec

# DecodeState.status
RUNNING = 0  # more tokens can be generated
STOPPED = 1  # an end-of-sequence token was generated
FULL = 2  # the KV cache has no room for another token


@functools.partial(jax.tree_util.register_dataclass)
@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeState:
    """Requests in flight. Every leaf has the batch as its first axis, so a state is sharded or vmapped over it.

    `last_token` has been chosen (or is the end of the prompt), but its keys and values are not in the cache yet: the
    next step reads it, writes them at index `position`, and chooses the token after it.
    """

    k_cache: jax.Array  # spec.kv_dtype [batch, layers, num_kv_heads, capacity, head_dim], rotated keys
    v_cache: jax.Array  # spec.kv_dtype [batch, layers, num_kv_heads, capacity, head_dim]
    position: jax.Array  # int32 [batch], tokens in the cache
    last_token: jax.Array  # int32 [batch]
    key_data: jax.Array  # uint32 [batch, 2], one threefry key per request
    status: jax.Array  # int32 [batch], RUNNING, STOPPED or FULL
    seen: jax.Array  # uint8 [batch, vocab], bit 0: token is in the prompt; bit 1: it was generated

    @property
    def batch(self) -> int:
        """Number of requests."""
        return self.position.shape[0]

    @property
    def capacity(self) -> int:
        """Tokens the KV cache can hold per request."""
        return self.k_cache.shape[3]


@functools.partial(jax.tree_util.register_dataclass)
@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeResult:
    """What one decode call gives."""

    tokens: jax.Array  # int32 [batch, max_new_tokens], -1 past a row's length
    lengths: jax.Array  # int32 [batch], tokens generated in this call, an end-of-sequence token included
    log_probs: jax.Array | None  # f32 [batch, max_new_tokens], 0 past a row's length; None if not asked for
    state: DecodeState


def empty_state(spec: DecoderSpec, *, batch: int, capacity: int, key: jax.Array) -> DecodeState:
    """A state with nothing in its cache.

    Args:
      batch: number of requests.
      capacity: tokens the KV cache can hold per request: prompt length + tokens to generate - 1 is enough.
      key: a `jax.random.key` (split over the batch) or an array of `batch` keys. Threefry only, since every backend
        computes the random bits itself.

    Raises:
      ValueError: batch or capacity below 1, or a key of another kind or shape.
    """
    if batch < 1 or capacity < 1:
        raise ValueError(f"batch and capacity must be at least 1, got {batch} and {capacity}")
    shape = (batch, spec.num_layers, spec.num_kv_heads, capacity, spec.head_dim)
    # No array twice: a state may be donated.
    return DecodeState(
        k_cache=jnp.zeros(shape, spec.kv_dtype),
        v_cache=jnp.zeros(shape, spec.kv_dtype),
        position=jnp.zeros(batch, jnp.int32),
        last_token=jnp.zeros(batch, jnp.int32),
        key_data=request_keys(key, batch),
        status=jnp.zeros(batch, jnp.int32),
        seen=jnp.zeros((batch, spec.vocab_size), jnp.uint8),
    )


def check_state(spec: DecoderSpec, state: DecodeState) -> None:
    """Raises ValueError naming the first leaf that a state for `spec` cannot have, by its shape or dtype."""
    if not isinstance(state, DecodeState):
        raise ValueError(f"state is {type(state).__name__}; expected a DecodeState, from empty_state and prefill")
    batch = state.position.shape[0] if state.position.ndim else 1
    capacity = state.k_cache.shape[3] if state.k_cache.ndim == 5 else 1
    want = {
        "position": ((batch,), "int32"),
        "k_cache": ((batch, spec.num_layers, spec.num_kv_heads, capacity, spec.head_dim), spec.kv_dtype),
        "v_cache": ((batch, spec.num_layers, spec.num_kv_heads, capacity, spec.head_dim), spec.kv_dtype),
        "last_token": ((batch,), "int32"),
        "key_data": ((batch, 2), "uint32"),
        "status": ((batch,), "int32"),
        "seen": ((batch, spec.vocab_size), "uint8"),
    }
    for name, (shape, dtype) in want.items():
        leaf = getattr(state, name)
        if leaf.shape != shape or leaf.dtype != jnp.dtype(dtype):
            raise ValueError(
                f"state.{name} is {leaf.dtype}{list(leaf.shape)}; this model and a batch of {batch} ask for "
                f"{dtype}{list(shape)}"
            )


def request_keys(key: jax.Array, batch: int) -> jax.Array:
    """uint32 [batch, 2]: `key` itself where it holds one key per request, else request i gets fold_in(key, i)."""
    check_key(key, batch)
    if key.ndim == 0:
        key = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
    return jax.random.key_data(key)


def check_key(key: jax.Array, batch: int) -> None:
    """Raises ValueError if these are no keys for a batch of this size."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise ValueError(f"expected a key made by jax.random.key(seed), got an array of {key.dtype}{list(key.shape)}")
    if str(jax.random.key_impl(key)) != "threefry2x32":
        raise ValueError(
            f"the key uses {jax.random.key_impl(key)}; decoding needs jax.random.key(seed, impl='threefry2x32'), whose "
            "random bits every backend can compute"
        )
    if key.shape not in ((), (batch,)):
        raise ValueError(f"expected one key or {batch} keys, got {list(key.shape)}")
