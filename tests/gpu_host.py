"""Builds the GPU kernel for this CPU and runs it there: arch/host.h on the executor in native/gpu_host."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
KERNEL = ROOT / "ffi" / "gpu" / "kernel"
EXECUTOR = ROOT / "tests" / "native" / "gpu_host"
CACHE = ROOT / "build" / "gpu_host"

POLICIES = ("round_robin", "forward", "reverse", "random", "starve", "newest")
STORES = ("now", "random", "late")
FAULTS = ("none", "drop", "hold", "flip", "lag")
WATCHED = ("all", "not zero", "zero")
REASONS = ("ok", "timeout", "cancelled")
UNWRITTEN = 0x7FC0DEAD

_GUARD = 1024  # bytes before and after every operand
_COMPILER = os.environ.get("CXX", "g++")
# As on a GPU, products and sums are fused only where the source says so.
_FLAGS = (
    "-std=c++20",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-march=native",
    "-Wall",
)
_EXECUTOR_FLAGS = (*_FLAGS, "-O2", "-Wextra")
# Kernels are small and run once or twice, so compiling them is most of what tests wait for.
_KERNEL_FLAGS = (*_FLAGS, "-Og", "-DMK_HOST")
# The instrumentation of these two, with run times of our own (races.cc).
_CHECKS = ("-O0", "-g1", "-fsanitize=thread,undefined")


class HostError(Exception):
    """The executor stopped a kernel: it did what no GPU would let it do, or it hangs."""


class BuildError(Exception):
    """A kernel does not compile."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """What goes wrong with the nth store_word, from 0, to bytes begin to end - 1 of the workspace."""

    kind: str  # of FAULTS
    nth: int = 0
    begin: int = 0
    end: int = 2**62
    watched: str = "all"  # of WATCHED: which stores count; those of 0 clear packed hand-offs


@dataclasses.dataclass(frozen=True)
class Run:
    """What a kernel left behind."""

    report: dict[str, int]  # mk::Report
    steps: int
    switches: int  # between fibers
    stores: int  # of words
    delayed: int  # of these
    stale: int  # loads of words that gave an old value
    faults: int  # injected
    watched: int  # stores in the fault's range
    near: int  # bytes of weights read from pages that are near the reader's die, where homes are given
    far: int  # and from others


def build(stub: str, *, sanitize: bool = False, kernel: Path = KERNEL) -> Path:
    """Compiles a stub (docs/kernel.md) to a shared library. Several threads may do so at once.

    Args:
      stub: C++ source that defines the entry `monokernel`; it finds the kernel's headers.
      sanitize: whether every access of memory is watched: bounds, use before the first write, races, and whatever
        UndefinedBehaviorSanitizer knows. Several times slower.
      kernel: the folder of the kernel's headers.

    Raises:
      BuildError: with the compiler's messages.
    """
    headers = repr([(path.relative_to(kernel).as_posix(), path.read_bytes()) for path in sorted(kernel.rglob("*.h"))])
    flags = (*_KERNEL_FLAGS, *(_CHECKS if sanitize else ()))
    objects = _executor()
    key = hashlib.sha256(repr((stub, flags, objects, _compiler(), headers)).encode()).hexdigest()[:32]
    library = CACHE / f"kernel-{key}.so"
    with _lock:
        lock = _locks[key]
    with lock:  # another thread may be about it
        if not library.exists():
            source = CACHE / f"kernel-{key}.cc"
            source.write_text(stub)
            # To an object first: linking with the sanitizers would bring in their run times.
            compiled = _compile(source, (*flags, f"-I{kernel}"))
            with _to_place(library) as out:
                _run_compiler("-shared", "-Wl,-z,defs", compiled, *objects, "-ldl", "-o", out)
            compiled.unlink()
    return library


def run(
    library: Path,
    args: Mapping[str, np.ndarray | int | None],
    *,
    exchange_bytes: int | None = None,
    policy: str = "random",
    unit: int = 0,
    stores: str = "random",
    seed: int = 0,
    fault: Fault | None = None,
    cancel_step: int = 0,
    dies: Sequence[int] | None = None,
    homes: np.ndarray | None = None,
    near: Sequence[int] = (),
    max_steps: int = 20_000_000,
) -> Run:
    """Runs a kernel to its end.

    Args:
      library: from `build`.
      args: arrays and numbers by the names of mk::Args; an array left out or None is a null pointer. Arrays that are
        not `const` there are changed in place.
      exchange_bytes: how much of args["workspace"] holds words; the rest is filled with NaN. By default, all of it.
      policy: in which order units go on; with "starve", `unit` does only when all others wait.
      stores: when words become visible to other units.
      seed: of the order and the delays.
      fault: what goes wrong.
      cancel_step: the step at which the user's interrupt comes; 0: never.
      dies: of the units; by default all are on one.
      homes: of the pages of 4096 bytes of args["streams"], for `Run.near` and `Run.far`.
      near: the home that is near each die.
      max_steps: after which the kernel is taken to hang.

    Raises:
      HostError: lanes that diverge, waves that wait for ever, accesses out of bounds, and the like.
    """
    loaded = _load(library)
    options, statistics, report = _Options(), _Statistics(), np.zeros(len(_REPORT), np.uint32)
    arrays = {name: value for name, value in args.items() if isinstance(value, np.ndarray)}
    arrays |= {"report": report, "cancel": np.zeros(1, np.uint32)}
    operands = {
        name: _Operand(name, array, writable=name in _WRITABLE or name == "cancel") for name, array in arrays.items()
    }
    for name, value in args.items():
        if name not in arrays and value is not None:
            setattr(options.args, name, value)
    regions = []
    for name, operand in operands.items():
        setattr(options.args, name, operand.address)
        split = operand.bytes
        if name == "workspace" and exchange_bytes is not None:
            split = exchange_bytes
            operand.array.view(np.uint32)[split // 4 :] = UNWRITTEN
            regions.append(_Region(b"workspace behind the words", operand.address + split, operand.bytes - split, 1, 1))
        narrow = operand.array.itemsize == 1 and name != "workspace"
        regions.append(_Region(name.encode(), operand.address, split, name in _WRITABLE, 0, narrow))
    options.regions = (_Region * len(regions))(*regions)
    options.region_count = len(regions)
    options.seed, options.max_steps, options.cancel_step, options.unit = seed, max_steps, cancel_step, unit
    options.policy, options.stores = POLICIES.index(policy), STORES.index(stores)
    die_of = None if dies is None else np.array(dies, np.uint32)
    options.dies = None if die_of is None else die_of.ctypes.data
    if homes is not None:
        home_of, near_of = (np.array(x, np.uint8) for x in (homes, near))
        options.homes = _Homes(operands["streams"].address, home_of.ctypes.data, home_of.size, near_of.ctypes.data)
    if fault is not None:
        start = operands["workspace"].address
        begin, end = start + fault.begin, start + fault.end
        options.fault = _Fault(FAULTS.index(fault.kind), fault.nth, begin, end, WATCHED.index(fault.watched))
    message = ctypes.create_string_buffer(16384)
    failed = loaded.mk_host_run(ctypes.byref(options), ctypes.byref(statistics), message, len(message))
    if failed:
        raise HostError(_with_lines(library, message.value.decode()))
    for name, operand in operands.items():
        operand.finish()
        if operand.writable:
            arrays[name][...] = operand.array
    counts = {name: int(getattr(statistics, name)) for name in _COUNTS}
    return Run(report=dict(zip(_REPORT, report.tolist(), strict=True)), **counts)


class _Operand:
    """A copy of an array, between guards that show what was written beside it."""

    def __init__(self, name: str, array: np.ndarray, *, writable: bool) -> None:
        self.name, self.writable, self.bytes = name, writable, array.nbytes
        whole = np.empty(array.nbytes + 2 * _GUARD + 512, np.uint8)
        begin = _GUARD + -(whole.ctypes.data + _GUARD) % 256
        self._before, self._after = whole[:begin], whole[begin + array.nbytes :]
        pattern = np.frombuffer(np.array([UNWRITTEN], np.uint32).tobytes() * (whole.size // 4 + 1), np.uint8)
        whole[:] = pattern[: whole.size]
        self._guards = (self._before.copy(), self._after.copy())
        self.array = whole[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
        self.array[...] = array
        self._original = None if writable else self.array.tobytes()
        self.address = whole.ctypes.data + begin

    def finish(self) -> None:
        if not (np.array_equal(self._before, self._guards[0]) and np.array_equal(self._after, self._guards[1])):
            raise HostError(f"the kernel wrote beside {self.name}")
        if self._original is not None and self.array.tobytes() != self._original:
            raise HostError(f"the kernel changed {self.name}, which is only to be read")


# ---- The compiler ----


@functools.cache
def _compiler() -> str:
    version = subprocess.run([_COMPILER, "--version"], capture_output=True, text=True, check=True).stdout
    # -march=native means another machine elsewhere.
    target = subprocess.run(
        [_COMPILER, "-march=native", "-Q", "--help=target"], capture_output=True, text=True, check=False
    ).stdout
    return version + target


_lock = threading.Lock()
_locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)


def _executor() -> tuple[Path, ...]:
    """The executor's object files."""
    with _lock:
        return _compile_executor()


