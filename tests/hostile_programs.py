"""Calls the native decode with broken programs: whatever is in one, the answer is an error or tokens, never a crash.

An exported program can be changed on its way to where it runs, so the native side must not trust what Python would
have checked. Run in a process of its own (test_cpu_backend.py does): `python hostile_programs.py EXAMPLES`.
"""

from __future__ import annotations

import sys

import jax
import numpy as np
from decoding import mixed_params, spec_of, state_of, tape_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jax_monokernel._program import program
from jax_monokernel.decode import TARGET

STEPS = 3
SPECS = [spec_of("windows", "bfloat16"), spec_of("nope"), spec_of("longrope", "float16"), spec_of("post_norm")]
EDGES = [0, 1, 2, 3, 7, 15, 16, 17, 255, 2**31 - 1, 2**31, 2**40 - 1, 2**40, 2**59, 2**60, 2**62, 2**63 - 1]
INTEGERS = st.sampled_from([*EDGES, *(-e for e in EDGES), -(2**63)])
FLOATS = st.sampled_from([0.0, -1.0, 0.5, 1e9, -1e300, 1e300, float("inf"), -float("inf"), float("nan")])


def operands_of(spec, units: int = 2) -> list[np.ndarray]:
    """The call's operands, in order."""
    tape, state, params = tape_of(spec, units), state_of(spec), mixed_params(spec, 3)
    embedding = np.zeros((0, 0), spec.dtype) if tape.embedding is None else tape.embedding
    options = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty")
    values = [tape.streams, tape.constants, embedding, *(getattr(params, name) for name in options)]
    values += [params.max_new_tokens, params.eos_token_id, params.logit_bias, state.key_data]
    values += [state.k_cache, state.v_cache, state.position, state.last_token, state.status, state.seen]
    return [np.asarray(x) for x in values]


def results_of(operands: list[np.ndarray]) -> list[jax.ShapeDtypeStruct]:
    fresh = [((3, STEPS), np.int32), ((3,), np.int32), ((3, STEPS), np.float32)]
    return [jax.ShapeDtypeStruct(*f) for f in fresh] + [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands[13:]]


def change_values(draw: st.DrawFn, array: np.ndarray) -> np.ndarray:
    """A copy with a few elements replaced."""
    array = array.copy()
    flat = array.reshape(-1)
    for _ in range(draw(st.integers(1, 3)) if flat.size else 0):
        at = draw(st.integers(0, flat.size - 1))
        if not np.issubdtype(array.dtype, np.integer):
            with np.errstate(over="ignore"):
                flat[at] = np.float64(draw(FLOATS)).astype(array.dtype)
            continue
        near = st.sampled_from([int(flat[at]) + step for step in (-16, -2, -1, 1, 2, 16)])
        limits = np.iinfo(array.dtype)
        flat[at] = min(max(draw(INTEGERS | near), limits.min), limits.max)
    return array


def change_shape(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[int, ...]:
    """One axis longer, shorter or empty, or an axis more or less."""
    kind = draw(st.sampled_from(["size", "size", "size", "more", "less"]))
    if kind == "more" or not shape:
        return (*shape, draw(st.integers(0, 2)))
    if kind == "less":
        return shape[1:]
    axis = draw(st.integers(0, len(shape) - 1))
    size = draw(st.sampled_from([0, 1, shape[axis] - 1, shape[axis] + 1, 2 * shape[axis], 17]))
    return (*shape[:axis], max(size, 0), *shape[axis + 1 :])


@st.composite
def calls(draw: st.DrawFn):
    spec = draw(st.sampled_from(SPECS))
    operands = operands_of(spec)
    results = results_of(operands)
    attributes = dict(program(spec, tape_of(spec, 2).plan))
    for _ in range(draw(st.integers(1, 2))):
        what = draw(st.sampled_from(["values", "values", "values", "length", "operand", "shape", "result", "dtype"]))
        name = draw(st.sampled_from(["ints", "ints", "floats", "layers", "ropes", "tiles", "tiles"]))
        if what == "values":
            attributes[name] = change_values(draw, attributes[name])
        elif what == "length":
            attributes[name] = np.resize(attributes[name], max(0, attributes[name].size + draw(st.integers(-3, 3))))
        elif what == "operand":
            at = draw(st.integers(3, len(operands) - 1))
            operands[at] = change_values(draw, operands[at])
        elif what == "shape":
            at = draw(st.integers(0, len(operands) - 1))
            operands[at] = np.resize(operands[at], change_shape(draw, operands[at].shape))
        else:
            at = draw(st.integers(0, len(results) - 1))
            shape, dtype = results[at].shape, results[at].dtype
            if what == "result":
                shape = change_shape(draw, shape)
            else:
                dtype = draw(st.sampled_from([np.int8, np.int32, np.float32, np.uint8, np.float16]))
            results[at] = jax.ShapeDtypeStruct(shape, dtype)
    return spec, operands, results, attributes


outcomes = {"tokens": 0, "error": 0}


def check(spec, operands, results, attributes) -> None:
    call = jax.jit(lambda *x: jax.ffi.ffi_call(TARGET, results)(*x, **attributes))
    try:
        out = jax.block_until_ready(call(*operands))
    except jax.errors.JaxRuntimeError:
        outcomes["error"] += 1
        return
    tokens = np.asarray(out[0])
    assert np.all((tokens >= -1) & (tokens < spec.vocab_size)), tokens
    outcomes["tokens"] += 1


def main(examples: int) -> None:
    spec = SPECS[0]
    check(spec, operands_of(spec), results_of(operands_of(spec)), program(spec, tape_of(spec, 2).plan))
    assert outcomes["tokens"] == 1

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=examples < 1000,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(calls())
    def run(call):
        check(*call)

    run()
    print(outcomes)
    assert outcomes["error"] > 0
    assert outcomes["tokens"] > 1


if __name__ == "__main__":
    main(int(sys.argv[1]))
