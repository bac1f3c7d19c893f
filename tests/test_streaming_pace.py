"""When a stream's reader wakes up: seldom where that costs the kernel a core, and never late where it matters."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from naive import SPECS, prompt, random_weights

from jax_monokernel import Stream, _native, generate, make_plan, prepare, stream
from jax_monokernel.generation_config import GenerationConfig
from jax_monokernel.mailbox import Mailbox, find_mailbox, operand
from jax_monokernel.models import Decoder

pytestmark = pytest.mark.usefixtures("quick_compiles")

# A machine that is busy may be so late.
SLACK = 0.5


@pytest.fixture
def crowded(monkeypatch):
    """As where the kernel has all CPUs."""
    monkeypatch.setattr(_native, "all_cpus_decode", lambda: True)


def stream_of(write, tokens, max_delay):
    """A stream whose call is write(put), from which it gets so many tokens."""

    def run(numbers):
        box = find_mailbox(int(numbers[0, 0]))
        assert box.claim(0)
        write(lambda token: box.put(0, token, -1.0))
        return types.SimpleNamespace(lengths=jnp.array([tokens]))

    request = types.SimpleNamespace(
        batch=1,
        steps=tokens,
        row_limits=lambda: np.array([tokens]),
        config=GenerationConfig(),
        ready=types.SimpleNamespace(tokenizer=None),
        return_log_probs=True,
        run=run,
    )
    return Stream(request, time.monotonic(), max_delay)


def read_sync(running):
    """Seconds from the stream's begin at which each piece came."""
    return [(Mailbox.now_ns() - running._started_ns) * 1e-9 - piece.time for piece in running]


def read_async(running):
    async def read():
        return [(Mailbox.now_ns() - running._started_ns) * 1e-9 - piece.time async for piece in running]

    return asyncio.run(read())


@pytest.fixture(params=[read_sync, read_async], ids=["for", "async"])
def late(request):
    """Reads a stream to its end; seconds by which each piece was late."""
    return request.param


def count_wakes(monkeypatch):
    """Grows by one for each time that pieces are taken."""
    wakes = []
    fill = Stream._fill

    def counted(self, wait_s):
        found = fill(self, wait_s)
        if self._pieces:
            wakes.append(len(self._pieces))
        return found

    monkeypatch.setattr(Stream, "_fill", counted)
    return wakes


# ---- Naps ----


def test_a_nap_is_ended_by_the_end_and_not_by_tokens():
    box = Mailbox(1, 100)
    assert box.claim(0)

    def put():
        for token in range(20):
            time.sleep(0.005)
            box.put(0, token, 0.0)

    writer = threading.Thread(target=put)
    writer.start()
    begin = time.monotonic()
    pieces = box.take(10.0, 0.3)
    assert time.monotonic() - begin > 0.29
    assert len(pieces) > 10  # all that had come
    writer.join()
    box.take()
    end = threading.Timer(0.1, box.finish)
    end.start()
    begin = time.monotonic()
    assert box.take(100.0, 100.0) == []
    assert box.take(100.0, 100.0) == []  # at once
    assert time.monotonic() - begin < 10
    end.join()


def test_a_signal_ends_a_nap():
    class Signalled(Exception):
        pass

    def raise_it(*_):
        raise Signalled

    box = Mailbox(1, 1)

    def nap():
        for _ in range(3):
            box.take(100.0, 100.0)

    before = signal.signal(signal.SIGUSR1, raise_it)
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1))
    begin = time.monotonic()
    try:
        timer.start()
        with pytest.raises(Signalled):
            nap()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert time.monotonic() - begin < 10
    timer.join()


# ---- Pace ----


def test_readers_wake_up_seldom_where_that_takes_a_core(crowded, monkeypatch, late):
    def write(put):
        for token in range(200):
            time.sleep(0.3 if token == 1 else 0.002)
            put(token)

    wakes = count_wakes(monkeypatch)
    begin = time.monotonic()
    delays = late(stream_of(write, 200, 0.05))
    seconds = time.monotonic() - begin
    assert len(delays) == sum(wakes) == 200
    assert wakes[0] == 1  # which nothing was waited with for
    assert 3 <= len(wakes) <= seconds / 0.05 + 3
    assert sum(sorted(delays)[:150]) / 150 < 0.05
    assert max(delays) < 0.05 + SLACK


def test_readers_wake_up_for_each_token_where_that_is_asked_for(crowded, monkeypatch, late):
    def write(put):
        for token in range(30):
            time.sleep(0.02)
            put(token)

    wakes = count_wakes(monkeypatch)
    delays = late(stream_of(write, 30, 0.0))
    assert len(wakes) > 20
    assert np.median(delays) < 0.02


def test_readers_wake_up_for_each_token_where_cpus_are_free(monkeypatch, late):
    def write(put):
        for token in range(30):
            time.sleep(0.02)
            put(token)

    monkeypatch.setattr(_native, "all_cpus_decode", lambda: False)
    wakes = count_wakes(monkeypatch)
    delays = late(stream_of(write, 30, 10.0))
    assert len(wakes) > 20
    assert np.median(delays) < 0.02


