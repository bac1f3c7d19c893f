"""Grouped-query attention in plain JAX: over whole sequences, and over a KV cache of any length."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jax_monokernel.spec import DecoderSpec

# Cache slots that attention looks at together. Scores take heads * queries * KV_BLOCK * 4 bytes: 19 MB for 36 heads and
# 512 queries. 128 to 256 measured best on a CPU; 512 is slower, as scores no longer stay in its cache.
KV_BLOCK = 256

_LOWEST = jnp.finfo(jnp.float32).min
_TINY = jnp.finfo(jnp.float32).tiny
_HIGHEST = jax.lax.Precision.HIGHEST
_BITS = {jnp.dtype("bfloat16"): jnp.uint16, jnp.dtype("float16"): jnp.uint16}


def softcap(x: jax.Array, cap: float | None) -> jax.Array:
    """cap * tanh(x / cap), or x itself without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def attention(
    spec: DecoderSpec,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_position: jax.Array,
    k_position: jax.Array,
    window: jax.Array,
) -> jax.Array:
    """Causal grouped-query attention in f32.

    Args:
      q: f32 [batch, tokens, heads, head_dim]; rounded to the KV cache's dtype, as keys are.
      k: [batch, kv_heads, span, head_dim], any float dtype.
      v: likewise.
      q_position: int32 [batch, tokens].
      k_position: int32 [span], the places of the keys; keys after the query or before its window are not seen.
      window: int32 scalar, sliding window length in tokens.

    Returns:
      f32 [batch, tokens, heads, head_dim].
    """
    assert spec.attn_scale is not None  # DecoderSpec fills it in
    b, t, heads, d = q.shape
    q = q.astype(spec.kv_dtype).astype(jnp.float32).reshape(b, t, k.shape[1], -1, d)
    k, v = k.astype(jnp.float32), v.astype(jnp.float32)
    scores = jnp.einsum("btkgd,bksd->bkgts", q, k, precision=_HIGHEST) * spec.attn_scale
    scores = softcap(scores, spec.attn_softcap)
    distance = q_position[:, :, None] - k_position
    visible = (distance >= 0) & (distance < window)  # [batch, tokens, span]
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    # Rows of padding may see nothing at all; a finite maximum keeps them at zero instead of NaN.
    top = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), _LOWEST)
    p = jnp.exp(scores - top)
    total = jnp.maximum(jnp.sum(p, axis=-1, keepdims=True), _TINY)
    # Slots never written may hold anything, NaN included: 0 * NaN must not reach the sum.
    v = jnp.where(jnp.any(visible, axis=1)[:, None, :, None], v, 0.0)
    out = jnp.einsum("bkgts,bksd->btkgd", p / total, v, precision=_HIGHEST)
    return out.reshape(b, t, heads, d)


def cache_bits(cache: jax.Array) -> jax.Array:
    """A cache as integers of its width, where it is a 16-bit float; else as it is.

    Loops carry caches in this form. XLA's CPU compiler has no 16-bit float scatter or slice: it would convert the whole
    cache to f32 and back in every layer of every step.
    """
    bits = _BITS.get(cache.dtype)
    return cache if bits is None else jax.lax.bitcast_convert_type(cache, bits)


def cache_values(spec: DecoderSpec, cache: jax.Array) -> jax.Array:
    """The inverse of `cache_bits`: spec.kv_dtype. A cache that is in that dtype already stays as it is."""
    dtype = jnp.dtype(spec.kv_dtype)
    return cache if cache.dtype == dtype else jax.lax.bitcast_convert_type(cache, dtype)


def cached_attention(
    spec: DecoderSpec,
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    layer: jax.Array,
    q_position: jax.Array,
    length: jax.Array,
    window: jax.Array,
) -> jax.Array:
    """`attention` over one layer of a cache, block by block, so that scores never take more memory than one block.

    Softmax with a running maximum and sum (arXiv:1805.02867). Only blocks that some query can see are visited, so the
    time depends on the tokens in the cache, not on its capacity.

    Args:
      q: f32 [batch, tokens, heads, head_dim].
      k_cache, v_cache: as in DecodeState or as `cache_bits` of it.
      layer: int32 scalar.
      q_position: int32 [batch, tokens], ascending along tokens.
      length: int32 [batch], cache slots that hold tokens, the queries' own included; 0 for a row whose result does not
        matter.
      window: int32 scalar.

    Returns:
      f32 [batch, tokens, heads, head_dim], zeros where a query sees nothing.
    """
    scale = spec.attn_scale
    assert scale is not None  # DecoderSpec fills it in
    b, t, heads, d = q.shape
    kv_heads, capacity = k_cache.shape[2:4]
    block = min(KV_BLOCK, capacity)
    rows = heads // kv_heads * t
    # Queries of the heads that share a key/value head are rows of one matrix.
    q = q.astype(spec.kv_dtype).reshape(b, t, kv_heads, -1, d).transpose(0, 2, 3, 1, 4).reshape(b, kv_heads, rows, d)

    def read(cache: jax.Array, start: jax.Array) -> jax.Array:
        zero = jnp.zeros_like(start)
        part = jax.lax.dynamic_slice(cache, (zero, layer, zero, start, zero), (b, 1, kv_heads, block, d))
        return cache_values(spec, part[:, 0])

    def step(i: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        acc, top, total = carry
        # The last block is moved back to end with the cache; slots of the block before it are then masked.
        start = jnp.minimum(i * block, capacity - block)
        keys, values = read(k_cache, start), read(v_cache, start)
        scores = jnp.einsum("bkrd,bksd->bkrs", q, keys, precision=_HIGHEST, preferred_element_type=jnp.float32)
        scores = softcap(scores * scale, spec.attn_softcap)
        k_position = start + jnp.arange(block, dtype=jnp.int32)
        distance = q_position[:, :, None] - k_position
        visible = (distance >= 0) & (distance < window) & (k_position >= i * block)  # [batch, tokens, block]
        scores = jnp.where(visible[:, None, None], scores.reshape(b, kv_heads, -1, t, block), -jnp.inf)
        scores = scores.reshape(b, kv_heads, rows, block)
        higher = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
        p = jnp.exp(scores - higher)
        fade = jnp.exp(top - higher)
        # As above: NaN in slots that nobody sees must not reach the sum.
        values = jnp.where(jnp.any(visible, axis=1)[:, None, :, None], values.astype(jnp.float32), 0.0)
        acc = acc * fade + jnp.einsum("bkrs,bksd->bkrd", p, values, precision=_HIGHEST)
        return acc, higher, total * fade + jnp.sum(p, axis=-1, keepdims=True)

    first = jnp.maximum(jnp.min(q_position[:, 0]) - window + 1, 0) // block
    last = jnp.minimum((jnp.max(length) + block - 1) // block, math.ceil(capacity / block))
    none = jnp.zeros((b, kv_heads, rows, 1), jnp.float32)
    carry = (jnp.zeros((b, kv_heads, rows, d), jnp.float32), jnp.full_like(none, _LOWEST), none)
    acc, _, total = jax.lax.fori_loop(first, last, step, carry)
    out = acc / jnp.maximum(total, _TINY)
    return out.reshape(b, kv_heads, -1, t, d).transpose(0, 3, 1, 2, 4).reshape(b, t, heads, d)
