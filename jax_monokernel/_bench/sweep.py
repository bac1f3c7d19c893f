"""Measurements of several workloads, each with what is needed to believe and to repeat it."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax_monokernel import models
from jax_monokernel._bench import machine
from jax_monokernel._bench.energy import find_meter, find_meter_or_reason
from jax_monokernel._bench.jax_loop import not_covered
from jax_monokernel._bench.peers import PEERS, make_peers
from jax_monokernel._bench.probe import Probe
from jax_monokernel._bench.runner import Workload, bytes_per_step, measure
from jax_monokernel._bench.shapes import SHAPES, random_weights_on_device, weight_bytes
from jax_monokernel._bench.summary import describe, summarize
from jax_monokernel.plan import default_platform, make_plan
from jax_monokernel.spec import DecoderSpec
from jax_monokernel.weights import DecoderWeights


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """What to measure: every combination of models and shapes, batches and prompts.

    Raises:
      ValueError: a peer or a shape that there is not, or threads where JAX uses a GPU.
    """

    models: tuple[str, ...] = ()  # checkpoint folders, hub ids, or "small"
    shapes: tuple[str, ...] = ()
    batches: tuple[int, ...] = (1,)
    prompts: tuple[int, ...] = (32,)  # tokens
    new_tokens: int = 64
    rounds: int = 10
    peers: tuple[str, ...] = (*PEERS, "probe")
    dtype: str | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in self.peers:
            if name not in (*PEERS, "probe"):
                raise ValueError(f"there is no peer {name!r}; expected some of {', '.join(PEERS)}, probe")
        if "ours" not in self.peers:
            raise ValueError("the peers must have ours among them, which the others are compared with")
        for name in self.shapes:
            if name not in SHAPES:
                raise ValueError(f"there is no shape {name!r}; expected one of {', '.join(SHAPES)}")
        if self.threads is not None and default_platform() != "cpu":
            raise ValueError("threads are for CPUs, and JAX uses a GPU here; leave them out, or set JAX_PLATFORMS=cpu")


def run(
    sweep: Sweep, say: Callable[[str], None], progress: Callable[[str], None] = lambda text: None
) -> list[dict[str, Any]]:
    """A result for each workload: where, when and with what it was measured, and what `summarize` makes of it.

    `say` is told of results, `progress` of what is being done.

    Raises:
      ValueError: a model that cannot be loaded.
    """
    device = machine.default_device()
    meter, energy = find_meter_or_reason(lambda: find_meter(device))
    about = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **machine.describe_commit(),
        "device": machine.describe_device(device),
        "machine": machine.describe_machine(),
        "versions": machine.versions(),
        "energy": energy,
    }
    driver = about["device"].get("driver_version")
    say(f"{about['device']['name']}{f', driver {driver}' if driver else ''}; energy: {energy}")
    results = []
    for title in sweep.models + sweep.shapes:
        progress(f"loading {title}")
        spec, weights = _load(sweep, title)
        plan = make_plan(spec, units=sweep.threads)
        names = [name for name in sweep.peers if name != "probe"]
        if "jax_loop" in names and (part := not_covered(spec)):
            names.remove("jax_loop")
            say(f"\n{title}: jax_loop is left out, as it knows no {part}")
        for batch, prompt in itertools.product(sweep.batches, sweep.prompts):
            name = title if title in sweep.shapes else Path(title).name
            work = Workload(model=name, batch=batch, prompt_tokens=prompt, new_tokens=sweep.new_tokens)
            say(f"\n{name}, batch {batch}, prompt {prompt}, {work.new_tokens} new tokens, {sweep.rounds} rounds")
            progress("packing and prefilling")
            peers = make_peers(spec, weights, work, names, plan)
            if "probe" in sweep.peers:
                peers["probe"] = Probe(bytes_per_step(spec, batch, prompt, work.new_tokens), plan.units)
            other_work = machine.OtherWork()
            found = summarize(measure(spec, work, peers, rounds=sweep.rounds, meter=meter, report=progress))
            busy = round(other_work.share(), 3) if device.platform == "cpu" else 0.0
            for label, numbers in found["peers"].items():
                say(describe(label, numbers))
            if busy > machine.BUSY:
                say(f"other work took {busy:.0%} of the CPUs: these numbers say little")
            results.append({**about, "busy": busy, "command": _command(sweep, title, work), **found})
    return results


def _load(sweep: Sweep, title: str) -> tuple[DecoderSpec, DecoderWeights]:
    if title in sweep.shapes:
        spec = SHAPES[title].spec(sweep.dtype or "bfloat16")
        _check_room(title, spec)
        return spec, random_weights_on_device(spec)
    loaded = models.from_pretrained(models.SMALL if title == "small" else title, dtype=sweep.dtype)
    return loaded.spec, loaded.decoder_weights()


def _check_room(title: str, spec: DecoderSpec) -> None:
    """Raises ValueError where memory cannot hold the weights, the tape, and what packing takes besides."""
    need, free = 3 * weight_bytes(spec), machine.free_memory()
    if free is not None and need > free:
        raise ValueError(
            f"{title} takes about {need / 1e9:.0f} GB while its weights are packed, and {free / 1e9:.0f} GB are free "
            "here; choose a smaller shape"
        )


def _command(sweep: Sweep, title: str, work: Workload) -> str:
    """What repeats one result, without what depends on where things lie."""
    parts = ["jax-monokernel", "bench", "--shape" if title in sweep.shapes else "--model", work.model]
    parts += ["--batch", str(work.batch), "--prompt", str(work.prompt_tokens), "--new-tokens", str(work.new_tokens)]
    parts += ["--rounds", str(sweep.rounds), "--peers", ",".join(sweep.peers)]
    parts += ["--dtype", sweep.dtype] if sweep.dtype else []
    parts += ["--threads", str(sweep.threads)] if sweep.threads else []
    return shlex.join(parts)
