"""Streams from the GPU kernel, without a GPU: the run time on stand-ins for drivers, and the kernel on the executor."""

from __future__ import annotations

import functools
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding import DECODE_ERRORS, STEPS, mixed_params, params_of, reference_of_mixed, replace_row, spec_of, state_of
from gpu_decode import Kernel, decode_on_host, gpu_plan, gpu_tape_of
from gpu_fakes import PLATFORMS, make_call, register
from gpu_host import HostError

from jax_monokernel import _native, cancel, decode
from jax_monokernel.mailbox import Mailbox, operand
from jax_monokernel.state import STOPPED

UNITS = 3


@functools.partial(jax.jit, static_argnames="steps")
def run(tape, state, params, mailbox, steps=STEPS):
    return decode(tape, state, params, max_new_tokens=steps, return_log_probs=True, mailbox=mailbox)


@pytest.fixture
def rocm(rocm_stand_in, monkeypatch):
    register()
    monkeypatch.setattr(sys.modules["jax_monokernel.decode"], "TARGET", "jax_monokernel_decode_on_fake_rocm")
    return rocm_stand_in


def tape_for(spec):
    return jax.tree.map(jnp.asarray, gpu_tape_of(spec, gpu_plan(spec, 64, UNITS)))


def long_one():
    """A request of minutes."""
    spec = spec_of("plain")
    cache = jnp.ones((1, 2, 2, 60_000, 8))
    state = state_of(spec, (3,))
    state = type(state)(**{**state.__dict__, "k_cache": cache, "v_cache": cache})
    return tape_for(spec), state, params_of(spec, 1, max_new_tokens=50_000, temperature=1.0)


class Background(threading.Thread):
    """A call beside the test, with its mailbox."""

    def __init__(self, arguments, steps):
        super().__init__()
        self.box, self.result, self.error = Mailbox(1, steps), None, None
        self.work = lambda: jax.block_until_ready(run(*arguments, operand(self.box), steps=steps))
        self.start()

    def run(self):
        try:
            self.result = self.work()
        except Exception as error:
            self.error = error
        self.box.finish()

    def first(self):
        """Waits for tokens."""
        end, pieces = time.monotonic() + 120, []
        while not pieces and time.monotonic() < end and not self.box.finished:
            pieces = self.box.take(0.5)
        assert pieces, self.error
        return pieces


# ---- The kernel ----


@pytest.mark.parametrize("wave", [32, 64])
@pytest.mark.parametrize("log_probs", [True, False], ids=["log_probs", "tokens"])
def test_the_kernel_leaves_every_token(wave, log_probs):
    spec = spec_of("windows")
    state = replace_row(state_of(spec), 1, status=STOPPED)
    params = mixed_params(spec, 3)
    kernel = Kernel(spec, gpu_plan(spec, wave, UNITS), 3)
    words = np.zeros((3, STEPS, 2), np.uint64)

    def with_mailbox(library, args, **options):
        from gpu_host import run

        return run(library, {**args, "mailbox": words}, **options)

    got, done = decode_on_host(kernel, state, params, STEPS, return_log_probs=log_probs, run=with_mailbox)
    assert done.report["reason"] == 0
    np.testing.assert_array_equal(words[1], 0)
    for row in (0, 2):
        np.testing.assert_array_equal(
            words[row, :, 0] >> np.uint64(32), np.asarray(got.tokens)[row].astype(np.int64) | 1 << 31
        )
        bits = (words[row, :, 0] & np.uint64(0xFFFFFFFF)).astype(np.uint32)
        want = np.asarray(got.log_probs)[row] if log_probs else np.zeros(STEPS, np.float32)
        np.testing.assert_array_equal(bits.view(np.float32), want)
        assert (words[row, :, 1] > 0).all()
        assert (np.diff(words[row, :, 1].astype(np.int64)) > 0).all()


def test_the_executor_watches_the_mailbox():
    """One that is too small."""
    spec = spec_of("plain")
    kernel = Kernel(spec, gpu_plan(spec, 32, UNITS), 3)

    def with_mailbox(library, args, **options):
        from gpu_host import run

        return run(library, {**args, "mailbox": np.zeros((3, 2, 2), np.uint64)}, **options)

    with pytest.raises(HostError, match=r"head\.h:\d+: .* is in none of the kernel's operands"):
        decode_on_host(kernel, state_of(spec), params_of(spec, 3), 3, run=with_mailbox)


# ---- From a call to its reader ----


