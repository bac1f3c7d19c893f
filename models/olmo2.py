"""OLMo 2 (`model_type` olmo2): norms after each block instead of before, and over all query or key heads at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax_monokernel.models import common
from jax_monokernel.models.ropes import rope_from_config
from jax_monokernel.spec import DecoderSpec, DTypeName
from jax_monokernel.tensor_map import TensorMap

_DEFAULTS = common.LLAMA_DEFAULTS | {"vocab_size": 50_304, "rms_norm_eps": 1e-5}


def spec_from_config(config: Mapping[str, Any], *, dtype: DTypeName) -> DecoderSpec:
    """What an OLMo 2 computes; raises ValueError naming any field that is not handled."""
    c = common.ConfigReader(config, _DEFAULTS)
    fields = common.common_fields(c, dtype)
    bias = c.boolean("attention_bias")
    spec = DecoderSpec(
        **fields,
        layers=common.uniform_layers(c, window=None),
        ropes=(rope_from_config(c, fields["head_dim"]),),
        pre_norm=False,
        post_norm=True,
        qk_norm="full",
        qkv_bias=bias,
        o_bias=bias,
    )
    c.finish()
    return spec


def tensor_map(spec: DecoderSpec) -> TensorMap:
    """Checkpoint tensor name -> the parts it holds, along axis 0."""
    return common.tensors_by_name(spec, common.POST_NORM_NAMES)
