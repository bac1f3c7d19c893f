"""Times the GPU kernel alone, launched through the CUDA driver: random weights of real shapes, one line per variant.

    python -m benchmarks.gpu_kernel qwen3-0.6b,llama3.2-1b --trace timeline.npy
    python -m benchmarks.gpu_kernel llama3.2-1b --batch 1,4,16 --position 512 --variant now --variant new@FOLDER
    python -m benchmarks.gpu_kernel qwen3-0.6b --variant slow:MK_PACE=128 --variant cut:splits=2,heads=1

For work on the kernel: no XLA handler in between, headers from the checkout or from another folder, preprocessor
definitions and other plans. A variant is NAME[@FOLDER][:SETTING=VALUE,...]. A setting that begins with MK_ is a
definition, splits and heads say how attention is cut, and all others are fields of the plan. Users' speed is measured
by `benchmarks.gpu`.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import ctypes
import dataclasses
import datetime
import glob
import hashlib
import json
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_monokernel import DecoderSpec, DecodeState, SamplingParams, _gpu, _native
from jax_monokernel._bench.machine import describe_commit, describe_device, versions
from jax_monokernel._bench.shapes import SHAPES, random_weights_on_device
from jax_monokernel._program import program
from jax_monokernel.plan import Plan, make_plan
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
    "mailbox",
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
        ("pages", ctypes.c_void_p),
        ("die_units", ctypes.c_void_p),
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


def compile_kernel(stub: str, headers: Path = KERNEL, *, as_text: bool = False) -> bytes:
    """A binary for the H200, by NVRTC, or PTX.

    `headers` is a folder like ffi/gpu/kernel. Threads may compile side by side.
    """
    found = [p for d in _gpu.library_dirs() for p in glob.glob(f"{d}/libnvrtc.so.*")] or ["libnvrtc.so"]
    nvrtc = ctypes.CDLL(found[0])
    names = [str(p.relative_to(headers)) for p in sorted(headers.rglob("*.h"))]
    texts = [(headers / name).read_bytes() for name in names]
    strings = lambda items: (ctypes.c_char_p * len(items))(*items)  # noqa: E731
    handle, size = ctypes.c_void_p(), ctypes.c_size_t()
    named = strings(texts), strings([n.encode() for n in names])
    nvrtc.nvrtcCreateProgram(ctypes.byref(handle), stub.encode(), b"stub.cu", len(names), *named)
    arch = b"compute_90a" if as_text else b"sm_90a"
    flags = strings([b"--gpu-architecture=" + arch, b"--std=c++17", b"-default-device", b"-fmad=false"])
    failed = nvrtc.nvrtcCompileProgram(handle, len(flags), flags)
    nvrtc.nvrtcGetProgramLogSize(handle, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(handle, log)
    if failed:
        raise RuntimeError(log.value.decode())
    result = "PTX" if as_text else "CUBIN"
    getattr(nvrtc, f"nvrtcGet{result}Size")(handle, ctypes.byref(size))
    binary = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{result}")(handle, binary)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(handle))
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
        self._events = [ctypes.c_void_p(), ctypes.c_void_p()]
        for event in self._events:
            self.check(self.calls.cuEventCreate(ctypes.byref(event), 0))

    def attribute(self, number: int) -> int:
        """A CUfunction_attribute of the kernel: 0, threads of a unit; 3, spilled bytes of a lane; 4, its registers."""
        value = ctypes.c_int()
        self.check(self.calls.cuFuncGetAttribute(ctypes.byref(value), number, self.function))
        return value.value

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

    def timed_launch(self, units: int, threads: int, args: ctypes.Structure) -> float:
        """Launches, waits, and returns the seconds between events before and after."""
        self.check(self.calls.cuEventRecord(self._events[0], None))
        self.launch(units, threads, args)
        self.check(self.calls.cuEventRecord(self._events[1], None))
        self.check(self.calls.cuEventSynchronize(self._events[1]))
        milliseconds = ctypes.c_float()
        self.check(self.calls.cuEventElapsedTime(ctypes.byref(milliseconds), *self._events))
        return milliseconds.value / 1e3


@dataclasses.dataclass(frozen=True)
class Variant:
    """A kernel of one shape: which headers, definitions, plan and cut of attention."""

    name: str = "now"
    headers: Path = KERNEL
    defines: tuple[tuple[str, str], ...] = ()
    plan: tuple[tuple[str, int], ...] = ()  # fields of Plan
    call: tuple[tuple[str, int], ...] = ()  # splits, task_heads

    @classmethod
    def parse(cls, text: str) -> Variant:
        """NAME[@FOLDER][:SETTING=VALUE,...].

        Raises:
          ValueError: an empty name, no such folder, or a setting that is none.
        """
        where, _, settings = text.partition(":")
        name, _, folder = where.partition("@")
        headers = Path(folder) if folder else KERNEL
        if not name or not (headers / "kernel.h").is_file():
            raise ValueError(f"{text!r} is not NAME[@FOLDER][:SETTING=VALUE,...] with a folder that holds kernel.h")
        sorts: dict[str, list] = {"defines": [], "plan": [], "call": []}
        fields = {field.name for field in dataclasses.fields(Plan)} - {"platform", "units"}
        for setting in settings.split(",") if settings else ():
            key, _, value = setting.partition("=")
            if key.startswith("MK_"):
                sorts["defines"].append((key, value))
            elif key in ("splits", "heads"):
                sorts["call"].append(({"heads": "task_heads"}.get(key, key), int(value)))
            elif key in fields:
                sorts["plan"].append((key, int(value)))
            else:
                raise ValueError(
                    f"{key!r} is no setting of a variant: MK_NAME, splits, heads, {', '.join(sorted(fields))}"
                )
        return cls(name, headers, **{sort: tuple(found) for sort, found in sorts.items()})

    def make_plan(self, spec: DecoderSpec, units: int) -> Plan:
        """Its plan for an NVIDIA GPU."""
        return dataclasses.replace(make_plan(spec, platform="cuda", units=units), **dict(self.plan))

    def attributes(self, spec: DecoderSpec, plan: Plan, batch: int, capacity: int) -> dict[str, Any]:
        """What the native part is told of the program and of a call."""
        call = _gpu.call_attributes(spec, plan, batch, capacity) | dict(self.call)
        return {**program(spec, plan), "batch": batch, **call}

    def stub(self, spec: DecoderSpec, plan: Plan, batch: int, capacity: int, trace: bool = False) -> str:
        """The source that is compiled with its headers."""
        attributes = self.attributes(spec, plan, batch, capacity)
        stub = _native.gpu_stub(**attributes, shared_bytes=SHARED_BYTES, capacity=capacity, trace=trace)
        return "".join(f"#define {name} {value}\n" for name, value in self.defines) + stub


class Launcher:
    """A compiled kernel and the driver to run it with."""

    def __init__(self, tape: Tape, batch: int, capacity: int, variant: Variant, binary: bytes, trace: bool):
        self.tape, self.batch, self.capacity = tape, batch, capacity
        attributes = variant.attributes(tape.spec, tape.plan, batch, capacity)
        self.driver = Driver(binary, "monokernel", SHARED_BYTES)
        # Headers from elsewhere may want more than those that the package was built with.
        self.workspace = jnp.zeros(4 * _native.gpu_workspace_bytes(**attributes) + (1 << 20), jnp.uint8)
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
        micros = driver.timed_launch(plan.units, driver.attribute(0), args) / tokens * 1e6
        report = np.frombuffer(ctypes.string_at(self.host, 32), np.uint32)
        if report[0]:
            raise RuntimeError(f"the kernel reports {report.tolist()} (mk::Report)")
        return np.asarray(out), micros


def compile_all(stubs: dict[Any, tuple[str, Path]]) -> dict[Any, tuple[bytes, float]]:
    """Binaries, each with the seconds that compiling it took; side by side."""

    def build(job: tuple[str, Path]) -> tuple[bytes, float]:
        start = time.perf_counter()
        return compile_kernel(*job), time.perf_counter() - start

    with concurrent.futures.ThreadPoolExecutor() as pool:
        return dict(zip(stubs, pool.map(build, stubs.values()), strict=True))


def without_places(arguments: list[str]) -> list[str]:
    """A command's arguments without --output and --commit, which say nothing of what was measured."""
    kept = []
    skip = False
    for a in arguments:
        if not skip and a not in ("--output", "--commit"):
            kept.append(a)
        skip = a in ("--output", "--commit")
    return kept


