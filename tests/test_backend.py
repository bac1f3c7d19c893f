"""Decode where this machine decodes best: on its GPU if JAX has one, else on the CPU. `--backend` chooses another.

Everything is compared with the pure-JAX reference or with what transformers computed. On a GPU a kernel is compiled for
each model and batch, which takes seconds the first time.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import os
import threading

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding import (
    DECODE_ERRORS,
    SPECS,
    STEPS,
    assert_bit_equal,
    assert_same_decode,
    mixed_params,
    params_of,
    reference,
    spec_of,
    state_of,
    weights_of,
)
from golden.cases import CASES
from golden.models import golden_model, quick_jit

from jax_monokernel import GenerationConfig, RopeSpec, cancel, empty_state, generate, sampling_params, stream
from jax_monokernel.decode import decode
from jax_monokernel.forward import forward_cached, logits
from jax_monokernel.plan import Plan, make_plan
from jax_monokernel.prefill import prefill
from jax_monokernel.reference import decode_reference
from jax_monokernel.tape import pack

REPEATS = int(os.environ.get("MONOKERNEL_TEST_REPEATS", "20"))
SOAK_TOKENS = int(os.environ.get("MONOKERNEL_TEST_SOAK", "10000"))
_ONE_EACH = {case.config["model_type"]: name for name, case in reversed(CASES.items())}
_step = jax.jit(decode, static_argnames=("max_new_tokens", "return_log_probs"))


class Target:
    """The device that is tested."""

    def __init__(self, backend):
        self.platform, self.device = backend
        self._tapes = {}

    def put(self, tree):
        return jax.device_put(tree, self.device)

    def pack(self, spec, weights, groups=None):
        with jax.default_device(self.device):
            on_cpu = self.platform == "cpu"
            plan = Plan(platform="cpu", units=2) if on_cpu else make_plan(spec, platform=self.platform, groups=groups)
            return jax.jit(lambda w: pack(spec, w, plan))(self.put(weights))

    def tape(self, spec):
        if spec not in self._tapes:
            self._tapes[spec] = self.pack(spec, weights_of(spec))
        return self._tapes[spec]

    def decode(self, spec, state, params, steps=STEPS, *, tape=None):
        """Where the reference is: on the CPU."""
        tape = self.tape(spec) if tape is None else tape
        with jax.default_device(self.device):
            result = _step(tape, self.put(state), self.put(params), max_new_tokens=steps, return_log_probs=True)
            return jax.device_get(result)


@pytest.fixture(scope="module")
def target(backend):
    return Target(backend)


def agreement(got, want) -> np.ndarray:
    """Of tokens, as far as all before them agree."""
    return np.cumprod(np.asarray(got.tokens) == np.asarray(want.tokens), axis=1).astype(bool)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", SPECS)
def test_equals_the_reference(target, name, batch):
    spec = spec_of(name)
    state, params = state_of(spec, (7, 0, 20)[:batch]), mixed_params(spec, batch)
    assert_same_decode(target.decode(spec, state, params), reference(spec, state, params), spec, state)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["plain", "windows"])
def test_16_bits_are_as_near_as_their_rounding_allows(target, name, dtype):
    """Another order of sums may choose the other of two logits that are near each other. Before that, numbers are."""
    spec = spec_of(name, dtype)
    state, params = state_of(spec), params_of(spec, 3)
    got, want = target.decode(spec, state, params), reference(spec, state, params)
    agree = agreement(got, want)
    assert agree.mean() > 0.6
    error = np.abs(np.asarray(got.log_probs) - np.asarray(want.log_probs))[agree]
    assert error.max() < {"bfloat16": 0.15, "float16": 0.02}[dtype]


@pytest.mark.parametrize("name", sorted(_ONE_EACH.values()))
def test_every_family_gives_the_tokens_of_transformers(target, name):
    case = golden.read(name)
    model = golden_model(case)
    spec, weights, length = model.spec, model.decoder_weights(), len(case.prompt)
    state = empty_state(spec, batch=1, capacity=length + golden.NEW_TOKENS - 1, key=jax.random.key(0))
    state = jax.jit(prefill, static_argnums=0)(spec, weights, jnp.array([case.prompt]), jnp.array([length]), state)
    config = GenerationConfig(max_new_tokens=golden.NEW_TOKENS)
    params = sampling_params(config, batch=1, vocab_size=spec.vocab_size)
    result = target.decode(spec, state, params, golden.NEW_TOKENS, tape=target.pack(spec, weights))
    assert result.tokens[0].tolist() == case.greedy


def prompted(spec, weights, prompts, capacity):
    """A state after prompts int [batch, tokens], by plain JAX."""
    prompts = jnp.asarray(prompts)
    batch, length = prompts.shape
    state = empty_state(spec, batch=batch, capacity=capacity, key=jax.random.key(0))
    return quick_jit(prefill, static_argnums=0)(spec, weights, prompts, jnp.full(batch, length), state)


@pytest.mark.parametrize("name", sorted(_ONE_EACH.values()))
def test_every_family_gives_256_tokens_of_the_reference(target, name):
    case = golden.read(name)
    model = golden_model(case)
    spec, weights, steps = model.spec, model.decoder_weights(), 256
    state, params = prompted(spec, weights, [case.prompt], len(case.prompt) + steps), params_of(spec, 1)
    got = target.decode(spec, state, params, steps, tape=target.pack(spec, weights))
    reference_ = quick_jit(functools.partial(decode_reference, spec, max_new_tokens=steps))
    np.testing.assert_array_equal(got.tokens, reference_(weights, state, params).tokens)


@functools.partial(quick_jit, static_argnums=0)
def scores(spec, weights, state, tokens):
    """Log-probabilities f32 [batch, steps] by plain JAX of tokens int [batch, steps], one step after the other."""

    def step(carry, token):
        k_cache, v_cache, position, last = carry
        count = jnp.ones_like(position)
        x, k_cache, v_cache = forward_cached(
            spec, weights, k_cache, v_cache, last[:, None], position, count, position + 1
        )
        log_probs = jax.nn.log_softmax(logits(spec, weights, x)[:, -1])
        return (k_cache, v_cache, position + 1, token), jnp.take_along_axis(log_probs, token[:, None], 1)[:, 0]

    start = state.k_cache, state.v_cache, state.position, state.last_token
    return jax.lax.scan(step, start, tokens.T)[1].T


def widened(spec, weights):
    """The same model in float32."""
    return spec.replace(dtype="float32", kv_dtype="float32"), jax.tree.map(lambda w: w.astype(jnp.float32), weights)


def assert_as_exact_as_plain_jax(got, spec, weights, state, wide_state, times=1.5):
    """Beside the same 16-bit weights in float32, the error of log-probabilities is at most `times` plain JAX's."""
    tokens = jnp.asarray(got.tokens)
    assert (np.asarray(got.lengths) == tokens.shape[1]).all()
    exact = scores(*widened(spec, weights), wide_state, tokens)
    plain = scores(spec, weights, state, tokens)
    error, plain_error = (np.abs(np.asarray(x) - np.asarray(exact)).mean() for x in (got.log_probs, plain))
    assert 0 < error <= times * plain_error


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", sorted(_ONE_EACH.values()))
def test_every_family_in_16_bits_is_as_exact_as_plain_jax(target, name, dtype):
    if target.platform == "cpu" and (sorted(_ONE_EACH.values()).index(name) % 2 == 0) != (dtype == "bfloat16"):
        pytest.skip("on a CPU families take turns: plain JAX, which is what takes the time, is slow there")
    case, steps = golden.read(name), 64
    model = golden_model(case, dtype)
    spec, weights, length = model.spec, model.decoder_weights(), len(case.prompt)
    prompts = [golden.random_prompt(spec.vocab_size, length, seed) for seed in range(3)]
    state = prompted(spec, weights, prompts, length + steps)
    got = target.decode(spec, state, params_of(spec, 3), steps, tape=target.pack(spec, weights))
    wide, wide_weights = widened(spec, weights)
    assert_as_exact_as_plain_jax(got, spec, weights, state, prompted(wide, wide_weights, prompts, length + steps))


