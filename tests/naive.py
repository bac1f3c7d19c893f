"""Tiny models, and decoding as slowly and plainly as possible: the whole sequence again for every token, no cache."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_monokernel import DecoderSpec, DecoderWeights, LayerSpec, RopeSpec
from jax_monokernel.attention import attention
from jax_monokernel.forward import embed, layer, logits
from jax_monokernel.rope import cos_sin
from jax_monokernel.sampling import SamplingParams, sample
from jax_monokernel.weights import weight_shapes

VOCAB = 37
NO_WINDOW = 2**30


def _spec(layers: Sequence[LayerSpec], *ropes: RopeSpec, **options) -> DecoderSpec:
    sizes = {"hidden_size": 20, "intermediate_size": 28, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    options = sizes | {"dtype": "float32"} | options
    return DecoderSpec(vocab_size=VOCAB, layers=tuple(layers), ropes=ropes, **options)


# Every option that makes prefill or decode take another path, and those that change what a position or a step means.
SPECS = {
    "plain": _spec([LayerSpec()] * 2, RopeSpec(theta=100.0, rotary_dim=8), tied_head=True),
    "windows": _spec(
        [LayerSpec(window=5), LayerSpec(rope=1), LayerSpec(window=3)],
        RopeSpec(theta=100.0, rotary_dim=8),
        RopeSpec(theta=1000.0, rotary_dim=8, scaling="linear", factor=4.0),
        norm_offset=1.0,
        post_norm=True,
        qk_norm="head",
        activation="gelu_tanh",
        attn_softcap=2.0,
        logit_softcap=3.0,
        embedding_multiplier=3.0,
        tied_head=True,
    ),
    "nope": _spec(
        [LayerSpec(), LayerSpec(rope=None), LayerSpec(rope=None, window=6)],
        RopeSpec(theta=100.0, rotary_dim=4),
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        num_kv_heads=1,
        residual_multiplier=0.7,
        logit_multiplier=0.5,
    ),
    "post_norm": _spec(
        [LayerSpec(), LayerSpec()],
        RopeSpec(theta=100.0, rotary_dim=8),
        pre_norm=False,
        post_norm=True,
        qk_norm="full",
        gated=False,
        activation="relu",
        num_kv_heads=4,
    ),
    "dynamic": _spec(
        [LayerSpec()] * 2, RopeSpec(theta=100.0, rotary_dim=8, scaling="dynamic", factor=4.0, original_max_position=9)
    ),
    "longrope": _spec(
        [LayerSpec()] * 2,
        RopeSpec(
            theta=100.0,
            rotary_dim=8,
            scaling="longrope",
            original_max_position=12,
            short_factor=(1.0, 1.1, 1.2, 1.5),
            long_factor=(1.0, 2.0, 3.0, 5.0),
            attention_factor=1.2,
        ),
    ),
}


def random_weights(spec: DecoderSpec, seed: int = 0) -> DecoderWeights:
    """Weights that keep the scale of their input, scattered norms and biases."""

    def value(path: tuple, shape: jax.ShapeDtypeStruct) -> jax.Array:
        name = path[-1].name
        rng = np.random.default_rng([seed, sum(name.encode()), len(name)])
        noise = rng.standard_normal(shape.shape)
        if name.endswith("norm"):
            noise = 1 - spec.norm_offset + 0.3 * noise
        elif name.endswith("bias"):
            noise = 0.3 * noise
        elif name == "embedding":
            # A tied head finds a token's own embedding in the residual stream; if large, it repeats that token forever.
            noise = (0.2 if spec.tied_head else 1.0) * noise
        else:
            noise = (2.0 if name in "qk" else 1.0) * noise / np.sqrt(shape.shape[-1])
        return jnp.asarray(noise, shape.dtype)

    return jax.tree_util.tree_map_with_path(value, weight_shapes(spec))


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([seed, length]).integers(0, VOCAB, length).tolist()


@functools.partial(jax.jit, static_argnums=0)
def sequence_logits(
    spec: DecoderSpec, weights: DecoderWeights, tokens: jax.Array, rope_lengths: jax.Array
) -> jax.Array:
    """f32 [tokens, vocab] of one sequence int32 [tokens]; token i was rotated when it was rope_lengths[i] long."""
    place = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    cos, sin = (a.swapaxes(1, 2) for a in cos_sin(spec, place[:, None], rope_lengths))
    x = embed(spec, weights, tokens)[None]
    for i, kind in enumerate(spec.layers):

        def attend(q, k, v, window=kind.window or NO_WINDOW):
            k, v = (a.swapaxes(1, 2).astype(spec.kv_dtype) for a in (k, v))
            return attention(spec, q, k, v, place[None], place, jnp.int32(window))

        rope = len(spec.ropes) if kind.rope is None else kind.rope
        w = jax.tree.map(lambda a, i=i: a[i], weights.layers)
        x = layer(spec, w, x, cos[rope], sin[rope], attend)
    return logits(spec, weights, x[0])


@dataclasses.dataclass
class NaiveRow:
    """One conversation: its tokens, and how long it was when each of them was fed."""

    spec: DecoderSpec
    weights: DecoderWeights
    key_data: np.ndarray  # uint32 [2]
    capacity: int = 64
    tokens: list[int] = dataclasses.field(default_factory=list)
    rope_lengths: list[int] = dataclasses.field(default_factory=list)
    seen: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(VOCAB, np.uint8))
    status: int = 0

    def say(self, prompt: Sequence[int]) -> None:
        """Adds a prompt."""
        pending = len(self.tokens) - len(self.rope_lengths)
        self.tokens += prompt
        self.rope_lengths += [len(self.tokens)] * (pending + len(prompt) - 1)
        self.seen = (self.seen != 0).astype(np.uint8)
        self.seen[list(prompt)] = 1
        self.status = 0

    def decode(self, params: SamplingParams, row: int, steps: int) -> tuple[list[int], list[float]]:
        """New tokens and their log-probabilities, from row `row` of the batch's parameters."""
        params = jax.tree.map(lambda leaf: leaf[row : row + 1], params)
        new: list[int] = []
        log_probs: list[float] = []
        eos = set(np.asarray(params.eos_token_id[0]).tolist()) - {-1}
        while self.status == 0 and len(new) < min(steps, int(params.max_new_tokens[0])):
            position = len(self.tokens) - 1
            if position >= self.capacity:
                self.status = 2
                break
            self.rope_lengths.append(position + 1)
            padded = np.zeros((2, 64), np.int32)
            padded[:, : len(self.tokens)] = self.tokens, self.rope_lengths
            out = sequence_logits(self.spec, self.weights, *padded)[position]
            token, log_prob = _sample(
                out[None], self.seen[None], self.key_data[None], np.array([position], np.int32), params
            )
            new.append(int(token[0]))
            log_probs.append(float(log_prob[0]))
            self.tokens.append(new[-1])
            self.seen[new[-1]] |= 2
            self.status = 1 if new[-1] in eos else 0
        return new, log_probs


@jax.jit
def _sample(logits, seen, key_data, position, params):
    return sample(logits, seen=seen, key_data=key_data, position=position, params=params)
