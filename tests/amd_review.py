"""Instructions of the AMD builds: where in the source they come from, and how many a KiB of weights takes."""

from __future__ import annotations

import dataclasses
import functools
import heapq
import itertools
import re
from collections.abc import Iterable
from pathlib import Path

import gpu_host
from amd_code import Kernel

from jax_monokernel.plan import PHASES, geometry

# ---- Accesses of memory, by the functions that make them ----


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction that accesses memory or waits for it."""

    text: str  # "global_load_dword sc1": name and scope bits; "s_waitcnt vmcnt(0)"
    functions: tuple[str, ...]  # that it was inlined into, the innermost first


_ACCESS = re.compile(r"\t((?:global|flat|buffer|scratch)_\w+|s_waitcnt)\b([^;\n]*)")


@functools.cache
def review(kernel: Kernel) -> tuple[Instruction, ...]:
    """The kernel's accesses of global memory, fences and waits, in the order of the code."""
    text = kernel.assembly_with_lines.read_text()
    body = text[text.index("\nmonokernel:") : text.index("\n.Lfunc_end0:")]
    chain: tuple[str, ...] = ()
    found = []
    for line in body.split("\n"):
        if line.startswith("\t.loc\t"):
            chain = _chain(line)
        elif match := _ACCESS.match(line):
            name, operands = match.groups()
            bits = operands.split() if name == "s_waitcnt" else re.findall(r"\b(?:sc0|sc1|nt)\b", operands)
            found.append(Instruction(" ".join([name, *bits]), chain))
    return tuple(found)


def _chain(line: str) -> tuple[str, ...]:
    """The functions that a .loc directive names, the innermost first."""
    places = re.findall(r"([\w./-]+\.h):(\d+):\d+", line.partition(";")[2])
    return tuple(_function(file.rpartition("gpu/kernel/")[2], int(number)) for file, number in places)


@functools.cache
def _functions(file: str) -> tuple[tuple[int, int, str], ...]:
    """(first line, last line, name) of the functions in a header of the kernel."""
    lines = (gpu_host.KERNEL / file).read_text().split("\n")
    found = []
    for first, line in enumerate(lines):
        match = re.match(r"( *)(?:MK_DEVICE|MK_METHOD|MK_KERNEL\(.*?\)) .*?(\w+)\(", line)
        if match is None:
            continue
        last = first
        if not line.endswith("}"):
            last = next(i for i in range(first + 1, len(lines)) if lines[i].startswith(match[1] + "}"))
        found.append((first + 1, last + 1, match[2]))
    return tuple(found)


def _function(file: str, line: int) -> str:
    inside = [(last - first, name) for first, last, name in _functions(file) if first <= line <= last]
    return min(inside)[1] if inside else "?"


# ---- What a KiB of weights costs a stream wave ----

# Cycles between two instructions of one wave: its SIMD turns to it every fourth.
ISSUE_CYCLES = 4
LOCAL_BYTES_PER_CYCLE = 128  # of a compute unit's shared memory
LOCAL_BYTES = {"ds_read_b128": 1024, "ds_read_b64": 512, "ds_read_b32": 256, "ds_write_b32": 256}  # of a wave


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of the stream loop, for weights that are there."""

    group_atoms: int  # that are multiplied between two looks for the end of a run
    group_slots: float  # turns at issuing that this takes
    flush_slots: float  # that the end of a run adds, where the next one is of the same chunk
    run_atoms: float  # of a run, on average over the model
    chunk_slots: float  # that the end of a chunk adds to that, where the next one is of the same segment
    chunk_atoms: float  # of a wave in a chunk of a segment, on average over the model
    local_bytes: float  # of shared memory that an atom reads and writes

    @property
    def slots(self) -> float:
        """Turns at issuing for one atom: 16 bytes a lane, 1 KiB."""
        ends = self.flush_slots / self.run_atoms + self.chunk_slots / self.chunk_atoms
        return self.group_slots / self.group_atoms + ends

    def rate(self, waves: int) -> float:
        """Bytes of weights per cycle and compute unit, as far as issuing and shared memory allow."""
        cycles = max(ISSUE_CYCLES * self.slots, waves * self.local_bytes / LOCAL_BYTES_PER_CYCLE)
        return waves * 1024 / cycles


def _slots(line: str) -> int:
    name, _, operands = line.partition(" ")
    if name == "s_nop":
        return int(operands) + 1
    if name.startswith("v_mfma_f32_4x4x4"):
        return 2  # 8 cycles
    return 8 if name.startswith("v_mfma") else 1


class _Code:
    """The kernel's basic blocks and the ways between them."""

    def __init__(self, assembly: Path) -> None:
        text = assembly.read_text()
        body = text[text.index("\nmonokernel:") : text.index("\n.Lfunc_end0:")]
        self.blocks: list[list[str]] = [[]]
        self.functions: list[set[tuple[str, ...]]] = [set()]  # that a block's instructions were inlined into
        labels: dict[str, int] = {}
        chain: tuple[str, ...] = ()

        def start_block() -> None:
            self.blocks.append([])
            self.functions.append(set())

        for line in body.split("\n"):
            if match := re.match(r"\.L(BB\w+):", line):
                start_block()
                labels[match[1]] = len(self.blocks) - 1
            elif line.startswith("\t.loc\t"):
                chain = _chain(line)
            elif match := re.match(r"\t([a-z]\w*[^;\n]*?)\s*(?:;.*)?$", line):
                self.blocks[-1].append(match[1])
                self.functions[-1].add(chain)
                if match[1].startswith(("s_branch", "s_cbranch", "s_endpgm")):
                    start_block()
        self.next: list[list[int]] = []
        for i, block in enumerate(self.blocks):
            last = block[-1] if block else ""
            jump = re.match(r"s_c?branch\w* \.L(BB\w+)", last)
            falls = not last.startswith(("s_branch", "s_endpgm")) and i + 1 < len(self.blocks)
            self.next.append(([labels[jump[1]]] if jump else []) + ([i + 1] if falls else []))
        self.cost = [sum(map(_slots, block)) for block in self.blocks]

    def with_(self, pattern: str) -> list[int]:
        return [i for i, block in enumerate(self.blocks) if any(re.match(pattern, line) for line in block)]

    def count(self, block: int, pattern: str) -> int:
        return sum(re.match(pattern, line) is not None for line in self.blocks[block])

    @functools.cache  # noqa: B019
    def ways(self, start: int) -> dict[int, int]:
        """Slots of the shortest way from the beginning of a block to that of each other."""
        shortest, queue = {start: 0}, [(0, start)]
        while queue:
            so_far, block = heapq.heappop(queue)
            if so_far > shortest[block]:
                continue
            for other in self.next[block]:
                if (way := so_far + self.cost[block]) < shortest.get(other, 1 << 60):
                    shortest[other] = way
                    heapq.heappush(queue, (way, other))
        return shortest

    def through(self, start: int, *stops: Iterable[int]) -> int:
        """Slots of the shortest way that goes through one block of each of `stops` in turn."""
        best = {start: 0}
        for stop in stops:
            best = {to: min(way + self.ways(at).get(to, 1 << 60) for at, way in best.items()) for to in stop}
        return min(best.values())


