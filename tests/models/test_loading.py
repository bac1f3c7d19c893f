"""Models from checkpoint folders and hub ids, and back."""

from __future__ import annotations

import copy
import functools
import json
import pickle
import warnings
from pathlib import Path

import golden
import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.utils
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from golden.cases import CASES
from golden.models import golden_model
from safetensors_tools import assert_same, random_array, tensors_bytes, write_folder

from jax_monokernel.checkpoints import Checkpoint, CheckpointError
from jax_monokernel.models import Decoder, from_pretrained, save_pretrained

# One case of each family, for what is slow.
FAMILIES = {case.config["model_type"]: name for name, case in reversed(CASES.items())}


def written(folder: Path, name: str, stored: str = "float32", /, **config) -> Path:
    """A golden case as a checkpoint folder."""
    case = golden.read(name)
    kind = np.dtype(getattr(ml_dtypes, stored, stored))
    content = tensors_bytes({key: value.astype(kind) for key, value in case.tensors().items()})
    merged = {**case.config, "torch_dtype": stored, **config}
    merged = {key: value for key, value in merged.items() if value is not ...}
    return write_folder(folder, {"model.safetensors": content}, merged)


def weights_of(model: Decoder):
    return model.decoder_weights()


@pytest.mark.parametrize("name", CASES)
def test_every_family_loads_and_round_trips(tmp_path, name):
    expected = golden_model(golden.read(name))
    model = from_pretrained(written(tmp_path / "a", name))
    assert model.spec == expected.spec
    assert_same(weights_of(model), weights_of(expected))
    save_pretrained(model, tmp_path / "b", max_shard_bytes=30_000)
    assert len(list((tmp_path / "b").glob("model-*.safetensors"))) > 1
    again = from_pretrained(tmp_path / "b")
    assert again.spec == model.spec
    assert_same(weights_of(again), weights_of(model))
    assert Checkpoint(tmp_path / "b").tensors == Checkpoint(tmp_path / "a").tensors


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("wanted", [None, "bfloat16", jnp.float16, np.dtype("float32")], ids=str)
def test_dtype(tmp_path, stored, wanted):
    model = from_pretrained(written(tmp_path, FAMILIES["llama"], stored), dtype=wanted)
    name = stored if wanted is None else jnp.dtype(wanted).name
    assert model.spec.dtype == name
    through = golden_model(golden.read(FAMILIES["llama"]), stored).decoder_weights()
    assert_same(weights_of(model), jax.tree.map(lambda x: x.astype(name), through))


@pytest.mark.parametrize(
    "config",
    [{"torch_dtype": "torch.bfloat16"}, {"dtype": "bfloat16", "torch_dtype": ...}, {"torch_dtype": ...}],
    ids=["torch name", "new name", "not given"],
)
def test_stored_dtype_spellings(tmp_path, config):
    assert from_pretrained(written(tmp_path, FAMILIES["llama"], "bfloat16", **config)).spec.dtype == "bfloat16"


def test_dtypes_that_are_not_supported(tmp_path):
    folder = written(tmp_path / "a", FAMILIES["llama"])
    for dtype in ("int8", "float8", float, object()):
        with pytest.raises(ValueError, match=r"dtype is .*; expected one of bfloat16, float16, float32"):
            from_pretrained(folder, dtype=dtype)
    for stored in ("float64", "int8", ["bfloat16"]):
        folder = written(tmp_path / str(stored), FAMILIES["llama"], torch_dtype=stored)
        with pytest.raises(CheckpointError, match="cannot be used as it is; pass dtype=, one of bfloat16"):
            from_pretrained(folder)
        assert from_pretrained(folder, dtype="bfloat16").spec.dtype == "bfloat16"


def test_device(tmp_path):
    device = jax.devices()[-1]
    model = from_pretrained(written(tmp_path, FAMILIES["qwen3"]), device=device)
    assert all(x.devices() == {device} and x.committed for x in jax.tree.leaves(weights_of(model)))


