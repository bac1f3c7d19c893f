"""Checkpoint folders: strict checks of every file, and loading by role."""

from __future__ import annotations

import ctypes
import gc
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors_tools import (
    NAMES,
    assert_same,
    file_bytes,
    random_array,
    random_weights,
    tensor_values,
    tensors_bytes,
    tiny_map,
    tiny_spec,
    write_folder,
)

from jax_monokernel.checkpoints import Checkpoint, CheckpointError, Part, load_weights, save_weights
from jax_monokernel.spec import RopeSpec

INDEX = "model.safetensors.index.json"


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def opened(tmp_path: Path, content: bytes) -> Checkpoint:
    return Checkpoint(write_folder(tmp_path / "c", {"model.safetensors": content}))


# Reading


@pytest.mark.parametrize("dtype", [name for name in NAMES if name != "float8_e4m3fn"])
@pytest.mark.parametrize("pad", [0, 1, 5], ids=lambda n: f"pad{n}")
def test_reads_every_dtype_at_any_alignment(tmp_path, dtype, pad):
    rng = np.random.default_rng(len(dtype) + pad)
    arrays = {name: random_array(rng, shape, dtype) for name, shape in {"a": (3, 5), "empty": (0, 7), "s": ()}.items()}
    checkpoint = opened(tmp_path, tensors_bytes(arrays, pad=pad))
    assert checkpoint.nbytes == sum(a.nbytes for a in arrays.values())
    for name, array in arrays.items():
        assert checkpoint.tensors[name] == (array.shape, NAMES[dtype])
        got = checkpoint.read(name)
        assert (got.dtype, got.shape) == (array.dtype, array.shape)
        assert got.tobytes() == array.tobytes()
        assert not got.flags.writeable or got.size == 0


