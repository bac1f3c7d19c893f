"""Times the GPU kernel alone, launched through the CUDA driver: random weights of real shapes, one line per variant.

    python -m benchmarks.gpu_kernel qwen3-0.6b,llama3.2-1b --trace timeline.npy

For work on the kernel: no XLA handler in between, headers from the checkout, and preprocessor definitions for variants
that these headers may have. Users' speed is measured by `benchmarks.run`.
"""

from __future__ import annotations

import argparse
import ctypes
import glob
import hashlib
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jax_monokernel import DecoderSpec, DecodeState, SamplingParams, _gpu, _native
from jax_monokernel._bench.shapes import SHAPES, random_weights_on_device
from jax_monokernel._program import program
from jax_monokernel.plan import Plan
from jax_monokernel.tape import Tape, pack

KERNEL = Path(__file__).resolve().parent.parent / "ffi" / "gpu" / "kernel"
SHARED_BYTES = 232448
POINTERS = (
    "streams",
    "constants",
    "embedding",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "row_max_new_tokens",
    "eos_token_id",
    "logit_bias",
    "key_data",
    "k_cache",
    "v_cache",
    "position",
    "last_token",
    "status",
    "seen",
    "tokens",
    "lengths",
    "log_probs",
    "workspace",
    "report",
    "cancel",
    "trace",
)


