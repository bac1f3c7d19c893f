"""Hugging Face checkpoint folders: which tensor holds which weights, loading them and saving them back."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Part:
    """A run of rows (axis 0) of one checkpoint tensor: one role's weights, of one layer where the role has layers.

    A tensor map gives, per tensor name, the parts it holds in order; their shapes agree in every axis but the first.
    """

    role: str  # "embedding", "final_norm", "head", or "layers.<name>" as in `LayerWeights`
    layer: int | None  # index of the layer; None for a role outside the layers
    shape: tuple[int, ...]  # without the layer axis
