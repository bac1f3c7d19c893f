"""Reading config.json: spellings, defaults, and refusal of whatever is not handled."""

from __future__ import annotations

import contextlib
import json
import math

import golden
import numpy as np
import pytest
from golden.cases import CASES
from hypothesis import given, settings
from hypothesis import strategies as st
from published import PUBLISHED

from jax_monokernel.models.registry import FAMILIES, canonical_name, family_of
from jax_monokernel.rope import inverse_frequencies
from jax_monokernel.tensor_map import tensor_shapes


def spec_of(config, dtype="bfloat16"):
    return family_of(config).spec_from_config(config, dtype=dtype)


def base(model_type, **fields):
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4}
    return {"model_type": model_type, **sizes, **fields}


@pytest.mark.parametrize("name", CASES)
def test_specs_are_equal_whether_hand_written_or_written_back_by_transformers(name):
    # The saved form has rope_parameters, layer_types and every default spelled out.
    case = golden.read(name)
    saved = spec_of(case.saved_config)
    assert saved == spec_of(case.config)
    assert hash(saved) == hash(spec_of(case.config))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_understood(name):
    config = json.loads(json.dumps(PUBLISHED[name]))
    spec = spec_of(config)
    text = config.get("text_config", config)
    assert (spec.hidden_size, spec.num_layers) == (text["hidden_size"], text["num_hidden_layers"])
    assert tensor_shapes(spec, family_of(config).tensor_map(spec))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Llama-2-7b-hf", {"tied_head": False, "norm_eps": 1e-5, "attn_scale": 1 / math.sqrt(128)}),
        ("Llama-3.2-1B", {"tied_head": True, "head_dim": 64, "num_kv_heads": 8}),
        ("Qwen2.5-0.5B", {"qkv_bias": True, "o_bias": False, "tied_head": True}),
        ("Qwen3-0.6B", {"qk_norm": "head", "head_dim": 128, "qkv_bias": False}),
        (
            "gemma-2-2b",
            {
                "attn_softcap": 50.0,
                "logit_softcap": 30.0,
                "attn_scale": 1 / 16,
                "activation": "gelu_tanh",
                "post_norm": True,
            },
        ),
        # sqrt(2560) = 50.596 is 50.5 in bfloat16.
        ("gemma-3-4b-pt", {"num_heads": 8, "num_kv_heads": 4, "head_dim": 256, "embedding_multiplier": 50.5}),
        ("Phi-4-mini-instruct", {"rotary_dim": 96, "head_dim": 128}),
        ("OLMo-2-1124-7B", {"pre_norm": False, "post_norm": True, "qk_norm": "full"}),
        (
            "granite-3.3-2b-instruct",
            {
                "embedding_multiplier": 12.0,
                "residual_multiplier": 0.22,
                "attn_scale": 0.015625,
                "logit_multiplier": 0.125,
            },
        ),
    ],
)
def test_published_configs_mean_what_their_authors_say(name, expected):
    spec = spec_of(PUBLISHED[name])
    assert {field: getattr(spec, field) for field in expected} == expected


def test_window_and_rope_per_layer_follow_each_familys_rule():
    def kinds(config):
        spec = spec_of(config)
        return [(layer.window, None if layer.rope is None else spec.ropes[layer.rope].theta) for layer in spec.layers]

    assert kinds(base("mistral")) == [(4096, 1e4)] * 4
    assert kinds(base("mistral", sliding_window=None)) == [(None, 1e4)] * 4
    assert kinds(base("qwen2", sliding_window=7)) == [(None, 1e4)] * 4
    window = {"use_sliding_window": True, "sliding_window": 7}
    assert kinds(base("qwen2", max_window_layers=3, **window)) == [(None, 1e4)] * 3 + [(7, 1e4)]
    assert kinds(base("gemma2", sliding_window=5)) == [(5, 1e4), (None, 1e4)] * 2
    assert kinds(base("gemma3_text", sliding_window_pattern=3)) == [
        (4096, 1e4),
        (4096, 1e4),
        (None, 1e6),
        (4096, 1e4),
    ]
    assert kinds(base("smollm3", **window)) == [(None, 2e6)] * 3 + [(7, None)]
    assert kinds(base("smollm3", no_rope_layers=[0, 1, 0, 1])) == [(None, None), (None, 2e6)] * 2


