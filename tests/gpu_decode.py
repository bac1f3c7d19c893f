"""decode with the GPU kernel's source on this CPU: a call as jax_monokernel.decode takes it, run by gpu_host."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_host
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding import numpy_in_place_of_jax, weights_of

from jax_monokernel import DecoderSpec, DecoderWeights, DecodeState, SamplingParams, _gpu_tape, _native
from jax_monokernel._program import program
from jax_monokernel.plan import Plan
from jax_monokernel.state import DecodeResult
from jax_monokernel.tape import Tape, pack

_WORKSPACE = 'extern const __attribute__((visibility("default"))) mk::Workspace mk_workspace{mk::kWorkspace};\n'


def gpu_plan(spec: DecoderSpec, wave_size: int, units: int, **options: int) -> Plan:
    """A plan with small units, so that there are not too many lanes."""
    defaults = {"waves": 2, "service_waves": 2, "chunk_atoms": 4, "segment_tiles": 2}
    return Plan(platform="cuda" if wave_size == 32 else "rocm", units=units, wave_size=wave_size, **defaults | options)


@functools.cache
def gpu_tape_of(spec: DecoderSpec, plan: Plan) -> Tape:
    return gpu_pack(spec, weights_of(spec), plan)


def gpu_pack(spec: DecoderSpec, weights: DecoderWeights, plan: Plan) -> Tape:
    """`pack` without compiling anything."""
    with pytest.MonkeyPatch.context() as patch, numpy_in_place_of_jax():
        patch.setattr(_gpu_tape, "jnp", np)
        return pack(spec, jax.tree.map(np.asarray, weights), plan)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What a kernel is compiled for."""

    spec: DecoderSpec
    plan: Plan
    batch: int
    splits: int = 1
    task_heads: int = 1
    shared_bytes: int = 96 * 1024
    sanitize: bool = False
    source: Path = gpu_host.KERNEL
    near: bool = False
    placed: bool = False
    defines: tuple[tuple[str, int], ...] = ()  # of what config.h would choose otherwise

    @functools.cached_property
    def library(self) -> Path:
        stub = _native.gpu_stub(
            **program(self.spec, self.plan),
            batch=self.batch,
            splits=self.splits,
            task_heads=self.task_heads,
            shared_bytes=self.shared_bytes,
            near=self.near,
            placed=self.placed,
        )
        stub = "".join(f"#define {name} {value}\n" for name, value in self.defines) + stub
        return gpu_host.build(stub + _WORKSPACE, sanitize=self.sanitize, kernel=self.source)

    @functools.cached_property
    def workspace(self) -> dict[str, int]:
        """mk::Workspace: where things lie."""
        text = (self.source / "layout" / "workspace.h").read_text()
        names = re.findall(r"^  i64 (\w+);", text[text.index("struct Workspace {") :], re.MULTILINE)
        values = (ctypes.c_int64 * len(names)).in_dll(ctypes.CDLL(str(self.library)), "mk_workspace")
        return dict(zip(names, values, strict=True))


def decode_on_host(
    kernel: Kernel,
    state: DecodeState,
    sampling: SamplingParams,
    max_new_tokens: int,
    *,
    tape: Tape | None = None,
    return_log_probs: bool = True,
    timeout_ticks: int = 3_000_000,
    run: Callable[..., Any] = gpu_host.run,
    **options,
) -> tuple[DecodeResult, Any]:
    """What decode returns, and how the run went.

    Args:
      kernel: what runs.
      state, sampling, max_new_tokens, return_log_probs: as for decode.
      tape: by default, one with the random weights of this spec.
      timeout_ticks: steps of the executor that a token may take.
      run: what takes the kernel and its operands, and says how it went.
      options: of `run`.
    """
    spec, batch = kernel.spec, state.batch
    tape = gpu_tape_of(spec, kernel.plan) if tape is None else tape
    workspace = kernel.workspace
    carried = {
        name: np.array(getattr(state, name))
        for name in ("k_cache", "v_cache", "position", "last_token", "status", "seen")
    }
    fresh = {
        "tokens": np.full((batch, max_new_tokens), 77, np.int32),
        "lengths": np.full(batch, 77, np.int32),
        "log_probs": np.full((batch, max_new_tokens), np.nan, np.float32) if return_log_probs else None,
    }
    operands = {
        "streams": np.asarray(tape.streams),
        "constants": np.asarray(tape.constants),
        "embedding": None if spec.tied_head else np.asarray(tape.embedding),
        "pages": None if tape.pages is None else np.asarray(tape.pages),
        "die_units": None if tape.die_units is None else np.asarray(tape.die_units),
        "row_max_new_tokens": np.asarray(sampling.max_new_tokens),
        "logit_bias": None if sampling.logit_bias is None else np.asarray(sampling.logit_bias),
        "key_data": np.asarray(state.key_data),
        "workspace": np.zeros(workspace["bytes"], np.uint8),
        "capacity": state.capacity,
        "max_new_tokens": max_new_tokens,
        "eos_count": sampling.eos_token_id.shape[1],
        "timeout_ticks": timeout_ticks,
    }
    for name in (
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "eos_token_id",
    ):
        operands[name] = np.asarray(getattr(sampling, name))
    done = run(kernel.library, operands | carried | fresh, exchange_bytes=workspace["exchange_bytes"], **options)
    result = DecodeResult(
        **{name: None if x is None else jnp.asarray(x) for name, x in fresh.items()},
        state=dataclasses.replace(state, **{name: jnp.asarray(x) for name, x in carried.items()}),
    )
    return result, done
