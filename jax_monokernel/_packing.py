"""`pack`, compiled: one program for all weights of a spec and plan."""

from __future__ import annotations

import functools

import jax

from jax_monokernel.plan import Plan
from jax_monokernel.spec import DecoderSpec
from jax_monokernel.tape import Tape, pack, pack_placed
from jax_monokernel.weights import DecoderWeights

pack_jitted = jax.jit(pack, static_argnums=(0, 2))


@functools.partial(jax.jit, static_argnums=(0, 2), donate_argnums=3, keep_unused=True)
def pack_over(
    spec: DecoderSpec,
    weights: DecoderWeights,
    plan: Plan,
    old: tuple[jax.Array, ...],
    pages: jax.Array | None = None,
    die_units: jax.Array | None = None,
) -> Tape:
    """As `pack`, or `pack_placed` if there are pages, into the memory of another tape's arrays."""
    if pages is None or die_units is None:
        return pack(spec, weights, plan)
    return pack_placed(spec, weights, plan, pages, die_units)
