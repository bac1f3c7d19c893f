"""The peer that a JAX user would write today: one jitted `fori_loop` over single-token steps, greedy.

Everything a careful user does is done: bf16 weights and KV cache, layers unrolled with one array per layer, fused QKV
and gate/up matrices (fusing and the order of axes change little on a CPU), caches donated and updated by
`dynamic_update_slice`. On a CPU, XLA converts bf16 weights to f32 once before the loop, which then reads twice the
bytes; forbidding that is slower.
"""

from __future__ import annotations

import functools
import math
import time

import jax
import jax.numpy as jnp
import numpy as np

from jax_monokernel import DecoderSpec, LayerSpec
from jax_monokernel._bench.ours import prefilled
from jax_monokernel.rope import inverse_frequencies
from jax_monokernel.weights import DecoderWeights

Layer = dict[str, jax.Array]
Cache = list[tuple[jax.Array, jax.Array]]  # per layer: keys and values [batch, capacity, kv_heads, head_dim]


def not_covered(spec: DecoderSpec) -> str | None:
    """The first part of a model that this loop does not have, or None."""
    parts = {
        "models without norms before attention and MLP": not spec.pre_norm,
        "norms after them": spec.post_norm,
        "norms over all query heads together": spec.qk_norm == "full",
        "norms that add to their scale": spec.norm_offset != 0,
        "biases of attention's output or the MLP": spec.o_bias or spec.mlp_bias,
        "MLPs without a gate, or with other gates than SiLU": not spec.gated or spec.activation != "silu",
        "scores scaled by other than head_dim ** -0.5": spec.attn_scale != 1.0 / math.sqrt(spec.head_dim),
        "soft-caps": spec.attn_softcap is not None or spec.logit_softcap is not None,
        "multipliers": (spec.embedding_multiplier, spec.residual_multiplier, spec.logit_multiplier) != (1, 1, 1),
        "layers of several kinds": spec.layers != (LayerSpec(),) * spec.num_layers,
        "partial rotary embeddings": spec.rotary_dim != spec.head_dim,
        "rotary embeddings that depend on the length": any(r.scaling in ("dynamic", "longrope") for r in spec.ropes),
        "scaled rotary embeddings": any(r.attention_factor != 1 for r in spec.ropes),
        "KV caches of another dtype": spec.kv_dtype != spec.dtype,
    }
    return next((part for part, there in parts.items() if there), None)


def layer_params(spec: DecoderSpec, weights: DecoderWeights) -> list[Layer]:
    """One dictionary per layer, matrices [out, in]."""

    def join(*roles: str) -> np.ndarray:
        return np.concatenate([np.asarray(getattr(weights.layers, role)) for role in roles], axis=1)

    matrices = {"qkv": join("q", "k", "v"), "o": join("o"), "gate_up": join("gate", "up"), "down": join("down")}
    vectors = {"attn_norm": join("attn_norm"), "mlp_norm": join("mlp_norm")}
    if spec.qkv_bias:
        vectors["qkv_bias"] = join("q_bias", "k_bias", "v_bias")
    if spec.qk_norm:
        vectors |= {"q_norm": join("q_norm"), "k_norm": join("k_norm")}
    return [{name: jnp.asarray(a[i]) for name, a in (matrices | vectors).items()} for i in range(spec.num_layers)]


