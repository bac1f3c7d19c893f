"""Damaged and hostile checkpoint files: always either CheckpointError or exactly the right data."""

from __future__ import annotations

import itertools
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors_tools import NAMES, file_bytes, random_array, tensors_bytes, write_folder

from jax_monokernel.checkpoints import Checkpoint, CheckpointError
from jax_monokernel.safetensors_file import SafetensorsFile, read_json

DTYPES = {short: name for name, short in NAMES.items()}
quick = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])

_rng = np.random.default_rng(20)
TENSORS = {
    "w": random_array(_rng, (3, 4)),
    "b": random_array(_rng, (5,), "bfloat16"),
    "empty": random_array(_rng, (0, 2), "float16"),
    "i": random_array(_rng, (2, 1, 3), "int64"),
    "u": random_array(_rng, (3,), "uint8"),
}
VALID = tensors_bytes(TENSORS)
HEADER_BYTES = int.from_bytes(VALID[:8], "little")


def outcome(content: bytes) -> dict[str, np.ndarray] | None:
    """Every tensor of a file, copied out of the memory map; None for CheckpointError. Anything else is a failure."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        path.write_bytes(content)
        try:
            file = SafetensorsFile(path)
            return {name: np.array(file.read(name)) for name in file.tensors}
        except CheckpointError as error:
            text = str(error)
    assert len(text) < 2000
    text.encode()  # it can be printed
    return None


def assert_means(content: bytes, tensors: dict[str, np.ndarray]) -> None:
    """Compares with a plain reading of the same bytes by the format's definition, and checks that all are covered."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    data = content[8 + length :]
    assert tensors.keys() == header.keys()
    covered = np.zeros(len(data), np.int64)
    for name, said in header.items():
        start, end = said["data_offsets"]
        covered[start:end] += 1
        assert tensors[name].tobytes() == data[start:end]
        assert list(tensors[name].shape) == said["shape"]
        assert tensors[name].dtype.name == DTYPES[said["dtype"]]
    assert (covered == 1).all()


def test_every_truncation_is_refused():
    for length in range(len(VALID)):
        assert outcome(VALID[:length]) is None, length
    assert outcome(VALID + b"\0") is None
    assert_means(VALID, outcome(VALID))


@quick
@given(length=st.one_of(st.integers(0, 2 * len(VALID)), st.integers(0, 2**64 - 1)))
def test_other_header_lengths(length):
    content = length.to_bytes(8, "little") + VALID[8:]
    tensors = outcome(content)
    assert (tensors is not None) == (length == HEADER_BYTES)


@settings(quick, max_examples=600)
@given(
    edits=st.lists(
        st.tuples(
            st.integers(0, 8 + HEADER_BYTES - 1), st.one_of(st.integers(0, 255), st.sampled_from(b'0123459[]{}",: -'))
        ),
        min_size=1,
        max_size=3,
    )
)
def test_changed_header_bytes(edits):
    content = bytearray(VALID)
    for place, value in edits:
        content[place] = value
    if (tensors := outcome(bytes(content))) is not None:
        assert_means(bytes(content), tensors)


@quick
@given(content=st.binary(max_size=200))
def test_arbitrary_bytes(content):
    assert outcome(content) is None or content[8:9] == b"{"
    header = file_bytes(content)
    if (tensors := outcome(header)) is not None:
        assert_means(header, tensors)