def test_unknown_models_and_fields(tmp_path):
    for change, message in [
        ({"model_type": ...}, "no model_type"),
        ({"model_type": "mamba"}, "'mamba', which is not supported"),
        ({"model_type": ["llama"]}, "not supported"),
        ({"shiny_new_attention": True}, "shiny_new_attention"),
        ({"num_hidden_layers": 4}, r"layers\.3\..* is missing"),
        ({"num_hidden_layers": 1}, r"layers\.2\..* is not part of this model"),
        ({"vocab_size": 102}, r"embed_tokens\.weight has shape \[101, 48\]; expected \[102, 48\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            from_pretrained(written(tmp_path, "llama", **change))


def test_text_part_of_a_checkpoint_for_text_and_images(tmp_path):
    case = golden.read(FAMILIES["gemma3_text"])
    expected = golden_model(case)
    config = {
        "model_type": "gemma3",
        "text_config": dict(case.config),
        "vision_config": {"hidden_size": 8},
        "eos_token_id": [1, 106],
        "dtype": "float32",
    }
    image = random_array(np.random.default_rng(0), (3, 5))
    for prefix, vision in (("language_model.", "vision_tower."), ("model.language_model.", "model.vision_tower.")):
        strip = "model." if prefix.startswith("model.") else ""
        tensors = {prefix + name.removeprefix(strip): value for name, value in case.tensors().items()}
        folder = write_folder(
            tmp_path / vision, {"model.safetensors": tensors_bytes(tensors | {vision + "patch.weight": image})}, config
        )
        model = from_pretrained(folder)
        assert model.spec == expected.spec
        assert_same(weights_of(model), weights_of(expected))
        # What is saved is a model for text.
        save_pretrained(model, tmp_path / f"saved {vision}")
        again = from_pretrained(tmp_path / f"saved {vision}")
        assert again.spec == model.spec
        assert again.config["model_type"] == "gemma3_text"
        assert again.config["eos_token_id"] == [1, 106]
        assert_same(weights_of(again), weights_of(model))


# What a loaded model knows about its checkpoint


def test_loaded_models_go_through_nnx(tmp_path):
    model = from_pretrained(written(tmp_path, FAMILIES["llama"], rope_theta=500.0))
    tokens = jnp.array([[3, 1, 4, 1, 5]])
    graph, state = nnx.split(model)
    twin = nnx.split(from_pretrained(tmp_path))[0]
    assert (hash(graph), graph) == (hash(twin), twin)
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def run(graph, state, tokens):
        traces.append(None)
        return nnx.merge(graph, state)(tokens)

    # A model loaded again shares the compiled function.
    np.testing.assert_array_equal(run(graph, state, tokens), run(twin, state, tokens))
    assert len(traces) == 1
    assert nnx.jit(lambda m: m.final_norm[...].sum())(model) == model.final_norm[...].sum()
    for other in (nnx.merge(graph, state), nnx.clone(model), copy.deepcopy(model)):
        assert other.config == model.config
        assert_same(weights_of(other), weights_of(model))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(model))
    gradients = jax.eval_shape(nnx.grad(lambda m: m(tokens).mean()), model)
    assert len(jax.tree.leaves(gradients)) == len(jax.tree.leaves(state))


def test_config_is_a_copy_and_fresh_models_have_none(tmp_path):
    model = from_pretrained(written(tmp_path, FAMILIES["llama"]))
    model.config["vocab_size"] = 1
    assert model.config == json.loads((tmp_path / "config.json").read_text())
    assert model.origin.folder == tmp_path
    assert model.tokenizer is None
    assert pickle.loads(pickle.dumps(model.origin)) == model.origin
    fresh = Decoder.from_weights(model.spec, weights_of(model))
    assert (fresh.config, fresh.tokenizer, fresh.origin) == (None, None, None)


def test_eos_ids_need_no_tokenizer(tmp_path):
    model = from_pretrained(written(tmp_path, FAMILIES["llama"], eos_token_id=7))
    assert model.origin.eos_token_id == (7,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 3]}')
    assert model.origin.eos_token_id == (9, 3)


# Saving


