"""What this machine has for decoding, whether it works, and what it lacks: a report for people and for bug reports."""

from __future__ import annotations

import contextlib
import dataclasses
import getpass
import glob
import grp
import importlib.metadata
import logging
import os
import platform as host
import re
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from jax_monokernel import _gpu, _native, _self_test
from jax_monokernel._version import __version__
from jax_monokernel.plan import Platform, available_cpus
from jax_monokernel.topology.model import Topology
from jax_monokernel.topology.partition import Partition, partition_of
from jax_monokernel.topology.parts import part_for

OK, ABSENT, NOTE, BROKEN = "ok", "-", "note", "BROKEN"

_VENDORS = {"cuda": "NVIDIA", "rocm": "AMD"}
_WANTED = {
    "cuda": (
        "an NVIDIA GPU of compute capability 9.0, 10.0 or 10.3 (H100, H200, B200, B300), the NVIDIA driver, "
        "pip install 'jax[cuda13]' or 'jax[cuda12]', and nvidia-cuda-nvrtc (docs/gpu.md)"
    ),
    "rocm": (
        "an AMD Instinct GPU of gfx942 or gfx950 (MI300X, MI300A, MI325X, MI350X, MI355X), the amdgpu driver, "
        "ROCm 7 with libamdhip64 and libhiprtc, and JAX's ROCm wheels (docs/rocm.md)"
    ),
}
_TO_INSTALL = {
    "cuda": "pip install 'jax[cuda13]=={jax}', or 'jax[cuda12]=={jax}' with a driver for CUDA 12 (docs/gpu.md)",
    "rocm": "pip install jax-rocm7-plugin=={jaxlib} jax-rocm7-pjrt=={jaxlib} (docs/rocm.md)",
}
_HIDING = {
    "cuda": ("CUDA_VISIBLE_DEVICES",),
    "rocm": ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL"),
}
_PACKAGES = ("jax", "jaxlib", "flax", "numpy")
_PLUGINS = re.compile(r"jax-(cuda|rocm)\d+-(plugin|pjrt)$")
_VARIABLES = re.compile(
    r"(MONOKERNEL|XLA|JAX|HIP|HSA|ROCR|ROCM|CUDA)_\w*$|(LD_LIBRARY_PATH|GPU_DEVICE_ORDINAL|NVIDIA_VISIBLE_DEVICES)$"
)


@dataclasses.dataclass(frozen=True)
class Line:
    """One thing that was looked at."""

    what: str
    state: str  # OK, ABSENT, NOTE or BROKEN
    text: str


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where to look."""

    sys: Path = Path("/sys")
    dev: Path = Path("/dev")


def report(print_: Callable[[str], None], *, test: bool = True, machine: Machine | None = None) -> bool:
    """Prints what is here, line by line as it is found out. True: everything that is here works.

    Names of users, of the machine and of home folders are left out.

    Args:
      print_: takes each line.
      test: whether to compile and run small models.
      machine: other folders than /sys and /dev.
    """
    machine = machine or Machine()
    print_(f"jax_monokernel {__version__}: what this machine has for it\n")
    broken = 0
    found: dict[Platform, list[dict[str, Any]]] = {}
    with _what_jax_logs() as logged:
        for title, lines in _sections(test, machine, found, logged):
            print_(title)
            for line in lines:
                broken += line.state == BROKEN
                text = "\n         ".join(part for part in redacted(line.text).splitlines() if part.strip())
                print_(f"  {line.state:6} {line.what}: {text}")
            print_("")
    last = "Everything that is here works." if not broken else f"{broken} of the things that are here do not work."
    unused = sum("problem" in device for described in found.values() for device in described)
    if unused:
        last += f" GPUs that the kernel is not for: {unused}."
    print_(last)
    return not broken


@contextlib.contextmanager
def _what_jax_logs() -> Iterator[list[str]]:
    """Warnings and errors of the part of JAX that starts its backends. It does that once, when it is first asked."""
    said: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            error = record.exc_info[1] if record.exc_info else None
            said.append(record.getMessage() + (f": {error}" if error else ""))

    log, keep = logging.getLogger("jax._src.xla_bridge"), Keep(logging.WARNING)
    before = log.propagate
    log.addHandler(keep)
    log.propagate = False  # what matters of it is in the report
    try:
        yield said
    finally:
        log.removeHandler(keep)
        log.propagate = before


def _sections(
    test: bool, machine: Machine, found: dict[Platform, list[dict[str, Any]]], logged: list[str]
) -> Iterator[tuple[str, Iterator[Line]]]:
    yield "Software", _software()
    yield "Settings", _settings(machine)
    devices: dict[Platform, jax.Device] = {}
    yield "CPU", _cpu(devices, logged)
    platforms: tuple[Platform, ...] = ("cuda", "rocm")
    for platform in platforms:
        yield f"{_VENDORS[platform]} GPUs ({platform})", _gpus(platform, machine, devices, found, logged)
    if test:
        yield "Self-test: small random models against the reference", _self_tests(devices, found, machine)


# ---- What is looked at ----


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _plugins() -> dict[str, str]:
    """Versions of JAX's packages for GPUs that are installed."""
    names = ((str(d.metadata["Name"]).lower().replace("_", "-"), d.version) for d in importlib.metadata.distributions())
    return {name: version for name, version in names if _PLUGINS.match(name)}


