"""The decode itself: every layer, LM head, sampling and stop check of every token, in one XLA custom call."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap

from jax_monokernel import _gpu, _native
from jax_monokernel._program import program
from jax_monokernel.mailbox import check_mailbox
from jax_monokernel.reference import decode_reference
from jax_monokernel.sampling import SamplingParams, check_sampling_params
from jax_monokernel.spec import DecoderSpec
from jax_monokernel.state import DecodeResult, DecodeState, check_state
from jax_monokernel.tape import Tape, check_layout, unpack
from jax_monokernel.weights import used_up

Backend = Literal["reference", "cpu", "cuda", "rocm"]

# The custom call's name, the same on every platform.
TARGET = "jax_monokernel_decode"

for _name, _capsule in _native.registrations().items():
    jax.ffi.register_ffi_target(_name, _capsule, platform="cpu")


def decode(
    tape: Tape,
    state: DecodeState,
    sampling: SamplingParams,
    *,
    max_new_tokens: int,
    return_log_probs: bool = False,
    backend: Backend | None = None,
    spec: DecoderSpec | None = None,
    mailbox: jax.Array | np.ndarray | None = None,
) -> DecodeResult:
    """Generates up to `max_new_tokens` tokens for every request of `state`.

    Pure; works under `jit`, `vmap` (folds into the batch), `shard_map` over the batch and `jax.export`. Under `jit`,
    donate `state` (`donate_argnames="state"`) and the KV cache is written in place. Decoding N tokens and then M more
    from the resulting state gives the same tokens as N + M at once.

    Args:
      tape: packed weights (`pack`), which carry the model's spec and the plan they were packed for.
      state: requests to go on with (`prefill`); those that are not RUNNING are left as they are.
      sampling: how tokens are chosen. Values are operands: changing them never recompiles.
      max_new_tokens: length of the result, static. `sampling.max_new_tokens` may stop requests earlier.
      return_log_probs: whether to compute the log-probability of each chosen token, static.
      backend: "reference" (plain JAX, the definition), or the platform that the tape's plan is for, which is the
        default.
      spec: not needed; if given, it must be the tape's.
      mailbox: int32 [batch, 2], where each request leaves its tokens while the call runs, for a reader in this process
        (`jax_monokernel.mailbox`; `stream` does all of it). An operand: another mailbox does not recompile. The reader
        can end the call, and so can `cancel`: it then returns the tokens until there and a state to go on from.

    Returns:
      Tokens int32 [batch, max_new_tokens], with -1 past the end of a request; their number, int32 [batch]; log-probs
      f32 [batch, max_new_tokens] or None; and the state to go on from, where `status` says which requests have stopped
      at an end-of-sequence token and which have run out of KV cache.

    Raises:
      ValueError: operands whose shapes do not fit together or that were donated before, a tape of another layout
        version, or a backend that the tape was not packed for.
      TypeError: max_new_tokens that is traced, or no integer.
    """
    if isinstance(max_new_tokens, jax.core.Tracer):
        raise TypeError(
            "max_new_tokens is being traced, but it is the length of the result: pass a Python int, under jit with "
            'static_argnames="max_new_tokens". sampling.max_new_tokens can stop requests earlier, and may be traced'
        )
    if not isinstance(max_new_tokens, int | np.integer) or isinstance(max_new_tokens, bool):
        raise TypeError(f"max_new_tokens is {max_new_tokens!r}; expected an integer of at least 1")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; expected at least 1")
    check_layout(tape)
    if spec is not None and spec != tape.spec:
        raise ValueError("spec is not the one that the tape was packed for; pack the weights again, or leave spec out")
    if backend is not None and backend not in get_args(Backend):
        raise ValueError(f"backend is {backend!r}; expected one of {get_args(Backend)}")
    if backend not in (None, "reference", tape.plan.platform):
        raise ValueError(f"the tape is packed for {tape.plan.platform}; {_how_to_pack(backend)}")
    check_state(tape.spec, state)
    check_sampling_params(sampling, batch=state.batch, vocab_size=tape.spec.vocab_size)
    for name, operand, remedy in (
        ("tape", tape, "use the one that took its memory over, or pack again"),
        ("state", state, "go on from the state of its result, or copy it before: jax.tree.map(jnp.copy, state)"),
    ):
        if used_up(operand):
            raise ValueError(f"the {name} was used up, by a call that it was donated to; {remedy}")
    if mailbox is not None:
        check_mailbox(mailbox, batch=state.batch)
        mailbox = jnp.asarray(mailbox)
    if backend == "reference":
        return decode_reference(
            tape.spec,
            unpack(tape),
            state,
            sampling,
            max_new_tokens=max_new_tokens,
            return_log_probs=return_log_probs,
            mailbox=mailbox,
        )
    return _batched(max_new_tokens, return_log_probs)(tape, state, sampling, mailbox)


def cancel() -> None:
    """Stops every decode that is running in this process; each raises an error within the time of one token.

    One that streams (`stream`, or a mailbox) returns what it has instead, and the stream raises the error.

    Ctrl-C does the same for decodes of a process whose SIGINT handler is Python's own.
    """
    _native.cancel()


def _how_to_pack(platform: str) -> str:
    """What to do for a decode on another platform than the tape's."""
    try:
        jax.local_devices(backend=platform)
    except RuntimeError:  # JAX knows no such platform, or has no device of it
        return f"JAX sees no {platform} device here (jax-monokernel doctor says what is missing)"
    return f"to decode on {platform}, prepare or pack with make_plan(spec, platform={platform!r})"


