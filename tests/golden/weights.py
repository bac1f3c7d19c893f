"""Random weights and prompts that a seed and NumPy's PCG64 define, so that golden data need not hold them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np


def _normal(stream: np.random.PCG64, shape: tuple[int, ...]) -> np.ndarray:
    """f32, about normal with mean 0 and standard deviation 1.

    The sum of the four 16-bit quarters of each raw output, which NumPy promises never to change; exact in f32 and
    the same for any byte order.
    """
    quarters = stream.random_raw(math.prod(shape)).view(np.uint16).reshape(-1, 4)
    total = quarters.astype(np.float32).sum(axis=1) - np.float32(2 * 65535)
    return (total / np.float32(65536 / math.sqrt(3))).reshape(shape)


def random_tensors(
    shapes: Mapping[str, tuple[int, ...]], seed: int, *, embedding_std: float, norm_mean: float
) -> dict[str, np.ndarray]:
    """f32 weights, every value exact in bfloat16, from one stream in sorted order of names.

    Norm scales scatter around `norm_mean`, biases around 0. Matrices keep the scale of their input, except that those
    for queries and keys enlarge it, so that attention is not close to uniform.
    """
    stream = np.random.PCG64(seed)
    tensors = {}
    for name in sorted(shapes):
        noise = _normal(stream, shapes[name])
        if name.endswith("norm.weight"):
            value = norm_mean + 0.3 * noise
        elif name.endswith(".bias"):
            value = 0.3 * noise
        elif name.endswith("embed_tokens.weight"):
            value = embedding_std * noise
        else:
            gain = 2.0 if any(part in name for part in ("q_proj", "k_proj", "qkv_proj")) else 1.0
            value = gain / math.sqrt(shapes[name][1]) * noise
        # Cut to bfloat16's 16 bits, which f16 models of these sizes can hold up to its own rounding.
        bits = value.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
        tensors[name] = bits.view(np.float32)
    return tensors


def random_prompt(vocab_size: int, length: int, seed: int) -> list[int]:
    """Token ids."""
    return [int(x) % vocab_size for x in np.random.PCG64(seed + 1_000_000).random_raw(length)]
