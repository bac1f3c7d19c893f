"""Tokens and text from a decode that still runs: one call, read through a mailbox while the kernel writes to it."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import math
import os
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from jax_monokernel import _native
from jax_monokernel.decode import Backend
from jax_monokernel.generate import Generation, Request, checked_request
from jax_monokernel.generation_config import GenerationConfig
from jax_monokernel.mailbox import Mailbox, operand
from jax_monokernel.prepared import Prepared
from jax_monokernel.prompts import Prompt
from jax_monokernel.protocol import DecoderModel
from jax_monokernel.state import DecodeResult, DecodeState
from jax_monokernel.tokenizer import text_stream

# Seconds that pass at least between two times that a reader takes what has come, if it takes no core from the kernel:
# nobody sees so short a delay, and each time costs both of them tens of microseconds.
_NAP = 1e-3
# Seconds after which a reader that waits looks around, in case that what should have woken it was lost.
_LOOK = 0.5


class Piece(NamedTuple):
    """One token of one row, with the text that it completes."""

    text: str  # often empty: characters come when all of their bytes are there. "" without a tokenizer
    token: int
    log_prob: float | None  # log-softmax of the raw logits at the token; None if not asked for
    time: float  # seconds from the call of `stream` until the token was chosen
    row: int  # of the prompts
    index: int  # type: ignore[assignment]  # of the row's tokens, from 0


def stream(
    model: DecoderModel | Prepared,
    prompt: Prompt | None = None,
    *,
    max_new_tokens: int | Sequence[int] | None = None,
    key: jax.Array | None = None,
    lengths: Sequence[int] | np.ndarray | jax.Array | None = None,
    config: GenerationConfig | None = None,
    state: DecodeState | None = None,
    capacity: int | None = None,
    return_log_probs: bool = True,
    backend: Backend | None = None,
    max_delay: float = 0.025,
    **options: Any,
) -> Stream:
    """Continues prompts as `generate` does, and yields each token while the rest is being made.

        for piece in stream(model, "def fibonacci(n):", max_new_tokens=64):
            print(piece.text, end="", flush=True)

    The whole request is still one call, which runs beside the reader and never waits for it. Leaving the loop early, by
    break, an exception or Ctrl-C, ends the call after the token that it is about. `async for` works as well.

    Tokens, text and log-probabilities are those of `generate`; the pieces of a row join to its text. Pieces come in
    order of time. It is another compiled function than `generate`'s, so the first stream of a shape compiles.

    The other arguments are those of `generate`.

    Args:
      key: `jax.random.key(seed)`, for sampling.
      lengths: int [batch], of the prompts, if they are an array.
      state: a state to go on from, which is used up; arrays [batch, ...].
      return_log_probs: whether pieces have them.
      max_delay: seconds that pieces after the first may wait to be taken together, as each time that the reader wakes
        up takes a core from a kernel that has all of them. Where it takes none, 1 ms is the most. 0: each at once.

    Returns:
      A `Stream`; its `result` is what `generate` would have returned, or as much of it as was made.

    Raises:
      ValueError, TypeError: bad input, as for `generate`.
      MemoryError: there is no room for so many tokens.
    """
    started = time.monotonic()
    if not isinstance(max_delay, int | float) or not 0 <= max_delay < math.inf:
        raise ValueError(f"max_delay is {max_delay!r}; expected seconds, 0 or more")
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
    return Stream(request, started, max_delay)


class Stream:
    """The pieces of a call that runs, from `stream`. An iterator for one reader, in sync or async code.

    A `for` or `async for` loop over it that ends early ends the call; so do `close`, `with`, and dropping the object.
    """

    def __init__(self, request: Request, started: float, max_delay: float):
        self._request = request
        self._started_ns = Mailbox.now_ns() - int((time.monotonic() - started) * 1e9)
        self._box = Mailbox(request.batch, request.steps)
        self._last = (request.row_limits() - 1).tolist()
        self._eos = frozenset(cast(tuple[int, ...], request.config.eos_token_id or ()))  # whatever it was given
        tokenizer = request.ready.tokenizer
        self._texts = None if tokenizer is None else [text_stream(tokenizer) for _ in range(request.batch)]
        self._log_probs = request.return_log_probs
        self._pieces: deque[Piece] = deque()
        self._max_delay = max_delay
        self._woke, self._gap = 0.0, 0.0  # when pieces were taken, and how long after those before
        self._result: Generation | None = None
        self._left = False
        self._bell: _Bell | None = None  # of the event loop that reads
        numbers = operand(self._box)
        self._call = _Call(self._box, lambda: request.run(numbers))

    # ---- Reading ----

    def __next__(self) -> Piece:
        try:
            while not self._pieces and not self._fill(_LOOK):
                pass
        except BaseException:
            self.close()
            raise
        if not self._pieces:
            self._end()
            raise StopIteration
        return self._pieces.popleft()

    def __iter__(self) -> Iterator[Piece]:
        # Not the object itself: this iterator goes when its loop ends, however it does, though the stream has a name.
        try:
            while True:
                try:
                    piece = next(self)
                except StopIteration:
                    return
                yield piece
        finally:
            self.close()

    def __aiter__(self) -> AsyncIterator[Piece]:
        return _AsyncPieces(self)

    async def __anext__(self) -> Piece:
        if not self._pieces:
            try:
                bell = self._bell_here()
                while True:
                    if (awake := bell.set(self._nap())) is not None:
                        await awake
                    if self._fill(0.0):
                        break
            except BaseException:
                await self.aclose()
                raise
            if not self._pieces:
                bell.leave()
                self._end()
                raise StopAsyncIteration
        return self._pieces.popleft()

    def _fill(self, wait_s: float) -> bool:
        """Takes what there is, after so long if there is nothing. False if there is nothing and something may come.

        For every token the kernel has thrown this code out of the caches, so what is short here is quick.
        """
        finished = self._box.finished  # before looking
        for row, index, token, log_prob, time_ns in self._box.take(wait_s, self._nap() if wait_s else 0.0):
            chance = log_prob if self._log_probs else None
            text = self._text(row, index, token)
            self._pieces.append(Piece(text, token, chance, (time_ns - self._started_ns) * 1e-9, row, index))
        if self._pieces:
            now = time.monotonic()
            self._woke, self._gap = now, now - self._woke if self._woke else 0.0
        return bool(self._pieces) or finished

    def _text(self, row: int, index: int, token: int) -> str:
        if self._texts is None:
            return ""
        text = self._texts[row].put(token)
        if index == self._last[row] or token in self._eos:
            text += self._texts[row].finish()
        return text

    def _bell_here(self) -> _Bell:
        if self._bell is None or self._bell.loop is not asyncio.get_running_loop():
            self._close_bell()
            self._bell = _Bell(self._box)
        return self._bell

    def _close_bell(self) -> None:
        if self._bell is not None:
            self._bell.close()

    def _nap(self) -> float:
        """Seconds to sleep before waiting for tokens: more than 0 where they come faster than is of use."""
        nap = self._max_delay if _native.all_cpus_decode() else min(self._max_delay, _NAP)
        # Where tokens are further apart than that, a nap would be one more time to wake up for each.
        return self._woke + nap - time.monotonic() if self._gap < 1.1 * nap else 0.0

    # ---- The end ----

    def _end(self) -> None:
        """Raises what ended the call, unless it ended by itself or as asked."""
        self._call.result()
        if self._box.cancelled and not self._left:
            raise jax.errors.JaxRuntimeError(
                "CANCELLED: jax_monokernel: the stream was cancelled, by Ctrl-C or jax_monokernel.cancel(). Its "
                "`result` has the tokens until then and a state to go on from"
            )

    def close(self) -> None:
        """Ends the call after the token that it is about, and waits for that. What was read so far is kept."""
        self._stop()
        self._call.join()

    async def aclose(self) -> None:
        """As `close`; other tasks run meanwhile."""
        self._stop()
        if not self._box.finished:
            await asyncio.to_thread(self._call.join)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        # Not close(): nobody expects to wait where the last reference goes.
        if hasattr(self, "_call"):
            self._stop()

    def _stop(self) -> None:
        self._left = True
        self._box.stop()
        self._close_bell()

    @property
    def result(self) -> Generation:
        """What `generate` returns, of the tokens made until the end. Waits for the end of the call; see `close`.

        Its state can be gone on from, also after a stream that was left early.

        Raises:
          Exception: whatever ended the call, such as what `generate` raises.
        """
        if self._result is None:
            self._result = self._request.generation(self._call.result())
        return self._result


class _AsyncPieces:
    """The iterator of one `async for` loop: ends the call when the loop drops it."""

    def __init__(self, stream: Stream):
        self._stream = stream

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self

    def __anext__(self) -> Coroutine[Any, Any, Piece]:
        return self._stream.__anext__()

    def __del__(self) -> None:
        self._stream._stop()


class _Bell:
    """Wakes a task of one event loop when the mailbox does. The loop holds it, and the file, until `close`."""

    def __init__(self, box: Mailbox):
        self.loop = asyncio.get_running_loop()
        self._box, self._file = box, box.fileno()
        self._listens = False
        self._awake: asyncio.Future[None] | None = None

    def set(self, nap: float) -> asyncio.Future[None] | None:
        """What to wait for until there is something to take, or so long, unless the call ends; None: nothing."""
        if not self._listens:
            self.loop.add_reader(self._file, self._ring)
            self._listens = True
        if not self._box.arm(nap > 0):
            return None
        self._awake = awake = self.loop.create_future()
        if nap > 0:
            self.loop.call_later(nap, _set, awake)
        return awake

    def _ring(self) -> None:
        self._box.drain()
        if self._awake is not None:
            _set(self._awake)

    def close(self) -> None:
        """As `leave`, from any thread."""
        if self._listens:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and holds nothing any more
                self.loop.call_soon_threadsafe(self.leave)

    def leave(self) -> None:
        """Lets the loop go, unless a task waits. The bell can be set again."""
        if self._listens and (self._awake is None or self._awake.done()):
            self.loop.remove_reader(self._file)
            self._listens = False


def _set(awake: asyncio.Future[None]) -> None:
    if not awake.done():
        awake.set_result(None)


class _Call:
    """A call in another thread. It holds no reference to its stream, so that a stream nobody has can go."""

    def __init__(self, box: Mailbox, run: Callable[[], DecodeResult]):
        self._box = box
        self._value: DecodeResult | None = None
        self._error: BaseException | None = None
        self._running = threading.Lock()
        self._running.acquire()
        settings = _thread_settings()
        _calls.add(self)
        _in_thread(lambda: self._work(run, settings))

    def _work(
        self, run: Callable[[], DecodeResult], settings: Callable[[], contextlib.AbstractContextManager[object]]
    ) -> None:
        try:
            with settings():
                value = run()
                value.lengths.block_until_ready()  # as all of them are, and quicker than to ask each
                self._value = value
        except BaseException as error:
            self._error = error
        finally:
            self._running.release()
            self._box.finish()

    def join(self) -> None:
        with self._running:
            pass

    def result(self) -> DecodeResult:
        self.join()
        if self._error is not None:
            raise self._error
        assert self._value is not None
        return self._value

    def abandon(self) -> None:
        self._box.stop()
        self.join()

    def lose(self) -> None:
        self._running = threading.Lock()
        self._error = RuntimeError("the stream's call runs in the process that this one was forked from")
        self._box.finish()


_calls: weakref.WeakSet[_Call] = weakref.WeakSet()


@atexit.register
def _end_calls() -> None:
    # A thread that returns from XLA to an interpreter that is gone would bring the process down.
    for call in list(_calls):
        call.abandon()


# The inbox of a thread that has nothing to do. One is kept, since starting one costs as much as some tokens.
_idle: queue.SimpleQueue[Callable[[], None]] | None = None
_idle_lock = threading.Lock()


def _in_thread(work: Callable[[], None]) -> None:
    """Runs this in another thread."""
    global _idle
    with _idle_lock:
        inbox, _idle = _idle, None
    if inbox is None:
        inbox = queue.SimpleQueue()
        threading.Thread(target=_serve, args=(inbox,), name="jax_monokernel.stream", daemon=True).start()
    inbox.put(work)


def _serve(inbox: queue.SimpleQueue[Callable[[], None]]) -> None:
    global _idle
    while True:
        work = inbox.get()
        work()
        del work  # and what it holds
        with _idle_lock:
            if _idle is not None:
                return
            _idle = inbox


def _after_fork() -> None:
    # The child has no other threads.
    global _idle, _idle_lock
    _idle, _idle_lock = None, threading.Lock()
    for call in list(_calls):
        call.lose()
    _calls.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _thread_settings() -> Callable[[], contextlib.AbstractContextManager[object]]:
    """JAX's settings of this thread that decide about values, for another thread."""
    contexts: dict[str, Callable[[Any], contextlib.AbstractContextManager[object]]] = {
        "jax_default_device": jax.default_device,
        "jax_default_matmul_precision": jax.default_matmul_precision,
        "jax_numpy_dtype_promotion": jax.numpy_dtype_promotion,
        "jax_enable_x64": jax.enable_x64,
    }
    values = {name: getattr(jax.config, name) for name in contexts}

    def enter() -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        for name, value in values.items():
            if getattr(jax.config, name) != value:
                stack.enter_context(contexts[name](value))
        return stack

    return enter
