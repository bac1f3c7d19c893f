"""The GPU kernel compiled for AMD GPUs that are not here: what registers, memory and instructions it takes."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import amd_code
import pytest
from amd_code import Kernel, blocks, instructions, metadata, needs_clang, read_elf, waits
from decoding import spec_of
from kernel_registers import published_spec

from jax_monokernel._bench.shapes import SHAPES
from jax_monokernel.plan import Plan, attention_tasks, geometry, make_plan

pytestmark = needs_clang

LARGE = SHAPES["llama3.2-1b"].spec()
UNITS = {"gfx942": 304, "gfx950": 256}
IN_FLIGHT = 8  # loads of weights that a wave has on their way at least, 1 KiB each


def large(
    arch: str, batch: int, capacity: int = 2048, *, near: bool = False, placed: bool = False, **plan: int
) -> Kernel:
    laid_out = Plan(platform="rocm", units=UNITS[arch], **plan)
    tasks = attention_tasks(LARGE, laid_out, batch, capacity)
    return Kernel(LARGE, laid_out, batch, *tasks, arch=arch, near=near, placed=placed)


def small(name: str, dtype: str, arch: str, batch: int, units: int = 7, *, placed: bool = False, **plan: int) -> Kernel:
    return Kernel(spec_of(name, dtype), Plan(platform="rocm", units=units, **plan), batch, arch=arch, placed=placed)


def published(name: str, batch: int, arch: str = "gfx942") -> Kernel:
    spec = published_spec(name)
    plan = make_plan(spec, platform="rocm", units=UNITS[arch])
    return Kernel(spec, plan, batch, *attention_tasks(spec, plan, batch, 2048), arch=arch)


CASES = {
    "llama-gfx942-batch_1": lambda: large("gfx942", 1),
    "llama-gfx942-batch_4-long": lambda: large("gfx942", 4, capacity=32768),
    "llama-gfx942-batch_16": lambda: large("gfx942", 16),
    "llama-gfx950-batch_16": lambda: large("gfx950", 16, chunk_atoms=16),
    "windows-f16-gfx942-batch_3": lambda: small("windows", "float16", "gfx942", 3),
    "post_norm-f32-gfx942-batch_3": lambda: small("post_norm", "float32", "gfx942", 3),
    "llama-gfx942-batch_1-groups": lambda: large("gfx942", 1, groups=8, near=True),
    "windows-f16-gfx942-batch_3-groups": lambda: small("windows", "float16", "gfx942", 3, units=8, groups=2),
    "nope-bf16-gfx950-batch_1": lambda: small("nope", "bfloat16", "gfx950", 1),
    "llama-gfx942-batch_1-placed": lambda: large("gfx942", 1, placed=True),
    "llama-gfx942-batch_4-long-placed": lambda: large("gfx942", 4, capacity=32768, placed=True),
    "llama-gfx950-batch_16-placed": lambda: large("gfx950", 16, placed=True),
    "llama-gfx942-batch_1-groups-placed": lambda: large("gfx942", 1, groups=8, near=True, placed=True),
    "gemma3-gfx942-batch_16": lambda: published("gemma-3-1b-pt", 16),
    "qwen3-gfx942-batch_16": lambda: published("Qwen3-0.6B", 16),
    "olmo2-gfx942-batch_1": lambda: published("OLMo-2-1124-7B", 1),
    "windows-f32-gfx942-batch_3-placed": lambda: small("windows", "float32", "gfx942", 3, placed=True),
}


@pytest.fixture(scope="module", params=CASES)
def kernel(request) -> Kernel:
    return CASES[request.param]()


def stream_loop(kernel: Kernel) -> list[str]:
    """The loop in which stream waves multiply: the one that loads as many atoms as the ring has."""
    bodies: dict[str, list[str]] = {}
    for block in blocks(kernel.assembly):
        for loop in block.loops:
            bodies.setdefault(loop, []).extend(block.instructions)
    atoms = kernel_atoms()
    found = [body for body in bodies.values() if sum(map(is_weight_load, body)) == atoms and "s_barrier" in body]
    assert len(found) == 1
    return found[0]


def kernel_atoms() -> int:
    """Registers of a stream wave's ring, in atoms."""
    found = re.search(r"kAtoms = (\d+);", (amd_code.gpu_host.KERNEL / "arch" / "amd.h").read_text())
    assert found is not None
    return int(found[1])


