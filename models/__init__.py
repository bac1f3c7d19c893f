"""Flax NNX models that decode through the monokernel."""

from pathlib import Path

import jax_monokernel
from jax_monokernel.models.decoder import Decoder
from jax_monokernel.models.loading import from_pretrained, save_pretrained

# The model that comes with the package: 7 million parameters that write Python-like text (its README.md tells more).
SMALL = Path(jax_monokernel.__file__).parent / "data" / "small"

__all__ = ["SMALL", "Decoder", "from_pretrained", "save_pretrained"]