@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", 55.5), ("float32", float(np.float32(3072**0.5)))])
def test_gemmas_embedding_multiplier_is_rounded_to_the_weights_dtype(dtype, expected):
    assert spec_of(base("gemma2", hidden_size=3072), dtype).embedding_multiplier == expected


def test_the_text_part_of_a_config_for_images_is_the_text_model():
    text = {"model_type": "gemma3_text", "hidden_size": 32, "num_hidden_layers": 7, "num_attention_heads": 4}
    outer = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 8}, "mm_tokens_per_image": 4}
    assert spec_of(outer) == spec_of(text)
    assert not spec_of({**outer, "tie_word_embeddings": False}).tied_head
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        spec_of({**outer, "tie_word_embeddings": False, "text_config": {**text, "tie_word_embeddings": True}})
    with pytest.raises(ValueError, match="quantization_config"):
        spec_of({**outer, "quantization_config": {"bits": 4}})


@pytest.mark.parametrize(
    ("stored", "canonical"),
    [
        ("language_model.model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("model.language_model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("vision_tower.vision_model.embeddings.patch_embedding.weight", None),
        ("model.vision_tower.vision_model.embeddings.patch_embedding.weight", None),
        ("multi_modal_projector.mm_soft_emb_norm.weight", None),
        ("model.multi_modal_projector.mm_soft_emb_norm.weight", None),
    ],
)
def test_tensors_of_a_checkpoint_for_images_are_found_under_their_text_names(stored, canonical):
    assert canonical_name("gemma3", stored) == canonical
    assert canonical_name("gemma3_text", stored) == stored


# Ropes. Each pair says the same in two ways.
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [2.0, 3.0, 4.0, 5.0]}
SAME_ROPES = {
    "theta in rope_parameters": (
        base("llama", rope_theta=500.0),
        base("llama", rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    ),
    "type and rope_type": (
        base("llama", rope_scaling={"type": "linear", "factor": 2}),
        base("llama", rope_scaling={"rope_type": "linear", "factor": 2.0}),
    ),
    "empty rope_scaling": (base("llama", rope_scaling={}), base("llama")),
    "both spellings, in agreement": (
        base("llama", rope_theta=9.0, rope_scaling={"type": "linear", "factor": 2.0}),
        base(
            "llama",
            rope_theta=9.0,
            rope_scaling={"type": "linear", "factor": 2.0},
            rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 9.0},
        ),
    ),
    "the original length defaults to the model's": (
        base("llama", max_position_embeddings=64, rope_scaling={"type": "yarn", "factor": 2.0}),
        base("llama", rope_scaling={"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}),
    ),
    "the top level's original length wins": (
        base(
            "llama",
            original_max_position_embeddings=64,
            rope_scaling={"type": "llama3", "original_max_position_embeddings": 32, **LLAMA3},
        ),
        base("llama", rope_scaling={"type": "llama3", "original_max_position_embeddings": 64, **LLAMA3}),
    ),
    "the factor defaults to the ratio of lengths": (
        base(
            "llama", max_position_embeddings=256, rope_scaling={"type": "yarn", "original_max_position_embeddings": 64}
        ),
        base("llama", rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}),
    ),
    "phi3's older name for longrope": (
        base("phi3", max_position_embeddings=9000, rope_scaling={"type": "su", **LONG}),
        base("phi3", max_position_embeddings=9000, rope_scaling={"type": "longrope", **LONG}),
    ),
    "gemma3's ropes by layer type": (
        base(
            "gemma3_text", rope_theta=100.0, rope_local_base_freq=10.0, rope_scaling={"type": "linear", "factor": 8.0}
        ),
        base(
            "gemma3_text",
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 100.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
            },
        ),
    ),
}


