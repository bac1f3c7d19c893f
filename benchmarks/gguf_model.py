"""Writes a decoder as a GGUF file, so that llama.cpp runs the very same weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jax_monokernel import DecoderSpec, DecoderWeights, RopeSpec
from jax_monokernel.rope import inverse_frequencies

# GGUF tensor names of the per-layer roles.
_LAYER_NAMES = {
    "attn_norm": "attn_norm.weight",
    "q": "attn_q.weight",
    "k": "attn_k.weight",
    "v": "attn_v.weight",
    "q_bias": "attn_q.bias",
    "k_bias": "attn_k.bias",
    "v_bias": "attn_v.bias",
    "q_norm": "attn_q_norm.weight",
    "k_norm": "attn_k_norm.weight",
    "o": "attn_output.weight",
    "mlp_norm": "ffn_norm.weight",
    "gate": "ffn_gate.weight",
    "up": "ffn_up.weight",
    "down": "ffn_down.weight",
}


# The GGUF architecture with these (qkv_bias, qk_norm).
_ARCHITECTURES = {(False, None): "llama", (True, None): "qwen2", (False, "head"): "qwen3"}


def write_gguf(path: Path, spec: DecoderSpec, weights: DecoderWeights) -> None:
    """Writes `weights` (matrices in their own dtype, the rest in f32) without a tokenizer: token ids go in and out.

    Only for what a `Shape` can say: other parts of `spec` would be left out silently.
    """
    import gguf  # an optional dependency: pip install jax-monokernel[bench]

    arch = _ARCHITECTURES[spec.qkv_bias, spec.qk_norm]
    rope = spec.ropes[0]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_vocab_size(spec.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_context_length(131072)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_feed_forward_length(spec.intermediate_size)
    writer.add_block_count(spec.num_layers)
    writer.add_head_count(spec.num_heads)
    writer.add_head_count_kv(spec.num_kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_layer_norm_rms_eps(spec.norm_eps)
    writer.add_rope_dimension_count(rope.rotary_dim)
    writer.add_rope_freq_base(rope.theta)

    def add(name: str, value: object) -> None:
        array = np.asarray(value)
        if array.ndim == 1:  # llama.cpp keeps norms and biases in f32
            writer.add_tensor(name, array.astype(np.float32))
        elif array.dtype.name == "bfloat16":  # numpy has no bf16, so the writer takes its bytes
            writer.add_tensor(name, array.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, array)

    add("token_embd.weight", weights.embedding)
    add("output_norm.weight", weights.final_norm)
    if weights.head is not None:
        add("output.weight", weights.head)
    if rope.scaling == "llama3":
        add("rope_freqs.weight", _frequency_divisors(rope))
    for role, name in _LAYER_NAMES.items():
        stacked = getattr(weights.layers, role)
        if stacked is None:
            continue
        for index, value in enumerate(np.asarray(stacked)):
            if arch == "llama" and role in ("q", "k"):
                value = _adjacent_pairs(value, spec.head_dim)
            add(f"blk.{index}.{name}", value)

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _adjacent_pairs(matrix: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorders the rows [heads * head_dim, in] of q or k: the llama architecture rotates dimensions 2i and 2i + 1
    together, where the half-split convention pairs i and i + head_dim / 2."""
    halves = matrix.reshape(-1, 2, head_dim // 2, matrix.shape[-1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(matrix.shape)


def _frequency_divisors(rope: RopeSpec) -> np.ndarray:
    """f32 [rotary_dim / 2]: what llama.cpp divides the unscaled frequencies by."""
    unscaled = inverse_frequencies(RopeSpec(theta=rope.theta, rotary_dim=rope.rotary_dim))
    return (unscaled / inverse_frequencies(rope))[0].astype(np.float32)