def _software() -> Iterator[Line]:
    libc = " ".join(host.libc_ver())
    yield Line("Python", OK, f"{host.python_version()}, {host.system()} {host.release()} {host.machine()}, {libc}")
    yield Line("packages", OK, ", ".join(f"{name} {_version(name) or 'is missing'}" for name in _PACKAGES))
    plugins = _plugins()
    if not plugins:
        yield Line("JAX's plugins for GPUs", ABSENT, "none installed")
        return
    yield Line(
        "JAX's plugins for GPUs", OK, ", ".join(f"{name} {version}" for name, version in sorted(plugins.items()))
    )
    jaxlib = _version("jaxlib")
    # AMD's wheels may be built again for one jaxlib: 0.10.0.post1.
    wrong = sorted(name for name, version in plugins.items() if re.sub(r"\+.*|\.post\d+$", "", version) != jaxlib)
    if wrong:
        yield Line("JAX's plugins for GPUs", NOTE, f"{', '.join(wrong)} and jaxlib {jaxlib} are of different versions")


def _settings(machine: Machine) -> Iterator[Line]:
    values = {name: value for name, value in sorted(os.environ.items()) if _VARIABLES.match(name)}
    yield Line("variables", OK, ", ".join(f"{name}={value}" for name, value in values.items()) or "none set")
    folder = _cache_folder()
    there = folder if folder.exists() else next(p for p in folder.parents if p.exists())
    if os.access(there, os.W_OK):
        yield Line("cache of kernels", OK, f"{folder}, {len(glob.glob(glob.escape(str(folder)) + '/*-*'))} kernels")
    else:
        yield Line(
            "cache of kernels", BROKEN, f"{folder} cannot be written; set MONOKERNEL_CACHE_DIR to another folder"
        )
    try:
        shared = shutil.disk_usage(machine.dev / "shm").total
        small = shared < 1 << 30
        why = "; with several GPUs RCCL and NCCL need more (docker run --shm-size=16g)" if small else ""
        yield Line("shared memory of the host", NOTE if small else OK, f"/dev/shm has {_size(shared)}{why}")
    except OSError:
        yield Line("shared memory of the host", ABSENT, "there is no /dev/shm")


def _cache_folder() -> Path:
    if own := os.environ.get("MONOKERNEL_CACHE_DIR"):
        return Path(own).absolute()
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.environ.get("HOME", "/"), ".cache")
    return Path(base).absolute() / "jax_monokernel"


def _cpu(devices: dict[Platform, jax.Device], logged: list[str]) -> Iterator[Line]:
    name = host.processor() or host.machine()
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        name = found[1] if found else name
    except OSError:
        pass
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    yield Line("processor", OK, f"{name}, {available_cpus()} CPUs for this process, {_size(pages)} of memory")
    try:
        yield Line("kernel", OK, f"{_native.current_isa()} of {', '.join(_native.available_isas())}")
    except ValueError as error:
        yield Line("kernel", BROKEN, str(error))
    yield _jax_device("cpu", devices, logged)


