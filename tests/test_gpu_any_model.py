"""The GPU kernel's source with models and plans drawn at random: sizes that no row of tiles, chunk or wave fits.

Every case is compiled and run on this CPU, half of them watched for races and for reads of what nobody wrote. A mistake
in how rows are cut shows in few shapes only: once, a model of 8 billion parameters had wrong tokens, and none of the
tests'. MONOKERNEL_TEST_MODELS says how many cases are tried, from number 0 on; every other one has waves of 64 lanes.
"""

from __future__ import annotations

import dataclasses
import os
import random
from typing import Any

import numpy as np
import pytest
from decoding import SPECS, decode, mixed_params, params_of, spec_of, state_of, tape_of
from gpu_decode import Kernel, decode_on_host, gpu_plan
from gpu_host import POLICIES, BuildError

from jax_monokernel import DecoderSpec
from jax_monokernel.plan import Plan

CASES = int(os.environ.get("MONOKERNEL_TEST_MODELS", "4"))
STEPS = 3


def any_model(draw: random.Random) -> DecoderSpec:
    """One of the models of the tests, in other sizes."""
    base = spec_of(draw.choice(list(SPECS)), draw.choice(["float32", "bfloat16", "bfloat16", "float16"]))
    head_dim, kv_heads = draw.choice([8, 16, 32, 48, 64, 80, 96, 128]), draw.choice([1, 2, 3, 4])
    rotary = head_dim if draw.random() < 0.8 else head_dim // 2
    ropes = (x if x.scaling == "longrope" else dataclasses.replace(x, rotary_dim=rotary) for x in base.ropes)
    return base.replace(
        num_heads=kv_heads * draw.choice([1, 2, 3, 4]),
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        ropes=tuple(ropes),
        hidden_size=draw.choice([20, 64, 100, 192, 256, 320, 576, 640]),
        intermediate_size=draw.choice([28, 96, 256, 448, 900, 1536, 2304, 3600]),
        vocab_size=draw.choice([50, 128, 259, 520]),
    )


def any_plan(draw: random.Random, spec: DecoderSpec, wave: int) -> Plan:
    """Few units, with waves, chunks and segments of any number."""
    most = 7 if wave == 32 else 4
    units = draw.randint(2, 9)
    return gpu_plan(
        spec,
        wave,
        units,
        waves=draw.randint(1, most + (wave == 32)),
        service_waves=draw.randint(1, most),
        chunk_atoms=draw.choice([1, 2, 4, 6, 8, 12, 16, 24, 32, 64] if wave == 32 else [4, 8, 16]),
        segment_tiles=draw.choice([1, 2, 3, 4, 8]),
        groups=draw.choice([1, 1, 1, 2]) if units % 2 == 0 else 1,
    )


# How waves get keys and values: as config.h would have it, to registers, or to shared memory some steps ahead.
CACHE = [(), (("MK_COPY_CACHE", 0),), *((("MK_COPY_CACHE", 1), ("MK_CACHE_SLOTS", slots)) for slots in (1, 2, 3))]
# When service waves look for sums of squares.
SQUARES = [(), (("MK_LATE_SQUARES", 1),)]


def any_kernel(draw: random.Random, wave: int, sanitize: bool) -> Kernel:
    """One that can be: where shared memory is too little, of shorter chunks and segments, as the kernel says."""
    spec = any_model(draw)
    plan = any_plan(draw, spec, wave)
    heads, service_lanes = spec.num_heads // spec.num_kv_heads, plan.service_waves * wave
    kernel = Kernel(
        spec,
        plan,
        batch=draw.choice([b for b in (1, 1, 2, 3, 4, 5) if b * plan.tile_rows <= service_lanes]),
        splits=draw.choice([1, 1, 2, 3, 4]),
        task_heads=draw.choice([h for h in (1, 2, 3, 4) if heads % h == 0]),
        shared_bytes=232448 if wave == 32 else 64 * 1024,
        sanitize=sanitize,
        defines=draw.choice(CACHE) + draw.choice(SQUARES) if wave == 32 else (),
    )
    while needs_more_memory(kernel):
        plan = kernel.plan
        assert plan.chunk_atoms > 1 or plan.segment_tiles > 1, describe(kernel)
        less = {name: max(1, getattr(plan, name) // 2) for name in ("chunk_atoms", "segment_tiles")}
        kernel = dataclasses.replace(kernel, plan=dataclasses.replace(plan, **less))
    return kernel


def needs_more_memory(kernel: Kernel) -> bool:
    try:
        assert kernel.library.exists()
    except BuildError as error:
        if all("too little shared memory" in line for line in str(error).splitlines() if "error:" in line):
            return True
        raise
    return False


def describe(kernel: Kernel) -> dict[str, Any]:
    """What a report of a failure needs."""
    spec, plan = kernel.spec, dataclasses.asdict(kernel.plan)
    sizes = ("hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size", "dtype")
    of_kernel = {"batch": kernel.batch, "splits": kernel.splits, "defines": kernel.defines}
    return {**{n: getattr(spec, n) for n in sizes}, **plan, **of_kernel}


@pytest.mark.parametrize("number", range(CASES))
def test_first_tokens_are_those_of_the_cpu(number):
    draw = random.Random(number)
    kernel = any_kernel(draw, wave=64 if number % 2 else 32, sanitize=number % 4 >= 2)
    spec, batch = kernel.spec, kernel.batch
    longest, capacity = draw.choice([(17, 24), (17, 40), (120, 150)])
    state = state_of(spec, tuple(draw.randint(0, longest) for _ in range(batch)), capacity=capacity)
    params = mixed_params(spec, batch) if batch <= 3 and draw.random() < 0.4 else params_of(spec, batch)
    got, _ = decode_on_host(kernel, state, params, STEPS, seed=number, policy=draw.choice(list(POLICIES)))
    want = decode(tape_of(spec, 2), state, params, steps=STEPS)
    assert np.isfinite(np.asarray(got.log_probs)).all(), describe(kernel)
    if spec.dtype == "float32":
        np.testing.assert_array_equal(got.tokens, want.tokens, err_msg=str(describe(kernel)))
    same = np.asarray(got.tokens)[:, 0] == np.asarray(want.tokens)[:, 0]  # 16 bits decide some near ties otherwise
    assert same.mean() > 0.5, describe(kernel)
    errors = np.abs(np.asarray(got.log_probs) - np.asarray(want.log_probs))[same, 0]
    assert errors.max() < (1e-3 if spec.dtype == "float32" else 0.12), describe(kernel)