def main(argv: list[str] | None = None) -> None:
    """Prints a line for each shape, batch, position and variant."""
    numbers = lambda text: [int(n) for n in text.split(",")]  # noqa: E731
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", help=f"some of {', '.join(SHAPES)}, with commas")
    parser.add_argument("--batch", type=numbers, default=[1])
    parser.add_argument("--position", type=numbers, default=[32])
    parser.add_argument("--capacity", type=int, help="of the caches; by default the last position that is reached")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--variant", action="append", metavar="NAME[@FOLDER][:SETTING=VALUE,...]")
    parser.add_argument(
        "--trace", help="write the timeline here: u64 [2 tracks a unit, events, (ticks << 8 | event, nanoseconds)]"
    )
    parser.add_argument("--commit", help="of the code, where it is measured outside its repository")
    parser.add_argument("--output", type=Path, help="a JSON file for all results")
    options = parser.parse_args(argv)
    try:
        variants = [Variant.parse(text) for text in options.variant or ["now"]]
    except ValueError as error:
        parser.error(str(error))
    device = jax.devices()[0]
    if device.platform != "gpu" or "nvidia" not in device.device_kind.lower():
        sys.exit("JAX sees no NVIDIA GPU here")
    if unknown := set(options.shapes.split(",")) - set(SHAPES):
        parser.error(f"no shapes: {', '.join(sorted(unknown))}; expected some of {', '.join(SHAPES)}")
    capacity_at = lambda position: options.capacity or position + options.tokens  # noqa: E731

    jobs = [
        (name, variant, batch, position)
        for name in options.shapes.split(",")
        for variant in variants
        for batch in options.batch
        for position in options.position
    ]
    stubs = {}
    for name, variant, batch, position in jobs:
        spec = SHAPES[name].spec()
        plan = variant.make_plan(spec, device.core_count)
        stub = variant.stub(spec, plan, batch, capacity_at(position), options.trace is not None)
        stubs[stub, variant.headers] = stub, variant.headers
    binaries = compile_all(stubs)

    results, packed, tape = [], None, None
    for name, variant, batch, position in jobs:
        spec, capacity = SHAPES[name].spec(), capacity_at(position)
        plan = variant.make_plan(spec, device.core_count)
        if packed != (name, plan):
            packed, tape = (name, plan), None  # two tapes may not fit
            tape = jax.jit(lambda w, spec=spec, plan=plan: pack(spec, w, plan))(random_weights_on_device(spec))
        stub = variant.stub(spec, plan, batch, capacity, options.trace is not None)
        binary, compile_seconds = binaries[stub, variant.headers]
        launcher = Launcher(tape, batch, capacity, variant, binary, options.trace is not None)
        state, params = operands(spec, batch, capacity, position)
        runs = [launcher.run(state, params, options.tokens) for _ in range(options.repeats + 1)][1:]
        micros = sorted(m for _, m in runs)
        hashes = sorted({hashlib.sha256(tokens.tobytes()).hexdigest()[:8] for tokens, _ in runs})
        differ = np.flatnonzero(np.any([tokens != runs[0][0] for tokens, _ in runs], axis=(0, 1)))
        median = statistics.median(micros)
        found = {
            "shape": name,
            "batch": batch,
            "position": position,
            "capacity": capacity,
            "variant": variant.name,
            "defines": dict(variant.defines),
            "plan": dict(variant.plan),
            "call": dict(variant.call),
            "us_per_token": micros,
            "registers": launcher.driver.attribute(4),
            "spilled_bytes": launcher.driver.attribute(3),
            "compile_seconds": round(compile_seconds, 2),
            "token_hashes": hashes,
            "equal_steps": int(differ[0]) if differ.size else options.tokens,  # in which all runs chose the same tokens
        }
        results.append(found)
        print(
            f"{name:13s} batch {batch:2d}, position {position:6d}, {variant.name:12s}: {median:7.1f} us a step (least "
            f"{micros[0]:.1f}), {1e6 / median * batch:6.0f} tok/s, {tape.bytes_per_token / median / 1e3:5.0f} GB/s, "
            f"{found['registers']} registers, {found['spilled_bytes']} bytes spilled, compiled in "
            f"{compile_seconds:.1f} s, tokens {' '.join(hashes)}"
            + (f": RUNS DIFFER from step {differ[0]} on" if differ.size else ""),
            flush=True,
        )
        if options.trace:
            np.save(options.trace, np.asarray(launcher.trace).view(np.uint64)[..., 0])
    if options.output:
        repository = Path(__file__).resolve().parents[1]
        commit = {"commit": options.commit, "dirty": False} if options.commit else describe_commit(repository)
        head = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": shlex.join(["python", "-m", "benchmarks.gpu_kernel", *without_places(argv or sys.argv[1:])]),
            **commit,
            "device": describe_device(device),
            "versions": versions(),
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(head | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
