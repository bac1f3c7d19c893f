"""The roof: how fast as many threads read as much memory as a step has weights, doing nothing with it."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from pathlib import Path

_SOURCE = Path(__file__).with_name("read_bandwidth.c")
_WARM_UP_PASSES = 2


class Bandwidth:
    """Reads `size` bytes with `threads` threads, over and over. Built by the system's C compiler when it is made."""

    def __init__(self, size: int, threads: int, *, bytes_per_measurement: float = 8e9):
        compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        if compiler is None:
            raise RuntimeError("the bandwidth probe needs a C compiler (cc, gcc or clang) on the PATH")
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder, "read_bandwidth.so")
            options = ["-O3", "-march=native", "-shared", "-fPIC", "-pthread"]
            subprocess.run([compiler, *options, "-o", str(library), str(_SOURCE)], check=True)
            self._read = ctypes.CDLL(str(library)).read_bandwidth
        self._read.restype = ctypes.c_size_t
        self._size, self._threads = size, threads
        self._passes = max(5, int(bytes_per_measurement / size))
        self.settings = {"passes": self._passes, "compiler_options": " ".join(options[:2])}

    def measure(self) -> dict:
        """{"seconds": of an average pass, "bytes": read in it, "best": seconds of the fastest pass}."""
        count = self._passes + _WARM_UP_PASSES
        seconds = (ctypes.c_double * count)()
        size = self._read(ctypes.c_size_t(self._size), self._threads, count, seconds)
        if size == 0:
            raise RuntimeError(f"the bandwidth probe could not allocate {self._size} bytes")
        passes = list(seconds)[_WARM_UP_PASSES:]
        return {"seconds": sum(passes) / len(passes), "best": min(passes), "bytes": size}
