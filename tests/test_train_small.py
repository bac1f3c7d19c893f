"""examples/train_small.py on a small piece of the standard library."""

import dataclasses
import json
import shutil
import sysconfig
import tarfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jax_monokernel.models import from_pretrained
from jax_monokernel.tokenizer import Tokenizer

EXAMPLES = Path(__file__).parent.parent / "examples"
STDLIB = Path(sysconfig.get_paths()["stdlib"])
FILES = ("email", "json", "http/client.py", "http/cookies.py", "copyreg.py", "sched.py", "token.py", "textwrap.py")


@pytest.fixture(scope="module")
def train_small():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        import train_small

        yield train_small


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (STDLIB / name).is_dir():
            shutil.copytree(STDLIB / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(STDLIB / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def options(train_small, corpus, tmp_path_factory):
    return train_small.Options(
        out=tmp_path_factory.mktemp("trained") / "model",
        corpus=corpus,
        steps=40,
        eval_every=20,
        eval_tokens=1024,
        batch=4,
        seq_len=64,
        warmup=5,
        learning_rate=1e-2,
        vocab=512,
        hidden=32,
        intermediate=64,
        layers=2,
        heads=2,
        kv_heads=1,
    )


@pytest.fixture(scope="module")
def record(train_small, options):
    return train_small.run(options)


def test_a_few_steps_lower_the_loss(record):
    first, last = record["history"]
    uniform = np.log(512)
    assert last["train_loss"] < first["train_loss"] < uniform
    assert last["validation_loss"] < uniform - 0.5


def test_the_same_options_give_the_same_weights(train_small, options, record, tmp_path):
    again = train_small.run(dataclasses.replace(options, out=tmp_path / "again"))
    assert again["history"] == record["history"]
    for name in ("model.safetensors", "tokenizer.json", "README.md", "validation_sample.txt"):
        assert (tmp_path / "again" / name).read_bytes() == (options.out / name).read_bytes()


def test_another_seed_gives_other_weights(train_small, options, record, tmp_path):
    other = dataclasses.replace(options, seed=1, steps=2, eval_every=2)
    assert not np.array_equal(train_small.batch_starts(5000, other), train_small.batch_starts(5000, options)[:2])
    a, b = (train_small.initial_parameters(o)["embedding"][...] for o in (options, other))
    assert not jnp.array_equal(a, b)


def test_the_folder_loads_and_gives_the_recorded_loss(train_small, options, record):
    model = from_pretrained(options.out)
    assert model.spec.dtype == "bfloat16"
    tokenizer = Tokenizer.from_folder(options.out)
    assert tokenizer.eos_token_id == (0,)
    text = (options.out / "validation_sample.txt").read_text()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    stream = np.array([0, *ids, 0], np.int32)
    assert train_small.validation_loss(options, model, stream) == pytest.approx(record["sample"]["loss"], abs=1e-5)
    assert json.loads((options.out / "training.json").read_text()) == record


def test_transformers_computes_the_same_logits(options, record):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(options.out, dtype=torch.float32)
    prompt = "def walk(self, path):\n    for"
    ids = transformers.AutoTokenizer.from_pretrained(options.out)(prompt)["input_ids"]
    assert ids == Tokenizer.from_folder(options.out).encode(prompt)
    with torch.no_grad():
        want = theirs(torch.tensor([ids])).logits.numpy()
    have = from_pretrained(options.out, dtype="float32")(jnp.array([ids]))
    np.testing.assert_allclose(have, want, atol=1e-4)


def test_an_archive_is_the_same_corpus_as_its_folder(train_small, corpus, tmp_path):
    archive = tmp_path / "3.99.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(corpus, arcname=".")
    assert train_small.read_corpus(archive, tests=True) == train_small.read_corpus(corpus, tests=True)
    assert train_small.python_version(archive) == "3.99"


def test_an_epoch_reads_every_window_once(train_small, options):
    length, windows = options.seq_len, 40
    one_epoch = dataclasses.replace(options, steps=windows // options.batch, eval_every=1)
    starts = train_small.batch_starts((windows + 1) * length + 1, one_epoch).ravel()
    assert sorted((starts - starts.min()) // length) == list(range(windows))
    assert starts.min() < length
    assert starts.max() + length <= (windows + 1) * length


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "10", "--eval-every", "3"], "multiple of eval_every"),
        (["--corpus", "nowhere.tar"], "nowhere.tar"),
        (["--dtype", "float64"], "expected bfloat16 or float32"),
        (["--batch", "0"], "batch is 0"),
    ],
    ids=["uneven-steps", "no-corpus", "dtype", "batch"],
)
def test_bad_options_are_one_clear_line(train_small, arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        train_small.main(["--out", str(tmp_path / "x"), *arguments])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
