"""Attention over a cache, block by block, against the plain definition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from naive import NO_WINDOW, SPECS

from jax_monokernel.attention import KV_BLOCK, attention, cache_bits, cache_values, cached_attention

LAYERS, KV_HEADS, HEADS, DIM, TOKENS = 2, 2, 6, 8, 5
CAPACITY = 2 * KV_BLOCK + 37  # the last block overlaps the one before


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("softcap", [None, 1.5], ids=["plain", "softcap"])
def test_blocks_equal_the_definition(kv_dtype, softcap):
    spec = SPECS["plain"].replace(kv_dtype=kv_dtype, attn_softcap=softcap)
    rng = np.random.default_rng(5)
    # A row with an empty cache, ones that end at, before and after the edges of blocks, and a full one.
    first = np.array([0, 3, KV_BLOCK - TOKENS, KV_BLOCK - 2, 2 * KV_BLOCK - 1, CAPACITY - TOKENS], np.int32)
    batch = len(first)
    q = jnp.asarray(rng.standard_normal((batch, TOKENS, HEADS, DIM)), jnp.float32)
    shape = (batch, LAYERS, KV_HEADS, CAPACITY, DIM)
    k, v = (jnp.asarray(2 * rng.standard_normal(shape), kv_dtype) for _ in range(2))
    unused = jnp.arange(CAPACITY)[:, None] >= first[:, None, None, None, None] + TOKENS
    k, v = (jnp.where(unused, jnp.nan, cache) for cache in (k, v))
    places = first[:, None] + jnp.arange(TOKENS, dtype=jnp.int32)

    blocked = jax.jit(cached_attention, static_argnums=0)
    plain = jax.jit(attention, static_argnums=0)
    for window in (NO_WINDOW, 1, KV_BLOCK + 3):
        got = blocked(spec, q, cache_bits(k), cache_bits(v), 1, places, first + TOKENS, jnp.int32(window))
        want = plain(spec, q, k[:, 1], v[:, 1], places, jnp.arange(CAPACITY), jnp.int32(window))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6)
        assert np.std(want) > 0.1


def test_rows_whose_result_does_not_matter_cost_no_blocks_and_are_not_nan():
    spec = SPECS["plain"]
    q = jnp.ones((1, TOKENS, HEADS, DIM))
    cache = jnp.full((1, LAYERS, KV_HEADS, CAPACITY, DIM), jnp.nan)
    places = jnp.arange(TOKENS, dtype=jnp.int32)[None]
    out = cached_attention(spec, q, cache, cache, 0, places, jnp.zeros(1, jnp.int32), jnp.int32(NO_WINDOW))
    np.testing.assert_array_equal(out, 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_cache_bits_keep_every_bit(dtype):
    spec = SPECS["plain"].replace(kv_dtype=dtype)
    cache = jnp.asarray([[1.5, -0.0, np.nan, np.inf, 3e-6]], dtype)
    bits = cache_bits(cache)
    assert bits.dtype == (jnp.float32 if dtype == "float32" else jnp.uint16)
    back = cache_values(spec, bits)
    assert back.dtype == cache.dtype
    assert np.asarray(back).tobytes() == np.asarray(cache).tobytes()
