"""Tapes whose pages lie anywhere, made with numpy from those that are not placed."""

from __future__ import annotations

import dataclasses

import numpy as np

from jax_monokernel.tape import DIES, Tape

PAGE = 4096


def scatter(tape: Tape, order: np.ndarray, die_units: dict[int, int], *, skip: int = 0) -> Tape:
    """A tape with its pages elsewhere, and random bytes where there are none.

    Args:
      tape: one that is not placed.
      order: int [pages], the place of each page.
      die_units: units of the dies that have any.
      skip: bytes before the first place: a multiple of 256 below 4096.
    """
    raw = np.asarray(tape.streams).view(np.uint8).reshape(-1, PAGE)
    out = np.random.default_rng(len(order)).integers(0, 256, (len(raw) + 1) * PAGE, np.uint8)
    out[skip : skip + raw.size].reshape(-1, PAGE)[order] = raw
    units = np.zeros(DIES, np.int32)
    for die, count in die_units.items():
        units[die] = count
    return dataclasses.replace(
        tape,
        streams=out.view(np.asarray(tape.streams).dtype).reshape(len(raw) + 1, -1),
        pages=(order * (PAGE // 256) + skip // 256).astype(np.int32),
        die_units=units,
    )


def page_count(tape: Tape) -> int:
    """Pages of a tape that is not placed."""
    assert np.asarray(tape.streams).nbytes % PAGE == 0
    return np.asarray(tape.streams).nbytes // PAGE
