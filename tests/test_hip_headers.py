"""Every type and number of HIP, hipRTC and ROCm SMI that is written down here, held against AMD's headers.

The headers are those of MONOKERNEL_HIP_HEADERS (folders, as in PATH; `.ci/hip-headers FOLDER` fetches some), of ROCm
where it is installed, and of a `triton` that is installed. Without any there is nothing to hold against.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from jax_monokernel._bench.energy import ROCM_SMI

ROOT = Path(__file__).parents[1]
VERSION = "hip/hip_version.h"


def version_of(folder: Path) -> tuple[int, int]:
    text = (folder / VERSION).read_text()
    major, minor = (re.search(rf"#define HIP_VERSION_{part} (\d+)", text) for part in ("MAJOR", "MINOR"))
    assert major is not None
    assert minor is not None
    return int(major[1]), int(minor[1])


def folders() -> dict[str, Path]:
    """Those of HIP 6 and later that are here, by version."""
    places = [Path(p) for p in os.environ.get("MONOKERNEL_HIP_HEADERS", "").split(os.pathsep) if p]
    places += [Path("/opt/rocm/include"), Path("/usr/include")]
    triton = importlib.util.find_spec("triton")
    for root in (triton and triton.submodule_search_locations) or ():
        places.append(Path(root) / "backends" / "amd" / "include")
    found = {}
    for place in places:
        if (place / VERSION).exists() and version_of(place) >= (6, 0):
            found.setdefault("hip-{}.{}".format(*version_of(place)), place)
    return found


FOLDERS = folders()
WITH_HIPRTC = {version: folder for version, folder in FOLDERS.items() if (folder / "hip" / "hiprtc.h").exists()}
WITH_SMI = {version: folder for version, folder in FOLDERS.items() if (folder / "rocm_smi" / "rocm_smi.h").exists()}
needs_headers = pytest.mark.skipif(
    not FOLDERS, reason="no headers of HIP 6 or later here; .ci/hip-headers fetches some (MONOKERNEL_HIP_HEADERS)"
)


def check(headers: Path, ffi: Path = ROOT / "ffi", native: Path = ROOT / "tests" / "native") -> str:
    """What the compiler objects to."""
    defines = ["-D__HIP_PLATFORM_AMD__", "-D__HIP_DISABLE_CPP_FUNCTIONS__"]
    command = [
        "c++",
        "-std=c++20",
        "-fsyntax-only",
        "-Wno-enum-compare",
        *defines,
        "-isystem",
        headers,
        f"-I{ffi}",
        f"-I{native}",
    ]
    done = subprocess.run([*command, native / "hip_headers.cc"], capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == ("error:" not in done.stderr)
    return done.stderr


@needs_headers
@pytest.mark.parametrize("version", FOLDERS)
def test_types_and_numbers_are_amds(version):
    assert check(FOLDERS[version]) == ""


def test_both_supported_versions_were_there():
    if "MONOKERNEL_HIP_HEADERS" not in os.environ:
        pytest.skip("MONOKERNEL_HIP_HEADERS is not set")
    assert {6, 7} <= {version_of(folder)[0] for folder in FOLDERS.values()}
    assert 6 in {version_of(folder)[0] for folder in WITH_HIPRTC.values()}
    if not any(folder.parts[-3].startswith("debian-") for folder in FOLDERS.values()):
        pytest.skip("hiprtc.h of HIP 7 and rocm_smi.h are from Debian's packages, which .ci/hip-headers did not get")
    assert 7 in {version_of(folder)[0] for folder in WITH_HIPRTC.values()}
    assert WITH_SMI


# File, what it says, what a mistake would say, and what the compiler then names.
MISTAKES = {
    "two arguments swapped": (
        "ffi/gpu/driver.h",
        "int(int*, void*, int, size_t)",
        "int(int*, void*, size_t, int)",
        "hipModuleOccupancyMaxActiveBlocksPerMultiprocessor",
    ),
    "an argument too few": (
        "ffi/gpu/driver.h",
        "int(void*, unsigned char, size_t, void*)",
        "int(void*, int)",
        "Memset",
    ),
    "a handle by value": (
        "ffi/gpu/driver.h",
        "int(int*, int), cuDeviceGet,",
        "int(int, int), cuDeviceGet,",
        "hipDeviceGet",
    ),
    "a size of 32 bits": ("ffi/gpu/driver.h", "int(void**, size_t),", "int(void**, unsigned),", "hipMalloc"),
    "no such function": ("ffi/gpu/driver.h", "hipMemsetD8Async", "hipMemsetD8AsyncV2", "hipMemsetD8AsyncV2"),
    "CUDA's number": ("ffi/gpu/driver.h", ".multiprocessors = 63", ".multiprocessors = 16", "hipDeviceAttributeMulti"),
    "another attribute's": ("ffi/gpu/driver.h", ".clock_khz = 10017", ".clock_khz = 5", "WallClockRate"),
    "another flag": ("ffi/gpu/driver.h", "kHipHostCoherent = 0x40000000", "kHipHostCoherent = 0x80000000", "Coherent"),
    "too little memory": (
        "ffi/gpu/driver.h",
        "kHipPropertiesBytes = 16384",
        "kHipPropertiesBytes = 1024",
        "Properties",
    ),
    "the stand-in's struct": ("tests/native/rocm/numbers.h", "kArchOffset = 1160", "kArchOffset = 396", "gcnArchName"),
    "the stand-in's error": ("tests/native/rocm/numbers.h", "kNotReady = 600", "kNotReady = 34", "hipErrorNotReady"),
    "hipRTC": (
        "ffi/gpu/compiler.h",
        "int(void*, int, const char* const*)",
        "int(void*, const char* const*, int)",
        "hiprtcCompileProgram",
    ),
}


@needs_headers
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_noticed(mistake, tmp_path):
    file, old, new, message = MISTAKES[mistake]
    of_compiler = "hiprtc" in message
    if of_compiler and not WITH_HIPRTC:
        pytest.skip("none of the headers here is hiprtc.h")
    for folder in ("ffi/gpu", "tests/native"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    text = (tmp_path / file).read_text()
    assert old in text, f"{file} has changed: say here how to break it"
    (tmp_path / file).write_text(text.replace(old, new))
    for headers in WITH_HIPRTC.values() if of_compiler else [next(iter(FOLDERS.values()))]:
        assert message in check(headers, tmp_path / "ffi", tmp_path / "tests" / "native")


# ---- ROCm SMI, which Python calls ----

C_TYPES = {ctypes.c_uint32: "uint32_t", ctypes.c_uint64: "uint64_t", ctypes.c_float: "float"}
C_TYPES |= {ctypes.POINTER(of): f"{name} *" for of, name in list(C_TYPES.items())}


def check_smi(headers: Path, functions: dict[str, tuple], folder: Path) -> str:
    """What the compiler objects to. A file in `folder` stands in for libdrm's, of which the header needs but types."""
    (folder / "libdrm").mkdir(exist_ok=True)
    (folder / "libdrm" / "drm.h").write_text("#include <linux/types.h>\n")
    lines = ["#include <rocm_smi/rocm_smi.h>", "#include <type_traits>"]
    lines.append("static_assert(RSMI_STATUS_SUCCESS == 0 && sizeof(rsmi_status_t) == sizeof(int));")
    for name, arguments in functions.items():
        type_ = f"rsmi_status_t({', '.join(C_TYPES[a] for a in arguments)})"
        lines.append(f'static_assert(std::is_same_v<decltype({name}), {type_}>, "{name}");')
    command = ["c++", "-std=c++20", "-fsyntax-only", "-isystem", headers, "-isystem", folder, "-x", "c++", "-"]
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == ("error:" not in done.stderr)
    return done.stderr


