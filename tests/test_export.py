"""jax.export: a program that carries the whole decode, to run elsewhere or on another platform."""

from __future__ import annotations

import functools
import getpass
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding import (
    STEPS,
    assert_same_decode,
    decode,
    mixed_params,
    reference_of_mixed,
    spec_of,
    state_of,
    tape_of,
    weights_of,
)
from gpu_decode import gpu_plan, gpu_tape_of
from jax import export
from jax.extend.mlir import ir
from jax.interpreters import mlir

from jax_monokernel import _native, export_program, make_plan, pack
from jax_monokernel._program import program
from jax_monokernel.decode import TARGET
from jax_monokernel.decode import decode as decode_any

REPOSITORY = Path(__file__).parents[1]
SPEC = spec_of("longrope", "bfloat16")


def exported(tape, *operands, platform: str, anywhere: bool = False) -> export.Exported:
    return export_program(
        jax.jit(
            lambda tape, state, params: decode_any(tape, state, params, max_new_tokens=STEPS, return_log_probs=True),
            donate_argnums=1,
        ),
        platforms=[platform],
        disabled_checks=[export.DisabledSafetyCheck.platform()] if anywhere else [],
    )(tape, *operands)


RUN = """
import sys
import jax
import numpy as np
from jax import export
import jax_monokernel

program = export.deserialize(open(sys.argv[1], "rb").read())
leaves = [x.view(aval.dtype) for x, aval in zip(np.load(sys.argv[2]).values(), program.in_avals)]
arguments, _ = jax.tree.unflatten(program.in_tree, leaves)
tape = arguments[0]
assert tape.spec.ropes[0].scaling == "longrope", tape.spec
result = program.call(*arguments)
assert isinstance(result, jax_monokernel.DecodeResult), type(result)
np.savez(sys.argv[3], tokens=result.tokens, log_probs=result.log_probs, position=result.state.position)
"""


def test_an_exported_decode_runs_in_a_fresh_process(tmp_path):
    arguments = tape_of(SPEC, 2), state_of(SPEC), mixed_params(SPEC, 3)
    want = decode(*arguments)
    (tmp_path / "program").write_bytes(exported(*arguments, platform="cpu").serialize())
    # NumPy's files know no bfloat16: as plain bits.
    leaves = [np.asarray(x).view(f"u{x.dtype.itemsize}") for x in jax.tree.leaves(arguments)]
    np.savez(tmp_path / "in.npz", *leaves)
    command = [sys.executable, "-c", RUN, *(str(tmp_path / name) for name in ("program", "in.npz", "out.npz"))]
    # Elsewhere than the checkout, whose package folder may lack the native module.
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "out.npz") as got:
        np.testing.assert_array_equal(got["tokens"], want.tokens)
        np.testing.assert_array_equal(got["log_probs"], want.log_probs)
        np.testing.assert_array_equal(got["position"], want.state.position)


PLATFORMS = [("cpu", 2), ("cuda", 132), ("rocm", 304)]


@functools.cache
def gpu_or_cpu(platform: str, units: int):
    """A plan, and a decode exported with it where there need be no such device."""
    plan = make_plan(SPEC, platform=platform, units=units)
    tape = jax.eval_shape(lambda w: pack(SPEC, w, plan), weights_of(SPEC))
    return plan, exported(tape, state_of(SPEC), mixed_params(SPEC, 3), platform=platform)


@pytest.mark.parametrize(("platform", "units"), PLATFORMS)
def test_the_custom_call_is_complete_on_every_platform(platform, units):
    plan, exported_ = gpu_or_cpu(platform, units)
    tape = jax.eval_shape(lambda w: pack(SPEC, w, plan), weights_of(SPEC))
    assert exported_.platforms == (platform,)
    (call,) = re.findall(rf"^.*custom_call @{TARGET}\(.*$", exported_.mlir_module(), re.MULTILINE)
    assert "backend_config = {floats = " in call  # attributes by name, not a string
    for name in ("ints", "floats", "layers", "ropes", "tiles"):
        assert re.search(rf"\b{name} = dense<", call), name
    assert f"tensor<{len(SPEC.layers) * 2}xi64>" in call
    assert f"tensor<{5 * units * 3}xi64>" in call  # tiles of every phase and unit
    operands, results = re.search(r" : \((tensor.*)\) -> \((tensor.*)\)", call).groups()
    operands, results = (re.findall(r"tensor<(\S*?)>", types) for types in (operands, results))
    cache = "3x2x2x40x8xbf16"
    assert operands == [
        f"{'x'.join(map(str, tape.streams.shape))}xbf16",
        f"{tape.constants.shape[0]}xf32",
        "37x20xbf16",
        *["3xf32", "3xi32", "3xf32", "3xf32", "3xf32", "3xf32", "3xi32"],
        *["3x2xi32", "3x37xf32", "3x2xui32"],
        *[cache, cache, "3xi32", "3xi32", "3xi32", "3x37xui8"],
    ]
    workspace = results[9:]
    assert results[:9] == ["3x16xi32", "3xi32", "3x16xf32", cache, cache, "3xi32", "3xi32", "3xi32", "3x37xui8"]
    if platform == "cpu":
        assert workspace == []
    else:
        assert re.fullmatch(r"\d+xui8", *workspace)
        assert re.search(r"\bsplits = 1 : i64", call)
        assert re.search(r"\btask_heads = 1 : i64", call)
    aliases = re.findall(r"output_tuple_indices = \[(\d+)\], operand_index = (\d+)", call)
    assert [(int(result), int(operand)) for result, operand in aliases] == [(3 + i, 13 + i) for i in range(6)]
    for name, types in (("operand_layouts", operands), ("result_layouts", results)):
        layouts = re.findall(
            r"dense<\[?([\d, ]+)\]?> : tensor<(\d+)xindex>", re.search(rf"{name} = \[(.*?)\](?:,|}})", call)[1]
        )
        ranks = [len(shape.split("x")) - 1 for shape in types]
        assert [int(rank) for _, rank in layouts] == ranks
        assert [order for order, _ in layouts] == [", ".join(map(str, reversed(range(rank)))) for rank in ranks]


