"""SmolLM 3 (`model_type` smollm3): Llama in which some layers have no positions, and may have a sliding window."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax_monokernel.models import common
from jax_monokernel.models.ropes import rope_from_config
from jax_monokernel.spec import DecoderSpec, DTypeName, LayerSpec
from jax_monokernel.tensor_map import TensorMap

_DEFAULTS = {
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 11_008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "no_rope_layer_interval": 4,
    "tie_word_embeddings": True,
}


def spec_from_config(config: Mapping[str, Any], *, dtype: DTypeName) -> DecoderSpec:
    """What a SmolLM 3 computes; raises ValueError naming any field that is not handled."""
    c = common.ConfigReader(config, _DEFAULTS)
    fields = common.common_fields(c, dtype)
    bias = c.boolean("attention_bias")
    spec = DecoderSpec(
        **fields,
        layers=_layers(c),
        ropes=(rope_from_config(c, fields["head_dim"], theta=2_000_000.0),),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=c.boolean("mlp_bias"),
    )
    c.ignore("max_window_layers")  # in published files, without effect there
    c.finish()
    return spec


def _layers(c: common.ConfigReader) -> tuple[LayerSpec, ...]:
    count = common.layer_count(c)
    window = c.optional_integer("sliding_window")
    if not c.boolean("use_sliding_window"):
        window = None
    interval = c.integer("no_rope_layer_interval")
    has_rope = c.raw("no_rope_layers")  # despite its name, 1 stands for a layer with a rope
    if has_rope is None:
        has_rope = [int((i + 1) % interval != 0) for i in range(count)]
    if not isinstance(has_rope, list | tuple) or len(has_rope) < count or any(x not in (0, 1) for x in has_rope):
        raise c.fail("no_rope_layers", f"a list of 0 and 1 with an entry for each of the {count} layers")
    default = [
        "sliding_attention" if window is not None and not has_rope[i] else "full_attention" for i in range(count)
    ]
    layers = common.windowed_layers(c, common.layer_types(c, default), window)
    return tuple(
        layer if rope else dataclasses.replace(layer, rope=None)
        for layer, rope in zip(layers, has_rope[:count], strict=True)
    )


def tensor_map(spec: DecoderSpec) -> TensorMap:
    """Checkpoint tensor name -> the parts it holds, along axis 0."""
    return common.tensors_by_name(spec)
