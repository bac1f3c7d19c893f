"""Calls of the GPU run time (ffi/gpu) without a GPU, on a stand-in for drivers and compilers."""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import dataclasses
import fcntl
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
from decoding import DECODE_ERRORS, params_of, state_of
from gpu_fakes import ARCHES, PLATFORMS, WARP, make_call, register, spec_of
from naive import random_weights

from jax_monokernel import LayerSpec, _gpu, _native, cancel, decode
from jax_monokernel._program import program
from jax_monokernel.mailbox import Mailbox, operand
from jax_monokernel.plan import Plan
from jax_monokernel.tape import pack


@pytest.fixture(params=PLATFORMS)
def fake(request, make_fake):
    return make_fake(request.param)


# ---- Launches ----


@pytest.mark.parametrize("aliased", [True, False], ids=["in_place", "copied"])
@pytest.mark.parametrize(("batch", "log_probs"), [(1, False), (3, True)])
def test_a_call_launches_the_kernel_and_returns_its_results(fake, batch, log_probs, aliased):
    call = make_call(fake.platform, batch=batch, log_probs=log_probs)
    call.aliased = aliased
    call.operands["status"][-1] = 1 if batch > 1 else 0
    results = call.run()
    last, running = call.operands["last_token"][:, None], (call.operands["status"] == 0)[:, None]
    np.testing.assert_array_equal(results["tokens"], np.where(running, last + np.arange(1, 5), -1))
    np.testing.assert_array_equal(results["lengths"], 4 * running[:, 0])
    np.testing.assert_array_equal(results["position"], call.operands["position"] + 4 * running[:, 0])
    for name in ("k_cache", "v_cache", "seen", "status"):
        np.testing.assert_array_equal(results[name].view(np.uint8), call.operands[name].view(np.uint8))
    waves = int(call.attributes["ints"][_native.INT_FIELDS.index("waves")])
    service = int(call.attributes["ints"][_native.INT_FIELDS.index("service_waves")])
    feed = 1 if fake.platform == "cuda" else 0
    assert (fake.grid, fake.block) == (5, (waves + service + feed) * WARP[fake.platform])
    assert fake.dynamic_shared == _native.gpu_shared_bytes(ARCHES[fake.platform])
    assert 32 < fake.cleared_bytes < call.results["workspace"].shape[0]
    assert (fake.compiles, fake.loads, fake.launches) == (1, 1, 1)
    call.run()
    assert (fake.compiles, fake.loads, fake.launches) == (1, 1, 2)


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        (
            "times_out",
            r"DEADLINE_EXCEEDED.*more than 10 s.*Unit 5 waited in layer 3 of token 17 for word 123 of h4_projected: "
            r"expected parity 1, saw 0x0000beef",
        ),
        (
            "misses_activations",
            r"waited in layer 1 of token 2 for word 40 of h5_inner: expected activations that are not 0, saw 0x00003f",
        ),
        ("misses_token", r"waited after the layers of token 2 for word 0 of h8_token: expected parity 1, saw"),
        ("misses_places", r"waited at the start for h12_places: expected all 304 units .*, saw 0x0000012f"),
        ("misses_no_more", r"waited in layer 1 of token 2 for a word of h5_inner, which came too late\. The device"),
        ("fails_to_launch", r"INTERNAL.*could not launch the kernel.*720"),
        ("crashes", r"INTERNAL.*could not run the kernel: an illegal memory access"),
        ("unknown_reason", r"INTERNAL.*unknown reason \(77\)"),
        ("invalid_token", r"INVALID_ARGUMENT.*last_token of request 1 is 51; expected 0 to 49"),
        ("invalid_position", r"INVALID_ARGUMENT.*position of request 1 is -7; expected at least 0"),
    ],
)
def test_what_went_wrong_is_raised_and_the_device_stays_usable(fake, launch, message):
    call = make_call(fake.platform)
    fake.launch = launch
    with pytest.raises(DECODE_ERRORS, match=message):
        call.run()
    fake.launch = "runs"
    assert call.run()["lengths"].tolist() == [4, 4]


def test_timeouts_can_be_changed(make_fake, environment):
    fake = make_fake()
    environment("MONOKERNEL_TIMEOUT", "2.5")
    fake.launch = "times_out"
    with pytest.raises(DECODE_ERRORS, match=r"more than 2\.5 s"):
        make_call().run()