def test_tokens_come_from_a_kernel_that_runs(rocm):
    spec = spec_of("windows")
    box = Mailbox(3, STEPS)
    got = jax.block_until_ready(run(tape_for(spec), state_of(spec), mixed_params(spec, 3), operand(box)))
    np.testing.assert_array_equal(got.tokens, reference_of_mixed(spec).tokens)
    pieces = box.take()
    assert [p[4] for p in pieces] == sorted(p[4] for p in pieces)
    for row in range(3):
        mine = [p for p in pieces if p[0] == row]
        assert [p[1] for p in mine] == list(range(STEPS))
        assert [p[2] for p in mine] == np.asarray(got.tokens)[row].tolist()
        np.testing.assert_array_equal(np.float32([p[3] for p in mine]), np.asarray(got.log_probs)[row])
    # A larger one after a smaller one, whose memory is given back.
    spec = spec_of("plain")
    box = Mailbox(1, 1000)
    got = jax.block_until_ready(run(tape_for(spec), state_of(spec, (3,)), params_of(spec, 1), operand(box), steps=1000))
    assert [p[2] for p in box.take()] == np.asarray(got.tokens)[0, : int(got.lengths[0])].tolist()


def test_the_reader_ends_a_kernel(rocm):
    tape, state, params = long_one()
    call = Background((tape, state, params), 50_000)
    pieces = call.first()
    assert call.is_alive()
    call.box.stop()
    asked = Mailbox.now_ns()
    call.join()
    pieces += call.box.take()
    result = call.result
    made = int(result.lengths[0])
    assert made == len(pieces) < 50_000
    assert sum(p[4] > asked for p in pieces) <= 2  # the host looks every 50 microseconds, the kernel once per token
    assert np.asarray(result.tokens)[0, :made].tolist() == [p[2] for p in pieces]
    assert int(result.state.position[0]) == 3 + made
    assert int(result.state.last_token[0]) == pieces[-1][2]
    # And the state can be gone on from.
    nobody = np.zeros((1, 2), np.int32)
    more = run(tape, result.state, params, nobody, steps=4)
    if made < 200:
        whole = run(tape, state, params, nobody, steps=made + 4)
        np.testing.assert_array_equal(more.tokens[0], whole.tokens[0, made:])


def test_cancel_ends_a_kernel_that_streams_without_an_error(rocm):
    call = Background(long_one(), 50_000)
    call.first()
    cancel()
    call.join()
    assert call.error is None
    assert call.box.cancelled
    assert int(call.result.lengths[0]) < 50_000


def test_a_call_that_is_left_while_it_waits_for_the_device(rocm):
    arguments = long_one()
    first = Background(arguments, 50_000)
    first.first()
    launches = rocm.launches
    second = Background(arguments, 50_000)
    second.box.stop()
    time.sleep(0.2)
    first.box.stop()  # calls for a device take turns, and what they are left for is known in their turn
    first.join()
    second.join()
    assert second.error is None
    assert rocm.launches == launches
    assert int(second.result.lengths[0]) == 0
    assert (np.asarray(second.result.tokens) == -1).all()
    assert (np.asarray(second.result.log_probs) == 0).all()
    np.testing.assert_array_equal(second.result.state.position, arguments[1].position)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_run_time_brings_what_the_device_wrote(make_fake, platform):
    fake = make_fake(platform)
    call = make_call(platform, batch=2)
    box = Mailbox(2, 4)
    call.operands["mailbox"] = operand(box)
    results = call.run()
    pieces = box.take()
    for row in range(2):
        mine = [p for p in pieces if p[0] == row]
        assert [p[2] for p in mine] == results["tokens"][row].tolist()
        if row == 0:  # of the second the stand-in's times begin anew, which no clock does
            assert np.diff([p[4] for p in mine]).tolist() == [1_000_000] * 3
    assert abs(pieces[-1][4] - Mailbox.now_ns()) < 60e9
    with pytest.raises(DECODE_ERRORS, match=r"INVALID_ARGUMENT.*row 0 of the mailbox is in use already"):
        call.run()
    del box
    with pytest.raises(DECODE_ERRORS, match=r"INVALID_ARGUMENT.*does not exist in this process"):
        call.run()
    call.operands["mailbox"] = np.zeros((2, 3), np.int32)
    with pytest.raises(DECODE_ERRORS, match=r"mailbox is s32\[2,3\]; expected s32\[2,2\]"):
        call.run()
    call.operands["mailbox"] = operand(Mailbox(2, 3))
    assert fake.launches == 1
    call.operands |= {f"another {i}": call.operands["mailbox"] for i in range(3)}  # one or two are other things
    with pytest.raises(DECODE_ERRORS, match="made by another version"):
        call.run()
    assert _native.find_mailbox(12345) is None