def test_unsupported_dtype_is_an_error_only_when_read(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {"w": random_array(rng, (2, 2)), "q": random_array(rng, (4,), "float8_e4m3fn")}
    checkpoint = opened(tmp_path, tensors_bytes(arrays))
    np.testing.assert_array_equal(checkpoint.read("w"), arrays["w"])
    with pytest.raises(CheckpointError, match=r"stores 'q' as F8_E4M3.*use a checkpoint in BF16"):
        checkpoint.read("q")
    with pytest.raises(CheckpointError, match="no tensor 'nope'"):
        checkpoint.read("nope")


def test_released_views_stay_valid(tmp_path):
    array = random_array(np.random.default_rng(1), (300, 100))
    checkpoint = opened(tmp_path, tensors_bytes({"a": array}))
    view = checkpoint.read("a")
    checkpoint.release("a")
    np.testing.assert_array_equal(view, array)


BAD_FILES = {
    "empty": (b"", "has 0 bytes"),
    "seven bytes": (b"\x01" + b"\0" * 6, "has 7 bytes"),
    "header longer than file": (file_bytes({}, length=3), "only 2 bytes follow"),
    "header above the limit": (file_bytes({}, length=100_000_001), "the format allows 100000000"),
    "header of 2^64 - 1 bytes": (b"\xff" * 8 + b"{}", "the format allows"),
    "empty header": (file_bytes(b""), "does not start with '{'"),
    "array header": (file_bytes(b"[]"), "does not start with '{'"),
    "space before header": (file_bytes(b" {}"), "does not start with '{'"),
    "cut header": (file_bytes(b'{"a":'), "not valid JSON"),
    "two objects": (file_bytes(b"{}{}"), "not valid JSON"),
    "zero byte after header": (file_bytes(b"{}\0"), "not valid JSON"),
    "not UTF-8": (file_bytes(b'{"\xff":1}'), "not valid JSON"),
    "nested beyond the stack": (file_bytes(b'{"a":' + b"[" * 100_000), "not valid JSON"),
    "number of a million digits": (file_bytes(b'{"a":' + b"9" * 1_000_000 + b"}"), "not valid JSON"),
    "NaN": (file_bytes(b'{"a":NaN}'), "NaN.* where only integers"),
    "float shape": (file_bytes(b'{"a":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}}', b"\1" * 8), "2.0"),
    "duplicate tensor": (
        file_bytes(b'{"a":%s,"\\u0061":%s}' % ((json.dumps(entry()).encode(),) * 2), b"\1" * 8),
        "'a' occurs twice",
    ),
    "duplicate field": (
        file_bytes(b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', b"\1" * 8),
        "'dtype' occurs twice",
    ),
    "metadata of numbers": (file_bytes({"__metadata__": {"format": 1}}), "__metadata__"),
    "metadata is a list": (file_bytes({"__metadata__": ["pt"]}), "__metadata__"),
    "entry is a list": (file_bytes({"a": [1]}), "tensor 'a' by something else"),
    "entry without shape": (file_bytes({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, b"\1" * 8), "something else"),
    "unknown dtype": (file_bytes({"a": entry("F12")}, b"\1" * 8), "unknown dtype 'F12'"),
    "dtype is a list": (file_bytes({"a": entry(["F32"])}, b"\1" * 8), "unknown dtype"),
    "negative dimension": (file_bytes({"a": entry(shape=[-2])}, b"\1" * 8), "non-negative"),
    "two negative dimensions": (file_bytes({"a": entry(shape=[-2, -1])}, b"\1" * 8), "non-negative"),
    "boolean dimension": (file_bytes({"a": entry(shape=[True, 2])}, b"\1" * 8), "non-negative"),
    "33 dimensions": (file_bytes({"a": entry(shape=[1] * 33, offsets=[0, 4])}, b"\1" * 4), "up to 32"),
    "size that wraps to 8 in 64 bits": (
        file_bytes({"a": entry(shape=[2**62 + 2**61, 2**3 + 2], offsets=[0, 8])}, b"\1" * 8),
        "larger than any memory",
    ),
    "zero hides a huge dimension": (file_bytes({"a": entry(shape=[0, 2**62], offsets=[0, 0])}), "larger than any"),
    "dimension above 64 bits": (file_bytes({"a": entry(shape=[0, 2**64], offsets=[0, 0])}), "non-negative"),
    "offset above 64 bits": (file_bytes({"a": entry(offsets=[2**64, 2**64 + 8])}, b"\1" * 8), "non-negative"),
    "one offset": (file_bytes({"a": entry(offsets=[0])}, b"\1" * 8), "two non-negative"),
    "reversed offsets": (file_bytes({"a": entry(offsets=[8, 0])}, b"\1" * 8), "bytes 8 to 0 of 8"),
    "negative offset": (file_bytes({"a": entry(offsets=[-8, 0])}, b"\1" * 8), "two non-negative"),
    "offset past the end": (file_bytes({"a": entry(offsets=[4, 12])}, b"\1" * 8), "bytes 4 to 12 of 8"),
    "data cut short": (file_bytes({"a": entry()}, b"\1" * 7), "cut short, fetch it again"),
    "range larger than shape": (file_bytes({"a": entry(offsets=[0, 12])}, b"\1" * 12), r"12 bytes, but .* takes 8"),
    "range smaller than shape": (file_bytes({"a": entry(offsets=[0, 4])}, b"\1" * 4), r"4 bytes, but .* takes 8"),
    "half a byte": (file_bytes({"a": entry("F4", [3], [0, 2])}, b"\1" * 2), r"takes 1.5"),
    "bytes after the last tensor": (file_bytes({"a": entry()}, b"\1" * 9), "1 bytes after its last tensor"),
    "bytes without tensors": (file_bytes({}, b"\1"), "1 bytes after"),
    "hole at the start": (file_bytes({"a": entry(offsets=[4, 12])}, b"\1" * 12), "4 bytes before tensor 'a'"),
    "hole between": (
        file_bytes({"a": entry(), "b": entry(offsets=[9, 17])}, b"\1" * 17),
        "1 bytes before tensor 'b'",
    ),
    "overlap": (file_bytes({"a": entry(), "b": entry(offsets=[7, 15])}, b"\1" * 15), "overlapping tensors 'a' and 'b'"),
    "same range twice": (file_bytes({"a": entry(), "b": entry()}, b"\1" * 8), "overlapping"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_refuses_broken_files(tmp_path, case):
    content, message = BAD_FILES[case]
    with pytest.raises(CheckpointError, match=message) as caught:
        opened(tmp_path, content)
    assert "model.safetensors" in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_accepts_what_the_format_allows(tmp_path):
    # Sub-byte and zero-size tensors, metadata, trailing spaces, any order of names.
    header = {
        "z": entry(),
        "__metadata__": {"format": "pt"},
        "none": entry(shape=[0, 3], offsets=[8, 8]),
        "a": entry("F4", [4], [8, 10]),
    }
    checkpoint = opened(tmp_path, file_bytes(json.dumps(header).encode() + b"   ", bytes(range(10))))
    assert checkpoint.read("z").tobytes() == bytes(range(8))
    assert checkpoint.read("none").shape == (0, 3)


def test_file_that_shrinks_after_opening_is_an_error_not_a_crash(tmp_path):
    array = random_array(np.random.default_rng(2), (4000,))
    checkpoint = opened(tmp_path, tensors_bytes({"a": array}))
    os.truncate(tmp_path / "c" / "model.safetensors", 5000)
    with pytest.raises(CheckpointError, match="shrank from"):
        checkpoint.read("a")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", INDEX])
@pytest.mark.parametrize("kind", ["folder", "pipe", "link to nowhere"])
def test_files_that_are_not_files(tmp_path, name, kind):
    folder = write_folder(tmp_path, {INDEX: b"{}"} if name == INDEX else {"model.safetensors": tensors_bytes({})})
    (folder / name).unlink()
    if kind == "folder":
        (folder / name).mkdir()
    elif kind == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to("nowhere")
    with pytest.raises(CheckpointError, match=r"not a regular file|does not exist|has neither"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"[]", "expected a JSON object"),
        (b"\xff\xfe", "not UTF-8"),
        (b'{"a":' + b"[" * 100_000, "not valid JSON"),
    ],
    ids=["empty", "list", "not UTF-8", "nested"],
)
def test_refuses_broken_config(tmp_path, content, message):
    write_folder(tmp_path, {"model.safetensors": tensors_bytes({})})
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(tmp_path)


def test_says_what_a_folder_lacks(tmp_path):
    with pytest.raises(CheckpointError, match=r"not a folder; expected one with config\.json"):
        Checkpoint(tmp_path / "nope")
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        Checkpoint(tmp_path)
    write_folder(tmp_path, {"pytorch_model.bin": b"x"})
    with pytest.raises(
        CheckpointError, match=r"neither model\.safetensors nor .*\.bin files, say\) must be saved as safetensors"
    ):
        Checkpoint(tmp_path)


# Shards


def shards(tmp_path: Path, weight_map: object, files: dict[str, dict[str, np.ndarray]]) -> Checkpoint:
    content = {name: tensors_bytes(arrays) for name, arrays in files.items()}
    return Checkpoint(write_folder(tmp_path, {INDEX: json.dumps({"weight_map": weight_map}).encode(), **content}))


def test_reads_shards(tmp_path):
    rng = np.random.default_rng(3)
    a, b, c = (random_array(rng, (2, n)) for n in (1, 2, 3))
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    checkpoint = shards(tmp_path, {"a": one, "c": one, "b": two}, {one: {"a": a, "c": c}, two: {"b": b}})
    assert set(checkpoint.tensors) == {"a", "b", "c"}
    assert checkpoint.nbytes == a.nbytes + b.nbytes + c.nbytes
    for name, array in {"a": a, "b": b, "c": c}.items():
        np.testing.assert_array_equal(checkpoint.read(name), array)


BAD_INDEXES = {
    "no weight_map": (None, "no weight_map"),
    "empty": ({}, "no weight_map"),
    "list": ([["a", "s1.safetensors"]], "no weight_map"),
    "missing shard": ({"a": "s1.safetensors", "b": "s3.safetensors"}, "lacks s3.safetensors.*fetch the missing file"),
    "tensor not in shard": (
        {"a": "s1.safetensors", "b": "s2.safetensors", "c": "s2.safetensors"},
        r"s2\.safetensors lacks the tensor 'c'",
    ),
    "tensor in another shard": ({"a": "s1.safetensors", "b": "s1.safetensors"}, r"lacks the tensor 'b'"),
    "swapped": ({"a": "s2.safetensors", "b": "s1.safetensors"}, r"lacks the tensor 'a'"),
    "tensor not named": ({"b": "s2.safetensors", "c": "s1.safetensors"}, "has the tensor 'a', which .* does not name"),
    "parent folder": ({"a": "../s1.safetensors"}, "expected the plain name"),
    "absolute path": ({"a": "/etc/passwd.safetensors"}, "expected the plain name"),
    "subfolder": ({"a": "x/s1.safetensors"}, "expected the plain name"),
    "backslash": ({"a": "..\\s1.safetensors"}, "expected the plain name"),
    "drive": ({"a": "C:s1.safetensors"}, "expected the plain name"),
    "zero byte": ({"a": "s1\0.safetensors"}, "expected the plain name"),
    "surrogate": ({"a": "s\ud8001.safetensors"}, "expected the plain name"),
    "other suffix": ({"a": "s1.bin"}, "expected the plain name"),
    "dots": ({"a": ".."}, "expected the plain name"),
    "number": ({"a": 1}, "expected the plain name"),
    "object": ({"a": {"b": 1}}, "expected the plain name"),
    "name of 5000 letters": ({"a": "s" * 5000 + ".safetensors"}, "lacks s"),
}


@pytest.mark.parametrize("case", BAD_INDEXES)
def test_refuses_broken_index(tmp_path, case):
    weight_map, message = BAD_INDEXES[case]
    rng = np.random.default_rng(4)
    files = {f"s{i}.safetensors": {name: random_array(rng, (2,))} for i, name in enumerate("ab", 1)}
    with pytest.raises(CheckpointError, match=message):
        shards(tmp_path, weight_map, files)


def test_refuses_a_tensor_in_two_shards(tmp_path):
    rng = np.random.default_rng(5)
    files = {
        "s1.safetensors": {"a": random_array(rng, (2,))},
        "s2.safetensors": {n: random_array(rng, (2,)) for n in "ab"},
    }
    with pytest.raises(CheckpointError, match=r"the tensor 'a' twice, in s1\.safetensors and s2\.safetensors"):
        shards(tmp_path, {"a": "s1.safetensors", "b": "s2.safetensors"}, files)
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "s1.safetensors", "a": "s2.safetensors"}}')
    with pytest.raises(CheckpointError, match="'a' occurs twice"):
        Checkpoint(tmp_path)


# Loading


@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused"])
@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_loads_every_role(tmp_path, dtype, tied, fused):
    spec = tiny_spec(dtype=dtype, tied_head=tied, qkv_bias=True, mlp_bias=True, qk_norm="head", post_norm=True)
    weights, tensor_map = random_weights(spec, 6), tiny_map(spec, fused=fused)
    checkpoint = opened(tmp_path, tensors_bytes(tensor_values(weights, tensor_map), pad=1))
    loaded = load_weights(checkpoint, spec, tensor_map)
    assert_same(loaded, weights)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded))


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("wanted", ["bfloat16", "float16", "float32"])
def test_casts(tmp_path, stored, wanted):
    spec = tiny_spec(dtype=wanted)
    tensor_map = tiny_map(spec)
    values = tensor_values(random_weights(tiny_spec(), 7), tensor_map)
    kind = np.dtype(getattr(ml_dtypes, stored, stored))
    stored_values = {name: value.astype(kind) for name, value in values.items()}
    loaded = load_weights(opened(tmp_path, tensors_bytes(stored_values)), spec, tensor_map)
    for name, got in tensor_values(loaded, tensor_map).items():
        np.testing.assert_array_equal(got, stored_values[name].astype(jnp.dtype(wanted)))