def is_weight_load(line: str) -> bool:
    return re.fullmatch(r"global_load_dwordx4 .* nt", line) is not None


def test_registers_and_memory(kernel):
    numbers = metadata(kernel.assembly)
    per_simd = kernel.threads / 256  # waves that share the 512 registers of a lane
    assert numbers["max_flat_workgroup_size"] == kernel.threads
    assert numbers["wavefront_size"] == 64
    assert numbers["vgpr_spill_count"] == numbers["sgpr_spill_count"] == 0
    assert numbers["private_segment_fixed_size"] == 0
    assert numbers["vgpr_count"] + numbers["agpr_count"] <= 512 / per_simd
    # All shared memory is requested at launch; that the kernel needs no more is asserted when it is compiled.
    assert numbers["group_segment_fixed_size"] == 0
    assert kernel.shared_bytes == {"gfx942": 64, "gfx950": 160}[kernel.arch] * 1024


def test_streams_begin_where_the_tape_has_them(kernel):
    """The compiler fills the table in, from tiles and chunks."""
    lines = iter(kernel.assembly.read_text().splitlines())
    assert any("kStreamBeginsE:" in line for line in lines)
    words = [re.match(r"\s+\.long\s+(\d+)", line) for line in lines]
    got = [int(word[1]) for word in itertools.takewhile(bool, words) if word]
    slot = 8 * 64 * 16 // (4 if kernel.spec.dtype == "float32" else 2)
    assert [slots * slot for slots in got] == list(geometry(kernel.spec, kernel.plan).wave_begin)


def test_forbidden_instructions(kernel):
    for line in instructions(kernel.assembly):
        assert not re.match(r"flat_|scratch_|s_trap|s_store|s_atomic|s_swappc|buffer_(load|store|atomic)", line)
        if line.startswith("global_atomic"):
            adds = kernel.near or kernel.placed  # find_place; the others are claim's
            assert re.match("global_atomic_cmpswap" + "|global_atomic_add" * adds, line)
    # Caches as a whole are written back and invalidated only where a filter reads all logits.
    lines = instructions(kernel.assembly)
    whole = [line for line in lines if line.startswith(("buffer_wbl2", "buffer_inv")) and line != "buffer_inv sc0"]
    assert sorted(whole) == ["buffer_inv sc1", "buffer_wbl2 sc1"]
    assert ("buffer_inv sc0" in lines) == kernel.near  # the L1 alone


def test_words_bypass_caches(kernel):
    stores = [line for line in instructions(kernel.assembly) if line.startswith("global_store_dword ")]
    assert sum(line.endswith("sc1") for line in stores) >= 10
    # What is for the caller alone: results and the report.
    assert sum(not line.endswith("sc1") for line in stores) <= 60


def test_weights_stay_on_their_way(kernel):
    loop = stream_loop(kernel)
    others = [line for line in loop if line.startswith("global_load") and not is_weight_load(line)]
    # Where the two pages of a slot are: asked for so early that what is on its way does not get less.
    assert [line.split()[0] for line in others] == ["global_load_dwordx2"] * (2 if kernel.placed else 0)
    assert waits(loop)
    assert min(waits(loop)) >= IN_FLIGHT - 1


def test_matrix_instructions(kernel):
    name = {"bfloat16": "v_mfma_f32_4x4x4_16b_bf16", "float16": "v_mfma_f32_4x4x4_16b_f16", "float32": None}
    wanted = name[kernel.spec.dtype]
    found = {line.split()[0] for line in stream_loop(kernel) if "mfma_f32_4x4x4" in line}
    assert found == ({wanted} if wanted else set())


def test_code_object(kernel):
    elf = read_elf(kernel.library)
    assert amd_code.is_ordinary(elf, kernel.arch)
    assert elf.symbols["monokernel"][1] <= 256 * 1024
    # Nothing else is asked for: the kernel's argument is all that a launch passes.
    assert set(elf.symbols) - {"monokernel", "monokernel.kd"} <= {n for n in elf.symbols if n.startswith("__hip_cuid")}


def test_too_little_shared_memory_says_what_to_do():
    with pytest.raises(amd_code.CompileError, match="chunk_atoms or segment_tiles must be smaller"):
        assert isinstance(large("gfx942", 16, segment_tiles=32).assembly, Path)
