"""Several models in one process: prefill from a tape, other weights for a tape, threads, and what it all takes."""

from __future__ import annotations

import functools
import gc
import math
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from decoding import SPECS, decode, params_of, state_of
from flax import nnx
from naive import prompt, random_weights

from jax_monokernel import DecoderSpec, LayerSpec, Plan, RopeSpec, empty_state, memory_report, pack, prefill, prepare
from jax_monokernel.generate import generate
from jax_monokernel.models import Decoder
from jax_monokernel.plan import geometry, make_plan
from jax_monokernel.tape_parts import embedding_rows, unpack_layer
from jax_monokernel.weights import weight_shapes

# Last, so that an installed jax_monokernel is not hidden by its sources.
sys.path.append(str(Path(__file__).parents[1]))

from jax_monokernel._bench.shapes import SHAPES

pytestmark = pytest.mark.usefixtures("quick_compiles")

SPEC = SPECS["plain"]
PLANS = [Plan(platform="cpu", units=3), Plan(platform="cuda", units=3), Plan(platform="rocm", units=2)]
# Large enough that weights outweigh everything else, small enough to pack in no time.
LARGER = DecoderSpec(
    vocab_size=2000,
    hidden_size=192,
    intermediate_size=512,
    num_heads=6,
    num_kv_heads=2,
    head_dim=32,
    layers=(LayerSpec(),) * 4,
    ropes=(RopeSpec(theta=1e4, rotary_dim=32),),
)
_pack = jax.jit(pack, static_argnums=(0, 2))
_parts = jax.jit(lambda tape, layer, ids: (unpack_layer(tape, layer), embedding_rows(tape, ids)))
_prefill = jax.jit(prefill, static_argnums=0)


def make(seed: int, spec: DecoderSpec = SPEC, kind: type = Decoder) -> Decoder:
    return kind.from_weights(spec, random_weights(spec, seed))


def say(model, seed: int = 0, n: int = 10) -> list[int]:
    return generate(model, [prompt(7, seed)], max_new_tokens=n).tokens[0].tolist()


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.platform)
@pytest.mark.parametrize(("name", "dtype"), [("nope", "float32"), ("post_norm", "bfloat16")])
def test_single_layers_and_rows_of_a_tape_are_the_weights_bit_for_bit(name, dtype, plan):
    spec = SPECS[name].replace(dtype=dtype)
    weights = random_weights(spec)
    tape = _pack(spec, weights, plan)
    ids = jnp.array([[36, 0, 17], [16, 15, 36]])
    for layer in range(spec.num_layers):
        got = _parts(tape, layer, ids)
        want = jax.tree.map(lambda x, layer=layer: x[layer], weights.layers), weights.embedding[ids]
        assert jax.tree.structure(got) == jax.tree.structure(want)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.platform)
def test_prefill_reads_a_tape_as_it_reads_weights(plan):
    spec, weights = SPECS["windows"], random_weights(SPECS["windows"])
    tokens, lengths = jnp.array([prompt(20), prompt(20, 1)]), jnp.array([20, 9])
    state = empty_state(spec, batch=2, capacity=32, key=jax.random.key(0))
    want = _prefill(spec, weights, tokens, lengths, state)
    got = _prefill(spec, _pack(spec, weights, plan), tokens, lengths, state)
    assert int(want.position.sum()) == 27
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_tape_of_another_model_is_refused():
    tape = _pack(SPEC, random_weights(SPEC), PLANS[0])
    state = empty_state(SPECS["nope"], batch=1, capacity=32, key=jax.random.key(0))
    with pytest.raises(ValueError, match="spec is not the one that the tape was packed for"):
        prefill(SPECS["nope"], tape, jnp.ones((1, 4), int), jnp.array([4]), state)


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.platform)
def test_prefill_unpacks_one_layer_at_a_time(plan):
    spec = LARGER.replace(layers=(LayerSpec(),) * 24, dtype="bfloat16", tied_head=True)
    tape = jax.eval_shape(lambda w: pack(spec, w, plan), weight_shapes(spec))
    state = jax.eval_shape(lambda: empty_state(spec, batch=1, capacity=64, key=jax.random.key(0)))
    ints = jax.ShapeDtypeStruct((1, 16), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    temporary = _prefill.lower(spec, tape, *ints, state).compile().memory_analysis().temp_size_in_bytes
    layer = sum(x.size * 2 for x in jax.tree.leaves(weight_shapes(spec).layers)) / spec.num_layers
    caches = 2 * spec.num_layers * spec.kv_size * 64 * 2
    # A layer as bits and in the order in which it is multiplied, perhaps as f32; all layers would be 24 times that.
    assert temporary < caches + 6 * layer


class OwnPrefill(Decoder):
    """Prefills token 7 before every prompt, and looks at its weights by role."""

    @staticmethod
    def prefill(spec, weights, tokens, lengths, state):
        assert weights.layers.q.shape[0] == spec.num_layers
        tokens = jnp.concatenate([jnp.full_like(tokens[:, :1], 7), tokens], axis=1)
        return prefill(spec, weights, tokens, lengths + 1, state)


@pytest.mark.parametrize(("kind", "backend"), [(Decoder, None), (Decoder, "reference"), (OwnPrefill, None)])
def test_without_weights_by_role_the_tokens_are_the_same(kind, backend):
    model = make(1, kind=kind)
    lean = prepare(model, keep_weights=False)
    assert prepare(prepare(model), keep_weights=False).keeps_weights is False
    prompts = [prompt(12), prompt(5, 1)]
    want = generate(model, prompts, max_new_tokens=12, backend=backend).tokens
    np.testing.assert_array_equal(generate(lean, prompts, max_new_tokens=12, backend=backend).tokens, want)
    with pytest.raises(ValueError, match="the weights by role were not kept"):
        _ = lean.weights


@pytest.mark.parametrize("tied", [True, False])
def test_one_copy_of_the_weights_stays(tied):
    spec = LARGER.replace(tied_head=tied)
    gc.collect()
    others = jax.live_arrays()  # kept, so that none of their ids is used again
    before = {id(x) for x in others}
    model = Decoder(spec, rngs=nnx.Rngs(0))
    report = memory_report(model)
    assert (report.weights, report.tape, report.parameters) == (report.checkpoint, 0, 0)
    ready = prepare(model, keep_weights=False)
    del model
    result = generate(ready, [prompt(7)], max_new_tokens=4)
    del result
    gc.collect()
    held = sum(x.nbytes for x in jax.live_arrays() if id(x) not in before)
    once = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(weight_shapes(spec)))
    assert report.checkpoint == once
    assert once <= held <= 1.15 * once
    after = memory_report(ready, batch=2, capacity=100)
    assert (after.weights, after.parameters) == (0, 0)
    assert after.tape == ready.tape.nbytes <= 1.15 * once
    assert after.kv_cache == 2 * 2 * spec.num_layers * spec.kv_size * 100 * 2
    assert after.total == after.tape + after.kv_cache
    assert "weights are held 1.0" in str(after)


