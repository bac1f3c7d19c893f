"""Compiles the GPU kernel for AMD GPUs with the clang of PyPI's `ziglang`, and reads what comes out."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import gpu_host
import pytest

from jax_monokernel import DecoderSpec, _native
from jax_monokernel._program import program
from jax_monokernel.plan import Plan

MISSING = None if importlib.util.find_spec("ziglang") else "needs the clang of PyPI's ziglang (pip install ziglang)"
needs_clang = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

_CACHE = gpu_host.ROOT / "build" / "amd"
_MACHINES = {"gfx942": 0x4C, "gfx950": 0x4F}  # of e_flags


@functools.cache
def _flags() -> tuple[str, ...]:
    """What ffi/gpu/compiler.cc passes to hipRTC, without the architecture."""
    text = (gpu_host.ROOT / "ffi" / "gpu" / "compiler.cc").read_text()
    found = re.search(r'"--offload-arch=" \+ a\.target \+ "([^"]*)"', text)
    assert found is not None
    return tuple(found[1].split())


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What a kernel is compiled for."""

    spec: DecoderSpec
    plan: Plan
    batch: int
    splits: int = 1
    task_heads: int = 1
    arch: str = "gfx942"
    near: bool = False
    placed: bool = False

    @property
    def shared_bytes(self) -> int:
        return _native.gpu_shared_bytes(self.arch)

    @property
    def threads(self) -> int:
        return (self.plan.waves + self.plan.service_waves) * self.plan.wave_size

    @functools.cached_property
    def workspace(self) -> dict[str, int]:
        """Its size; all of it is zeroed."""
        size = _native.gpu_workspace_bytes(**program(self.spec, self.plan), **self._request())
        return {"bytes": size, "exchange_bytes": size}

    @functools.cached_property
    def assembly(self) -> Path:
        """The file with the kernel's instructions."""
        return compile_source(self._stub(), self.arch)

    @functools.cached_property
    def assembly_with_lines(self) -> Path:
        """The same instructions, with comments that say which lines of the source they come from."""
        return compile_source(self._stub(), self.arch, "-gline-tables-only")

    @functools.cached_property
    def library(self) -> Path:
        """The linked code object."""
        return link(self.assembly, self.arch)

    def _request(self) -> dict[str, int]:
        return {"batch": self.batch, "splits": self.splits, "task_heads": self.task_heads, "placed": self.placed}

    def _stub(self) -> str:
        request = {"shared_bytes": self.shared_bytes, "near": self.near} | self._request()
        return _native.gpu_stub(**program(self.spec, self.plan), **request)


def compile_source(source: str, arch: str, *more: str) -> Path:
    """Compiles HIP source, which finds the kernel's headers, as hipRTC would: the file with the instructions."""
    headers = b"".join(path.read_bytes() for path in sorted(gpu_host.KERNEL.rglob("*.h")))
    key = hashlib.sha256(repr((source, arch, _flags(), more, _version())).encode() + headers).hexdigest()[:32]
    path = _CACHE / f"{key}.s"
    if not path.exists():
        _CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=_CACHE) as folder:
            stub = Path(folder) / "stub.hip"
            stub.write_text(source)
            device_only = ("--cuda-device-only", "-nogpulib", "-nogpuinc")
            flags = (
                "-x",
                "hip",
                f"--offload-arch={arch}",
                *device_only,
                "-Werror",
                *_flags(),
                *more,
                f"-I{gpu_host.KERNEL}",
            )
            with _to_place(path) as out:
                _run("clang", *flags, "-S", stub, "-o", out)
    return path


def link(assembly: Path, arch: str) -> Path:
    """The code object of a file with instructions."""
    path = assembly.with_suffix(".hsaco")
    if not path.exists():
        target = ("-target", "amdgcn-amd-amdhsa", f"-mcpu={arch}")
        with _to_place(path.with_suffix(".o")) as out:
            _run("clang", *target, "-x", "assembler", "-c", assembly, "-o", out)
        with _to_place(path) as out:
            _run("ld.lld", "-shared", "--no-undefined", path.with_suffix(".o"), "-o", out)
    return path


@contextlib.contextmanager
def _to_place(path: Path) -> Iterator[Path]:
    """A temporary name that becomes `path` once it is written, so that other processes never see half a file."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        yield Path(folder) / path.name
        (Path(folder) / path.name).replace(path)


class CompileError(Exception):
    """The compiler's messages."""


