"""The GPU kernel's elementary functions, random bits and sampler, compiled for the CPU."""

from __future__ import annotations

import ctypes
import os
import pathlib
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sampling_oracle as oracle
from scipy import special
from test_sampling import keys
from test_sampling_native import STRANGE, check_against_definition, random_case, run_native

native = pytest.importorskip("jax_monokernel._native")

TESTS = pathlib.Path(__file__).parent
# Lanes of a wave and service waves. 256 lanes have as many groups as fit in the list.
GEOMETRIES = {"wave32x2": (32, 2), "wave64x4": (64, 4)}


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """{geometry: library}, compiled when they are first asked for."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("gpu_math")

    class Libraries(dict):
        def __missing__(self, name):
            wave, waves = GEOMETRIES[name]
            path = folder / f"{name}.so"
            sources = [TESTS / "native" / "gpu_math_test.cc", TESTS / "native" / "gpu_host" / "fiber.cc"]
            includes = [TESTS.parent / "ffi" / "gpu" / "kernel", TESTS]
            flags = ["-std=c++20", "-O2", "-ffp-contract=off", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"]
            defines = [f"-DMK_WAVE_SIZE={wave}", f"-DMK_SERVICE_WAVES={waves}"]
            command = [*compiler.split(), *flags, *defines, *(f"-I{i}" for i in includes), *sources, "-o", path]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
            assert done.returncode == 0, done.stderr
            self[name] = ctypes.CDLL(str(path))
            return self[name]

    return Libraries()


@pytest.fixture(scope="module")
def library(libraries):
    return libraries["wave32x2"]


def pointer(array: np.ndarray | None):
    return None if array is None else array.ctypes.data_as(ctypes.c_void_p)


def call(library, name: str, x: np.ndarray) -> np.ndarray:
    out = np.empty(x.shape, np.float32)
    getattr(library, f"math_{name}")(pointer(x), pointer(out), ctypes.c_int64(x.size))
    return out


# ---- Elementary functions ----

EDGES = np.array([0, 1e-45, 1e-40, 1.1754944e-38, 1e-20, 1, 2, 88.7228, 88.7229, 103.97, 104.1, 1e30, 3.4e38, np.inf])
EDGES = np.float32([*EDGES, *-EDGES, np.nan])


def any_floats(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.integers(0, 2**32, n, dtype=np.uint32).view(np.float32)


def arguments(low: float, high: float, seed: int) -> np.ndarray:
    """All kinds of bit patterns, and more of the values that matter."""
    rng = np.random.default_rng(seed)
    parts = [EDGES, any_floats(rng, 1_000_000), rng.uniform(low, high, 2_000_000), rng.normal(size=500_000)]
    return np.concatenate([np.float32(part) for part in parts])


def errors(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """In units in the last place of f32, against f64. Infinities and NaN must be equal: they have none, or infinity."""
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = want.astype(np.float32)
        ulp = np.spacing(np.abs(rounded)).astype(np.float64)
        error = np.abs(got.astype(np.float64) - want) / ulp
    same = (got == rounded) | (np.isnan(got) & np.isnan(rounded))
    return np.where(np.isfinite(rounded) & np.isfinite(got), error, np.where(same, 0, np.inf))


@pytest.mark.parametrize(
    ("name", "reference", "low", "high", "limit"),
    [
        ("exp", np.exp, -105, 90, 1.1),
        ("log", np.log, 0.3, 2, 1.0),
        ("tanh", np.tanh, -10, 10, 1.5),
        ("erf", special.erf, -5, 5, 1.5),
    ],
    ids=["exp", "log", "tanh", "erf"],
)
def test_elementary_functions_are_accurate_everywhere(library, name, reference, low, high, limit):
    x = arguments(low, high, 1)
    with np.errstate(all="ignore"):
        error = errors(call(library, name, x), reference(x.astype(np.float64)))
    worst = np.argmax(error)
    assert error[worst] <= limit, x[worst]


def test_signs_of_zero_are_kept(library):
    zeros = np.float32([0.0, -0.0])
    for name in ("tanh", "erf"):
        np.testing.assert_array_equal(np.signbit(call(library, name, zeros)), [False, True])
    np.testing.assert_array_equal(call(library, "exp", zeros), 1)


@pytest.mark.parametrize("name", ["sin", "cos"])
def test_angles(library, name):
    """All magnitudes up to 2^24, positions times rope's frequencies, and the neighbours of multiples of pi / 2."""
    rng = np.random.default_rng(2)
    anything = any_floats(rng, 1_000_000)
    rope = np.float32(rng.integers(0, 2**20, 500_000)) * np.float32(10000.0 ** -rng.random(500_000))
    near_zeros = np.float32(np.round(rng.uniform(0, 1e7, 500_000)) * (np.pi / 2))
    with np.errstate(invalid="ignore"):
        x = np.concatenate([EDGES, anything, rope, near_zeros, np.float32(rng.uniform(-(2**24), 2**24, 500_000))])
        x = x[np.abs(x) <= 2**24]
    error = errors(call(library, name, x), getattr(np, name)(x.astype(np.float64)))
    assert np.max(error) <= 0.51, x[np.argmax(error)]
    assert np.all(np.isnan(call(library, name, np.float32([np.inf, -np.inf, np.nan]))))


