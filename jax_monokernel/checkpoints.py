"""Hugging Face checkpoint folders: which tensor holds which weights, and loading them."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from jax_monokernel.checkpoint_saving import CONFIG, INDEX, SINGLE, is_plain_file_name, save_weights
from jax_monokernel.safetensors_file import CheckpointError, SafetensorsFile, TensorInfo, read_json, short
from jax_monokernel.spec import DecoderSpec
from jax_monokernel.tensor_map import Part, TensorMap, role_shapes, tensor_shapes
from jax_monokernel.weights import DecoderWeights, LayerWeights

__all__ = ["Checkpoint", "CheckpointError", "Part", "TensorInfo", "TensorMap", "load_weights", "save_weights"]

# Tensors that hold nothing that the config does not say, written by some versions of some libraries.
_HARMLESS = re.compile(r"(^|.*\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)")
_FLOATS = ("BF16", "F16", "F32", "F64")
_PROGRESS_BYTES = 1_000_000_000
# XLA takes a host buffer as it is, without a copy, when it starts at a multiple of this.
_ALIGNMENT = 64
_CAST_ELEMENTS = 4_000_000


class Checkpoint:
    """A folder with config.json and one or many safetensors files, checked in full and memory-mapped.

    Args:
      path: the folder. `model.safetensors` is read where there is one, else the shards that
        `model.safetensors.index.json` names.

    Raises:
      CheckpointError: a file is missing, truncated or breaks its format, or index and shards disagree.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        if not os.path.isdir(self.path):
            raise CheckpointError(
                f"{self.path} is not a folder; expected one with {CONFIG} and {SINGLE} (or {INDEX} and its shards)"
            )
        self.config = read_json(self.path / CONFIG)
        self._files: dict[str, SafetensorsFile] = {}  # by tensor name
        if os.path.exists(self.path / SINGLE):
            file = SafetensorsFile(self.path / SINGLE)
            self._files = dict.fromkeys(file.tensors, file)
        elif os.path.exists(self.path / INDEX):
            self._open_shards()
        else:
            raise CheckpointError(
                f"{self.path} has neither {SINGLE} nor {INDEX}; weights in another form (PyTorch .bin files, say) must "
                "be saved as safetensors first"
            )
        self.tensors: dict[str, TensorInfo] = {name: file.tensors[name] for name, file in self._files.items()}

    @property
    def nbytes(self) -> int:
        """Size of all tensors as stored, in bytes."""
        return sum(file.data_bytes for file in set(self._files.values()))

    def read(self, name: str) -> np.ndarray:
        """The tensor as a read-only view of the memory map. It may be unaligned.

        Raises:
          CheckpointError: no such tensor, a dtype that NumPy cannot hold, or the file has shrunk since it was opened.
        """
        if name not in self._files:
            raise CheckpointError(f"{self.path} has no tensor {short(name)}")
        return self._files[name].read(name)

    def release(self, name: str) -> None:
        """Lets the system drop a tensor's pages from memory. Views stay valid: touching them brings the pages back."""
        self._files[name].release(name)

    def _open_shards(self) -> None:
        index = self.path / INDEX
        weight_map = read_json(index, unique=True).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index} has no weight_map from tensor names to file names")
        for name, file_name in weight_map.items():
            if not is_plain_file_name(file_name):
                raise CheckpointError(
                    f"{index} places {short(name)} in {short(file_name)}; expected the plain name of a .safetensors "
                    "file in the same folder"
                )
        for file_name in sorted(set(weight_map.values())):
            if not os.path.exists(self.path / file_name):
                raise CheckpointError(f"{self.path} lacks {file_name}, which {INDEX} names; fetch the missing file")
            file = SafetensorsFile(self.path / file_name)
            for name in file.tensors:
                if name in self._files:
                    other = self._files[name].path.name
                    raise CheckpointError(f"{self.path} has the tensor {short(name)} twice, in {other} and {file_name}")
                if name not in weight_map:
                    raise CheckpointError(f"{file.path} has the tensor {short(name)}, which {INDEX} does not name")
                self._files[name] = file
        for name, file_name in weight_map.items():
            if name not in self._files or self._files[name].path.name != file_name:
                raise CheckpointError(
                    f"{self.path / file_name} lacks the tensor {short(name)}, which {INDEX} says it has"
                )