def test_cast_in_many_runs_of_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("jax_monokernel.checkpoints._CAST_ELEMENTS", 50)
    test_casts(tmp_path, "float32", "bfloat16")


def test_refuses_values_beyond_the_dtype(tmp_path):
    spec = tiny_spec(dtype="float16")
    tensor_map = tiny_map(spec)
    values = tensor_values(random_weights(tiny_spec(), 8), tensor_map)
    values["layers.1.down"][3, 4] = 65_536.0
    checkpoint = opened(tmp_path, tensors_bytes(values))
    with pytest.raises(CheckpointError, match=r"layers\.1\.down has values beyond the range of float16; load with"):
        load_weights(checkpoint, spec, tensor_map)
    # An infinity that the file itself holds is not ours to judge.
    values["layers.1.down"][3, 4] = np.inf
    loaded = load_weights(opened(tmp_path, tensors_bytes(values)), spec, tensor_map)
    assert np.isinf(loaded.layers.down[1, 3, 4])


def test_reports_every_problem_at_once(tmp_path):
    spec = tiny_spec()
    tensor_map = tiny_map(spec)
    values = tensor_values(random_weights(spec, 9), tensor_map)
    del values["norm.weight"]
    values["embed.weight"] = values["embed.weight"][:-1]
    values["layers.0.down"] = values["layers.0.down"].astype(np.int8)
    values["visual.weight"] = values["layers.0.o"]
    with pytest.raises(CheckpointError) as caught:
        load_weights(opened(tmp_path, tensors_bytes(values)), spec, tensor_map)
    text = str(caught.value)
    for line in (
        "norm.weight is missing; expected shape [20]",
        "embed.weight has shape [36, 20]; expected [37, 20]",
        "layers.0.down is stored as I8; expected one of BF16, F16, F32, F64",
        "'visual.weight' [20, 24] is not part of this model",
    ):
        assert line in text
    assert len(text.splitlines()) == 6


