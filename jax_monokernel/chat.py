"""Conversations with a model: its own chat template, the KV cache kept from turn to turn, answers as they are made."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import time
import weakref
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jax_monokernel.chat_template import PLAIN, ChatTemplate
from jax_monokernel.decode import Backend
from jax_monokernel.generate import checked_key, merged_config
from jax_monokernel.prefill import check_ids
from jax_monokernel.prepared import Prepared, SourcePrefill, prepared_for
from jax_monokernel.prompts import pad
from jax_monokernel.protocol import DecoderModel
from jax_monokernel.sampling import sampling_params
from jax_monokernel.spec import DecoderSpec
from jax_monokernel.state import FULL, RUNNING, STOPPED, DecodeState, empty_state
from jax_monokernel.stop_strings import StopStrings
from jax_monokernel.tape import Tape
from jax_monokernel.tokenizer import text_stream
from jax_monokernel.weights import DecoderWeights

TurnEnd = Literal["eos", "stop", "length", "capacity", "interrupted"]


@dataclasses.dataclass(frozen=True)
class Piece:
    """A token of an answer and the text that it completes, which may be empty."""

    text: str
    token: int | None  # None: text that was held back until the end
    log_prob: float | None  # of the token, by the model's raw logits
    time: float  # seconds since the question


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turn:
    """What a question and its answer took."""

    text: str  # the answer
    finish_reason: TurnEnd  # an end-of-sequence token, a stop string, max_new_tokens, no room, or whoever read it
    conversation_tokens: int  # up to the answer
    prefilled_tokens: int  # of these, those that were not in the KV cache
    new_tokens: int  # decoded, those of a stop string included
    prefill_seconds: float
    decode_seconds: float  # by the time between tokens; compiling is in neither

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second of decoding; 0 where there were none."""
        return self.new_tokens / self.decode_seconds if self.decode_seconds else 0.0


