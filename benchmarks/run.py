"""Measures decode beside its peers, all in one run: `python -m benchmarks.run --help`."""

from __future__ import annotations

import argparse
import datetime
import hashlib
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.checkpoint_model import write_checkpoint
from benchmarks.gguf_model import write_gguf
from jax_monokernel._bench.energy import Meter, find_meter_or_reason, rapl
from jax_monokernel._bench.machine import BUSY, OtherWork, describe_commit, describe_machine, versions
from jax_monokernel._bench.runner import bytes_per_step, make_prompt
from jax_monokernel._bench.shapes import SHAPES, random_weights
from jax_monokernel._bench.summary import describe, summarize

_REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
PEERS = ("ours", "llama_cpp", "transformers", "jax_loop", "probe")
# llama.cpp as it comes, and with what may make it faster: huge pages (which a mapped file does not get), and those
# without flash attention. The report compares with the fastest.
_HUGE_PAGES = "mmap=0,GLIBC_TUNABLES=glibc.malloc.hugetlb=1"
DEFAULT_PEERS = (
    "ours",
    "llama_cpp",
    f"llama_cpp:{_HUGE_PAGES}",
    f"llama_cpp:flash_attention=0,{_HUGE_PAGES}",
    "jax_loop",
    "probe",
)


class Worker:
    """One peer in a child process of its own.

    Between measurements the process is stopped: threads may spin for a good while after their work (llama.cpp's poll
    for tenths of a second), and would take the CPUs from the peer that is measured next.
    """

    def __init__(self, label: str, job: dict[str, Any], *, python: str, environment: dict[str, str]):
        self.label = label
        self._child = subprocess.Popen(
            [python, "-m", "benchmarks.worker"],
            cwd=_REPOSITORY,
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._child.pid
        self.settings = self._ask(json.dumps(job))["settings"] | environment
        self._child.send_signal(signal.SIGSTOP)

    def measure(self) -> dict[str, Any]:
        """One measurement, as the peer's `measure` gives it."""
        self._child.send_signal(signal.SIGCONT)
        found = self._ask("measure")
        self._child.send_signal(signal.SIGSTOP)
        return found

    def steps(self) -> list[float]:
        """Seconds of single steps, of a peer that is asked for them apart from its measurements."""
        self._child.send_signal(signal.SIGCONT)
        found = self._ask("steps")["steps"]
        self._child.send_signal(signal.SIGSTOP)
        return found

    def close(self) -> None:
        """Ends the child process."""
        self._child.send_signal(signal.SIGCONT)
        try:
            self._child.communicate(timeout=10)  # the end of its input ends it
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.communicate()

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        try:
            print(line, file=self._child.stdin, flush=True)
            answer = self._child.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise RuntimeError(f"peer {self.label} ended with exit code {self._child.wait()}; its messages are above")
        return json.loads(answer)


def parse_peer(text: str) -> tuple[str, dict[str, Any], dict[str, str]]:
    """`llama_cpp:mmap=1,OMP_PROC_BIND=true` as (peer, {"mmap": 1}, {"OMP_PROC_BIND": "true"}).

    Raises:
      ValueError: an unknown peer, or a setting without a value.
    """
    kind, _, rest = text.partition(":")
    if kind not in PEERS:
        raise ValueError(f"unknown peer {kind!r}; expected one of {', '.join(PEERS)}")
    settings: dict[str, Any] = {}
    environment = {}
    for item in filter(None, rest.split(",")):
        name, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"peer setting {item!r} has no value; expected name=value")
        if name.isupper():
            environment[name] = value
        else:
            settings[name] = int(value) if value.isdigit() else value
    return kind, settings, environment