def test_reports_ten_problems_and_counts_the_rest(tmp_path):
    spec = tiny_spec()
    with pytest.raises(CheckpointError, match="and 14 more") as caught:
        load_weights(opened(tmp_path, tensors_bytes({})), spec, tiny_map(spec))
    assert str(caught.value).count("is missing") == 10


def test_harmless_extras(tmp_path):
    spec = tiny_spec(tied_head=True, dtype="bfloat16")
    weights, tensor_map = random_weights(spec, 10), tiny_map(spec)
    values = tensor_values(weights, tensor_map)
    values["model.layers.0.self_attn.rotary_emb.inv_freq"] = random_array(np.random.default_rng(11), (3,))
    values["lm_head.weight"] = values["embed.weight"]
    assert_same(load_weights(opened(tmp_path, tensors_bytes(values)), spec, tensor_map), weights)

    changed = values["embed.weight"].copy()
    changed[-1, -1] += 1
    for other in (changed, changed[:-1], values["embed.weight"].astype(np.float32)):
        values["lm_head.weight"] = other
        with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from embed\.weight, but the config ties"):
            load_weights(opened(tmp_path, tensors_bytes(values)), spec, tensor_map)


def test_renames_and_leaves_out(tmp_path):
    spec = tiny_spec()
    weights, tensor_map = random_weights(spec, 12), tiny_map(spec)
    values = {f"text.{name}": value for name, value in tensor_values(weights, tensor_map).items()}
    values["image.weight"] = random_array(np.random.default_rng(13), (5,))

    def rename(name: str) -> str | None:
        return name.removeprefix("text.") if name.startswith("text.") else None

    checkpoint = opened(tmp_path, tensors_bytes(values))
    assert_same(load_weights(checkpoint, spec, tensor_map, rename=rename), weights)
    with pytest.raises(CheckpointError, match=r"has 'embed\.weight' twice, as"):
        load_weights(checkpoint, spec, tensor_map, rename=lambda name: "embed.weight")


