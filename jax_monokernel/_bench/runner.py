"""Peers measured in turns in one process."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from jax_monokernel._bench.energy import Meter
from jax_monokernel._bench.shapes import kv_bytes, weight_bytes
from jax_monokernel.spec import DecoderSpec


class Peer(Protocol):
    """Something that is measured. `settings` goes into the result."""

    settings: dict[str, Any]

    def measure(self) -> dict[str, Any]:
        """{"seconds": of all steps, "tokens": int [batch][new_tokens]}; of a probe {"seconds", "bytes"}."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """What is decoded."""

    model: str  # its name, or that of its shape
    batch: int
    prompt_tokens: int
    new_tokens: int


def make_prompt(batch: int, tokens: int, vocab_size: int) -> np.ndarray:
    """Random token ids int64 [batch, tokens], the same for every peer."""
    return np.random.default_rng(0).integers(vocab_size, size=(batch, tokens))


def bytes_per_step(spec: DecoderSpec, batch: int, prompt_tokens: int, new_tokens: int) -> int:
    """What a step must read, on average: all weights, and the keys and values of the places that it attends to."""
    visible = prompt_tokens + (new_tokens - 1) / 2
    return int(weight_bytes(spec) + batch * kv_bytes(spec, visible))


def measure(
    spec: DecoderSpec,
    workload: Workload,
    peers: Mapping[str, Peer],
    *,
    rounds: int,
    meter: Meter | None = None,
    energy_seconds: float = 2.0,
    report: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The workload and what each peer took, for `summarize`. A first round, in which all is compiled, does not count.

    Args:
      spec: the model.
      workload: what the peers decode.
      peers: by name.
      rounds: in each, every peer is measured once, and each begins with another.
      meter: energy is read before and after calls that each peer repeats at the end.
      energy_seconds: for how long it does so; once at least.
      report: is told of each round.

    Raises:
      RuntimeError: a peer that gives other tokens than before.
    """
    names = list(peers)
    columns: dict[str, dict[str, Any]] = {name: {"seconds": [], "settings": peers[name].settings} for name in names}
    tokens: dict[str, np.ndarray] = {}
    for number in range(rounds + 1):
        report(f"round {number} of {rounds}" + (", which compiles and does not count" if number == 0 else ""))
        for turn in range(len(names)):
            name = names[(number + turn) % len(names)]
            found = peers[name].measure()
            if "tokens" in found:
                made = np.asarray(found["tokens"], np.int32)
                if not np.array_equal(tokens.setdefault(name, made), made):
                    raise RuntimeError(f"{name} gave other tokens in round {number} than before")
            else:
                columns[name]["bytes"] = found["bytes"]
            if number > 0:
                columns[name]["seconds"].append(found["seconds"])
    for name, peer in peers.items():
        if steps := getattr(peer, "steps", None):  # of peers that can tell one from another
            report(f"single steps of {name}")
            columns[name]["steps"] = steps()
        if meter is not None and name in tokens:
            report(f"energy of {name}")
            columns[name]["energy"] = _energy(peer, meter, energy_seconds)
    result: dict[str, Any] = {"workload": _described(spec, workload, rounds), "peers": columns}
    for name, made in tokens.items():
        columns[name]["tokens_sha256"] = hashlib.sha256(made.astype("<i4").tobytes()).hexdigest()[:16]
        if name != "ours" and "ours" in tokens:
            # Of random weights near ties come early; rounding then decides.
            same = np.cumprod(made == tokens["ours"], axis=1).sum(1)
            columns[name]["tokens_as_ours_until"] = same.tolist()
    return result


def _energy(peer: Peer, meter: Meter, seconds: float) -> dict[str, float]:
    """What is used for many calls one after the other, because a GPU's counter moves ten times a second or less."""
    before, start, calls = meter.joules(), time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - start < seconds:
        peer.measure()
        calls += 1
    return {"joules": meter.joules() - before, "calls": calls, "seconds": time.perf_counter() - start}


def _described(spec: DecoderSpec, workload: Workload, rounds: int) -> dict[str, Any]:
    step = bytes_per_step(spec, workload.batch, workload.prompt_tokens, workload.new_tokens)
    return {**dataclasses.asdict(workload), "dtype": spec.dtype, "bytes_per_step": step, "repeats": rounds}
