"""Side by side with Hugging Face transformers, where torch and transformers are installed."""

from __future__ import annotations

import json
import warnings

import golden
import jax.numpy as jnp
import numpy as np
import pytest
from golden.cases import CASES
from golden.models import quick_jit, weights_from_tensors
from published import PUBLISHED

from jax_monokernel.forward import forward
from jax_monokernel.models.registry import FAMILIES, family_of
from jax_monokernel.rope import cos_sin

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # theirs, at import
    torch = pytest.importorskip("torch", reason="compares with transformers, which needs torch")
    transformers = pytest.importorskip("transformers", minversion="5", reason="compares with transformers 5")
    from golden import make_golden

pytestmark = pytest.mark.filterwarnings("ignore")

SEED = 12345  # not one of the golden seeds
ROWS = 4  # prompts per case
# One case or more per family, together with every kind of option that rounding could treat differently.
BF16_CASES = [
    "llama",
    "llama-biases-llama3-tied",
    "mistral",
    "qwen2-window-yarn",
    "qwen3",
    "gemma2-head256",
    "gemma3",
    "phi3-longrope-long",
    "olmo2",
    "smollm3-window-biases",
    "granite",
]


def their_config(config):
    return transformers.CONFIG_MAPPING[config["model_type"]](**{k: v for k, v in config.items() if k != "model_type"})


@torch.no_grad()
def their_logits(config, tensors, prompts, dtype):
    model = make_golden.build(config, dtype)
    make_golden.fill(model, tensors)
    return model(torch.tensor(prompts), use_cache=False).logits.float().numpy()


def our_logits(config, tensors, prompts, dtype):
    family = family_of(config)
    spec = family.spec_from_config(config, dtype=dtype)
    weights = weights_from_tensors(spec, family.tensor_map(spec), tensors)
    return np.asarray(quick_jit(forward, static_argnums=0)(spec, weights, jnp.array(prompts)))


@pytest.mark.parametrize("name", BF16_CASES)
def test_bfloat16_is_as_close_to_the_truth_as_transformers(name):
    config = dict(CASES[name].config)
    tensors = golden.case_tensors(name, golden.read(name).shapes, SEED)
    prompts = [golden.case_prompt(name, SEED + row) for row in range(ROWS)]
    truth = their_logits(config, tensors, prompts, torch.float32)
    scale = np.abs(truth).max()

    np.testing.assert_allclose(our_logits(config, tensors, prompts, "float32"), truth, rtol=0, atol=2e-5 * scale)

    def error(logits):
        return float(np.sqrt(np.mean((logits - truth) ** 2)) / scale)

    theirs = error(their_logits(config, tensors, prompts, torch.bfloat16))
    ours = error(our_logits(config, tensors, prompts, "bfloat16"))
    print(f"{name}: root mean square error {ours:.2e}, transformers {theirs:.2e}, ratio {ours / theirs:.2f}")
    assert ours <= 1.5 * theirs


@pytest.mark.parametrize("model_type", sorted(FAMILIES.keys() - {"gemma3"}))
def test_fields_that_a_file_leaves_out_have_the_same_defaults(model_type):
    # A saved default config spells everything out.
    saved = json.loads(their_config({"model_type": model_type}).to_json_string(use_diff=False))
    left_out = FAMILIES[model_type].spec_from_config({"model_type": model_type}, dtype="bfloat16")
    assert FAMILIES[model_type].spec_from_config(saved, dtype="bfloat16") == left_out


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_mean_the_same_as_transformers_saves_them(name):
    family = family_of(PUBLISHED[name])
    saved = json.loads(their_config(PUBLISHED[name]).to_json_string(use_diff=False))
    assert family.spec_from_config(saved, dtype="bfloat16") == family.spec_from_config(
        PUBLISHED[name], dtype="bfloat16"
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_angles_of_published_ropes_equal_those_of_transformers(name):
    # Far out, where the last bit of a frequency matters most: 1e5 times its relative error is radians.
    config = PUBLISHED[name]
    theirs = their_config(config)
    text = theirs.get_text_config()
    spec = family_of(config).spec_from_config(config, dtype="bfloat16")
    length = min(text.max_position_embeddings, 100_000)
    positions = np.array([[0, 1, 2, length // 3, length - 1]], np.int32)
    cos, sin = (np.asarray(a) for a in cos_sin(spec, jnp.array(positions), jnp.array([length])))
    with torch.device("meta"):  # only for its type
        model = transformers.AutoModelForCausalLM.from_config(text)
    rotary = type(model.model.rotary_emb)(config=text)
    for layer in {layer.rope: layer for layer in spec.layers if layer.rope is not None}.values():
        kind = {"layer_type": "sliding_attention" if layer.window else "full_attention"}
        kind = kind if text.model_type == "gemma3_text" else {}
        want = [a[..., : spec.rotary_dim // 2].numpy() for a in rotary(torch.zeros(1), torch.tensor(positions), **kind)]
        for ours, theirs in zip((cos[layer.rope], sin[layer.rope]), want, strict=True):
            # One unit in the last place of a frequency, and of the angle; most are equal to the last bit.
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=2 * length * 2**-23)
            assert np.mean(ours == theirs) > 0.8


def test_golden_data_can_be_made_again():
    name = "llama-old-head80"
    stored, arrays = make_golden.make(name)
    case = golden.read(name)
    assert (stored["seed"], stored["greedy"]) == (case.seed, case.greedy)
    np.testing.assert_allclose(arrays[f"{name}/logits"], case.logits, rtol=0, atol=1e-5 * np.abs(case.logits).max())


def test_every_family_has_its_bfloat16_comparison():
    assert {CASES[name].config["model_type"] for name in BF16_CASES} == FAMILIES.keys() - {"gemma3"}
