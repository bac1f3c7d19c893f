"""Python's part of the GPU run time (ffi/gpu): finding libraries, handlers, and compiling ahead of time."""

from __future__ import annotations

import dataclasses
import functools
import glob
import importlib.util
import os
from typing import TYPE_CHECKING, Any

import jax

from jax_monokernel import _native
from jax_monokernel._program import program
from jax_monokernel.plan import Plan, Platform, attention_tasks, make_plan

if TYPE_CHECKING:
    from jax_monokernel.spec import DecoderSpec

# Multiprocessors or compute units of the usual device of an architecture, for compiling where there is none: H100 and
# H200 (SXM), B200, MI300X, MI350X and MI355X.
UNITS = {"sm_90": 132, "sm_100": 148, "gfx942": 304, "gfx950": 256}


def library_dirs() -> list[str]:
    """Folders that may hold a vendor's driver or run-time compiler: of installed packages, then of ROCm.

    Where ROCm's packages make no links in /opt/rocm/lib, it is in a folder of its version (ROCm Core SDK, since 7.13).
    """
    patterns = {"nvidia": "*/lib", "_rocm_sdk_core": "lib", "torch": "lib"}
    dirs = []
    for package, pattern in patterns.items():
        try:
            found = importlib.util.find_spec(package)
        except (ImportError, ValueError):  # half of a package, or one that replaced itself in sys.modules
            continue
        for root in (found and found.submodule_search_locations) or ():
            dirs += sorted(glob.glob(os.path.join(glob.escape(root), pattern)), reverse=True)
    if rocm := os.environ.get("ROCM_PATH"):
        dirs.append(os.path.join(rocm, "lib"))
    return [*dirs, "/opt/rocm/lib", "/opt/rocm/core/lib", *sorted(glob.glob("/opt/rocm/core-*/lib"), reverse=True)]


@functools.cache
def register() -> None:
    """Registers the custom call for XLA's platforms CUDA and ROCM. Opens no library: that waits for the first call."""
    _native.gpu_library_dirs(library_dirs())
    for platform, targets in _native.gpu_registrations().items():
        for name, handler in targets.items():
            jax.ffi.register_ffi_target(name, handler, platform=platform)


def call_attributes(spec: DecoderSpec, plan: Plan, batch: int, capacity: int) -> dict[str, Any]:
    """What a call adds to the program: how attention is cut into tasks."""
    splits, task_heads = attention_tasks(spec, plan, batch, capacity)
    return {"splits": splits, "task_heads": task_heads}


@dataclasses.dataclass(frozen=True)
class Target:
    """What a kernel is compiled for."""

    platform: Platform
    arch: str  # sm_90, gfx942
    units: int  # multiprocessors or compute units

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a unit."""
        return _native.gpu_shared_bytes(self.arch)


def target(arch: str | None = None, units: int | None = None) -> Target:
    """The device of this machine, or one that is named.

    Args:
      arch: architecture such as "sm_90" or "gfx942"; by default that of the first GPU here.
      units: its multiprocessors or compute units; by default those of a GPU of this architecture here, else of the
        usual one.

    Raises:
      ValueError: an architecture that is not supported, none given where no GPU is found, or an unknown number of
        units.
    """
    _native.gpu_library_dirs(library_dirs())
    if arch is not None:
        _native.gpu_shared_bytes(arch)  # raises if it is not supported
        arch = arch.removesuffix("a") if arch.startswith("sm_") else arch
    platforms: tuple[Platform, ...] = ("cuda", "rocm")
    problems = []
    for platform in platforms:
        try:
            devices = _native.gpu_devices(platform)
        except (RuntimeError, ValueError) as error:
            problems.append(str(error))
            continue
        for device in devices:
            if arch in (None, device["arch"]):
                return Target(platform, device["arch"], units or device["units"])
    if arch is None:
        raise ValueError("no GPU was found here; name an architecture such as sm_90 or gfx942. " + "; ".join(problems))
    if units is None and arch not in UNITS:
        raise ValueError(f"give the number of multiprocessors of the {arch} device; it is known for {', '.join(UNITS)}")
    return Target("cuda" if arch.startswith("sm_") else "rocm", arch, units or UNITS[arch])


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled kernel."""

    code: bytes  # a binary for the vendor's driver
    path: str  # in the cache; "" if it could not be saved
    seconds: float  # that compiling took; 0 if it was in the cache


def compile_ahead(
    spec: DecoderSpec,
    target: Target,
    *,
    batch: int,
    capacity: int,
    groups: int | None = None,
    placed: bool = False,
) -> Compiled:
    """Compiles the kernel that `decode` will ask for, or finds it in the cache. Needs no GPU.

    Args:
      spec: the model.
      target: the device.
      batch: requests of a call.
      capacity: positions of the KV cache, which decide how attention is cut.
      groups: of the plan, as for `make_plan`.
      placed: for tapes that are placed (`topology.pack_near`).

    Raises:
      ValueError: arguments out of range, or weights that cannot be placed.
      RuntimeError: no compiler, naming what to install, or what the compiler said.
    """
    _native.gpu_library_dirs(library_dirs())
    plan = make_plan(spec, platform=target.platform, units=target.units, groups=groups)
    attributes: dict[str, Any] = program(spec, plan) | call_attributes(spec, plan, batch, capacity)
    near = plan.platform == "rocm" and plan.groups > 1
    if near:  # what it falls back on where work-groups are not as expected
        _native.gpu_compile(**attributes, batch=batch, arch=target.arch, capacity=capacity, placed=placed)
    result = _native.gpu_compile(
        **attributes, batch=batch, arch=target.arch, capacity=capacity, near=near, placed=placed
    )
    return Compiled(result["code"], result["path"], result["seconds"])
