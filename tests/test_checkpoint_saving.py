"""Saving checkpoint folders: exact, whole or not at all, and nothing overwritten unasked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors_tools import (
    assert_same,
    random_weights,
    tensor_values,
    tiny_map,
    tiny_spec,
    write_folder,
)

from jax_monokernel import checkpoint_saving
from jax_monokernel.checkpoints import Checkpoint, CheckpointError, load_weights, save_weights

INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("limit", [10**9, 8000, 1], ids=["one file", "shards", "one tensor per file"])
def test_save_then_load_is_exact(tmp_path, dtype, limit):
    spec = tiny_spec(dtype=dtype, tied_head=True)
    weights, tensor_map = random_weights(spec, 18), tiny_map(spec)
    config = {"model_type": "test", "dtype": "float64", "text_config": {"torch_dtype": "float64"}, "x": [1, None]}
    save_weights(tmp_path / "new" / "c", spec, weights, tensor_map, config, max_shard_bytes=limit)
    checkpoint = Checkpoint(tmp_path / "new" / "c")
    assert checkpoint.config == config | {"dtype": dtype, "text_config": {"torch_dtype": dtype}}
    assert_same(load_weights(checkpoint, spec, tensor_map), weights)

    # The safetensors library agrees with us about what is in the files, and nothing else is in the folder.
    expected = tensor_values(weights, tensor_map)
    files = sorted(p.name for p in checkpoint.path.glob("*.safetensors"))
    found = {}
    for name in files:
        with safe_open(checkpoint.path / name, framework="np") as file:
            assert file.metadata() == {"format": "pt"}
            found |= dict.fromkeys(file.keys(), name)
            for key in file.keys():  # noqa: SIM118
                assert file.get_tensor(key).tobytes() == expected[key].tobytes()
    assert found.keys() == expected.keys()
    assert len({p.stat().st_mode for p in checkpoint.path.iterdir()}) == 1  # readable by the same people
    names = {p.name for p in checkpoint.path.iterdir()}
    if limit == 10**9:
        assert names == {"config.json", "model.safetensors"}
    else:
        index = json.loads((checkpoint.path / INDEX).read_text())
        assert index == {"metadata": {"total_size": checkpoint.nbytes}, "weight_map": found}
        assert names == {"config.json", INDEX, *files}
        assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
        largest = max(value.nbytes for value in expected.values())
        assert all(
            sum(expected[k].nbytes for k, f in found.items() if f == name) <= max(limit, largest) for name in files
        )


@pytest.mark.parametrize("key", ["torch_dtype", "dtype", None])
def test_config_says_the_saved_dtype(tmp_path, key):
    spec = tiny_spec(dtype="bfloat16")
    config = {"model_type": "test"} | ({key: "float32"} if key else {})
    save_weights(tmp_path, spec, random_weights(spec, 19), tiny_map(spec), config)
    assert Checkpoint(tmp_path).config == {"model_type": "test", key or "torch_dtype": "bfloat16"}
    assert config.get(key) == ("float32" if key else None)  # the caller's own is left alone


def test_never_overwrites_unless_told(tmp_path):
    spec = tiny_spec()
    old, new, tensor_map = random_weights(spec, 20), random_weights(spec, 21), tiny_map(spec)
    save_weights(tmp_path, spec, old, tensor_map, {"v": 1}, max_shard_bytes=3000)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"already holds config\.json and .*index\.json; pass overwrite=True"):
        save_weights(tmp_path, spec, new, tensor_map, {"v": 2})
    assert_same(load_weights(Checkpoint(tmp_path), spec, tensor_map), old)
    save_weights(tmp_path, spec, new, tensor_map, {"v": 2}, overwrite=True)
    # No old shard stays behind to be mixed up with the new file.
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors", "notes.txt"}
    assert_same(load_weights(Checkpoint(tmp_path), spec, tensor_map), new)
    save_weights(tmp_path, spec, old, tensor_map, {"v": 3}, overwrite=True, max_shard_bytes=3000)
    assert not (tmp_path / "model.safetensors").exists()
    assert_same(load_weights(Checkpoint(tmp_path), spec, tensor_map), old)


def test_overwriting_a_hostile_index_removes_nothing_outside(tmp_path):
    outside = tmp_path / "outside.safetensors"
    outside.write_text("mine")
    index = json.dumps({"weight_map": {"a": "../outside.safetensors", "b": str(outside), "c": 3}}).encode()
    folder = write_folder(tmp_path / "c", {INDEX: index})
    spec = tiny_spec()
    save_weights(folder, spec, random_weights(spec, 22), tiny_map(spec), {}, overwrite=True)
    assert outside.read_text() == "mine"
    assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors"}


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("before", ["nothing", "one file", "same shards", "more shards"])
def test_an_interrupted_save_never_looks_like_a_checkpoint(tmp_path, monkeypatch, before):
    spec = tiny_spec()
    tensor_map, old, new = tiny_map(spec), random_weights(spec, 23), random_weights(spec, 24)
    steps = [(checkpoint_saving, "save_file"), (Path, "replace"), (Path, "unlink"), (Path, "write_text")]

    def attempt(folder: Path, stop_at: int) -> bool:
        """Saves, stopped just before the n-th change to the folder; whether it got that far."""
        count = 0

        def stopping(original):
            def call(*args, **kwargs):
                nonlocal count
                count += 1
                # From then on nothing works, as after a crash, so nothing is tidied up either.
                if count > stop_at:
                    raise Interrupted
                return original(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for owner, name in steps:
                patch.setattr(owner, name, stopping(getattr(owner, name)))
            try:
                save_weights(folder, spec, new, tensor_map, {"v": 2}, max_shard_bytes=9000, overwrite=True)
            except Interrupted:
                return True
        return False

    if before != "nothing":
        limit = {"one file": 10**9, "same shards": 9000, "more shards": 6000}[before]
        save_weights(tmp_path / "old", spec, old, tensor_map, {"v": 1}, max_shard_bytes=limit)
    outcomes = set()
    for stop_at in range(100):
        folder = tmp_path / str(stop_at)
        if before != "nothing":
            shutil.copytree(tmp_path / "old", folder)
        stopped = attempt(folder, stop_at)
        try:
            checkpoint = Checkpoint(folder)
        except CheckpointError:
            outcomes.add("none")
        else:
            version = checkpoint.config["v"]
            assert_same(load_weights(checkpoint, spec, tensor_map), {1: old, 2: new}[version])
            outcomes.add(version)
        if not stopped:
            break
    assert not stopped
    assert outcomes == ({"none", 2} if before == "nothing" else {1, "none", 2})


def test_a_failed_save_leaves_nothing_and_says_why(tmp_path, monkeypatch):
    spec = tiny_spec()

    def full(*args, **kwargs):
        Path(args[1]).write_text("half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_saving, "save_file", full)
    with pytest.raises(CheckpointError, match=r"could not save to .*No space left on device"):
        save_weights(tmp_path, spec, random_weights(spec, 25), tiny_map(spec), {})
    assert list(tmp_path.iterdir()) == []


def test_save_refuses_what_it_cannot_write(tmp_path):
    spec = tiny_spec()
    weights, tensor_map = random_weights(spec, 26), tiny_map(spec)
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is a file; expected a folder"):
        save_weights(tmp_path / "file", spec, weights, tensor_map, {})
    with pytest.raises(CheckpointError, match="could not save"):
        save_weights(tmp_path / "file" / "c", spec, weights, tensor_map, {})
    with pytest.raises(CheckpointError, match="cannot be written as JSON"):
        save_weights(tmp_path / "c", spec, weights, tensor_map, {"x": object()})
    with pytest.raises(ValueError, match="max_shard_bytes is 0"):
        save_weights(tmp_path / "c", spec, weights, tensor_map, {}, max_shard_bytes=0)
    with pytest.raises(ValueError, match="the spec asks for"):
        save_weights(tmp_path / "c", spec.replace(vocab_size=38), weights, tensor_map, {})
    assert not (tmp_path / "c").exists()


def test_extra_files_travel(tmp_path):
    spec = tiny_spec()
    weights, tensor_map = random_weights(spec, 27), tiny_map(spec)
    source = tmp_path / "tokenizer.json"
    source.write_text("new")
    folder = tmp_path / "c"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("old")
    save_weights(folder, spec, weights, tensor_map, {}, extra_files=[source])
    assert (folder / "tokenizer.json").read_text() == "old"
    save_weights(folder, spec, weights, tensor_map, {}, extra_files=[source], overwrite=True)
    assert (folder / "tokenizer.json").read_text() == "new"
    # Onto itself.
    save_weights(folder, spec, weights, tensor_map, {}, extra_files=[folder / "tokenizer.json"], overwrite=True)
    assert (folder / "tokenizer.json").read_text() == "new"
