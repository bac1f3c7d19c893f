"""Tiny but adversarial configs, as config.json would hold them: every family, and every option at least once.

Sizes are odd on purpose: vocabularies that are no multiple of 8, head_dim that is not hidden / heads, every kind of
grouping. Prompts are longer than windows, and than the original context where a rope depends on it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Case:
    """One golden run.

    `matters` lists changes to the config; make_golden.py checks that each of them changes the logits, so that the case
    can fail if the option is lost.
    """

    config: Mapping[str, Any]
    prompt_length: int = 40
    embedding_std: float = 1.0
    matters: Sequence[Mapping[str, Any]] = ()


_SIZES = {"vocab_size": 101, "hidden_size": 48, "intermediate_size": 76, "num_hidden_layers": 3}
_HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2}


def _model(model_type: str, **fields: Any) -> dict[str, Any]:
    return {"model_type": model_type, **_SIZES, **_HEADS, **fields}


CASES: dict[str, Case] = {
    "llama": Case(
        _model("llama", rms_norm_eps=1e-3, rope_theta=500.0),
        matters=[{"rms_norm_eps": 1e-6}, {"rope_theta": 10000.0}],
    ),
    # As in the first Llama's config.json: no num_key_value_heads, no rope fields.
    "llama-old-head80": Case(
        {
            "model_type": "llama",
            "vocab_size": 67,
            "hidden_size": 240,
            "intermediate_size": 52,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "hidden_act": "gelu",
            "torch_dtype": "float16",
            "pad_token_id": -1,
        },
        prompt_length=20,
        matters=[{"hidden_act": "gelu_new"}],
    ),
    "llama-biases-llama3-tied": Case(
        _model(
            "llama",
            hidden_size=36,
            head_dim=16,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=True,
            rope_theta=500000.0,
            max_position_embeddings=512,
            rope_scaling={
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        ),
        embedding_std=0.2,
        matters=[{"rope_scaling": None}],
    ),
    "llama-linear": Case(
        _model("llama", hidden_act="relu", rope_scaling={"type": "linear", "factor": 2.5}),
        matters=[{"rope_scaling": None}],
    ),
    "llama-dynamic-long-prompt": Case(
        _model("llama", max_position_embeddings=24, rope_scaling={"type": "dynamic", "factor": 2.0}),
        matters=[{"rope_scaling": None}, {"max_position_embeddings": 30}],
    ),
    "llama-dynamic-crossing": Case(
        _model(
            "llama",
            head_dim=14,
            max_position_embeddings=50,
            rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 2000.0},
        ),
        prompt_length=20,
    ),
    "llama-yarn": Case(
        _model(
            "llama",
            head_dim=20,
            max_position_embeddings=128,
            rope_theta=1000.0,
            rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 4},
        ),
        matters=[{"rope_scaling": None}],
    ),
    "llama-yarn-mscale": Case(
        _model(
            "llama",
            head_dim=20,
            max_position_embeddings=160,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 5000.0,
                "factor": 5.0,
                "original_max_position_embeddings": 48,
                "beta_fast": 8,
                "beta_slow": 0.5,
                "mscale": 1.4,
                "mscale_all_dim": 0.6,
                "truncate": False,
            },
        ),
    ),
    "llama-longrope-crossing": Case(
        _model(
            "llama",
            head_dim=12,
            max_position_embeddings=200,
            rope_scaling={
                "rope_type": "longrope",
                "short_factor": [1.0, 1.1, 1.3, 1.2, 1.5, 1.7],
                "long_factor": [1.4, 2.0, 3.0, 4.5, 7.0, 9.0],
                "original_max_position_embeddings": 50,
            },
        ),
        prompt_length=20,
    ),
    "mistral": Case(
        _model("mistral", num_attention_heads=4, num_key_value_heads=1, head_dim=10, sliding_window=13),
        matters=[{"sliding_window": None}, {"sliding_window": 14}],
    ),
    "mistral-no-window": Case(
        {
            "model_type": "mistral",
            **_SIZES,
            "num_attention_heads": 8,
            "sliding_window": None,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
        },
        matters=[{"sliding_window": 13}],
    ),
    "qwen2": Case(
        _model("qwen2", sliding_window=7, use_sliding_window=False, max_window_layers=1, tie_word_embeddings=True),
        embedding_std=0.2,
        matters=[{"use_sliding_window": True}],
    ),
    "qwen2-window-yarn": Case(
        _model(
            "qwen2",
            num_hidden_layers=4,
            num_key_value_heads=3,
            sliding_window=9,
            use_sliding_window=True,
            max_window_layers=2,
            max_position_embeddings=32,
            rope_theta=1000000.0,
            rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        ),
        matters=[{"use_sliding_window": False}, {"max_window_layers": 1}, {"rope_scaling": None}],
    ),
    "qwen3": Case(
        _model("qwen3", head_dim=24, attention_bias=True, rope_theta=1000000.0, rms_norm_eps=1e-4),
    ),
    "qwen3-layer-types-yarn": Case(
        _model(
            "qwen3",
            num_key_value_heads=6,
            head_dim=18,
            use_sliding_window=True,
            sliding_window=11,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            max_position_embeddings=256,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 3000.0,
                "factor": 3.0,
                "original_max_position_embeddings": 40,
                "attention_factor": 1.3,
            },
        ),
        matters=[{"layer_types": None}],
    ),
    "gemma2-head256": Case(
        _model(
            "gemma2",
            hidden_size=32,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=256,
            query_pre_attn_scalar=144,
            sliding_window=8,
            attn_logit_softcapping=3.0,
            final_logit_softcapping=5.0,
            hidden_act="gelu_pytorch_tanh",
        ),
        embedding_std=0.1,
        matters=[
            {"query_pre_attn_scalar": 256},
            {"attn_logit_softcapping": None},
            {"final_logit_softcapping": None},
            {"sliding_window": 9},
            {"hidden_activation": "gelu"},
        ],
    ),
    "gemma2-options": Case(
        _model(
            "gemma2",
            head_dim=12,
            query_pre_attn_scalar=12,
            sliding_window=10,
            attn_logit_softcapping=None,
            final_logit_softcapping=None,
            attention_bias=True,
            tie_word_embeddings=False,
            hidden_activation="gelu",
            layer_types=["full_attention", "sliding_attention", "sliding_attention"],
            rope_parameters={"rope_type": "linear", "factor": 3.0, "rope_theta": 8000.0},
        ),
        embedding_std=0.2,
        matters=[{"layer_types": None}],
    ),
    "gemma3": Case(
        {
            "model_type": "gemma3_text",
            "vocab_size": 101,
            "hidden_size": 40,
            "intermediate_size": 60,
            "num_hidden_layers": 4,
            "head_dim": 16,
            "query_pre_attn_scalar": 10,
            "sliding_window": 12,
            "sliding_window_pattern": 3,
            "rope_theta": 20000.0,
            "rope_local_base_freq": 100.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "final_logit_softcapping": 6.0,
            "cache_implementation": "hybrid",
        },
        embedding_std=0.1,
        matters=[
            {"rope_scaling": None},
            {"rope_local_base_freq": 10000.0},
            {"rope_theta": 1000000.0},
            {"sliding_window_pattern": 6},
            {"final_logit_softcapping": None},
        ],
    ),
    "gemma3-nested-ropes": Case(
        _model(
            "gemma3_text",
            head_dim=16,
            sliding_window=9,
            attention_bias=True,
            tie_word_embeddings=False,
            max_position_embeddings=30,
            layer_types=["sliding_attention", "full_attention", "full_attention"],
            rope_parameters={
                "full_attention": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 5000.0},
                "sliding_attention": {
                    "rope_type": "yarn",
                    "factor": 2.0,
                    "rope_theta": 200.0,
                    "original_max_position_embeddings": 20,
                },
            },
        ),
        embedding_std=0.1,
    ),
    "phi3-partial-head96": Case(
        {
            "model_type": "phi3",
            "vocab_size": 91,
            "hidden_size": 192,
            "intermediate_size": 36,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "partial_rotary_factor": 0.75,
            "sliding_window": 15,
            "tie_word_embeddings": True,
            "resid_pdrop": 0.1,
        },
        embedding_std=0.1,
        matters=[{"partial_rotary_factor": 1.0}, {"sliding_window": None}],
    ),
    "phi3-longrope-long": Case(
        _model(
            "phi3",
            max_position_embeddings=256,
            original_max_position_embeddings=32,
            rope_scaling={
                "type": "longrope",
                "short_factor": [1.0, 1.2, 1.4, 1.6],
                "long_factor": [1.5, 2.5, 4.0, 8.0],
            },
        ),
        matters=[{"original_max_position_embeddings": 64}, {"rope_scaling": None}],
    ),
    "phi3-longrope-short-partial": Case(
        _model(
            "phi3",
            num_attention_heads=3,
            num_key_value_heads=3,
            max_position_embeddings=512,
            original_max_position_embeddings=128,
            partial_rotary_factor=0.75,
            rope_scaling={
                "type": "longrope",
                "short_factor": [1.0, 1.2, 1.4, 1.6, 1.3, 1.9],
                "long_factor": [1.5, 2.5, 4.0, 8.0, 9.0, 9.5],
            },
        ),
        prompt_length=30,
        matters=[{"max_position_embeddings": 256}, {"rope_scaling": None}],
    ),
    "olmo2": Case(
        _model("olmo2", attention_bias=True, rope_theta=500000.0, rms_norm_eps=1e-3),
        matters=[{"rms_norm_eps": 1e-6}],
    ),
    "olmo2-old": Case(
        {
            "model_type": "olmo2",
            "vocab_size": 77,
            "hidden_size": 50,
            "intermediate_size": 34,
            "num_hidden_layers": 3,
            "num_attention_heads": 5,
            "tie_word_embeddings": True,
            "rope_scaling": None,
        },
        embedding_std=0.2,
    ),
    "smollm3": Case(
        _model("smollm3", num_hidden_layers=4, no_rope_layer_interval=2, max_window_layers=28, pretraining_tp=2),
        embedding_std=0.2,
        matters=[{"no_rope_layer_interval": 4}, {"rope_theta": 10000.0}],
    ),
    "smollm3-window-biases": Case(
        _model(
            "smollm3",
            head_dim=22,
            no_rope_layers=[1, 0, 1, 1],
            use_sliding_window=True,
            sliding_window=6,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 700.0},
        ),
        matters=[{"no_rope_layers": [1, 1, 0, 1]}, {"sliding_window": 7}],
    ),
    "granite": Case(
        _model(
            "granite",
            embedding_multiplier=12.0,
            logits_scaling=8.0,
            residual_multiplier=0.22,
            attention_multiplier=0.3,
            attention_bias=True,
            mlp_bias=True,
        ),
        embedding_std=0.1,
        matters=[
            {"embedding_multiplier": 1.0},
            {"logits_scaling": 1.0},
            {"residual_multiplier": 1.0},
            {"attention_multiplier": 0.35},
        ],
    ),
    # attention_multiplier left out: it is 1 then, not 1 / sqrt(head_dim).
    "granite-dynamic-tied": Case(
        _model(
            "granite",
            tie_word_embeddings=True,
            max_position_embeddings=30,
            rope_parameters={"rope_type": "dynamic", "factor": 3.0, "rope_theta": 10000.0},
        ),
        embedding_std=0.2,
        matters=[{"attention_multiplier": 8**-0.5}],
    ),
}
