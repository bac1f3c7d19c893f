"""The roof: how fast the device reads as many bytes as a step must, doing next to nothing with them."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp

from jax_monokernel import _native
from jax_monokernel._bench.machine import default_device

# Large enough that no cache holds it, small enough for every machine.
_MOST_BYTES = {"cpu": 2 << 30, "gpu": 4 << 30}
_PASSES = 5


class Probe:
    """On CPUs a team of threads that only reads; on GPUs XLA's sum of 32-bit integers.

    On a CPU as many bytes are read as a step reads (up to 2 GiB), since they may fit into a cache there as well. On a
    GPU 4 GiB or a quarter of the memory.
    """

    def __init__(self, step_bytes: int, threads: int):
        device = default_device()
        self._threads = threads
        if device.platform != "gpu":
            self._data = None
            self._bytes = min(max(step_bytes, 1 << 16), _MOST_BYTES["cpu"])
            self.settings = {"how": f"{threads} threads", "bytes": self._bytes}
            return
        limit = (device.memory_stats() or {}).get("bytes_limit", 4 * _MOST_BYTES["gpu"]) // 4
        self._data = jnp.ones(min(_MOST_BYTES["gpu"], limit) // 4, jnp.uint32)
        self._bytes = self._data.nbytes
        self._sum = jax.jit(jnp.sum)
        self.settings = {"how": "XLA's sum of uint32", "bytes": self._bytes}

    def measure(self) -> dict:
        """{"seconds": of a pass, "bytes": read in it}; the fastest of some passes."""
        if self._data is None:
            rate = max(_native.read_bandwidth(self._bytes, self._threads, _PASSES))
            return {"seconds": self._bytes / rate, "bytes": self._bytes}
        best = float("inf")
        for _ in range(_PASSES):
            start = time.perf_counter()
            self._sum(self._data).block_until_ready()
            best = min(best, time.perf_counter() - start)
        return {"seconds": best, "bytes": self._bytes}
