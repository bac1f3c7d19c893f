"""Text or tokens in, text or tokens out: prefill and decode as one compiled call."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np

from jax_monokernel.decode import Backend, decode
from jax_monokernel.generation_config import GenerationConfig
from jax_monokernel.prefill import bucket, check_ids, check_room, is_continued
from jax_monokernel.prepared import Prepared, SourcePrefill, prepared_for
from jax_monokernel.prompts import Prompt, pad, token_rows
from jax_monokernel.protocol import DecoderModel
from jax_monokernel.reference import decode_reference
from jax_monokernel.sampling import SamplingParams, sampling_params
from jax_monokernel.spec import DecoderSpec
from jax_monokernel.state import (
    FULL,
    STOPPED,
    DecodeResult,
    DecodeState,
    check_key,
    check_state,
    empty_state,
    request_keys,
)
from jax_monokernel.tape import Tape, unpack
from jax_monokernel.weights import DecoderWeights, used_up

FinishReason = Literal["eos", "length", "capacity"]

# Options that change nothing unless tokens are drawn at random.
_SAMPLING_ONLY = ("temperature", "top_k", "top_p", "min_p")


@dataclasses.dataclass(frozen=True, eq=False)
class Generation:
    """What `generate` made, one row per prompt. The prompt is not part of it."""

    tokens: np.ndarray  # int32 [batch, max_new_tokens], -1 past a row's length
    lengths: np.ndarray  # int32 [batch], tokens made, an end-of-sequence token included
    log_probs: np.ndarray | None  # f32 [batch, max_new_tokens], 0 past a row's length; None if not asked for
    text: list[str] | None  # without special tokens; None if the model has no tokenizer
    finish_reasons: list[FinishReason]  # an end-of-sequence token, max_new_tokens, or the state's capacity
    state: DecodeState  # to go on from: generate(..., state=state) uses it up


def generate(
    model: DecoderModel | Prepared,
    prompt: Prompt | None = None,
    *,
    max_new_tokens: int | Sequence[int] | None = None,
    key: jax.Array | None = None,
    lengths: Sequence[int] | np.ndarray | jax.Array | None = None,
    config: GenerationConfig | None = None,
    state: DecodeState | None = None,
    capacity: int | None = None,
    return_log_probs: bool = False,
    backend: Backend | None = None,
    **options: Any,
) -> Generation:
    """Continues prompts.

    Prefill and decode run as one compiled function. It is compiled once per batch size, bucket of prompt lengths
    (powers of two) and bucket of max_new_tokens; prompts, options and keys are operands. Not for use inside jit: there,
    call `prefill` and `decode`.

    Args:
      model: a `Decoder`, any other `DecoderModel`, or what `prepare` made of one.
      prompt: a text, a list of texts, a list of lists of token ids, or an integer array [batch, tokens]. With `state`
        it may be None, to go on without a prompt, and single rows may be empty.
      max_new_tokens: at most so many tokens per prompt; one number or one per prompt. By default the config's.
      key: `jax.random.key(seed)` or one key per prompt; needed for sampling. The tokens of a prompt depend on its key
        and not on what else is in the batch. With `state` the keys in it are used unless a new one is given.
      lengths: with an array prompt, int [batch]: tokens of each row that count.
      config: options; by default all off (greedy). Where it has no eos_token_id the model's own is used.
      state: of an earlier result, to go on from: the new prompts are appended to what its rows hold. Its arrays are
        reused and cannot be read afterwards.
      capacity: tokens that each row of the state can hold, for a conversation that goes on later. By default enough for
        this call.
      return_log_probs: whether to return log-softmax of the raw logits at the chosen tokens.
      backend: "reference", or the platform that the tape is packed for, which is the default.
      **options: fields of `GenerationConfig`, which go before the config's. eos_token_id=() stops at no token.

    Raises:
      ValueError, TypeError: bad input, saying what was wrong and what was expected.
    """
    request = checked_request(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        key=key,
        lengths=lengths,
        config=config,
        state=state,
        capacity=capacity,
        return_log_probs=return_log_probs,
        backend=backend,
        options=options,
    )
    return request.generation(request.run())


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """What `generate` and `stream` were asked for, checked. Good for one call, as that uses up the state."""

    ready: Prepared
    tokens: np.ndarray  # int32 [batch, width], the prompts
    counts: np.ndarray  # int32 [batch], their lengths
    params: SamplingParams
    key: jax.Array | None  # None with a state, which has keys
    state: DecodeState | None
    capacity: int | None  # None with a state
    config: GenerationConfig
    return_log_probs: bool
    backend: Backend | None

    @property
    def batch(self) -> int:
        """Number of prompts."""
        return len(self.counts)

    @property
    def limit(self) -> int:
        """Tokens that a row may make, the most of all rows."""
        return int(np.max(self.config.max_new_tokens))

    @property
    def steps(self) -> int:
        """Width of the compiled call."""
        return bucket(self.limit)

    def row_limits(self) -> np.ndarray:
        """int [batch], tokens after which each row ends at the latest. To be asked before `run`."""
        if self.state is None:
            assert self.capacity is not None
            room = self.capacity - self.counts + 1
        else:
            position = np.asarray(self.state.position)
            held = position + np.asarray(_is_continued(self.state))
            # The last token of a prompt is not in the cache when decode begins.
            room = self.state.capacity - np.where(self.counts > 0, held + self.counts - 1, position)
        return np.minimum(np.broadcast_to(self.config.max_new_tokens, room.shape), room)

    def run(self, mailbox: np.ndarray | None = None) -> DecodeResult:
        """Prefill and decode. mailbox: as `decode` takes it."""
        reference = self.backend == "reference"
        return _run(
            self.ready.source,
            None if reference else self.ready.tape,
            self.tokens,
            self.counts,
            self.params,
            self.key,
            self.state,
            mailbox,
            spec=self.ready.spec,
            prefill=self.ready.prefill,
            capacity=self.capacity,
            max_new_tokens=self.steps,
            return_log_probs=self.return_log_probs,
            backend=self.backend,
        )

    def generation(self, result: DecodeResult) -> Generation:
        """The result for people."""
        return _generation(result, self.limit, self.ready)


def checked_request(
    model: DecoderModel | Prepared,
    prompt: Prompt | None,
    *,
    max_new_tokens: int | Sequence[int] | None,
    key: jax.Array | None,
    lengths: Sequence[int] | np.ndarray | jax.Array | None,
    config: GenerationConfig | None,
    state: DecodeState | None,
    capacity: int | None,
    return_log_probs: bool,
    backend: Backend | None,
    options: dict[str, Any],
) -> Request:
    """The arguments of `generate`, checked and in the form in which the compiled function takes them.

    Raises:
      ValueError, TypeError: bad input, saying what was wrong and what was expected.
    """
    config = merged_config(config, max_new_tokens, options)
    ready = prepared_for(model)
    spec = ready.spec
    if config.eos_token_id is None and "eos_token_id" not in options:
        config = dataclasses.replace(config, eos_token_id=ready.eos_token_id)

    continued = None
    if state is not None:
        _check_usable(spec, state, capacity)
        continued = np.asarray(_is_continued(state)).tolist()
        prompt = [[]] * state.batch if prompt is None else prompt
    if prompt is None:
        raise ValueError("there is neither a prompt nor a state to go on from")
    rows = token_rows(prompt, lengths, tokenizer=ready.tokenizer, continued=continued)
    for row in rows:
        check_ids(spec, row)
    tokens, counts = pad(rows)
    batch = len(rows)

    params = sampling_params(config, batch=batch, vocab_size=spec.vocab_size)
    limit = int(np.max(config.max_new_tokens))
    if state is None:
        key = checked_key(key, config)
        check_key(key, batch)
        capacity = tokens.shape[1] + bucket(limit) if capacity is None else capacity
        _check_capacity(capacity, counts)
    else:
        check_room(state, counts)
        if key is not None:
            state = dataclasses.replace(state, key_data=request_keys(checked_key(key, config), batch))

    return Request(
        ready=ready,
        tokens=tokens,
        counts=counts,
        params=params,
        key=key if state is None else None,
        state=state,
        capacity=capacity,
        config=config,
        return_log_probs=return_log_probs,
        backend=backend,
    )


@functools.partial(
    jax.jit,
    static_argnames=("spec", "prefill", "capacity", "max_new_tokens", "return_log_probs", "backend"),
    donate_argnames="state",
)
def _run(
    weights: DecoderWeights | Tape,
    tape: Tape | None,
    tokens: jax.Array,
    lengths: jax.Array,
    params: SamplingParams,
    key: jax.Array | None,
    state: DecodeState | None,
    mailbox: jax.Array | None,
    *,
    spec: DecoderSpec,
    prefill: SourcePrefill,
    capacity: int | None,
    max_new_tokens: int,
    return_log_probs: bool,
    backend: Backend | None,
) -> DecodeResult:
    if state is None:
        assert key is not None
        assert capacity is not None
        state = empty_state(spec, batch=tokens.shape[0], capacity=capacity, key=key)
    state = prefill(spec, weights, tokens, lengths, state)
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "return_log_probs": return_log_probs,
        "mailbox": mailbox,
    }
    if tape is None:
        # What decode would do after unpacking a tape.
        if isinstance(weights, Tape):
            weights = unpack(weights)
        return decode_reference(spec, weights, state, params, **options)
    return decode(tape, state, params, backend=backend, **options)


_is_continued = jax.jit(is_continued)


def _generation(result: DecodeResult, limit: int, ready: Prepared) -> Generation:
    tokens, lengths, status = (np.asarray(leaf) for leaf in (result.tokens, result.lengths, result.state.status))
    text = None
    if ready.tokenizer is not None:
        text = [ready.tokenizer.decode(row[:n].tolist()) for row, n in zip(tokens, lengths, strict=True)]
    reasons: dict[int, FinishReason] = {STOPPED: "eos", FULL: "capacity"}
    return Generation(
        tokens=tokens[:, :limit],
        lengths=lengths,
        log_probs=None if result.log_probs is None else np.asarray(result.log_probs)[:, :limit],
        text=text,
        finish_reasons=[reasons.get(s, "length") for s in status.tolist()],
        state=result.state,
    )


def merged_config(config: GenerationConfig | None, max_new_tokens: Any, options: dict[str, Any]) -> GenerationConfig:
    """The config with a call's own options, checked."""
    if config is None:
        config = GenerationConfig()
    if not isinstance(config, GenerationConfig):
        raise TypeError(f"config is {type(config).__name__}; expected a GenerationConfig")
    known = [field.name for field in dataclasses.fields(GenerationConfig)]
    for name in options:
        if name not in known:
            raise TypeError(f"generate has no option {name!r}; the options are {', '.join(known)}")
    if max_new_tokens is not None:
        options = options | {"max_new_tokens": max_new_tokens}
    config = dataclasses.replace(config, **options)
    if not np.any(config.do_sample):
        for name in _SAMPLING_ONLY:
            if name in options and np.any(getattr(config, name) != getattr(GenerationConfig, name)):
                if name == "temperature" and not np.any(config.temperature):
                    continue  # 0 asks for what happens
                raise ValueError(f"{name} changes nothing unless do_sample=True")
    return config


