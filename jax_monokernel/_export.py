"""Decodes as programs for other processes: `export_program`, and what `jax.export` needs for tapes and states."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

from jax import export, stages
from jax.extend import mlir
from jax.extend.mlir import passmanager
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters.mlir import make_ir_context

from jax_monokernel.decode import TARGET
from jax_monokernel.plan import Plan
from jax_monokernel.sampling import SamplingParams
from jax_monokernel.spec import DecoderSpec, LayerSpec, RopeSpec
from jax_monokernel.state import DecodeResult, DecodeState
from jax_monokernel.tape import Tape


def export_program(
    function: stages.Wrapped,
    *,
    platforms: Sequence[str] | None = None,
    disabled_checks: Sequence[export.DisabledSafetyCheck] = (),
) -> Callable[..., export.Exported]:
    """`jax.export.export` of a function that decodes, with `decode`'s call allowed and without what names this machine.

    JAX notes the source file and line of each operation in a program, with the folders of the machine that exports.
    These notes are left out, whatever JAX's own options for them say.

    Args:
      function: what `jax.jit` gave.
      platforms: as `jax.export.export`: names such as "cpu", "cuda" and "rocm"; by default that of this process.
      disabled_checks: as `jax.export.export`; that for `decode`'s custom call is always among them.

    Returns:
      What takes the function's arguments, or their shapes, and gives the `jax.export.Exported` to serialize or call.

    Raises:
      ValueError: as `jax.export.export` does, such as for other custom calls without guarantees.
    """
    checks = [export.DisabledSafetyCheck.custom_call(TARGET), *disabled_checks]
    made = export.export(function, platforms=platforms, disabled_checks=checks)
    return lambda *args, **kwargs: _without_locations(made(*args, **kwargs))


def _without_locations(exported: export.Exported) -> export.Exported:
    version = stablehlo.get_version_from_compatibility_requirement(stablehlo.StablehloCompatibilityRequirement.WEEK_4)
    with make_ir_context() as context:
        module = mlir.deserialize_portable_artifact(exported.mlir_module_serialized, context)
        passmanager.PassManager.parse("builtin.module(strip-debuginfo)").run(module.operation)
        text = mlir.serialize_portable_artifact(module, version, True)
    return dataclasses.replace(exported, mlir_module_serialized=text)


def _tape_to_json(static: Any) -> bytes:
    spec, plan, layout_version = static
    return json.dumps([dataclasses.asdict(spec), dataclasses.asdict(plan), layout_version]).encode()


def _tape_from_json(text: bytes) -> tuple[DecoderSpec, Plan, int]:
    spec, plan, layout_version = json.loads(text)
    # JSON has no tuples.
    ropes: list[dict[str, Any]] = [
        {k: tuple(v) if isinstance(v, list) else v for k, v in rope.items()} for rope in spec["ropes"]
    ]
    spec |= {
        "layers": tuple(LayerSpec(**layer) for layer in spec["layers"]),
        "ropes": tuple(RopeSpec(**rope) for rope in ropes),
    }
    return DecoderSpec(**spec), Plan(**plan), layout_version


export.register_pytree_node_serialization(
    Tape,
    serialized_name="jax_monokernel.Tape",
    serialize_auxdata=_tape_to_json,
    deserialize_auxdata=_tape_from_json,
)
for _kind in (DecodeState, SamplingParams, DecodeResult):
    export.register_pytree_node_serialization(
        _kind,
        serialized_name=f"jax_monokernel.{_kind.__name__}",
        serialize_auxdata=lambda static: b"",
        deserialize_auxdata=lambda text: (),
    )
