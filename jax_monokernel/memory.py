"""What a model takes in memory, by what it is for."""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import Any

import jax
import jax.numpy as jnp

from jax_monokernel import _native
from jax_monokernel._gpu import call_attributes
from jax_monokernel._program import program
from jax_monokernel.plan import Plan, make_plan
from jax_monokernel.prepared import Prepared, prepared_for
from jax_monokernel.protocol import DecoderModel
from jax_monokernel.spec import DecoderSpec
from jax_monokernel.state import DecodeState
from jax_monokernel.weights import weight_shapes


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryReport:
    """Bytes. An array that serves two purposes counts for the first."""

    checkpoint: int  # one copy of all weights, to compare with; not memory that is held
    parameters: int  # of the model itself, as far as they are not its weights by role
    weights: int  # by role, for prefill
    tape: int  # packed, for decode; 0 before the first generate
    kv_cache: int  # of the state that was given, or that a call makes
    workspace: int  # the GPU kernel's buffers for a call; on CPUs 0: threads keep their own scratch of about a megabyte

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.weights + self.tape + self.kv_cache + self.workspace

    @property
    def copies(self) -> float:
        """How often the weights are held."""
        return (self.parameters + self.weights + self.tape) / self.checkpoint

    def __str__(self) -> str:
        rows = {
            "parameters of the model": self.parameters,
            "weights by role (prefill)": self.weights,
            "tape (decode)": self.tape,
            "KV cache": self.kv_cache,
            "workspace": self.workspace,
            "total": self.total,
        }
        lines = [f"{name:26}{value / 1e6:12,.1f} MB" for name, value in rows.items()]
        return "\n".join([*lines, f"weights are held {self.copies:.2f} times ({self.checkpoint / 1e6:,.1f} MB once)"])


def memory_report(
    model: DecoderModel | Prepared, state: DecodeState | None = None, *, batch: int = 1, capacity: int = 2048
) -> MemoryReport:
    """What a model and a state take. Packs nothing.

    Args:
      model: a model, or what `prepare` made of one. Of the latter, what it holds itself: a model that still lives
        besides has its own.
      state: requests in flight; by default what a call with `batch` and `capacity` would make.
      batch: requests, where there is no state.
      capacity: tokens that each of them can hold, where there is no state.

    Raises:
      ValueError: not a model, or batch or capacity below 1.
    """
    if state is not None:
        batch, capacity = state.batch, state.capacity
    if batch < 1 or capacity < 1:
        raise ValueError(f"batch and capacity must be at least 1, got {batch} and {capacity}")
    ready = prepared_for(model)
    packed, spec = ready.packed, ready.spec
    seen: set[int] = set()

    def count(tree: Any) -> int:
        leaves = {id(leaf): leaf.nbytes for leaf in jax.tree.leaves(tree) if id(leaf) not in seen}
        seen.update(leaves)
        return sum(leaves.values())

    weights = count(packed.weights)
    tape = count(packed.tape_if_packed)
    nnx = sys.modules.get("flax.nnx")
    parameters = count(nnx.state(model, nnx.Param)) if nnx is not None and isinstance(model, nnx.Module) else 0
    kv_cache = 2 * batch * spec.num_layers * spec.kv_size * capacity * jnp.dtype(spec.kv_dtype).itemsize
    plan = packed.plan or make_plan(spec)
    placed = packed.tape_if_packed is not None and packed.tape_if_packed.pages is not None
    return MemoryReport(
        checkpoint=sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(weight_shapes(spec))),
        parameters=parameters,
        weights=weights,
        tape=tape,
        kv_cache=kv_cache,
        workspace=_workspace(spec, plan, batch, capacity, placed),
    )


def _workspace(spec: DecoderSpec, plan: Plan, batch: int, capacity: int, placed: bool) -> int:
    if plan.platform == "cpu":
        return 0
    largest = min(batch, _native.MAX_BATCH)  # larger batches are split into calls
    attributes: dict[str, Any] = program(spec, plan)
    tasks = call_attributes(spec, plan, largest, capacity)
    return _native.gpu_workspace_bytes(**attributes, batch=largest, placed=placed, **tasks)