def measure(
    shape: str,
    *,
    peers: list[str],
    prompt_tokens: int,
    new_tokens: int,
    batch: int,
    threads: int,
    repeats: int,
    at_most: int,
    dtype: str,
    llama_python: str,
) -> dict[str, Any]:
    """The workload and every peer's measurements, interleaved. Peers are written as in `parse_peer`.

    Raises:
      RuntimeError: a peer failed; its own messages are on stderr.
    """
    spec = SHAPES[shape].spec(dtype)
    workload = {
        "shape": shape,
        "dtype": dtype,
        "batch": batch,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "threads": threads,
        "bytes_per_step": bytes_per_step(spec, batch, prompt_tokens, new_tokens),
        "repeats": repeats,
    }
    prompt = make_prompt(batch, prompt_tokens, spec.vocab_size)
    job = workload | {"prompt": prompt.tolist(), "cpus": _cpus(threads)}
    environment = {"MONOKERNEL_THREADS": str(threads), "OMP_NUM_THREADS": str(threads), "JAX_PLATFORMS": "cpu"}
    meter, energy = find_meter_or_reason(rapl)
    workers: list[Worker] = []
    with tempfile.TemporaryDirectory(prefix="monokernel-bench-") as folder:
        try:
            for label in peers:
                kind, settings, own = parse_peer(label)
                gguf = Path(folder, "model.gguf")
                if kind == "llama_cpp" and not gguf.exists():
                    write_gguf(gguf, spec, random_weights(spec))
                checkpoint = Path(folder, "checkpoint")
                if kind == "transformers" and not checkpoint.exists():
                    write_checkpoint(checkpoint, spec, random_weights(spec))
                print(f"  starting {label}", file=sys.stderr)
                this_job = job | {"peer": kind, "settings": settings, "gguf": str(gguf), "checkpoint": str(checkpoint)}
                python = llama_python if kind == "llama_cpp" else sys.executable
                workers.append(Worker(label, this_job, python=python, environment=environment | own))
            measured, busy = _interleave(workers, repeats, at_most, meter)
            for worker in workers:
                if parse_peer(worker.label)[0] == "ours":
                    measured[worker.label]["steps"] = worker.steps()
        finally:
            for worker in workers:
                worker.close()
    for worker in workers:
        kept = {name: value for name, value in worker.settings.items() if name not in environment}
        measured[worker.label]["settings"] = kept
    return {"workload": workload, "busy": busy, "energy": energy, "peers": measured}


def _interleave(
    workers: list[Worker], repeats: int, at_most: int, meter: Meter | None
) -> tuple[dict[str, dict[str, Any]], float]:
    """Per peer, seconds and joules of each round and a hash of its tokens; the largest share of other work in a round.

    One more round comes first, to warm up. Rounds disturbed by other work are repeated, up to `at_most` rounds in all;
    the `repeats` least disturbed ones count, however fast they were.
    """
    rounds: list[tuple[float, list[dict[str, Any]]]] = []
    digests: dict[str, str] = {}
    for round_number in range(at_most + 1):
        other_work = OtherWork([os.getpid(), *(worker.pid for worker in workers)])
        found: list[dict[str, Any]] = [{}] * len(workers)
        for turn in range(len(workers)):
            # Each round starts with another peer, so that none always follows the same one.
            index = (round_number + turn) % len(workers)
            before = meter.joules() if meter else 0.0
            found[index] = workers[index].measure()
            if meter and "tokens" in found[index]:
                found[index]["joules"] = meter.joules() - before
        for worker, one in zip(workers, found, strict=True):
            digest = hashlib.sha256(np.array(one.pop("tokens", []), "<i4").tobytes()).hexdigest()[:16]
            if digests.setdefault(worker.label, digest) != digest:
                raise RuntimeError(f"{worker.label} gave other tokens in round {round_number} than before")
        busy = round(other_work.share(), 3)
        print(f"  round {round_number}: {busy:.1%} other work", file=sys.stderr)
        if round_number > 0:
            rounds.append((busy, found))
        if sum(share <= BUSY for share, _ in rounds) == repeats:
            break
    kept = sorted(rounds, key=lambda pair: pair[0])[:repeats]
    measured: dict[str, dict[str, Any]] = {}
    for index, worker in enumerate(workers):
        columns = {name: [found[index][name] for _, found in kept] for name in kept[0][1][index]}
        measured[worker.label] = columns | (
            {"bytes": columns["bytes"][0]} if "bytes" in columns else {"tokens_sha256": digests[worker.label]}
        )
    return measured, max(share for share, _ in kept)