def _jax_device(
    platform: Platform, devices: dict[Platform, jax.Device], logged: list[str], supported: bool = True
) -> Line:
    """Whether JAX has devices of a platform, of which there are some; `supported`: some that the kernel runs on."""
    try:
        here = jax.local_devices(backend=platform)
    except RuntimeError as error:
        chosen = os.environ.get("JAX_PLATFORMS")
        if chosen and not {platform, "gpu"} & set(chosen.split(",")):
            return Line("JAX", NOTE, f"has no {platform} device, because JAX_PLATFORMS is {chosen}")
        if _has_plugin(platform):
            mine = [m for m in logged if platform in m.lower() or not re.search("cuda|rocm|tpu", m.lower())]
            said = "\n".join([str(error), *mine])
            return Line("JAX", BROKEN, f"its {platform} plugin is installed and finds no device: {said}")
        if not supported:
            return Line("JAX", NOTE, f"has no {platform} plugin; it would need {_WANTED[platform]}")
        return _no_plugin(platform)
    devices[platform] = here[0]
    return Line("JAX", OK, f"{len(here)} {platform} device{'s' * (len(here) > 1)}: {here[0].device_kind}")


def _has_plugin(platform: Platform) -> bool:
    return any(name.startswith(f"jax-{platform}") for name in _plugins())


def _no_plugin(platform: Platform) -> Line:
    needed = _TO_INSTALL[platform].format(jax=_version("jax"), jaxlib=_version("jaxlib"))
    return Line("JAX", BROKEN, f"has no {platform} plugin, so nothing runs on these GPUs: {needed}")


def _gpus(
    platform: Platform,
    machine: Machine,
    devices: dict[Platform, jax.Device],
    found: dict[Platform, list[dict[str, Any]]],
    logged: list[str],
) -> Iterator[Line]:
    _native.gpu_library_dirs(_gpu.library_dirs())
    in_system = _adapters(platform, machine)
    try:
        version, path = _native.gpu_driver(platform)
        described = _native.gpu_describe(platform)
    except (RuntimeError, ValueError) as error:
        if in_system:
            yield Line("GPUs in this machine", OK, f"{in_system}, by what the system says")
            yield from _access(platform, machine)
            yield Line("driver", BROKEN, str(error))
            if not _has_plugin(platform):
                yield _no_plugin(platform)
        else:
            if _has_plugin(platform):
                text = f"its {platform} plugin is installed, and this machine has no GPU for it: {'; '.join(logged)}"
                yield Line("JAX", NOTE, text.removesuffix(": "))
            if os.environ.get({"cuda": "MONOKERNEL_CUDA_LIBRARY", "rocm": "MONOKERNEL_HIP_LIBRARY"}[platform]):
                yield Line("driver", NOTE, str(error))
            yield Line("driver", ABSENT, f"none, and no such GPU in this machine. Needed for one: {_WANTED[platform]}")
        return
    yield Line("driver", OK, f"{_driver_version(platform, version)}, {path}")
    try:
        compiler, library = _native.gpu_compiler(platform)
        yield Line("run-time compiler", OK, f"{compiler}, {library}")
    except (RuntimeError, ValueError) as error:
        yield Line("run-time compiler", BROKEN if described else ABSENT, str(error))
    if not described:
        yield from _access(platform, machine)
        hiding = [name for name in _HIDING[platform] if name in os.environ]
        why = f". Are they hidden by {', '.join(hiding)}?" if hiding else ""
        yield Line("devices", BROKEN if in_system else ABSENT, f"the driver has none; the system has {in_system}{why}")
        return
    found[platform] = described
    for i, device in enumerate(described):
        yield from _device(i, device, platform, machine)
    if len(described) > 1:
        lacking = [
            f"{i} to {j}" for i, d in enumerate(described) for j in range(len(described)) if j not in {i, *d["peers"]}
        ]
        text = f"not from {', '.join(lacking)}" if lacking else "each device reaches each other's memory"
        yield Line("peer access", NOTE if lacking else OK, text)
    yield _jax_device(platform, devices, logged, any("problem" not in device for device in described))


def _device(number: int, device: dict[str, Any], platform: Platform, machine: Machine) -> Iterator[Line]:
    is_amd = platform == "rocm"
    text = (
        f"{device['name']}, {device.get('arch', 'not supported')}, {device['units']} "
        f"{'compute units' if is_amd else 'multiprocessors'}, "
        f"{device['shared_bytes'] // 1024} KiB of shared memory each, {_size(device['memory_bytes'])}"
    )
    known = partition_of(device["bus"], machine.sys) if is_amd else Partition()
    modes = [f"{kind} partition mode {getattr(known, kind)}" for kind in ("compute", "memory") if getattr(known, kind)]
    if known.xcds:
        modes.append(f"{known.xcds} XCD{'s' * (known.xcds > 1)}")
    text = ", ".join([text, *modes])
    if "problem" in device:
        yield Line(f"device {number}", NOTE, f"{text}\n{device['problem']}")
        return
    yield Line(f"device {number}", OK, text)
    if is_amd:
        for note in _topology(device, machine).notes:
            yield Line(f"device {number}", NOTE, note)


