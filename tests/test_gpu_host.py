"""The GPU kernel's source, run on this CPU with random and adversarial orders of its units, against the reference."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import gpu_host
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding import (
    CAPACITY,
    POSITIONS,
    SPECS,
    STEPS,
    assert_bit_equal,
    assert_same_decode,
    decode,
    mixed_params,
    params_of,
    reference,
    reference_of_mixed,
    replace_row,
    rows_of,
    spec_of,
    state_of,
    tape_of,
    weights_of,
)
from gpu_decode import Kernel, decode_on_host, gpu_plan
from gpu_host import POLICIES, STORES, Fault, HostError

from jax_monokernel import pack
from jax_monokernel.plan import geometry
from jax_monokernel.state import FULL, RUNNING, STOPPED

WAVE_SIZES = pytest.mark.parametrize("wave", [32, 64])
ORDERS = list(itertools.product(POLICIES, STORES))


def one_chunk(name: str, wave: int, dtype: str = "float32", **options) -> Kernel:
    """Three units, a batch of three, every matrix row in one chunk."""
    spec = spec_of(name, dtype)
    return Kernel(spec, gpu_plan(spec, wave, 3), batch=3, **options)


def split_up(name: str, wave: int, dtype: str = "float32", **options) -> Kernel:
    """Seven units, one request, everything in several parts that can be."""
    spec = spec_of(name, dtype)
    plan = gpu_plan(spec, wave, 7, waves=3, service_waves=3, chunk_atoms=1, segment_tiles=1)
    heads = spec.num_heads // spec.num_kv_heads
    return Kernel(spec, plan, batch=1, splits=3, task_heads=2 if heads % 2 == 0 else 1, **options)


def split_up_for_two(name: str, wave: int, dtype: str = "float32", **options) -> Kernel:
    """The same for two requests, whose hand-offs are packed where stream waves gather."""
    return dataclasses.replace(split_up(name, wave, dtype, **options), batch=2)


MADE = [(one_chunk, 32), (split_up, 64), (one_chunk, 64), (split_up_for_two, 32), (split_up, 32)]
# Two models differ from "plain" by their rotation only, and have less of these.
CASES = {
    f"{name}-{make.__name__}-{wave}": make(name, wave)
    for name in SPECS
    for make, wave in {"dynamic": MADE[:2], "longrope": MADE[2:4]}.get(name, MADE)
}
CHECKED = {
    f"{name}-{make.__name__}-{wave}-{dtype}": make(name, wave, dtype, sanitize=True)
    for make, name, wave, dtype in [
        (one_chunk, "windows", 32, "float32"),
        (split_up_for_two, "plain", 32, "bfloat16"),
        (one_chunk, "plain", 64, "bfloat16"),
        (split_up, "nope", 64, "float32"),
        (split_up, "post_norm", 32, "float16"),
    ]
}
EXACT = [
    one_chunk(*case) for case in [("plain", 32, "bfloat16"), ("post_norm", 32, "float16"), ("plain", 64, "float16")]
]


@pytest.fixture(scope="module", autouse=True)
def _compile_ahead(request):
    """Compiles kernels while the first tests run, if most of them are to run."""
    if sum(item.module is request.module for item in request.session.items) < 40:
        yield
        return
    pool = ThreadPoolExecutor(2)
    for kernel in (*CASES.values(), *EXACT, *CHECKED.values()):
        pool.submit(lambda kernel=kernel: kernel.library)
    yield
    pool.shutdown(cancel_futures=True)


def some_rows(batch: int, turn: int) -> slice:
    """`batch` of three requests."""
    first = turn % (4 - batch)
    return slice(first, first + batch)


# ---- The same results as the reference ----


@functools.cache
def eight_tokens(spec):
    """A batch of three kinds of requests for eight tokens: its state, its parameters, and what the reference gives."""
    state, params = state_of(spec), dataclasses.replace(mixed_params(spec, 3), max_new_tokens=jnp.full(3, 8, jnp.int32))
    return state, params, reference(spec, state, params)


@pytest.mark.parametrize("name", CASES)
def test_tokens_equal_the_reference(name):
    kernel, number = CASES[name], list(CASES).index(name)
    spec = kernel.spec
    state, params, want = eight_tokens(spec)
    for turn in range(3):
        policy, stores = ORDERS[(5 * number + turn) % len(ORDERS)]
        rows = some_rows(kernel.batch, turn)
        before = rows_of(state, rows)
        got, run = decode_on_host(
            kernel,
            before,
            rows_of(params, rows),
            STEPS,
            policy=policy,
            stores=stores,
            seed=100 * number + turn,
            unit=turn,
        )
        assert run.report["reason"] == 0, run.report
        assert_same_decode(got, rows_of(want, rows), spec, before)


@pytest.mark.parametrize("waves", [4, 7])
def test_plans_with_fewer_waves_than_usual(waves):
    """As docs/models-in-a-session.md has them, where memory counts. With 6, test_gpu_models.py has them."""
    spec = spec_of("plain")
    kernel = Kernel(spec, gpu_plan(spec, 32, 5, waves=waves, service_waves=7), batch=2)
    state, params, want = eight_tokens(spec)
    rows = slice(1, 3)
    got, run = decode_on_host(
        kernel, rows_of(state, rows), rows_of(params, rows), STEPS, policy="random", stores="late"
    )
    assert run.report["reason"] == 0, run.report
    assert_same_decode(got, rows_of(want, rows), spec, rows_of(state, rows))


def uneven(vocab: int, **options) -> Kernel:
    """Streams of unlike lengths: rows of 3 atoms for 4 waves, of which the first has none. Its embedding is tied."""
    spec = spec_of("plain").replace(hidden_size=140, vocab_size=vocab)
    assert spec.tied_head
    return Kernel(spec, gpu_plan(spec, 64, 13, waves=4), batch=3, **options)


@pytest.mark.parametrize("vocab", [37, 150])  # tiles for 10 units, and for all
def test_streams_of_unlike_lengths_lie_end_to_end(vocab):
    kernel = uneven(vocab, sanitize=True)
    slots = np.diff(geometry(kernel.spec, kernel.plan).wave_begin).reshape(13, 4) * 4 // (8 * 64 * 16)
    assert (slots[:, 0] == 1).all()
    assert len(set(slots.sum(axis=1).tolist())) > 1
    state, params, want = eight_tokens(kernel.spec)
    for seed, (policy, stores) in enumerate((("random", "late"), ("starve", "random"))):
        got, run = decode_on_host(kernel, state, params, STEPS, policy=policy, stores=stores, seed=seed, unit=3)
        assert run.report["reason"] == 0, run.report
        assert_same_decode(got, want, kernel.spec, state)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (r"larger\(1, ", "larger(0, "),
        (r"(elems_before_wave\(int unit, int wave\) \{\n  return )", r"\1wave == 2 ? 0 : "),
        (r"i64 elems_before\(int unit\) \{ return ", "i64 elems_before(int unit) { return unit == 3 ? 0 : "),
    ],
    ids=["waves without atoms", "waves", "units"],
)
def test_streams_that_are_not_where_they_should_be(old, new, tmp_path):
    """They are streams all the same: a kernel that reads others comes to its end, with other tokens."""
    kernel = uneven(150, source=gpu_host.broken_copy(tmp_path, "pages.h", old, new))
    state, params, want = eight_tokens(kernel.spec)
    got, run = decode_on_host(kernel, state, params, STEPS)
    assert run.report["reason"] == 0, run.report
    assert not np.array_equal(got.tokens, want.tokens)


@WAVE_SIZES
def test_results_have_the_same_bits_in_every_order(wave):
    kernel = one_chunk("windows", wave)
    state, params = state_of(kernel.spec), mixed_params(kernel.spec, 3)
    want, _ = decode_on_host(kernel, state, params, 4, policy="round_robin", stores="now")
    for seed, (policy, stores) in enumerate(ORDERS):
        got, _ = decode_on_host(kernel, state, params, 4, policy=policy, stores=stores, seed=seed, unit=seed % 3)
        assert_bit_equal(got, want)


@pytest.mark.parametrize("kernel", EXACT, ids=lambda kernel: f"{kernel.spec.dtype}-{kernel.plan.wave_size}")
def test_16_bit_models_are_as_exact_as_on_the_cpu(kernel):
    spec, params = kernel.spec, params_of(kernel.spec, 3)
    state = state_of(spec)
    exact_spec = spec.replace(dtype="float32", kv_dtype="float32")
    exact_state = dataclasses.replace(
        state, k_cache=state.k_cache.astype(jnp.float32), v_cache=state.v_cache.astype(jnp.float32)
    )
    weights = jax.tree.map(lambda x: x.astype(jnp.float32), weights_of(spec))
    want = decode(pack(exact_spec, weights, tape_of(exact_spec, 1).plan), exact_state, params)
    got, _ = decode_on_host(kernel, state, params, STEPS)
    error, usual = (rms_error(x, want) for x in (got, decode(tape_of(spec, 1), state, params)))
    assert 0 < error < 1.5 * usual


def rms_error(got, want) -> float:
    """Of log-probabilities, as far as the tokens agree, which has to be far."""
    agree = np.cumprod(np.asarray(got.tokens) == np.asarray(want.tokens), axis=1).astype(bool)
    assert agree.mean() > 0.7
    return float(np.sqrt(np.mean(np.square(np.asarray(got.log_probs) - np.asarray(want.log_probs))[agree])))


@pytest.mark.parametrize(
    ("wave", "dtype", "chunk_atoms", "inner", "batch", "units"),
    [
        (32, "float16", 16, 384, 2, 4),
        (32, "float16", 6, 384, 2, 4),
        (64, "float16", 6, 384, 2, 4),
        (32, "float16", 16, 512, 9, 4),
        (32, "float32", 16, 512, 1, 4),
        (32, "float32", 12, 288, 9, 4),  # activations of a row in several parts
        (32, "float32", 8, 512, 1, 20),  # sums stay in registers: no unit has more than two tiles of o and down
        (32, "float32", 8, 352, 2, 20),
    ],
)
def test_a_wide_model(wave, dtype, chunk_atoms, inner, batch, units):
    """Rows of many atoms in several chunks; the ring goes around often. In f32 stream waves gather for themselves."""
    name = "plain" if dtype == "float32" else "windows"
    spec = spec_of(name, dtype).replace(hidden_size=256, intermediate_size=inner, num_heads=8, head_dim=32)
    spec = spec.replace(ropes=tuple(dataclasses.replace(rope, rotary_dim=32) for rope in spec.ropes))
    plan = gpu_plan(spec, wave, units, chunk_atoms=chunk_atoms, segment_tiles=3, service_waves=2 if batch <= 2 else 3)
    kernel = Kernel(spec, plan, batch=batch, splits=2, shared_bytes=(64 if inner == 288 else 96) * 1024)
    state, params = state_of(spec, (7, 20, 1, 5, 9, 14, 2, 11, 4)[:batch]), params_of(spec, batch)
    got, _ = decode_on_host(kernel, state, params, 6)
    want = decode(tape_of(spec, 2), state, params, steps=6)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.log_probs, want.log_probs, rtol=0, atol=0.02)


@pytest.mark.parametrize(("wave", "dtype"), [(32, "float16"), (64, "float16"), (32, "float32"), (64, "float32")])
def test_a_batch_of_sixteen(wave, dtype):
    spec = spec_of("nope", dtype)
    kernel = Kernel(spec, gpu_plan(spec, wave, 3, service_waves=4), batch=16)
    state, params = state_of(spec, tuple(range(0, 32, 2))), mixed_params(spec, 16)
    got, _ = decode_on_host(kernel, state, params, 6)
    want = decode(tape_of(spec, 2), state, params, steps=6)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_array_equal(got.state.seen, want.state.seen)


@pytest.mark.parametrize(
    ("name", "wave", "sanitize"), [("plain", 64, True), ("plain", 32, True), ("windows", 32, False)]
)
def test_more_units_than_tiles(name, wave, sanitize):
    spec = spec_of(name).replace(vocab_size=7, hidden_size=8, intermediate_size=8)
    kernel = Kernel(spec, gpu_plan(spec, wave, 25), batch=1, sanitize=sanitize)
    state, params = state_of(spec, (7,)), params_of(spec, 1)
    got, run = decode_on_host(kernel, state, params, 6, policy="forward", timeout_ticks=100_000)
    want = decode(tape_of(spec, 2), state, params, steps=6)
    assert run.report["reason"] == 0, run.report
    np.testing.assert_array_equal(got.tokens, want.tokens)


# ---- Ends ----


@WAVE_SIZES
def test_every_request_ends_in_its_own_way(wave):
    spec = spec_of("plain")
    kernel = Kernel(spec, gpu_plan(spec, wave, 3), batch=8)
    state = state_of(spec, (0, 7, 20, CAPACITY - 3, CAPACITY, 5, 9, 11))
    state = replace_row(state, 5, status=STOPPED)
    state = replace_row(state, 6, status=FULL)
    free = decode(tape_of(spec, 2), state, params_of(spec, 8, temperature=1.0))
    eos = np.full((8, 3), -1, np.int32)
    eos[0] = [free.tokens[0, 4], -1, free.tokens[0, 9]]
    eos[1] = [-1, -1, free.tokens[1, 0]]
    eos[7] = free.tokens[0, 4]
    params = params_of(spec, 8, temperature=1.0, eos_token_id=eos, max_new_tokens=[16, 16, 5, 16, 16, 16, 16, 0])
    want = decode(tape_of(spec, 2), state, params)
    got, _ = decode_on_host(kernel, state, params, STEPS)
    assert_same_decode(got, want, spec, state)
    assert got.state.status.tolist() == [STOPPED, STOPPED, RUNNING, FULL, FULL, STOPPED, FULL, RUNNING]


def test_n_then_m_tokens_equal_n_plus_m():
    kernel = one_chunk("windows", 32)
    state, params = state_of(kernel.spec), mixed_params(kernel.spec, 3)
    whole, _ = decode_on_host(kernel, state, params, STEPS)
    first, _ = decode_on_host(kernel, state, params, 5)
    second, _ = decode_on_host(kernel, first.state, params, STEPS - 5)
    for name in ("tokens", "log_probs"):
        parts = np.concatenate([getattr(first, name), getattr(second, name)], axis=1)
        np.testing.assert_array_equal(getattr(whole, name), parts)
    assert_bit_equal(second.state, whole.state)


def test_without_log_probs():
    kernel = one_chunk("windows", 32)
    state, params = state_of(kernel.spec), mixed_params(kernel.spec, 3)
    got, _ = decode_on_host(kernel, state, params, 5, return_log_probs=False)
    np.testing.assert_array_equal(got.tokens, reference_of_mixed(kernel.spec).tokens[:, :5])


@pytest.mark.parametrize(("field", "value"), [("last_token", 37), ("last_token", -1), ("position", -1)])
def test_a_request_that_cannot_be_is_reported(field, value):
    kernel = one_chunk("windows", 32)
    state = replace_row(state_of(kernel.spec), 1, **{field: value})
    got, run = decode_on_host(kernel, state, mixed_params(kernel.spec, 3), STEPS)
    assert (run.report["reason"], run.report["unit"]) == (3, 1)
    assert np.uint32(run.report["seen" if field == "last_token" else "expected"]).astype(np.int32) == value
    # Of one that does not run, nothing is read.
    state = replace_row(state, 1, status=STOPPED)
    got, run = decode_on_host(kernel, state, mixed_params(kernel.spec, 3), STEPS)
    assert run.report["reason"] == 0, run.report
    assert got.lengths.tolist() == [STEPS, 0, STEPS]
    assert_bit_equal(rows_of(got.state, 1), rows_of(state, 1))


@WAVE_SIZES
def test_an_interrupt_ends_the_launch_between_two_tokens(wave):
    kernel = one_chunk("windows", wave)
    state, params, want = state_of(kernel.spec), mixed_params(kernel.spec, 3), reference_of_mixed(kernel.spec)
    lengths = set()
    for seed in range(4):
        got, run = decode_on_host(kernel, state, params, STEPS, seed=seed, cancel_step=20_000 + 20_000 * seed)
        assert run.report["reason"] == 2
        length = int(got.lengths[0])
        assert got.lengths.tolist() == [length] * 3
        np.testing.assert_array_equal(got.tokens[:, :length], want.tokens[:, :length])
        assert (np.asarray(got.tokens[:, length:]) == -1).all()
        np.testing.assert_array_equal(got.state.position, state.position + length)
        lengths.add(length)
    assert len(lengths) > 2


# ---- Waits that cannot be satisfied ----

# Fields of mk::Workspace, and the numbers of their hand-offs.
HANDOFFS = {
    "qkv": 1,
    "attended": 2,
    "partial": 3,
    "projected": 4,
    "inner": 5,
    "residual": 6,
    "candidate": 7,
    "token": 8,
    "final_": 9,
    "projected_squares": 13,
    "residual_squares": 14,
    "final_squares": 15,
}
SQUARES = [field for field in HANDOFFS if field.endswith("_squares")]  # of packed hand-offs
PACKED = ["attended", "projected", "inner", "residual", "final_"]


@pytest.mark.parametrize(
    ("batch", "field", "kind", "wave"),
    [
        *(  # every field and every kind with both, by turns
            (1, field, kind, 64 if (number + turn) % 2 else 32)
            for number, field in enumerate(field for field in HANDOFFS if field not in SQUARES)
            for turn, kind in enumerate(("drop", "hold", "flip"))
        ),
        *((2, field, kind, 32) for field in PACKED for kind in ("drop", "hold")),
        *((2, field, "flip", 32) for field in SQUARES),
    ],
)
def test_a_word_that_never_comes_is_reported(batch, field, kind, wave):
    kernel = split_up("windows", wave) if batch == 1 else split_up_for_two("nope", wave)
    spec, workspace = kernel.spec, kernel.workspace
    state, params = rows_of(state_of(spec), slice(3 - batch, 3)), rows_of(mixed_params(spec, 3), slice(3 - batch, 3))
    params = dataclasses.replace(params, max_new_tokens=jnp.full(batch, STEPS, jnp.int32))
    want = reference(spec, state, params)
    begin = workspace[field]
    end = min(at for name in (*HANDOFFS, "exchange_bytes") if (at := workspace[name]) > begin)
    # In the third token.
    watched = "not zero" if batch == 2 and field in PACKED else "all"
    fault = Fault("none", begin=begin, end=end, watched=watched)
    words = decode_on_host(kernel, state, params, 2, fault=fault)[1].watched
    fault = dataclasses.replace(fault, kind=kind, nth=words + words // 7)
    got, run = decode_on_host(kernel, state, params, STEPS, fault=fault, timeout_ticks=60_000, seed=1)
    assert run.faults == 1
    report = run.report
    if kind == "hold" and field in ("partial", "candidate") and report["reason"] == 0:
        # Such a word has one reader. That may be the unit it comes from, which sees what is held back from others.
        np.testing.assert_array_equal(got.tokens, want.tokens)
        return
    assert report["reason"] == 1, report
    assert report["token"] in (2, 3) if field == "token" else report["token"] == 2, report
    # A unit that does not read these words may wait for those who do, and have begun earlier.
    assert report["handoff"] in HANDOFFS.values(), report
    # The word that is named is one that was not there.
    seen = report["seen"]
    if report["expected"] == 2:
        assert 0 in (seen, seen & 0xFFFF, seen >> 16), report
    else:
        assert seen & 1 != report["expected"], report
    # What came before is as it should be.
    for row in range(batch):
        length = int(got.lengths[row])
        np.testing.assert_array_equal(got.tokens[row, :length], want.tokens[row, :length])
        assert length in (2, 3)


@pytest.mark.parametrize("word", [1, 9, 18])
@pytest.mark.parametrize(("wave_size", "batch"), [(32, 1), (32, 2), (64, 1), (64, 3)])
def test_the_word_that_was_lost_is_named(wave_size, batch, word):
    """A word of h5, which all units need at once: of the last request, in the second layer of the first token."""
    spec = spec_of("plain")
    kernel = Kernel(spec, gpu_plan(spec, wave_size, 3), batch)
    line = -(-spec.intermediate_size // 32) * 32
    packed = wave_size == 32 and batch > 1
    word += (batch - 1) * line
    begin = kernel.workspace["inner"] + (word + batch * line * packed) * 4  # a packed use has a copy of its own
    fault = Fault("drop", nth=0 if packed else 1, begin=begin, end=begin + 4, watched="not zero" if packed else "all")
    state, params = rows_of((state_of(spec), params_of(spec, 3)), slice(3 - batch, 3))
    _, run = decode_on_host(kernel, state, params, 2, fault=fault, timeout_ticks=60_000, seed=1)
    assert run.faults == 1
    expected = {"reason": 1, "handoff": HANDOFFS["inner"], "layer": 1, "token": 0, "word": word}
    expected["expected"] = 2 if packed else 0  # a parity, that of the second use
    assert run.report.items() >= expected.items()


@pytest.mark.parametrize("broken", [False, True], ids=["as it is", "not released"])
def test_what_is_cleared_is_clear_when_it_is_looked_at_again(broken, tmp_path):
    """A store that clears stays unseen until the unit releases it, which must be before it can do harm."""
    source = tmp_path / "kernel"
    shutil.copytree(gpu_host.KERNEL, source)
    if broken:
        text, count = re.subn(r"arch::release\(\);", ";", (source / "kernel.h").read_text())
        assert count == 1
        (source / "kernel.h").write_text(text)
    kernel = one_chunk("plain", 32, source=source)
    spec, workspace = kernel.spec, kernel.workspace
    state, params = state_of(spec), params_of(spec, 3)
    want = reference(spec, state, params)
    wrong = 0
    for number, field in enumerate(PACKED):
        begin = workspace[field]
        end = min(at for name in (*HANDOFFS, "exchange_bytes") if (at := workspace[name]) > begin)
        fault = Fault("lag", nth=7 * number, begin=begin, end=end, watched="zero")
        got, run = decode_on_host(kernel, state, params, STEPS, fault=fault, timeout_ticks=60_000, seed=number)
        assert run.faults == 1
        wrong += run.report["reason"] != 0 or not np.array_equal(got.tokens, want.tokens)
    assert (wrong > 0) == broken


# ---- What may not be, whether or not it changes a token ----


@pytest.mark.parametrize("name", CHECKED)
def test_no_race_no_access_out_of_bounds_nothing_undefined(name):
    kernel = CHECKED[name]
    state, params = state_of(kernel.spec), mixed_params(kernel.spec, 3)
    for seed in range(3):
        rows = some_rows(kernel.batch, seed)
        _, run = decode_on_host(kernel, rows_of(state, rows), rows_of(params, rows), 4, seed=seed)
        assert run.report["reason"] == 0, run.report


# Mistakes in hand-offs and barriers: wave size, file, what is replaced, by what, and the message of an instrumented
# build. Where there is none, tokens or reports give the mistake away.
MISTAKES = {
    "words are taken before they are there": (
        64,
        "sync/words.h",
        r"(bool ready\(const Vec4& v, u32 parity\) \{\n  return )",
        r"\1true || ",
        None,
    ),
    "every use has the same parity": (64, "service.h", r"\) & 1u(\}?;)", r") | 1u\1", None),
    "nothing is released before the candidates": (
        64,
        "phases/head.h",
        r"arch::release\(\);",
        ";",
        "a race with a write by unit",
    ),
    "a lane does not wait for the others": (
        32,
        "phases/head.h",
        r"arch::wave_sync\(\);",
        ";",
        "a race with a (write|read)",
    ),
    "a stream wave multiplies before all lanes have gathered": (
        32,
        "activations.h",
        r"arch::wave_sync\(\);",
        ";",
        None,
    ),
    "packed activations are taken before they are there": (
        32,
        "sync/packed.h",
        r"(bool all_there\(const Vec4& v\) \{\n)",
        r"\1  return true;\n",
        None,
    ),
    "packed activations are not cleared": (32, "sync/packed.h", r"arch::store_word\(.*clears\), 0\);", ";", None),
    "service waves do not wait for each other": (
        64,
        "service.h",
        r"arch::group_sync<kServiceGroup, kServiceWaves>\(\);",
        ";",
        "a race with a (write|read)|not written before",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_broken_kernel_is_noticed(mistake, tmp_path):
    wave, file, old, new, message = MISTAKES[mistake]
    source = gpu_host.broken_copy(tmp_path, file, old, new)
    name = "plain" if "stream wave" in mistake or "packed" in mistake else "windows"
    kernel = one_chunk(name, wave, source=source, sanitize=message is not None)
    if "stream wave" in mistake:  # with one request, lanes do not meet before they read what others have gathered
        kernel = dataclasses.replace(kernel, batch=1, spec=kernel.spec.replace(hidden_size=128))
    spec = kernel.spec
    state, params = state_of(spec, POSITIONS[: kernel.batch]), mixed_params(spec, kernel.batch)
    want = reference(spec, state, params)
    for seed in range(4):
        try:
            got, run = decode_on_host(kernel, state, params, STEPS, seed=seed, timeout_ticks=60_000, max_steps=10**6)
        except HostError as error:
            noticed = message is None or re.search(message, str(error)) is not None
        else:
            wrong = run.report["reason"] != 0 or not np.array_equal(got.tokens, want.tokens)
            noticed = message is None and wrong
        if noticed:
            return
    pytest.fail("nothing was noticed")


@pytest.mark.parametrize(("dtype", "kib"), [("float32", 60), ("bfloat16", 50)])
def test_rows_that_are_gathered_in_several_fills(dtype, kib):
    """Where shared memory has a row of activations in parts, lanes overwrite what others have multiplied with."""
    spec = spec_of("plain", dtype).replace(hidden_size=256, intermediate_size=3000)
    plan = gpu_plan(spec, 32, 3, waves=2, service_waves=2, chunk_atoms=4)
    kernel = Kernel(spec, plan, batch=3, sanitize=True, shared_bytes=kib * 1024)
    state, params = state_of(spec), mixed_params(spec, 3)
    got, run = decode_on_host(kernel, state, params, 3)
    assert run.report["reason"] == 0, run.report
    want = reference(spec, state, params)
    assert np.mean(got.tokens == np.asarray(want.tokens)[:, :3]) > 0.6


@pytest.mark.parametrize(
    ("dtype", "chunk_atoms", "hidden", "inner", "batch"),
    [
        ("bfloat16", 8, 256, 9 * 256, 1),
        ("bfloat16", 8, 5 * 256, 256, 1),
        ("float32", 16, 256, 9 * 256, 1),
        ("bfloat16", 16, 512, 9 * 512, 3),
    ],
)
def test_rows_of_any_number_of_chunks(dtype, chunk_atoms, hidden, inner, batch):
    """Stream waves gather some columns at once, fewer the last time; once, those that are not there were written."""
    spec = spec_of("plain", dtype).replace(hidden_size=hidden, intermediate_size=inner)
    plan = gpu_plan(spec, 32, 3, chunk_atoms=chunk_atoms)
    kernel = Kernel(spec, plan, batch=batch, sanitize=True, shared_bytes=232448)
    state, params = rows_of(state_of(spec), slice(batch)), params_of(spec, batch)
    got, _ = decode_on_host(kernel, state, params, 2)
    want = decode(tape_of(spec, 2), state, params, steps=2)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.log_probs, want.log_probs, rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("inner", "batch", "segment_tiles", "sanitize"),
    [(4 * 256, 4, 2, True), (5 * 256 + 96, 3, 3, False), (3 * 256, 2, 2, True)],
)
def test_fills_that_come_ahead(inner, batch, segment_tiles, sanitize):
    """Where several requests' rows are multiplied once, the next fill is asked for during the one before."""
    spec = spec_of("plain", "bfloat16").replace(hidden_size=64, intermediate_size=inner, num_kv_heads=1, head_dim=32)
    spec = spec.replace(num_heads=2, ropes=tuple(dataclasses.replace(rope, rotary_dim=32) for rope in spec.ropes))
    plan = gpu_plan(spec, 32, 4, chunk_atoms=8, segment_tiles=segment_tiles, service_waves=2)
    kernel = Kernel(spec, plan, batch=batch, sanitize=sanitize, shared_bytes=160 * 1024)
    state, params = state_of(spec, tuple(range(1, batch + 1))), params_of(spec, batch)
    at_once = dataclasses.replace(kernel, sanitize=False, defines=(("MK_AHEAD_VECTORS", 0),))
    want, _ = decode_on_host(at_once, state, params, 2)
    got, run = decode_on_host(kernel, state, params, 2, stores="late")
    assert run.report["reason"] == 0, run.report
    np.testing.assert_array_equal(got.log_probs, want.log_probs)
    exact = decode(tape_of(spec, 2), state, params, steps=2)
    np.testing.assert_allclose(got.log_probs, exact.log_probs, rtol=0, atol=0.3)