def linear(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """x [batch, in] @ matrix [out, in].T"""
    return jnp.einsum("bi,oi->bo", x, matrix)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    f32 = x.astype(jnp.float32)
    f32 = f32 * jax.lax.rsqrt(jnp.mean(f32 * f32, -1, keepdims=True) + eps)
    return f32.astype(x.dtype) * scale


def rotate(x: jax.Array, position: jax.Array, frequencies: np.ndarray) -> jax.Array:
    """x [batch, heads, head_dim], all rows at the same position."""
    angle = position.astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def step(spec: DecoderSpec, params: dict, cache: Cache, token: jax.Array, position: jax.Array):
    """Next token int32 [batch] after `token`, which stands at `position` (int32 scalar), and the cache with it."""
    frequencies = inverse_frequencies(spec.ropes[0])[0]
    heads, kv_heads, dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
    batch = token.shape[0]
    x = params["embedding"][token]
    new_cache = []
    for p, (keys, values) in zip(params["layers"], cache, strict=True):
        qkv = linear(rms_norm(x, p["attn_norm"], spec.norm_eps), p["qkv"])
        if "qkv_bias" in p:
            qkv = qkv + p["qkv_bias"]
        q, k, v = (a.reshape(batch, -1, dim) for a in jnp.split(qkv, [spec.q_size, spec.q_size + spec.kv_size], -1))
        if "q_norm" in p:
            q, k = rms_norm(q, p["q_norm"], spec.norm_eps), rms_norm(k, p["k_norm"], spec.norm_eps)
        q, k = rotate(q, position, frequencies), rotate(k, position, frequencies)
        keys = jax.lax.dynamic_update_slice(keys, k[:, None], (0, position, 0, 0))
        values = jax.lax.dynamic_update_slice(values, v[:, None], (0, position, 0, 0))
        new_cache.append((keys, values))

        q = q.reshape(batch, kv_heads, heads // kv_heads, dim)
        scores = jnp.einsum("bkgd,btkd->bkgt", q, keys, preferred_element_type=jnp.float32) * dim**-0.5
        scores = jnp.where(jnp.arange(keys.shape[1]) <= position, scores, -jnp.inf)
        attended = jnp.einsum("bkgt,btkd->bkgd", jax.nn.softmax(scores, -1).astype(x.dtype), values)
        x = x + linear(attended.reshape(batch, -1), p["o"])

        gate, up = jnp.split(linear(rms_norm(x, p["mlp_norm"], spec.norm_eps), p["gate_up"]), 2, -1)
        x = x + linear(jax.nn.silu(gate) * up, p["down"])
    x = rms_norm(x, params["final_norm"], spec.norm_eps)
    logits = jnp.einsum("bd,vd->bv", x, params["head"], preferred_element_type=jnp.float32)
    return jnp.argmax(logits, -1).astype(jnp.int32), new_cache


@functools.partial(jax.jit, static_argnames=("spec", "count"), donate_argnames="cache")
def loop(spec: DecoderSpec, params: dict, cache: Cache, token: jax.Array, position: jax.Array, *, count: int):
    """`count` tokens int32 [batch, count] after `token`, and the cache."""

    def body(i, carry):
        token, cache, out = carry
        token, cache = step(spec, params, cache, token, position + i)
        return token, cache, out.at[:, i].set(token)

    out = jnp.zeros((token.shape[0], count), jnp.int32)
    _, cache, out = jax.lax.fori_loop(0, count, body, (token, cache, out))
    return out, cache


class JaxLoop:
    """Greedy decoding of `prompt` (int [batch, tokens], equal lengths) with the given weights."""

    def __init__(self, spec: DecoderSpec, weights: DecoderWeights, prompt: np.ndarray, new_tokens: int):
        state = prefilled(spec, weights, prompt, new_tokens)  # not part of what is measured
        keys, values = (np.asarray(cache).transpose(1, 0, 3, 2, 4) for cache in (state.k_cache, state.v_cache))
        self._cache = [(jnp.asarray(k), jnp.asarray(v)) for k, v in zip(keys, values, strict=True)]
        self._last, self._position = state.last_token, state.position[0]
        self._params = {
            "embedding": weights.embedding,
            "head": weights.output_matrix,
            "final_norm": weights.final_norm,
            "layers": layer_params(spec, weights),
        }
        self._loop = functools.partial(loop, spec, count=new_tokens)
        self.settings: dict = {}

    def measure(self) -> dict:
        """{"seconds": of new_tokens steps, "tokens": int [batch][new_tokens]}."""
        # The donated cache comes back with later places filled; they are masked until they are written again.
        jax.block_until_ready(self._cache)
        start = time.perf_counter()
        tokens, self._cache = self._loop(self._params, self._cache, self._last, self._position)
        tokens.block_until_ready()
        return {"seconds": time.perf_counter() - start, "tokens": np.asarray(tokens).tolist()}
