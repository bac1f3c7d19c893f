"""A spec and a plan as the attributes of the decode custom call (ffi/program.h has the field lists and the tables)."""

from __future__ import annotations

import functools

import numpy as np

from jax_monokernel import _native
from jax_monokernel.plan import PHASES, VECTOR_ROLES, Plan, geometry
from jax_monokernel.spec import DecoderSpec

_DTYPES = {"bfloat16": 0, "float16": 1, "float32": 2}
_PLATFORMS = {"cpu": 0, "cuda": 1, "rocm": 2}
_ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
_QK_NORMS = {None: 0, "head": 1, "full": 2}
_ROPE_SCALINGS = {"dynamic": 1, "longrope": 2}  # the others are tables of frequencies like any


@functools.lru_cache(maxsize=64)
def program(spec: DecoderSpec, plan: Plan) -> dict[str, np.ndarray]:
    """Attributes by name. The arrays are shared between callers: do not write to them."""
    geo = geometry(spec, plan)
    values = {name: getattr(spec, name) for name in _native.INT_FIELDS + _native.FLOAT_FIELDS if hasattr(spec, name)}
    values |= {name: getattr(geo, name) for name in _native.INT_FIELDS if hasattr(geo, name)}
    # k and v biases follow q's, which is the only one the native side looks up.
    values |= {role: geo.vector_offset[role] for role in VECTOR_ROLES if role not in ("k_bias", "v_bias")}
    values |= {
        "waves": plan.waves,
        "service_waves": plan.service_waves,
        "wave_size": plan.wave_size,
        "tile_rows": plan.tile_rows,
        "row_major_atom": plan.wave_size == 32,
        "segment_tiles": plan.segment_tiles,
        "platform": _PLATFORMS[plan.platform],
        "num_ropes": len(spec.ropes),
        "units": plan.units,
        "groups": plan.groups,
        "qk_norm": _QK_NORMS[spec.qk_norm],
        "activation": _ACTIVATIONS[spec.activation],
        "weight_dtype": _DTYPES[spec.dtype],
        "kv_dtype": _DTYPES[spec.kv_dtype or spec.dtype],
        "final_norm": geo.final_norm_offset,
        "inv_freq": geo.inv_freq_offset,
        "attn_softcap": spec.attn_softcap or 0.0,
        "logit_softcap": spec.logit_softcap or 0.0,
    }
    layers = [(la.window or 0, -1 if la.rope is None else la.rope) for la in spec.layers]
    ropes, row = [], 0
    for rope in spec.ropes:
        scaling = _ROPE_SCALINGS.get(rope.scaling, 0)
        ropes.append((scaling, rope.theta, rope.factor, rope.original_max_position, rope.attention_factor, row))
        row += 2 if rope.scaling == "longrope" else 1
    tiles = [
        (m.begin[u], m.begin[u + 1] - m.begin[u], m.offset[u])
        for m in (geo.matrices[phase] for phase in PHASES)
        for u in range(plan.units)
    ]
    return {
        "ints": np.array([int(values[name]) for name in _native.INT_FIELDS], np.int64),
        "floats": np.array([values[name] for name in _native.FLOAT_FIELDS], np.float32),
        "layers": np.array(layers, np.int64).reshape(-1),
        "ropes": np.array(ropes, np.float64).reshape(-1),
        "tiles": np.array(tiles, np.int64).reshape(-1),
    }