def checked_key(key: Any, config: GenerationConfig) -> jax.Array:
    """The key, or any where the config samples nothing. Raises ValueError for one that is missing or no key."""
    if key is None:
        if np.any(np.asarray(config.do_sample) & (np.asarray(config.temperature) > 0)):
            raise ValueError("sampling needs a key; pass key=jax.random.key(seed)")
        return jax.random.key(0, impl="threefry2x32")
    if not isinstance(key, jax.Array):
        raise ValueError(f"key is {type(key).__name__}; expected jax.random.key(seed)")
    return key


def _check_capacity(capacity: Any, lengths: np.ndarray) -> None:
    if not isinstance(capacity, int) or isinstance(capacity, bool) or capacity < 1:
        raise ValueError(f"capacity is {capacity!r}; expected a positive integer")
    for i, n in enumerate(lengths):
        if n > capacity:
            raise ValueError(f"row {i}'s prompt of {n} tokens is longer than the capacity of {capacity} tokens")


def _check_usable(spec: DecoderSpec, state: Any, capacity: int | None) -> None:
    if not isinstance(state, DecodeState):
        raise ValueError(f"state is {type(state).__name__}; expected the state of an earlier result")
    if capacity is not None:
        raise ValueError(f"capacity goes with a new state; the one that is given has room for {state.capacity} tokens")
    if used_up(state):
        raise ValueError(
            "the state was used up by an earlier call; to use one twice, copy it: jax.tree.map(jnp.copy, state)"
        )
    check_state(spec, state)