# ---- Randomness ----


@pytest.mark.parametrize("position", [0, 1, 77, 2**31 - 2])
def test_bits_are_those_of_jax_random(library, position):
    key = jax.random.key(3)
    data = np.asarray(jax.random.key_data(key))
    got = np.empty(1001, np.uint32)
    library.sample_bits(pointer(data), position, ctypes.c_int64(len(got)), pointer(got))
    np.testing.assert_array_equal(got, native.sample_bits(data, position, len(got)))
    with jax.threefry_partitionable(True):
        want = jax.random.bits(jax.random.fold_in(key, position), (len(got),), "uint32")
    np.testing.assert_array_equal(got, want)


def test_the_bound_of_the_noise_is_above_it_for_all_random_bits(library):
    slack = call(library, "noise_slack", np.arange(2**23, dtype=np.uint32) << np.uint32(9))
    assert np.min(slack) > -1e-5  # enter() has a margin of 2e-5
    assert np.median(slack) < 0.5


# ---- The sampler ----


def run_gpu(library, logits, seen, key_data, position, params, *, log_probs=True, order=0):
    """Tokens and log-probabilities; the lanes take turns in an order that depends on `order`."""
    batch, vocab = logits.shape
    options = [np.ascontiguousarray(getattr(params, name)) for name in oracle.OFF]
    bias = None if params.logit_bias is None else np.ascontiguousarray(params.logit_bias)
    seen = np.concatenate([np.ravel(seen), np.zeros(4, np.uint8)])  # whole words are read
    tokens, out = np.full(batch, -7, np.int32), np.zeros(batch, np.float32)
    inputs = [np.ascontiguousarray(logits), seen, np.asarray(key_data), np.asarray(position), *options, bias, tokens]
    library.sample_rows(*map(pointer, inputs), pointer(out if log_probs else None), batch, vocab, order)
    return tokens, out


def check_against_native(library, case, order: int = 0) -> None:
    """Tokens are equal, but for the very few rows (none in most runs) where f32 rounding decides between two."""
    logits, seen, key_data, position, params = case
    tokens, log_probs = run_gpu(library, *case, order=order)
    want_tokens, want_log_probs = run_native(*case)
    assert np.all((tokens >= 0) & (tokens < logits.shape[1]))
    different = np.flatnonzero(tokens != want_tokens)
    assert len(different) <= 1 + len(tokens) // 1000
    for i in different:
        noise = oracle.noise(key_data, position, logits.shape[1])[i]
        assert not oracle.choose(logits[i], seen[i], noise, oracle.row_params(params, i)).clear
    same = tokens == want_tokens
    np.testing.assert_allclose(log_probs[same], want_log_probs[same], rtol=1e-5, atol=1e-5)


# Around the sizes of a vector (4), a step of all lanes (256 and 1024) and the list (1024), and real ones.
@pytest.mark.parametrize(
    ("vocab", "batch"),
    [(1, 64), (2, 64), (3, 64), (7, 512), (255, 256), (257, 512), (1023, 256), (1024, 256), (1025, 256), (5000, 512),
     (50_257, 64), (131_072, 32)],
)  # fmt: skip
def test_tokens_equal_the_cpu_sampler(library, vocab, batch):
    for seed in (30, 31):
        check_against_native(library, random_case(seed, batch, vocab), order=seed)


@pytest.mark.parametrize(("vocab", "batch"), [(7, 512), (257, 512), (5000, 64)])
def test_tokens_equal_the_definition(library, vocab, batch, monkeypatch):
    monkeypatch.setattr("test_sampling_native.run_native", lambda *case: run_gpu(library, *case))
    check_against_definition(*random_case(32, batch, vocab))


FILTERS = {
    "top_k-1": {"top_k": 1},
    "top_k-50": {"top_k": 50},
    "top_k-700": {"top_k": 700},  # more than groups, fewer than the list has room for
    "top_k-5000": {"top_k": 5000},
    "top_k-huge": {"top_k": 2**31 - 1},
    "top_p-tiny": {"top_p": 1e-30},
    "top_p-negative": {"top_p": -1.0},
    "top_p-0.9": {"top_p": 0.9},
    "top_p-below-1": {"top_p": np.nextafter(np.float32(1), np.float32(0))},
    "min_p-0.05": {"min_p": 0.05},
    "min_p-tiny": {"min_p": 1e-30},
    "min_p-1": {"min_p": 1.0},
    "top_k-and-top_p": {"top_k": 50, "top_p": 0.9},
    "top_k-5000-and-top_p": {"top_k": 5000, "top_p": 0.5},
    "all": {"top_k": 300, "top_p": 0.95, "min_p": 0.01},
    "cold": {"top_k": 50, "top_p": 0.9, "temperature": 1e-6},
    "hot": {"top_p": 0.9, "temperature": 1e6},
    "infinite-temperature": {"top_k": 50, "temperature": np.inf},
}