def share_of_weights(name: str, plan: Plan) -> tuple[float, float]:
    """Bytes of a model's tape, and of its matrices and vectors with padding, by those of its weights."""
    spec = SHAPES[name].spec()
    geo = geometry(spec, plan)
    matrices = sum(m.rows * m.cols * (1 if p == "head" else spec.num_layers) for p, m in geo.matrices.items())
    beside = 4 * geo.constants + (0 if spec.tied_head else 2 * spec.vocab_size * spec.hidden_size)
    weights = sum(2 * x.size for x in jax.tree.leaves(weight_shapes(spec)))
    return (2 * math.prod(geo.stream_shape) + beside) / weights, (2 * matrices + beside) / weights


@pytest.mark.parametrize(
    ("platform", "units", "ratios"),
    [
        ("cpu", 2, (1.00, 1.00, 1.00, 1.00, 1.00)),
        ("cuda", 132, (1.02, 1.02, 1.00, 1.00, 1.00)),
        ("rocm", 304, (1.11, 1.01, 1.01, 1.00, 1.00)),
    ],
)
def test_tapes_of_larger_models_are_one_copy(platform, units, ratios):
    """The table in docs/models-in-a-session.md."""
    names = ("smollm2-135m", "qwen2.5-0.5b", "qwen3-0.6b", "llama3.2-1b", "llama3.1-8b")
    for name, ratio in zip(names, ratios, strict=True):
        plan = make_plan(SHAPES[name].spec(), platform=platform, units=units, groups=1)
        assert share_of_weights(name, plan)[0] == pytest.approx(ratio, abs=0.006)
        assert ratio <= 1.15


@pytest.mark.parametrize(
    ("name", "platform", "units", "padding", "ends"),
    [
        ("smollm2-135m", "cuda", 132, 0.02, 0.00),
        ("qwen2.5-0.5b", "cuda", 132, 0.02, 0.00),
        ("smollm2-135m", "rocm", 304, 0.09, 0.02),
        ("qwen2.5-0.5b", "rocm", 304, 0.00, 0.01),
    ],
)
def test_where_the_bytes_of_a_tape_go(name, platform, units, padding, ends):
    """The other table there."""
    plan = make_plan(SHAPES[name].spec(), platform=platform, units=units, groups=1)
    tape, padded = share_of_weights(name, plan)
    assert padded - 1 == pytest.approx(padding, abs=0.006)
    assert tape - padded == pytest.approx(ends, abs=0.006)


def test_a_report_counts_what_is_there():
    model = make(2)
    ready = prepare(model)
    state = generate(ready, [prompt(4), prompt(4)], max_new_tokens=2).state
    report = memory_report(ready, state)
    assert report.kv_cache == state.k_cache.nbytes + state.v_cache.nbytes
    assert (report.weights, report.tape) == (report.checkpoint, ready.tape.nbytes)
    gpu = memory_report(prepare(model, PLANS[1]), batch=3, capacity=64)
    assert gpu.workspace > 3 * SPEC.hidden_size * 4
    with pytest.raises(ValueError, match="batch and capacity must be at least 1"):
        memory_report(ready, capacity=0)