def without(tensor_map, name):
    return {k: v for k, v in tensor_map.items() if k != name}


BAD_MAPS = {
    "left out": (lambda m: without(m, "layers.1.o"), "leaves out role 'layers.o', layer 1"),
    "given twice": (lambda m: {**m, "again": m["norm.weight"]}, "'final_norm', layer None, in 'again'.*twice"),
    "no such layer": (lambda m: {**m, "x": (Part("layers.o", 3, (20, 24)),)}, "layer 3"),
    "no such role": (lambda m: {**m, "x": (Part("layers.q_norm", 0, (6,)),)}, "layers.q_norm"),
    "other shape": (lambda m: {**m, "norm.weight": (Part("final_norm", None, (21,)),)}, r"asks for \[20\]"),
    "joined widths": (
        lambda m: {**without(without(m, "layers.0.o"), "layers.0.up"), "x": m["layers.0.o"] + m["layers.0.up"]},
        "different widths",
    ),
    "no parts": (lambda m: {**m, "x": ()}, "or none"),
}


@pytest.mark.parametrize("case", BAD_MAPS)
def test_refuses_maps_that_do_not_fit_the_spec(tmp_path, case):
    change, message = BAD_MAPS[case]
    spec = tiny_spec()
    checkpoint = opened(tmp_path, tensors_bytes(tensor_values(random_weights(spec, 14), tiny_map(spec))))
    with pytest.raises(ValueError, match=message):
        load_weights(checkpoint, spec, change(tiny_map(spec)))


