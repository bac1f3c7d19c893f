"""Qwen 2 and 2.5 (`model_type` qwen2): Llama with q, k and v biases and optional windows in the upper layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax_monokernel.models import common
from jax_monokernel.models.ropes import rope_from_config
from jax_monokernel.spec import DecoderSpec, DTypeName, LayerSpec
from jax_monokernel.tensor_map import TensorMap

DEFAULTS = {
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 22_016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def spec_from_config(config: Mapping[str, Any], *, dtype: DTypeName) -> DecoderSpec:
    """What a Qwen2 computes; raises ValueError naming any field that is not handled."""
    c = common.ConfigReader(config, DEFAULTS)
    fields = common.common_fields(c, dtype)
    if c.raw("attention_bias") not in (None, True):
        raise c.fail("attention_bias", "true or no such field: Qwen2 always has q, k and v biases")
    spec = DecoderSpec(
        **fields,
        layers=upper_window_layers(c),
        ropes=(rope_from_config(c, fields["head_dim"]),),
        qkv_bias=True,
    )
    c.finish()
    return spec


def upper_window_layers(c: common.ConfigReader) -> tuple[LayerSpec, ...]:
    """Full attention, and sliding windows from layer max_window_layers on where use_sliding_window says so."""
    window = c.optional_integer("sliding_window")
    if not c.boolean("use_sliding_window"):
        window = None
    first = c.integer("max_window_layers", minimum=0)
    default = [
        "sliding_attention" if window is not None and i >= first else "full_attention"
        for i in range(common.layer_count(c))
    ]
    return common.windowed_layers(c, common.layer_types(c, default), window)


def tensor_map(spec: DecoderSpec) -> TensorMap:
    """Checkpoint tensor name -> the parts it holds, along axis 0."""
    return common.tensors_by_name(spec)
