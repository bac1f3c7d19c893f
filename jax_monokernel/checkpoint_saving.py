"""Saving weights as an ordinary Hugging Face checkpoint folder."""

from __future__ import annotations

import copy
import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from jax_monokernel.safetensors_file import CheckpointError, read_json
from jax_monokernel.spec import DecoderSpec
from jax_monokernel.tensor_map import Part, TensorMap, tensor_shapes
from jax_monokernel.weights import DecoderWeights, check_weights

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def save_weights(
    path: str | os.PathLike[str],
    spec: DecoderSpec,
    weights: DecoderWeights,
    tensor_map: TensorMap,
    config: Mapping[str, Any],
    *,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    extra_files: Sequence[Path] = (),
) -> None:
    """Writes config.json and one or many safetensors files.

    Everything is written under temporary names first and renamed at the end, config.json last: an interrupted save
    leaves a folder without config.json, which nothing takes for a checkpoint. Files of other names stay as they are.

    Args:
      path: the folder; made if need be.
      spec: what the weights are.
      weights: by role, in spec.dtype.
      tensor_map: the name and contents of each tensor to write.
      config: written as config.json, with its dtype changed to spec.dtype.
      max_shard_bytes: above this the weights are split over files with an index. A tensor is never split.
      overwrite: replace a checkpoint that is there.
      extra_files: copied along under their own names; without `overwrite`, those that the folder has are kept.

    Raises:
      CheckpointError: the folder holds a checkpoint and `overwrite` is not set, `config` is not JSON, or a file cannot
        be written.
      ValueError: the weights or the tensor map do not fit the spec, or max_shard_bytes is not positive.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes}; expected a positive number of bytes")
    check_weights(spec, weights)
    folder = Path(path)
    if os.path.exists(folder) and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; expected a folder to save in")
    there = [name for name in (CONFIG, SINGLE, INDEX) if os.path.lexists(folder / name)]
    if there and not overwrite:
        raise CheckpointError(f"{folder} already holds {' and '.join(there)}; pass overwrite=True to replace it")
    try:
        config_json = json.dumps(_with_dtype(config, spec.dtype), indent=2) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"the config cannot be written as JSON: {error}") from None

    shards = _plan_shards(spec, tensor_map, max_shard_bytes)
    suffix = f".{secrets.token_hex(4)}.partial"
    temporary: dict[str, Path] = {}  # final name -> where it is for now
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, tensors in shards.items():
            temporary[name] = folder / (name + suffix)
            arrays = {t: _tensor(weights, tensor_map[t]) for t in tensors}
            save_file(arrays, temporary[name], metadata={"format": "pt"})
            del arrays
        if len(shards) > 1:
            temporary[INDEX] = folder / (INDEX + suffix)
            temporary[INDEX].write_text(_index_json(spec, tensor_map, shards))
        for source in extra_files:
            if overwrite or not os.path.lexists(folder / source.name):
                temporary[source.name] = folder / (source.name + suffix)
                shutil.copyfile(source, temporary[source.name])
        temporary[CONFIG] = folder / (CONFIG + suffix)
        temporary[CONFIG].write_text(config_json)
        for file in temporary.values():
            shutil.copymode(temporary[CONFIG], file)  # safetensors leaves its files readable by their owner only
            _flush(file)
        if there:
            _remove_old(folder, keep=temporary)
        for name, file in temporary.items():  # config.json is the last
            file.replace(folder / name)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"could not save to {folder}: {error}") from error
    finally:
        for file in temporary.values():
            file.unlink(missing_ok=True)


def is_plain_file_name(name: object) -> bool:
    """Whether this is a safetensors file's name without any folder: what an index may refer to."""
    return (
        isinstance(name, str)
        and name.isprintable()
        and not re.search(r"[/\\:]", name)
        and name == PurePath(name).name
        and name.endswith(".safetensors")
    )


def _plan_shards(spec: DecoderSpec, tensor_map: TensorMap, max_bytes: int) -> dict[str, list[str]]:
    """File name -> the tensors in it, in the map's order."""
    groups: list[list[str]] = [[]]
    used = 0
    for name, size in _sizes(spec, tensor_map).items():
        if groups[-1] and used + size > max_bytes:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, 1)}


def _sizes(spec: DecoderSpec, tensor_map: TensorMap) -> dict[str, int]:
    itemsize = jax.numpy.dtype(spec.dtype).itemsize
    return {name: int(np.prod(shape)) * itemsize for name, shape in tensor_shapes(spec, tensor_map).items()}


def _index_json(spec: DecoderSpec, tensor_map: TensorMap, shards: Mapping[str, list[str]]) -> str:
    total = sum(_sizes(spec, tensor_map).values())
    weight_map = {tensor: file for file, tensors in shards.items() for tensor in tensors}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"


def _tensor(weights: DecoderWeights, parts: Sequence[Part]) -> np.ndarray:
    arrays = []
    for part in parts:
        stacked = part.role.startswith("layers.")
        value = getattr(weights.layers if stacked else weights, part.role.removeprefix("layers."))
        if isinstance(value, jax.Array) and any(device.platform != "cpu" for device in value.devices()):
            # Only the layer is fetched, and not kept: a whole array's copy would stay in host memory with the array.
            arrays.append(np.array(value[part.layer] if stacked else value))
        else:
            arrays.append(np.asarray(value)[part.layer] if stacked else np.asarray(value))
    return np.ascontiguousarray(arrays[0]) if len(arrays) == 1 else np.concatenate(arrays)


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A copy with every "dtype" and "torch_dtype" set, in the text model's own section too."""
    new = copy.deepcopy(dict(config))
    for section in (new, new.get("text_config")):
        if isinstance(section, dict):
            section |= {key: dtype for key in ("dtype", "torch_dtype") if key in section}
    if "dtype" not in new:
        new["torch_dtype"] = dtype  # the name that every version of transformers reads
    return new


def _flush(file: Path) -> None:
    with open(file, "rb+") as stream:
        os.fsync(stream.fileno())


def _remove_old(folder: Path, keep: Mapping[str, Path]) -> None:
    """Takes the old checkpoint out of use, config.json first: what is left of it must not mix with the new one."""
    (folder / CONFIG).unlink(missing_ok=True)
    old = {SINGLE, INDEX}
    try:
        names = read_json(folder / INDEX)["weight_map"].values()
        old |= {name for name in names if is_plain_file_name(name)}
    except (CheckpointError, KeyError, AttributeError):
        pass  # no index, or a damaged one: nothing reads its shards any more
    for name in old - keep.keys():
        (folder / name).unlink(missing_ok=True)
