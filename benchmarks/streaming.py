"""What streaming costs: `stream` against `generate`, interleaved in one process, and how tokens come.

    python -m benchmarks.streaming --shapes smollm2-135m,10m --output benchmarks/results/streaming

One JSON file for each shape: seconds of both for the same request, the time to the first token, and percentiles of the
time between tokens, as the kernel chose them and as the reader got them. Both make text of the tokens. Rounds take
turns; a first one, in which everything is compiled, is not counted. What streaming costs is the median over rounds of
its time by that of `generate` in the same round; in brackets what the median is between, with 95% confidence.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import math
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import jax
import numpy as np

from benchmarks.gpu_kernel import without_places
from jax_monokernel import generate, make_plan, models, prepare, stream
from jax_monokernel._bench.machine import OtherWork, describe_commit, describe_machine, versions
from jax_monokernel._bench.runner import make_prompt
from jax_monokernel._bench.shapes import SHAPES, random_weights, weight_bytes
from jax_monokernel.models import Decoder
from jax_monokernel.tokenizer import TextStream, Tokenizer

_PERCENTILES = (50, 90, 99, 100)


class Wrapped(Tokenizer):
    """A tokenizer for any vocabulary: random weights say nothing, but making text of it costs what text costs."""

    def decode(self, ids: Iterable[SupportsIndex], *, skip_special_tokens: bool = True) -> str:  # noqa: D102
        size = self.vocab_size
        return super().decode([int(i) % size for i in ids], skip_special_tokens=skip_special_tokens)

    def stream(self, *, skip_special_tokens: bool = True) -> TextStream:  # noqa: D102
        made, size = super().stream(skip_special_tokens=skip_special_tokens), self.vocab_size
        put = made.put
        made.put = lambda token: put(int(token) % size)  # type: ignore[method-assign]
        return made


class Speaker(Decoder):
    """Random weights with a tokenizer."""

    tokenizer: Any = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="smollm2-135m", help=f"of {', '.join(SHAPES)}; separated by commas")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=32, help="tokens")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, help="of the kernel, on a CPU; by default all")
    parser.add_argument("--no-log-probs", action="store_true", help="tokens and text only, of both")
    parser.add_argument("--commit", help="of the code, where it is measured outside its repository")
    parser.add_argument("--output", type=Path, help="folder for the results")
    arguments = parser.parse_args()
    for name in arguments.shapes.split(","):
        result = measure(name, arguments)
        print(summary(result))
        if arguments.output is not None:
            arguments.output.mkdir(parents=True, exist_ok=True)
            threads = f"-t{result['plan_units']}" if result["platform"] == "cpu" else ""
            path = arguments.output / f"{name}-p{arguments.prompt}-b{arguments.batch}{threads}.json"
            path.write_text(json.dumps(result, indent=1) + "\n")


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One result: times of every round, and what follows from them."""
    spec = SHAPES[name].spec()
    model = Speaker.from_weights(spec, random_weights(spec))
    Speaker.tokenizer = Wrapped.from_folder(models.SMALL)
    ready = prepare(model, make_plan(spec, units=arguments.threads))
    prompt = make_prompt(arguments.batch, arguments.prompt, spec.vocab_size)
    options: dict[str, Any] = {
        "max_new_tokens": arguments.new_tokens,
        "eos_token_id": (),
        "return_log_probs": not arguments.no_log_probs,
    }

    def plain() -> dict[str, Any]:
        generate(ready, prompt, **options)
        return {}

    def streamed() -> dict[str, Any]:
        return follow(lambda got: [got(piece) for piece in stream(ready, prompt, **options)])

    def streamed_async() -> dict[str, Any]:
        async def read(got: Callable[[Any], None]) -> None:
            async for piece in stream(ready, prompt, **options):
                got(piece)

        return follow(lambda got: loop.run(read(got)))

    loop = asyncio.Runner()  # a server has one
    modes = {"generate": plain, "stream": streamed, "async": streamed_async}
    rounds: dict[str, list[dict[str, Any]]] = {mode: [] for mode in modes}
    others = OtherWork([])
    for i in range(arguments.repeats + 1):
        for mode in list(modes)[i % 3 :] + list(modes)[: i % 3]:
            start, used = time.perf_counter(), time.process_time()
            found = modes[mode]()
            found |= {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - used}
            if i > 0:
                rounds[mode].append(found)
        if i == 0:
            others = OtherWork([os.getpid()])
    loop.close()
    plan = ready.tape.plan
    return {
        "shape": name,
        "title": SHAPES[name].title,
        "weight_bytes": weight_bytes(spec),
        "batch": arguments.batch,
        "prompt": arguments.prompt,
        "new_tokens": arguments.new_tokens,
        "log_probs": options["return_log_probs"],
        "platform": plan.platform,
        "device": jax.devices()[0].device_kind,
        "plan_units": plan.units,
        "command": shlex.join(["python", "-m", "benchmarks.streaming", *without_places(sys.argv[1:])]),
        "date": datetime.date.today().isoformat(),
        "other_work": others.share(),
        "machine": describe_machine(),
        "versions": versions(),
        **({"commit": arguments.commit, "dirty": False} if arguments.commit else describe_commit()),
        "modes": {mode: digest(mode, rounds[mode], rounds["generate"]) for mode in modes},
    }


