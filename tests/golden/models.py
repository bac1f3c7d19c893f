"""Golden cases as models of ours, and running them."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from golden import Golden
from jax_monokernel import (
    DecoderSpec,
    DecoderWeights,
    GenerationConfig,
    LayerWeights,
    empty_state,
    sampling_params,
)
from jax_monokernel.decode import Backend, decode
from jax_monokernel.models import Decoder
from jax_monokernel.models.registry import family_of
from jax_monokernel.prefill import prefill
from jax_monokernel.state import DecodeResult
from jax_monokernel.tape import pack
from jax_monokernel.tensor_map import TensorMap

# `jax.jit` for programs that run for milliseconds but would compile for seconds.
quick_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)


def weights_from_tensors(spec: DecoderSpec, names: TensorMap, tensors: Mapping[str, np.ndarray]) -> DecoderWeights:
    """Weights by role in spec.dtype from checkpoint tensors."""
    by_role: dict[str, list[np.ndarray]] = {}
    for name, parts in names.items():
        row = 0
        for part in parts:
            rows = tensors[name][row : row + part.shape[0]]
            assert rows.shape == part.shape, (name, part)
            by_role.setdefault(part.role, []).append(rows)
            row += part.shape[0]
        assert row == len(tensors[name]), name
    dtype = jnp.dtype(spec.dtype)
    layers = {
        role.removeprefix("layers."): jnp.asarray(np.stack(rows), dtype)
        for role, rows in by_role.items()
        if role.startswith("layers.")
    }
    roles = {role: jnp.asarray(rows[0], dtype) for role, rows in by_role.items() if not role.startswith("layers.")}
    return DecoderWeights(layers=LayerWeights(**layers), **roles)


def golden_model(case: Golden, dtype: str = "float32") -> Decoder:
    """The case's model with its weights in `dtype`."""
    family = family_of(case.config)
    spec = family.spec_from_config(case.config, dtype=dtype)
    return Decoder.from_weights(spec, weights_from_tensors(spec, family.tensor_map(spec), case.tensors()))


@functools.partial(quick_jit, static_argnums=(0, 3, 4))
def greedy(
    spec: DecoderSpec, weights: DecoderWeights, prompt: jax.Array, new_tokens: int, backend: Backend
) -> DecodeResult:
    """Greedy tokens and their log-probabilities after prompts int32 [batch, tokens] of equal length."""
    batch, length = prompt.shape
    state = empty_state(spec, batch=batch, capacity=length + new_tokens - 1, key=jax.random.key(0))
    state = prefill(spec, weights, prompt, jnp.full(batch, length, jnp.int32), state)
    params = sampling_params(GenerationConfig(max_new_tokens=new_tokens), batch=batch, vocab_size=spec.vocab_size)
    return decode(
        pack(spec, weights),
        state,
        params,
        max_new_tokens=new_tokens,
        return_log_probs=True,
        backend=backend,
    )
