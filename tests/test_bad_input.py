"""Wrong calls of the public functions: each says what was wrong and what to do."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from naive import random_weights

import jax_monokernel
from jax_monokernel import (
    DecoderSpec,
    GenerationConfig,
    LayerSpec,
    RopeSpec,
    decode,
    empty_state,
    generate,
    make_plan,
    models,
    pack,
    prefill,
    prepare,
    sampling_params,
)

pytestmark = pytest.mark.usefixtures("quick_compiles")
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
SPEC = DecoderSpec(
    vocab_size=31, **SIZES, layers=(LayerSpec(),), ropes=(RopeSpec(theta=1e4, rotary_dim=8),), dtype="float32"
)


class Model:
    spec = SPEC

    def __init__(self):
        self.weights = jax.tree.map(jnp.asarray, random_weights(SPEC, seed=5))

    def decoder_weights(self):
        return self.weights


@pytest.fixture
def parts():
    """A tape, a prefilled state, and greedy sampling of one request."""
    weights = Model().weights
    state = empty_state(SPEC, batch=1, capacity=32, key=jax.random.key(0))
    state = prefill(SPEC, weights, jnp.array([[3, 7, 11]]), jnp.array([3]), state)
    return pack(SPEC, weights), state, sampling_params(GenerationConfig(), batch=1, vocab_size=31)


def test_the_source_folder_says_that_it_is_no_package(tmp_path):
    package = Path(jax_monokernel.__file__).parent
    (tmp_path / "jax_monokernel").mkdir()
    shutil.copy(package / "__init__.py", tmp_path / "jax_monokernel")
    # Without site-packages, where an editable installation would be found first.
    done = subprocess.run(
        [sys.executable, "-S", "-c", "import jax_monokernel"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: this is the source folder of jax_monokernel ({tmp_path}")
    assert "start it in another folder, or pip install -e . in this one" in last


def test_parts_of_a_spec_may_be_lists():
    changed = dataclasses.replace(SPEC, layers=[LayerSpec()], ropes=list(SPEC.ropes))
    assert changed == SPEC
    assert hash(changed) == hash(SPEC)


@pytest.mark.parametrize("layers", [4, LayerSpec(), (LayerSpec, LayerSpec), "global"])
def test_layers_that_are_none(layers):
    with pytest.raises(ValueError, match=r"DecoderSpec\.layers is .*expected a tuple of LayerSpec"):
        dataclasses.replace(SPEC, layers=layers)


@pytest.mark.parametrize("name", [None, 3, b"folder"])
def test_a_checkpoint_that_is_no_path(name):
    with pytest.raises(ValueError, match="expected the path of a folder, or a Hugging Face hub id"):
        models.from_pretrained(name)


def test_other_objects_in_place_of_parts(parts):
    tape, state, sampling = parts
    model = Model()
    with pytest.raises(ValueError, match=r"weights are Model; expected DecoderWeights"):
        pack(SPEC, model)
    with pytest.raises(ValueError, match=r"weights are Model; expected DecoderWeights"):
        prefill(SPEC, model, jnp.array([[3]]), jnp.array([1]), state)
    with pytest.raises(ValueError, match=r"tape is Prepared; expected a Tape: pack\(spec, weights\), or prepare"):
        decode(prepare(model), state, sampling, max_new_tokens=2)
    with pytest.raises(ValueError, match="state is NoneType; expected a DecodeState"):
        decode(tape, None, sampling, max_new_tokens=2)
    with pytest.raises(TypeError, match=r"tokens are list; expected an array of integers"):
        prefill(SPEC, model.weights, [[3]], [1], state)


def test_a_length_that_is_no_number(parts):
    tape, state, sampling = parts
    for wrong in (2.0, "2", True, None):
        with pytest.raises(TypeError, match="expected an integer of at least 1"):
            decode(tape, state, sampling, max_new_tokens=wrong)
    with pytest.raises(TypeError, match=r"max_new_tokens is being traced.*static_argnames"):
        jax.jit(lambda n: decode(tape, state, sampling, max_new_tokens=n).tokens)(3)
    assert decode(tape, state, sampling, max_new_tokens=np.int64(2)).tokens.shape == (1, 2)


def test_what_was_donated(parts):
    tape, state, sampling = parts
    step = jax.jit(lambda s: decode(tape, s, sampling, max_new_tokens=2), donate_argnums=0)
    step(state)
    with pytest.raises(ValueError, match=r"the state was used up.*copy it before"):
        decode(tape, state, sampling, max_new_tokens=2)
    jax.tree.map(lambda x: x.delete(), tape)
    fresh = empty_state(SPEC, batch=1, capacity=32, key=jax.random.key(0))
    with pytest.raises(ValueError, match="the tape was used up"):
        decode(tape, fresh, sampling, max_new_tokens=2)


@pytest.mark.parametrize("before", [False, True], ids=["never-used", "used-before"])
def test_parameters_that_were_donated_to_a_training_step(before):
    model = Model()
    if before:
        generate(model, [[3, 5]], max_new_tokens=2)
    model.weights = jax.jit(lambda w: jax.tree.map(lambda x: x * 2, w), donate_argnums=0)(old := model.weights)
    assert generate(model, [[3, 5]], max_new_tokens=2).tokens.shape == (1, 2)
    model.weights = old
    with pytest.raises(ValueError, match="parameters were donated to another call"):
        generate(model, [[3, 5]], max_new_tokens=2)


@pytest.mark.parametrize("platform", ["cuda", "rocm"])
def test_a_backend_that_is_not_here(platform):
    if any(device.platform == "gpu" for device in jax.devices()):
        pytest.skip("JAX has a GPU here")
    with pytest.raises(ValueError, match=f"packed for cpu; JAX sees no {platform} device here.*jax-monokernel doctor"):
        generate(Model(), [[3, 5]], max_new_tokens=2, backend=platform)


def test_a_platform_that_there_is_not():
    with pytest.raises(ValueError, match="platform is 'tpu'; expected one of cpu, cuda, rocm"):
        make_plan(SPEC, platform="tpu")