def follow(read: Callable[[Callable[[Any], None]], Any]) -> dict[str, Any]:
    """Reads a stream and notes when its first row's pieces were chosen and when they came, in seconds."""
    start = time.perf_counter()
    chosen: list[float] = []
    came: list[float] = []
    used = 0.0

    def got(piece: Any) -> None:
        nonlocal used
        if piece.row == 0:
            chosen.append(piece.time)
            came.append(time.perf_counter() - start)
            used = used or time.thread_time()

    read(got)
    return {
        "first": came[0],
        "reader": (time.thread_time() - used) / (len(came) - 1),
        "chosen": np.diff(chosen),
        "came": np.diff(came),
    } | {"late": np.subtract(came, chosen)}


def digest(mode: str, rounds: list[dict[str, Any]], plain: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over rounds and percentiles over all tokens of all rounds."""
    seconds = [found["seconds"] for found in rounds]
    result: dict[str, Any] = {
        "seconds": seconds,
        "median_s": statistics.median(seconds),
        "least_s": min(seconds),
        "cpu_median_s": statistics.median(found["cpu_seconds"] for found in rounds),
    }
    if mode == "generate":
        return result
    # Rounds are paired, so that what slows both of a pair does not count.
    ratios = [a["seconds"] / b["seconds"] for a, b in zip(rounds, plain, strict=True)]
    result["of_generate"] = statistics.median(ratios)
    result["of_generate_95"] = median_interval(ratios)
    result["first_token_median_s"] = statistics.median(found["first"] for found in rounds)
    # Of the thread that reads: what it takes from a kernel that has all cores, whatever else the machine does.
    result["reader_cpu_s_per_token"] = statistics.median(found["reader"] for found in rounds)
    for key in ("chosen", "came", "late"):
        values = np.concatenate([found[key] for found in rounds]) * 1e3
        result[f"{key}_ms"] = {f"p{p}": round(float(np.percentile(values, p)), 4) for p in _PERCENTILES}
    return result


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Of the median of what the values are drawn from, whatever its distribution: two of the values, at least 95%."""
    ordered, n = sorted(values), len(values)
    cut, tail = 0, 0.5**n  # the chance that at most `cut` values are below the median
    while cut < (n - 1) // 2 and tail + math.comb(n, cut + 1) * 0.5**n <= 0.025:
        cut += 1
        tail += math.comb(n, cut) * 0.5**n
    return ordered[cut], ordered[n - 1 - cut]


def summary(result: dict[str, Any]) -> str:
    """A few lines for people."""
    lines = [f"{result['title']}, batch {result['batch']}, {result['plan_units']} units:"]
    for mode, m in result["modes"].items():
        line = f"  {mode:9} median {m['median_s'] * 1e3:8.2f} ms, least {m['least_s'] * 1e3:8.2f} ms"
        if "of_generate" in m:
            low, high = m["of_generate_95"]
            line += f", {m['of_generate'] - 1:+.1%} ({low - 1:+.1%} to {high - 1:+.1%})"
            line += f"; first token {m['first_token_median_s'] * 1e3:.2f} ms"
            line += f"; reader {m['reader_cpu_s_per_token'] * 1e6:.1f} us a token; "
            line += f"chosen {m['chosen_ms']}, came {m['came_ms']}; late {m['late_ms']}"
        lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    main()
