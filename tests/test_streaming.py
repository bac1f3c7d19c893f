"""stream: the tokens of a call while it runs, and what happens when nobody wants the rest."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding import DECODE_ERRORS, assert_bit_equal, mixed_params, reference, spec_of, state_of, tape_of
from naive import SPECS, prompt, random_weights
from test_generate import Speaker

from jax_monokernel import cancel, decode, generate, models, prepare, stream
from jax_monokernel.decode import TARGET
from jax_monokernel.mailbox import Mailbox, operand
from jax_monokernel.models import Decoder

pytestmark = pytest.mark.usefixtures("quick_compiles")

SPEC = SPECS["nope"]
KEY = jax.random.key(21)
BACKENDS = [None, "reference"]
LONG = 100_000  # seconds


@pytest.fixture(scope="module")
def model():
    return prepare(Decoder.from_weights(SPEC, random_weights(SPEC, 3)))


@pytest.fixture(scope="module")
def speaker():
    return Speaker.from_weights(SPEC, random_weights(SPEC, 4))


@pytest.fixture(scope="module")
def small():
    return prepare(models.from_pretrained(models.SMALL))


def ids(seed, length):
    return prompt(length, seed)


def rows_of(pieces, batch):
    """The tokens of each row, whose pieces must be in order."""
    rows = [[p for p in pieces if p.row == row] for row in range(batch)]
    for row in rows:
        assert [p.index for p in row] == list(range(len(row)))
        times = [p.time for p in row]
        assert times == sorted(times)
        assert all(0 < t < 100 for t in times)
    return rows


# ---- What comes ----


@pytest.mark.parametrize("backend", BACKENDS)
def test_pieces_are_what_generate_gives(speaker, backend):
    texts = ["to be", "or, not", "t"]
    options = {
        "max_new_tokens": [12, 5, 9],
        "do_sample": [True, False, True],
        "temperature": 1.3,
        "eos_token_id": (7, 1),
        "key": KEY,
        "backend": backend,
    }
    want = generate(speaker, texts, return_log_probs=True, **options)
    running = stream(speaker, texts, **options)
    pieces = list(running)
    assert [p.time for p in pieces] == sorted(p.time for p in pieces)
    for i, row in enumerate(rows_of(pieces, 3)):
        n = want.lengths[i]
        assert [p.token for p in row] == want.tokens[i, :n].tolist()
        np.testing.assert_array_equal(np.float32([p.log_prob for p in row]), want.log_probs[i, :n])
        assert "".join(p.text for p in row) == want.text[i]
    got = running.result
    assert (got.text, got.finish_reasons) == (want.text, want.finish_reasons)
    assert_bit_equal(
        (got.tokens, got.lengths, got.log_probs, got.state), (want.tokens, want.lengths, want.log_probs, want.state)
    )


def test_token_prompts_without_a_tokenizer_or_log_probs(model):
    row = ids(0, 5)
    running = stream(model, [row], max_new_tokens=3, return_log_probs=False)
    pieces = list(running)
    assert [(p.text, p.log_prob) for p in pieces] == [("", None)] * 3
    assert [p.token for p in pieces] == generate(model, [row], max_new_tokens=3).tokens[0].tolist()
    assert running.result.log_probs is None


def test_more_rows_than_a_call_takes(model):
    rows = [ids(i, 3 + i % 3) for i in range(18)]
    pieces = list(stream(model, rows, max_new_tokens=4))
    want = generate(model, rows, max_new_tokens=4).tokens
    assert [[p.token for p in row] for row in rows_of(pieces, 18)] == want.tolist()


def test_it_comes_while_the_call_runs(model):
    with stream(model, [ids(0, 5)], max_new_tokens=LONG) as running:
        piece = next(running)
        assert not running._box.finished
    assert piece.token == running.result.tokens[0, 0]


def test_going_on_from_a_stream(speaker):
    whole = generate(speaker, ["to be", "or"], max_new_tokens=12, eos_token_id=())
    first = stream(speaker, ["to be", "or"], max_new_tokens=5, eos_token_id=(), capacity=40)
    assert len(list(first)) == 10
    second = stream(speaker, state=first.result.state, max_new_tokens=7, eos_token_id=())
    tokens = [[p.token for p in row] for row in rows_of(list(second), 2)]
    assert tokens == whole.tokens[:, 5:].tolist()


def test_a_row_whose_cache_is_full_gives_all_of_its_text(speaker):
    texts = ["to be or not", "be"]
    want = generate(speaker, texts, max_new_tokens=30, capacity=16, eos_token_id=())
    assert want.finish_reasons == ["capacity", "capacity"]
    running = stream(speaker, texts, max_new_tokens=30, capacity=16, eos_token_id=())
    assert ["".join(p.text for p in row) for row in rows_of(list(running), 2)] == want.text
    assert [last + 1 for last in running._last] == want.lengths.tolist()


def test_characters_of_several_bytes_come_whole(small):
    """Of random bytes, among which there are characters, halves of them, and what is neither."""
    byte = small.tokenizer.encode("é🙂", add_special_tokens=False)
    assert len(set(byte)) >= 4  # not one token each
    bias = np.full(small.spec.vocab_size, -np.inf, np.float32)
    bias[byte] = 50.0
    bias[small.tokenizer.encode("x", add_special_tokens=False)[0]] = 50.0
    options = {"max_new_tokens": 64, "do_sample": True, "temperature": 30.0, "logit_bias": bias, "key": KEY}
    want = generate(small, ["a", "b"], eos_token_id=(), **options)
    rows = rows_of(list(stream(small, ["a", "b"], eos_token_id=(), **options)), 2)
    assert ["".join(p.text for p in row) for row in rows] == want.text
    # A character is one piece's; and what no character may begin with is not held back for ever.
    made = [p.text for row in rows for p in row if p.text]
    assert any("é" in text for text in made)
    assert len(made) > 16


# ---- Nobody waits for the reader ----


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_slow_reader_does_not_slow_the_kernel(model, backend):
    list(stream(model, [ids(0, 5)], max_new_tokens=12, backend=backend))  # compiles
    started = time.monotonic()
    times = []
    for piece in stream(model, [ids(0, 5)], max_new_tokens=12, backend=backend):
        time.sleep(0.05)
        times.append(piece.time)
    assert time.monotonic() - started > 0.6
    assert times[-1] < 0.3


def test_streams_in_several_threads(model):
    def run(i: int) -> list[int]:
        pieces = stream(model, [ids(i, 4 + i)], max_new_tokens=20, do_sample=True, key=jax.random.key(i))
        return [p.token for p in pieces]

    want = [
        generate(model, [ids(i, 4 + i)], max_new_tokens=20, do_sample=True, key=jax.random.key(i)).tokens[0].tolist()
        for i in range(8)
    ]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            assert list(pool.map(run, range(8))) == want


def test_streams_in_one_event_loop(model):
    async def run(i: int) -> list[int]:
        return [p.token async for p in stream(model, [ids(i, 4 + i)], max_new_tokens=9)]

    async def all_of_them() -> list[list[int]]:
        return await asyncio.gather(*map(run, range(5)))

    want = [generate(model, [ids(i, 4 + i)], max_new_tokens=9).tokens[0].tolist() for i in range(5)]
    assert asyncio.run(all_of_them()) == want


# ---- Nobody wants the rest ----


class Left(Exception):
    pass


def by_break(running):
    for piece in running:
        if piece.index >= 20:
            break


def by_exception(running):
    def read():
        for piece in running:
            if piece.index >= 20:
                raise Left

    with pytest.raises(Left):
        read()


def by_close(running):
    next(running)
    running.close()


def by_with(running):
    with running:
        next(running)


def by_ctrl_c(running):
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))

    def read():
        for piece in running:
            if (piece.row, piece.index) == (0, 20):
                timer.start()

    with pytest.raises(KeyboardInterrupt):
        read()
    timer.join()


def by_async_break(running):
    async def read():
        async for piece in running:
            if piece.index >= 20:
                break

    asyncio.run(read())


def by_async_cancel(running):
    async def read():
        async for _ in running:
            pass

    async def main():
        task = asyncio.create_task(read())
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert running._box.finished

    asyncio.run(main())


WAYS = [by_break, by_exception, by_close, by_with, by_ctrl_c, by_async_break, by_async_cancel]


@pytest.fixture(scope="module")
def beginnings(model):
    """What a long call begins with, by backend. Compiles what the tests below use."""
    rows = [ids(1, 4), ids(2, 6)]
    tokens = {}
    for backend in BACKENDS:
        with stream(model, rows, max_new_tokens=LONG, return_log_probs=False, backend=backend) as running:
            tokens[backend] = list(itertools.islice(running, 60))
    for row in range(2):
        begin = [[p.token for p in tokens[backend] if p.row == row][:25] for backend in BACKENDS]
        assert begin[0] == begin[1]
        assert len(begin[0]) == 25
    return rows, tokens[None]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("leave", WAYS)
def test_leaving_stops_the_kernel_within_a_token(model, beginnings, leave, backend, monkeypatch):
    rows, begin = beginnings
    running = stream(model, rows, max_new_tokens=LONG, return_log_probs=False, backend=backend, max_delay=0)
    asked: list[float] = []
    stop = type(running)._stop

    def noted(self):
        stop(self)
        asked.append((Mailbox.now_ns() - self._started_ns) * 1e-9)

    monkeypatch.setattr(type(running), "_stop", noted)
    leave(running)
    running._call.join()
    result = running.result  # of a call that is over
    made = result.lengths.tolist()
    assert 0 < made[0] < LONG
    if leave is not by_ctrl_c or backend is not None:  # there, the signal itself is quicker
        late = [piece for piece in read_rest(running) if piece.time > asked[0]]
        # The step that the rows were about, and one more where the kernel had already looked in that one.
        assert len({piece.index for piece in late}) <= 2
    for row in range(2):
        want = [p.token for p in begin if p.row == row][: made[row]]
        assert result.tokens[row, : len(want)].tolist() == want
        assert (result.tokens[row, made[row] :] == -1).all()
    # Everything can be used again: the model, and the state where it stands.
    n = int(made[0]) + 3
    more = generate(model, state=result.state, max_new_tokens=3)
    if n <= 40:
        np.testing.assert_array_equal(more.tokens, generate(model, rows, max_new_tokens=n).tokens[:, -3:])
    again = generate(model, rows, max_new_tokens=5)
    assert again.tokens[:, :5].tolist() == [[p.token for p in begin if p.row == row][:5] for row in range(2)]


def read_rest(running):
    pieces = []
    while (piece := next(running, None)) is not None:
        pieces.append(piece)
    return pieces


def test_dropping_a_stream_stops_it(model, beginnings):
    running = stream(model, beginnings[0], max_new_tokens=LONG, return_log_probs=False)
    call, box = running._call, running._box
    next(running)
    del running
    gc.collect()
    call.join()
    assert box.stopped
    assert call.result().lengths[0] < LONG


def test_a_stream_that_is_left_before_it_begins(model, beginnings):
    """Behind a call that has all threads."""
    with stream(model, beginnings[0], max_new_tokens=LONG, return_log_probs=False) as first:
        next(first)
        second = stream(model, beginnings[0], max_new_tokens=LONG, return_log_probs=False)
        second.close()
        assert not first._box.finished
        assert second.result.lengths.max() <= 1
    assert generate(model, state=second.result.state, max_new_tokens=2).lengths.tolist() == [2, 2]


def test_cancel_ends_a_stream_with_an_error_and_a_result(model, beginnings):
    running = stream(model, beginnings[0], max_new_tokens=LONG, return_log_probs=False)
    next(running)
    cancel()
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"CANCELLED.*the stream was cancelled"):
        for _ in running:
            pass
    assert 0 < running.result.lengths[0] < LONG


def test_an_error_of_the_call_is_raised_by_the_loop(model):
    row = [ids(0, 5)]
    state = generate(model, row, max_new_tokens=2, capacity=40).state
    running = stream(model, state=state, max_new_tokens=2)
    list(running)
    with pytest.raises(ValueError, match="used up by an earlier call"):
        stream(model, state=state, max_new_tokens=2)
    with pytest.raises(ValueError, match="max_new_tokens is -1"):
        stream(model, row, max_new_tokens=-1)
    broken = running.result.state
    with jax.default_matmul_precision("float32"):
        broken = jax.tree.map(lambda x: x, broken)
    broken = type(broken)(**{**broken.__dict__, "position": jnp.array([-5], jnp.int32)})
    with pytest.raises(DECODE_ERRORS, match="position of request 0 is -5"):
        list(stream(model, state=broken, max_new_tokens=2))


# ---- The mailbox itself ----


def test_a_mailbox_in_a_function_of_ones_own():
    spec = spec_of("windows")
    tape, state, params = tape_of(spec, 2), state_of(spec), mixed_params(spec, 3)
    want = reference(spec, state, params)
    boxes = [Mailbox(3, 16) for _ in range(3)]
    assert len({box.id for box in boxes}) == 3

    @jax.jit
    def run(mailbox):
        return decode(tape, state, params, max_new_tokens=16, return_log_probs=True, mailbox=mailbox)

    for box in boxes:  # one compilation
        result = jax.block_until_ready(run(operand(box)))
        pieces = box.take()
        assert box.take() == []
        for row in range(3):
            tokens = [token for r, _, token, _, _ in pieces if r == row]
            assert tokens == np.asarray(result.tokens)[row].tolist() == np.asarray(want.tokens)[row].tolist()
    assert run._cache_size() == 1

    # Mapped over calls: a row each.
    box = Mailbox(6, 16)
    twice = jax.tree.map(lambda x: jnp.stack([x, x]), (state, params))
    mapped = jax.vmap(lambda state, params, mailbox: decode(tape, state, params, max_new_tokens=16, mailbox=mailbox))
    jax.block_until_ready(mapped(*twice, operand(box).reshape(2, 3, 2)))
    got = [[piece[2] for piece in box_row] for _, box_row in itertools.groupby(sorted(box.take()), lambda p: p[0])]
    assert got == np.tile(np.asarray(want.tokens), (2, 1)).tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_mailboxes_that_do_not_fit(backend):
    spec = spec_of("plain")
    tape, state, params = tape_of(spec, 2), state_of(spec), mixed_params(spec, 3)
    run = jax.jit(lambda mailbox: decode(tape, state, params, max_new_tokens=4, mailbox=mailbox, backend=backend))

    def refused(mailbox, message):
        with pytest.raises(DECODE_ERRORS, match=message):
            jax.block_until_ready(run(mailbox))

    gone = operand(Mailbox(3, 4))
    refused(gone, "mailbox [0-9]+ does not exist in this process, or no longer")
    small, box = Mailbox(3, 3), Mailbox(3, 4)
    refused(operand(small), "room for 3 tokens of a request")
    refused(operand(box) + np.int32([0, 1]), "row 3|row of the mailbox is 3")
    used = Mailbox(3, 4)
    jax.block_until_ready(run(operand(used)))
    refused(operand(used), "in use already")
    np.testing.assert_array_equal(run(np.zeros((3, 2), np.int32)).lengths, 4)  # 0: nobody listens
    with pytest.raises(ValueError, match=re.escape("mailbox is int32[2, 2]; expected int32[3, 2]")):
        run(np.zeros((2, 2), np.int32))
    for rows, capacity in ((0, 1), (1, 0), (2**40, 1)):
        with pytest.raises(ValueError, match="expected 1 to 2147483647"):
            Mailbox(rows, capacity)


def test_calls_without_a_mailbox_are_as_they_were():
    spec = spec_of("plain")
    tape, state, params = tape_of(spec, 2), state_of(spec), mixed_params(spec, 3)
    lowered = jax.jit(lambda *x: decode(*x, max_new_tokens=4)).lower(tape, state, params).as_text()
    (call,) = re.findall(rf"custom_call @{TARGET}\(([^)]*)\)", lowered)
    assert call.count("%") == 19


# ---- Resources ----


def test_a_thousand_streams_leave_nothing(model, beginnings):
    def files() -> int:
        return len(os.listdir("/proc/self/fd"))

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def run(n: int) -> None:
        for i in range(n):
            running = stream(model, beginnings[0], max_new_tokens=4, return_log_probs=False)
            if i % 3 == 0:
                assert len(list(running)) == 8
            elif i % 3 == 1:
                next(running)  # and is dropped
            else:
                for _ in running:
                    break

    run(100)
    gc.collect()
    before = files(), threading.active_count(), resident()
    run(1000)
    gc.collect()
    time.sleep(0.2)  # threads of those that were dropped
    assert files() <= before[0]
    assert threading.active_count() <= before[1]
    assert resident() - before[2] < 8 << 20


PROCESS = """
import sys
from naive import SPECS, random_weights
from jax_monokernel import stream
from jax_monokernel.models import Decoder

