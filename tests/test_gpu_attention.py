"""Attention of the GPU kernel on this CPU: by matrix instructions, and with keys and values copied to shared memory."""

from __future__ import annotations

import dataclasses

import gpu_host
import numpy as np
import pytest
from decoding import (
    STEPS,
    assert_same_decode,
    decode,
    mixed_params,
    params_of,
    reference,
    spec_of,
    state_of,
    tape_of,
)
from gpu_decode import Kernel, decode_on_host, gpu_plan
from gpu_host import HostError


@pytest.mark.parametrize(
    ("head_dim", "heads", "kv_heads", "task_heads", "window", "splits", "batch", "service_waves"),
    [
        (64, 4, 2, 2, None, 1, 3, 3),
        (64, 8, 2, 4, 40, 3, 1, 3),
        (128, 6, 2, 3, None, 2, 2, 1),
        (128, 4, 1, 4, 20, 1, 1, 3),
    ],
)
def test_attention_by_matrix_instructions(head_dim, heads, kv_heads, task_heads, window, splits, batch, service_waves):
    """Several query heads with 16-bit keys and values attend by matrix instructions, over many steps."""
    spec = spec_of("windows", "float16").replace(num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim)
    first, *others = spec.layers
    spec = spec.replace(
        ropes=tuple(dataclasses.replace(rope, rotary_dim=head_dim) for rope in spec.ropes),
        layers=(dataclasses.replace(first, window=window), *(dataclasses.replace(x, window=None) for x in others)),
    )
    kernel = Kernel(
        spec, gpu_plan(spec, 32, 4, service_waves=service_waves), batch=batch, splits=splits, task_heads=task_heads
    )
    state = state_of(spec, (150, 7, 63)[:batch], capacity=200)
    params = params_of(spec, batch)
    got, _ = decode_on_host(kernel, state, params, 6)
    want = decode(tape_of(spec, 2), state, params, steps=6)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.log_probs, want.log_probs, rtol=0, atol=0.02)


@pytest.mark.parametrize(("name", "splits", "task_heads"), [("plain", 1, 2), ("windows", 2, 1), ("nope", 3, 4)])
def test_parts_of_a_context_of_several_blocks(name, splits, task_heads):
    """With waves of 64 lanes. Blocks of 64 positions are dealt to the parts by turns; windows cross them."""
    spec = spec_of(name)
    spec = spec.replace(layers=tuple(dataclasses.replace(x, window=x.window and 10 * x.window) for x in spec.layers))
    kernel = Kernel(spec, gpu_plan(spec, 64, 5), batch=3, splits=splits, task_heads=task_heads)
    state, params = state_of(spec, (150, 7, 63), capacity=200), mixed_params(spec, 3)
    got, run = decode_on_host(kernel, state, params, STEPS, stores="late")
    assert run.report["reason"] == 0, run.report
    assert_same_decode(got, reference(spec, state, params), spec, state)


def cache_kernel(dtype, head_dim, window, batch, **options):
    """A kernel whose attention takes many steps: of 3 query heads by matrix instructions, of single ones otherwise."""
    spec = spec_of("windows" if dtype == "float16" else "plain", dtype).replace(
        num_heads=3, num_kv_heads=1, head_dim=head_dim
    )
    first, *others = spec.layers
    spec = spec.replace(
        ropes=tuple(dataclasses.replace(rope, rotary_dim=head_dim) for rope in spec.ropes),
        layers=(dataclasses.replace(first, window=window), *(dataclasses.replace(x, window=None) for x in others)),
    )
    heads = 3 if head_dim in (64, 128) and dtype != "float32" else 1
    return Kernel(spec, gpu_plan(spec, 32, 4, service_waves=3), batch=batch, splits=2, task_heads=heads, **options)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "window", "batch", "slots"),
    [("bfloat16", 64, None, 2, 2), ("float16", 128, 20, 1, 1), ("float16", 80, 40, 1, 3), ("float32", 32, None, 1, 2)],
)
def test_copies_of_the_cache_give_the_same_bits(dtype, head_dim, window, batch, slots):
    """Keys and values in shared memory, some steps ahead, or one step in registers."""
    loads = cache_kernel(dtype, head_dim, window, batch, defines=(("MK_COPY_CACHE", 0),))
    defines = (("MK_COPY_CACHE", 1), ("MK_CACHE_SLOTS", slots))
    copies = dataclasses.replace(loads, sanitize=True, defines=defines)
    state, params = state_of(loads.spec, (150, 63)[:batch], capacity=200), params_of(loads.spec, batch)
    want, _ = decode_on_host(loads, state, params, 4)
    got, _ = decode_on_host(copies, state, params, 4, stores="late")
    np.testing.assert_array_equal(got.log_probs, want.log_probs)
    assert np.asarray(got.state.k_cache).tobytes() == np.asarray(want.state.k_cache).tobytes()


OPENED_EARLY = (
    "kernel.h",
    r"(?s)(renew\(service, [^\n]*\n    if constexpr \(arch::kRenew.*?project<kO>\(service, layer, )false",
    r"opened = opens_early<kO>(service);\n  \1opened",
)


@pytest.mark.parametrize(
    ("copies", "file", "pattern", "replacement"),
    [(1, "phases/cache.h", r"arch::wave_sync\(\);\n    request", "request"), (1, *OPENED_EARLY), (0, *OPENED_EARLY)],
    ids=["slots", "gate, copies", "gate, scratch"],
)
def test_attention_without_order_is_a_race(tmp_path, copies, file, pattern, replacement):
    """One stream wave multiplies the even heads, which are other units' than the one that starves."""
    source = gpu_host.broken_copy(tmp_path, file, pattern, replacement)
    defines = (("MK_COPY_CACHE", copies), ("MK_CACHE_SLOTS", 2))
    kernel = cache_kernel("float32", 32, None, 1, source=source, sanitize=True, defines=defines)
    kernel = dataclasses.replace(kernel, spec=kernel.spec.replace(num_heads=8, num_kv_heads=8), splits=1)
    state, params = state_of(kernel.spec, (150,), capacity=200), params_of(kernel.spec, 1)
    with pytest.raises(HostError, match=r"race with a (write|read)|not written"):
        decode_on_host(kernel, state, params, 4, policy="starve", unit=1)
