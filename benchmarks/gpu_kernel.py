"""Times the GPU kernel alone, launched through the CUDA driver: random weights of real shapes, one line per variant.

    python -m benchmarks.gpu_kernel qwen3-0.6b,llama-3.2-1b --trace timeline.npy

For work on the kernel: no XLA handler in between, headers from the checkout, and preprocessor definitions for variants
that these headers may have. Users' speed is measured by `benchmarks.run`.
"""

from __future__ import annotations

import argparse
import ctypes
import glob
import hashlib
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jax_monokernel import DecoderSpec, DecodeState, LayerSpec, RopeSpec, SamplingParams, _gpu, _native
from jax_monokernel._program import program
from jax_monokernel.plan import Plan
from jax_monokernel.tape import Tape, pack
from jax_monokernel.weights import weight_shapes

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


def _shape(layers, hidden, heads, kv_heads, head_dim, inner, vocab, **options) -> DecoderSpec:
    return DecoderSpec(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        layers=(LayerSpec(),) * layers,
        ropes=(RopeSpec(theta=1e4, rotary_dim=head_dim),),
        **{"tied_head": True} | options,
    )


SHAPES = {
    "llama-3.2-1b": _shape(16, 2048, 32, 8, 64, 8192, 128256),
    "qwen3-0.6b": _shape(28, 1024, 16, 8, 128, 3072, 151936, qk_norm="head"),
    "llama-3.1-8b": _shape(32, 4096, 32, 8, 128, 14336, 128256, tied_head=False),
    "smollm2-135m": _shape(30, 576, 9, 3, 64, 1536, 49152),
}


def random_weights(spec: DecoderSpec):
    """bf16 weights that keep a residual stream of ordinary size."""
    leaves, tree = jax.tree.flatten(weight_shapes(spec))

    @jax.jit
    def make(key):
        def leaf(k, shape):
            x = jax.random.normal(k, shape.shape, jnp.float32 if shape.ndim < 3 else shape.dtype)
            vector = shape.ndim == 1 or (shape.ndim == 2 and shape.shape[0] == spec.num_layers)
            return (1 + 0.1 * x if vector else x * 0.02).astype(shape.dtype)

        return [leaf(k, s) for k, s in zip(jax.random.split(key, len(leaves)), leaves, strict=True)]

    return jax.tree.unflatten(tree, make(jax.random.key(0)))


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
        sys.exit(log.value.decode())
    nvrtc.nvrtcGetCUBINSize(handle, ctypes.byref(size))
    binary = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetCUBIN(handle, binary)
    return binary.raw


class Launcher:
    """A compiled kernel and the driver to run it with."""

    def __init__(self, tape: Tape, batch: int, capacity: int, defines: list[str], trace: bool):
        self.tape, self.batch, self.capacity = tape, batch, capacity
        self.driver = ctypes.CDLL("libcuda.so.1")
        context, module, self.function = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
        self.check(self.driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0))
        self.check(self.driver.cuCtxSetCurrent(context))
        call = _gpu.call_attributes(tape.spec, tape.plan, batch, capacity)
        attributes = program(tape.spec, tape.plan)
        stub = _native.gpu_stub(**attributes, batch=batch, **call, shared_bytes=SHARED_BYTES, trace=trace)
        stub = "".join(f"#define {d.replace('=', ' ')}\n" for d in defines) + stub
        start = time.perf_counter()
        binary = compile_kernel(stub)
        self.compile_seconds = time.perf_counter() - start
        self.check(self.driver.cuModuleLoadData(ctypes.byref(module), binary))
        self.check(self.driver.cuModuleGetFunction(ctypes.byref(self.function), module, b"monokernel"))
        self.check(self.driver.cuFuncSetAttribute(self.function, 8, SHARED_BYTES))
        self.workspace = jnp.zeros(_native.gpu_workspace_bytes(**attributes, batch=batch, **call), jnp.uint8)
        self.trace = jnp.zeros((tape.plan.units, 2048, 2, 2), jnp.uint32) if trace else None
        self.host = ctypes.c_void_p()
        self.check(self.driver.cuMemHostAlloc(ctypes.byref(self.host), 4096, 2))

    def check(self, error: int) -> None:
        """Raises RuntimeError for what the driver calls an error."""
        if error:
            text = ctypes.c_char_p()
            self.driver.cuGetErrorString(error, ctypes.byref(text))
            raise RuntimeError(str(text.value))

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
        self.check(self.driver.cuMemsetD8_v2(ctypes.c_void_p(args.workspace), 0, ctypes.c_size_t(self.workspace.size)))
        plan = self.tape.plan
        threads = (plan.waves + plan.service_waves + 1) * plan.wave_size  # and the feed wave
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(args))
        start = time.perf_counter()
        launch = self.driver.cuLaunchCooperativeKernel
        self.check(launch(self.function, plan.units, 1, 1, threads, 1, 1, SHARED_BYTES, None, pointers))
        self.check(self.driver.cuCtxSynchronize())
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
        "--trace", help="write the timeline here: u64 [units, events, (ticks << 8 | event, nanoseconds)]"
    )
    options = parser.parse_args()
    units = jax.devices()[0].core_count
    for name in options.shapes.split(","):
        spec = SHAPES[name]
        plan = Plan(platform="cuda", units=units)
        tape = jax.jit(lambda w, spec=spec, plan=plan: pack(spec, w, plan))(random_weights(spec))
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