@pytest.mark.parametrize(
    ("name", "batch", "stores"), [("plain", 2, "late"), ("windows", 3, "now"), ("nope", 5, "late")]
)
def test_sums_of_squares_looked_for_late(name, batch, stores):
    """As where layers are long: after the activations that they belong to."""
    spec = spec_of(name, "bfloat16")
    kernel = Kernel(spec, gpu_plan(spec, 32, 3), batch=batch, defines=(("MK_LATE_SQUARES", 0),))
    late = dataclasses.replace(kernel, sanitize=True, defines=(("MK_LATE_SQUARES", 1),))
    state, params = state_of(spec, tuple(range(1, batch + 1))), params_of(spec, batch)
    want, _ = decode_on_host(kernel, state, params, 3)
    got, run = decode_on_host(late, state, params, 3, stores=stores)
    assert run.report["reason"] == 0, run.report
    np.testing.assert_array_equal(got.log_probs, want.log_probs)


@pytest.mark.parametrize("name", ["post_norm", "plain"])
def test_padding_of_rows_is_written(name):
    """Service waves take 896 columns at once, all that there are, and the rows that stream waves multiply have 960."""
    spec = spec_of(name, "float16").replace(intermediate_size=896)
    plan = gpu_plan(spec, 32, 2, waves=6, service_waves=7, segment_tiles=8)
    kernel = Kernel(spec, plan, batch=1, sanitize=True, shared_bytes=232448)
    assert geometry(spec, plan).matrices["down"].cols == 960
    state, params = rows_of(state_of(spec), slice(1)), params_of(spec, 1)
    got, _ = decode_on_host(kernel, state, params, 2)
    want = decode(tape_of(spec, 2), state, params, steps=2)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.log_probs, want.log_probs, rtol=0, atol=0.01)


@pytest.mark.parametrize("seed", range(3))
def test_products_that_are_not_taken_yet_are_a_race(tmp_path, seed):
    """On NVIDIA who opens a gate or hands over does not wait, and the executor's waves of 32 do not either."""
    source = gpu_host.broken_copy(tmp_path, "service.h", r"\(segment & 1\) \* kSegmentTiles", "0 * kSegmentTiles")
    loops = source / "stream_loops.h"
    text, count = re.subn(r"\(segment & 1\) \* kSegmentTiles", "0 * kSegmentTiles", loops.read_text())
    assert count == 1
    loops.write_text(text)
    kernel = one_chunk("plain", 32, source=source, sanitize=True)
    state, params = state_of(kernel.spec), mixed_params(kernel.spec, 3)
    with pytest.raises(HostError, match=r"race with a (write|read)"):
        decode_on_host(kernel, state, params, 4, seed=seed)
