"""A short decode of small random models on one backend, compared with the reference: `jax-monokernel doctor`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_monokernel.decode import decode
from jax_monokernel.plan import Platform, make_plan
from jax_monokernel.reference import decode_reference
from jax_monokernel.sampling import SamplingParams
from jax_monokernel.spec import DecoderSpec, LayerSpec, RopeSpec
from jax_monokernel.state import DecodeResult, DecodeState, empty_state
from jax_monokernel.tape import pack
from jax_monokernel.weights import DecoderWeights, weight_shapes

_TOKENS = 12
_CAPACITY = 32
_POSITIONS = (0, 6, 15)
_SIZES: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "ropes": (RopeSpec(theta=1e4, rotary_dim=16),),
}
SPECS = {
    "f32, windows and biases": DecoderSpec(
        **_SIZES, layers=(LayerSpec(window=5), LayerSpec()), qkv_bias=True, qk_norm="head", dtype="float32"
    ),
    "bf16, as most models are": DecoderSpec(**_SIZES, layers=(LayerSpec(),) * 2, tied_head=True, dtype="bfloat16"),
}
# Of a log-probability, up to the first token that differs: then two tokens were equally likely up to rounding.
_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.15}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of one model on one backend."""

    model: str  # of SPECS
    problem: str  # "" if the backend agrees with the reference
    seconds: float  # compiling included


def run(platform: Platform, device: jax.Device, units: int | None = None, groups: int = 1) -> list[Outcome]:
    """Decodes each model with the backend of `platform` on `device`; what is raised is the problem.

    Args:
      platform: cpu, cuda or rocm.
      device: where JAX puts the arrays.
      units: of the plan; by default as `make_plan` chooses.
      groups: of units that the device has, in which one model is decoded once more; 1: not.
    """
    outcomes = []
    cases: list[tuple[str, DecoderSpec, int | None]] = [(model, spec, None) for model, spec in SPECS.items()]
    if groups > 1:
        model, spec, _ = cases[-1]
        cases.append((f"{model}, {groups} groups of units", spec, groups))
    for model, spec, of_plan in cases:
        start = time.perf_counter()
        try:
            problem = _difference(spec, _decode(spec, platform, device, units, of_plan), _reference(spec, device))
        except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
            problem = str(error)
        outcomes.append(Outcome(model, problem, time.perf_counter() - start))
    return outcomes


def _weights(spec: DecoderSpec) -> DecoderWeights:
    rng = np.random.default_rng(1)

    def values(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        scale = 1.0 if len(leaf.shape) < 2 else 2.0 / np.sqrt(leaf.shape[-1])
        return (scale * rng.standard_normal(leaf.shape, np.float32)).astype(leaf.dtype)

    return jax.tree.map(values, weight_shapes(spec))


def _request(spec: DecoderSpec) -> tuple[DecodeState, SamplingParams]:
    """Three requests in mid-flight: greedy, filtered, and penalised."""
    rng = np.random.default_rng(2)
    batch = len(_POSITIONS)
    state = empty_state(spec, batch=batch, capacity=_CAPACITY, key=jax.random.key(3))
    caches = rng.standard_normal((2, *state.k_cache.shape), np.float32)
    state = dataclasses.replace(
        state,
        k_cache=jnp.asarray(caches[0], spec.kv_dtype),
        v_cache=jnp.asarray(caches[1], spec.kv_dtype),
        position=jnp.asarray(_POSITIONS, jnp.int32),
        last_token=jnp.asarray(rng.integers(0, spec.vocab_size, batch), jnp.int32),
    )
    params = SamplingParams(
        temperature=jnp.asarray([0.0, 0.9, 1.2], jnp.float32),
        top_k=jnp.asarray([0, 20, 0], jnp.int32),
        top_p=jnp.asarray([1.0, 0.95, 1.0], jnp.float32),
        min_p=jnp.asarray([0.0, 0.0, 0.02], jnp.float32),
        repetition_penalty=jnp.asarray([1.0, 1.0, 1.3], jnp.float32),
        presence_penalty=jnp.asarray([0.0, 0.0, 0.4], jnp.float32),
        max_new_tokens=jnp.full(batch, _TOKENS, jnp.int32),
        eos_token_id=jnp.full((batch, 1), -1, jnp.int32),
        logit_bias=None,
    )
    return state, params


def _decode(
    spec: DecoderSpec, platform: Platform, device: jax.Device, units: int | None, groups: int | None
) -> DecodeResult:
    plan = make_plan(spec, platform=platform, units=units, groups=groups)
    with jax.default_device(device):
        tape = pack(spec, jax.tree.map(jnp.asarray, _weights(spec)), plan)
        run = jax.jit(functools.partial(decode, max_new_tokens=_TOKENS, return_log_probs=True))
        return jax.block_until_ready(run(tape, *_request(spec)))


@functools.cache
def _reference(spec: DecoderSpec, device: jax.Device) -> DecodeResult:
    with contextlib.suppress(RuntimeError):  # JAX_PLATFORMS may leave CPUs out
        device = jax.local_devices(backend="cpu")[0]
    with jax.default_device(device):
        run = jax.jit(
            functools.partial(decode_reference, spec, max_new_tokens=_TOKENS, return_log_probs=True),
            compiler_options={"xla_backend_optimization_level": 0},
        )
        return jax.block_until_ready(run(jax.tree.map(jnp.asarray, _weights(spec)), *_request(spec)))


def _difference(spec: DecoderSpec, got: DecodeResult, want: DecodeResult) -> str:
    """What is wrong, or ""."""
    tokens, expected = np.asarray(got.tokens), np.asarray(want.tokens)
    for row in range(len(_POSITIONS)):
        differs = np.flatnonzero(tokens[row] != expected[row])
        first = int(differs[0]) if differs.size else _TOKENS - 1
        a, b = (np.asarray(x.log_probs)[row, : first + 1] for x in (got, want))
        error = np.max(np.abs(a - b))
        if not error <= _TOLERANCE[spec.dtype]:  # NaN too
            return (
                f"request {row} has tokens {tokens[row].tolist()} where the reference has {expected[row].tolist()}; "
                f"log-probabilities differ by {error:.2g}"
            )
    return ""
