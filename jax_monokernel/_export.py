"""Lets `jax.export` write down functions that take or give tapes, states, sampling parameters and results."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from jax import export

from jax_monokernel.plan import Plan
from jax_monokernel.sampling import SamplingParams
from jax_monokernel.spec import DecoderSpec, LayerSpec, RopeSpec
from jax_monokernel.state import DecodeResult, DecodeState
from jax_monokernel.tape import Tape


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
