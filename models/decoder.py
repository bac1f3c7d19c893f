"""The Flax NNX module behind every model family here: a `DecoderSpec` with parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_monokernel.forward import forward
from jax_monokernel.models.origin import Origin
from jax_monokernel.spec import DecoderSpec
from jax_monokernel.tokenizer import Tokenizer
from jax_monokernel.weights import DecoderWeights, LayerWeights, weight_shapes


class DecoderLayers(nnx.Module):
    """Every layer's parameters, stacked on a leading layer axis and named by role as in `LayerWeights`.

    Stacking keeps compile time independent of depth: prefill scans over the layers.
    """

    def __init__(self, **roles: jax.Array | jax.ShapeDtypeStruct):
        for name, value in roles.items():
            setattr(self, name, nnx.Param(value))

    def weights(self) -> LayerWeights:
        """The parameters' current values, by role."""
        present = {f.name: getattr(self, f.name, None) for f in dataclasses.fields(LayerWeights)}
        values: dict[str, Any] = {name: None if p is None else p[...] for name, p in present.items()}
        return LayerWeights(**values)


class Decoder(nnx.Module):
    """A decoder-only language model.

    Args:
      spec: what it computes.
      rngs: with a `params` stream, for the initial values: normal with standard deviation `init_scale`, ones for norm
        scales (zeros where the spec adds 1 to them), zeros for biases. Not needed with `weights`.
      init_scale: standard deviation of initial matrices and embeddings.
      weights: values to hold as they are, instead of initial ones.
      origin: where the weights came from.

    Raises:
      ValueError: neither rngs nor weights.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        *,
        rngs: nnx.Rngs | None = None,
        init_scale: float = 0.02,
        weights: DecoderWeights | None = None,
        origin: Origin | None = None,
    ):
        if weights is None:
            if rngs is None:
                raise ValueError("expected rngs, for initial values, or weights")
            weights = _initial_weights(spec, rngs, init_scale)
        self.spec = spec
        self.origin = origin
        self.embedding = nnx.Param(weights.embedding)
        self.final_norm = nnx.Param(weights.final_norm)
        self.head = None if weights.head is None else nnx.Param(weights.head)
        roles = {f.name: getattr(weights.layers, f.name) for f in dataclasses.fields(LayerWeights)}
        self.layers = DecoderLayers(**{name: value for name, value in roles.items() if value is not None})

    @classmethod
    def from_weights(cls, spec: DecoderSpec, weights: DecoderWeights, *, origin: Origin | None = None) -> Decoder:
        """A module that holds `weights` as they are, and where they came from."""
        return cls(spec, weights=weights, origin=origin)

    @property
    def config(self) -> dict[str, Any] | None:
        """The checkpoint's config.json (a new copy each time), or None for a model that was not loaded."""
        return None if self.origin is None else self.origin.config

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The checkpoint's tokenizer, read at first use; None where there is none.

        Raises:
          CheckpointError: its files are damaged.
        """
        return None if self.origin is None else self.origin.tokenizer

    @property
    def eos_token_id(self) -> tuple[int, ...]:
        """The tokens that end a text; empty for a model that was not loaded.

        Raises:
          CheckpointError: a file that names them is damaged.
        """
        return () if self.origin is None else self.origin.eos_token_id

    def decoder_weights(self) -> DecoderWeights:
        """The parameters' current values, by role."""
        return DecoderWeights(
            embedding=self.embedding[...],
            layers=self.layers.weights(),
            final_norm=self.final_norm[...],
            head=None if self.head is None else self.head[...],
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits f32 [batch, tokens, vocab] for int tokens [batch, tokens]."""
        return forward(self.spec, self.decoder_weights(), tokens)


def _initial_weights(spec: DecoderSpec, rngs: nnx.Rngs, scale: float) -> DecoderWeights:
    def initial(path: tuple, shape: jax.ShapeDtypeStruct) -> jax.Array:
        name = path[-1].name
        if name.endswith("norm"):
            return jnp.full(shape.shape, 1.0 - spec.norm_offset, shape.dtype)
        if name.endswith("bias"):
            return jnp.zeros(shape.shape, shape.dtype)
        return scale * jax.random.normal(rngs.params(), shape.shape, shape.dtype)

    return jax.tree_util.tree_map_with_path(initial, weight_shapes(spec))