@pytest.mark.parametrize("vocab", [1024, 9001])
@pytest.mark.parametrize("options", FILTERS.values(), ids=FILTERS.keys())
def test_each_filter_on_rows_of_every_kind(library, options, vocab):
    batch = 48
    logits, seen, key_data, position, _ = random_case(33, batch, vocab)
    params = oracle.make_params(batch, vocab, repetition_penalty=1.2, **options)
    check_against_native(library, (logits, seen, key_data, position, params))


def test_zeros_of_both_signs_are_equal(library):
    zeros = np.random.default_rng(39).choice(np.float32([0.0, -0.0]), (64, 3000))
    params = oracle.make_params(64, 3000, temperature=np.resize([0, 1], 64), top_k=3)
    position = np.zeros(64, np.int32)
    check_against_native(library, (zeros, np.zeros(zeros.shape, np.uint8), keys(39, 64), position, params))


def test_log_probs_are_computed_only_when_asked(library):
    case = random_case(34, 64, 300)
    tokens, log_probs = run_gpu(library, *case, log_probs=False)
    np.testing.assert_array_equal(tokens, run_gpu(library, *case)[0])
    np.testing.assert_array_equal(log_probs, 0)


@pytest.mark.parametrize("vocab", [300, 20_011])
def test_no_bit_depends_on_the_order_of_the_lanes(library, vocab):
    case = random_case(35, 64, vocab)
    first = run_gpu(library, *case)
    for order in (1000, 2000, 3000):
        again = run_gpu(library, *case, order=order)
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("vocab", [7, 5003])
def test_other_waves(libraries, vocab):
    check_against_native(libraries["wave64x4"], random_case(36, 64, vocab))


def test_strange_options_and_logits(library):
    rng = np.random.default_rng(37)
    batch, vocab = 512, 65
    logits, seen, key_data, position, _ = random_case(38, batch, vocab)
    logits[rng.random(logits.shape) < 0.02] = np.inf
    logits[rng.random(logits.shape) < 0.02] = np.float32(-3.4e38)
    floats = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty")
    options = {name: np.where(rng.random(batch) < 0.4, rng.choice(STRANGE, batch), oracle.OFF[name]) for name in floats}
    options["top_k"] = rng.choice([-(2**31), -1, 0, 1, vocab - 1, vocab, vocab + 1, 2**31 - 1], batch)
    bias = rng.choice([*STRANGE, *[0.0] * 50], (batch, vocab))
    params = oracle.make_params(batch, vocab, logit_bias=bias, **options)
    check_against_native(library, (logits, seen, key_data, position, params))


@pytest.mark.parametrize("vocab", [300, 5000])
@pytest.mark.parametrize("temperature", [0, 1])
def test_nothing_to_choose_from(library, temperature, vocab):
    logits = np.float32([[np.nan] * vocab, [-np.inf] * vocab, np.arange(vocab)])
    params = oracle.make_params(
        3, vocab, temperature=temperature, top_k=2, top_p=0.5, min_p=0.1, logit_bias=np.float32([[0], [0], [-np.inf]])
    )
    seen = np.zeros((3, vocab), np.uint8)
    tokens, log_probs = run_gpu(library, logits, seen, keys(0, 3), np.zeros(3, np.int32), params)
    np.testing.assert_array_equal(tokens, 0)
    want = jax.nn.log_softmax(jnp.arange(vocab, dtype=jnp.float32))[0]
    np.testing.assert_allclose(log_probs, [-np.inf, -np.inf, want], rtol=1e-6)


@pytest.mark.parametrize("vocab", [300, 4000])
def test_after_an_aborted_wait_it_is_some_token(library, vocab):
    """Logits and their best are what is in memory then."""
    rng = np.random.default_rng(40)
    memory = np.empty(vocab + 8, np.float32)
    start = -memory.ctypes.data // 4 % 4
    logits = memory[start : start + vocab]
    values = [np.nan, -np.nan, np.inf, -np.inf, 0.0, 5.0, -1e30, 3e38, 1e-40]
    for i in range(300):
        logits[:] = any_floats(rng, vocab) if i % 2 else rng.choice(np.float32(values), vocab)
        best, mass = map(ctypes.c_float, rng.choice(values, 2))
        filters = int(rng.choice([0, 3, 700, 2000])), rng.choice([0.0, 0.5, 1.0]), rng.choice([0.0, 0.1])
        k, p, q = ctypes.c_int(filters[0]), ctypes.c_float(filters[1]), ctypes.c_float(filters[2])
        assert 0 <= library.sample_anything(pointer(logits), vocab, best, mass, k, p, q) < vocab, (best, mass, filters)


def test_end_of_sequence(library):
    ids = np.int32([[3, -1, -1], [5, 0, 3]])
    library.eos.restype = ctypes.c_bool
    got = [[library.eos(pointer(ids), 3, row, token) for token in (0, 3, 4, 5)] for row in (0, 1)]
    assert got == [[False, True, False, False], [True, True, False, True]]
    assert not library.eos(None, 0, 0, 3)
