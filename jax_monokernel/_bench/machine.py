"""Where and with what a measurement was made."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

_PACKAGES = ("jax-monokernel", "jax", "jaxlib", "llama-cpp-python", "gguf", "numpy")
# Made from results, so a change there does not make the measured code another one.
_GENERATED = ("README.md", "benchmarks/results", "docs/images")

# Share of the CPUs' time that went to other work from which on a measurement says little.
BUSY = 0.05


class OtherWork:
    """How much of the CPUs' time went to work that is not ours, since this object was made. Linux only."""

    def __init__(self, processes: Iterable[int] | None = None):
        """Counts as ours what the processes with these ids (by default this one) do, with their threads."""
        self._processes = [os.getpid()] if processes is None else list(processes)
        self._start = self._ticks()

    def share(self) -> float:
        """0 to 1, of the time of all CPUs together; time taken by other guests of the host counts. 0 where unknown."""
        idle, total, ours = self._ticks() - self._start
        return float(max(0.0, total - idle - ours) / total) if total > 0 else 0.0

    def _ticks(self) -> np.ndarray:
        """Of all CPUs idle and in total, and of our processes."""
        cpu = np.array((_read(Path("/proc/stat")) or "cpu 0 0 0 0 0").splitlines()[0].split()[1:9], float)
        ours = 0
        for process in self._processes:
            # After the name, which is in parentheses and may hold anything, user and system time are fields 11 and 12.
            fields = (_read(Path(f"/proc/{process}/stat")) or "").rpartition(")")[2].split()
            ours += int(fields[11]) + int(fields[12]) if fields else 0
        return np.array([cpu[3] + cpu[4], cpu.sum(), ours])


def describe_machine() -> dict[str, Any]:
    """CPU model, caches, memory and operating system."""
    release = platform.freedesktop_os_release() if Path("/etc/os-release").exists() else {}
    return {
        "cpu": _cpu_model(),
        "cpus": os.cpu_count(),
        "caches_kib": _caches(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "os": release.get("PRETTY_NAME", platform.system()),
        "kernel": platform.release(),
        "transparent_huge_pages": _read(Path("/sys/kernel/mm/transparent_hugepage/enabled")),
        "python": platform.python_version(),
    }


def default_device() -> jax.Device:
    """Where JAX puts arrays."""
    return next(iter(jax.numpy.zeros(()).devices()))


def free_memory() -> int | None:
    """Bytes that the default device could still give; None where nothing says so."""
    device = default_device()
    if device.platform == "gpu":
        stats = device.memory_stats() or {}
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0) if "bytes_limit" in stats else None
    for line in (_read(Path("/proc/meminfo")) or "").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def describe_device(device: jax.Device) -> dict[str, Any]:
    """A JAX device: its name; of a GPU the driver's version, and clock rates where nvidia-smi is."""
    if device.platform != "gpu":
        return {"name": _cpu_model()}
    amdgpu = _read(Path("/sys/module/amdgpu/version"))
    found = {} if amdgpu is None else {"driver_version": f"amdgpu {amdgpu}"}
    query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, check=True
        )
        found |= dict(zip(query.split(","), done.stdout.splitlines()[0].split(", "), strict=True))
    except (OSError, subprocess.CalledProcessError, IndexError, ValueError):
        pass
    return {"name": device.device_kind, **found}


def versions(*more: str) -> dict[str, str]:
    """Versions of the packages that matter and of `more`, of those that are installed."""
    found = {}
    for name in (*_PACKAGES, *more):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def describe_commit(repository: Path | None = None) -> dict[str, Any]:
    """{"commit": hash or None outside git, "dirty": whether tracked files that could matter differ from it}.

    Args:
      repository: the checkout; by default the one that this module lies in, if it does.
    """
    repository = repository or Path(__file__).resolve().parents[2]
    if not (repository / "ffi").is_dir():  # an installed package, which may lie inside somebody else's repository
        return {"commit": None, "dirty": False}
    commit = _git(repository, "rev-parse", "HEAD")
    excluded = [f":(exclude){path}" for path in _GENERATED]
    changes = _git(repository, "status", "--porcelain", "--untracked-files=no", "--", ".", *excluded)
    return {"commit": commit, "dirty": bool(changes)}


def _git(repository: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=repository, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _cpu_model() -> str:
    for line in (_read(Path("/proc/cpuinfo")) or "").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _caches() -> dict[str, int]:
    """Size in KiB of each cache that CPU 0 uses, by name such as L1d, L2, L3."""
    sizes = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_read(folder / name) or "" for name in ("level", "type", "size"))
        letter = {"Data": "d", "Instruction": "i"}.get(kind, "")
        if size.endswith("K"):
            sizes[f"L{level}{letter}"] = int(size[:-1])
    return sizes


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
