"""Checkpoint files for tests, also deliberately broken ones, and a tiny spec with a tensor map."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jax_monokernel.checkpoints import Part
from jax_monokernel.spec import DecoderSpec, LayerSpec, RopeSpec
from jax_monokernel.weights import DecoderWeights, layer_shapes, weight_shapes

NAMES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "uint32": "U32",
    "int32": "I32",
    "uint64": "U64",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
}


def file_bytes(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file as it would be with this header: an object to be written as JSON, or its bytes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def tensors_bytes(tensors: Mapping[str, np.ndarray], *, pad: int = 0) -> bytes:
    """A valid safetensors file, written independently of the safetensors library; `pad` spaces end the header."""
    header: dict[str, Any] = {}
    data = b""
    for name, array in tensors.items():
        end = len(data) + array.nbytes
        header[name] = {"dtype": NAMES[array.dtype.name], "shape": list(array.shape), "data_offsets": [len(data), end]}
        data += array.tobytes()
    return file_bytes(json.dumps(header).encode() + b" " * pad, data)


def write_folder(folder: Path, files: Mapping[str, bytes], config: Any = None) -> Path:
    """A checkpoint folder with these files and config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text(json.dumps({"model_type": "test"} if config is None else config))
    return folder


def random_array(rng: np.random.Generator, shape: tuple[int, ...], dtype: str = "float32") -> np.ndarray:
    """Random values: standard normal for floats, whole range for the others."""
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    if kind.name.startswith(("float", "bfloat", "complex")):
        return np.asarray(rng.standard_normal(shape), np.float32).astype(kind)
    if kind == np.bool_:
        return rng.random(shape) < 0.5
    return np.frombuffer(rng.bytes(math.prod(shape) * kind.itemsize), kind).reshape(shape)


def tiny_spec(**changes: Any) -> DecoderSpec:
    """Odd sizes; heads of width 6, so hidden size and q size differ."""
    fields: dict[str, Any] = {
        "vocab_size": 37,
        "hidden_size": 20,
        "intermediate_size": 28,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 6,
        "layers": (LayerSpec(),) * 3,
        "ropes": (RopeSpec(theta=10_000.0, rotary_dim=6),),
        "dtype": "float32",
    }
    return DecoderSpec(**fields | changes)


def random_weights(spec: DecoderSpec, seed: int) -> DecoderWeights:
    """Random values for every role, in spec.dtype."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: jnp.asarray(rng.standard_normal(s.shape, np.float32).astype(s.dtype)), weight_shapes(spec)
    )


def tiny_map(spec: DecoderSpec, *, fused: bool = True) -> dict[str, tuple[Part, ...]]:
    """One tensor per weight, but q, k and v in one where `fused`."""
    shapes = layer_shapes(spec)
    matrix = (spec.vocab_size, spec.hidden_size)
    tensors = {
        "embed.weight": (Part("embedding", None, matrix),),
        "norm.weight": (Part("final_norm", None, matrix[1:]),),
    }
    if not spec.tied_head:
        tensors["lm_head.weight"] = (Part("head", None, matrix),)
    for layer in range(spec.num_layers):
        parts = {role: Part(f"layers.{role}", layer, shape) for role, shape in shapes.items()}
        if fused:
            tensors[f"layers.{layer}.qkv"] = tuple(parts.pop(role) for role in "qkv")
        tensors |= {f"layers.{layer}.{role}": (part,) for role, part in parts.items()}
    return tensors


def tensor_values(weights: DecoderWeights, tensor_map: Mapping[str, tuple[Part, ...]]) -> dict[str, np.ndarray]:
    """What each tensor of the map holds, put together independently of the code under test."""
    values = {}
    for name, parts in tensor_map.items():
        rows: list[np.ndarray] = []
        for part in parts:
            if part.layer is None:
                rows += list(np.asarray(getattr(weights, part.role)))
            else:
                rows += list(np.asarray(getattr(weights.layers, part.role.split(".")[1]))[part.layer])
        values[name] = np.stack(rows)
    return values


def assert_same(a: Any, b: Any) -> None:
    """Two trees of arrays are equal in structure, dtype, shape and every bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