@pytest.mark.parametrize("name", SAME_ROPES)
def test_one_rope_in_two_spellings_gives_one_spec(name):
    one, other = SAME_ROPES[name]
    assert spec_of(one) == spec_of(other)


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"factor": 4.0}, 0.1 * math.log(4) + 1),
        ({"factor": 4.0, "attention_factor": 1.7}, 1.7),
        ({"factor": 4.0, "mscale": 2.0}, 0.1 * math.log(4) + 1),
        ({"factor": 4.0, "mscale": 2.0, "mscale_all_dim": 0.5}, (0.2 * math.log(4) + 1) / (0.05 * math.log(4) + 1)),
        ({"factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.7}, 1.0),
        ({"factor": 1.0}, 1.0),
    ],
)
def test_yarns_attention_factor(scaling, expected):
    scaling = {"type": "yarn", "original_max_position_embeddings": 64, **scaling}
    assert spec_of(base("llama", rope_scaling=scaling)).ropes[0].attention_factor == pytest.approx(expected, rel=1e-12)


def test_frequencies_are_finite_for_every_golden_rope():
    for name in CASES:
        for rope in spec_of(golden.read(name).config).ropes:
            inv = inverse_frequencies(rope)
            assert inv.dtype == np.float32
            assert np.isfinite(inv).all()
            assert (inv > 0).all()


# What must be refused, with the field's name in the message.
UNSUPPORTED = {
    "quantization_config": {"quant_method": "gptq"},
    "per_layer_config": {"0": {"head_dim": 4}},
    "some_new_idea": 3,
    "some_switch": False,
    "clip_qkv": 8.0,
    "is_encoder_decoder": True,
    "rope_interleaved": True,
    "use_bidirectional_attention": True,
    "num_local_experts": 8,
}
PER_FAMILY = [
    ("llama", "sliding_window", 4096),
    ("llama", "layer_types", ["full_attention", "sliding_attention"] * 2),
    ("llama", "partial_rotary_factor", 0.5),
    ("llama", "attn_logit_softcapping", 30.0),
    ("mistral", "attention_bias", True),
    ("mistral", "use_sliding_window", False),
    ("mistral", "layer_types", ["full_attention"] * 4),
    ("qwen2", "attention_bias", False),
    ("qwen2", "mlp_bias", True),
    ("qwen2", "layer_types", ["sliding_attention"] * 4),
    ("qwen3", "use_qk_norm", False),
    ("gemma2", "rope_local_base_freq", 10000.0),
    ("gemma2", "sliding_window", None),
    ("gemma3_text", "attn_logit_softcapping", 50.0),
    ("gemma3_text", "mlp_bias", True),
    ("gemma3_text", "rope_parameters", {"rope_type": "linear", "factor": 2.0}),
    ("phi3", "attention_bias", True),
    ("phi3", "lm_head_bias", True),
    ("phi3", "rope_scaling", {"type": "linear", "factor": 2.0}),
    ("olmo2", "mlp_bias", True),
    ("smollm3", "layer_types", ["sliding_attention"] * 4),
    ("granite", "sliding_window", 128),
]


@pytest.mark.parametrize("field", UNSUPPORTED)
@pytest.mark.parametrize("model_type", sorted(FAMILIES.keys() - {"gemma3"}))
def test_fields_that_may_change_the_mathematics_are_refused_by_name(model_type, field):
    with pytest.raises(ValueError, match=field):
        spec_of(base(model_type, **{field: UNSUPPORTED[field]}))


