"""Sends this process Ctrl-C while it decodes. test_cpu_backend.py runs it: it needs a main thread and its signals."""

from __future__ import annotations

import os
import signal
import threading
import time

import numpy as np
from decoding import DECODE_ERRORS, decode, long_decode, params_of, spec_of, state_of, tape_of

from jax_monokernel import _native

SPEC = spec_of("plain")


def send_after(seconds: float) -> threading.Thread:
    def send() -> None:
        time.sleep(seconds)
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


sent: list[float] = []


def small() -> np.ndarray:
    return np.asarray(decode(tape_of(SPEC, 2), state_of(SPEC), params_of(SPEC, 3)).tokens)


def stopped_by() -> tuple[type[BaseException], float]:
    """What a long decode ends with when Ctrl-C comes, and how many seconds after it."""
    thread = send_after(0.5)
    kind: type[BaseException] | None = None
    ended = 0.0
    try:
        try:
            long_decode(200_000)
        except DECODE_ERRORS as error:
            kind, ended = type(error), time.monotonic()
            time.sleep(0.1)  # a KeyboardInterrupt that is still to come does so here
    except KeyboardInterrupt:
        kind, ended = KeyboardInterrupt, ended or time.monotonic()
    thread.join()
    assert kind is not None, "the decode ended by itself"
    return kind, ended - sent[-1]


def main() -> None:
    want = small()
    long_decode(10)  # compiles nothing later that could be interrupted instead
    for threads in (1, 2):
        os.environ["MONOKERNEL_THREADS"] = str(threads)
        _native.read_environment()
        kind, seconds = stopped_by()
        print(kind.__name__, round(seconds, 3))
        assert kind is KeyboardInterrupt
        assert seconds < 2
        np.testing.assert_array_equal(small(), want)

    # Python's handler is back in place: Ctrl-C without a decode is an ordinary KeyboardInterrupt, every time.
    for _ in range(3):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
            raise AssertionError("no KeyboardInterrupt")
        except KeyboardInterrupt:
            pass

    # A handler of the user's own is called, and stays.
    calls = []
    signal.signal(signal.SIGINT, lambda *_: calls.append(1))
    kind, seconds = stopped_by()
    assert kind in DECODE_ERRORS
    assert seconds < 2
    assert calls == [1]
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.1)
    assert calls == [1, 1]

    # Where Ctrl-C is ignored, decode goes on.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    thread = send_after(0.05)
    assert long_decode(2000) == 2000
    thread.join()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN

    # Many calls leave no handler behind.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for _ in range(50):
        small()
    _native.cancel()  # of nothing: no later decode is affected
    np.testing.assert_array_equal(small(), want)
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
        raise AssertionError("no KeyboardInterrupt")
    except KeyboardInterrupt:
        print("done")


if __name__ == "__main__":
    main()
