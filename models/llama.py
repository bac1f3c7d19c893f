"""Llama 1 to 3.3 and models with the same mathematics (`model_type` llama)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax_monokernel.models import common
from jax_monokernel.models.ropes import rope_from_config
from jax_monokernel.spec import DecoderSpec, DTypeName
from jax_monokernel.tensor_map import TensorMap


def spec_from_config(config: Mapping[str, Any], *, dtype: DTypeName) -> DecoderSpec:
    """What a Llama computes; raises ValueError naming any field that is not handled."""
    c = common.ConfigReader(config, common.LLAMA_DEFAULTS)
    fields = common.common_fields(c, dtype)
    bias = c.boolean("attention_bias")
    spec = DecoderSpec(
        **fields,
        layers=common.uniform_layers(c, window=None),
        ropes=(rope_from_config(c, fields["head_dim"]),),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=c.boolean("mlp_bias"),
    )
    c.finish()
    return spec


def tensor_map(spec: DecoderSpec) -> TensorMap:
    """Checkpoint tensor name -> the parts it holds, along axis 0."""
    return common.tensors_by_name(spec)
