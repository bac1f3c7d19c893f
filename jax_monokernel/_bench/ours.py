"""What is being measured: one `decode` call, the whole loop inside."""

from __future__ import annotations

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_monokernel import DecoderSpec, DecodeState, empty_state
from jax_monokernel.decode import decode
from jax_monokernel.mailbox import Mailbox, operand
from jax_monokernel.plan import Plan, make_plan
from jax_monokernel.prefill import prefill
from jax_monokernel.prepared import pack_for
from jax_monokernel.sampling import GenerationConfig, sampling_params
from jax_monokernel.weights import DecoderWeights


def prefilled(spec: DecoderSpec, weights: DecoderWeights, prompt: np.ndarray, new_tokens: int) -> DecodeState:
    """`prompt` (int [batch, tokens]) in a cache with room for `new_tokens` more."""
    batch, length = prompt.shape
    state = empty_state(spec, batch=batch, capacity=length + new_tokens, key=jax.random.key(0))
    return prefill(spec, weights, jnp.asarray(prompt, jnp.int32), jnp.full(batch, length, jnp.int32), state)


class Ours:
    """Greedy decoding of `prompt` (int [batch, tokens], equal lengths) with the given weights."""

    def __init__(
        self,
        spec: DecoderSpec,
        weights: DecoderWeights,
        prompt: np.ndarray,
        new_tokens: int,
        *,
        plan: Plan | None = None,
    ):
        self._state = prefilled(spec, weights, prompt, new_tokens)
        self._tape, placement = pack_for(spec, weights, plan or make_plan(spec))
        jax.block_until_ready(self._tape)
        config = GenerationConfig(do_sample=False, max_new_tokens=new_tokens)
        self._sampling = sampling_params(config, batch=len(prompt), vocab_size=spec.vocab_size)
        self._decode = jax.jit(functools.partial(decode, max_new_tokens=new_tokens), donate_argnames="state")
        self._shape = len(prompt), new_tokens
        self.settings: dict[str, Any] = {"plan_units": self._tape.plan.units}
        if placement is not None:
            self.settings["placement"] = placement.describe()

    def measure(self) -> dict:
        """{"seconds": of new_tokens steps, "tokens": int [batch][new_tokens]}."""
        state = jax.block_until_ready(jax.tree.map(jnp.copy, self._state))
        start = time.perf_counter()
        result = jax.block_until_ready(self._decode(self._tape, state, self._sampling))
        return {"seconds": time.perf_counter() - start, "tokens": np.asarray(result.tokens).tolist()}

    def steps(self) -> list[float]:
        """Seconds from one token to the next, by the kernel's own clock, in one more call.

        There is a mailbox to look into afterwards, and nobody who reads along.
        """
        for _ in range(2):  # the first one compiles
            box = Mailbox(*self._shape)
            state = jax.block_until_ready(jax.tree.map(jnp.copy, self._state))
            jax.block_until_ready(self._decode(self._tape, state, self._sampling, mailbox=operand(box)))
        came: list[int] = []
        while records := box.take(0.0):
            came += [time_ns for row, *_, time_ns in records if row == 0]
        return (np.diff(np.array(came, np.int64)) * 1e-9).tolist()
