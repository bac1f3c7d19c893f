"""Flax NNX models that decode through the monokernel."""

from jax_monokernel.models.decoder import Decoder
from jax_monokernel.models.loading import from_pretrained, save_pretrained

__all__ = ["Decoder", "from_pretrained", "save_pretrained"]
