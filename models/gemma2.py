"""Gemma 2 (`model_type` gemma2): norms of weight + 1 on both sides of each block, soft-caps, alternating windows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_monokernel.models import common
from jax_monokernel.models.ropes import rope_from_config
from jax_monokernel.spec import DecoderSpec, DTypeName
from jax_monokernel.tensor_map import TensorMap

_DEFAULTS = {
    "vocab_size": 256_000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}


def spec_from_config(config: Mapping[str, Any], *, dtype: DTypeName) -> DecoderSpec:
    """What a Gemma 2 computes; raises ValueError naming any field that is not handled."""
    c = common.ConfigReader(config, _DEFAULTS)
    fields = gemma_fields(c, dtype)
    kinds = ["full_attention" if i % 2 else "sliding_attention" for i in range(common.layer_count(c))]
    spec = DecoderSpec(
        **fields,
        layers=common.windowed_layers(c, common.layer_types(c, kinds), c.optional_integer("sliding_window")),
        ropes=(rope_from_config(c, fields["head_dim"]),),
        attn_softcap=c.optional_number("attn_logit_softcapping"),
    )
    c.finish()
    return spec


def gemma_fields(c: common.ConfigReader, dtype: DTypeName) -> dict[str, Any]:
    """The arguments of `DecoderSpec` that Gemma 2 and 3 have in common."""
    fields = common.common_fields(c, dtype, activation="hidden_activation")
    c.ignore("hidden_act")  # in files from before hidden_activation, which wins
    bias = c.boolean("attention_bias")
    # The embeddings are multiplied by sqrt(hidden) as the weights' dtype holds it: 55.5 for 55.43 in bfloat16.
    multiplier = np.float32(fields["hidden_size"] ** 0.5).astype(jnp.dtype(dtype))
    return fields | {
        "norm_offset": 1.0,
        "post_norm": True,
        "qkv_bias": bias,
        "o_bias": bias,
        "attn_scale": c.number("query_pre_attn_scalar") ** -0.5,
        "embedding_multiplier": float(multiplier),
        "logit_softcap": c.optional_number("final_logit_softcapping"),
    }


def tensor_map(spec: DecoderSpec) -> TensorMap:
    """Checkpoint tensor name -> the parts it holds, along axis 0."""
    return common.tensors_by_name(spec, common.POST_NORM_NAMES)
