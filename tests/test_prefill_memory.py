"""What prefill takes besides its operands and results, in a program compiled for a CPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from jax_monokernel import DecoderSpec, LayerSpec, RopeSpec, empty_state
from jax_monokernel.prefill import prefill
from jax_monokernel.weights import weight_shapes


@pytest.mark.parametrize("capacity", [2048, 32768])
def test_memory_holds_neither_all_scores_nor_converted_weights(capacity):
    layers, kv_heads, head_dim = 8, 2, 32
    spec = DecoderSpec(
        vocab_size=20000,
        hidden_size=256,
        intermediate_size=1024,
        num_heads=8,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        layers=(LayerSpec(),) * layers,
        ropes=(RopeSpec(theta=1e4, rotary_dim=head_dim),),
    )
    state = jax.eval_shape(lambda: empty_state(spec, batch=1, capacity=capacity, key=jax.random.key(0)))
    ints = jax.ShapeDtypeStruct((1, 2048), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    lowered = jax.jit(prefill, static_argnums=0).lower(spec, weight_shapes(spec), *ints, state)
    temporary = lowered.compile().memory_analysis().temp_size_in_bytes
    # At most one copy of the caches, and the activations of a chunk. All scores of a chunk of 512 queries would take 17
    # or 537 MB, an f32 copy of the embedding 20 MB, of the layers 30 MB.
    caches = 2 * layers * kv_heads * capacity * head_dim * 2
    assert temporary < caches + 16e6