model = Decoder.from_weights(SPECS["nope"], random_weights(SPECS["nope"], 3))
running = stream(model, [[3, 1, 4]], max_new_tokens=100_000)
print(next(running).token, len([m for m in sys.modules if m == "jax_monokernel.streaming"]))
"""  # and ends, while the kernel runs


def test_a_process_that_ends_while_a_stream_runs():
    command = [sys.executable, "-c", PROCESS]
    environment = os.environ | {"PYTHONPATH": os.path.dirname(__file__)}
    started = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(" 1\n")
    assert time.monotonic() - started < 60


FORKED = """
import os, warnings
from naive import SPECS, random_weights
from jax_monokernel import stream
from jax_monokernel.models import Decoder

warnings.simplefilter("ignore")  # JAX's, of forks
model = Decoder.from_weights(SPECS["nope"], random_weights(SPECS["nope"], 3))
list(stream(model, [[3, 1, 4]], max_new_tokens=2))
running = stream(model, [[3, 1, 4]], max_new_tokens=100_000)
child = None
for piece in running:
    child = os.fork()
    break
if child == 0:
    try:
        running.result
    except RuntimeError as error:
        os._exit(17 if "forked" in str(error) else 1)
    os._exit(2)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), running.result.lengths[0] < 100_000)
"""


def test_a_fork_while_a_stream_runs():
    environment = os.environ | {"PYTHONPATH": os.path.dirname(__file__)}
    done = subprocess.run(
        [sys.executable, "-c", FORKED], env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.stdout, done.stderr) == ("17 True\n", "")


def test_importing_the_package_does_not_import_it():
    code = (
        "import sys, jax_monokernel; print('jax_monokernel.streaming' in sys.modules, jax_monokernel.Stream.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False Stream\n"


def test_the_benchmark(tmp_path):
    command = [sys.executable, "-m", "benchmarks.streaming", "--shapes", "tiny", "--new-tokens", "8", "--repeats", "2"]
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [*command, "--output", tmp_path], cwd=root, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.iterdir()
    modes = json.loads(path.read_text())["modes"]
    assert [len(mode["seconds"]) for mode in modes.values()] == [2, 2, 2]
    assert modes["stream"]["chosen_ms"]["p50"] > 0
