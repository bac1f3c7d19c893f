"""A decoder's mathematics in plain JAX: the definition that every backend is compared with.

Rounding policy (docs/numerics.md): weights, matmul inputs and the KV cache are in their own dtypes (`spec.dtype`,
`spec.kv_dtype`); products are accumulated in f32; norms, rotations, softmax, activations and the residual stream are f32.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jax_monokernel.rope import cos_sin, rotate
from jax_monokernel.spec import DecoderSpec
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


def rms_norm(x: jax.Array, weight: jax.Array, spec: DecoderSpec) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * (offset + weight) over the last axis, in f32."""
    scale = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + spec.norm_eps)
    return x * scale * (spec.norm_offset + weight.astype(jnp.float32))


def softcap(x: jax.Array, cap: float | None) -> jax.Array:
    return x if cap is None else cap * jnp.tanh(x / cap)


def embed(spec: DecoderSpec, weights: DecoderWeights, tokens: jax.Array) -> jax.Array:
    """f32 [..., hidden]."""
    return weights.embedding[tokens].astype(jnp.float32) * spec.embedding_multiplier


def logits(spec: DecoderSpec, weights: DecoderWeights, x: jax.Array) -> jax.Array:
    """f32 [..., vocab] from the residual stream after the last layer."""
    h = rms_norm(x, weights.final_norm, spec)
    return softcap(matmul(h, weights.output_matrix) * spec.logit_multiplier, spec.logit_softcap)


def _bias(y: jax.Array, bias: jax.Array | None) -> jax.Array:
    return y if bias is None else y + bias.astype(jnp.float32)


def _qkv(
    spec: DecoderSpec, w: LayerWeights, h: jax.Array, cos: jax.Array, sin: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    q, k, v = (
        _bias(matmul(h, matrix), bias) for matrix, bias in ((w.q, w.q_bias), (w.k, w.k_bias), (w.v, w.v_bias))
    )
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
    m = act(_bias(matmul(h, w.gate), w.gate_bias)) * m if spec.gated else act(m)
    m = _bias(matmul(m, w.down), w.down_bias)
    if spec.post_norm:
        m = rms_norm(m, w.mlp_post_norm, spec)
    return x + spec.residual_multiplier * m


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
      k, v: [batch, kv_heads, span, head_dim], any float dtype.
      q_position: int32 [batch, tokens].
      k_position: int32 [span], the places of the keys; keys after the query or before its window are not seen.
      window: int32 scalar, sliding window length in tokens.

    Returns:
      f32 [batch, tokens, heads, head_dim].
    """
    b, t, heads, d = q.shape
    q = q.astype(spec.kv_dtype).astype(jnp.float32).reshape(b, t, k.shape[1], -1, d)
    k, v = k.astype(jnp.float32), v.astype(jnp.float32)
    precision = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("btkgd,bksd->bkgts", q, k, precision=precision) * spec.attn_scale
    scores = softcap(scores, spec.attn_softcap)
    distance = q_position[:, :, None] - k_position
    visible = (distance >= 0) & (distance < window)  # [batch, tokens, span]
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    # Rows of padding may see nothing at all; a finite maximum keeps them at zero instead of NaN.
    top = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), jnp.finfo(jnp.float32).min)
    p = jnp.exp(scores - top)
    total = jnp.maximum(jnp.sum(p, axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    # Slots never written may hold anything, NaN included: 0 * NaN must not reach the sum.
    v = jnp.where(jnp.any(visible, axis=1)[:, None, :, None], v, 0.0)
    out = jnp.einsum("bkgts,bksd->btkgd", p / total, v, precision=precision)
    return out.reshape(b, t, heads, d)


def _scan_layers(
    spec: DecoderSpec,
    weights: DecoderWeights,
    x: jax.Array,
    position: jax.Array,
    rope_length: jax.Array,
    attend: Callable[..., tuple[jax.Array, object]],
    cache: object,
) -> tuple[jax.Array, object]:
    """Runs all layers. attend(q, k, v, layer, window, cache) -> (f32 [b, t, heads, d], cache)."""
    cos, sin = cos_sin(spec, position, rope_length)
    windows = jnp.array([la.window or _NO_WINDOW for la in spec.layers], jnp.int32)
    ropes = jnp.array([len(spec.ropes) if la.rope is None else la.rope for la in spec.layers], jnp.int32)

    def step(carry, this):
        x, cache = carry
        index, w, window, rope = this
        box = [cache]

        def attend_here(q, k, v):
            out, box[0] = attend(q, k, v, index, window, box[0])
            return out

        x = layer(spec, w, x, cos[rope], sin[rope], attend_here)
        return (x, box[0]), None

    indices = jnp.arange(spec.num_layers)
    (x, cache), _ = jax.lax.scan(step, (x, cache), (indices, weights.layers, windows, ropes))
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
    weights: DecoderWeights,
    k_cache: jax.Array,
    v_cache: jax.Array,
    tokens: jax.Array,
    position: jax.Array,
    count: jax.Array,
    rope_length: jax.Array,
    *,
    span: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Runs tokens that follow what is in the cache, and appends their keys and values.

    Args:
      k_cache, v_cache: as in DecodeState.
      tokens: int32 [batch, tokens]; of row b the first count[b] are real, the rest padding.
      position: int32 [batch], place of the first token of each row.
      count: int32 [batch].
      rope_length: int32 [batch], as in `rope.cos_sin`.
      span: cache slots that may be read (static); all by default.

    Returns:
      The residual stream f32 [batch, tokens, hidden] after the last layer, and the two caches.
    """
    batch, width = tokens.shape
    capacity = k_cache.shape[3]
    span = capacity if span is None else min(span, capacity)
    places = position[:, None] + jnp.arange(width, dtype=jnp.int32)
    # Padding is sent past the end, where the scatter drops it.
    slots = jnp.where(jnp.arange(width) < count[:, None], places, capacity)
    rows = jnp.arange(batch)[:, None]

    def attend(q, k, v, index, window, caches):
        # Advanced indices around a slice put the indexed axes first: [batch, tokens, kv_heads, head_dim].
        caches = tuple(
            cache.at[rows, index, :, slots].set(new.astype(cache.dtype), mode="drop")
            for cache, new in zip(caches, (k, v), strict=True)
        )
        keys, values = (jax.lax.dynamic_index_in_dim(c, index, 1, keepdims=False)[:, :, :span] for c in caches)
        out = attention(spec, q, keys, values, places, jnp.arange(span, dtype=jnp.int32), window)
        return out, caches

    x = embed(spec, weights, tokens)
    x, (k_cache, v_cache) = _scan_layers(spec, weights, x, places, rope_length, attend, (k_cache, v_cache))
    return x, k_cache, v_cache