@functools.cache
def _compile_executor() -> tuple[Path, ...]:
    CACHE.mkdir(parents=True, exist_ok=True)
    sources = sorted(EXECUTOR.glob("*.cc"))
    declared = (KERNEL / "args.h", KERNEL / "arch" / "host.h")
    contents = b"".join(path.read_bytes() for path in [*sources, *sorted(EXECUTOR.glob("*.h")), *declared])
    key = hashlib.sha256(repr((_EXECUTOR_FLAGS, _compiler())).encode() + contents).hexdigest()[:16]
    flags = (*_EXECUTOR_FLAGS, f"-I{KERNEL}", f"-I{EXECUTOR}")
    with ThreadPoolExecutor(2) as pool:
        return tuple(pool.map(lambda source: _compile(source, flags, key), sources))


def _compile(source: Path, flags: tuple[str, ...], key: str = "") -> Path:
    path = CACHE / f"{source.stem}{'-' + key if key else ''}.o"
    if not key or not path.exists():
        with _to_place(path) as out:
            _run_compiler(*flags, "-c", source, "-o", out)
    return path


class _to_place:
    """A temporary name that becomes `path` once it is written, so that other processes never see half a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Path:
        handle, name = tempfile.mkstemp(dir=self._path.parent, suffix=self._path.suffix)
        os.close(handle)
        self._temporary = Path(name)
        return self._temporary

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            self._temporary.replace(self._path)
        else:
            self._temporary.unlink(missing_ok=True)


def _run_compiler(*arguments: str | Path) -> None:
    done = subprocess.run([_COMPILER, *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(done.stderr[:10_000])


def _with_lines(library: Path, message: str) -> str:
    """Replaces addresses in a message by lines of the source, the calls that were inlined there included."""

    def lines(match: re.Match[str]) -> str:
        # The address is that of the next instruction.
        address = hex(int(match[1], 16) - 1)
        done = subprocess.run(["addr2line", "-i", "-e", library, address], capture_output=True, text=True, check=False)
        places = [
            re.sub(r".*gpu/kernel/|.*/native/gpu_host/| \(discriminator.*", "", line)
            for line in done.stdout.split("\n")
        ]
        places = [place for place in places if place and "host.h" not in place and "?" not in place]
        return f" ({' < '.join(places)})" if places else ""

    try:
        return re.sub(r" \{\+(0x[0-9a-f]+)\}", lines, message)
    except OSError:  # no addr2line here
        return message


# ---- Structures of args.h and options.h ----


def _struct(name: str) -> list[tuple[str, str, bool]]:
    """Fields of a structure in args.h: C type, name, and whether it points to what the kernel changes."""
    text = (KERNEL / "args.h").read_text()
    body = re.search(rf"struct {name} {{(.*?)\n}};", text, re.DOTALL)
    assert body is not None, name
    fields = re.findall(r"^ *(const )?(\w+)(\*?) (\w+);", body[1], re.MULTILINE)
    return [("pointer" if star else kind, field, bool(star) and not const) for const, kind, star, field in fields]


_TYPES: dict[str, type] = {
    "pointer": ctypes.c_void_p,
    "i32": ctypes.c_int32,
    "u32": ctypes.c_uint32,
    "i64": ctypes.c_int64,
    "u64": ctypes.c_uint64,
    "float": ctypes.c_float,
}
_REPORT = [name for _, name, _ in _struct("Report")]
_WRITABLE = {name for _, name, changed in _struct("Args") if changed}


class _Args(ctypes.Structure):
    _fields_ = tuple((name, _TYPES[kind]) for kind, name, _ in _struct("Args"))


class _Region(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("begin", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("writable", ctypes.c_uint32),
        ("blank", ctypes.c_uint32),
        ("narrow", ctypes.c_uint32),
        ("unused", ctypes.c_uint32),
    )


class _Fault(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_uint32),
        ("nth", ctypes.c_uint32),
        ("begin", ctypes.c_void_p),
        ("end", ctypes.c_void_p),
        ("watched", ctypes.c_uint64),
    )


class _Homes(ctypes.Structure):
    _fields_ = (
        ("begin", ctypes.c_void_p),
        ("of_pages", ctypes.c_void_p),
        ("pages", ctypes.c_uint64),
        ("of_dies", ctypes.c_void_p),
    )


class _Options(ctypes.Structure):
    _fields_ = (
        ("args", _Args),
        ("regions", ctypes.POINTER(_Region)),
        ("region_count", ctypes.c_uint64),
        ("seed", ctypes.c_uint64),
        ("max_steps", ctypes.c_uint64),
        ("cancel_step", ctypes.c_uint64),
        ("policy", ctypes.c_uint32),
        ("stores", ctypes.c_uint32),
        ("unit", ctypes.c_uint64),
        ("fault", _Fault),
        ("dies", ctypes.c_void_p),
        ("homes", _Homes),
    )


_COUNTS = ("steps", "switches", "stores", "delayed", "stale", "faults", "watched", "near", "far")


class _Statistics(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in _COUNTS)


@functools.lru_cache(maxsize=256)
def _load(library: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(library))
    size = ctypes.c_uint64.in_dll(loaded, "mk_host_options_bytes").value
    assert size == ctypes.sizeof(_Options), (size, ctypes.sizeof(_Options))
    return loaded


def broken_copy(folder: Path, file: str, pattern: str, replacement: str) -> Path:
    """The kernel's headers, of which one has a mistake."""
    source = folder / "kernel"
    shutil.copytree(KERNEL, source)
    text, count = re.subn(pattern, replacement, (source / file).read_text())
    assert count, f"{file} has changed: say here how to break it"
    (source / file).write_text(text)
    return source