@functools.cache
def _version() -> str:
    return subprocess.run([*_ZIG, "version"], capture_output=True, text=True, check=True).stdout


_ZIG = (sys.executable, "-m", "ziglang")


def _run(*arguments: str | Path) -> None:
    done = subprocess.run([*_ZIG, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=120)
    if done.returncode:
        raise CompileError(done.stderr[:10_000])


# ---- What came out ----


@dataclasses.dataclass(frozen=True)
class Block:
    """Instructions between two labels."""

    instructions: tuple[str, ...]
    loops: frozenset[str]  # labels of the loops around it, as the compiler's comments have them


@functools.cache
def blocks(assembly: Path) -> tuple[Block, ...]:
    """The kernel's instructions, in order."""
    text = assembly.read_text()
    body = text[text.index("\nmonokernel:") : text.index("\n.Lfunc_end0:")]
    parts = re.split(r"\n(?=\.LBB\w+:|; %bb\.)", body)
    around: dict[str, set[str]] = {}  # loop -> loops around it and itself
    found = []
    for part in parts:
        comments = "\n".join(re.findall(r";.*", part))
        loops = set(re.findall(r"(?:Parent Loop |in Loop: Header=)(BB\w+)", comments))
        label = re.match(r"\.L(BB\w+):", part)
        if label and "Loop Header" in comments:
            loops.add(label[1])
            around[label[1]] = set(loops)
        lines = re.findall(r"^\t([a-z]\w*[^;\n]*?)\s*(?:;.*)?$", part, re.MULTILINE)
        found.append((tuple(lines), loops))
    return tuple(
        Block(lines, frozenset().union(loops, *(around.get(loop, set()) for loop in loops))) for lines, loops in found
    )


def instructions(assembly: Path) -> list[str]:
    return [line for block in blocks(assembly) for line in block.instructions]


def waits(lines: Iterable[str]) -> list[int]:
    """How many vector memory operations may still be on their way after each wait for them."""
    return [int(n) for line in lines for n in re.findall(r"^s_waitcnt .*?vmcnt\((\d+)\)", line)]


def metadata(assembly: Path) -> dict[str, int]:
    """Numbers of the kernel's metadata: registers, spills, memory."""
    text = assembly.read_text()
    found = re.findall(r"^[\s-]+\.(\w+):\s+(\d+)$", text[text.index("amdhsa.kernels:") :], re.MULTILINE)
    return {name: int(value) for name, value in found}


@dataclasses.dataclass(frozen=True)
class Elf:
    """A code object's header, symbols and note owners."""

    machine: int
    os_abi: int
    kind: int
    processor: int
    symbols: dict[str, tuple[int, int, int]]  # value, size, type
    notes: tuple[str, ...]


def read_elf(path: Path) -> Elf:
    data = path.read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01"
    kind, machine = struct.unpack_from("<HH", data, 16)
    (section_at,) = struct.unpack_from("<Q", data, 40)
    (processor,) = struct.unpack_from("<I", data, 48)
    (count,) = struct.unpack_from("<H", data, 60)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, section_at + 64 * i) for i in range(count)]
    symbols, notes = {}, []
    for _, section_type, _, _, offset, size, link, *_ in sections:
        if section_type == 11:  # dynamic symbols
            names = data[sections[link][4] :]
            for at in range(offset, offset + size, 24):
                name, info, _, index, value, length = struct.unpack_from("<IBBHQQ", data, at)
                if index:
                    symbols[names[name : names.index(b"\0", name)].decode()] = (value, length, info & 15)
        if section_type == 7:  # notes
            name_size, _, _ = struct.unpack_from("<III", data, offset)
            notes.append(data[offset + 12 : offset + 12 + name_size].rstrip(b"\0").decode())
    return Elf(machine, data[7], kind, processor & 0xFF, symbols, tuple(notes))


def is_ordinary(elf: Elf, arch: str) -> bool:
    """Whether it is a shared object for HSA and this processor, with one kernel and its descriptor."""
    return (
        (elf.machine, elf.os_abi, elf.kind, elf.processor) == (224, 64, 3, _MACHINES[arch])
        and elf.notes == ("AMDGPU",)
        and elf.symbols["monokernel"][2] == 2
        and elf.symbols["monokernel.kd"][1:] == (64, 1)
    )