class Transposing(nnx.Module):
    """Holds its parameters in a form of its own."""

    spec = SPEC

    def __init__(self):
        self.inner = jax.tree.map(lambda x: nnx.Param(x.T), nnx.List(jax.tree.leaves(random_weights(SPEC))))

    def decoder_weights(self):
        leaves = [p[...].T for p in self.inner]
        return jax.tree.unflatten(jax.tree.structure(random_weights(SPEC)), leaves)


def test_parameters_in_another_form_count_beside_the_weights():
    model = Transposing()
    assert say(model) == say(make(0))
    report = memory_report(model)
    assert report.weights == report.checkpoint
    assert report.parameters == report.checkpoint - SPEC.hidden_size * 4  # a vector is its own transpose, and one array
    assert report.copies > 2.99


def test_other_weights_of_one_spec_compile_nothing(compilations):
    models = [make(seed) for seed in range(3)]
    want = [say(prepare(model)) for model in models]
    assert want[0] != want[1] != want[2]
    ready = prepare(models[0])
    assert say(ready) == want[0]
    assert say(ready.repack(models[1], donate=True)) == want[1]  # packing over another tape is a program of its own
    ready, other = prepare(models[0]), make(5)
    del compilations[:]
    for model, tokens in zip(models, want, strict=True):
        ready = ready.repack(model)
        assert say(ready) == tokens
        assert say(prepare(model)) == tokens
    for i in (1, 0, 2):
        ready = ready.repack(models[i].decoder_weights(), donate=True)
        assert say(ready) == want[i]
    assert say(other) not in want
    assert compilations == []


def test_donated_memory_is_used_again_and_what_it_held_is_gone():
    models = [make(seed) for seed in range(2)]
    want = say(models[1])
    ready = prepare(models[0], keep_weights=False)
    place = ready.tape.streams.unsafe_buffer_pointer()
    again = ready.repack(models[1], donate=True)
    assert again.tape.streams.unsafe_buffer_pointer() == place
    assert not again.keeps_weights
    assert say(again) == want
    for use in (say, lambda old: old.repack(models[0]), lambda old: old.repack(models[0], donate=True)):
        with pytest.raises(ValueError, match=r"used up by repack\(donate=True\); use what it returned"):
            use(ready)
    assert len(say(models[0])) == 10  # the model's own parameters are not


def test_a_running_decode_finishes_before_its_tape_is_overwritten():
    models = [make(seed) for seed in range(2)]
    ready = prepare(models[0], Plan(platform="cpu", units=2), keep_weights=False)
    state, params = state_of(SPEC, capacity=3000), params_of(SPEC, 3, temperature=1.0)
    want = np.asarray(decode(ready.tape, state, params, steps=2900).tokens)
    for _ in range(5):
        running = decode(ready.tape, state, params, steps=2900)
        ready = ready.repack(models[1], donate=True)
        np.testing.assert_array_equal(running.tokens, want)
        ready = ready.repack(models[0], donate=True)
    assert say(ready) == say(models[0])


def test_bad_repacks_are_refused():
    ready = prepare(make(0))
    with pytest.raises(ValueError, match="another spec than the one that was packed"):
        ready.repack(make(0, SPECS["nope"]))
    with pytest.raises(ValueError, match=r"weights lack layers\.q_bias|weights have|weights\."):
        ready.repack(random_weights(SPECS["nope"]))
    with pytest.raises(ValueError, match="expected a model with `spec`"):
        ready.repack({"embedding": 1})
    assert len(say(ready)) == 10


def test_models_take_turns_in_threads():
    models = [make(0), make(1), make(2, SPECS["windows"]), prepare(make(3, SPECS["nope"]), keep_weights=False)]
    want = {(i, seed): say(model, seed) for i, model in enumerate(models) for seed in range(3)}
    start = threading.Barrier(4)

    def work(thread: int) -> None:
        start.wait()
        for turn in range(24):
            i, seed = (thread + turn) % 4, turn % 3
            assert say(models[i], seed) == want[i, seed]

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work, thread) for thread in range(4)]:
            done.result(timeout=120)


def test_trained_weights_are_taken_up():
    model = make(4)
    optimizer = nnx.Optimizer(model, optax.sgd(0.5), wrt=nnx.Param)
    tokens = jnp.array([prompt(16)])

    @nnx.jit
    def train(model, optimizer):
        def loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(tokens[:, :-1]), tokens[:, 1:]).mean()

        optimizer.update(model, nnx.grad(loss)(model))

    ready = prepare(model)
    before = say(ready)
    train(model, optimizer)
    after = say(ready.repack(model))
    assert say(ready) == before != after
    assert after == say(model) == say(prepare(make(0)).repack(model))


@functools.cache
def examples() -> list[str]:
    path = Path(__file__).parents[1] / "docs" / "models-in-a-session.md"
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)


def test_the_examples_of_the_documentation_run(capsys):
    space: dict = {"__name__": "docs"}
    for number, code in enumerate(examples()):
        exec(compile(code, f"docs/models-in-a-session.md example {number}", "exec"), space)
    assert number >= 2
    assert "weights are held" in capsys.readouterr().out
