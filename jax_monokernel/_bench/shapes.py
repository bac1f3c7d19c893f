"""The shapes that are measured, as data, with random weights and the bytes that one token must read."""

from __future__ import annotations

import dataclasses
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from jax_monokernel import DecoderSpec, DecoderWeights, LayerSpec, RopeSpec
from jax_monokernel.weights import weight_shapes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a published (or made-up, where the title says so) model; only what differs between these models."""

    title: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rope_theta: float
    norm_eps: float = 1e-5
    tied_head: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False
    llama3_rope_factor: float | None = None

    def spec(self, dtype: str = "bfloat16") -> DecoderSpec:
        """This shape as a `DecoderSpec`; weights and KV cache in `dtype`."""
        scaling: dict = {}
        if self.llama3_rope_factor is not None:
            scaling = {"scaling": "llama3", "factor": self.llama3_rope_factor, "original_max_position": 8192}
        return DecoderSpec(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            layers=(LayerSpec(),) * self.num_layers,
            ropes=(RopeSpec(theta=self.rope_theta, rotary_dim=self.head_dim, **scaling),),
            norm_eps=self.norm_eps,
            tied_head=self.tied_head,
            qkv_bias=self.qkv_bias,
            qk_norm="head" if self.qk_norm else None,
            dtype=dtype,  # type: ignore[arg-type]
        )


SHAPES = {
    "tiny": Shape(  # for the tests
        title="tiny (made up)",
        hidden_size=64,
        intermediate_size=160,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        vocab_size=320,
        rope_theta=1e4,
    ),
    "10m": Shape(
        title="10M (made up)",
        hidden_size=320,
        intermediate_size=864,
        num_layers=7,
        num_heads=5,
        num_kv_heads=5,
        head_dim=64,
        vocab_size=4096,
        rope_theta=1e4,
    ),
    "smollm2-135m": Shape(
        title="SmolLM2-135M",
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        vocab_size=49152,
        rope_theta=1e5,
    ),
    "qwen2.5-0.5b": Shape(
        title="Qwen2.5-0.5B",
        hidden_size=896,
        intermediate_size=4864,
        num_layers=24,
        num_heads=14,
        num_kv_heads=2,
        head_dim=64,
        vocab_size=151936,
        rope_theta=1e6,
        norm_eps=1e-6,
        qkv_bias=True,
    ),
    "qwen3-0.6b": Shape(
        title="Qwen3-0.6B",
        hidden_size=1024,
        intermediate_size=3072,
        num_layers=28,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=151936,
        rope_theta=1e6,
        norm_eps=1e-6,
        qk_norm=True,
    ),
    "llama3.2-1b": Shape(
        title="Llama-3.2-1B",
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        vocab_size=128256,
        rope_theta=5e5,
        llama3_rope_factor=32.0,
    ),
    "2.3b": Shape(
        title="2.3B (made up)",
        hidden_size=2560,
        intermediate_size=8192,
        num_layers=28,
        num_heads=20,
        num_kv_heads=4,
        head_dim=128,
        vocab_size=32768,
        rope_theta=5e5,
    ),
    "llama3.1-8b": Shape(
        title="Llama-3.1-8B",
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=128256,
        rope_theta=5e5,
        tied_head=False,
        llama3_rope_factor=8.0,
    ),
}


def random_weights(spec: DecoderSpec, seed: int = 0) -> DecoderWeights:
    """Normal weights of standard deviation 0.02 (norm scales: 1 with deviation 0.1), the same in every process."""
    # 2^16 quantiles looked up by random bits: as normal as bf16 can show, and many times faster than a generator.
    normal = np.array([statistics.NormalDist().inv_cdf((i + 0.5) / 2**16) for i in range(2**16)])
    dtype = jnp.dtype(spec.dtype)
    matrix_values, norm_values = (0.02 * normal).astype(dtype), (1.0 + 0.1 * normal).astype(dtype)
    leaves, tree = jax.tree_util.tree_flatten_with_path(weight_shapes(spec))
    made = []
    for index, (path, leaf) in enumerate(leaves):
        bits = np.random.Generator(np.random.SFC64([seed, index])).integers(2**16, size=leaf.shape, dtype=np.uint16)
        values = norm_values if path[-1].name.endswith("norm") else matrix_values
        # Looked up as integers, for which numpy is four times faster than for bf16.
        made.append(jnp.asarray(values.view(f"u{dtype.itemsize}")[bits].view(dtype)))
    return jax.tree_util.tree_unflatten(tree, made)


def random_weights_on_device(spec: DecoderSpec) -> DecoderWeights:
    """As `random_weights` in distribution, made where JAX puts arrays, which takes no time on a GPU."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(weight_shapes(spec))

    def make(key: jax.Array) -> list[jax.Array]:
        made = []
        for (path, leaf), k in zip(leaves, jax.random.split(key, len(leaves)), strict=True):
            x = jax.random.normal(k, leaf.shape, leaf.dtype) * 0.02
            made.append((1 + 5 * x if path[-1].name.endswith("norm") else x).astype(leaf.dtype))
        return made

    return jax.tree_util.tree_unflatten(tree, jax.jit(make)(jax.random.key(0)))


def weight_bytes(spec: DecoderSpec) -> int:
    """Bytes of weights that a decode step must read: all, except that an untied embedding counts as one row."""
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weight_shapes(spec)))
    if not spec.tied_head:
        total -= (spec.vocab_size - 1) * spec.hidden_size * jnp.dtype(spec.dtype).itemsize
    return total


def kv_bytes(spec: DecoderSpec, tokens: float) -> float:
    """Bytes of keys and values that one row's step reads when `tokens` places are before it; windows cut them short."""
    assert spec.kv_dtype is not None
    places = sum(tokens if layer.window is None else min(tokens, layer.window) for layer in spec.layers)
    return 2 * places * spec.kv_size * jnp.dtype(spec.kv_dtype).itemsize
