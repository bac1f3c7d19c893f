"""Golden cases as models of ours."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from golden import Golden
from jax_monokernel import DecoderSpec, DecoderWeights, LayerWeights
from jax_monokernel.models import Decoder
from jax_monokernel.models.registry import family_of
from jax_monokernel.tensor_map import TensorMap


def weights_from_tensors(spec: DecoderSpec, names: TensorMap, tensors: Mapping[str, np.ndarray]) -> DecoderWeights:
    """Weights by role in spec.dtype from checkpoint tensors."""
    by_role: dict[str, list[np.ndarray]] = {}
    for name, parts in names.items():
        row = 0
        for part in parts:
            rows = tensors[name][row : row + part.shape[0]]
            assert rows.shape == part.shape, (name, part)
            by_role.setdefault(part.role, []).append(rows)
            row += part.shape[0]
        assert row == len(tensors[name]), name
    dtype = jnp.dtype(spec.dtype)
    layers = {
        role.removeprefix("layers."): jnp.asarray(np.stack(rows), dtype)
        for role, rows in by_role.items()
        if role.startswith("layers.")
    }
    roles = {role: jnp.asarray(rows[0], dtype) for role, rows in by_role.items() if not role.startswith("layers.")}
    return DecoderWeights(layers=LayerWeights(**layers), **roles)


def golden_model(case: Golden, dtype: str = "float32") -> Decoder:
    """The case's model with its weights in `dtype`."""
    family = family_of(case.config)
    spec = family.spec_from_config(case.config, dtype=dtype)
    return Decoder.from_weights(spec, weights_from_tensors(spec, family.tensor_map(spec), case.tensors()))
