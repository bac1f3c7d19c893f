"""Qwen 3, dense (`model_type` qwen3): norms over each query and key head, optional biases, windows as in Qwen 2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax_monokernel.models import common, qwen2
from jax_monokernel.models.ropes import rope_from_config
from jax_monokernel.spec import DecoderSpec, DTypeName
from jax_monokernel.tensor_map import TensorMap

_DEFAULTS = qwen2.DEFAULTS | {"head_dim": 128}


def spec_from_config(config: Mapping[str, Any], *, dtype: DTypeName) -> DecoderSpec:
    """What a Qwen3 computes; raises ValueError naming any field that is not handled."""
    c = common.ConfigReader(config, _DEFAULTS)
    fields = common.common_fields(c, dtype)
    bias = c.boolean("attention_bias")
    spec = DecoderSpec(
        **fields,
        layers=qwen2.upper_window_layers(c),
        ropes=(rope_from_config(c, fields["head_dim"]),),
        qk_norm="head",
        qkv_bias=bias,
        o_bias=bias,
    )
    c.finish()
    return spec


def tensor_map(spec: DecoderSpec) -> TensorMap:
    """Checkpoint tensor name -> the parts it holds, along axis 0."""
    return common.tensors_by_name(spec)
