"""One safetensors file, checked in full before anything in it is used, then read through a memory map.

Format: https://huggingface.co/docs/safetensors. 8 bytes little-endian header length; a JSON object that gives each
tensor's dtype, shape and byte range; the tensors' bytes, little-endian and row-major, without gaps or overlaps.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import reprlib
import stat
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_MAX_DIMS = 32
_MAX_BYTES = 2**63 - 1

# Bits per element of every dtype the format defines.
_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
# Those that can be read as NumPy arrays here.
_NUMPY = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "C64": np.dtype("<c8"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# For what a file says, in messages: bounded however long or deep it is.
_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxlist, _repr.maxstring, _repr.maxdict = 2, 8, 120, 4
short = _repr.repr


class CheckpointError(ValueError):
    """A checkpoint that is damaged, incomplete, hostile, or of another model than expected."""


class TensorInfo(NamedTuple):
    """What a file's header says about one tensor."""

    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it: "BF16", "F32", ...


class SafetensorsFile:
    """A memory-mapped safetensors file.

    Args:
      path: the file.

    Raises:
      CheckpointError: it is missing, truncated, or breaks the format in any way.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        with _open_regular(self.path) as file:
            self._size = os.fstat(file.fileno()).st_size
            if self._size < 8:
                raise self._error(
                    f"has {self._size} bytes, too few for a safetensors file (at least 8); it was probably cut short, "
                    "so fetch it again"
                )
            # Nothing is read yet: the system brings in pages as they are touched.
            try:
                self._map = mmap.mmap(file.fileno(), self._size, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise self._error(f"cannot be mapped into memory: {error}") from None
        length = int.from_bytes(self._map[:8], "little")
        if length > MAX_HEADER_BYTES:
            raise self._error(f"has a header of {length} bytes; the format allows {MAX_HEADER_BYTES}")
        if length > self._size - 8:
            raise self._error(
                f"has a header of {length} bytes, but only {self._size - 8} bytes follow; it was cut short"
            )
        self._data_start = 8 + length
        header = self._parse(self._map[8 : self._data_start])
        self.metadata = self._check_metadata(header.pop("__metadata__", {}))
        self.data_bytes = self._size - self._data_start
        # name -> byte range within the data, and what the header says.
        self._ranges: dict[str, tuple[int, int]] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for name, entry in header.items():
            self.tensors[name], self._ranges[name] = self._check_entry(name, entry)
        self._check_coverage()

    def read(self, name: str) -> np.ndarray:
        """The tensor as a read-only view of the memory map. It may be unaligned.

        Raises:
          CheckpointError: no such tensor, a dtype that NumPy cannot hold, or the file has shrunk since it was opened.
        """
        if name not in self.tensors:
            raise self._error(f"has no tensor {short(name)}")
        shape, dtype_name = self.tensors[name]
        dtype = _NUMPY.get(dtype_name)
        if dtype is None:
            raise self._error(
                f"stores {short(name)} as {dtype_name}, which cannot be read here; use a checkpoint in BF16, F16 or F32"
            )
        # Pages past a shrunken file's end cannot be read at all: the process would be killed.
        if (size := self._map.size()) < self._size:
            raise self._error(f"shrank from {self._size} to {size} bytes while it was in use")
        start, _ = self._ranges[name]
        count = math.prod(shape)
        if count == 0:
            return np.empty(shape, dtype)
        return np.frombuffer(self._map, dtype, count, self._data_start + start).reshape(shape)

    def release(self, name: str) -> None:
        """Lets the system drop a tensor's pages from memory. Views stay valid: touching them brings the pages back."""
        if not hasattr(self._map, "madvise") or not hasattr(mmap, "MADV_DONTNEED"):
            return
        start, end = self._ranges[name]
        # Whole pages only: those at the edges belong to the neighbours too.
        start = -(-(self._data_start + start) // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (self._data_start + end) // mmap.PAGESIZE * mmap.PAGESIZE - start
        if length > 0:
            self._map.madvise(mmap.MADV_DONTNEED, start, length)

    def _parse(self, raw: bytes) -> dict[str, Any]:
        if not raw.startswith(b"{"):
            raise self._error("has a header that does not start with '{'; it is not a safetensors file")
        try:
            header = json.loads(
                raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_refuse
            )
        except (ValueError, RecursionError) as error:
            raise self._error(f"has a header that is not valid JSON: {error}") from None
        if not isinstance(header, dict):
            raise self._error("has a header that is not a JSON object")
        return header

    def _check_metadata(self, metadata: object) -> dict[str, str]:
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise self._error("has __metadata__ that is not an object of strings")
        return metadata

    def _check_entry(self, name: str, entry: object) -> tuple[TensorInfo, tuple[int, int]]:
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise self._error(f"describes tensor {short(name)} by something else than dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _BITS:
            raise self._error(f"gives tensor {short(name)} the unknown dtype {short(dtype)}")
        if not isinstance(shape, list) or len(shape) > _MAX_DIMS or not all(_is_size(n) for n in shape):
            raise self._error(
                f"gives tensor {short(name)} the shape {short(shape)}; expected up to {_MAX_DIMS} non-negative integers"
            )
        # A zero elsewhere in the shape must not hide a dimension that no array can have.
        if math.prod(max(n, 1) for n in shape) * _BITS[dtype] > 8 * _MAX_BYTES:
            raise self._error(f"gives tensor {short(name)} the shape {short(shape)}, which is larger than any memory")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(n) for n in offsets):
            raise self._error(
                f"gives tensor {short(name)} the data_offsets {short(offsets)}; expected two non-negative integers"
            )
        start, end = offsets
        if not start <= end <= self.data_bytes:
            raise self._error(
                f"places tensor {short(name)} at bytes {start} to {end} of {self.data_bytes}; "
                "if the file was cut short, fetch it again"
            )
        bits = math.prod(shape) * _BITS[dtype]
        if bits != 8 * (end - start):
            raise self._error(f"gives tensor {short(name)} {end - start} bytes, but {dtype}{shape} takes {bits / 8:g}")
        return TensorInfo(tuple(shape), dtype), (start, end)

    def _check_coverage(self) -> None:
        place, before = 0, None
        for name, (start, end) in sorted(self._ranges.items(), key=lambda item: item[1]):
            if start < place:
                raise self._error(f"has overlapping tensors {short(before)} and {short(name)}")
            if start > place:
                raise self._error(f"has {start - place} bytes before tensor {short(name)} that belong to no tensor")
            place, before = end, name
        if (extra := self.data_bytes - place) > 0:
            raise self._error(f"has {extra} bytes after its last tensor that belong to no tensor")

    def _error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.path} {message}")