@pytest.mark.parametrize("text", ["never", "30s", "0", "-1", "nan", "inf", "1e6", "1 2"])
def test_a_timeout_that_is_no_number_of_seconds_is_refused(make_fake, environment, text):
    fake = make_fake()
    environment("MONOKERNEL_TIMEOUT", text)
    message = f'INVALID_ARGUMENT.*MONOKERNEL_TIMEOUT is "{text}"; expected a number of seconds above 0'
    with pytest.raises(DECODE_ERRORS, match=message):
        make_call().run()
    assert fake.launches == 0
    environment("MONOKERNEL_TIMEOUT", "")
    make_call().run()


def test_cancel_stops_a_running_kernel(fake):
    call = make_call(fake.platform)
    fake.launch = "until_cancelled"
    threading.Timer(0.3, cancel).start()
    start = time.monotonic()
    with pytest.raises(DECODE_ERRORS, match=r"CANCELLED.*decode was cancelled"):
        call.run()
    assert 0.2 < time.monotonic() - start < 5
    fake.launch = "runs"
    assert call.run()["lengths"].tolist() == [4, 4]


def test_cancel_also_stops_calls_that_wait_for_the_device(make_fake):
    fake = make_fake()
    fake.launch = "until_cancelled"
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(make_call().run) for _ in range(3)]
        while fake.launches == 0:
            time.sleep(0.01)
        time.sleep(0.3)
        assert fake.launches == 1
        cancel()
        for future in futures:
            with pytest.raises(DECODE_ERRORS, match="CANCELLED"):
                future.result(timeout=20)
    assert fake.launches == 1


