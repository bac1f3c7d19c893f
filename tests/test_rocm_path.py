"""The whole ROCm path without AMD's hardware: the handler for ROCM, with strict stand-ins for hipRTC and HIP.

The stand-ins (native/rocm) compile the kernel for this CPU, in waves of 64 lanes, and run it: what is tested goes from
the first call of `decode` to tokens, errors and interrupts.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import dataclasses
import functools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding import (
    DECODE_ERRORS,
    STEPS,
    assert_bit_equal,
    assert_same_decode,
    mixed_params,
    params_of,
    reference,
    reference_of_mixed,
    replace_row,
    spec_of,
    state_of,
    tape_of,
)
from decoding import decode as native
from gpu_decode import gpu_plan, gpu_tape_of
from gpu_fakes import make_call, register
from rocm_stand_in import StandIn

from jax_monokernel import cancel, decode
from jax_monokernel.decode import TARGET
from jax_monokernel.state import FULL, RUNNING, STOPPED

UNITS = 3
MODELS = ["windows", "post_norm", "longrope"]


@pytest.fixture
def rocm(rocm_stand_in, monkeypatch):
    """The stand-ins, with `decode` calling the handler for ROCM."""
    register()
    monkeypatch.setattr(sys.modules["jax_monokernel.decode"], "TARGET", "jax_monokernel_decode_on_fake_rocm")
    return rocm_stand_in


def tape_for(spec):
    return jax.tree.map(jnp.asarray, gpu_tape_of(spec, gpu_plan(spec, 64, UNITS)))


def mixed(spec):
    """A batch of three: greedy, filtered, penalised with a bias for each token."""
    return tape_for(spec), state_of(spec), mixed_params(spec, 3)


@functools.partial(jax.jit, static_argnames="steps")
def run(tape, state, params, steps=STEPS):
    return decode(tape, state, params, max_new_tokens=steps, return_log_probs=True)


# ---- Results ----


@pytest.mark.parametrize("name", MODELS)
def test_tokens_equal_the_reference(rocm, name):
    spec = spec_of(name)
    assert_same_decode(run(*mixed(spec)), reference_of_mixed(spec), spec, state_of(spec))


def test_a_16_bit_model(rocm, monkeypatch):
    spec = spec_of("plain", "bfloat16")
    state, params = state_of(spec), params_of(spec, 3)
    got = run(tape_for(spec), state, params)
    monkeypatch.setattr(sys.modules["jax_monokernel.decode"], "TARGET", TARGET)
    want = native(tape_of(spec, 2), state, params)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.log_probs, want.log_probs, rtol=0, atol=0.15)


@pytest.mark.parametrize(("policy", "stores"), [("forward", "late"), ("reverse", "now"), ("starve", "random")])
def test_bits_do_not_depend_on_the_order_of_units(rocm, policy, stores):
    spec = spec_of("windows")
    want = jax.block_until_ready(run(*mixed(spec)))
    rocm.policy, rocm.stores, rocm.seed = policy, stores, 7
    assert_bit_equal(run(*mixed(spec)), want)


def test_every_request_ends_in_its_own_way(rocm):
    spec = spec_of("windows")
    state = replace_row(state_of(spec, (7, 38, 5)), 2, status=STOPPED)
    params = params_of(spec, 3, max_new_tokens=[5, 16, 16])
    got = run(tape_for(spec), state, params)
    assert_same_decode(got, reference(spec, state, params), spec, state)
    assert got.lengths.tolist() == [5, 2, 0]
    assert got.state.status.tolist() == [RUNNING, FULL, STOPPED]


def test_operands_that_are_not_in_place_are_copied_before_the_launch(rocm):
    call = make_call("rocm", spec=spec_of("plain"), units=2, batch=1)
    settings = {"temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 1, "presence_penalty": 0}
    for name, value in settings.items():
        call.operands[name][:] = value
    in_place = call.run()
    call.aliased = False
    copied = call.run()
    assert in_place["lengths"].tolist() == [4]
    for name in set(in_place) - {"workspace"}:
        np.testing.assert_array_equal(copied[name], in_place[name], err_msg=name)


def test_devices_side_by_side(rocm):
    """Threads, on both devices: each gets its own module, and calls for one device wait for each other."""
    spec = spec_of("windows")
    want = reference_of_mixed(spec)
    on = [jax.device_put(mixed(spec), device) for device in jax.devices()[:2]]
    before = rocm.launches
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda i: run(*on[i % 2]), range(6)):
            np.testing.assert_array_equal(result.tokens, want.tokens)
    assert rocm.launches == before + 6


def test_groups_on_dies_and_elsewhere(rocm):
    """Words that stay on dies where work-groups are as expected; else the other kernel, from then on at once."""
    spec = spec_of("windows")
    tape = jax.tree.map(jnp.asarray, gpu_tape_of(spec, gpu_plan(spec, 64, 4, groups=2)))
    state, params, want = state_of(spec), mixed_params(spec, 3), reference_of_mixed(spec)
    # No other test's device: it remembers what was found.
    rocm.devices = 3
    operands = jax.device_put((tape, state, params), jax.devices()[2])
    for dies, launches in ((2, 1), (3, 2), (2, 1)):
        rocm.dies = dies
        before = rocm.launches
        assert_same_decode(run(*operands), want, spec, state)
        assert rocm.launches == before + launches


def test_a_timeline(rocm, environment, tmp_path):
    environment("MONOKERNEL_TRACE", str(tmp_path / "timeline"))
    spec = spec_of("windows")
    jax.block_until_ready(run(*mixed(spec)))  # opens the device
    before = rocm.allocations
    got = jax.block_until_ready(run(*mixed(spec), steps=20))
    np.testing.assert_array_equal(got.tokens[:, :STEPS], reference_of_mixed(spec).tokens)
    events = np.fromfile(tmp_path / "timeline", np.uint64).reshape(UNITS, -1, 2)
    assert (events[:, :10] > 0).all()
    assert rocm.allocations == before


# ---- Caches ----


def test_a_kernel_is_compiled_and_loaded_once(rocm):
    spec = spec_of("plain").replace(vocab_size=41)
    before = rocm.compiles, rocm.loads, rocm.launches
    for seed in range(3):
        jax.block_until_ready(run(tape_for(spec), state_of(spec, (3,), seed=seed), params_of(spec, 1), steps=2))
    assert (rocm.compiles, rocm.loads, rocm.launches) == (before[0] + 1, before[1] + 1, before[2] + 3)


PROCESS = """
import ctypes, os, sys
import test_rocm_path as here

