"""Gemma 3, text (`model_type` gemma3_text, and the text_config of gemma3).

Gemma 2 with norms over each query and key head in place of the attention soft-cap, and with ropes of their own for
sliding and full layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax_monokernel.models import common
from jax_monokernel.models.gemma2 import gemma_fields
from jax_monokernel.models.ropes import parse_rope
from jax_monokernel.spec import DecoderSpec, DTypeName, RopeSpec
from jax_monokernel.tensor_map import TensorMap

_DEFAULTS = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "rope_theta": 1_000_000.0,  # full layers
    "rope_local_base_freq": 10_000.0,  # sliding layers
}
# Fields beside text_config that concern images only.
_IMAGE_FIELDS = ("vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index", "image_token_index")
_IMAGE_TENSORS = ("model.vision_tower.", "model.multi_modal_projector.")


def spec_from_config(config: Mapping[str, Any], *, dtype: DTypeName) -> DecoderSpec:
    """What a Gemma 3 computes from text; raises ValueError naming any field that is not handled."""
    if "text_config" in config:
        config = _text_config(config)
    c = common.ConfigReader(config, _DEFAULTS)
    fields = gemma_fields(c, dtype)
    if "attn_logit_softcapping" in c:
        raise c.fail("attn_logit_softcapping", "null: Gemma 3 has no cap on attention scores (transformers ignores it)")
    # Every n-th layer is full. Files that give layer_types may keep n beside it, also under a private name.
    pattern = c.integer("sliding_window_pattern")
    c.ignore("_sliding_window_pattern")
    count = common.layer_count(c)
    kinds = common.layer_types(
        c, ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(count)]
    )
    by_kind = _ropes(c, fields["head_dim"])
    ropes, rope_of = common.unique_ropes({kind: by_kind[kind] for kind in sorted(set(kinds))})
    spec = DecoderSpec(
        **fields,
        layers=common.windowed_layers(c, kinds, c.optional_integer("sliding_window"), rope_of),
        ropes=ropes,
        qk_norm="head",
    )
    c.finish()
    return spec


def _ropes(c: common.ConfigReader, head_dim: int) -> dict[str, RopeSpec]:
    """Ropes by layer type. In the older spelling, rope_scaling and rope_theta are those of the full layers."""
    nested = common.ConfigReader(c.optional_object("rope_parameters") or {}, where=f"{c.where}: rope_parameters")
    params = {kind: dict(nested.optional_object(kind) or {}) for kind in ("full_attention", "sliding_attention")}
    nested.finish()
    scaling = c.optional_object("rope_scaling")
    full = params["full_attention"]
    if scaling and full and {**full, **scaling} != full:
        raise ValueError(f"{c.where}: rope_scaling and rope_parameters describe different ropes; keep one of them")
    full |= scaling or {}
    theta = {"full_attention": c.number("rope_theta"), "sliding_attention": c.number("rope_local_base_freq")}
    return {
        kind: parse_rope(
            common.ConfigReader(p, where=f"{c.where}: rope of {kind} layers"),
            head_dim,
            theta=theta[kind],
            max_position=c.integer("max_position_embeddings"),
        )
        for kind, p in params.items()
    }


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The text part of a config.json for text and images."""
    outer = common.ConfigReader(config)
    text = outer.optional_object("text_config") or {}
    outer.ignore(*_IMAGE_FIELDS)
    tied = outer.raw("tie_word_embeddings")
    outer.finish()
    if tied is None:
        return text
    if text.get("tie_word_embeddings", tied) != tied:
        raise outer.fail("tie_word_embeddings", "the same value as in text_config")
    return {**text, "tie_word_embeddings": tied}


def tensor_map(spec: DecoderSpec) -> TensorMap:
    """Checkpoint tensor name -> the parts it holds, along axis 0."""
    return common.tensors_by_name(spec, common.POST_NORM_NAMES)


def text_tensor_name(name: str) -> str | None:
    """`tensor_map`'s name for a tensor of a checkpoint for text and images; None for one that concerns images only.

    Such checkpoints call the text model language_model, with or without a "model." before or after it.
    """
    name = name.removeprefix("model.") if name.startswith(("model.language_model.", *_IMAGE_TENSORS)) else name
    if name.startswith(("vision_tower.", "multi_modal_projector.")):
        return None
    if not name.startswith("language_model."):
        return name
    name = name.removeprefix("language_model.")
    return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"