@contextlib.contextmanager
def another_process_compiles(folder):
    """As it looks to this one: the cache's one entry is not there yet, and locked."""
    (entry,) = (file for file in folder.iterdir() if not file.name.startswith("."))
    entry.unlink()
    with open(folder / f".{entry.name.partition('-')[0]}.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def test_cancel_stops_calls_that_wait_for_another_process_that_compiles(make_fake, tmp_path, capfd):
    make_fake()
    make_call().run()
    fake = make_fake()
    capfd.readouterr()
    with another_process_compiles(tmp_path / "cache"):
        threading.Timer(0.4, cancel).start()
        start = time.monotonic()
        with pytest.raises(DECODE_ERRORS, match=r"CANCELLED.*decode was cancelled"):
            make_call().run()
        assert 0.3 < time.monotonic() - start < 5
    line = "jax_monokernel: waiting for another process that compiles the kernel for this model, batch 2, on sm_90\n"
    assert capfd.readouterr().err == line
    assert fake.compiles == 0
    assert make_call().run()["lengths"].tolist() == [4, 4]


def test_a_stream_that_is_left_while_another_process_compiles(make_fake, tmp_path):
    make_fake()
    make_call().run()
    fake = make_fake()
    call, box = make_call(), Mailbox(2, 4)
    call.operands["mailbox"] = operand(box)
    with another_process_compiles(tmp_path / "cache"):
        threading.Timer(0.2, box.stop).start()
        assert call.run()["lengths"].tolist() == [0, 0]
    assert (fake.compiles, fake.launches) == (0, 0)


def test_ctrl_c_stops_compiling_ahead_that_waits_for_another_process(make_fake, tmp_path):
    target, arguments = _gpu.Target("cuda", "sm_90", 5), {"batch": 1, "capacity": 16}
    make_fake()
    _gpu.compile_ahead(spec_of(), target, **arguments)
    fake = make_fake()
    with another_process_compiles(tmp_path / "cache"):
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            _gpu.compile_ahead(spec_of(), target, **arguments)
    assert fake.compiles == 0


def test_cancel_stops_calls_that_wait_for_another_thread_that_compiles(make_fake):
    """And the one that compiles, when it has done so: no compiler can be stopped half-way."""
    fake = make_fake()
    fake.compile_ms = 3000
    start = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        # Those for one device wait for its kernel, the one for another device for the binary.
        futures = [pool.submit(make_call().run, device=i % 2) for i in range(3)]
        while fake.compiles == 0:
            time.sleep(0.01)
        time.sleep(0.3)
        cancel()
        done, compiling = concurrent.futures.wait(futures, timeout=1.5)
        assert (len(done), len(compiling)) == (2, 1)
        for future in futures:
            with pytest.raises(DECODE_ERRORS, match="CANCELLED"):
                future.result(timeout=20)
    assert time.monotonic() - start > 2.5
    assert (fake.compiles, fake.launches) == (1, 0)
    assert make_call().run()["lengths"].tolist() == [4, 4]  # with what was compiled
    assert fake.compiles == 1


def test_ctrl_c_stops_a_running_kernel(make_fake):
    fake = make_fake()
    call = make_call()
    fake.launch = "until_cancelled"
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        with pytest.raises(DECODE_ERRORS, match="CANCELLED"):
            call.run()
        time.sleep(5)  # Python's own handler runs in the main thread as soon as that is back in Python


def test_threads_models_and_devices(make_fake):
    fake = make_fake()
    fake.compile_ms, fake.launch_ms = 200, 3
    calls = [make_call(batch=1), make_call(batch=2), make_call(spec=spec_of(vocab_size=44))]

    def run(i):
        call = calls[i % 3]
        return call, call.run(device=i % 2)

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        for call, results in pool.map(run, range(18)):
            expected = call.operands["last_token"][:, None] + np.arange(1, 5)
            np.testing.assert_array_equal(results["tokens"], expected)
    assert fake.overlaps == 0  # never two launches on a device
    assert fake.compiles == 3  # the devices share binaries
    assert fake.loads == 6
    assert fake.launches == 18


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
def test_decode_with_a_gpu_tape_makes_such_calls(fake, monkeypatch, jit):
    register()
    module = sys.modules["jax_monokernel.decode"]  # the package's attribute of this name is the function
    monkeypatch.setattr(module, "TARGET", f"jax_monokernel_decode_on_fake_{fake.platform}")
    spec = spec_of()
    tape = pack(spec, random_weights(spec), Plan(platform=fake.platform, units=5))
    batch = 18  # two calls
    state = state_of(spec, [3] * batch, capacity=20)
    state = dataclasses.replace(state, last_token=jnp.arange(batch, dtype=jnp.int32))
    run = functools.partial(decode, max_new_tokens=3)
    result = (jax.jit(run) if jit else run)(tape, state, params_of(spec, batch))
    np.testing.assert_array_equal(result.tokens, np.arange(batch)[:, None] + np.arange(1, 4))
    assert result.state.position.tolist() == [6] * batch
    assert fake.launches == 2
    assert re.search(r"#define MK_BATCH (16|2)\n", fake.source)


# ---- What XLA is told ----


@pytest.fixture(scope="module")
def traits_of(tmp_path_factory):
    """What a handler declares of itself: bits of XLA_FFI_Handler_TraitsBits."""
    library = tmp_path_factory.mktemp("traits") / "libtraits.so"
    source = Path(__file__).parent / "native" / "handler_traits.cc"
    flags = ["-std=c++20", "-O0", "-shared", "-fPIC", f"-I{jax.ffi.include_dir()}"]
    subprocess.run(["c++", *flags, "-o", library, source], check=True)
    native = ctypes.CDLL(str(library))
    native.traits_of.restype = native.traits_of_a_compatible_one.restype = ctypes.c_int64
    native.traits_of.argtypes = [ctypes.c_void_p]
    assert native.traits_of_a_compatible_one() == 1
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return lambda capsule: native.traits_of(pointer(capsule, None))


def test_the_custom_call_is_not_said_to_be_compatible_with_command_buffers(traits_of, monkeypatch):
    """The handler waits for the kernel and looks at its report: a replay of its launches alone would do neither."""
    given = []
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda name, handler, **more: given.append((handler, more)))
    _gpu.register.__wrapped__()  # itself only once in a process
    assert [more for _, more in given] == [{"platform": "CUDA"}, {"platform": "ROCM"}]
    assert [traits_of(handler) for handler, _ in given] == [0, 0]


