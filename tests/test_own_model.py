"""A model from outside the package: its own modules, layout and forward pass. docs/add-a-model.md explains it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_monokernel import DecoderSpec, DecoderWeights, LayerSpec, LayerWeights, RopeSpec
from jax_monokernel.generate import generate
from jax_monokernel.protocol import DecoderModel

VOCAB, HIDDEN, INTER, HEADS, KV_HEADS, DIM, LAYERS, THETA, WINDOW = 53, 24, 40, 4, 2, 8, 3, 500.0, 6


class Norm(nnx.Module):
    def __init__(self, size: int, rngs: nnx.Rngs):
        self.scale = nnx.Param(1 + 0.3 * jax.random.normal(rngs.params(), (size,)))

    def __call__(self, x):
        return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5) * self.scale[...]


def rotate(x):
    """x [tokens, heads, DIM], from position 0."""
    angle = jnp.arange(x.shape[0])[:, None, None] / THETA ** (jnp.arange(0, DIM, 2) / DIM)
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)], -1)


class Block(nnx.Module):
    """Kernels are [in, out]; queries, keys and values are one matrix, gate and up another."""

    def __init__(self, window: int | None, rngs: nnx.Rngs):
        self.window = window
        self.norm_1, self.norm_2 = Norm(HIDDEN, rngs), Norm(HIDDEN, rngs)
        self.qkv = nnx.Linear(HIDDEN, (HEADS + 2 * KV_HEADS) * DIM, rngs=rngs)
        self.out = nnx.Linear(HEADS * DIM, HIDDEN, use_bias=False, rngs=rngs)
        self.gate_up = nnx.Linear(HIDDEN, 2 * INTER, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(INTER, HIDDEN, use_bias=False, rngs=rngs)
        # Untrained attention is nearly uniform, and tokens then repeat.
        self.qkv.kernel[...] *= 3
        self.qkv.bias[...] = 0.3 * jax.random.normal(rngs.params(), self.qkv.bias.shape)

    def __call__(self, x):
        tokens = x.shape[0]
        q, k, v = jnp.split(self.qkv(self.norm_1(x)).reshape(tokens, -1, DIM), [HEADS, HEADS + KV_HEADS], 1)
        q, k = rotate(q), rotate(k)
        k, v = (jnp.repeat(a, HEADS // KV_HEADS, 1) for a in (k, v))
        back = jnp.arange(tokens)[:, None] - jnp.arange(tokens)
        visible = (back >= 0) & (back < (self.window or tokens))
        p = jax.nn.softmax(jnp.where(visible, jnp.einsum("qhd,khd->hqk", q, k) / np.sqrt(DIM), -1e30))
        x = x + self.out(jnp.einsum("hqk,khd->qhd", p, v).reshape(tokens, -1))
        gate, up = jnp.split(self.gate_up(self.norm_2(x)), 2, -1)
        return x + self.down(jax.nn.silu(gate) * up)


class TinyLM(nnx.Module):
    spec = DecoderSpec(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INTER,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        layers=(LayerSpec(), LayerSpec(window=WINDOW), LayerSpec()),
        ropes=(RopeSpec(theta=THETA, rotary_dim=DIM),),
        norm_eps=1e-5,
        qkv_bias=True,
        dtype="float32",
    )

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCAB, HIDDEN, rngs=rngs)
        self.blocks = nnx.List([Block(layer.window, rngs) for layer in self.spec.layers])
        self.norm = Norm(HIDDEN, rngs)
        self.head = nnx.Linear(HIDDEN, VOCAB, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        """Logits [tokens, VOCAB] of one sequence."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def decoder_weights(self) -> DecoderWeights:
        parts = [HEADS * DIM, (HEADS + KV_HEADS) * DIM]

        def stack(of):
            return jnp.stack([of(block) for block in self.blocks])

        q, k, v = jnp.split(stack(lambda b: b.qkv.kernel[...].T), parts, axis=1)
        q_bias, k_bias, v_bias = jnp.split(stack(lambda b: b.qkv.bias[...]), parts, axis=1)
        gate, up = jnp.split(stack(lambda b: b.gate_up.kernel[...].T), 2, axis=1)
        return DecoderWeights(
            embedding=self.embed.embedding[...],
            final_norm=self.norm.scale[...],
            head=self.head.kernel[...].T,
            layers=LayerWeights(
                q=q,
                k=k,
                v=v,
                q_bias=q_bias,
                k_bias=k_bias,
                v_bias=v_bias,
                o=stack(lambda b: b.out.kernel[...].T),
                gate=gate,
                up=up,
                down=stack(lambda b: b.down.kernel[...].T),
                attn_norm=stack(lambda b: b.norm_1.scale[...]),
                mlp_norm=stack(lambda b: b.norm_2.scale[...]),
            ),
        )


@pytest.fixture(scope="module")
def model():
    return TinyLM(nnx.Rngs(3))


def greedy(model: TinyLM, prompt: list[int], steps: int) -> list[int]:
    """The model's own forward pass over the whole sequence for each token. Padding after it changes nothing."""
    graphdef, params = nnx.split(model)
    forward = jax.jit(lambda params, tokens: nnx.merge(graphdef, params)(tokens))
    tokens = list(prompt)
    for _ in range(steps):
        padded = np.zeros(40, np.int32)
        padded[: len(tokens)] = tokens
        tokens.append(int(jnp.argmax(forward(params, padded)[len(tokens) - 1])))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("backend", [None, "reference"])
def test_it_decodes_as_its_own_forward_pass_says(model, backend):
    assert isinstance(model, DecoderModel)
    prompts = [[5, 17, 2, 40, 40, 1, 33, 8, 12], [7]]
    result = generate(model, prompts, max_new_tokens=24, backend=backend)
    want = [greedy(model, ids, 24) for ids in prompts]
    assert result.tokens.tolist() == want
    assert len(set(want[0])) > 4


def test_training_it_changes_what_it_says():
    model = TinyLM(nnx.Rngs(4))
    before = generate(model, [[1, 2, 3]], max_new_tokens=8).tokens.tolist()
    model.blocks[1].down.kernel[...] = -2 * model.blocks[1].down.kernel[...]
    after = generate(model, [[1, 2, 3]], max_new_tokens=8).tokens.tolist()
    assert after == [greedy(model, [1, 2, 3], 8)]
    assert after != before


class Forgetful(TinyLM):
    def decoder_weights(self):
        weights = super().decoder_weights()
        return DecoderWeights(embedding=weights.embedding, layers=weights.layers, final_norm=weights.final_norm)


def test_missing_weights_are_named():
    with pytest.raises(ValueError, match=r"weights lack head; the spec asks for shape \(53, 24\)"):
        generate(Forgetful(nnx.Rngs(0)), [[1]], max_new_tokens=1)
