"""Flax NNX models that decode through the monokernel."""

from jax_monokernel.models.decoder import Decoder

__all__ = ["Decoder"]