def read_json(path: Path, *, unique: bool = False) -> dict[str, Any]:
    """A JSON file that must hold an object.

    Args:
      path: the file.
      unique: refuse an object that has a name twice, rather than keep the last.

    Raises:
      CheckpointError: missing, larger than 100 MB, or not a JSON object.
    """
    try:
        value = json.loads(read_text(path), object_pairs_hook=_unique if unique else None)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {short(value)}; expected a JSON object")
    return value


def read_text(path: Path) -> str:
    """A UTF-8 text file of at most 100 MB.

    Raises:
      CheckpointError: missing, too large, or not UTF-8.
    """
    with _open_regular(path) as file:
        raw = file.read(MAX_HEADER_BYTES + 1)
    if len(raw) > MAX_HEADER_BYTES:
        raise CheckpointError(f"{path} is larger than {MAX_HEADER_BYTES} bytes; a checkpoint's descriptions are not")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text: {error}") from None


def _open_regular(path: Path) -> BinaryIO:
    try:
        # Opening a pipe would wait for its writer.
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path} is not a regular file")
        return open(path, "rb")
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} cannot be opened: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for name, item in pairs:
        if name in value:
            raise ValueError(f"the name {short(name)} occurs twice")
        value[name] = item
    return value


def _refuse(text: str) -> Any:
    raise ValueError(f"{short(text)} where only integers and strings belong")


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_BYTES
