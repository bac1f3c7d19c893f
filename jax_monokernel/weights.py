"""Weights by role: the one form in which a model hands its parameters to packing, prefill and the reference."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jax_monokernel.spec import DecoderSpec


@functools.partial(jax.tree_util.register_dataclass)
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """Every layer's weights, stacked on a leading layer axis. Matrices are [out, in] as in Hugging Face checkpoints.

    Parts that the spec does not have are None.
    """

    q: jax.Array  # [layers, num_heads * head_dim, hidden]
    k: jax.Array  # [layers, num_kv_heads * head_dim, hidden]
    v: jax.Array  # [layers, num_kv_heads * head_dim, hidden]
    o: jax.Array  # [layers, hidden, num_heads * head_dim]
    up: jax.Array  # [layers, intermediate, hidden]
    down: jax.Array  # [layers, hidden, intermediate]
    gate: jax.Array | None = None  # [layers, intermediate, hidden]
    attn_norm: jax.Array | None = None  # [layers, hidden]
    attn_post_norm: jax.Array | None = None  # [layers, hidden]
    mlp_norm: jax.Array | None = None  # [layers, hidden]
    mlp_post_norm: jax.Array | None = None  # [layers, hidden]
    q_norm: jax.Array | None = None  # [layers, head_dim], or [layers, num_heads * head_dim] for qk_norm="full"
    k_norm: jax.Array | None = None  # [layers, head_dim], or [layers, num_kv_heads * head_dim]
    q_bias: jax.Array | None = None  # [layers, num_heads * head_dim]
    k_bias: jax.Array | None = None  # [layers, num_kv_heads * head_dim]
    v_bias: jax.Array | None = None  # [layers, num_kv_heads * head_dim]
    o_bias: jax.Array | None = None  # [layers, hidden]
    gate_bias: jax.Array | None = None  # [layers, intermediate]
    up_bias: jax.Array | None = None  # [layers, intermediate]
    down_bias: jax.Array | None = None  # [layers, hidden]


@functools.partial(jax.tree_util.register_dataclass)
@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderWeights:
    """All weights of a decoder, by role."""

    embedding: jax.Array  # [vocab, hidden]
    layers: LayerWeights
    final_norm: jax.Array  # [hidden]
    head: jax.Array | None = None  # [vocab, hidden]; None when tied to the embedding

    @property
    def output_matrix(self) -> jax.Array:
        """The LM head, [vocab, hidden]: the embedding itself when tied."""
        return self.embedding if self.head is None else self.head


def layer_shapes(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """Shape of every per-layer role that `spec` has, without the layer axis. Other roles must be None."""
    hidden, inter, q, kv = spec.hidden_size, spec.intermediate_size, spec.q_size, spec.kv_size
    shapes: dict[str, tuple[int, ...]] = {
        "q": (q, hidden),
        "k": (kv, hidden),
        "v": (kv, hidden),
        "o": (hidden, q),
        "up": (inter, hidden),
        "down": (hidden, inter),
    }
    if spec.gated:
        shapes["gate"] = (inter, hidden)
    if spec.pre_norm:
        shapes |= {"attn_norm": (hidden,), "mlp_norm": (hidden,)}
    if spec.post_norm:
        shapes |= {"attn_post_norm": (hidden,), "mlp_post_norm": (hidden,)}
    if spec.qk_norm == "head":
        shapes |= {"q_norm": (spec.head_dim,), "k_norm": (spec.head_dim,)}
    elif spec.qk_norm == "full":
        shapes |= {"q_norm": (q,), "k_norm": (kv,)}
    if spec.qkv_bias:
        shapes |= {"q_bias": (q,), "k_bias": (kv,), "v_bias": (kv,)}
    if spec.o_bias:
        shapes["o_bias"] = (hidden,)
    if spec.mlp_bias:
        shapes |= {"up_bias": (inter,), "down_bias": (hidden,)}
        if spec.gated:
            shapes["gate_bias"] = (inter,)
    return shapes


def weight_shapes(spec: DecoderSpec) -> DecoderWeights:
    """The exact weights `spec` asks for, as `jax.ShapeDtypeStruct` leaves in spec.dtype."""

    def struct(*shape: int) -> Any:  # stands where an array will
        return jax.ShapeDtypeStruct(shape, jnp.dtype(spec.dtype))

    layers = {name: struct(spec.num_layers, *shape) for name, shape in layer_shapes(spec).items()}
    return DecoderWeights(
        embedding=struct(spec.vocab_size, spec.hidden_size),
        layers=LayerWeights(**layers),
        final_norm=struct(spec.hidden_size),
        head=None if spec.tied_head else struct(spec.vocab_size, spec.hidden_size),
    )


def check_weights(spec: DecoderSpec, weights: DecoderWeights) -> None:
    """Raises ValueError naming the first role that is missing, not expected, or of the wrong shape or dtype."""
    if not isinstance(weights, DecoderWeights) or not isinstance(weights.layers, LayerWeights):
        inside = "" if not isinstance(weights, DecoderWeights) else f" with layers of {type(weights.layers).__name__}"
        raise ValueError(
            f"weights are {type(weights).__name__}{inside}; expected DecoderWeights with LayerWeights in it, as "
            "model.decoder_weights() gives them"
        )
    for field, want in _roles(weight_shapes(spec)).items():
        have = _roles(weights).get(field)
        if want is None and have is not None:
            raise ValueError(f"weights have {field} {have.shape}, but the spec has no such part; pass None for it")
        if want is not None and have is None:
            raise ValueError(f"weights lack {field}; the spec asks for shape {want.shape}")
        if want is not None and have is not None and (have.shape != want.shape or have.dtype != want.dtype):
            raise ValueError(
                f"weights.{field} is {have.dtype}{list(have.shape)}; the spec asks for {want.dtype}{list(want.shape)}"
            )


def used_up(tree: Any) -> bool:
    """Whether some array in `tree` is gone, because it was donated to an earlier call."""
    leaves = jax.tree.leaves(tree)
    return any(isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and x.is_deleted() for x in leaves)


def _roles(weights: DecoderWeights) -> dict[str, jax.Array | None]:
    roles = {f"layers.{f.name}": getattr(weights.layers, f.name) for f in dataclasses.fields(LayerWeights)}
    return roles | {name: getattr(weights, name) for name in ("embedding", "final_norm", "head")}
