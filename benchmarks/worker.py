"""A child process that measures one peer, so that peers share neither threads nor allocators.

Reads a job (one line of JSON) from stdin, answers with {"settings": ...}; then one measurement per line "measure",
and the seconds of single steps for "steps", which ours knows.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np


def make_peer(job: dict[str, Any]) -> Any:
    """The peer that `job` names, ready to measure. Imports what that peer needs only."""
    kind, settings, threads = job["peer"], job["settings"], job["threads"]
    if kind == "probe":
        from benchmarks.bandwidth import Bandwidth

        return Bandwidth(job["bytes_per_step"], threads, **settings)
    prompt = np.array(job["prompt"])
    if kind == "llama_cpp":
        from benchmarks.llamacpp import LlamaCpp

        return LlamaCpp(Path(job["gguf"]), prompt, job["new_tokens"], threads, **settings)

    if kind == "transformers":
        from benchmarks.transformers_peer import Transformers

        return Transformers(Path(job["checkpoint"]), prompt, job["new_tokens"], threads, job["dtype"], **settings)

    from jax_monokernel._bench.shapes import SHAPES, random_weights

    spec = SHAPES[job["shape"]].spec(job["dtype"])
    if kind == "ours":
        from jax_monokernel._bench.ours import Ours

        return Ours(spec, random_weights(spec), prompt, job["new_tokens"], **settings)
    from jax_monokernel._bench.jax_loop import JaxLoop

    return JaxLoop(spec, random_weights(spec), prompt, job["new_tokens"], **settings)


def main() -> None:
    if sys.platform == "linux":  # a stopped process does not notice that its parent is gone
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    # Answers go to the real stdout; whatever libraries print there joins stderr.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    job = json.loads(sys.stdin.readline())
    if job["cpus"] is not None:
        os.sched_setaffinity(0, job["cpus"])  # before any library counts its threads
    peer = make_peer(job)
    print(json.dumps({"settings": peer.settings}), file=answers)
    for line in sys.stdin:
        what = line.strip()
        assert what in ("measure", "steps"), line
        print(json.dumps(peer.measure() if what == "measure" else {"steps": peer.steps()}), file=answers)


if __name__ == "__main__":
    main()