def test_tokens_that_come_seldom_come_at_once_and_without_naps(crowded, late, monkeypatch):
    naps = []
    nap = Stream._nap

    def noted(self):
        naps.append(nap(self))
        return naps[-1]

    monkeypatch.setattr(Stream, "_nap", noted)

    def write(put):
        for token in range(6):
            time.sleep(0.3)
            put(token)

    delays = late(stream_of(write, 6, 0.1))
    assert np.median(delays) < 0.1
    assert sum(seconds > 0 for seconds in naps) <= 2  # after the first


def test_nothing_is_late_at_the_end(crowded, late):
    def write(put):
        put(0)
        time.sleep(0.1)
        put(1)

    begin = time.monotonic()
    assert len(late(stream_of(write, 2, 100.0))) == 2
    assert time.monotonic() - begin < 10


def test_the_end_of_a_native_call_ends_a_nap():
    """Before whoever made the call knows of it."""
    spec = SPECS["nope"]
    ready = prepare(Decoder.from_weights(spec, random_weights(spec, 3)))
    box = Mailbox(1, 16)

    def run():
        stream(ready, [prompt(5, 1)], max_new_tokens=16).close()  # compiles
        request = stream(ready, [prompt(5, 1)], max_new_tokens=16)._request
        jax.block_until_ready(request.run(operand(box)))

    call = threading.Thread(target=run)
    call.start()
    begin, pieces = time.monotonic(), []
    while len(pieces) < 16 and time.monotonic() - begin < 100:
        pieces += box.take(100.0, 100.0)
    assert len(pieces) == 16
    assert time.monotonic() - begin < 90
    call.join()


# ---- Closing, and other loops ----


def test_a_task_that_naps_learns_that_another_has_closed_the_stream(crowded):
    going = threading.Event()

    def write(put):
        put(0)
        going.wait(20)

    async def read(running):
        return [piece.token async for piece in running]

    async def main():
        running = stream_of(write, 5, 100.0)
        reader = asyncio.create_task(read(running))
        await asyncio.sleep(0.3)
        assert not reader.done()
        asyncio.get_running_loop().call_later(0.2, going.set)
        await running.aclose()
        return await asyncio.wait_for(reader, 10)

    begin = time.monotonic()
    assert asyncio.run(main()) == [0]
    assert time.monotonic() - begin < 15


def test_one_stream_in_two_loops_and_a_thread(crowded):
    steps = threading.Semaphore(0)

    def write(put):
        for token in range(4):
            steps.acquire(timeout=20)
            put(token)

    running = stream_of(write, 4, 0.05)

    async def one():
        asyncio.get_running_loop().call_later(0.2, steps.release)
        return (await anext(running)).token

    assert asyncio.run(one()) == 0
    assert asyncio.run(one()) == 1
    threading.Timer(0.2, steps.release, (2,)).start()
    assert [piece.token for piece in running] == [2, 3]


def test_a_loop_watches_no_stream_that_was_left_or_has_ended(crowded):

    def write(put):
        put(0)
        time.sleep(0.1)

    async def main():
        watched = asyncio.get_running_loop()._selector.get_map()
        before = len(watched)
        for _ in range(3):
            running = stream_of(write, 2, 0.02)
            async for _ in running:
                break
            await asyncio.sleep(0)
            assert len(watched) == before
            assert [piece async for piece in running] == []
            await asyncio.sleep(0)
        assert len(watched) == before

    asyncio.run(main())


# ---- What the kernel has ----


def test_whether_the_kernel_has_all_cpus():
    begin = time.monotonic()
    while _native.all_cpus_decode() and time.monotonic() - begin < 20:  # what an earlier test has left
        time.sleep(0.05)
    spec = SPECS["nope"]
    model = Decoder.from_weights(spec, random_weights(spec, 3))
    for plan in (make_plan(spec, units=1), make_plan(spec)):
        with stream(prepare(model, plan), [prompt(5, 1)], max_new_tokens=100_000) as running:
            next(running)
            assert _native.all_cpus_decode() == (plan.units >= _native.available_cpus())
    assert not _native.all_cpus_decode()


def test_calls_of_streams_share_a_thread():
    names: list[int] = []
    begun = threading.Event()

    def write(put):
        names.append(threading.get_ident())
        put(0)
        begun.set()

    for _ in range(5):
        assert len(list(stream_of(write, 1, 0.0))) == 1
        time.sleep(0.1)  # for the thread to be free again
    assert len(set(names)) == 1


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "1", None])
def test_delays_that_are_none(value):
    spec = SPECS["nope"]
    model = Decoder.from_weights(spec, random_weights(spec, 3))
    with pytest.raises(ValueError, match=r"max_delay is .*; expected seconds, 0 or more"):
        stream(model, [[1]], max_new_tokens=2, max_delay=value)
    with pytest.raises(TypeError, match="no option 'max_delay'"):
        generate(model, [[1]], max_new_tokens=2, max_delay=value)