def load_weights(
    checkpoint: Checkpoint,
    spec: DecoderSpec,
    tensor_map: TensorMap,
    *,
    device: jax.Device | jax.sharding.Sharding | None = None,
    progress: bool | None = None,
    rename: Callable[[str], str | None] | None = None,
) -> DecoderWeights:
    """Weights by role in spec.dtype, filled straight from the memory map.

    Host memory beyond the result itself is at most the largest role (all its layers), and on a CPU device next to
    nothing: the arrays that are filled become the result.

    Args:
      checkpoint: where from.
      spec: what the weights must be.
      tensor_map: what each tensor holds.
      device: where to; None for JAX's default device.
      progress: whether to show a progress bar on stderr; None shows it for checkpoints above 1 GB on a terminal.
      rename: from the checkpoint's tensor names to those of the map, or None for a tensor to leave out.

    Raises:
      CheckpointError: tensors are missing, left over, of another shape or not floating point (all are named, up to
        ten), or a finite value would become infinite in spec.dtype.
      ValueError: the tensor map does not fit the spec.
    """
    stored = _stored_names(checkpoint, rename)
    _check_tensors(checkpoint, stored, spec, tensor_map)
    sources: dict[str, list[_Source]] = {}
    for name, parts in tensor_map.items():
        row = 0
        for part in parts:
            sources.setdefault(part.role, []).append(_Source(part.layer, stored[name], row))
            row += part.shape[0]

    roles: dict[str, jax.Array] = {}
    total = sum(checkpoint.read(stored[name]).nbytes for name in tensor_map)
    with _progress_bar(checkpoint, progress) as bar:
        task = bar.add_task(escape(f"Loading {checkpoint.path.name}"), total=total)
        for role, shape in role_shapes(spec).items():
            stacked = (spec.num_layers, *shape) if role.startswith("layers.") else shape
            host = _aligned_empty(stacked, np.dtype(spec.dtype))
            for layer, name, row in sources[role]:
                rows = checkpoint.read(name)[row : row + shape[0]]
                _cast_into(host if layer is None else host[layer], rows, f"{checkpoint.path}: {name}")
                checkpoint.release(name)
                bar.advance(task, rows.nbytes)
            # Waiting keeps a single role at a time in host memory, where the device has its own.
            roles[role] = jax.device_put(host, device).block_until_ready()
            del host
    layers = {role.removeprefix("layers."): a for role, a in roles.items() if role.startswith("layers.")}
    return DecoderWeights(
        embedding=roles["embedding"],
        layers=LayerWeights(**layers),
        final_norm=roles["final_norm"],
        head=roles.get("head"),
    )


class _Source(NamedTuple):
    layer: int | None
    tensor: str
    row: int  # first row within the tensor


def _stored_names(checkpoint: Checkpoint, rename: Callable[[str], str | None] | None) -> dict[str, str]:
    """The map's name for each tensor -> the checkpoint's own, without tensors to leave out."""
    stored: dict[str, str] = {}
    for own in checkpoint.tensors:
        name = own if rename is None else rename(own)
        if name is not None and name in stored:
            raise CheckpointError(
                f"{checkpoint.path} has {short(name)} twice, as {short(stored[name])} and {short(own)}"
            )
        if name is not None:
            stored[name] = own
    return stored


def _check_tensors(checkpoint: Checkpoint, stored: Mapping[str, str], spec: DecoderSpec, tensor_map: TensorMap) -> None:
    """Raises CheckpointError unless the checkpoint holds the map's tensors, and beside them only harmless ones."""
    problems = []
    for name, shape in tensor_shapes(spec, tensor_map).items():
        info = checkpoint.tensors[stored[name]] if name in stored else None
        if info is None:
            problems.append(f"{name} is missing; expected shape {list(shape)}")
        elif info.shape != shape:
            problems.append(f"{name} has shape {list(info.shape)}; expected {list(shape)}")
        elif info.dtype not in _FLOATS:
            problems.append(f"{name} is stored as {info.dtype}; expected one of {', '.join(_FLOATS)} (not quantised)")
    # A tied head may be stored all the same. It is harmless only where it repeats the embedding.
    embedding = next(n for n, parts in tensor_map.items() if any(part.role == "embedding" for part in parts))
    for name in stored.keys() - tensor_map.keys():
        if _HARMLESS.fullmatch(name):
            continue
        if spec.tied_head and name == "lm_head.weight" and embedding in stored:
            if not _same_bytes(checkpoint, stored[name], stored[embedding]):
                problems.append(f"{name} differs from {embedding}, but the config ties them (tie_word_embeddings)")
            continue
        problems.append(f"{short(name)} {list(checkpoint.tensors[stored[name]].shape)} is not part of this model")
    if problems:
        more = [f"and {len(problems) - 10} more"] if len(problems) > 10 else []
        lines = "\n  ".join(sorted(problems)[:10] + more)
        raise CheckpointError(
            f"{checkpoint.path} does not hold the weights that its config.json describes:\n  {lines}\n"
            "Check that config.json and the weights come from the same model."
        )


def _same_bytes(checkpoint: Checkpoint, a: str, b: str) -> bool:
    if checkpoint.tensors[a] != checkpoint.tensors[b]:
        return False
    x, y = checkpoint.read(a), checkpoint.read(b)
    step = max(1, _CAST_ELEMENTS // max(1, math.prod(x.shape[1:])))
    same = all(x[i : i + step].tobytes() == y[i : i + step].tobytes() for i in range(0, len(x), step))
    checkpoint.release(a)
    checkpoint.release(b)
    return same


def _cast_into(target: np.ndarray, source: np.ndarray, name: str) -> None:
    if target.dtype == source.dtype:
        np.copyto(target, source)
        return
    # In runs of rows, so that the check needs little memory of its own.
    step = max(1, _CAST_ELEMENTS // max(1, math.prod(source.shape[1:])))
    for i in range(0, len(source), step):
        new, old = target[i : i + step], source[i : i + step]
        with np.errstate(over="ignore"):
            np.copyto(new, old, casting="unsafe")
        if not np.isfinite(new).all() and (~np.isfinite(new) & np.isfinite(old)).any():
            raise CheckpointError(
                f"{name} has values beyond the range of {target.dtype}; load with dtype='bfloat16' or 'float32'"
            )


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def _progress_bar(checkpoint: Checkpoint, progress: bool | None) -> Progress:
    console = Console(stderr=True)
    if progress is None:
        progress = console.is_terminal and checkpoint.nbytes > _PROGRESS_BYTES
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console, disable=not progress)