class Args(ctypes.Structure):
    """mk::Args of ffi/gpu/kernel/args.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS),
        ("capacity", ctypes.c_int64),
        ("max_new_tokens", ctypes.c_int32),
        ("eos_count", ctypes.c_int32),
        ("timeout_ticks", ctypes.c_uint64),
    )


def operands(spec: DecoderSpec, batch: int, capacity: int, position: int) -> tuple[DecodeState, SamplingParams]:
    """Greedy requests with random caches."""
    shape = (batch, spec.num_layers, spec.num_kv_heads, capacity, spec.head_dim)
    full = lambda value, dtype: jnp.full(batch, value, dtype)  # noqa: E731
    state = DecodeState(
        k_cache=jax.random.normal(jax.random.key(1), shape, spec.kv_dtype),
        v_cache=jax.random.normal(jax.random.key(2), shape, spec.kv_dtype),
        position=full(position, jnp.int32),
        last_token=jnp.arange(5, 5 + batch, dtype=jnp.int32),
        key_data=jnp.zeros((batch, 2), jnp.uint32),
        status=full(0, jnp.int32),
        seen=jnp.zeros((batch, spec.vocab_size), jnp.uint8),
    )
    params = SamplingParams(
        temperature=full(0, jnp.float32),
        top_k=full(0, jnp.int32),
        top_p=full(1, jnp.float32),
        min_p=full(0, jnp.float32),
        repetition_penalty=full(1, jnp.float32),
        presence_penalty=full(0, jnp.float32),
        max_new_tokens=full(2**30, jnp.int32),
        eos_token_id=jnp.full((batch, 1), -1, jnp.int32),
        logit_bias=None,
    )
    return state, params


def compile_kernel(stub: str) -> bytes:
    """A binary for the H200, by NVRTC, from the headers of this checkout."""
    found = [p for d in _gpu.library_dirs() for p in glob.glob(f"{d}/libnvrtc.so.*")] or ["libnvrtc.so"]
    nvrtc = ctypes.CDLL(found[0])
    names = [str(p.relative_to(KERNEL)) for p in sorted(KERNEL.rglob("*.h"))]
    texts = [(KERNEL / name).read_bytes() for name in names]
    strings = lambda items: (ctypes.c_char_p * len(items))(*items)  # noqa: E731
    handle, size = ctypes.c_void_p(), ctypes.c_size_t()
    headers = strings(texts), strings([n.encode() for n in names])
    nvrtc.nvrtcCreateProgram(ctypes.byref(handle), stub.encode(), b"stub.cu", len(names), *headers)
    flags = strings([b"--gpu-architecture=sm_90a", b"--std=c++17", b"-default-device", b"-fmad=false"])
    failed = nvrtc.nvrtcCompileProgram(handle, len(flags), flags)
    nvrtc.nvrtcGetProgramLogSize(handle, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(handle, log)
    if failed:
        raise RuntimeError(log.value.decode())
    nvrtc.nvrtcGetCUBINSize(handle, ctypes.byref(size))
    binary = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetCUBIN(handle, binary)
    return binary.raw


class Driver:
    """The CUDA driver with one kernel loaded."""

    def __init__(self, binary: bytes, name: str, shared_bytes: int):
        self.calls = ctypes.CDLL("libcuda.so.1")
        context, module, self.function = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
        self.check(self.calls.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0))
        self.check(self.calls.cuCtxSetCurrent(context))
        self.check(self.calls.cuModuleLoadData(ctypes.byref(module), binary))
        self.check(self.calls.cuModuleGetFunction(ctypes.byref(self.function), module, name.encode()))
        self.check(self.calls.cuFuncSetAttribute(self.function, 8, shared_bytes))
        self._shared_bytes = shared_bytes

    def check(self, error: int) -> None:
        """Raises RuntimeError for what the driver calls an error."""
        if error:
            text = ctypes.c_char_p()
            self.calls.cuGetErrorString(error, ctypes.byref(text))
            raise RuntimeError(str(text.value))

    def launch(self, units: int, threads: int, args: ctypes.Structure) -> None:
        """Starts the kernel, whose only argument is `args`, cooperatively."""
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(args))
        launch = self.calls.cuLaunchCooperativeKernel
        self.check(launch(self.function, units, 1, 1, threads, 1, 1, self._shared_bytes, None, pointers))


class Launcher:
    """A compiled kernel and the driver to run it with."""

    def __init__(self, tape: Tape, batch: int, capacity: int, defines: list[str], trace: bool):
        self.tape, self.batch, self.capacity = tape, batch, capacity
        call = _gpu.call_attributes(tape.spec, tape.plan, batch, capacity)
        attributes = program(tape.spec, tape.plan)
        stub = _native.gpu_stub(**attributes, batch=batch, **call, shared_bytes=SHARED_BYTES, trace=trace)
        stub = "".join(f"#define {d.replace('=', ' ')}\n" for d in defines) + stub
        start = time.perf_counter()
        binary = compile_kernel(stub)
        self.compile_seconds = time.perf_counter() - start
        self.driver = Driver(binary, "monokernel", SHARED_BYTES)
        self.workspace = jnp.zeros(_native.gpu_workspace_bytes(**attributes, batch=batch, **call), jnp.uint8)
        self.trace = jnp.zeros((2 * tape.plan.units, 2048, 2, 2), jnp.uint32) if trace else None
        self.host = ctypes.c_void_p()
        self.driver.check(self.driver.calls.cuMemHostAlloc(ctypes.byref(self.host), 4096, 2))

    def run(self, state: DecodeState, params: SamplingParams, tokens: int) -> tuple[np.ndarray, float]:
        """Tokens [batch, tokens], and microseconds a token. The state is not changed."""
        out = jnp.zeros((self.batch, tokens), jnp.int32)
        lengths = jnp.zeros(self.batch, jnp.int32)
        carried = {
            n: jnp.array(getattr(state, n), copy=True) for n in POINTERS if hasattr(state, n) and n != "key_data"
        }
        carried |= {"tokens": out, "lengths": lengths, "key_data": state.key_data, "workspace": self.workspace}
        carried |= {n: getattr(params, n) for n in POINTERS if hasattr(params, n)}
        carried |= {n: getattr(self.tape, n) for n in ("streams", "constants", "embedding")}
        carried |= {"row_max_new_tokens": params.max_new_tokens, "trace": self.trace}
        jax.block_until_ready(carried)
        ctypes.memset(self.host, 0, 4096)
        args = Args(
            **{n: x.unsafe_buffer_pointer() for n, x in carried.items() if x is not None},
            report=self.host.value,
            cancel=self.host.value + 2048,
            capacity=self.capacity,
            max_new_tokens=tokens,
            eos_count=params.eos_token_id.shape[1],
            timeout_ticks=4_000_000_000,
        )
        driver, size = self.driver, ctypes.c_size_t(self.workspace.size)
        driver.check(driver.calls.cuMemsetD8_v2(ctypes.c_void_p(args.workspace), 0, size))
        plan = self.tape.plan
        threads = (plan.waves + plan.service_waves + 1) * plan.wave_size  # and the feed wave
        start = time.perf_counter()
        driver.launch(plan.units, threads, args)
        driver.check(driver.calls.cuCtxSynchronize())
        micros = (time.perf_counter() - start) / tokens * 1e6
        report = np.frombuffer(ctypes.string_at(self.host, 32), np.uint32)
        if report[0]:
            raise RuntimeError(f"the kernel reports {report.tolist()} (mk::Report)")
        return np.asarray(out), micros


def main() -> None:
    """Prints a line for each shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", help=f"some of {', '.join(SHAPES)}, with commas")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--capacity", type=int, default=1024)
    parser.add_argument("--position", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--define", action="append", default=[], metavar="NAME=VALUE", help="a preprocessor definition")
    parser.add_argument(
        "--trace", help="write the timeline here: u64 [2 tracks a unit, events, (ticks << 8 | event, nanoseconds)]"
    )
    options = parser.parse_args()
    units = jax.devices()[0].core_count
    for name in options.shapes.split(","):
        spec = SHAPES[name].spec()
        plan = Plan(platform="cuda", units=units)
        tape = jax.jit(lambda w, spec=spec, plan=plan: pack(spec, w, plan))(random_weights_on_device(spec))
        launcher = Launcher(tape, options.batch, options.capacity, options.define, options.trace is not None)
        state, params = operands(spec, options.batch, options.capacity, options.position)
        runs = [launcher.run(state, params, options.tokens) for _ in range(options.repeats + 1)][1:]
        micros = statistics.median(m for _, m in runs)
        hashes = {hashlib.sha256(tokens.tobytes()).hexdigest()[:8] for tokens, _ in runs}
        print(
            f"{name:13s} batch {options.batch}: {micros:7.1f} us a token, {1e6 / micros * options.batch:6.0f} tok/s, "
            f"{tape.bytes_per_token / micros / 1e3:5.0f} GB/s, compiled in {launcher.compile_seconds:.1f} s, "
            f"tokens {hashes}",
            flush=True,
        )
        if options.trace:
            np.save(options.trace, np.asarray(launcher.trace).view(np.uint64)[..., 0])


if __name__ == "__main__":
    main()
