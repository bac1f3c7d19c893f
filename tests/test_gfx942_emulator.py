"""The GPU kernel's code object for gfx942, instruction by instruction, against the reference; visibility is checked."""

from __future__ import annotations

import gfx942
import pytest
from amd_code import Kernel
from decoding import (
    POSITIONS,
    assert_same_decode,
    mixed_params,
    params_of,
    reference,
    reference_of_mixed,
    replace_row,
    rows_of,
    spec_of,
    state_of,
)
from gpu_decode import gpu_plan

from jax_monokernel.state import FULL, STOPPED

pytestmark = gfx942.MARKS

# Where 16-bit rounding does not turn a token of the reference into another.
FAMILIES = (
    ("plain", "float32"),
    ("windows", "float16"),
    ("nope", "bfloat16"),
    ("post_norm", "float32"),
    ("longrope", "float32"),
)


def one_chunk(name: str, dtype: str, batch: int) -> Kernel:
    spec = spec_of(name, dtype)
    return Kernel(spec, gpu_plan(spec, 64, 3), batch)


def split_up(name: str, dtype: str, batch: int) -> Kernel:
    """Everything in several parts that can be."""
    spec = spec_of(name, dtype)
    plan = gpu_plan(spec, 64, 7, waves=3, service_waves=3, chunk_atoms=1, segment_tiles=1)
    heads = spec.num_heads // spec.num_kv_heads
    return Kernel(spec, plan, batch, splits=3, task_heads=2 if heads % 2 == 0 else 1)


# Seeds of the order of waves, with the XCD of each work-group: as measured on an MI300X, by turns of two, all on one.
ORDERS = {
    "by_turns": (None, lambda unit: (unit + 6) % 8),
    "seed_1": (1, lambda unit: unit // 2 % 8),
    "seed_2": (2, lambda unit: 3),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("make", [one_chunk, split_up])
@pytest.mark.parametrize(("name", "dtype"), FAMILIES, ids=["-".join(family) for family in FAMILIES])
def test_same_as_reference(name, dtype, make, batch, order):
    kernel = make(name, dtype, batch)
    seed, xcc = ORDERS[order]
    # The last requests: what is mixed into the sampling differs between them.
    rows = slice(3 - batch, 3)
    state = state_of(kernel.spec, POSITIONS[rows])
    params, want = rows_of((mixed_params(kernel.spec, 3), reference_of_mixed(kernel.spec)), rows)
    got, run = gfx942.decode_on_emulator(kernel, state, params, want.tokens.shape[1], seed=seed, xcc=xcc)
    assert run.violations == []
    assert run.report["reason"] == 0
    assert_same_decode(got, want, kernel.spec, state)


def test_whole_chip():
    """As many work-groups as an MI300X has compute units, one on each."""
    spec = spec_of("nope", "bfloat16")
    kernel = Kernel(spec, gpu_plan(spec, 64, 304), batch=3)
    state, params = state_of(spec, POSITIONS), mixed_params(spec, 3)
    got, run = gfx942.decode_on_emulator(kernel, state, params, 16, seed=1)
    assert run.violations == []
    assert_same_decode(got, reference_of_mixed(spec), spec, state)


def test_ends_of_requests():
    """One request is full, one stops at an end token, one is asked for fewer tokens."""
    spec = spec_of("plain")
    kernel = one_chunk("plain", "float32", 3)
    state = replace_row(state_of(spec, POSITIONS), 0, status=FULL)
    end = int(reference(spec, state, params_of(spec, 3)).tokens[1, 0])
    params = params_of(spec, 3, eos_token_id=[[-1], [end], [-1]], max_new_tokens=[16, 16, 3])
    want = reference(spec, state, params)
    got, run = gfx942.decode_on_emulator(kernel, state, params, 16, seed=3)
    assert run.violations == []
    assert want.lengths.tolist() == [0, 1, 3]
    assert want.state.status.tolist()[:2] == [FULL, STOPPED]
    assert_same_decode(got, want, spec, state)


def test_nothing_to_do():
    """No request runs: work-groups end at once, some before others have begun."""
    spec = spec_of("plain")
    kernel = one_chunk("plain", "float32", 1)
    state = replace_row(state_of(spec, (3,)), 0, status=FULL)
    want = reference(spec, state, params_of(spec, 1))
    got, run = gfx942.decode_on_emulator(kernel, state, params_of(spec, 1), 16)
    assert run.violations == []
    assert_same_decode(got, want, spec, state)


def test_lost_word_is_noticed():
    """The check of visibility works: without sc1, words are not seen by others, or are reported."""
    kernel = one_chunk("plain", "float32", 1)
    text = kernel.assembly.read_text()
    broken = kernel.assembly.with_name("broken.s")
    broken.write_text(gfx942.without_scope(text))
    object.__setattr__(kernel, "assembly", broken)
    state = state_of(kernel.spec, (3,))
    _, run = gfx942.decode_on_emulator(kernel, state, params_of(kernel.spec, 1), 16)
    assert any("has not released" in violation for violation in run.violations)
