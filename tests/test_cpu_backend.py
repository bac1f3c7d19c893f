"""The native CPU backend itself: instruction sets, threads, cancellation, leaks, broken programs."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from decoding import (
    DECODE_ERRORS,
    assert_bit_equal,
    assert_same_decode,
    decode,
    long_decode,
    mixed_params,
    params_of,
    reference,
    reference_of_mixed,
    rows_of,
    spec_of,
    state_of,
    tape_of,
    weights_of,
)

from jax_monokernel import DecoderSpec, LayerSpec, RopeSpec, _native, cancel
from jax_monokernel.plan import Plan, available_cpus
from jax_monokernel.sampling import SamplingParams
from jax_monokernel.tape import pack

TESTS = Path(__file__).parent
PLAIN = spec_of("plain")
ISAS = _native.available_isas()
# Sizes that leave remainders with vectors of 4, 8, 16 and 32, five query heads to a key/value head, and a context that
# attention cuts into parts.
WIDE = DecoderSpec(
    vocab_size=301,
    hidden_size=72,
    intermediate_size=202,
    num_heads=10,
    num_kv_heads=2,
    head_dim=44,
    layers=(LayerSpec(), LayerSpec(window=270)),
    ropes=(RopeSpec(theta=1e4, rotary_dim=44),),
    qk_norm="head",
    activation="gelu",
    dtype="float32",
)
WIDE_POSITIONS, WIDE_CAPACITY = (0, 250, 600), 640


@pytest.fixture(params=ISAS)
def isa(request):
    _native.set_isa(request.param)
    yield request.param
    _native.set_isa("")


# ---- Instruction sets ----


@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float16"), ("bfloat16", "float32")],
    ids=["float32", "bfloat16", "float16", "bfloat16-kv_float32"],
)
@pytest.mark.parametrize("name", ["windows", "nope"])
def test_every_instruction_set_gives_the_references_tokens(isa, name, dtype, kv_dtype):
    spec = spec_of(name, dtype, kv_dtype)
    state = state_of(spec)
    got = decode(tape_of(spec, 2), state, mixed_params(spec, 3))
    assert_same_decode(got, reference_of_mixed(spec), spec, state)


@functools.cache
def wide_reference(spec):
    return reference(spec, state_of(spec, WIDE_POSITIONS, capacity=WIDE_CAPACITY), mixed_params(spec, 3))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_instruction_set_handles_remainders_and_long_contexts(isa, dtype):
    spec = WIDE.replace(dtype=dtype, kv_dtype=dtype)
    state = state_of(spec, WIDE_POSITIONS, capacity=WIDE_CAPACITY)
    got = decode(tape_of(spec, 2), state, mixed_params(spec, 3))
    assert_same_decode(got, wide_reference(spec), spec, state)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_every_instruction_set_a_request_gives_the_same_bits_in_any_batch(isa, dtype):
    spec = spec_of("nope", dtype)
    positions = tuple(range(16))
    params = mixed_params(spec, 16)
    whole = decode(tape_of(spec, 2), state_of(spec, positions), params)
    for batch in (1, 2, 3, 5, 7):
        part = decode(tape_of(spec, 2), state_of(spec, positions[:batch]), rows_of(params, slice(batch)))
        assert_bit_equal(part, rows_of(whole, slice(batch)))


def with_nan(weights, role: str):
    """The weights with one number of a role replaced; of the last layer where layers have it."""
    layers = weights.layers
    if role in ("embedding", "head"):
        matrix = np.array(getattr(weights, role))
        matrix[5, 3] = np.nan
        return dataclasses.replace(weights, **{role: jax.numpy.asarray(matrix)})
    matrix = np.array(getattr(layers, role))
    matrix[(-1, *(2,) * (matrix.ndim - 1))] = np.nan
    return dataclasses.replace(weights, layers=dataclasses.replace(layers, **{role: jax.numpy.asarray(matrix)}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("windows", "q"),
        ("windows", "k"),
        ("windows", "v"),
        ("windows", "gate"),
        ("windows", "embedding"),
        ("post_norm", "up"),
        ("post_norm", "head"),
    ],
)
def test_a_nan_weight_does_what_it_does_to_the_reference(isa, name, role, dtype):
    # Soft-caps, gelu and relu on the way: none of them may make a number of it.
    spec = spec_of(name, dtype)
    weights = with_nan(weights_of(spec), role)
    state, params = state_of(spec), mixed_params(spec, 3)
    want = reference(spec, state, params, weights)
    assert not np.array_equal(want.log_probs, reference_of_mixed(spec).log_probs)
    got = decode(pack(spec, weights, Plan(platform="cpu", units=2)), state, params)
    assert_same_decode(got, want, spec, state)


# A minus infinity among the scores is a key that counts nothing, even where there is no other.
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("cache", ["k_cache", "v_cache"])
@pytest.mark.parametrize("name", ["plain", "windows"])
def test_a_cache_slot_that_is_no_number_reaches_its_request_only(isa, name, cache, value):
    spec = spec_of(name)
    state, params = state_of(spec), mixed_params(spec, 3)
    broken = dataclasses.replace(state, **{cache: getattr(state, cache).at[1, :, :, 5].set(value)})
    got = decode(tape_of(spec, 2), broken, params)
    assert_same_decode(got, reference(spec, broken, params), spec, broken)
    untouched = np.array([0, 2])
    whole = decode(tape_of(spec, 2), state, params)
    assert_bit_equal(rows_of(got, untouched), rows_of(whole, untouched))


def test_the_environment_forces_an_instruction_set(environment):
    for isa in ISAS:
        environment("MONOKERNEL_ISA", isa)
        assert _native.current_isa() == isa
    environment("MONOKERNEL_ISA", "mmx")
    message = f"MONOKERNEL_ISA is 'mmx'; this machine can run {', '.join(ISAS)}"
    with pytest.raises(ValueError, match=message):
        _native.current_isa()
    with pytest.raises(DECODE_ERRORS, match=message):
        jax.block_until_ready(decode(tape_of(PLAIN, 2), state_of(PLAIN), params_of(PLAIN, 3)))
    with pytest.raises(ValueError, match=r"the instruction set is 'sse9'; this machine can run"):
        _native.set_isa("sse9")
    # What is forced in the process counts more than the environment.
    _native.set_isa(ISAS[-1])
    assert _native.current_isa() == ISAS[-1]
    _native.set_isa("")
    environment("MONOKERNEL_ISA", None)
    assert _native.current_isa() == ISAS[0]


# ---- Threads ----


def test_the_native_side_counts_the_same_cpus_as_the_plan():
    assert _native.available_cpus() == available_cpus()
    if hasattr(os, "sched_setaffinity"):
        one = f"import os; os.sched_setaffinity(0, {{{min(os.sched_getaffinity(0))}}})"
        code = f"{one}; from jax_monokernel import _native; print(_native.available_cpus())"
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({"cpu.max": "max 100000\n"}, 0),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "1000 100000\n"}, 1),
        ({"cpu.max": "9223372036854775807 1\n"}, 2**20),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "300000\n"}, 0),
        ({"cpu.max": "two of three\n"}, 0),
        ({}, 0),
    ],
    ids=["none", "rounded_up", "small", "huge", "v1-none", "v1", "v1-half", "text", "no_cgroup"],
)
def test_a_cgroups_quota_in_cpus(tmp_path, monkeypatch, files, cpus):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert _native.quota_cpus(str(tmp_path)) == cpus

    # The plan finds the same, up to the CPUs that there are.
    def open_there(path):
        return (tmp_path / Path(path).relative_to("/sys/fs/cgroup")).open()

    monkeypatch.setattr("jax_monokernel.plan.open", open_there, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(2**20), raising=False)
    assert available_cpus() == (cpus or 2**20)


def test_the_read_probe_reads():
    rates = _native.read_bandwidth(3_000_001, 2, 50)
    assert len(rates) == 50
    assert 1e8 < max(rates) < 1e13  # not optimised away
    for bad in [(0, 1, 1), (2**41, 1, 1), (1000, 2, 1), (4096, 0, 1), (4096, 1, 0)]:
        with pytest.raises(ValueError, match="read_bandwidth needs"):
            _native.read_bandwidth(*bad)


def same_tokens(units: int, threads: int, environment) -> None:
    want = decode(tape_of(PLAIN, 1), state_of(PLAIN), mixed_params(PLAIN, 3))
    environment("MONOKERNEL_THREADS", str(threads))
    for _ in range(3):
        assert_bit_equal(decode(tape_of(PLAIN, units), state_of(PLAIN), mixed_params(PLAIN, 3)), want)


@pytest.mark.sanitize
@pytest.mark.parametrize(("units", "threads"), [(5, 1), (5, 2), (2, 5), (20, 3), (8, 8)])
def test_units_and_threads_need_not_match(units, threads, environment):
    same_tokens(units, threads, environment)


def test_many_more_threads_than_cores(environment):
    same_tokens(40, 40, environment)


@pytest.mark.sanitize
def test_python_threads_decode_different_models_at_once(environment):
    environment("MONOKERNEL_THREADS", "3")
    jobs = [
        functools.partial(decode, tape_of(spec, units), state_of(spec), mixed_params(spec, 3))
        for spec, units in [
            (PLAIN, 1),
            (spec_of("windows", "bfloat16"), 2),
            (spec_of("nope"), 3),
            (spec_of("longrope", "float16"), 2),
        ]
    ]
    want = [jax.device_get(job()) for job in jobs]

    def repeat(job):
        return [jax.device_get(job()) for _ in range(25)]

    with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
        for results, one in zip(pool.map(repeat, jobs), want, strict=True):
            for result in results:
                assert_bit_equal(result, one)


def test_a_call_for_many_threads_gets_its_turn_among_small_ones(environment):
    environment("MONOKERNEL_THREADS", "2")
    params, state = mixed_params(PLAIN, 3), state_of(PLAIN, capacity=2100)
    small = functools.partial(decode, tape_of(PLAIN, 1), state, params, steps=1000)
    large = functools.partial(decode, tape_of(PLAIN, 2), state, params, steps=1000)
    for call in (small, large):
        call().tokens.block_until_ready()
    done = threading.Event()

    def keep_busy():
        while not done.is_set():
            small().tokens.block_until_ready()

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        timer = threading.Timer(10, done.set)
        timer.start()
        workers = [pool.submit(keep_busy) for _ in range(4)]
        time.sleep(0.1)
        large().tokens.block_until_ready()
        in_time = not done.is_set()
        timer.cancel()
        done.set()
        for worker in workers:
            worker.result()
    assert in_time


def test_other_python_threads_run_during_a_decode():
    long_decode(1)
    ticks, done = 0, threading.Event()

    def tick():
        nonlocal ticks
        while not done.wait(0.002):
            ticks += 1

    thread = threading.Thread(target=tick)
    thread.start()
    start = time.monotonic()
    while time.monotonic() - start < 0.3:
        before = ticks
        began = time.monotonic()
        long_decode(5000)
        took = time.monotonic() - began
    done.set()
    thread.join()
    # With the lock held there would be none at all while the native side works.
    assert ticks - before > took / 0.002 / 50
    assert ticks > 5


def test_a_spawned_process_decodes():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        got = pool.apply(_small_tokens)
    np.testing.assert_array_equal(got, _small_tokens())


def _small_tokens() -> np.ndarray:
    return np.asarray(decode(tape_of(PLAIN, 2), state_of(PLAIN), mixed_params(PLAIN, 3)).tokens)


# ---- Cancellation ----


@contextlib.contextmanager
def cancelling(after: float):
    """Cancels from another thread, again and again in case the decode has not begun the first time."""
    done = threading.Event()
    first: list[float] = []

    def work():
        while not done.wait(after):
            first.append(time.monotonic())
            cancel()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield first
    finally:
        done.set()
        thread.join()


@pytest.mark.sanitize
@pytest.mark.parametrize("threads", [1, 2])
def test_cancel_stops_a_decode_from_another_thread(threads, environment):
    environment("MONOKERNEL_THREADS", str(threads))
    want = _small_tokens()
    long_decode(1)
    with cancelling(after=0.2) as times:
        with pytest.raises(DECODE_ERRORS, match="jax_monokernel: decode was cancelled"):
            long_decode(200_000)
        ended = time.monotonic()
    assert ended - times[0] < 2
    np.testing.assert_array_equal(_small_tokens(), want)


@pytest.mark.parametrize("donated", [False, True], ids=["kept", "donated"])
def test_a_cancelled_decode_says_what_becomes_of_the_state(donated):
    call = jax.jit(functools.partial(decode, steps=200_000), donate_argnums=(1,) if donated else ())
    small = state_of(PLAIN, (3,))
    shape = (1, PLAIN.num_layers, PLAIN.num_kv_heads, 200_000, PLAIN.head_dim)
    state = dataclasses.replace(small, k_cache=jax.numpy.ones(shape), v_cache=jax.numpy.ones(shape))
    before = jax.device_get(state)
    with cancelling(after=0.2), pytest.raises(DECODE_ERRORS) as error:
        jax.block_until_ready(call(tape_of(PLAIN, 2), state, params_of(PLAIN, 1, max_new_tokens=200_000)))
    assert str(error.value).startswith(
        "CANCELLED: jax_monokernel: decode was cancelled, by Ctrl-C or jax_monokernel.cancel()."
    )
    assert "if it was not donated: call decode with it again. If it was donated, it is unusable" in str(error.value)
    if not donated:
        assert_bit_equal(jax.device_get(state), before)


def test_cancel_stops_every_decode_those_that_wait_for_threads_included(environment):
    environment("MONOKERNEL_THREADS", "2")
    long_decode(1)

    def run(_):
        with pytest.raises(DECODE_ERRORS, match="cancelled"):
            long_decode(200_000)

    with concurrent.futures.ThreadPoolExecutor(4) as pool, cancelling(after=0.3):
        list(pool.map(run, range(4)))
    np.testing.assert_array_equal(_small_tokens(), _small_tokens())


def run_script(name: str, *arguments: str, **environment: str) -> str:
    command = [sys.executable, str(TESTS / name), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout


@pytest.mark.sanitize
def test_ctrl_c_stops_a_decode_and_the_process_goes_on():
    assert "done" in run_script("interrupted.py")


# ---- Resources ----


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def count_threads() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_100_000_calls_leave_nothing_behind(environment):
    environment("MONOKERNEL_THREADS", "2")
    tape, params = tape_of(PLAIN, 2), params_of(PLAIN, 1, max_new_tokens=2)
    state = state_of(PLAIN, (3,))
    for _ in range(300):
        decode(tape, state, params).tokens.block_until_ready()
    threads, memory = count_threads(), resident_bytes()
    for _ in range(100_000):
        decode(tape, state, params).tokens.block_until_ready()
    assert count_threads() <= threads
    assert resident_bytes() - memory < 4 * 2**20  # 42 bytes per call


@pytest.mark.sanitize
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_changing_the_number_of_threads_leaves_no_threads_behind(environment):
    def run(units: int) -> None:
        environment("MONOKERNEL_THREADS", str(units))
        decode(tape_of(PLAIN, units), state_of(PLAIN), params_of(PLAIN, 3)).tokens.block_until_ready()

    for units in (2, 5):
        run(units)
    before = count_threads()
    for _ in range(20):
        for units in (2, 5):
            run(units)
    deadline = time.monotonic() + 10
    while count_threads() > before and time.monotonic() < deadline:  # a team's threads leave by themselves
        time.sleep(0.05)
    assert count_threads() <= before


# ---- Broken programs and operands ----


@pytest.mark.sanitize
def test_broken_programs_give_errors_or_tokens_but_never_a_crash():
    assert "tokens" in run_script("hostile_programs.py", "150")


@pytest.mark.sanitize
def test_any_sampling_values_give_tokens():
    rng = np.random.default_rng(8)
    edges = np.array([0, -0.0, 1, -1, 1e-45, 1e-7, 3e38, np.inf, -np.inf, np.nan, 0.5], np.float32)
    for seed in range(20):
        params = params_of(PLAIN, 8)
        leaves = {
            name: jax.numpy.asarray(rng.choice(edges, 8))
            for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty")
        }
        params = SamplingParams(
            **leaves,
            top_k=jax.numpy.asarray(rng.choice(np.array([-(2**31), -1, 0, 1, 36, 37, 38, 2**31 - 1], np.int32), 8)),
            max_new_tokens=jax.numpy.asarray(rng.choice(np.array([-(2**31), -1, 0, 3, 2**31 - 1], np.int32), 8)),
            eos_token_id=jax.numpy.asarray(rng.choice(np.array([-(2**31), -1, 5, 2**31 - 1], np.int32), (8, 2))),
            logit_bias=jax.numpy.asarray(rng.choice(edges, (8, 37))),
        )
        result = decode(tape_of(PLAIN, 2), state_of(PLAIN, tuple(range(8)), seed=seed), params)
        tokens, lengths = np.asarray(result.tokens), np.asarray(result.lengths)
        for row in range(8):
            n = lengths[row]
            assert n <= max(0, int(params.max_new_tokens[row]))
            assert np.all((tokens[row, :n] >= 0) & (tokens[row, :n] < 37))
            assert np.all(tokens[row, n:] == -1)
