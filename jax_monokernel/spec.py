"""What a decoder computes, in one vocabulary for every model family.

A `DecoderSpec` is frozen and hashable: it is the static half of a decode and the only description of a model that
backends read. Weights are the other half (`jax_monokernel.weights`).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
DTypeName = Literal["bfloat16", "float16", "float32"]
RopeScaling = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]
QKNorm = Literal["head", "full"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """One rotary position embedding (half-split pairing, as in Hugging Face's `rotate_half`).

    Dimension i of the first half of `rotary_dim` is paired with dimension i + rotary_dim/2 and turned by
    `position * inv_freq[i]`; dimensions past `rotary_dim` pass through. `jax_monokernel.rope` has the formulas.

    Raises:
      ValueError: a field that is out of range, or that the scaling needs and does not have.
    """

    theta: float
    rotary_dim: int
    scaling: RopeScaling = "default"
    factor: float = 1.0
    # Context length the model was first trained with (llama3, yarn, longrope), or its limit (dynamic), in tokens.
    original_max_position: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn, in rotations
    beta_slow: float = 1.0  # yarn, in rotations
    truncate: bool = True  # yarn: round the correction range to whole dimensions
    short_factor: tuple[float, ...] = ()  # longrope, [rotary_dim / 2]
    long_factor: tuple[float, ...] = ()  # longrope, [rotary_dim / 2]
    attention_factor: float = 1.0  # multiplies cos and sin

    def __post_init__(self) -> None:
        if self.scaling not in get_args(RopeScaling):
            raise ValueError(f"RopeSpec.scaling is {self.scaling!r}; expected one of {get_args(RopeScaling)}")
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ValueError(f"RopeSpec.rotary_dim is {self.rotary_dim}; expected an even number of at least 2")
        if not self.theta > 0:
            raise ValueError(f"RopeSpec.theta is {self.theta}; expected a positive number")
        if self.scaling in ("dynamic", "llama3", "yarn", "longrope") and self.original_max_position < 1:
            raise ValueError(
                f"{self.scaling} rope scaling needs original_max_position, got {self.original_max_position}"
            )
        if self.scaling == "longrope":
            for name in ("short_factor", "long_factor"):
                if len(getattr(self, name)) != self.rotary_dim // 2:
                    raise ValueError(
                        f"RopeSpec.{name} has {len(getattr(self, name))} entries; expected rotary_dim/2 = "
                        f"{self.rotary_dim // 2}"
                    )


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """What may differ from layer to layer: attention kind and rotary embedding.

    Raises:
      ValueError: a window below 1.
    """

    # Sliding window: a token sees itself and the `window - 1` tokens before it. None: it sees all of them.
    window: int | None = None
    # Index into DecoderSpec.ropes; None for a layer without positions (NoPE).
    rope: int | None = 0

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"LayerSpec.window is {self.window}; expected at least 1, or None for full attention")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """A decoder-only transformer with RMS norms, grouped-query attention and a gated (or plain) MLP.

    One layer, with every optional part shown (f32 residual stream x; docs/numerics.md says where values are rounded):

        h = norm(x, attn_norm)                                   # pre_norm
        q, k, v = h @ Wq.T + bq, h @ Wk.T + bk, h @ Wv.T + bv    # qkv_bias
        q, k = norm(q, q_norm), norm(k, k_norm)                  # qk_norm: over each head, or over all heads at once
        q, k = rope(q), rope(k)
        s = attn_softcap * tanh(q @ k.T * attn_scale / attn_softcap)
        a = softmax(s + mask) @ v
        x = x + residual_multiplier * norm(a @ Wo.T + bo, attn_post_norm)   # post_norm
        h = norm(x, mlp_norm)
        m = act(h @ Wgate.T + bgate) * (h @ Wup.T + bup)         # gated; otherwise act(h @ Wup.T + bup)
        x = x + residual_multiplier * norm(m @ Wdown.T + bdown, mlp_post_norm)

    Before the first layer x = embedding[token] * embedding_multiplier; after the last,
    logits = softcap(norm(x, final_norm) @ head.T * logit_multiplier).

    Raises:
      ValueError: fields that are out of range or do not fit together, naming them.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerSpec, ...]
    ropes: tuple[RopeSpec, ...]

    norm_eps: float = 1e-6
    norm_offset: float = 0.0  # RMS norms multiply by (norm_offset + weight): 1.0 for Gemma
    pre_norm: bool = True
    post_norm: bool = False
    qk_norm: QKNorm | None = None

    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    activation: Activation = "silu"
    gated: bool = True

    attn_scale: float | None = None  # None: head_dim ** -0.5
    attn_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logit_multiplier: float = 1.0
    tied_head: bool = False

    dtype: DTypeName = "bfloat16"  # weights and matmul inputs
    kv_dtype: DTypeName | None = None  # None: the same as dtype

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"DecoderSpec.{name} is {value!r}; expected a positive integer")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads}) so that "
                f"every key/value head serves the same number of query heads"
            )
        for name, member in (("layers", LayerSpec), ("ropes", RopeSpec)):
            parts = getattr(self, name)
            if not isinstance(parts, tuple | list) or not all(isinstance(part, member) for part in parts):
                raise ValueError(f"DecoderSpec.{name} is {parts!r}; expected a tuple of {member.__name__}")
            object.__setattr__(self, name, tuple(parts))  # a list could not be hashed
        if not self.layers:
            raise ValueError("DecoderSpec.layers is empty; expected one LayerSpec per layer")
        for i, layer in enumerate(self.layers):
            if layer.rope is not None and not 0 <= layer.rope < len(self.ropes):
                raise ValueError(f"layer {i} uses rope {layer.rope}, but only {len(self.ropes)} are defined")
        for rope in self.ropes:
            if rope.rotary_dim > self.head_dim:
                raise ValueError(f"rotary_dim {rope.rotary_dim} is larger than head_dim {self.head_dim}")
            if rope.rotary_dim != self.ropes[0].rotary_dim:
                raise ValueError("all ropes of one model must have the same rotary_dim")
        kinds = {"activation": Activation, "dtype": DTypeName, "kv_dtype": DTypeName, "qk_norm": QKNorm}
        for name, kind in kinds.items():
            value = getattr(self, name)
            if value not in get_args(kind) and not (value is None and name in ("kv_dtype", "qk_norm")):
                raise ValueError(f"DecoderSpec.{name} is {value!r}; expected one of {get_args(kind)}")
        for name in ("attn_softcap", "logit_softcap"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"DecoderSpec.{name} is {value}; expected a positive number, or None for no cap")
        # Filled in here so that two specs that mean the same are equal, hash alike and share compiled programs.
        if self.attn_scale is None:
            object.__setattr__(self, "attn_scale", 1.0 / math.sqrt(self.head_dim))
        if self.kv_dtype is None:
            object.__setattr__(self, "kv_dtype", self.dtype)

    @property
    def num_layers(self) -> int:
        """Depth."""
        return len(self.layers)

    @property
    def q_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key (or value) heads together."""
        return self.num_kv_heads * self.head_dim

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that are rotated; 0 when no layer has a rotary embedding."""
        return self.ropes[0].rotary_dim if self.ropes else 0

    def replace(self, **changes: object) -> DecoderSpec:
        """A copy with some fields changed. Changing head_dim or dtype does not re-derive attn_scale or kv_dtype."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]