def _cpus(threads: int) -> list[int] | None:
    """The CPUs that every peer is held to: as many as threads, or None where they cannot be chosen."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    allowed = sorted(os.sched_getaffinity(0))
    if threads > len(allowed):
        raise SystemExit(f"{threads} threads were asked for, but only {len(allowed)} CPUs may be used")
    return allowed[:threads]


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser.add_argument("--shapes", default="10m,smollm2-135m,qwen2.5-0.5b", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--prompt", type=numbers, default=[32], metavar="N,...", help="prompt lengths in tokens")
    parser.add_argument("--batch", type=numbers, default=[1], metavar="N,...", help="rows decoded together")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=len(_affinity()), help="for every peer; default: all CPUs")
    parser.add_argument("--repeats", type=int, default=7, help="rounds; in each, every peer is measured once")
    parser.add_argument(
        "--rounds-at-most",
        type=int,
        default=0,
        help="how many rounds to try where other work disturbs them; the least disturbed ones count",
    )
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument(
        "--peers",
        nargs="+",
        default=list(DEFAULT_PEERS),
        metavar="PEER[:NAME=VALUE,...]",
        help=f"of {', '.join(PEERS)}; settings are arguments of the peer, or environment variables in capitals",
    )
    parser.add_argument("--also", nargs="+", default=[], metavar="PEER", help="peers besides those of --peers")
    parser.add_argument("--llama-python", default=sys.executable, help="interpreter that has llama-cpp-python")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON files")
    arguments = parser.parse_args(argv)
    arguments.peers += arguments.also
    try:
        for shape in arguments.shapes.split(","):
            if shape not in SHAPES:
                raise ValueError(f"unknown shape {shape!r}; expected one of {', '.join(SHAPES)}")
        for peer in arguments.peers:
            parse_peer(peer)
        if min(arguments.prompt) < 2 or min(*arguments.batch, arguments.new_tokens, arguments.repeats) < 1:
            raise ValueError("prompts need at least 2 tokens; batch, new tokens and repeats at least 1")
    except ValueError as e:
        parser.error(str(e))
    return arguments


def _affinity() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def main(argv: list[str] | None = None) -> None:
    """Runs every combination of shape, prompt length and batch, and writes one JSON file for each."""
    arguments = _arguments(argv)
    kinds = {parse_peer(peer)[0] for peer in arguments.peers}
    provenance = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": _command(arguments),
        **describe_commit(Path(__file__).resolve().parents[1]),
        "machine": describe_machine(),
        "versions": versions(*(("torch", "transformers") if "transformers" in kinds else ())),
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    for shape, prompt, batch in itertools.product(arguments.shapes.split(","), arguments.prompt, arguments.batch):
        name = f"{shape}-p{prompt}-b{batch}-t{arguments.threads}"
        print(name, file=sys.stderr)
        found = measure(
            shape,
            peers=arguments.peers,
            prompt_tokens=prompt,
            new_tokens=arguments.new_tokens,
            batch=batch,
            threads=arguments.threads,
            repeats=arguments.repeats,
            at_most=max(arguments.repeats, arguments.rounds_at_most),
            dtype=arguments.dtype,
            llama_python=arguments.llama_python,
        )
        if found["busy"] > BUSY:
            print(f"  other work took {found['busy']:.0%} of the CPUs: these numbers say little", file=sys.stderr)
        result = {"schema": 1, **provenance, "busy": found["busy"], "energy": found["energy"], **summarize(found)}
        Path(arguments.output, f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        for label, peer in result["peers"].items():
            print(f"  {describe(label, peer)}")


def _command(arguments: argparse.Namespace) -> str:
    """The command that repeats this run, without what depends on where things lie."""
    parts = ["python", "-m", "benchmarks.run", "--shapes", arguments.shapes]
    for name in ("prompt", "batch"):
        parts += [f"--{name}", ",".join(map(str, getattr(arguments, name)))]
    for name in ("new_tokens", "threads", "repeats", "dtype"):
        parts += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    return shlex.join([*parts, "--peers", *arguments.peers])


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