def cost(kernel: Kernel, ring_atoms: int) -> Cost:
    """Counts the shortest way through the loop of a stream wave: no barrier, no new phase."""
    code = _Code(kernel.assembly_with_lines)
    load = r"global_load_dwordx4 .* nt$"
    loads = code.with_(load)
    first = next(i for i in loads if code.count(i, load) == ring_atoms)
    requests = [i for i in loads if i > first]  # an atom's registers are loaded again as soon as it is multiplied
    atoms = sum(code.count(i, load) for i in requests)
    assert atoms == ring_atoms, "the stream loop was not recognised"
    multiply = r"v_mfma_f32_4x4x4" if kernel.spec.dtype != "float32" else r"ds_read_b128"
    multiplies = [i for i in code.with_(multiply) if i >= first]
    flushes = [i for i in code.with_(r"ds_write_b32") if i > first]
    # Where a wave goes on with the next chunk, and not with the next segment, for which it waits.
    chunks = [
        i
        for i, functions in enumerate(code.functions)
        if any({"enter_chunk", "leave_chunk"} <= set(f) and "enter_segment" not in f for f in functions)
    ]
    group = atoms // len(requests)
    turns = list(zip(requests, requests[1:] + requests[:1], strict=True))

    def slots(*stops: list[int]) -> float:
        return sum(code.through(a, *stops, multiplies, [b]) for a, b in turns) / len(turns)

    plain, with_flush, with_chunk = slots(), slots(flushes), slots(flushes, chunks)
    run, chunk = _run_and_chunk_atoms(kernel)
    local = sum(code.count(i, name) * size for i in multiplies for name, size in LOCAL_BYTES.items()) / atoms
    return Cost(group, plain, with_flush - plain, run, with_chunk - with_flush, chunk, local)


def _run_and_chunk_atoms(kernel: Kernel) -> tuple[float, float]:
    """Atoms of a run, and of a wave's runs of a chunk and segment, on average; kernel/config.h deals them."""
    geo, plan = geometry(kernel.spec, kernel.plan), kernel.plan
    atoms = runs = ends = 0
    for phase in PHASES:
        matrix = geo.matrices[phase]
        times = 1 if phase == "head" else kernel.spec.num_layers
        tiles = matrix.tiles * times
        segments = sum(-(-(b - a) // plan.segment_tiles) for a, b in itertools.pairwise(matrix.begin)) * times
        across = matrix.cols // geo.atom_cols
        for chunk in range(0, across, plan.chunk_atoms):
            count = min(plan.chunk_atoms, across - chunk)
            lengths = [count * (w + 1) // plan.waves - count * w // plan.waves for w in range(plan.waves)]
            atoms += tiles * sum(lengths)
            runs += tiles * sum(length > 0 for length in lengths)
            ends += segments * plan.waves
    return atoms / runs, atoms / ends