class Chat:
    """A conversation.

    Each turn renders the whole conversation by the chat template and compares its tokens with those whose keys and
    values are in the cache: what they begin with in common stays, the rest is prefilled. So a turn costs its own
    tokens, and if something earlier has changed (an edited history, a template that drops an earlier turn's
    reasoning), the cache is taken back to where they part. Answers are those of `generate` for the whole
    conversation (but see `prefill` on rotary scalings that depend on the length).

    Weights are taken as they are now; for changed ones, make another Chat. Not for use by several threads at once.

    Attributes:
      history: the messages, dicts with "role" and "content", oldest first; may be changed between turns.
      last: what the last turn took; None before it.

    Args:
      model: what `generate` takes, with a tokenizer.
      system: the first message, which tells the model how to answer.
      max_new_tokens: at most so many per answer.
      capacity: tokens that the KV cache can hold, of the whole conversation.
      stop: texts before which an answer ends.
      template: how messages become text: a `ChatTemplate`, one in Jinja, or "plain" for models that know no
        conversations: the messages' texts, one after the other. By default the checkpoint's own.
      template_variables: what the template can read besides, for example {"enable_thinking": False}.
      key: `jax.random.key(seed)`, for sampling.
      backend: as in `generate`.
      **options: fields of `GenerationConfig`.

    Raises:
      ValueError, TypeError: bad input; a model without a tokenizer or chat template.
    """

    def __init__(
        self,
        model: DecoderModel | Prepared,
        *,
        system: str | None = None,
        max_new_tokens: int = 512,
        capacity: int = 4096,
        stop: str | Sequence[str] = (),
        template: ChatTemplate | str | None = None,
        template_variables: Mapping[str, Any] | None = None,
        key: jax.Array | None = None,
        backend: Backend | None = None,
        **options: Any,
    ):
        self._ready = prepared_for(model)
        self._config = merged_config(None, max_new_tokens, options)
        if self._config.eos_token_id is None and "eos_token_id" not in options:
            self._config = dataclasses.replace(self._config, eos_token_id=self._ready.eos_token_id)
        sampling_params(self._config, batch=1, vocab_size=self._ready.spec.vocab_size)  # looks at the options
        if self._ready.tokenizer is None:
            raise ValueError("the model has no tokenizer, so it cannot be talked to; generate takes token ids")
        self._tokenizer = self._ready.tokenizer
        self._template = _chosen_template(template, self._tokenizer)
        self._variables = dict(template_variables or {})
        self._stop = StopStrings.checked(stop)
        self._key = checked_key(key, self._config)
        if not isinstance(capacity, int) or isinstance(capacity, bool) or capacity < 1:
            raise ValueError(f"capacity is {capacity!r}; expected a positive integer")
        self._capacity = capacity
        self._backend = backend
        self._state: DecodeState | None = None
        self._held: list[int] = []  # tokens whose keys and values are in the cache, and after them the last one
        self._widths: set[int] = set()  # of prompts that prefill is compiled for
        self._answering: weakref.ref[Generator[Piece, None, None]] | None = None
        self.history: list[dict[str, Any]] = []
        self.last: Turn | None = None
        self.system = system

    @property
    def system(self) -> str | None:
        """The system message. A new one counts from the next turn on."""
        first = self.history[0] if self.history else {}
        return first.get("content") if first.get("role") == "system" else None

    @system.setter
    def system(self, text: str | None) -> None:
        messages = [m for m in self.history if m.get("role") != "system"]
        if text is not None:
            messages.insert(0, _message("system", text))
        self.history[:] = messages

    @property
    def prepared(self) -> Prepared:
        """The model as it is used here."""
        return self._ready

    @property
    def cached_tokens(self) -> list[int]:
        """The tokens in the KV cache, and after them the one whose keys and values come next."""
        return [] if self._state is None else list(self._held)

    def send(self, text: str) -> Iterator[Piece]:
        """The answer to a message, piece by piece.

        The message and what was said of the answer become part of the history as soon as the pieces end, also if
        whoever reads them stops early. If nothing had been said by then, the history stays as it was.

        Raises:
          ValueError: not a text, a conversation that the template refuses, or one that has become too long for the
            capacity.
        """
        self._finish()
        message = _message("user", text)
        answer = self._answer(message, self._encoded([*self.history, message]))
        # Weak, so that an answer ends when whoever reads it leaves the loop.
        self._answering = weakref.ref(answer)
        return answer

    def ask(self, text: str) -> str:
        """The whole answer to a message. Arguments and errors are those of `send`."""
        return "".join(piece.text for piece in self.send(text))

    def reset(self) -> None:
        """Forgets the conversation but not the system message."""
        system = self.system
        self._finish()
        self.history.clear()
        self.system = system

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the history as JSON: a list of messages."""
        path = Path(path)
        text = json.dumps(self.history, ensure_ascii=False, indent=1)
        part = path.with_name(path.name + ".part")  # so that a full disk does not cost the old file
        part.write_text(text + "\n", encoding="utf-8")
        os.replace(part, path)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Goes on from a history that `save` wrote.

        Raises:
          ValueError: not such a file; the history stays as it is.
          OSError: it cannot be read.
        """
        try:
            messages = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not a saved conversation: {error}") from error
        if not isinstance(messages, list) or not all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        ):
            raise ValueError(f'{path} is not a saved conversation: expected a list of {{"role": ..., "content": ...}}')
        self._finish()
        self.history[:] = messages

    def _encoded(self, messages: list[dict[str, Any]]) -> list[int]:
        text = self._template.render(messages, **self._variables)
        ids = list(self._tokenizer.encode(text, add_special_tokens=False))
        if not ids:
            raise ValueError("the conversation has no tokens; say something")
        check_ids(self._ready.spec, np.asarray(ids))
        if len(ids) > self._capacity:
            raise ValueError(
                f"the conversation has {len(ids)} tokens, more than the {self._capacity} that this chat has room for; "
                "reset it, shorten its history, or make one with a larger capacity"
            )
        return ids

    def _answer(self, message: dict[str, Any], ids: list[int]) -> Generator[Piece, None, None]:
        asked = time.perf_counter()
        stream = text_stream(self._tokenizer)
        scan = self._stop.scan()
        said, ends = "", []  # the answer so far, and for each of its tokens the length of text up to it
        count, reason, prefilled, prefill_seconds, decoding = 0, "interrupted", 0, 0.0, _Stopwatch()
        try:
            prefilled, prefill_seconds = self._prefill(ids)
            # Closed before what is below: that looks at what the decode has left.
            with contextlib.closing(self._tokens(decoding)) as tokens:
                for token, log_prob in tokens:
                    count += 1
                    text = scan.put(stream.put(token))
                    ends.append(scan.taken)
                    said += text
                    yield Piece(text, token, log_prob, time.perf_counter() - asked)
                    if scan.stopped:
                        reason = "stop"
                        break
            if not scan.stopped:
                rest = scan.put(stream.finish())
                rest += "" if scan.stopped else scan.finish()
                reason = "stop" if scan.stopped else self._why_it_ended()
                said += rest
                if rest:
                    yield Piece(rest, None, None, time.perf_counter() - asked)
        finally:
            # Tokens of a stop string, and those that were decoded but not read, are no part of the conversation.
            if self._state is not None:
                kept = count if reason not in ("stop", "interrupted") else sum(end <= len(said) for end in ends)
                del self._held[len(ids) + kept :]
            if said or reason != "interrupted":
                self.history += [message, _message("assistant", said)]
            self.last = Turn(
                text=said,
                finish_reason=reason,  # type: ignore[arg-type]
                conversation_tokens=len(ids),
                prefilled_tokens=prefilled,
                new_tokens=count,
                prefill_seconds=prefill_seconds,
                decode_seconds=decoding.seconds,
            )

    def _finish(self) -> None:
        """Ends an answer that is still being read."""
        answer = None if self._answering is None else self._answering()
        if answer is not None:
            answer.close()

    def _why_it_ended(self) -> TurnEnd:
        assert self._state is not None
        reasons: dict[int, TurnEnd] = {STOPPED: "eos", FULL: "capacity"}
        return reasons.get(int(self._state.status[0]), "length")

    def _take_state(self) -> DecodeState:
        """The state, to be used up.

        Whoever takes it puts a new one in its place as the very last thing. Where that fails, nothing is left of the
        cache, and the next turn prefills everything.
        """
        state, self._state = self._state, None
        if state is None:
            self._held = []
            state = empty_state(self._ready.spec, batch=1, capacity=self._capacity, key=self._key)
        return state

    def _prefill(self, ids: list[int]) -> tuple[int, float]:
        """Brings the cache to all tokens but the last. (Tokens that were not there, seconds without compiling)."""
        ready, spec = self._ready, self._ready.spec
        # The last token that is held, and the last of the conversation, are not in the cache.
        held = self.cached_tokens
        most = min(len(held), len(ids)) - 1
        keep = next((i for i in range(most) if held[i] != ids[i]), max(most, 0))
        state = self._take_state()
        # A row with something in its cache has a token that comes next; what is left is its prompt.
        begun = ids[: keep + 1] if keep else []
        seen = np.zeros((1, spec.vocab_size), np.uint8)
        seen[0, begun] = 1
        state = dataclasses.replace(
            state,
            position=jnp.array([keep], jnp.int32),
            last_token=jnp.array([ids[keep]], jnp.int32),
            status=jnp.array([RUNNING], jnp.int32),
            seen=jnp.asarray(seen),
        )
        rest = np.asarray(ids[len(begun) :], np.int32)
        seconds = 0.0
        if rest.size:
            tokens, lengths = pad([rest])
            options: dict[str, Any] = {"spec": spec, "prefill": ready.prefill}
            if tokens.shape[1] not in self._widths:  # a prompt without tokens does nothing, but is compiled
                state = _prefill(ready.source, tokens, np.zeros_like(lengths), state, **options)
                self._widths.add(tokens.shape[1])
            before = time.perf_counter()
            state = jax.block_until_ready(_prefill(ready.source, tokens, lengths, state, **options))
            seconds = time.perf_counter() - before
        self._held = list(ids)
        self._state = state
        return len(ids) - keep, seconds

    def _tokens(self, watch: _Stopwatch) -> Generator[tuple[int, float], None, None]:
        """New tokens and their log-probabilities as they are made, until the model ends or nobody wants more."""
        from jax_monokernel.streaming import stream

        pieces = stream(self._ready, state=self._take_state(), config=self._config, backend=self._backend)
        times = []
        try:
            for piece in pieces:
                times.append(piece.time)
                assert piece.log_prob is not None
                yield piece.token, piece.log_prob
        finally:
            pieces.close()
            made = pieces.result
            self._held += made.tokens[0, : int(made.lengths[0])].tolist()
            self._state = made.state
            if len(times) > 1:  # the first comes after compiling, where that is needed
                watch.seconds = (times[-1] - times[0]) * len(times) / (len(times) - 1)


