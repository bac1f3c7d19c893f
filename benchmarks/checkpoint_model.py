"""Writes a decoder as a Hugging Face checkpoint, so that transformers runs the very same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jax_monokernel import DecoderSpec, DecoderWeights, models

# The model type with these (qkv_bias, qk_norm).
_TYPES = {(False, None): "llama", (True, None): "qwen2", (False, "head"): "qwen3"}


def write_checkpoint(folder: Path, spec: DecoderSpec, weights: DecoderWeights) -> None:
    """Writes config.json and weights. Only for what a `Shape` can say: `save_pretrained` refuses the rest."""
    rope = spec.ropes[0]
    kind = _TYPES[spec.qkv_bias, spec.qk_norm]
    config: dict[str, Any] = {
        "model_type": kind,
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "hidden_act": spec.activation,
        "rms_norm_eps": spec.norm_eps,
        "rope_theta": rope.theta,
        "tie_word_embeddings": spec.tied_head,
        "max_position_embeddings": 131072,
        "dtype": spec.dtype,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if rope.scaling == "llama3":
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": rope.factor,
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_position,
        }
    models.save_pretrained(models.Decoder.from_weights(spec, weights), folder, config=config)