def test_runs_are_equal_to_the_bit(target):
    spec = spec_of("plain", "bfloat16")
    state, params = state_of(spec), mixed_params(spec, 3)
    first = target.decode(spec, state, params)
    for _ in range(REPEATS):
        assert_bit_equal(target.decode(spec, state, params), first)


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize(
    ("dtype", "heads", "kv_heads", "head_dim"), [("bfloat16", 4, 1, 64), ("bfloat16", 4, 2, 128), ("float16", 4, 2, 64)]
)
def test_long_contexts(target, dtype, heads, kv_heads, head_dim, batch):
    """Query heads share the loads of a key, on NVIDIA by matrix instructions, in many rounds. Runs have equal bits."""
    if target.platform == "cpu":
        batch = min(batch, 3)  # whose kernel takes requests one by one; plain JAX takes half a minute for 16
    rope = RopeSpec(theta=1e4, rotary_dim=head_dim)
    spec = spec_of("plain", dtype).replace(num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, ropes=(rope,))
    positions = (2003, 64, 1190, 1, 700, 1999, 512, 1500, *range(1501, 1509))[:batch]
    state, params, weights = state_of(spec, positions, capacity=2100), params_of(spec, batch), weights_of(spec)
    steps = 64
    got = target.decode(spec, state, params, steps)
    wide_caches = {name: getattr(state, name).astype(jnp.float32) for name in ("k_cache", "v_cache")}
    # Of one request a few tokens, whose logits are large, carry most of the error.
    wide_state = dataclasses.replace(state, **wide_caches)
    assert_as_exact_as_plain_jax(got, spec, weights, state, wide_state, times=2)
    for _ in range(REPEATS if target.platform != "cpu" else 1):
        assert_bit_equal(target.decode(spec, state, params, steps), got)


