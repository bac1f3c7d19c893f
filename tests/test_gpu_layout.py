"""Whether the GPU kernel finds place in shared memory, for published models and any number of requests."""

from __future__ import annotations

import dataclasses
import subprocess

import gpu_host
import numpy as np
import pytest
from decoding import decode, params_of, spec_of, state_of, tape_of
from gpu_decode import Kernel, decode_on_host, gpu_plan
from kernel_registers import published_spec
from published import PUBLISHED

from jax_monokernel import DecoderSpec, LayerSpec, RopeSpec, _native
from jax_monokernel._program import program
from jax_monokernel.plan import Plan, attention_tasks, make_plan

UNITS = {"gfx942": 304, "gfx950": 256, "sm_90": 132}
LARGE_HEADS = DecoderSpec(
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=8192,
    num_heads=8,
    num_kv_heads=2,
    head_dim=512,
    layers=(LayerSpec(),),
    ropes=(RopeSpec(theta=1e4, rotary_dim=512),),
)


def complaint(
    spec: DecoderSpec, plan: Plan, batch: int, shared_bytes: int, tasks: tuple[int, int] | None = None
) -> str:
    """What the compiler says of config.h; "" if all that the kernel needs has its place."""
    splits, task_heads = tasks or attention_tasks(spec, plan, batch, 2048)
    request = {"batch": batch, "splits": splits, "task_heads": task_heads, "shared_bytes": shared_bytes}
    stub = _native.gpu_stub(**program(spec, plan), **request).replace('"kernel.h"', '"config.h"')
    done = subprocess.run(
        ["g++", "-std=c++20", "-DMK_HOST", "-fsyntax-only", f"-I{gpu_host.KERNEL}", "-xc++", "-"],
        input=stub,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stderr


@pytest.mark.parametrize("batch", [7, 16])
@pytest.mark.parametrize("arch", UNITS)
@pytest.mark.parametrize("name", [*PUBLISHED, "large heads"])
def test_published_models_have_room(name, arch, batch):
    spec = published_spec(name) if name in PUBLISHED else LARGE_HEADS
    plan = make_plan(spec, platform="cuda" if arch == "sm_90" else "rocm", units=UNITS[arch])
    assert complaint(spec, plan, batch, _native.gpu_shared_bytes(arch)) == ""


def least_shared_bytes(spec: DecoderSpec, plan: Plan, batch: int) -> int:
    few, enough = 0, 256 * 1024
    while enough - few > 128:
        middle = (few + enough) // 256 * 128
        said = complaint(spec, plan, batch, middle, (1, 1))
        assert said == "" or "too little shared memory for this batch" in said
        few, enough = (middle, enough) if said else (few, middle)
    return enough


@pytest.mark.parametrize(("name", "wave_size"), [("post_norm", 64), ("windows", 64), ("windows", 32)])
def test_what_has_no_room_is_in_the_workspace(name, wave_size):
    """Angles and, with post-norms, the residual stream, in a kernel with no more shared memory than it must have."""
    spec, batch = spec_of(name, "float32"), 3
    plan = gpu_plan(spec, wave_size, 3)
    least = least_shared_bytes(spec, plan, batch)
    roomy = Kernel(spec, plan, batch)
    kernel = dataclasses.replace(roomy, shared_bytes=least, sanitize=True)
    angles = batch * len(spec.ropes) * spec.ropes[0].rotary_dim * 4
    residual = batch * spec.hidden_size * 4 if spec.post_norm else 0
    moved = kernel.workspace["bytes"] - roomy.workspace["bytes"]
    assert moved >= plan.units * (angles + residual)
    state, params = state_of(spec), params_of(spec, batch)
    got, run = decode_on_host(kernel, state, params, 4, seed=1)
    assert run.report["reason"] == 0, run.report
    want = decode(tape_of(spec, 2), state, params, steps=4)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.log_probs, want.log_probs, rtol=0, atol=1e-4)
