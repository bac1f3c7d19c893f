"""A decoder's mathematics in plain JAX: the definition that every backend is compared with.

Rounding policy (docs/numerics.md): weights, matmul inputs and the KV cache are in their own dtypes (`spec.dtype`,
`spec.kv_dtype`); products are accumulated in f32; norms, rotations, softmax, activations and the residual stream are
f32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_monokernel.attention import attention, cache_bits, cache_values, cached_attention, softcap
from jax_monokernel.rope import cos_sin, rotate
from jax_monokernel.spec import DecoderSpec
from jax_monokernel.tape import Tape
from jax_monokernel.tape_parts import embedding_rows, unpack_layer
from jax_monokernel.weights import DecoderWeights, LayerWeights

# (query f32 [b, t, heads, d], key f32 [b, t, kv_heads, d], value likewise, layer) -> f32 [b, t, heads, d]
Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]

_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}
# Windows are data in the scan over layers; no context is this long.
_NO_WINDOW = 2**30


def matmul(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [..., in] @ weight [out, in].T: inputs rounded to the weight's dtype, f32 accumulation and result."""
    return jax.lax.dot_general(
        x.astype(weight.dtype),
        weight,
        (((x.ndim - 1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def rms_norm(x: jax.Array, weight: jax.Array | None, spec: DecoderSpec) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * (offset + weight) over the last axis, in f32."""
    assert weight is not None  # check_weights has seen to it
    scale = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + spec.norm_eps)
    return x * scale * (spec.norm_offset + weight.astype(jnp.float32))


def embed(spec: DecoderSpec, weights: DecoderWeights | Tape, tokens: jax.Array) -> jax.Array:
    """f32 [..., hidden]."""
    rows = embedding_rows(weights, tokens) if isinstance(weights, Tape) else weights.embedding[tokens]
    return rows.astype(jnp.float32) * spec.embedding_multiplier


def logits(spec: DecoderSpec, weights: DecoderWeights, x: jax.Array) -> jax.Array:
    """f32 [..., vocab] from the residual stream after the last layer."""
    h = rms_norm(x, weights.final_norm, spec)
    return softcap(matmul(h, weights.output_matrix) * spec.logit_multiplier, spec.logit_softcap)


def _bias(y: jax.Array, bias: jax.Array | None) -> jax.Array:
    return y if bias is None else y + bias.astype(jnp.float32)


def _qkv(
    spec: DecoderSpec, w: LayerWeights, h: jax.Array, cos: jax.Array, sin: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    q, k, v = (_bias(matmul(h, matrix), bias) for matrix, bias in ((w.q, w.q_bias), (w.k, w.k_bias), (w.v, w.v_bias)))
    if spec.qk_norm == "full":
        q, k = rms_norm(q, w.q_norm, spec), rms_norm(k, w.k_norm, spec)
    q, k, v = (a.reshape(*h.shape[:2], -1, spec.head_dim) for a in (q, k, v))
    if spec.qk_norm == "head":
        q, k = rms_norm(q, w.q_norm, spec), rms_norm(k, w.k_norm, spec)
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def layer(
    spec: DecoderSpec, w: LayerWeights, x: jax.Array, cos: jax.Array, sin: jax.Array, attend: Callable[..., jax.Array]
) -> jax.Array:
    """One layer: residual stream f32 [batch, tokens, hidden] in and out. `w` holds this layer's weights only."""
    h = rms_norm(x, w.attn_norm, spec) if spec.pre_norm else x
    a = attend(*_qkv(spec, w, h, cos, sin))
    a = _bias(matmul(a.reshape(*x.shape[:2], -1), w.o), w.o_bias)
    if spec.post_norm:
        a = rms_norm(a, w.attn_post_norm, spec)
    x = x + spec.residual_multiplier * a

    h = rms_norm(x, w.mlp_norm, spec) if spec.pre_norm else x
    act = _ACTIVATIONS[spec.activation]
    m = _bias(matmul(h, w.up), w.up_bias)
    m = act(m) if w.gate is None else act(_bias(matmul(h, w.gate), w.gate_bias)) * m
    m = _bias(matmul(m, w.down), w.down_bias)
    if spec.post_norm:
        m = rms_norm(m, w.mlp_post_norm, spec)
    return x + spec.residual_multiplier * m


def _layer_at(weights: DecoderWeights | Tape, index: jax.Array) -> LayerWeights:
    """One layer's weights, cut out where they are used.

    XLA's CPU compiler slices 16-bit floats by way of f32, and then moves the conversion of the whole stack out of the
    loop: three times the memory of the weights. A barrier on the changing index holds it inside, where it is fused.
    """
    weights, index = jax.lax.optimization_barrier((weights, index))
    if isinstance(weights, Tape):
        return unpack_layer(weights, index)
    return jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, index, 0, keepdims=False), weights.layers)


def _scan_layers(
    spec: DecoderSpec,
    weights: DecoderWeights | Tape,
    x: jax.Array,
    position: jax.Array,
    rope_length: jax.Array,
    attend: Callable[..., tuple[jax.Array, Any]],
    cache: Any,
    *,
    lean: bool = False,
) -> tuple[jax.Array, Any]:
    """Runs all layers. attend(q, k, v, layer, window, cache) -> (f32 [b, t, heads, d], cache).

    lean: keep XLA from making converted copies of all weights at once, at the price of a slow gradient. Needed where
      the weights are a tape.
    """
    cos, sin = cos_sin(spec, position, rope_length)
    windows = jnp.array([la.window or _NO_WINDOW for la in spec.layers], jnp.int32)
    ropes = jnp.array([len(spec.ropes) if la.rope is None else la.rope for la in spec.layers], jnp.int32)

    def step(carry, this):
        x, cache = carry
        index, w, window, rope = this
        if lean:
            w = _layer_at(weights, index)
        box = [cache]

        def attend_here(q, k, v):
            out, box[0] = attend(q, k, v, index, window, box[0])
            return out

        x = layer(spec, w, x, cos[rope], sin[rope], attend_here)
        return (x, box[0]), None

    stacked = None if lean or isinstance(weights, Tape) else weights.layers
    (x, cache), _ = jax.lax.scan(step, (x, cache), (jnp.arange(spec.num_layers), stacked, windows, ropes))
    return x, cache


def forward(spec: DecoderSpec, weights: DecoderWeights, tokens: jax.Array) -> jax.Array:
    """Logits f32 [batch, tokens, vocab] for whole sequences int [batch, tokens], without a cache. Differentiable."""
    position = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    rope_length = jnp.full(tokens.shape[0], tokens.shape[1], jnp.int32)

    def attend(q, k, v, _layer, window, cache):
        k, v = (jnp.swapaxes(a, 1, 2).astype(spec.kv_dtype) for a in (k, v))
        return attention(spec, q, k, v, position, position[0], window), cache

    x, _ = _scan_layers(spec, weights, embed(spec, weights, tokens), position, rope_length, attend, ())
    return logits(spec, weights, x)


def forward_cached(
    spec: DecoderSpec,
    weights: DecoderWeights | Tape,
    k_cache: jax.Array,
    v_cache: jax.Array,
    tokens: jax.Array,
    position: jax.Array,
    count: jax.Array,
    rope_length: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Runs tokens that follow what is in the cache, and appends their keys and values.

    Args:
      weights: the model's, by role, or a tape, of which one layer at a time is unpacked.
      k_cache, v_cache: as in DecodeState, or as `cache_bits` of it, which a loop around this should carry.
      tokens: int32 [batch, tokens]; of row b the first count[b] are real, the rest padding.
      position: int32 [batch], place of the first token of each row.
      count: int32 [batch].
      rope_length: int32 [batch], as in `rope.cos_sin`.

    Returns:
      The residual stream f32 [batch, tokens, hidden] after the last layer, and the two caches.
    """
    batch, width = tokens.shape
    capacity = k_cache.shape[3]
    places = position[:, None] + jnp.arange(width, dtype=jnp.int32)
    # Padding is sent past the end, where the scatter drops it.
    slots = jnp.where(jnp.arange(width) < count[:, None], places, capacity)
    rows = jnp.arange(batch)[:, None]
    length = jnp.where(count > 0, position + count, 0)

    def attend(q, k, v, index, window, caches):
        # Advanced indices around a slice put the indexed axes first: [batch, tokens, kv_heads, head_dim].
        k_bits, v_bits = (
            cache.at[rows, index, :, slots].set(cache_bits(new.astype(spec.kv_dtype)), mode="drop")
            for cache, new in zip(caches, (k, v), strict=True)
        )
        return cached_attention(spec, q, k_bits, v_bits, index, places, length, window), (k_bits, v_bits)

    # In a loop over steps, this holds conversions of the embedding inside, as in _layer_at.
    weights, tokens = jax.lax.optimization_barrier((weights, tokens))
    x = embed(spec, weights, tokens)
    caches = (cache_bits(k_cache), cache_bits(v_cache))
    x, caches = _scan_layers(spec, weights, x, places, rope_length, attend, caches, lean=True)
    if k_cache.dtype == jnp.dtype(spec.kv_dtype):
        caches = (cache_values(spec, caches[0]), cache_values(spec, caches[1]))
    return x, *caches
