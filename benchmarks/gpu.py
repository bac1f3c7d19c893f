"""Measures decode on a GPU beside what a JAX user would write and a probe of the memory, all in one process.

    python -m benchmarks.gpu --shapes llama3.2-1b,qwen3-0.6b --output benchmarks/results/gpu

One JSON file for each shape, batch and prompt: every peer's times, a hash of its tokens, the device, driver and
commit. Rounds are interleaved; a first one, in which everything is compiled, is not counted. --dry-run does all of it
on whatever device JAX has, for trying it where there is no GPU: the numbers say nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import itertools
import json
import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_kernel import Driver, compile_kernel, without_places
from jax_monokernel._bench import probe as reading
from jax_monokernel._bench.energy import find_meter, find_meter_or_reason
from jax_monokernel._bench.machine import describe_commit, describe_device, describe_machine, versions
from jax_monokernel._bench.peers import PEERS, make_peers
from jax_monokernel._bench.runner import Peer, Workload, bytes_per_step, make_prompt
from jax_monokernel._bench.runner import measure as measure_peers
from jax_monokernel._bench.shapes import SHAPES, random_weights_on_device
from jax_monokernel._bench.summary import describe, summarize
from jax_monokernel.plan import default_platform
from jax_monokernel.spec import DecoderSpec
from jax_monokernel.weights import DecoderWeights

_PROBE_BYTES = 4 << 30
_PROBE_COPY = 16 << 10
_PROBE_PASSES = 4


class _ProbeArgs(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("sums", ctypes.c_void_p),
        ("passes", ctypes.c_int),
    )


class Probe:
    """Reads memory with a kernel that does nothing else, as the decode kernel reads weights (read_bandwidth.cu)."""

    def __init__(self, units: int) -> None:
        self.settings: dict[str, Any] = {"how": "read_bandwidth.cu"}
        self._units = units
        size = _PROBE_BYTES // (_PROBE_COPY * self._units) * _PROBE_COPY * self._units
        self._data = jnp.ones(size // 4, jnp.uint32)
        self._sums = jnp.zeros(self._units, jnp.uint32)
        jax.block_until_ready((self._data, self._sums))
        source = Path(__file__).with_name("read_bandwidth.cu").read_text()
        self._driver = Driver(compile_kernel(source), "read_bandwidth", 1024 + 12 * _PROBE_COPY)

    def measure(self) -> dict[str, Any]:
        """{"seconds": of the best of 3 launches, "bytes": that it reads}."""
        pointers = self._data.unsafe_buffer_pointer(), self._sums.unsafe_buffer_pointer()
        args = _ProbeArgs(pointers[0], self._data.nbytes, pointers[1], _PROBE_PASSES)
        best = min(self._driver.timed_launch(self._units, 32, args) for _ in range(3))
        copies = _PROBE_PASSES * self._data.nbytes // _PROBE_COPY // self._units
        if (np.asarray(self._sums) != copies).any():
            raise RuntimeError("the probe has not read all that it was to read")
        return {"seconds": best, "bytes": _PROBE_PASSES * self._data.nbytes}


def _probe(step_bytes: int) -> Peer:
    """The probe of this device: on NVIDIA's our kernel, elsewhere that of `jax-monokernel bench`."""
    if default_platform() == "cuda":
        try:
            return Probe(jax.devices()[0].core_count)
        except (OSError, RuntimeError) as error:  # no NVRTC, an architecture that the kernel is not for
            print(f"read_bandwidth.cu cannot run here, so XLA's sum is the probe: {error}", file=sys.stderr)
    return reading.Probe(step_bytes, len(os.sched_getaffinity(0)))


def _transformers(folder: Path, spec: DecoderSpec, weights: DecoderWeights, workload: Workload) -> Peer:
    import torch

    from benchmarks.checkpoint_model import write_checkpoint
    from benchmarks.transformers_peer import Transformers

    if not torch.cuda.is_available():
        raise RuntimeError("PyTorch sees no GPU here; leave transformers out, or install PyTorch for this GPU")
    write_checkpoint(folder, spec, weights)
    prompt = make_prompt(workload.batch, workload.prompt_tokens, spec.vocab_size)
    return Transformers(folder, prompt, workload.new_tokens, 1, spec.dtype)


def measure(shape: str, batch: int, prompt_tokens: int, new_tokens: int, repeats: int, names: list[str]) -> dict:
    """Rounds of all peers, summarized."""
    spec = SHAPES[shape].spec()
    workload = Workload(model=shape, batch=batch, prompt_tokens=prompt_tokens, new_tokens=new_tokens)
    weights = random_weights_on_device(spec)
    peers = make_peers(spec, weights, workload, [name for name in names if name in PEERS])
    if "transformers" in names:
        with tempfile.TemporaryDirectory(prefix="monokernel-bench-") as folder:
            peers["transformers"] = _transformers(Path(folder, "checkpoint"), spec, weights, workload)
    del weights
    if "probe" in names:
        peers["probe"] = _probe(bytes_per_step(spec, batch, prompt_tokens, new_tokens))
    meter, energy = find_meter_or_reason(lambda: find_meter(jax.devices()[0]))
    return {"energy": energy, **summarize(measure_peers(spec, workload, peers, rounds=repeats, meter=meter))}


def main(argv: list[str] | None = None) -> None:
    """Prints a line for each peer and writes the files. What fails does not keep the rest from being measured."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="llama3.2-1b,qwen3-0.6b,smollm2-135m", help=", ".join(SHAPES))
    parser.add_argument("--batch", default="1")
    parser.add_argument("--prompt", default="32")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--peers",
        nargs="+",
        default=["ours", "jax_loop", "probe"],
        choices=("ours", "jax_loop", "transformers", "probe"),
    )
    parser.add_argument("--commit", help="of the code, where it is measured outside its repository")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="go through all of it, with or without a GPU")
    options = parser.parse_args(argv)
    if unknown := [shape for shape in options.shapes.split(",") if shape not in SHAPES]:
        parser.error(f"unknown shape {unknown[0]!r}; expected one of {', '.join(SHAPES)}")
    if "transformers" in options.peers:  # PyTorch needs some of the memory
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if jax.devices()[0].platform != "gpu" and not options.dry_run:
        sys.exit("JAX sees no GPU here")
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
    commit = (
        describe_commit(Path(__file__).resolve().parents[1])
        if options.commit is None
        else {"commit": options.commit, "dirty": False}
    )
    failed = []
    batches, prompts = (map(int, text.split(",")) for text in (options.batch, options.prompt))
    for shape, batch, prompt in itertools.product(options.shapes.split(","), batches, prompts):
        name = f"{shape}-p{prompt}-b{batch}"
        try:
            found = measure(shape, batch, prompt, options.new_tokens, options.repeats, options.peers)
        except (RuntimeError, ValueError) as error:
            print(f"{name}  failed: {error}", file=sys.stderr, flush=True)
            failed.append(name)
            continue
        for peer, numbers in found["peers"].items():
            print(f"{name}  {describe(peer, numbers)}", flush=True)
        if options.output is None:
            continue
        result = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": shlex.join(["python", "-m", "benchmarks.gpu", *without_places(argv)]),
            **commit,
            "device": describe_device(jax.devices()[0]),
            "machine": describe_machine(),
            "versions": versions(*(("torch", "transformers") if "transformers" in options.peers else ())),
            **found,
        }
        (options.output / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
