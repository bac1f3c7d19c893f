"""Every family and option against what Hugging Face transformers computed in float32 (tests/golden)."""

from __future__ import annotations

import functools

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.cases import CASES
from golden.models import golden_model

from jax_monokernel import DecoderSpec, DecoderWeights
from jax_monokernel.forward import forward, forward_cached, logits
from jax_monokernel.models.registry import family_of
from jax_monokernel.weights import check_weights

# Of float32 logits, in units of the largest one. Two float32 programs that add in another order differ by about 1e-6.
TOLERANCE = 2e-5


def largest_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@functools.partial(jax.jit, static_argnums=(0, 3))
def greedy(spec: DecoderSpec, weights: DecoderWeights, prompt: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Tokens int32 [count] and their logits f32 [count]: the decode semantics, written down once more, for one row."""
    length = prompt.shape[0]
    cache = jnp.full((1, spec.num_layers, spec.num_kv_heads, length + count, spec.head_dim), jnp.nan, spec.kv_dtype)
    one = jnp.ones(1, jnp.int32)
    # All but the last prompt token go into the cache, with the frequencies of the whole prompt.
    _, k, v = forward_cached(spec, weights, cache, cache, prompt[None, :-1], one * 0, one * (length - 1), one * length)

    def step(carry, position):
        k, v, token = carry
        x, k, v = forward_cached(spec, weights, k, v, token[None, None], position[None], one, position[None] + 1)
        z = logits(spec, weights, x)[0, 0]
        best = jnp.argmax(z).astype(jnp.int32)
        return (k, v, best), (best, z[best])

    positions = length - 1 + jnp.arange(count, dtype=jnp.int32)
    return jax.lax.scan(step, (k, v, prompt[-1]), positions)[1]


@pytest.mark.parametrize("name", CASES)
def test_prompt_logits_equal_those_of_transformers(name):
    case = golden.read(name)
    ours = golden_model(case)(jnp.array([case.prompt]))[0, jnp.array(case.positions)]
    assert largest_error(np.asarray(ours), case.logits) < TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_equal_those_of_transformers(name):
    case = golden.read(name)
    model = golden_model(case)
    tokens, chosen = greedy(model.spec, model.decoder_weights(), jnp.array(case.prompt, jnp.int32), golden.NEW_TOKENS)
    assert tokens.tolist() == case.greedy
    assert largest_error(np.asarray(chosen), case.greedy_logits) < TOLERANCE


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
    at_once = forward(model.spec, model.decoder_weights(), tokens)[0, len(case.prompt) - 1 :]
    chosen = np.asarray(at_once)[np.arange(golden.NEW_TOKENS), case.greedy]
    assert largest_error(chosen, case.greedy_logits) > 100 * TOLERANCE
