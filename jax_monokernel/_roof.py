"""How fast a device can read weights: what a decode's speed is held against."""

from __future__ import annotations

import dataclasses

from jax_monokernel import _native
from jax_monokernel.tape import Tape


@dataclasses.dataclass(frozen=True)
class Roof:
    """The most that can be read."""

    bytes_per_second: float
    reader: str  # "2 threads"

    def share(self, rate: float) -> str:
        """A rate in bytes per second, as a share of it."""
        most = self.bytes_per_second
        return f"{rate / most:.0%} of the {most / 1e9:.1f} GB/s that {self.reader} can read"


def read_roof(tape: Tape) -> Roof | None:
    """Measured, in up to a second, on CPUs; of a GPU what `jax-monokernel topology --measure` has found, or None."""
    if tape.plan.platform != "cpu":
        from jax_monokernel import topology

        rate = topology.discover(tape.plan.platform).topology.constant("stream_device_gb_s")
        return None if rate is None else Roof(rate * 1e9, "this GPU")
    # As many threads that read as many bytes and do nothing else with them, at best. Of larger models a part is enough:
    # no cache holds 2 GiB either.
    threads = min(tape.plan.units, _native.available_cpus())
    size = min(max(tape.bytes_per_token, 1 << 16), 2 << 30)
    rates = _native.read_bandwidth(size, threads, min(max(2 * 10**9 // size, 7), 1000))
    return Roof(max(rates), f"{threads} threads")