@dataclasses.dataclass
class _Stopwatch:
    seconds: float = 0.0


@functools.partial(jax.jit, static_argnames=("spec", "prefill"), donate_argnames="state")
def _prefill(
    source: DecoderWeights | Tape,
    tokens: jax.Array,
    lengths: jax.Array,
    state: DecodeState,
    *,
    spec: DecoderSpec,
    prefill: SourcePrefill,
) -> DecodeState:
    return prefill(spec, source, tokens, lengths, state)


def _message(role: str, text: Any) -> dict[str, Any]:
    if not isinstance(text, str):
        raise ValueError(f"a message is {type(text).__name__}; expected a text (str)")
    return {"role": role, "content": text}


def _chosen_template(template: Any, tokenizer: Any) -> ChatTemplate:
    if isinstance(template, ChatTemplate):
        return template
    if template == "plain":
        return PLAIN
    own = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str):
        return ChatTemplate(template, {} if own is None else own.variables)
    if template is not None:
        raise TypeError(f"template is {type(template).__name__}; expected a ChatTemplate or a text in Jinja")
    if own is None:
        raise ValueError(
            "the model's checkpoint has no chat template, so it was probably not trained on conversations; pass "
            'template="plain" to have it go on with what you write, or a template in Jinja'
        )
    return own
