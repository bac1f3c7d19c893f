"""jax.export: a program that carries the whole decode, to run elsewhere or on another platform."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from decoding import STEPS, decode, mixed_params, spec_of, state_of, tape_of, weights_of
from jax import export

from jax_monokernel import make_plan, pack
from jax_monokernel.decode import TARGET
from jax_monokernel.decode import decode as decode_any

REPOSITORY = Path(__file__).parents[1]
SPEC = spec_of("longrope", "bfloat16")


def exported(tape, *operands, platform: str) -> export.Exported:
    return export.export(
        jax.jit(
            lambda tape, state, params: decode_any(tape, state, params, max_new_tokens=STEPS, return_log_probs=True),
            donate_argnums=1,
        ),
        platforms=[platform],
        disabled_checks=[export.DisabledSafetyCheck.custom_call(TARGET)],
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


@pytest.mark.parametrize(("platform", "units"), [("cpu", 2), ("cuda", 132), ("rocm", 304)])
def test_the_custom_call_is_complete_on_every_platform(platform, units):
    plan = make_plan(SPEC, platform=platform, units=units)
    tape = jax.eval_shape(lambda w: pack(SPEC, w, plan), weights_of(SPEC))
    program = exported(tape, state_of(SPEC), mixed_params(SPEC, 3), platform=platform)
    assert program.platforms == (platform,)
    (call,) = re.findall(rf"^.*custom_call @{TARGET}\(.*$", program.mlir_module(), re.MULTILINE)
    assert "backend_config = {floats = " in call  # attributes by name, not a string
    for name in ("ints", "floats", "layers", "ropes", "tiles"):
        assert re.search(rf"\b{name} = dense<", call), name
    assert f"tensor<{len(SPEC.layers) * 2}xi64>" in call
    assert f"tensor<{5 * units * 3}xi64>" in call  # tiles of every phase and unit
    operands, results = re.search(r" : \((tensor.*)\) -> \((tensor.*)\)", call).groups()
    operands, results = (re.findall(r"tensor<(\S*?)>", types) for types in (operands, results))
    cache = "3x2x2x40x8xbf16"
    assert operands == [
        f"{units}x{tape.streams.shape[1]}xbf16",
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


def test_the_program_names_nothing_of_this_machine():
    arguments = tape_of(SPEC, 2), state_of(SPEC), mixed_params(SPEC, 3)
    # Debug locations are JAX's own; this is its option to leave folders out of them.
    option = "jax_hlo_source_file_canonicalization_regex"
    before = getattr(jax.config, option)
    jax.config.update(option, ".*/")
    try:
        program = bytes(exported(*arguments, platform="cpu").serialize())
    finally:
        jax.config.update(option, before)
    for folder in (REPOSITORY, Path(sys.prefix), Path(jax.__file__).parents[1], Path.home()):
        if len(folder.parts) > 1:
            assert str(folder).encode() not in program


def test_without_the_safety_check_disabled_jax_says_so():
    with pytest.raises(ValueError, match=f"no compatibility guarantees[\\s\\S]*{TARGET}"):
        export.export(jax.jit(lambda *operands: decode_any(*operands, max_new_tokens=4)))(
            tape_of(SPEC, 2), state_of(SPEC), mixed_params(SPEC, 3)
        )
