"""Every type and number of HIP and hipRTC that ffi/gpu and the stand-ins have written down, held against AMD's headers.

The headers are those of MONOKERNEL_HIP_HEADERS (folders, as in PATH; `.ci/hip-headers FOLDER` fetches some), of ROCm
where it is installed, and of a `triton` that is installed. Without any there is nothing to hold against.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

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
    assert any((folder / "hip" / "hiprtc.h").exists() for folder in FOLDERS.values())


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
    headers = next(iter(FOLDERS.values()))
    if "hiprtc" in message:
        with_compiler = [folder for folder in FOLDERS.values() if (folder / "hip" / "hiprtc.h").exists()]
        if not with_compiler:
            pytest.skip("none of the headers here is hiprtc.h")
        headers = with_compiler[0]
    for folder in ("ffi/gpu", "tests/native"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    text = (tmp_path / file).read_text()
    assert old in text, f"{file} has changed: say here how to break it"
    (tmp_path / file).write_text(text.replace(old, new))
    assert message in check(headers, tmp_path / "ffi", tmp_path / "tests" / "native")
