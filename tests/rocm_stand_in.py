"""Stand-ins for libamdhip64 and libhiprtc that run the kernel on this CPU (native/rocm), and what tests ask them."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gpu_host
import numpy as np
from gpu_host import FAULTS, POLICIES, STORES

NATIVE = Path(__file__).parent / "native" / "rocm"
INCLUDES = [f"-I{path}" for path in (gpu_host.ROOT / "ffi", gpu_host.KERNEL, gpu_host.EXECUTOR)]
_WORDS = {"policy": POLICIES, "stores": STORES, "fault": FAULTS}


def compiler_command() -> str:
    """What the stand-in for hipRTC compiles with, as it reads it from HIPRTC_HOST_COMPILER.

    The kernel's headers are those that it is given, in the folder where it runs; tests' own come from here.
    """
    flags = " ".join(gpu_host._KERNEL_FLAGS)
    own = " ".join(f"-I'{path}'" for path in (NATIVE, gpu_host.EXECUTOR))
    objects = " ".join(f"'{path}'" for path in gpu_host._executor())
    compile_, link = f"{flags} -I. {own} -c @SOURCE@ -o object", f"-shared -Wl,-z,defs object {objects} -ldl -o @OUT@"
    return f"{gpu_host._COMPILER} {compile_} && {gpu_host._COMPILER} {link}"


class StandIn:
    """Both libraries, with their variables: rocm.units = 7, rocm.compiles, rocm.policy = "starve"."""

    def __init__(self, folder: Path, like: StandIn | None = None) -> None:
        """Compiles them in `folder`, or copies others: another file is another library to the loader."""
        # Not by the names of AMD's: the run time takes a library of such a name if the process has loaded it.
        paths = {name: folder / f"stand_in_{name}.so" for name in ("hip", "hiprtc")}
        for name, path in paths.items():
            if like is not None:
                shutil.copy(like.paths[name], path)
                continue
            flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", *INCLUDES]
            subprocess.run(["c++", *flags, NATIVE / f"{name}.cc", "-o", path, "-lpthread", "-ldl"], check=True)
        libraries = {name: ctypes.CDLL(str(path)) for name, path in paths.items()}
        self.__dict__.update(paths=paths, libraries=libraries, hip=libraries["hip"], hiprtc=libraries["hiprtc"])

    def _variable(self, kind: Any, name: str) -> Any:
        for prefix, library in self.libraries.items():
            try:
                return kind.in_dll(library, f"{prefix}_{name}")
            except ValueError:
                continue
        raise AttributeError(name)

    def __getattr__(self, name: str) -> Any:
        value = self._variable(ctypes.c_int, name).value
        return _WORDS[name][value] if name in _WORDS else value

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "arch":
            (ctypes.c_char * 64).in_dll(self.hip, "hip_arch").value = value.encode()
            return
        self._variable(ctypes.c_int, name).value = _WORDS[name].index(value) if name in _WORDS else value

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables with which the run time uses them."""
        return {
            "MONOKERNEL_HIP_LIBRARY": str(self.paths["hip"]),
            "MONOKERNEL_HIPRTC_LIBRARY": str(self.paths["hiprtc"]),
        }

    def set_homes(self, begin: int, of_pages: np.ndarray, of_dies: Sequence[int]) -> None:
        """Counts what kernels read of memory from `begin` on, whose pages of 4096 bytes have homes, and forgets counts.

        Args:
          begin: address of the first page.
          of_pages: their homes; none: nothing is counted.
          of_dies: the home that is near each die.
        """
        pages, dies = (np.array(x, np.uint8) for x in (of_pages, of_dies))
        homes = gpu_host._Homes.in_dll(self.hip, "hip_homes")
        homes.begin, homes.pages = int(begin), pages.size
        homes.of_pages, homes.of_dies = pages.ctypes.data, dies.ctypes.data
        self.__dict__["_kept"] = pages, dies
        for name in ("near", "far"):
            ctypes.c_uint64.in_dll(self.hip, f"hip_{name}").value = 0

    @property
    def local(self) -> float:
        """Share of what was read since `set_homes` that was near its reader."""
        near, far = (ctypes.c_uint64.in_dll(self.hip, f"hip_{name}").value for name in ("near", "far"))
        assert near + far > 0
        return near / (near + far)

    def reset(self) -> None:
        """As they are at first, save for counters."""
        first = {
            "policy": "random",
            "stores": "random",
            "fault": "none",
            "seed": 1,
            "units": 304,
            "devices": 2,
            "dies": 1,
        }
        for name, value in first.items():
            setattr(self, name, value)
        self.set_homes(0, np.zeros(0), ())
        self.take_complaints()

    @property
    def complaints(self) -> str:
        """What was wrong with the calls so far, one line each."""
        return "".join(
            ctypes.string_at(ctypes.addressof(ctypes.c_char.in_dll(library, f"{prefix}_complaints"))).decode()
            for prefix, library in self.libraries.items()
        )

    def take_complaints(self) -> str:
        """The same, and forgets it."""
        text = self.complaints
        for prefix, library in self.libraries.items():
            ctypes.c_char.in_dll(library, f"{prefix}_complaints").value = b"\0"
        return text