here.register()
sys.modules["jax_monokernel.decode"].TARGET = "jax_monokernel_decode_on_fake_rocm"
spec = here.spec_of("windows")
print(here.run(*here.mixed(spec)).tokens.tolist())
hiprtc = ctypes.CDLL(os.environ["MONOKERNEL_HIPRTC_LIBRARY"])
print(ctypes.c_int.in_dll(hiprtc, "hiprtc_compiles").value)
"""


def test_another_process_takes_the_kernel_from_the_disk(rocm, tmp_path):
    spec = spec_of("windows")
    want = run(*mixed(spec)).tokens.tolist()
    variables = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", PROCESS]
    done = subprocess.run(
        command, env=variables, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(want), "0"], done.stderr


def test_what_the_compiler_says_is_raised(rocm, monkeypatch):
    monkeypatch.setenv("HIPRTC_HOST_COMPILER", "sh -c 'echo stream.h:7: no such thing >&2; exit 1'")
    spec = spec_of("plain").replace(vocab_size=43)
    message = r"INTERNAL.*hiprtc-6\.2.*compile the kernel for gfx942:\nstream\.h:7: no such thing[\s\S]*COMPILATION"
    with pytest.raises(DECODE_ERRORS, match=re.compile(message, re.DOTALL)):
        jax.block_until_ready(run(tape_for(spec), state_of(spec), params_of(spec, 3)))


# ---- Ends that nobody wants ----


def test_a_word_that_is_lost_is_an_exception_and_the_device_stays_usable(rocm, environment):
    spec = spec_of("windows")
    arguments = mixed(spec)
    environment("MONOKERNEL_TIMEOUT", "0.0006")  # 60,000 ticks of 10 ns; a tick is one step of the executor
    rocm.fault, rocm.fault_store = "drop", 2000
    message = (
        r"DEADLINE_EXCEEDED.*more than 0\.0006 s.*Unit \d waited in layer \d of token \d+ for word \d+ of h\d_\w+: "
        r"expected parity [01], saw 0x[0-9a-f]{8}"
    )
    with pytest.raises(DECODE_ERRORS, match=message):
        jax.block_until_ready(run(*arguments))
    rocm.fault = "none"
    environment("MONOKERNEL_TIMEOUT", None)
    np.testing.assert_array_equal(run(*arguments).tokens, reference_of_mixed(spec).tokens)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("last_token", 37, r"last_token of request 1 is 37; expected 0 to 36"),
        ("position", -2, r"position of request 1 is -2; expected at least 0"),
    ],
)
def test_a_request_that_cannot_be_is_an_exception(rocm, field, value, message):
    tape, state, params = mixed(spec_of("windows"))
    with pytest.raises(DECODE_ERRORS, match=f"INVALID_ARGUMENT.*{message}"):
        jax.block_until_ready(run(tape, replace_row(state, 1, **{field: value}), params))


def long_one(rocm):
    """A decode of minutes."""
    spec = spec_of("plain").replace(vocab_size=41)
    cache = jnp.ones((1, 2, 2, 60_000, 8))
    state = dataclasses.replace(state_of(spec, (3,)), k_cache=cache, v_cache=cache)
    return tape_for(spec), state, params_of(spec, 1, max_new_tokens=50_000, temperature=1.0)


def test_cancel_ends_a_kernel_that_runs(rocm):
    arguments, launches = long_one(rocm), rocm.launches
    thread = threading.Thread(target=lambda: (wait_for(lambda: rocm.launches > launches), time.sleep(0.3), cancel()))
    thread.start()
    with pytest.raises(DECODE_ERRORS, match=r"CANCELLED.*decode was cancelled"):
        jax.block_until_ready(run(*arguments, steps=50_000))
    thread.join()


def wait_for(condition) -> None:
    end = time.monotonic() + 60
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)


def test_ctrl_c_ends_a_kernel_that_runs(rocm):
    arguments, launches = long_one(rocm), rocm.launches

    def press() -> None:
        wait_for(lambda: rocm.launches > launches)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        with pytest.raises(DECODE_ERRORS, match="CANCELLED"):
            jax.block_until_ready(run(*arguments, steps=50_000))
        time.sleep(5)  # Python's own handler runs in the main thread as soon as that is back in Python
    thread.join()


# ---- gfx950, and libraries whose calls are wrong ----


@pytest.fixture
def another(rocm, environment, tmp_path):
    """The stand-ins as a fresh process has them."""
    copy = StandIn(tmp_path, like=rocm)
    for name, value in copy.variables.items():
        environment(name, value)
    return copy


def test_gfx950(another):
    another.arch = "gfx950:sramecc+:xnack-"
    spec = spec_of("windows")
    got = run(*mixed(spec))
    np.testing.assert_array_equal(got.tokens, reference_of_mixed(spec).tokens)
    assert another.complaints == ""


POINTER = ctypes.c_void_p
STREAM = POINTER(0x5000)


def address() -> ctypes.Array:
    return (ctypes.c_void_p * 1)()


def allocated(hip, size: int = 64) -> int:
    memory = address()
    assert hip.hipMalloc(memory, ctypes.c_size_t(size)) == 0
    return memory[0]


def host_memory(hip) -> int:
    memory = address()
    assert hip.hipHostMalloc(memory, ctypes.c_size_t(64), 0x40000002) == 0
    return memory[0]


def event(hip) -> POINTER:
    made = address()
    assert hip.hipEventCreateWithFlags(made, 2) == 0
    return POINTER(made[0])


MISTAKES = {
    "no hipInit": (lambda hip: hip.hipGetDeviceCount(address()), "hipInit was not called"),
    "null stream": (lambda hip: hip.hipMemsetD8Async(POINTER(allocated(hip)), 0, 64, None), "on the null stream"),
    "no stream": (lambda hip: hip.hipStreamSynchronize(POINTER(1)), "is no stream"),
    "stream of another device": (
        lambda hip: hip.hipSetDevice(1) or hip.hipStreamSynchronize(STREAM),
        "a stream of device 0 while device 1 is current",
    ),
    "too much is cleared": (
        lambda hip: hip.hipMemsetD8Async(POINTER(allocated(hip)), 0, ctypes.c_size_t(65), STREAM),
        "more than was allocated",
    ),
    "the host's address": (
        lambda hip: hip.hipMemsetD8Async(POINTER(host_memory(hip)), 0, ctypes.c_size_t(4), STREAM),
        "host memory by the host's address",
    ),
    "a device's address on the host": (
        lambda hip: hip.hipMemcpyDtoHAsync(*[POINTER(allocated(hip))] * 2, ctypes.c_size_t(4), STREAM),
        "to memory that is not the host's",
    ),
    "memory that is not coherent": (
        lambda hip: hip.hipHostMalloc(address(), ctypes.c_size_t(64), 2),
        "flags are 0x2; expected mapped and coherent",
    ),
    "device left behind": (
        lambda hip: hip.hipSetDevice(0) or hip.hipGetDevice(address()),
        "was left so",
    ),
    "an attribute of CUDA's number": (
        lambda hip: hip.hipDeviceGetAttribute(address(), 16, 0),
        "nobody has a reason to ask for attribute 16",
    ),
    "event not recorded": (lambda hip: hip.hipEventQuery(event(hip)), "was not recorded"),
    "event with a clock": (lambda hip: hip.hipEventCreateWithFlags(address(), 0), "expected no timing"),
    "freed twice": (lambda hip: freed_twice(hip), "is not from hipMalloc"),
    "no code object": (
        lambda hip: hip.hipModuleLoadData(address(), b"__CLANG_OFFLOAD_BUNDLE__" + bytes(64)),
        "this is no code object",
    ),
    "no function": (
        lambda hip: hip.hipModuleLaunchCooperativeKernel(None, 1, 1, 1, 1, 1, 1, 0, STREAM, None),
        "no such function",
    ),
}


def freed_twice(hip) -> int:
    memory = POINTER(allocated(hip))
    return hip.hipFree(memory) or hip.hipFree(memory)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_stand_in_takes_no_wrong_call(another, mistake):
    call, message = MISTAKES[mistake]
    if mistake != "no hipInit":
        assert another.hip.hipInit(0) == 0
        another.hip.hipSetDevice(0)
    assert call(another.hip) != 0
    assert message in another.take_complaints()


def test_a_complaint_is_what_the_exception_says(another):
    """And a run time that forgets to clear the words is found out."""
    another.break_set = 1
    spec = spec_of("windows")
    with pytest.raises(DECODE_ERRORS, match=r"INTERNAL.*could not run the kernel: launch: \w+ is not cleared"):
        jax.block_until_ready(run(*mixed(spec)))
    assert "is not cleared" in another.take_complaints()
