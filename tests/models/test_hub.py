"""Hub ids, fetched from a hub on this machine by a process of its own, as a user's would."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import fake_hub
import golden
import numpy as np
import pytest
from fake_hub import commit_of
from golden.cases import CASES
from safetensors_tools import tensors_bytes, write_folder

FAMILIES = {case.config["model_type"]: name for name, case in reversed(CASES.items())}

# Every request, and afterwards some of them once more without a hub: from the cache.
REQUESTS = {
    "one file": ("someone/single", None),
    "shards": ("someone/sharded", None),
    "branch": ("someone/single", "other"),
    "commit": ("someone/single", commit_of("someone/single", "other")),
    "no revision": ("someone/single", "nope"),
    "no model": ("someone/none", None),
    "shard missing": ("someone/incomplete", None),
    "shard missing, again": ("someone/incomplete", None),
    "no weights": ("someone/text", None),
    "cut short": ("someone/cut", None),
    "bin only": ("someone/bin", None),
    **{refusal: (f"someone/{refusal}", None) for refusal in fake_hub.REFUSALS},
}
OFFLINE = {"one file": ("someone/single", None), "never fetched": ("someone/other", None)}

FETCH = """
import json, sys
import numpy as np
from jax_monokernel import models

answers = {}
for what, (name, revision) in json.load(sys.stdin).items():
    try:
        model = models.from_pretrained(name, revision=revision)
        answers[what] = [model.config["model_type"], float(np.abs(model.layers.q[...]).sum()), model.eos_token_id]
    except Exception as error:
        answers[what] = f"{type(error).__name__}: {error}"
json.dump(answers, sys.stdout)
"""


def fetch(requests: dict, home: Path, address: str) -> dict:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        [sys.executable, "-c", FETCH],
        input=json.dumps(requests),
        env=environment | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def checkpoint(folder: Path, name: str, shards: int = 1) -> Path:
    case = golden.read(name)
    tensors = {key: np.asarray(value) for key, value in case.tensors().items()}
    config = {**case.config, "torch_dtype": "float32", "eos_token_id": 7}
    if shards == 1:
        return write_folder(folder, {"model.safetensors": tensors_bytes(tensors)}, config)
    files = {f"model-{i + 1:05}-of-{shards:05}.safetensors": list(tensors)[i::shards] for i in range(shards)}
    index = {"weight_map": {tensor: file for file, names in files.items() for tensor in names}}
    content = {file: tensors_bytes({n: tensors[n] for n in names}) for file, names in files.items()}
    return write_folder(folder, content | {"model.safetensors.index.json": json.dumps(index).encode()}, config)


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict:
    root = tmp_path_factory.mktemp("hub")
    single, other = checkpoint(root / "a", FAMILIES["llama"]), checkpoint(root / "b", FAMILIES["qwen2"])
    for name, content in {"README.md": "#", "pytorch_model.bin": "x", "original/params.json": "{}"}.items():
        (single / name).parent.mkdir(exist_ok=True)
        (single / name).write_text(content)
    incomplete = checkpoint(root / "c", FAMILIES["gemma2"], shards=3)
    (incomplete / "model-00002-of-00003.safetensors").unlink()
    text = root / "d"
    text.mkdir()
    (text / "README.md").write_text("#")
    repos = {
        "someone/single": {"main": single, "other": other},
        "someone/sharded": {"main": checkpoint(root / "e", FAMILIES["gemma2"], shards=3)},
        "someone/incomplete": {"main": incomplete},
        "someone/text": {"main": text},
        "someone/cut": {"main": single},
        "someone/bin": {"main": write_folder(root / "f", {"pytorch_model.bin": b"x"}, {"model_type": "llama"})},
        **{f"someone/{refusal}": {"main": single} for refusal in fake_hub.REFUSALS},
    }
    with fake_hub.serve(repos) as (address, log):
        found = fetch(REQUESTS, root / "home", address)
    return found | {"log": log, "offline": fetch(OFFLINE, root / "home", address)}


def expected(model_type: str) -> list:
    case = golden.read(FAMILIES[model_type])
    q = [value for name, value in case.tensors().items() if name.endswith("q_proj.weight")]
    return [model_type, pytest.approx(float(np.abs(np.stack(q)).sum()), rel=1e-5), [7]]


@pytest.mark.parametrize(
    ("what", "model_type"), [("one file", "llama"), ("shards", "gemma2"), ("branch", "qwen2"), ("commit", "qwen2")]
)
def test_fetches(answers, what, model_type):
    assert answers[what] == expected(model_type)


def test_fetches_only_what_it_uses(answers):
    assert any(line.endswith("/model.safetensors") for line in answers["log"])
    assert not any(line.endswith((".bin", ".md", "params.json")) for line in answers["log"])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no revision", "it has no revision 'nope'"),
        ("no model", "no such model, or a private one"),
        ("private", "no such model, or a private one"),
        ("gated", "accept its terms on its page"),
        ("refused", "could not be fetched from the Hugging Face hub: LocalEntryNotFoundError"),
        ("no weights", r"it has no config\.json and no \.safetensors files"),
        ("bin only", "must be saved as safetensors first"),
        ("cut short", "could not be fetched from the Hugging Face hub"),
        ("shard missing", r"lacks model-00002-of-00003\.safetensors, which model\.safetensors\.index\.json names"),
        ("shard missing, again", r"lacks model-00002-of-00003\.safetensors"),
    ],
    ids=lambda value: value[:20],
)
def test_what_goes_wrong_is_one_clear_error(answers, what, message):
    assert re.match(rf"CheckpointError: .*someone.*{message}", answers[what], re.DOTALL), answers[what]


def test_without_a_hub_the_cache_serves(answers):
    assert answers["offline"]["one file"] == expected("llama")
    assert "could not be fetched from the Hugging Face hub" in answers["offline"]["never fetched"]
