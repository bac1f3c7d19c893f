"""Runs the GPU kernel's code object for gfx942 on this CPU.

That takes an emulator of the instructions, which is not in this repository: the environment variable
MONOKERNEL_GFX942_EMULATOR names the folder with its emulate.py, and TINYGRAD_DIR what that needs.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import amd_code
import gpu_decode
import gpu_host
import numpy as np
import pytest

from jax_monokernel import DecodeState, SamplingParams
from jax_monokernel.state import DecodeResult

_VARIABLE = "MONOKERNEL_GFX942_EMULATOR"

MISSING = amd_code.MISSING or (None if _VARIABLE in os.environ else f"{_VARIABLE} does not name an emulator's folder")
# The emulator leaves files open.
MARKS = [
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


@functools.cache
def emulator() -> ModuleType:
    path = Path(os.environ[_VARIABLE]) / "emulate.py"
    found = importlib.util.spec_from_file_location("gfx942_emulate", path)
    assert found is not None
    assert found.loader is not None
    os.environ["EMU_CACHE"] = str(gpu_host.ROOT / "build" / "gfx942")  # of instructions, as patched below
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module
    found.loader.exec_module(module)
    _keep_lanes_in_shared_memory(module)
    _let_dies_share_a_cache(module)
    _let_matrices_come_from_other_lanes(module)
    return module


def _keep_lanes_in_shared_memory(module: Any) -> None:
    """Lanes that are switched off read shared memory too in the emulator, at addresses that may be anything.

    For them an address is cut to the 64 KiB that there are. Those of other lanes are checked before.
    """
    lower = module.Semantics._tiny

    def lowered(self: Any, inst: Any, raw: bytes) -> tuple[Any, Any, Any, str]:
        base, mask, size, source = lower(self, inst, raw)
        return base, mask, size, re.sub(r"\*\((data3_\d+)\+(\w+)\)", r"*(\1+(\2&0x3fff))", source)

    module.Semantics._tiny = lowered


_MOST = 4096  # work-groups


def _let_dies_share_a_cache(module: Any) -> None:
    """The emulator takes every work-group to be on a die of its own; those of one die see each other's words."""
    old, new = "if(wr==wg&&mode!=2) continue;", "if((wr==wg||die_of[wr]==die_of[wg])&&mode!=2) continue;"
    place = "static void rd("
    assert module.SCHED_C.count(old) == module.SCHED_C.count(place) == 1
    module.SCHED_C = module.SCHED_C.replace(place, f"u32 die_of[{_MOST}];\n{place}").replace(old, new)


def _let_matrices_come_from_other_lanes(module: Any) -> None:
    """Matrix instructions with BLGP, which says from which lanes their B comes, are unknown to the emulator.

    Which those are is said by ROCm/amd_matrix_instruction_calculator, `_get_blgp_transformed_lane`.
    """
    source = module.C_MFMA
    start = source.index("INL void mfma(ARGS")
    end = source.index("INL void mfma_i8(ARGS")
    body = source[start:end]
    lanes = "{63,0},{31,0},{31,32},{63,16},{15,0},{15,16},{15,32},{15,48}"
    lanes = f"static const struct {{ u8 mask, add; }} of_b[8]={{{lanes}}};\n"
    for old, new in (
        ("if((w[0]>>8&7)|(w[1]>>29))", "u32 bp=w[1]>>29; if(w[0]>>8&7)"),
        ("mel(Bp[(s1-256+e/epr)*64+l]", "mel(Bp[(s1-256+e/epr)*64+(((l&of_b[bp].mask)+of_b[bp].add)&63)]"),
    ):
        assert body.count(old) == 1
        body = body.replace(old, new)
    module.C_MFMA = source[:start] + lanes + body + source[end:]


@dataclasses.dataclass(frozen=True)
class Run:
    """What a launch left behind."""

    report: dict[str, int]  # mk::Report
    violations: list[str]  # reads of what another work-group has written without making it visible
    instructions: int  # of all waves


def run(
    kernel: amd_code.Kernel,
    args: Mapping[str, np.ndarray | int | None],
    *,
    seed: int | None = None,
    turn: int = 400,
    xcc: Callable[[int], int] | None = None,
    dies: Callable[[int], int] | None = None,
    max_instructions: int = 2_000_000_000,
    coherence: bool = True,
) -> Run:
    """Launches all work-groups of a kernel.

    Args:
      kernel: what runs.
      args: arrays and numbers by the names of mk::Args; one left out or None is a null pointer. Arrays that are not
        `const` there are changed in place.
      seed: of the order in which waves take turns; None: one after the other.
      turn: instructions of a wave's turn; with a seed, on average.
      xcc: the XCD of each work-group.
      dies: where each work-group is for the check of visibility; by default its XCD if words stay on dies, else a die
        of its own.
      max_instructions: of all waves, after which the kernel is taken to hang.
      coherence: whether visibility between work-groups is checked. Where words stay on dies, work-groups of one die
        see each other's.
    """
    emu: Any = emulator()
    die_of = (ctypes.c_uint32 * _MOST).in_dll(emu._sched(), "die_of")
    where = dies or (xcc if kernel.near else None)
    die_of[:] = [where(i) if where else i for i in range(_MOST)]
    memory = emu.Memory()
    struct = gpu_host._Args()
    report = np.zeros(len(gpu_host._REPORT), np.uint32)
    copies: dict[str, np.ndarray] = {}
    for name, value in (dict(args) | {"report": report, "cancel": np.zeros(16, np.uint32)}).items():
        if isinstance(value, np.ndarray):
            # As bytes: some types of these arrays are unknown to the emulator.
            copies[name] = np.frombuffer(value.tobytes(), np.uint8).copy()
            value = memory.put(copies[name])
        if value is not None:
            setattr(struct, name, value)
    try:
        result = emu.run(
            str(kernel.library),
            "monokernel",
            kernel.plan.units,
            kernel.threads,
            [bytes(struct)],
            dyn_lds=kernel.shared_bytes,
            mem=memory,
            seed=seed,
            slice=turn,
            xcc=xcc,
            max_instructions=max_instructions,
            coherence=coherence,
        )
    finally:
        memory.free()
    for name, copy in copies.items():
        original = report if name == "report" else args.get(name)
        if not isinstance(original, np.ndarray):
            continue
        changed = np.frombuffer(copy.tobytes(), original.dtype).reshape(original.shape)
        if name in gpu_host._WRITABLE:
            original[...] = changed
        else:
            assert changed.tobytes() == original.tobytes(), f"the kernel changed {name}, which is only to be read"
    return Run(
        report=dict(zip(gpu_host._REPORT, report.tolist(), strict=True)),
        violations=result.violations,
        instructions=result.instructions,
    )


def decode_on_emulator(
    kernel: amd_code.Kernel, state: DecodeState, sampling: SamplingParams, max_new_tokens: int, **options: Any
) -> tuple[DecodeResult, Run]:
    """What decode returns, and how the run went. `options` are those of `run`."""
    return gpu_decode.decode_on_host(
        kernel,
        state,
        sampling,
        max_new_tokens,
        timeout_ticks=2**40,
        run=lambda _library, args, exchange_bytes, **rest: run(kernel, args, **rest),
        **options,
    )


def without_scope(assembly: str) -> str:
    """A kernel that stores words as if nobody else read them."""
    return re.sub(r"(global_store_dword .*) sc1$", r"\1", assembly, flags=re.MULTILINE)
