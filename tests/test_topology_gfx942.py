"""The topology probe's machine code for gfx942, on an emulator (gfx942.py says what that takes)."""

from __future__ import annotations

import ctypes
from typing import Any

import amd_code
import gfx942
import numpy as np
import pytest

from jax_monokernel import _native
from jax_monokernel.topology.probe import Place, places

pytestmark = gfx942.MARKS

UNITS = 6


class Args(ctypes.Structure):
    """topology::Args of ffi/gpu/probe/probe.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (
            "data", "unit_of", "jobs", "tracks", "track_of", "turns", "results", "blocks", "readings", "lines", "units",
        )),
        *((name, ctypes.c_uint32) for name in (
            "unit_count", "steps", "block_shift", "batches", "rounds", "warm_up", "touch", "looks", "first_value",
        )),
        ("limit_ticks", ctypes.c_uint64),
    )  # fmt: skip


def launch(seed: int | None, **values: Any) -> tuple[dict[str, np.ndarray], Any]:
    emu: Any = gfx942.emulator()
    memory, args, arrays = emu.Memory(), Args(), {}
    for name, value in values.items():
        if isinstance(value, np.ndarray):
            arrays[name] = np.frombuffer(value.tobytes(), np.uint8).copy()
            value = memory.put(arrays[name])
        setattr(args, name, value)
    library = amd_code.link(amd_code.compile_source(_native.gpu_probe_source(), "gfx942"), "gfx942")
    # Work-group g runs on XCD (g + 6) mod 8, on compute units with holes between them.
    result = emu.run(
        str(library), "topology_probe", UNITS, 576, [bytes(args)], mem=memory, seed=seed, slice=100, coherence=True,
        xcc=lambda g: (g + 6) % 8 // 3, hw_id=lambda g, wave: wave & 15 | (g * 3 % 13) << 8 | (g % 4) << 13,
        max_instructions=200_000_000,
    )  # fmt: skip
    memory.free()
    return {
        name: np.frombuffer(a, values[name].dtype).reshape(values[name].shape) for name, a in arrays.items()
    }, result


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_pairs_play_while_units_read(seed):
    where = sorted(Place((g + 6) % 8 // 3, g % 4, g * 3 % 13) for g in range(UNITS))
    unit_of = np.full(2048, 0xFFFFFFFF, np.uint32)
    for unit, place in enumerate(where):
        unit_of[place.number] = unit
    pairs = [(a, b) for a in range(4) for b in range(4) if a != b]
    jobs = [[a | b << 16, (8 + i % 5) * 128] for i, (a, b) in enumerate(pairs)] + [[5 | 4 << 16, 13 * 128]] * 3
    rng = np.random.default_rng(0)
    data = rng.integers(0, 2**32, 16 * 1024, np.uint32)  # 16 pages: 8 that are read, and 8 with words
    blocks = rng.permutation(8 * 8).astype(np.uint32)  # of 512 bytes
    found, result = launch(
        seed,
        data=data,
        unit_of=unit_of,
        jobs=np.array(jobs, np.uint32),
        tracks=np.array([[0, len(pairs)], [len(pairs), 3]], np.uint32),
        track_of=np.array([0, 0, 0, 0, 1, 1], np.int32),
        turns=np.zeros((2, 32), np.uint32),
        results=np.zeros((len(jobs), 2), np.uint32),
        blocks=blocks,
        readings=np.array([[0, 64], [0, 32], [32, 32], [5, 16], [0, 0], [7, 33]], np.uint32),
        units=np.zeros((UNITS, 16), np.uint32),
        unit_count=UNITS,
        steps=0,
        block_shift=9,
        batches=2,
        rounds=2,
        warm_up=1,
        first_value=7,
        limit_ticks=2**40,
    )
    assert not result.violations
    assert places(found["units"], "rocm") == where
    assert found["units"][:, 2].tolist() == [0] * UNITS
    assert found["units"][:, 3].tolist() == [12, 12, 12, 12, 3, 3]
    assert found["turns"][:, 0].tolist() == [12, 3]
    assert (found["results"] > 0).all()
    assert (found["units"].view(np.uint64)[:, 5] > 0).tolist() == [True] * 4 + [False, True]
    np.testing.assert_array_equal(found["data"], data)  # words hold again what they held


def test_units_read_what_they_should():
    empty = np.zeros((0, 2), np.uint32)
    found, result = launch(
        1,
        data=np.arange(8 * 1024, dtype=np.uint32),
        jobs=empty,
        tracks=empty,
        track_of=np.full(UNITS, -1, np.int32),
        turns=np.zeros(32, np.uint32),
        results=empty,
        blocks=np.arange(8, dtype=np.uint32),
        readings=np.array([[0, 8], [0, 2], [0, 0], [5, 3], [0, 0], [2, 4]], np.uint32),
        units=np.zeros((UNITS, 16), np.uint32),
        unit_count=UNITS,
        steps=32,
        block_shift=12,
        batches=1,
        rounds=1,
        warm_up=0,
        first_value=1,
        limit_ticks=2**40,
    )
    assert not result.violations
    assert found["units"].view(np.uint64)[:, 5].tolist() == [32, 32, 0, 32, 0, 32]


@pytest.mark.parametrize("looks", [1, 3])
def test_units_look_at_lines(looks):
    empty = np.zeros((0, 2), np.uint32)
    data = np.random.default_rng(0).integers(0, 2**32, 8 * 1024, np.uint32)
    found, result = launch(
        2,
        data=data,
        jobs=empty,
        tracks=empty,
        track_of=np.full(UNITS, -1, np.int32),
        turns=np.zeros(32, np.uint32),
        results=empty,
        blocks=np.arange(64, dtype=np.uint32)[::-1].copy(),
        readings=np.array([[0, 8], [8, 2], [0, 0], [10, 3], [13, 0], [13, 4]], np.uint32),
        lines=np.zeros((64, 4), np.uint32),
        units=np.zeros((UNITS, 16), np.uint32),
        unit_count=UNITS,
        steps=0,
        block_shift=9,
        batches=1,
        rounds=2,
        warm_up=0,
        touch=1024,
        looks=looks,
        first_value=1,
        limit_ticks=2**40,
    )
    assert not result.violations
    assert found["units"][:, 2].tolist() == [0] * UNITS
    missing = 0xFFFFFFFF
    assert (found["lines"][:17, looks:3] == missing).all()
    assert (found["lines"][:17, :looks] < missing).all()
    assert (found["lines"][17:] == 0).all()
    np.testing.assert_array_equal(found["data"], data)