def _topology(device: dict[str, Any], machine: Machine) -> Topology:
    """What is published of a supported AMD GPU, in the mode that the system tells."""
    known = partition_of(device["bus"], machine.sys)
    return part_for(device["name"], device["arch"], device["units"], "rocm", known)


def _adapters(platform: Platform, machine: Machine) -> int:
    """GPUs of a vendor that the system knows of, whatever drivers there are."""
    vendor = {"cuda": "0x10de", "rocm": "0x1002"}[platform]
    count = 0
    for folder in glob.glob(str(machine.sys / "bus" / "pci" / "devices" / "*")):
        kind = _read(Path(folder) / "class")  # display controllers and processing accelerators
        count += _read(Path(folder) / "vendor") == vendor and kind.startswith(("0x03", "0x12"))
    return count


def _access(platform: Platform, machine: Machine) -> Iterator[Line]:
    if platform != "rocm":
        return
    for path in (machine.dev / "kfd", *sorted((machine.dev / "dri").glob("renderD*"))):
        name = "/dev/" + path.relative_to(machine.dev).as_posix()
        if not path.exists():
            yield Line(
                name,
                BROKEN,
                "is missing: is the amdgpu module loaded? In a container: --device=/dev/kfd --device=/dev/dri",
            )
        elif not os.access(path, os.R_OK | os.W_OK):
            yield Line(name, BROKEN, _not_allowed(path))


def _not_allowed(path: Path) -> str:
    """Why a user may not open a device, and what to do."""
    at = path.stat()
    mode = stat.filemode(at.st_mode)
    if at.st_mode & 0o060 != 0o060:
        return f"this user may not open it, nor may any group ({mode}): chmod 660, or the udev rules of ROCm's packages"
    try:
        group = grp.getgrgid(at.st_gid).gr_name
    except KeyError:  # of the host, in a container
        group = str(at.st_gid)
    return (
        f"this user may not open it ({mode}, group {group}): sudo usermod -aG {group} USER, and log in again; "
        f"in a container docker run --group-add {at.st_gid}"
    )


def _self_tests(
    devices: dict[Platform, jax.Device], found: dict[Platform, list[dict[str, Any]]], machine: Machine
) -> Iterator[Line]:
    for platform, device in devices.items():
        described = found.get(platform)
        if described and "problem" in described[0]:
            continue
        units, groups = None, 1
        if described:
            units = described[0]["units"]
            # Plans whose words stay on an XCD are other kernels, which `make_plan` may choose.
            xcds = _topology(described[0], machine).groups("xcd") if platform == "rocm" else []
            groups = len(xcds) if len({len(xcd.units) for xcd in xcds}) == 1 else 1
        for outcome in _self_test.run(platform, device, units, groups):
            state, text = (BROKEN, outcome.problem) if outcome.problem else (OK, "agrees with the reference")
            yield Line(f"{platform}, {outcome.model}", state, f"{text} ({outcome.seconds:.1f} s)")


# ---- Words ----


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _size(count: int) -> str:
    return f"{count / 2**30:.0f} GiB" if count >= 10 << 30 else f"{count / 2**30:.1f} GiB"


def _driver_version(platform: str, number: int) -> str:
    if platform == "cuda":
        return f"CUDA {number // 1000}.{number % 1000 // 10}"
    return f"HIP {number // 10_000_000}.{number // 100_000 % 100}.{number % 100_000}"


def redacted(text: str) -> str:
    """A text without the names of users, home folders and the machine."""
    homes = {os.path.expanduser("~"), os.environ.get("HOME", "")} - {"", "/", "~"}
    for home in sorted(homes, key=len, reverse=True):
        text = re.sub(re.escape(home.rstrip("/")) + r"(?=[/\s:;,'\"]|$)", "~", text)
    text = re.sub(r"/(home|Users)/[^/\s:;,]+", "~", text)
    try:
        user = getpass.getuser()
    except (OSError, KeyError):
        user = ""
    for name, instead in ((user, "USER"), (socket.gethostname(), "HOST")):
        if len(name) > 2 and name not in ("root", "localhost"):
            text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", instead, text)
    return text