def test_fine_tuned_weights_travel(tmp_path):
    model = from_pretrained(written(tmp_path / "a", FAMILIES["qwen2"]), dtype="bfloat16")
    (tmp_path / "a" / "generation_config.json").write_text('{"eos_token_id": [9, 3]}')
    (tmp_path / "a" / "README.md").write_text("of the original")
    model.embedding[...] = model.embedding[...] * 1.5
    model.layers.q[...] = model.layers.q[...].at[1].add(1.0)
    save_pretrained(model, tmp_path / "b")
    again = from_pretrained(tmp_path / "b")
    assert again.spec.dtype == "bfloat16"
    assert_same(weights_of(again), weights_of(model))
    assert again.origin.eos_token_id == (9, 3)
    assert {p.name for p in (tmp_path / "b").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    with pytest.raises(CheckpointError, match="pass overwrite=True"):
        save_pretrained(model, tmp_path / "b")
    # Onto the folder it was loaded from.
    save_pretrained(model, tmp_path / "a", overwrite=True)
    assert_same(weights_of(from_pretrained(tmp_path / "a")), weights_of(model))


def test_save_needs_a_config_that_fits(tmp_path):
    loaded = from_pretrained(written(tmp_path / "a", "llama"))
    fresh = Decoder.from_weights(loaded.spec, weights_of(loaded))
    with pytest.raises(CheckpointError, match="pass config="):
        save_pretrained(fresh, tmp_path / "b")
    other = {**loaded.config, "rms_norm_eps": 0.5, "rope_theta": 7.0}
    with pytest.raises(CheckpointError, match="another model than this one; they differ in ropes, norm_eps"):
        save_pretrained(fresh, tmp_path / "b", config=other)
    with pytest.raises(ValueError, match="model_type"):
        save_pretrained(fresh, tmp_path / "b", config={})
    assert not (tmp_path / "b").exists()
    save_pretrained(fresh, tmp_path / "b", config=loaded.config)
    assert_same(weights_of(from_pretrained(tmp_path / "b")), weights_of(fresh))


# Hugging Face transformers, where it is installed


@pytest.fixture(scope="module")
def transformers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("torch")
        module = pytest.importorskip("transformers")
        module.logging.set_verbosity_error()
        module.utils.logging.disable_progress_bar()
        yield module


def as_arrays(state_dict) -> dict[str, np.ndarray]:
    return {name: value.float().numpy() for name, value in state_dict.items()}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_saved_models_load_in_transformers_and_back(tmp_path, transformers, model_type):
    model = from_pretrained(written(tmp_path / "a", FAMILIES[model_type], pad_token_id=0), dtype="bfloat16")
    save_pretrained(model, tmp_path / "b", max_shard_bytes=40_000)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", output_loading_info=True)
    assert str(theirs.dtype) == "torch.bfloat16"
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    checkpoint = Checkpoint(tmp_path / "b")
    held = as_arrays(theirs.state_dict())
    for name in checkpoint.tensors:
        np.testing.assert_array_equal(held[name], checkpoint.read(name).astype(np.float32))
    assert set(held) - set(checkpoint.tensors) <= {"lm_head.weight"}

    theirs.save_pretrained(tmp_path / "c", max_shard_size="50KB")
    again = from_pretrained(tmp_path / "c")
    assert again.spec == model.spec
    assert_same(weights_of(again), weights_of(model))


# The hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty local cache of the hub, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def cached(hub: Path, repo: str, commit: str, source: Path, branch: str = "main") -> None:
    """Puts a checkpoint into the cache as the hub client lays it out: links to blobs."""
    base = hub / f"models--{repo.replace('/', '--')}"
    snapshot = base / "snapshots" / commit
    for folder in (base / "blobs", base / "refs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    (base / "refs" / branch).write_text(commit)
    for file in source.iterdir():
        blob = base / "blobs" / f"{commit}-{file.name}"
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(blob)


def test_hub_ids_and_revisions(hub, tmp_path):
    first = from_pretrained(written(tmp_path / "a", FAMILIES["llama"]))
    second = from_pretrained(written(tmp_path / "b", FAMILIES["qwen2"]))
    cached(hub, "someone/tiny-1.0", "a" * 40, tmp_path / "a")
    cached(hub, "someone/tiny-1.0", "b" * 40, tmp_path / "b", branch="other")
    assert_same(weights_of(from_pretrained("someone/tiny-1.0")), weights_of(first))
    assert_same(weights_of(from_pretrained("someone/tiny-1.0", revision="other")), weights_of(second))


def test_hub_is_asked_for_the_files_that_are_used(monkeypatch, tmp_path):
    folder = written(tmp_path, FAMILIES["llama"])
    asked = {}

    def snapshot_download(repo_id, **kwargs):
        asked.update(kwargs, repo_id=repo_id)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    from_pretrained("someone/tiny", revision="v2")
    assert (asked["repo_id"], asked["revision"]) == ("someone/tiny", "v2")
    files = [
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
        *("model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"),
        *(
            "README.md",
            "pytorch_model.bin",
            "consolidated.safetensors",
            "original/params.json",
            "onnx/model.safetensors",
        ),
    ]
    wanted = huggingface_hub.utils.filter_repo_objects(
        files, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert list(wanted) == files[:7]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("someone/tiny", "not a folder here, and could not be fetched from the Hugging Face hub"),
        ("tiny", "not a folder here, and could not be fetched"),
        ("./tiny", "not a folder here, nor a Hugging Face hub id such as"),
        ("/models/tiny", "nor a Hugging Face hub id"),
        ("~nobody-of-this-name/tiny", "nor a Hugging Face hub id"),
        ("a/b/c", "nor a Hugging Face hub id"),
        ("", "nor a Hugging Face hub id"),
        ("a b", "nor a Hugging Face hub id"),
        ("tiny\0", "nor a Hugging Face hub id"),
        ("x" * 5000, "not a folder here"),
        (Path("someone/tiny"), "nor a Hugging Face hub id"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_neither_folder_nor_id(hub, monkeypatch, tmp_path, name, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(name)


def test_the_file_instead_of_its_folder(tmp_path):
    written(tmp_path, FAMILIES["llama"])
    with pytest.raises(CheckpointError, match="is a file; expected the folder it is in"):
        from_pretrained(tmp_path / "model.safetensors")


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    written(tmp_path / "model", FAMILIES["llama"])
    assert from_pretrained("~/model").origin.folder == tmp_path / "model"
