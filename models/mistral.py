"""Mistral 7B and its relatives (`model_type` mistral): Llama with one sliding window for every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax_monokernel.models import common
from jax_monokernel.models.ropes import rope_from_config
from jax_monokernel.spec import DecoderSpec, DTypeName
from jax_monokernel.tensor_map import TensorMap

_DEFAULTS = common.LLAMA_DEFAULTS | {
    "intermediate_size": 14_336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096 * 32,
    "sliding_window": 4096,  # newer checkpoints switch it off with null
}


def spec_from_config(config: Mapping[str, Any], *, dtype: DTypeName) -> DecoderSpec:
    """What a Mistral computes; raises ValueError naming any field that is not handled."""
    c = common.ConfigReader(config, _DEFAULTS)
    fields = common.common_fields(c, dtype)
    spec = DecoderSpec(
        **fields,
        layers=common.uniform_layers(c, window=c.optional_integer("sliding_window")),
        ropes=(rope_from_config(c, fields["head_dim"]),),
    )
    c.finish()
    return spec


def tensor_map(spec: DecoderSpec) -> TensorMap:
    """Checkpoint tensor name -> the parts it holds, along axis 0."""
    return common.tensors_by_name(spec)