@pytest.mark.parametrize(("model_type", "field", "value"), PER_FAMILY, ids=lambda x: x if isinstance(x, str) else "")
def test_fields_that_a_family_cannot_have_are_refused_by_name(model_type, field, value):
    with pytest.raises(ValueError, match=field):
        spec_of(base(model_type, **{field: value}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", "4096"),
        ("hidden_size", None),
        ("hidden_size", 0),
        ("hidden_size", True),
        ("hidden_size", 30),
        ("num_hidden_layers", 10**9),
        ("num_attention_heads", 2.0),
        ("num_key_value_heads", 0),
        ("head_dim", -4),
        ("rms_norm_eps", math.nan),
        ("rms_norm_eps", -1e-6),
        ("rope_theta", math.inf),
        ("rope_theta", 10**400),
        ("rope_theta", 1e-300),
        ("rope_theta", 0),
        ("hidden_act", "quick_gelu"),
        ("hidden_act", None),
        ("hidden_act", ["silu"]),
        ("tie_word_embeddings", 1),
        ("attention_bias", "yes"),
        ("rope_scaling", [1]),
        ("max_position_embeddings", "long"),
    ],
)
def test_values_of_the_wrong_kind_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        spec_of(base("llama", **{field: value}))


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"type": "mrope", "mrope_section": [1, 1, 2]}, "mrope"),
        ({"rope_type": "linear", "type": "dynamic", "factor": 2.0}, "linear.*dynamic"),
        ({"type": "linear"}, "factor"),
        ({"type": "linear", "factor": -1.0}, "factor"),
        ({"type": "linear", "factor": 2.0, "beta_fast": 3}, "beta_fast"),
        ({"type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}, "high_freq_factor"),
        ({"type": "llama3", "factor": 2.0, "low_freq_factor": 1.0}, "high_freq_factor"),
        ({"type": "yarn", "factor": 2.0, "rope_theta": 1.0}, "rope_theta"),
        ({"type": "yarn", "factor": 2.0, "truncate": "no"}, "truncate"),
        ({"type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 4}, "short_factor"),
        ({"type": "longrope", "short_factor": [1.0] * 4}, "long_factor"),
        ({"type": "longrope", "short_factor": [0.0] * 4, "long_factor": [1.0] * 4}, "short_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
def test_ropes_that_make_no_sense_are_refused_by_name(field, scaling, message):
    with pytest.raises(ValueError, match=message):
        spec_of(base("llama", **{field: scaling}))


def test_two_ropes_that_disagree_are_refused():
    config = base("llama", rope_scaling={"type": "linear", "factor": 2.0}, rope_parameters={"rope_theta": 5.0})
    with pytest.raises(ValueError, match=r"rope_scaling and rope_parameters"):
        spec_of(config)


@pytest.mark.parametrize("factor", [0.01, 0.85, 1.5])
def test_a_rotated_part_of_no_even_number_of_dimensions_is_refused(factor):
    # Of heads of 8: 0, 6.8 -> 6 dimensions would do, so heads of 10 give 8.5 -> 8; 7 of 9 is odd.
    config = base("phi3", head_dim=9, partial_rotary_factor=factor)
    with pytest.raises(ValueError, match="partial_rotary_factor"):
        spec_of(config)


@pytest.mark.parametrize("config", [{}, {"model_type": None}, {"model_type": "gpt2"}, {"model_type": ["llama"]}])
def test_unknown_model_types_are_refused_with_the_list_of_known_ones(config):
    with pytest.raises(ValueError, match="model_type") as error:
        family_of(config)
    assert all(name in str(error.value) for name in FAMILIES)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.just(10**400) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
_FIELDS = sorted({key for case in CASES.values() for key in case.config} - {"model_type", "num_hidden_layers"})
_ROPE_FIELDS = sorted(
    {
        key
        for case in CASES.values()
        for name in ("rope_scaling", "rope_parameters")
        for key in (case.config.get(name) or {})
    }
)


@settings(max_examples=300, deadline=None)
@given(
    model_type=st.sampled_from(sorted(FAMILIES)),
    fields=st.dictionaries(st.sampled_from(_FIELDS), _JSON, max_size=3),
    rope=st.dictionaries(
        st.sampled_from(_ROPE_FIELDS), _JSON | st.sampled_from(["yarn", "llama3", "dynamic"]), max_size=4
    ),
    nested=st.booleans(),
)
def test_any_json_gives_a_spec_or_a_value_error(model_type, fields, rope, nested):
    config = {**base(model_type), **fields, "rope_scaling": rope}
    if nested:
        config = {"model_type": model_type, "text_config": config}
    with contextlib.suppress(ValueError):
        assert hash(spec_of(config)) == hash(spec_of(config))