@pytest.mark.parametrize(("platform", "units"), PLATFORMS)
def test_the_program_says_what_spec_and_plan_say(platform, units):
    plan, exported_ = gpu_or_cpu(platform, units)
    with mlir.make_ir_context():
        module, calls = ir.Module.parse(exported_.mlir_module()), []

        def visit(operation):
            if (
                operation.name == "stablehlo.custom_call"
                and ir.StringAttr(operation.attributes["call_target_name"]).value == TARGET
            ):
                calls.append(operation)
            return ir.WalkResult.ADVANCE

        module.operation.walk(visit)
        (call,) = calls
        attributes = {a.name: a.attr for a in call.attributes["mhlo.backend_config"]}
        want = program(SPEC, plan) | ({} if platform == "cpu" else {"splits": 1, "task_heads": 1})
        assert sorted(attributes) == sorted(want)
        for name, value in want.items():
            got = (
                np.array(attributes[name]) if isinstance(value, np.ndarray) else ir.IntegerAttr(attributes[name]).value
            )
            np.testing.assert_array_equal(np.ravel(got), np.ravel(value), err_msg=name)
            assert np.asarray(got).dtype == np.asarray(value).dtype, name


@pytest.mark.parametrize("platform", ["cpu", "cuda", "rocm"])
def test_the_program_names_nothing_of_this_machine(platform):
    plan = make_plan(SPEC, platform=platform, units=5)
    tape = jax.eval_shape(lambda w: pack(SPEC, w, plan), weights_of(SPEC))
    artifact = bytes(exported(tape, state_of(SPEC), mixed_params(SPEC, 3), platform=platform).serialize())
    assert TARGET.encode() in artifact
    for folder in (REPOSITORY, Path(sys.prefix), Path(jax.__file__).parents[1], Path.home()):
        if len(folder.parts) > 1:
            assert str(folder).encode() not in artifact
    for name in (socket.gethostname(), getpass.getuser()):
        if len(name) > 4:
            assert name.encode() not in artifact
    # Nor any other path.
    assert re.findall(rb"(?<![\w)>\]])/(?:[\w.-]+/)+[\w.-]+", artifact) == []


def test_the_artifact_for_rocm_gives_the_reference_s_tokens(rocm_stand_in):
    """The program as it was exported, on stand-ins for HIP: all that is changed is the name by which XLA finds it."""
    spec = spec_of("windows")
    arguments = (
        jax.tree.map(jnp.asarray, gpu_tape_of(spec, gpu_plan(spec, 64, 3))),
        state_of(spec),
        mixed_params(spec, 3),
    )
    artifact = bytes(exported(*arguments, platform="rocm", anywhere=True).serialize())
    other = TARGET[:-1] + "9"
    jax.ffi.register_ffi_target(other, _native.gpu_test_registrations()["ROCM"][TARGET], platform="cpu")
    result = export.deserialize(bytearray(artifact.replace(TARGET.encode(), other.encode()))).call(*arguments)
    assert_same_decode(result, reference_of_mixed(spec), spec, arguments[1])


def test_without_the_safety_check_disabled_jax_says_so():
    with pytest.raises(ValueError, match=f"no compatibility guarantees[\\s\\S]*{TARGET}"):
        export.export(jax.jit(lambda *operands: decode_any(*operands, max_new_tokens=4)))(
            tape_of(SPEC, 2), state_of(SPEC), mixed_params(SPEC, 3)
        )