@pytest.mark.parametrize(("hidden", "inner", "batch"), [(5 * 2048, 256, 1), (256, 9 * 2048, 1), (256, 9 * 2048, 3)])
def test_rows_of_several_chunks(target, hidden, inner, batch):
    """On a GPU, a row of more than 2,048 columns is multiplied piece by piece. Runs have equal bits."""
    spec = spec_of("plain", "bfloat16").replace(
        hidden_size=hidden, intermediate_size=inner, logit_multiplier=10 / hidden**0.5
    )
    state, params, steps = state_of(spec, (7, 0, 20)[:batch], capacity=64), params_of(spec, batch), 32
    got = target.decode(spec, state, params, steps)
    wide_caches = {name: getattr(state, name).astype(jnp.float32) for name in ("k_cache", "v_cache")}
    wide_state = dataclasses.replace(state, **wide_caches)
    assert_as_exact_as_plain_jax(got, spec, weights_of(spec), state, wide_state, times=2)
    for _ in range(REPEATS if target.platform != "cpu" else 1):
        assert_bit_equal(target.decode(spec, state, params, steps), got)


def test_soak(target):
    """Sixteen requests again and again, MONOKERNEL_TEST_SOAK tokens in all: every call gives the bits of the first."""
    spec, batch, steps = spec_of("windows", "bfloat16"), 16, 256
    state = state_of(spec, tuple(range(batch)), capacity=300)
    params = params_of(spec, batch, temperature=0.8, max_new_tokens=steps)
    first = target.decode(spec, state, params, steps)
    assert np.asarray(first.lengths).sum() == batch * steps
    for _ in range(-(-SOAK_TOKENS // (batch * steps))):
        assert_bit_equal(target.decode(spec, state, params, steps), first)


def test_goes_on_where_it_stopped(target):
    spec = spec_of("plain")
    state, params = state_of(spec), mixed_params(spec, 3)
    whole = target.decode(spec, state, params, 12)
    first = target.decode(spec, state, params, 5)
    rest = target.decode(spec, first.state, params, 7)
    np.testing.assert_array_equal(np.concatenate([first.tokens, rest.tokens], 1), whole.tokens)
    assert_bit_equal(rest.state, whole.state)


def test_two_models_in_two_threads(target):
    specs = [spec_of("plain"), spec_of("windows")]
    cases = [(spec, state_of(spec), mixed_params(spec, 3)) for spec in specs]
    want = [target.decode(*case) for case in cases]
    found: list = [[], []]

    def run(i: int) -> None:
        for _ in range(10):
            found[i].append(target.decode(*cases[i]))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results, one in zip(found, want, strict=True):
        assert len(results) == 10
        for result in results:
            assert_bit_equal(result, one)


def test_two_devices_in_two_threads(target):
    """At the same time, each with a copy of the tape: every call gives the same bits."""
    devices = jax.local_devices(backend=target.platform)[:2]
    if len(devices) < 2:
        pytest.skip("this machine has one such device")
    targets = [Target((target.platform, device)) for device in devices]
    spec = spec_of("windows", "bfloat16")
    state, params = state_of(spec), mixed_params(spec, 3)
    want = target.decode(spec, state, params)
    start = threading.Barrier(2)

    def run(i: int) -> list:
        targets[i].tape(spec)
        start.wait()
        return [targets[i].decode(spec, state, params) for _ in range(10)]

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for results in pool.map(run, range(2)):
            for result in results:
                assert_bit_equal(result, want)


def test_operands_on_two_devices_are_refused(target):
    devices = jax.local_devices(backend=target.platform)
    other = devices[1] if len(devices) > 1 else jax.local_devices(backend="cpu")[0]
    spec = spec_of("plain")
    state, params = state_of(spec), params_of(spec, 3)
    with pytest.raises(ValueError, match=r"[Ii]ncompatible devices"):
        _step(target.tape(spec), jax.device_put(state, other), target.put(params), max_new_tokens=2)
    assert_same_decode(target.decode(spec, state, params), reference(spec, state, params), spec, state)


def test_a_cancelled_decode_leaves_the_device_usable(target):
    spec = spec_of("plain")
    state, params = state_of(spec, (3,), capacity=100_000), params_of(spec, 1, temperature=1.0, max_new_tokens=2**30)
    short = state_of(spec), params_of(spec, 3)
    before = target.decode(spec, *short)
    target.decode(spec, state, params_of(spec, 1, temperature=1.0, max_new_tokens=1), 90_000)  # compiles
    timer = threading.Timer(0.2, cancel)
    timer.start()
    with pytest.raises(DECODE_ERRORS, match="cancelled"):
        target.decode(spec, state, params, 90_000)
    timer.join()
    assert_bit_equal(target.decode(spec, *short), before)


@pytest.mark.parametrize("name", ["plain", "post_norm"])
def test_plans_with_groups_give_the_references_tokens(target, name):
    if target.platform == "cpu":
        pytest.skip("plans for CPUs have no groups")
    spec = spec_of(name)
    tape = target.pack(spec, weights_of(spec), groups=2)
    assert tape.plan.groups == 2
    state, params = state_of(spec), mixed_params(spec, 3)
    assert_same_decode(target.decode(spec, state, params, tape=tape), reference(spec, state, params), spec, state)


def test_a_stream_gives_the_tokens_of_the_same_call(target):
    model = golden_model(golden.read("llama"))
    with jax.default_device(target.device):
        want = generate(model, [[5, 6, 7], [8, 9]], max_new_tokens=40)
        with stream(model, [[5, 6, 7], [8, 9]], max_new_tokens=40) as pieces:
            found = list(pieces)
    for row in range(2):
        mine = [p for p in found if p.row == row]
        assert [p.token for p in mine] == np.asarray(want.tokens[row]).tolist()
        times = [p.time for p in mine]
        assert times == sorted(times)
        assert times[0] < times[-1]


def test_memory_that_held_nan_is_as_good_as_any(target):
    """Scratch memory of a call comes from where arrays lay that are gone."""
    spec = spec_of("plain")
    state, params = state_of(spec), mixed_params(spec, 3)
    want = target.decode(spec, state, params)
    with jax.default_device(target.device):
        for size in (1 << 14, 1 << 17, 1 << 20, 1 << 23):
            garbage = [jnp.full(size, jnp.nan) for _ in range(4)]
            jax.block_until_ready(garbage)
            for array in garbage:
                array.delete()
            assert_bit_equal(target.decode(spec, state, params), want)


def test_a_tape_for_another_platform_is_refused(target):
    spec = spec_of("plain")
    other = Plan(platform="cuda", units=2) if target.platform == "cpu" else Plan(platform="cpu", units=2)
    with jax.default_device(target.device):
        tape = pack(spec, target.put(weights_of(spec)), other)
    with pytest.raises((ValueError, *DECODE_ERRORS), match=f"(?i)packed for (the )?{other.platform}"):
        target.decode(spec, state_of(spec), params_of(spec, 3), tape=tape)


def test_out_of_memory_is_said_and_passes(target):
    if target.platform == "cpu":
        pytest.skip("a CPU's memory is the machine's: filling it would stop what else runs there")
    spec = spec_of("plain")
    state, params = state_of(spec), params_of(spec, 3)
    want = target.decode(spec, state, params)
    here = target.put((state, params))
    hoard, size = [], 1 << 62
    with jax.default_device(target.device):
        while size >= 1 << 12:  # XLA waits for ten seconds before it says no
            stats = target.device.memory_stats()
            size = min(size, stats["bytes_limit"] - stats["bytes_in_use"]) // 256 * 256
            try:
                hoard.append(jax.block_until_ready(jnp.ones(size // 4)))
            except jax.errors.JaxRuntimeError:
                size //= 16
    with pytest.raises(DECODE_ERRORS, match=r"RESOURCE_EXHAUSTED|[Oo]ut of memory"):
        target.decode(spec, *here)
    for array in hoard:
        array.delete()
    assert_bit_equal(target.decode(spec, state, params), want)
