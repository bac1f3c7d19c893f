"""Where a decode leaves its tokens while it runs, for a reader in the same process. `stream` is built on it.

    box = Mailbox(rows=state.batch, capacity=n)
    result = jitted_decode(tape, state, sampling, operand(box))  # decode(..., max_new_tokens=n, mailbox=operand)
    for row, index, token, log_prob, time_ns in box.take(wait_s=0.1): ...

The call must run beside the reader, in another thread. What a mailbox has: `take` (waits, and before that naps: tokens
do not end a nap, the end of the call does), `stop` (the call ends after the token that it is about, with a state to go
on from), and `arm`, `fileno` and `drain` for event loops.
docs/streaming.md says more.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from jax_monokernel._native import Mailbox, find_mailbox

__all__ = ["Mailbox", "check_mailbox", "open_mail", "operand", "post"]


def operand(box: Mailbox) -> np.ndarray:
    """What `decode` takes as `mailbox`, int32 [rows, 2]: request i leaves its tokens in row i."""
    numbers = np.empty((box.rows, 2), np.int32)
    numbers[:, 0], numbers[:, 1] = box.id, np.arange(box.rows)
    return numbers


def check_mailbox(mailbox: jax.Array | np.ndarray, *, batch: int) -> None:
    """Raises ValueError if this is no operand for a batch of this size."""
    shape, dtype = getattr(mailbox, "shape", None), getattr(mailbox, "dtype", None)
    if shape != (batch, 2) or dtype != jnp.int32:
        have = repr(mailbox) if shape is None else f"{dtype}{list(shape)}"
        raise ValueError(f"mailbox is {have}; expected int32[{batch}, 2], as jax_monokernel.mailbox.operand makes it")


def open_mail(mailbox: jax.Array, *, steps: int) -> jax.Array:
    """For the reference: claims the rows, when the computation runs. Returns `post`'s first `go`, bool scalar."""

    def claim(numbers: np.ndarray) -> np.bool_:
        stopped = False
        for row, (box, at) in _listeners(np.asarray(numbers)).items():
            if steps > box.capacity:
                raise ValueError(f"the mailbox has room for {box.capacity} tokens of a request, not for {steps}")
            if not box.claim(at):
                raise ValueError(f"request {row}'s row {at} of the mailbox does not exist or is in use already")
            stopped |= box.stopped
        return np.bool_(not stopped)

    return io_callback(claim, jax.ShapeDtypeStruct((), jnp.bool_), mailbox)


def post(mailbox: jax.Array, token: jax.Array, log_prob: jax.Array, active: jax.Array, go: jax.Array) -> jax.Array:
    """For the reference: leaves a token of each active request. Returns False, bool scalar, when it is time to stop.

    Args:
      mailbox: int32 [batch, 2].
      token, log_prob, active: int32, f32, bool [batch].
      go: what the last of these calls returned, so that they happen in order.
    """

    def put(numbers: np.ndarray, tokens: np.ndarray, values: np.ndarray, on: np.ndarray, go: np.ndarray) -> np.bool_:
        tokens, values, on = np.asarray(tokens), np.asarray(values), np.asarray(on)
        stopped = False
        for row, (box, at) in _listeners(np.asarray(numbers)).items():
            if on[row]:
                box.put(at, int(tokens[row]), float(values[row]))
            stopped |= box.stopped
        return np.bool_(bool(go) and not stopped)

    return io_callback(put, jax.ShapeDtypeStruct((), jnp.bool_), mailbox, token, log_prob, active, go)


def _listeners(numbers: np.ndarray) -> dict[int, tuple[Mailbox, int]]:
    """By request: the mailbox and its row."""
    found: dict[int, tuple[Mailbox, int]] = {}
    for row, (number, at) in enumerate(numbers.tolist()):
        if number == 0:
            continue
        box = find_mailbox(number)
        if box is None:
            raise ValueError(f"request {row}'s mailbox {number} does not exist in this process, or no longer")
        found[row] = box, at
    return found
