"""benchmarks.gpu_kernel, with a stand-in for the driver and the compiler."""

from __future__ import annotations

import ctypes
import json
import re
import sys
from pathlib import Path
from typing import ClassVar

import jax
import pytest

_REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_REPOSITORY))

from benchmarks import gpu_kernel  # noqa: E402
from jax_monokernel._bench.shapes import SHAPES  # noqa: E402

SHAPE = next(iter(SHAPES))  # the smallest
UNITS = 8


def test_arguments_are_those_of_the_kernel():
    text = (_REPOSITORY / "ffi/gpu/kernel/args.h").read_text()
    body = re.sub(r"//.*", "", text[text.index("struct Args") :])
    fields = re.findall(r"([\w ]+?\*?) (\w+);", body)
    assert [name for _, name in fields] == [name for name, _ in gpu_kernel.Args._fields_]
    sizes = {"i64": 8, "u64": 8, "i32": 4}
    for (kind, name), (_, ours) in zip(fields, gpu_kernel.Args._fields_, strict=True):
        assert ctypes.sizeof(ours) == (8 if kind.endswith("*") else sizes[kind.split()[-1]]), name


def test_variants():
    variant = gpu_kernel.Variant.parse("x:MK_PACE=3,splits=2,heads=1,chunk_atoms=16")
    assert variant.defines == (("MK_PACE", "3"),)
    spec = SHAPES[SHAPE].spec()
    plan = variant.make_plan(spec, UNITS)
    assert plan.chunk_atoms == 16
    stub = variant.stub(spec, plan, 2, 512)
    assert stub.startswith("#define MK_PACE 3\n")
    assert {"#define MK_SPLITS 2", "#define MK_TASK_HEADS 1", "#define MK_BATCH 2"} <= set(stub.split("\n"))
    for wrong in ("", "@", "x@nowhere", "x:unknown=1", "x:splits=two"):
        with pytest.raises(ValueError, match=r"NAME|no setting|invalid literal"):
            gpu_kernel.Variant.parse(wrong)


class _Device:
    platform, device_kind, core_count = "gpu", "NVIDIA stand-in", UNITS


class _Calls:
    """Of the driver: memory of the host is all there is."""

    def __init__(self):
        self._kept = []

    def cuMemHostAlloc(self, pointer, size, _flags):
        self._kept.append(ctypes.create_string_buffer(size))
        pointer._obj.value = ctypes.addressof(self._kept[-1])
        return 0

    def cuMemsetD8_v2(self, pointer, value, size):
        ctypes.memset(pointer, value, size.value)
        return 0


class _Driver:
    launches: ClassVar[list] = []

    def __init__(self, binary, name, shared_bytes):
        assert (binary, name) == (b"binary", "monokernel")
        self.calls, self.shared_bytes = _Calls(), shared_bytes

    def check(self, error):
        assert error == 0

    def attribute(self, number):
        return {0: 480, 3: 0, 4: 128}[number]

    def timed_launch(self, units, threads, args):
        pointers = [getattr(args, name) for name in gpu_kernel.POINTERS]
        self.launches.append((units, threads, args.capacity, args.max_new_tokens, pointers))
        return 0.5


def test_a_whole_run(monkeypatch, tmp_path, capsys):
    stubs = []
    monkeypatch.setattr(_Driver, "launches", [])
    monkeypatch.setattr(gpu_kernel, "Driver", _Driver)
    monkeypatch.setattr(gpu_kernel, "compile_kernel", lambda stub, headers: stubs.append((stub, headers)) or b"binary")
    monkeypatch.setattr(gpu_kernel.jax, "devices", lambda: [_Device()])
    arguments = [SHAPE, "--batch", "1,2", "--position", "8", "--tokens", "4", "--repeats", "2", "--variant", "now"]
    arguments += ["--variant", "slow:MK_PACE=9", "--output", str(tmp_path / "found" / "results.json")]
    gpu_kernel.main(arguments)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(stubs) == 4
    assert "slow" in lines[-1]
    assert "125000.0 us a step" in lines[-1]
    assert len(_Driver.launches) == 4 * 3
    for units, _, capacity, tokens, pointers in _Driver.launches:
        assert (units, capacity, tokens) == (UNITS, 12, 4)
        given = dict(zip(gpu_kernel.POINTERS, pointers, strict=True))
        assert {name for name, value in given.items() if not value} == {
            "embedding",
            "logit_bias",
            "log_probs",
            "mailbox",
            "trace",
        }
    found = json.loads((tmp_path / "found" / "results.json").read_text())
    assert found["command"].startswith("python -m benchmarks.gpu_kernel " + SHAPE)
    assert [row["batch"] for row in found["results"]] == [1, 2, 1, 2]
    assert found["results"][2]["defines"] == {"MK_PACE": "9"}


def test_without_a_gpu_it_says_so():
    if jax.devices()[0].platform == "gpu":
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="no NVIDIA GPU"):
        gpu_kernel.main([SHAPE])
