"""How long a hand-off takes on an NVIDIA GPU beside a stream of weights, by the bytes that are on their way.

    python -m benchmarks.hand_off

All units publish a part of K words and gather all of them, again and again, while 8 other waves of each stream: such a
wave keeps one copy of 4 KiB or several on its way, asking for the next when one has come.
"""

from __future__ import annotations

import argparse
import ctypes
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_kernel import Driver, compile_kernel

_SOURCE = Path(__file__).with_suffix(".cu").read_text()
_SHARED_BYTES = 1024 + 8 * 4 * 4096


class _Args(ctypes.Structure):
    _fields_ = (
        ("stream", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("words", ctypes.c_void_p),
        ("copies", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("size", "rounds", "depth")),
    )


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--words", default="1024,3072,8192", help="K, multiples of 4")
    parser.add_argument("--rounds", type=int, default=3000)
    options = parser.parse_args()
    units = jax.devices()[0].core_count
    stream = jnp.ones(4 << 30, jnp.uint8)
    stream.block_until_ready()  # JAX has started the driver
    driver = Driver(compile_kernel(_SOURCE), "hand_off", _SHARED_BYTES)
    for size in map(int, options.words.split(",")):
        for depth in range(5):
            micros, rates = [], []
            for _ in range(5):
                words, copies = jnp.zeros(3 * size, jnp.uint32), jnp.zeros(2 * units * 8, jnp.uint32)
                jax.block_until_ready((words, copies))
                pointers = [x.unsafe_buffer_pointer() for x in (stream, words, copies)]
                args = _Args(pointers[0], stream.size, pointers[1], pointers[2], size, options.rounds, depth)
                seconds = driver.timed_launch(units, 512, args)
                micros.append(seconds * 1e6 / options.rounds)
                rates.append(int(np.asarray(copies).view(np.uint64).sum()) * 4096 / seconds / 1e9)
            print(
                f"{size} words, {depth * 32} KiB on their way to a unit: {np.median(micros):.2f} us a hand-off, "
                f"stream {np.median(rates):.0f} GB/s",
                flush=True,
            )


if __name__ == "__main__":
    main()
