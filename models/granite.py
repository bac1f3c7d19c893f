"""IBM Granite 3, dense (`model_type` granite): Llama with four multipliers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax_monokernel.models import common
from jax_monokernel.models.ropes import rope_from_config
from jax_monokernel.spec import DecoderSpec, DTypeName
from jax_monokernel.tensor_map import TensorMap

_DEFAULTS = common.LLAMA_DEFAULTS | {
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,  # in place of 1 / sqrt(head_dim), not on top of it
}


def spec_from_config(config: Mapping[str, Any], *, dtype: DTypeName) -> DecoderSpec:
    """What a Granite computes; raises ValueError naming any field that is not handled."""
    c = common.ConfigReader(config, _DEFAULTS)
    fields = common.common_fields(c, dtype)
    bias = c.boolean("attention_bias")
    spec = DecoderSpec(
        **fields,
        layers=common.uniform_layers(c, window=None),
        ropes=(rope_from_config(c, fields["head_dim"]),),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=c.boolean("mlp_bias"),
        attn_scale=c.number("attention_multiplier"),
        embedding_multiplier=c.number("embedding_multiplier"),
        residual_multiplier=c.number("residual_multiplier"),
        logit_multiplier=1.0 / c.number("logits_scaling"),
    )
    c.finish()
    return spec


def tensor_map(spec: DecoderSpec) -> TensorMap:
    """Checkpoint tensor name -> the parts it holds, along axis 0."""
    return common.tensors_by_name(spec)