def test_progress_bar_only_when_asked(tmp_path, capsys):
    spec = tiny_spec()
    tensor_map = tiny_map(spec)
    checkpoint = opened(tmp_path, tensors_bytes(tensor_values(random_weights(spec, 15), tensor_map)))
    load_weights(checkpoint, spec, tensor_map)
    load_weights(checkpoint, spec, tensor_map, progress=False)
    assert capsys.readouterr() == ("", "")
    load_weights(checkpoint, spec, tensor_map, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "Loading c" in err
    size = f"{checkpoint.nbytes / 1000:.1f}"
    assert f"{size}/{size} kB" in err


def test_device_is_where_the_weights_go(tmp_path):
    spec = tiny_spec()
    tensor_map = tiny_map(spec)
    checkpoint = opened(tmp_path, tensors_bytes(tensor_values(random_weights(spec, 16), tensor_map)))
    device = jax.devices()[-1]
    loaded = load_weights(checkpoint, spec, tensor_map, device=device)
    assert all(leaf.devices() == {device} and leaf.committed for leaf in jax.tree.leaves(loaded))


def memory_bytes(field: str) -> int:
    """VmRSS, memory in use now, or VmHWM, its peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def test_peak_memory_is_one_copy_and_one_role(tmp_path):
    reset = Path("/proc/self/clear_refs")
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None or not os.access(reset, os.W_OK):
        pytest.skip("measures with Linux's clear_refs and glibc's malloc_trim")
    sizes = {"vocab_size": 9001, "hidden_size": 768, "intermediate_size": 2049, "num_heads": 8, "head_dim": 96}
    spec = tiny_spec(**sizes, num_kv_heads=8, ropes=(RopeSpec(theta=1e4, rotary_dim=96),), dtype="bfloat16")
    tensor_map = tiny_map(spec)
    weights = random_weights(spec, 17)
    save_weights(tmp_path / "c", spec, weights, tensor_map, {"model_type": "test"})
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(weights))
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    assert total > 60e6
    del weights
    gc.collect()
    trim(0)  # memory of earlier tests that is free, but still ours, would hide what loading takes
    checkpoint = Checkpoint(tmp_path / "c")
    before = memory_bytes("VmRSS")
    reset.write_text("5")  # the peak starts anew
    loaded = load_weights(checkpoint, spec, tensor_map)
    grown = memory_bytes("VmHWM") - before
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(loaded)) == total
    assert 0.9 * total < grown < total + largest + 4e6
