"""Rotary position embeddings: frequencies for every scaling kind, and the rotation.

Formulas: RoPE, arXiv:2104.09864; linear interpolation, arXiv:2306.15595; YaRN ("NTK by parts"), arXiv:2309.00071;
LongRoPE, arXiv:2402.13753; llama3 and dynamic as Hugging Face's `modeling_rope_utils` defines them.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jax_monokernel.spec import DecoderSpec, RopeSpec


def inverse_frequencies(rope: RopeSpec) -> np.ndarray:
    """Angle per position, in radians, of each rotated pair: f32 [rows, rotary_dim / 2].

    One row, or two for longrope (row 0 up to original_max_position tokens, row 1 beyond). "dynamic" gives its row for
    sequences up to original_max_position; `cos_sin` derives the others from the length.
    """
    half = rope.rotary_dim // 2
    # In f32 as the checkpoints' own code computes them; the exponent is i / half = 2i / rotary_dim. Powers are rounded
    # from f64, so that they do not depend on the accuracy of a library's f32 power: at position 10^5 the last bit of a
    # frequency is worth 0.01 radians.
    exponent = np.arange(half, dtype=np.float32) / np.float32(half)
    powers = np.power(np.float64(np.float32(rope.theta)), exponent.astype(np.float64)).astype(np.float32)
    base = np.float32(1.0) / powers
    if rope.scaling == "linear":
        return (base / np.float32(rope.factor))[None]
    if rope.scaling == "llama3":
        return _llama3(rope, base)[None]
    if rope.scaling == "yarn":
        return _yarn(rope, base)[None]
    if rope.scaling == "longrope":
        factors = np.array([rope.short_factor, rope.long_factor], np.float32)
        return np.float32(1.0) / (factors * powers)
    return base[None]


def _llama3(rope: RopeSpec, base: np.ndarray) -> np.ndarray:
    """Long wavelengths are slowed by `factor`, short ones kept, with a linear blend between."""
    wavelength = 2 * math.pi / base
    old = rope.original_max_position
    slow = base / rope.factor
    smooth = (old / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - smooth) * slow + smooth * base
    inv = np.where(wavelength > old / rope.low_freq_factor, slow, base)
    between = (wavelength <= old / rope.low_freq_factor) & (wavelength >= old / rope.high_freq_factor)
    return np.where(between, blended, inv).astype(np.float32)


def _yarn(rope: RopeSpec, base: np.ndarray) -> np.ndarray:
    """Dimensions that turn often within the original context are kept, slow ones are interpolated."""
    half = len(base)

    def dimension(rotations: float) -> float:
        turns = rope.original_max_position / (rotations * 2 * math.pi)
        return rope.rotary_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(half, dtype=np.float32) - low) / (high - low), 0, 1)
    return (base / rope.factor * ramp + base * (1 - ramp)).astype(np.float32)


def _frequencies_at(rope: RopeSpec, length: jax.Array) -> jax.Array:
    """Frequencies for sequences of `length` tokens: f32 length.shape + [rotary_dim / 2]."""
    table = jnp.asarray(inverse_frequencies(rope))
    if rope.scaling == "longrope":
        return table[(length > rope.original_max_position).astype(jnp.int32)]
    if rope.scaling != "dynamic":
        return jnp.broadcast_to(table[0], (*length.shape, table.shape[1]))
    dim = rope.rotary_dim
    limit = rope.original_max_position
    stretch = rope.factor * length.astype(jnp.float32) / limit - (rope.factor - 1)
    # theta' = theta * stretch ** (dim / (dim - 2)). Only the stretch's power is taken in f32: its logarithm is small,
    # so the error stays at a few units in the last place.
    exponent = jnp.arange(dim // 2, dtype=jnp.float32) / (dim // 2)
    growth = jnp.log(jnp.maximum(stretch, 1.0)) * (dim / max(dim - 2, 1))
    stretched = table[0] * jnp.exp(-exponent * growth[..., None])
    return jnp.where((length > limit)[..., None], stretched, table[0])


def cos_sin(spec: DecoderSpec, position: jax.Array, length: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines for every rope of the model, plus a last "no rotation" one for layers without positions.

    Args:
      position: int32 [batch, tokens], the tokens' places in their sequences.
      length: int32 [batch], the sequence length that length-dependent scalings (dynamic, longrope) go by.

    Returns:
      Two f32 arrays [ropes + 1, batch, tokens, rotary_dim / 2].
    """
    cos, sin = [], []
    for rope in spec.ropes:
        angle = position[..., None].astype(jnp.float32) * _frequencies_at(rope, length)[:, None, :]
        cos.append(jnp.cos(angle) * rope.attention_factor)
        sin.append(jnp.sin(angle) * rope.attention_factor)
    still = (*position.shape, spec.rotary_dim // 2)
    return jnp.stack([*cos, jnp.ones(still)]), jnp.stack([*sin, jnp.zeros(still)])


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns the leading rotary dimensions of x [batch, tokens, heads, head_dim] by angles [batch, tokens, rotary/2]."""
    half = cos.shape[-1]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)