# ---- What does not fit ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"units": 4}, r"RESOURCE_EXHAUSTED.*packed for 5 units.*at most 4 at once.*platform=\"cuda\", units=4"),
        ({"occupancy": 0}, r"RESOURCE_EXHAUSTED.*does not fit on a multiprocessor of Fake GPU"),
        ({"cooperative": 0}, "UNIMPLEMENTED.*Fake GPU does not launch all work-groups"),
        ({"shared_bytes": 100_000}, "UNIMPLEMENTED.*100000 bytes of shared memory; 232448 are needed"),
        ({"major": 8}, r"UNIMPLEMENTED.*does not run on Fake GPU \(sm_80\); supported are"),
        ({"no_memory": 1}, "RESOURCE_EXHAUSTED.*could not allocate device memory: out of memory"),
        ({"devices": 0}, "INVALID_ARGUMENT.*no cuda device 0; the driver has 0"),
        (
            {"compile_error": 6},
            r"INTERNAL.*nvrtc-13\.4.*compile the kernel for sm_90a:\nkernel\.h\(1\): the log says why",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_devices_that_cannot_run_it(make_fake, changes, message):
    fake = make_fake()
    for name, value in changes.items():
        setattr(fake, name, value)
    with pytest.raises(DECODE_ERRORS, match=re.compile(message, re.DOTALL)):
        make_call().run()
    assert fake.launches == 0


@pytest.mark.parametrize(
    ("changes", "loads"),
    [({"occupancy": 0}, 3), ({"no_memory": 1}, 0)],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_calls_that_fail_again_and_again_keep_nothing(fake, changes, loads):
    before = {name: getattr(fake, name) for name in changes}
    for name, value in changes.items():
        setattr(fake, name, value)
    for _ in range(3):
        with pytest.raises(DECODE_ERRORS, match="RESOURCE_EXHAUSTED"):
            make_call(fake.platform).run()
    assert (fake.loads, fake.unloads) == (loads, loads)
    for name, value in before.items():
        setattr(fake, name, value)
    make_call(fake.platform).run()
    assert (fake.loads, fake.unloads) == (loads + 1, loads)
    assert (fake.contexts, fake.host_allocations, fake.allocations) == (fake.platform == "cuda", 1, 1)


def test_other_architectures(make_fake):
    fake = make_fake("rocm")
    fake.arch = "gfx90a:xnack-"
    with pytest.raises(DECODE_ERRORS, match=r"does not run on Fake GPU \(gfx90a\)"):
        make_call("rocm").run()
    fake.arch, fake.shared_bytes = "gfx950", 160 * 1024
    make_call("rocm").run()
    assert fake.dynamic_shared == 160 * 1024
    assert "--offload-arch=gfx950" in fake.flags


@pytest.mark.parametrize("arch", [(8, 9), (10, 1), (11, 0), (12, 0), (12, 1)], ids=str)
def test_nvidia_devices_that_the_kernel_does_not_compile_for(make_fake, arch):
    fake = make_fake()
    fake.major, fake.minor = arch
    message = rf"UNIMPLEMENTED.*not run on Fake GPU \(sm_{arch[0]}{arch[1]}\); supported are sm_90 .*sm_100 .*sm_103 "
    with pytest.raises(DECODE_ERRORS, match=message):
        make_call().run()
    assert fake.compiles == 0


@pytest.mark.parametrize(
    ("arch", "flag"), [((9, 0), "sm_90a"), ((10, 0), "sm_100a"), ((10, 3), "sm_103a")], ids=lambda v: str(v)
)
def test_compiler_flags(make_fake, arch, flag):
    fake = make_fake()
    fake.major, fake.minor = arch
    make_call().run()
    assert f"--gpu-architecture={flag}\n" in fake.flags
    assert "-fmad=false" in fake.flags
    headers = {name: len(text.encode()) for name, text in _native.gpu_headers().items()}
    assert fake.headers == "".join(f"{name}:{size}\n" for name, size in sorted(headers.items()))


def test_a_tape_for_another_vendor(make_fake):
    make_fake("cuda")
    call = make_call("rocm")
    call.platform = "cuda"
    with pytest.raises(DECODE_ERRORS, match=r"INVALID_ARGUMENT.*packed for rocm, but this computation runs on cuda"):
        call.run()


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_tape_for_the_cpu(make_fake, platform):
    """Its call has other attributes and results too."""
    make_fake(platform)
    call = make_call(platform)
    spec = spec_of()
    call.attributes = program(spec, Plan(platform="cpu", units=2))
    del call.results["workspace"]
    with pytest.raises(DECODE_ERRORS, match=f"packed for the CPU, but this computation runs on {platform}"):
        call.run()


@pytest.mark.parametrize("name", ["ints", "ropes", "splits"])
def test_attributes_of_another_version(make_fake, name):
    make_fake()
    call = make_call()
    del call.attributes[name]
    with pytest.raises(DECODE_ERRORS, match=f"no attribute {name}.*another version of jax_monokernel"):
        call.run()


# ---- Wrong operands and programs ----

OPERANDS = list(make_call().operands)
RESULTS = list(make_call().results)


@pytest.mark.parametrize("name", OPERANDS)
def test_operands_of_another_shape_or_dtype(make_fake, name):
    make_fake()
    for wrong in (
        lambda x: np.concatenate([x, x]) if x.size else np.ones((3, 2), x.dtype),
        lambda x: np.zeros(x.shape, np.int8),
    ):
        call = make_call()
        operand = wrong(call.operands[name])
        call.aliased = False
        call.operands[name] = np.asarray(operand, np.int8 if operand.dtype == np.float64 else operand.dtype)
        with pytest.raises(DECODE_ERRORS, match=r"INVALID_ARGUMENT.*expected"):
            call.run()


@pytest.mark.parametrize("changes", [{}, {"waves": 3, "chunk_atoms": 1}, {"groups": 2, "chunk_atoms": 2}], ids=str)
@pytest.mark.parametrize("spec", [spec_of(), spec_of(hidden_size=1100, intermediate_size=700)], ids=["small", "wide"])
@pytest.mark.parametrize("platform", PLATFORMS)
def test_streams_are_as_long_as_units_and_waves_need(make_fake, platform, spec, changes):
    """An atom more or less is refused, so that the native side has the tape's size exactly."""
    make_fake(platform)
    plan = Plan(platform=platform, units=8, **changes)
    for more in (0, 1, -1):
        call = make_call(platform, spec=spec, plan=plan)
        streams = call.operands["streams"]
        call.operands["streams"] = np.resize(streams, streams.size + more * plan.wave_size * 8)
        if more == 0:
            call.run()
        else:
            with pytest.raises(DECODE_ERRORS, match=rf"streams is .*; expected bf16\[{streams.size}\]"):
                call.run()


@pytest.mark.parametrize("platform", PLATFORMS)
def test_streams_that_cannot_be_counted_are_refused(platform):
    spec = spec_of(hidden_size=2**18, intermediate_size=2**18, layers=(LayerSpec(),) * 4096)
    wanted = program(spec, Plan(platform=platform, units=5))
    with pytest.raises(ValueError, match="the streams are too long"):
        _native.gpu_workspace_bytes(**wanted, batch=1, splits=1, task_heads=1)


@pytest.mark.parametrize("name", RESULTS)
def test_results_of_another_shape(make_fake, name):
    make_fake()
    call = make_call()
    call.aliased = False
    kind = call.results[name]
    call.results[name] = type(kind)((kind.shape[0] + 1, *kind.shape[1:]), kind.dtype)
    with pytest.raises(DECODE_ERRORS, match=f"INVALID_ARGUMENT.*{name}.*expected"):
        call.run()


def test_a_call_of_another_version(make_fake):
    make_fake()
    call = make_call()
    del call.results["workspace"]
    with pytest.raises(DECODE_ERRORS, match=r"19 operands and 9 results.*another version"):
        call.run()


# ---- Timelines ----


def test_the_timeline_is_saved(make_fake, environment, tmp_path):
    fake = make_fake()
    before = fake.allocations
    environment("MONOKERNEL_TRACE", str(tmp_path / "trace"))
    make_call().run()
    assert "#define MK_TRACE 1\n" in fake.source
    assert (tmp_path / "trace").stat().st_size == 5 * 2 * 32768
    assert fake.allocations == before + 1  # the report's; the timeline's is given back
    environment("MONOKERNEL_TRACE", str(tmp_path / "no" / "trace"))
    with pytest.raises(DECODE_ERRORS, match="cannot be written to"):
        make_call().run()
    environment("MONOKERNEL_TRACE", None)
    make_call().run()
    assert "#define MK_TRACE 0\n" in fake.source