sizes = st.one_of(st.integers(-2, 12), st.sampled_from([2**31, 2**32, 2**62, 2**63, 2**64, 10**40]))
junk = st.recursive(
    st.one_of(st.none(), st.booleans(), sizes, st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=6,
)


@st.composite
def headers(draw: st.DrawFn) -> tuple[Any, bytes]:
    """Headers near validity, over data of about the right length."""
    header: dict[str, Any] = {}
    place = 0
    for _ in range(draw(st.integers(0, 4))):
        name = draw(st.one_of(st.text(max_size=4), st.sampled_from(["a", "b", "__metadata__"])))
        dtype = draw(st.sampled_from([*[d for d in DTYPES if d != "F8_E4M3"] * 2, "F8_E4M3", "F4", "F6_E2M3", "X"]))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        itemsize = np.dtype(DTYPES[dtype]).itemsize if dtype in DTYPES and dtype != "F8_E4M3" else 1
        end = place + (math.prod(shape) * itemsize if dtype not in ("F4", "F6_E2M3") else draw(st.integers(0, 9)))
        said: Any = {"dtype": dtype, "shape": shape, "data_offsets": [place, end]}
        place = end
        # Most stay as they are; one in a few gets something wrong.
        match draw(st.integers(0, 29)):
            case 26:
                said[draw(st.sampled_from([*said]))] = draw(junk)
            case 27:
                said["data_offsets"][draw(st.integers(0, 1))] = draw(sizes)
            case 28:
                said["shape"] = [*shape, draw(sizes)]
            case 29:
                said = draw(junk)
        header[name] = said
    extra = draw(st.sampled_from([0] * 8 + [1, -1]))
    return header, draw(st.binary(min_size=max(0, place + extra), max_size=max(0, place + extra)))


@settings(quick, max_examples=600)
@given(headers())
def test_headers_near_validity(case):
    content = file_bytes(*case)
    if (tensors := outcome(content)) is not None:
        assert_means(content, tensors)


@settings(quick, max_examples=500)
@given(
    cuts=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    changes=st.lists(
        st.tuples(
            st.integers(0, 9), st.sampled_from([(1, 1, 0), (1, 0, -1), (0, 1, 1), (0, 0, 1)]), st.sampled_from([-1, 1])
        ),
        max_size=3,
    ),
)
def test_layouts(cuts, changes):
    """Tensors that tile the data, some of them then moved, stretched or of another shape: only tilings are accepted."""
    places = [0, *sorted(cuts)]
    tiles = [(start, end, end - start) for start, end in itertools.pairwise(places)]
    for index, change, step in changes:
        start, end, size = (a + step * b for a, b in zip(tiles[index % len(tiles)], change, strict=True))
        if min(start, places[-1] - end, size, end - start) >= 0:
            tiles[index % len(tiles)] = (start, end, size)
    header = {
        f"t{i}": {"dtype": "U8", "shape": [size], "data_offsets": [start, end]}
        for i, (start, end, size) in enumerate(tiles)
    }
    content = file_bytes(header, bytes(range(places[-1])))
    tensors = outcome(content)
    if tensors is not None:
        assert_means(content, tensors)
    elif all(start + size == end and size > 0 for start, end, size in tiles):
        covered = sorted(byte for start, end, _ in tiles for byte in range(start, end))
        assert covered != list(range(places[-1]))


@st.composite
def indexed_folders(draw: st.DrawFn) -> tuple[Any, dict[str, list[str]]]:
    """An index over up to three shards and what they hold, consistent or not."""
    files = [f"s{i}.safetensors" for i in range(draw(st.integers(1, 3)))]
    held = {file: draw(st.lists(st.sampled_from("abcd"), max_size=3, unique=True)) for file in files}
    weight_map: Any = {name: file for file, names in held.items() for name in names}
    hostile = ["../s0.safetensors", "/s0.safetensors", "s0.safetensors/", "./s0.safetensors", "", ".", "s9.safetensors"]
    for name in draw(st.lists(st.sampled_from("abcd"), max_size=2)):
        weight_map[name] = draw(st.one_of(st.sampled_from([*files, *hostile]), junk))
    return draw(st.sampled_from([weight_map] * 9 + [None, [weight_map]])), held


@quick
@given(indexed_folders(), st.integers(0, 2**32))
def test_indexes(case, seed):
    weight_map, held = case
    rng = np.random.default_rng(seed)
    arrays = {file: {name: random_array(rng, (2,)) for name in names} for file, names in held.items()}
    with tempfile.TemporaryDirectory() as root:
        files = {file: tensors_bytes(tensors) for file, tensors in arrays.items()}
        files["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
        folder = write_folder(Path(root) / "c", files)
        write_folder(Path(root), {"s0.safetensors": tensors_bytes({"a": random_array(rng, (2,))})})
        try:
            checkpoint = Checkpoint(folder)
        except CheckpointError:
            # Right only where something is wrong.
            used = {name: file for file in held for name in held[file] if file in weight_map_values(weight_map)}
            count = sum(len(names) for file, names in held.items() if file in weight_map_values(weight_map))
            assert weight_map != used or count != len(used) or not used
            return
        assert set(checkpoint.tensors) == set(weight_map)
        for name, file in weight_map.items():
            np.testing.assert_array_equal(checkpoint.read(name), arrays[file][name])


def weight_map_values(weight_map: Any) -> list[Any]:
    return list(weight_map.values()) if isinstance(weight_map, dict) else []


@quick
@given(content=st.one_of(st.binary(max_size=50), junk.map(lambda value: json.dumps(value).encode())))
def test_json_files(content):
    with tempfile.TemporaryDirectory() as root:
        path = Path(root) / "config.json"
        path.write_bytes(content)
        try:
            value = read_json(path)
        except CheckpointError:
            return
        assert isinstance(value, dict)
        if "nan" not in repr(value):
            assert value == json.loads(content)


@pytest.mark.parametrize("depth", [100, 900, 5000])
def test_deep_values_in_messages(depth):
    deep = b"[" * depth + b"]" * depth
    assert outcome(file_bytes(b'{"a":{"dtype":"F32","data_offsets":[0,0],"shape":' + deep + b"}}")) is None
    assert outcome(file_bytes(b'{"a":{"dtype":' + deep + b',"data_offsets":[0,0],"shape":[]}}')) is None
    assert outcome(file_bytes(b'{"' + b"n" * 1_000_000 + b'":1}')) is None