@functools.lru_cache(maxsize=256)
def _batched(max_new_tokens: int, return_log_probs: bool):
    """The custom call for any batch size, with a rule that folds vmap's axis into the batch."""

    @custom_vmap
    def run(tape: Tape, state: DecodeState, sampling: SamplingParams, mailbox: jax.Array | None) -> DecodeResult:
        parts = []
        for start in range(0, state.batch, _native.MAX_BATCH):
            rows = slice(start, start + _native.MAX_BATCH)
            part = (state, sampling, mailbox)
            if state.batch > _native.MAX_BATCH:
                part = jax.tree.map(lambda x, rows=rows: x[rows], part)
            parts.append(_call(tape, *part, max_new_tokens, return_log_probs))
        if len(parts) == 1:
            return parts[0]
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)

    @run.def_vmap
    def fold(axis_size, in_batched, tape, *operands):
        tape_batched, *batched = in_batched
        if any(jax.tree.leaves(tape_batched)):
            raise ValueError(
                "decode cannot be vmapped over weights: a tape is read once for all requests. Loop over the tapes "
                "instead"
            )

        def into_batch(x, batched):
            if not batched:
                x = jnp.broadcast_to(x, (axis_size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        folded = jax.tree.map(into_batch, operands, tuple(batched))
        result = run(tape, *folded)
        result = jax.tree.map(lambda x: x.reshape(axis_size, -1, *x.shape[1:]), result)
        return result, jax.tree.map(lambda _: True, result)

    return run


def _call(
    tape: Tape,
    state: DecodeState,
    sampling: SamplingParams,
    mailbox: jax.Array | None,
    max_new_tokens: int,
    return_log_probs: bool,
) -> DecodeResult:
    spec, batch = tape.spec, state.batch
    operands = {
        "streams": tape.streams,
        "constants": tape.constants,
        "embedding": jnp.zeros((0, 0), spec.dtype) if tape.embedding is None else tape.embedding,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "max_new_tokens": sampling.max_new_tokens,
        "eos_token_id": sampling.eos_token_id,
        "logit_bias": jnp.zeros((batch, 0), jnp.float32) if sampling.logit_bias is None else sampling.logit_bias,
        "key_data": state.key_data,
    }
    carried = {
        name: getattr(state, name) for name in ("k_cache", "v_cache", "position", "last_token", "status", "seen")
    }
    fresh = {
        "tokens": jax.ShapeDtypeStruct((batch, max_new_tokens), jnp.int32),
        "lengths": jax.ShapeDtypeStruct((batch,), jnp.int32),
        "log_probs": jax.ShapeDtypeStruct((batch, max_new_tokens if return_log_probs else 0), jnp.float32),
    }
    results = fresh | {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in carried.items()}
    aliases = {len(operands) + i: len(fresh) + i for i in range(len(carried))}
    attributes: dict[str, Any] = dict(program(spec, tape.plan))
    if tape.plan.platform != "cpu":
        _gpu.register()
        call_attributes = _gpu.call_attributes(spec, tape.plan, batch, state.capacity)
        placed = tape.pages is not None
        size = _native.gpu_workspace_bytes(**attributes, batch=batch, placed=placed, **call_attributes)
        results["workspace"] = jax.ShapeDtypeStruct((size,), jnp.uint8)
        attributes |= {name: np.int64(value) for name, value in call_attributes.items()}
    call = jax.ffi.ffi_call(TARGET, list(results.values()), input_output_aliases=aliases)
    # Last, so that calls without them are what they would be if there were no such thing.
    more = [x for x in (tape.pages, tape.die_units, mailbox) if x is not None]
    values = call(*itertools.chain(operands.values(), carried.values(), more), **attributes)
    out = dict(zip(results, values, strict=True))
    return DecodeResult(
        tokens=out["tokens"],
        lengths=out["lengths"],
        log_probs=out["log_probs"] if return_log_probs else None,
        state=dataclasses.replace(state, **{name: out[name] for name in carried}),
    )
