"""docs/numerics.md, written down once more in NumPy float64 with rounding where the document says, and nowhere else."""

from __future__ import annotations

import functools

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.models import golden_model, greedy, quick_jit

from jax_monokernel.forward import forward
from jax_monokernel.rope import inverse_frequencies


def rounded(x, dtype):
    return np.asarray(x, np.float32).astype(jnp.dtype(dtype)).astype(np.float64)


def softcap(x, cap):
    return x if cap is None else cap * np.tanh(x / cap)


ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
}


def oracle(spec, weights, tokens, *, round_at=lambda place: True):
    """float64 logits [tokens, vocab]. `round_at` may switch a rounding off by the name of its place."""
    w = jax.tree.map(lambda a: np.asarray(a).astype(np.float64), weights)

    def to(x, dtype, place):
        return rounded(x, dtype) if round_at(place) else x

    def norm(x, weight):
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + spec.norm_eps) * (spec.norm_offset + weight)

    def matmul(x, matrix, bias, place):
        return to(x, spec.dtype, place) @ matrix.T + (0 if bias is None else bias)

    def rotate(x, rope):
        if rope is None:
            return x
        inv = inverse_frequencies(rope)[0]
        # Angles are f32 products.
        angle = (np.arange(len(tokens), dtype=np.float32)[:, None] * inv).astype(np.float64)[:, None]
        cos, sin, half = np.cos(angle) * rope.attention_factor, np.sin(angle) * rope.attention_factor, len(inv)
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)

    x = w.embedding[tokens] * spec.embedding_multiplier
    heads = spec.num_heads // spec.num_kv_heads
    for i, layer in enumerate(spec.layers):
        get = functools.partial(_at, w.layers, i)
        h = norm(x, get("attn_norm")) if spec.pre_norm else x
        q, k, v = (matmul(h, get(n), get(f"{n}_bias"), "qkv") for n in "qkv")
        if spec.qk_norm == "full":
            q, k = norm(q, get("q_norm")), norm(k, get("k_norm"))
        q, k, v = (a.reshape(len(tokens), -1, spec.head_dim) for a in (q, k, v))
        if spec.qk_norm == "head":
            q, k = norm(q, get("q_norm")), norm(k, get("k_norm"))
        rope = None if layer.rope is None else spec.ropes[layer.rope]
        q = to(rotate(q, rope), spec.kv_dtype, "query")
        k, v = to(rotate(k, rope), spec.kv_dtype, "cache"), to(v, spec.kv_dtype, "cache")
        k, v = np.repeat(k, heads, axis=1), np.repeat(v, heads, axis=1)
        scores = softcap(np.einsum("thd,shd->hts", q, k) * spec.attn_scale, spec.attn_softcap)
        distance = np.subtract.outer(np.arange(len(tokens)), np.arange(len(tokens)))
        visible = (distance >= 0) & (distance < (layer.window or len(tokens)))
        p = np.where(visible, np.exp(scores - np.where(visible, scores, -np.inf).max(-1, keepdims=True)), 0)
        a = np.einsum("hts,shd->thd", p / p.sum(-1, keepdims=True), v).reshape(len(tokens), -1)
        a = matmul(a, get("o"), get("o_bias"), "o")
        x = x + spec.residual_multiplier * (norm(a, get("attn_post_norm")) if spec.post_norm else a)
        h = norm(x, get("mlp_norm")) if spec.pre_norm else x
        gate = matmul(h, get("gate"), get("gate_bias"), "gate_up")
        m = ACTIVATIONS[spec.activation](gate) * matmul(h, get("up"), get("up_bias"), "gate_up")
        m = matmul(m, get("down"), get("down_bias"), "down")
        x = x + spec.residual_multiplier * (norm(m, get("mlp_post_norm")) if spec.post_norm else m)
    head = w.embedding if w.head is None else w.head
    return softcap(matmul(norm(x, w.final_norm), head, None, "head") * spec.logit_multiplier, spec.logit_softcap)


def _at(layers, i, role):
    value = getattr(layers, role)
    return None if value is None else value[i]


def error(a, b):
    # The median, as float32 sums differ from float64's and now and then flip a rounding, which is then seen by all
    # later tokens. For the same reason the sequence is short.
    return float(np.median(np.abs(a - b)) / np.abs(b).max())


LENGTH, NEW, ROWS = 5, 2, 12


@functools.cache
def run(name, dtype, kv_dtype):
    case = golden.read(name)
    model = golden_model(case, dtype)
    spec, weights = model.spec.replace(kv_dtype=kv_dtype), model.decoder_weights()
    tokens = np.array(case.prompt[:LENGTH])
    ours = quick_jit(forward, static_argnums=0)(spec, weights, jnp.array(tokens)[None])[0]
    return spec, weights, tokens, np.asarray(ours, np.float64)


CASES = [
    ("gemma3", "bfloat16", "bfloat16"),
    ("smollm3-window-biases", "bfloat16", "float32"),
    ("olmo2", "float16", "float16"),
    ("granite", "float32", "bfloat16"),
]


@pytest.mark.parametrize(("name", "dtype", "kv_dtype"), CASES)
def test_values_are_rounded_where_the_document_says(name, dtype, kv_dtype):
    spec, weights, tokens, ours = run(name, dtype, kv_dtype)
    assert error(ours, oracle(spec, weights, tokens)) < 1e-6


@pytest.mark.parametrize("place", ["qkv", "query", "cache", "o", "gate_up", "down", "head"])
def test_every_rounding_is_seen_by_the_comparison(place):
    spec, weights, tokens, ours = run(*CASES[0])
    assert error(ours, oracle(spec, weights, tokens, round_at=lambda p: p != place)) > 1e-4


# Without float16: its finer steps lie closer together, so that flips are too frequent for this many tokens.
@pytest.mark.parametrize(("name", "dtype", "kv_dtype"), [case for case in CASES if "float16" not in case])
def test_native_decode_rounds_where_the_document_says(name, dtype, kv_dtype):
    spec, weights, _, _ = run(name, dtype, kv_dtype)
    prompt = golden.read(name).prompt
    # Many short requests, each with flips of its own: one that flips early does not decide the median.
    tokens = np.array([prompt[i : i + LENGTH] for i in range(ROWS)], np.int32)
    result = greedy(spec, weights, jnp.array(tokens), NEW, "cpu")
    want = np.empty((ROWS, NEW))
    for row, chosen in enumerate(np.asarray(result.tokens)):
        logits = oracle(spec, weights, np.concatenate([tokens[row], chosen]))[LENGTH - 1 : -1]
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        want[row] = log_probs[np.arange(NEW), chosen]
    assert error(np.asarray(result.log_probs, np.float64), want) < 1e-6
