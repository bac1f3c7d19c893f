"""Every family and option against what Hugging Face transformers computed in float32 (tests/golden)."""

from __future__ import annotations

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.cases import CASES
from golden.models import golden_model, greedy, quick_jit

from jax_monokernel.forward import forward
from jax_monokernel.models.registry import FAMILIES, family_of
from jax_monokernel.weights import check_weights

# Of float32 logits and log-probabilities, in units of the largest logit. Float32 programs that add in another order
# differ by about 1e-6.
TOLERANCE = 2e-5

# The reference compiles slowly. It runs one case per family, and those whose ropes depend on the length.
_ONE_EACH = {case.config["model_type"]: name for name, case in reversed(CASES.items())}
BY_REFERENCE = {*_ONE_EACH.values(), *(name for name in CASES if "crossing" in name or "nested" in name)}
RUNS = [(name, "cpu") for name in CASES] + [(name, "reference") for name in CASES if name in BY_REFERENCE]

prompt_logits = quick_jit(forward, static_argnums=0)


def largest(case: golden.Golden) -> float:
    return float(np.abs(case.logits).max())


def test_there_are_cases_for_every_family():
    assert {case.config["model_type"] for case in CASES.values()} == FAMILIES.keys() - {"gemma3"}


@pytest.mark.parametrize("name", CASES)
def test_prompt_logits_equal_those_of_transformers(name):
    case = golden.read(name)
    model = golden_model(case)
    logits = prompt_logits(model.spec, model.decoder_weights(), jnp.array([case.prompt]))
    ours = np.asarray(logits[0, jnp.array(case.positions)])
    np.testing.assert_allclose(ours, case.logits, rtol=0, atol=TOLERANCE * largest(case))


@pytest.mark.parametrize(("name", "backend"), RUNS)
def test_greedy_tokens_equal_those_of_transformers(name, backend):
    case = golden.read(name)
    model = golden_model(case)
    result = greedy(
        model.spec, model.decoder_weights(), jnp.array([case.prompt], jnp.int32), golden.NEW_TOKENS, backend
    )
    assert result.tokens[0].tolist() == case.greedy
    np.testing.assert_allclose(result.log_probs[0], case.log_probs, rtol=0, atol=2 * TOLERANCE * largest(case))


@pytest.mark.parametrize("name", CASES)
def test_tensor_map_holds_exactly_the_checkpoints_tensors(name):
    case = golden.read(name)
    family = family_of(case.config)
    spec = family.spec_from_config(case.config, dtype="bfloat16")
    shapes = {
        tensor: (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        for tensor, parts in family.tensor_map(spec).items()
    }
    assert shapes == case.shapes
    check_weights(spec, golden_model(case, "bfloat16").decoder_weights())


@pytest.mark.parametrize("name", ["llama-dynamic-crossing", "llama-longrope-crossing", "gemma3-nested-ropes"])
def test_ropes_that_depend_on_the_length_go_by_the_tokens_so_far(name):
    # In one pass over all tokens every key gets the final length's frequencies; in decode it keeps those of its time.
    case = golden.read(name)
    model = golden_model(case)
    tokens = jnp.array([case.prompt + case.greedy[:-1]])
    at_once = prompt_logits(model.spec, model.decoder_weights(), tokens)[0, len(case.prompt) - 1 :]
    log_probs = np.asarray(jax.nn.log_softmax(at_once))[np.arange(golden.NEW_TOKENS), case.greedy]
    assert np.abs(log_probs - case.log_probs).max() > 100 * TOLERANCE * largest(case)