needs_smi = pytest.mark.skipif(not WITH_SMI, reason="no rocm_smi.h here; .ci/hip-headers fetches some")


@needs_smi
@pytest.mark.parametrize("version", WITH_SMI)
def test_the_calls_of_rocm_smi_are_amds(version, tmp_path):
    assert check_smi(WITH_SMI[version], ROCM_SMI, tmp_path) == ""
    # What is made of the numbers, in the words of the header.
    text = re.sub(r"[\s*]+", " ", (WITH_SMI[version] / "rocm_smi" / "rocm_smi.h").read_text())
    assert (
        "((DOMAIN & 0xFFFFFFFF) << 32) | ((Partition & 0xF) << 28) | ((BUS & 0xFF) << 8) | ((DEVICE & 0x1F) <<3" in text
    )
    assert "counter_resolution resolution of the counter @p power in micro Joules" in text


@needs_smi
@pytest.mark.parametrize("function", ROCM_SMI)
def test_a_mistake_in_a_call_of_rocm_smi_is_noticed(function, tmp_path):
    arguments = ROCM_SMI[function]
    other = ctypes.c_uint32 if arguments[-1] is ctypes.c_uint64 else ctypes.c_uint64
    for wrong in ((*arguments[:-1], other), (*arguments, ctypes.c_uint32)):
        said = check_smi(next(iter(WITH_SMI.values())), ROCM_SMI | {function: wrong}, tmp_path)
        assert f"static assertion failed: {function}" in said
