"""What the GPU run time compiles, with what, and where it keeps it; on a stand-in for drivers and compilers."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from decoding import DECODE_ERRORS, params_of, state_of
from gpu_fakes import PLATFORMS, make_call, register, spec_of
from naive import random_weights
from typer.testing import CliRunner

from jax_monokernel import LayerSpec, _gpu, _native, cli, decode, models
from jax_monokernel._bench.shapes import SHAPES
from jax_monokernel._program import program
from jax_monokernel.models.loading import pretrained_spec
from jax_monokernel.plan import Plan, make_plan
from jax_monokernel.tape import pack

EDGES = [-(2**63), -1, 0, 1, 3, 7, 65, 1023, 2**20, 2**31 - 1, 2**31, 2**40, 2**59, 2**62, 2**63 - 1]


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("table", ["ints", "layers", "ropes", "tiles"])
def test_programs_that_were_changed_give_an_error_or_a_stub(platform, table):
    original = make_call(platform).attributes
    arguments = {"batch": 2, "shared_bytes": 65536} | {k: int(original[k]) for k in ("splits", "task_heads")}
    tables = {k: original[k] for k in ("ints", "floats", "layers", "ropes", "tiles")}
    whole = _native.gpu_stub(**tables, **arguments)
    refused = 0
    for i in range(tables[table].size):
        for edge in EDGES:
            changed = tables[table].copy()
            changed.flat[i] = edge
            try:
                stub = _native.gpu_stub(**tables | {table: changed}, **arguments)
            except ValueError:
                refused += 1
                continue
            assert stub.endswith('#include "kernel.h"\n')
            # What is not refused either is what it was, or is written down.
            assert (stub != whole) or changed.flat[i] == tables[table].flat[i] or table == "tiles"
    assert refused > tables[table].size * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 17}, "1 to 16 requests"),
        ({"batch": 0}, "1 to 16 requests"),
        ({"splits": 0}, "splits is 0"),
        ({"splits": 10**6}, "splits is 1000000"),
        ({"task_heads": 3}, "task_heads is 3; expected a divisor"),
        ({"floats": np.full(len(_native.FLOAT_FIELDS), np.nan, np.float32)}, "norm_eps is not finite"),
        ({"floats": np.zeros(3, np.float32)}, "another version"),
        ({"layers": np.zeros(3, np.int64)}, "layer table has the wrong size"),
        ({"tiles": np.zeros(3, np.int64)}, "tile table has the wrong size"),
    ],
)
def test_stub_arguments(changes, message):
    tables = program(spec_of(), Plan(platform="cuda", units=3))
    arguments = {"batch": 1, "splits": 1, "task_heads": 1, "shared_bytes": 65536}
    with pytest.raises(ValueError, match=message):
        _native.gpu_stub(**tables | arguments | changes)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("groups", 4, "the groups are out of range"),
        ("groups", 0, "the groups are out of range"),
        ("attention_groups", 3, "the groups are out of range"),
        ("mlp_groups", 1, "the inner width is not that of the groups"),
        ("attention_groups", 1, "the tile table"),
        ("inner_cols", 16, "the inner width is not that of the groups"),
        ("inner_cols", 24, "the tile table"),
        ("qk_norm", 2, "the groups do not hold whole heads"),
    ],
)
def test_groups_that_cannot_be(field, value, message):
    tables = program(spec_of(), Plan(platform="rocm", units=6, groups=2))
    arguments = {"batch": 1, "splits": 1, "task_heads": 1, "shared_bytes": 65536}
    assert "#define MK_GROUPS 2\n" in _native.gpu_stub(**tables, **arguments)
    ints = tables["ints"].copy()
    ints[_native.INT_FIELDS.index(field)] = value
    with pytest.raises(ValueError, match=message):
        _native.gpu_stub(**tables | {"ints": ints}, **arguments)


def test_groups_do_not_share_tiles():
    tables = program(spec_of(), Plan(platform="rocm", units=6, groups=2))
    arguments = {"batch": 1, "splits": 1, "task_heads": 1, "shared_bytes": 65536}
    tiles = tables["tiles"].reshape(5, 6, 3).copy()
    tiles[1, 2, 1] -= 1  # of o, from the last unit of one group to the first one of the other
    tiles[1, 3, :2] += -1, 1
    with pytest.raises(ValueError, match="the tile table mixes groups"):
        _native.gpu_stub(**tables | {"tiles": tiles.reshape(-1)}, **arguments)


def test_a_cpu_program_is_no_gpu_program():
    tables = program(spec_of(), Plan(platform="cpu", units=3))
    with pytest.raises(ValueError, match="packed for the CPU"):
        _native.gpu_stub(**tables, batch=1, splits=1, task_heads=1, shared_bytes=65536)


# ---- Stub and headers ----


@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_stub_says_what_the_program_says(platform):
    spec = spec_of(norm_eps=1e-5, embedding_multiplier=-3.3)
    tables = program(spec, Plan(platform=platform, units=7))
    stub = _native.gpu_stub(**tables, batch=3, splits=5, task_heads=2, shared_bytes=65536, trace=True)
    defines = dict(re.findall(r"^#define MK_(\w+) (.*)$", stub, re.MULTILINE))
    for name, value in zip(_native.INT_FIELDS, tables["ints"], strict=True):
        assert int(defines.pop(name.upper())) == value
    for name, value in zip(_native.FLOAT_FIELDS, tables["floats"], strict=True):
        text = defines.pop(name.upper())
        assert text.endswith("f")
        assert float.fromhex(text[:-1]) == value

    def rows(text):
        assert text.startswith("{{")
        return [row.split(",") for row in re.findall(r"\{([^{}]+)\}", text)]

    tiles = np.array(rows(defines.pop("TILE_TABLE")), np.int64)
    np.testing.assert_array_equal(tiles, tables["tiles"].reshape(-1, 3)[:, :2])
    np.testing.assert_array_equal(np.array(rows(defines.pop("LAYER_TABLE")), np.int64).reshape(-1), tables["layers"])
    ropes = [[float.fromhex(v.rstrip("f")) for v in row] for row in rows(defines.pop("ROPE_TABLE"))]
    np.testing.assert_allclose(np.reshape(ropes, -1), tables["ropes"], rtol=1e-7)
    assert defines == {
        "BATCH": "3",
        "SPLITS": "5",
        "TASK_HEADS": "2",
        "SHARED_BYTES": "65536",
        "TRACE": "1",
        "NEAR": "0",
    }


def test_a_model_without_positions_has_a_rope_row():
    spec = spec_of(ropes=(), layers=(LayerSpec(rope=None),))
    tables = program(spec, Plan(platform="cuda", units=3))
    stub = _native.gpu_stub(**tables, batch=1, splits=1, task_heads=1, shared_bytes=65536)
    assert "#define MK_ROPE_TABLE {{0," in stub


def test_headers_are_the_files():
    root = Path(__file__).parent.parent / "ffi" / "gpu" / "kernel"
    files = {str(p.relative_to(root)): p.read_text() for p in root.rglob("*.h")}
    assert _native.gpu_headers() == files


# ---- The cache ----


def cache_files(tmp_path: Path) -> list[Path]:
    return sorted(p for p in (tmp_path / "cache").iterdir() if not p.name.startswith("."))


def test_a_second_process_finds_the_kernel(make_fake, tmp_path, capfd):
    first = make_fake()
    make_call().run()
    assert "compiling the kernel for this model, batch 2, on sm_90 (nvrtc-13.4)" in capfd.readouterr().err
    (file,) = cache_files(tmp_path)
    content = file.read_bytes()
    code = content[96:]
    assert code[4:-1].decode() == first.source
    assert content[:96] == b"jax_monokernel 1%016x%s" % (len(code), hashlib.sha256(code).hexdigest().encode())
    second = make_fake()
    make_call().run()
    assert (second.compiles, second.loads) == (0, 1)
    assert capfd.readouterr().err == ""
    assert cache_files(tmp_path) == [file]


@pytest.mark.parametrize("platform", PLATFORMS)
def test_an_entry_is_named_by_all_that_its_binary_depends_on(make_fake, tmp_path, platform):
    """The name is made here from what the compiler was given. Without a part of it, another binary would be taken."""
    fake = make_fake(platform)
    make_call(platform).run()
    (file,) = cache_files(tmp_path)
    name, version = file.name.split("-", 1)
    assert version == {"cuda": "nvrtc-13.4", "rocm": "hiprtc-13.4"}[platform]
    flags = fake.flags.split()
    target = flags[0].partition("=")[2]
    assert target == {"cuda": "sm_90a", "rocm": "gfx942"}[platform]
    parts = [target, " ".join(flags), fake.source]
    for header, text in _native.gpu_headers().items():
        assert f"{header}:{len(text.encode())}\n" in fake.headers
        parts += [header, text]
    sha256 = hashlib.sha256()
    for part in (part.encode() for part in parts):
        sha256.update(b"%d:%s" % (len(part), part))
    assert name == sha256.hexdigest()


@pytest.mark.parametrize("changes", [{"nvrtc_major": 14}, {"major": 10}], ids=["compiler", "architecture"])
def test_another_compiler_or_architecture_is_another_kernel(make_fake, tmp_path, changes):
    make_fake()
    make_call().run()
    fake = make_fake()
    for name, value in changes.items():
        setattr(fake, name, value)
    make_call().run()
    assert fake.compiles == 1
    assert len(cache_files(tmp_path)) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-1],
        lambda content: content + b"x",
        lambda content: content[:50],
        lambda content: content[:200] + bytes([content[200] ^ 1]) + content[201:],
        lambda content: b"x" + content[1:],
        lambda content: content[:20] + b"f" + content[21:],
    ],
    ids=["empty", "short", "long", "no_header", "bit", "magic", "length"],
)
def test_damaged_entries_are_replaced(make_fake, tmp_path, damage, capfd):
    make_fake()
    make_call().run()
    (file,) = cache_files(tmp_path)
    content = file.read_bytes()
    file.write_bytes(damage(content))
    fake = make_fake()
    assert make_call().run()["lengths"].tolist() == [4, 4]
    assert f"{file} is damaged and will be replaced" in capfd.readouterr().err
    assert fake.compiles == 1
    assert file.read_bytes() == content


def test_a_cache_that_cannot_be_written_does_no_harm(make_fake, tmp_path, environment, capfd):
    fake = make_fake()
    (tmp_path / "file").write_text("")
    environment("MONOKERNEL_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert make_call().run()["lengths"].tolist() == [4, 4]
    assert "was not saved in" in capfd.readouterr().err
    assert fake.compiles == 1


def test_no_compile_mode(make_fake, environment):
    fake = make_fake()
    environment("MONOKERNEL_NO_COMPILE", "1")
    with pytest.raises(
        DECODE_ERRORS,
        match=r"FAILED_PRECONDITION.*MONOKERNEL_NO_COMPILE forbids.*"
        "jax-monokernel compile --model CHECKPOINT --batch 2 --capacity 16 --arch sm_90 --units 5 --groups 1 "
        "--dtype bfloat16",
    ):
        make_call().run()
    assert fake.compiles == 0
    environment("MONOKERNEL_NO_COMPILE", None)
    make_call().run()
    fake = make_fake()
    environment("MONOKERNEL_NO_COMPILE", "1")
    make_call().run()
    assert fake.compiles == 0


def test_where_nothing_is_compiled_a_damaged_entry_is_not_said_to_be_replaced(make_fake, tmp_path, environment, capfd):
    make_fake()
    make_call().run()
    (file,) = cache_files(tmp_path)
    file.write_bytes(file.read_bytes()[:-1])
    make_fake()
    environment("MONOKERNEL_NO_COMPILE", "1")
    capfd.readouterr()
    with pytest.raises(DECODE_ERRORS, match="MONOKERNEL_NO_COMPILE forbids"):
        make_call().run()
    wanted = f"jax_monokernel: {file} is damaged and is not used; delete it, and compile the kernel anew\n"
    assert capfd.readouterr().err == wanted


@pytest.mark.parametrize("no_compile", ["1", None], ids=["no_compile", "compile"])
@pytest.mark.parametrize("kind", ["link", "folder"])
def test_an_entry_that_cannot_be_read_is_named(make_fake, tmp_path, environment, capfd, kind, no_compile):
    """Permissions would stop all users but one, who may be the one that runs this."""
    make_fake()
    make_call().run()
    (file,) = cache_files(tmp_path)
    file.unlink()
    if kind == "link":
        file.symlink_to(file)
    else:
        file.mkdir()
    make_fake()
    environment("MONOKERNEL_NO_COMPILE", no_compile)
    capfd.readouterr()
    if no_compile:
        with pytest.raises(DECODE_ERRORS, match="MONOKERNEL_NO_COMPILE forbids"):
            make_call().run()
    else:
        make_call().run()
    why = "Too many levels of symbolic links" if kind == "link" else "Is a directory"
    assert f"jax_monokernel: {file} cannot be read ({why}); let this user read it" in capfd.readouterr().err


def test_a_cache_that_cannot_be_read_is_named(make_fake, tmp_path, environment, capfd):
    make_fake()
    environment("MONOKERNEL_NO_COMPILE", "1")
    (tmp_path / "cache").write_text("")
    with pytest.raises(DECODE_ERRORS, match="MONOKERNEL_NO_COMPILE forbids"):
        make_call().run()
    assert f"{tmp_path / 'cache'} cannot be read (Not a directory)" in capfd.readouterr().err


@pytest.mark.parametrize("platform", PLATFORMS)
def test_where_nothing_is_compiled_an_entry_that_the_driver_loads_is_taken(make_fake, tmp_path, environment, platform):
    """The newest may be of a compiler that is newer than the driver."""
    make_fake(platform)
    make_call(platform).run()
    (file,) = cache_files(tmp_path)
    code = b"of a newer compiler"
    content = b"jax_monokernel 1%016x%s" % (len(code), hashlib.sha256(code).hexdigest().encode()) + code
    newer = file.with_name(file.name.partition("-")[0] + "-newer")
    newer.write_bytes(content)
    os.utime(newer, (2**31, 2**31))
    fake = make_fake(platform)
    environment("MONOKERNEL_NO_COMPILE", "1")
    make_call(platform).run()
    assert (fake.compiles, fake.loads, fake.launches) == (0, 1, 1)
    file.unlink()
    make_fake(platform)
    with pytest.raises(DECODE_ERRORS, match=r"driver could not load the kernel: fake error \(error 209\)"):
        make_call(platform).run()


def test_a_cached_kernel_needs_no_compiler(make_fake, environment):
    make_fake()
    make_call().run()
    make_fake()
    environment("MONOKERNEL_NVRTC_LIBRARY", "/nowhere/libnvrtc.so")
    make_call().run()
    with pytest.raises(
        DECODE_ERRORS, match=r"MONOKERNEL_NVRTC_LIBRARY is /nowhere/libnvrtc.so, which cannot be loaded"
    ):
        make_call(batch=1).run()


NATIVE_ONLY = """
import ctypes, importlib.util, sys
spec = importlib.util.spec_from_file_location("_native", sys.argv[1])
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
import numpy as np
"""


def native_process(code: str, *arguments: object, **environment: str) -> subprocess.Popen:
    """A Python process with the native module alone: neither JAX nor this package has to be loaded."""
    command = [sys.executable, "-c", NATIVE_ONLY + code, _native.__file__, *map(str, arguments)]
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MONOKERNEL_")}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=kept | environment)


def output_of(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out


def test_processes_compile_once(fake_gpu_library, tmp_path):
    np.savez(tmp_path / "program.npz", **program(spec_of(), Plan(platform="cuda", units=3)))
    code = """
program = dict(np.load(sys.argv[2]))
fake = ctypes.CDLL(sys.argv[3])
ctypes.c_int.in_dll(fake, "fake_compile_ms").value = 700
result = native.gpu_compile(**program, batch=1, splits=1, task_heads=1, arch="sm_90")
print(ctypes.c_int.in_dll(fake, "fake_compiles").value, len(result["code"]), result["path"])
"""
    environment = {"MONOKERNEL_CACHE_DIR": str(tmp_path / "cache"), "MONOKERNEL_NVRTC_LIBRARY": str(fake_gpu_library)}
    processes = [native_process(code, tmp_path / "program.npz", fake_gpu_library, **environment) for _ in range(3)]
    found = [output_of(p).split() for p in processes]
    assert sorted(f[0] for f in found) == ["0", "0", "1"]
    assert len({tuple(f[1:]) for f in found}) == 1


# ---- Libraries ----


def library_found(fake_gpu_library: Path, tmp_path: Path, names: list[str], code: str = "", **environment: str) -> str:
    """Which of `names` (FOLDER/FILE below tmp_path) the search takes, if their folders are given in this order."""
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(fake_gpu_library.read_bytes())
    dirs = list(dict.fromkeys(str((tmp_path / name).parent) for name in names))
    script = f"native.gpu_library_dirs({dirs!r})\n{code}\nprint(native.gpu_compiler(sys.argv[2])[1])"
    platform = "rocm" if "hiprtc" in names[0] else "cuda"
    found = output_of(native_process(script, platform, **environment)).strip()
    return str(Path(found).relative_to(tmp_path))


def test_libraries_are_taken_in_the_order_of_folders_then_versions(fake_gpu_library, tmp_path):
    names = ["a/libnvrtc.so.12", "a/libnvrtc.so.13", "a/libnvrtc-builtins.so.14", "b/libnvrtc.so.14"]
    nowhere = {"MONOKERNEL_CUDA_LIBRARY": "/nowhere"}
    assert library_found(fake_gpu_library, tmp_path, names, **nowhere) == "a/libnvrtc.so.13"


def test_a_compiler_that_is_too_new_for_the_driver_comes_last(fake_gpu_library, tmp_path):
    names = ["a/libnvrtc.so.14", "b/libnvrtc.so.13"]
    found = library_found(fake_gpu_library, tmp_path, names, MONOKERNEL_CUDA_LIBRARY=str(fake_gpu_library))
    assert found == "b/libnvrtc.so.13"


def test_a_library_that_does_not_load_is_passed_over(fake_gpu_library, tmp_path):
    (tmp_path / "a").mkdir()
    code = f"open({str(tmp_path / 'a' / 'libhiprtc.so.9')!r}, 'w').write('no library')"
    assert library_found(fake_gpu_library, tmp_path, ["a/libhiprtc.so.7"], code) == "a/libhiprtc.so.7"


@pytest.mark.parametrize("name", ["libnvrtc.so.12", "libhiprtc.so.6"])
def test_a_library_that_is_loaded_already_comes_first(fake_gpu_library, tmp_path, name):
    loaded = tmp_path / "loaded" / name
    loaded.parent.mkdir()
    loaded.write_bytes(fake_gpu_library.read_bytes())
    found = library_found(fake_gpu_library, tmp_path, [f"a/{name}"], f"ctypes.CDLL({str(loaded)!r})")
    assert found == f"loaded/{name}"


# What docs/rocm.md says to install.
ROCM = (
    "ROCm 7 (AMD's system package rocm, or amdrocm of the ROCm Core SDK, or \"rocm[libraries]\" by pip from AMD's "
    "index; docs/rocm.md has the commands)"
)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("gpu_devices('cuda')", "Install the NVIDIA driver"),
        ("gpu_devices('rocm')", f"Install {ROCM}"),
        ("gpu_compiler('cuda')", "Install NVIDIA's run-time compiler: pip install nvidia-cuda-nvrtc"),
        ("gpu_compiler('rocm')", f"Install AMD's run-time compiler, a part of {ROCM}"),
    ],
)
def test_missing_libraries_are_named_with_what_to_install(call, message):
    code = f"""
try:
    native.{call}
except RuntimeError as error:
    print(error)
"""
    out = output_of(native_process(code))
    if not out:
        pytest.skip("this machine has the library")
    assert "was not found. " + message in out
    assert re.search(r"or set MONOKERNEL_\w+_LIBRARY to the library's path", out)


def test_a_library_without_the_functions(environment, tmp_path):
    subprocess.run(["c++", "-shared", "-x", "c++", "/dev/null", "-o", tmp_path / "libempty.so"], check=True)
    environment("MONOKERNEL_HIPRTC_LIBRARY", str(tmp_path / "libempty.so"))
    with pytest.raises(RuntimeError, match=r"libempty\.so has no function hiprtcVersion: it is too old"):
        _native.gpu_compiler("rocm")


def test_folders_of_installed_packages(tmp_path, monkeypatch):
    for folder in ("nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib", "_rocm_sdk_core/lib", "torch/lib"):
        (tmp_path / folder).mkdir(parents=True)
    for package in ("_rocm_sdk_core", "torch"):
        (tmp_path / package / "__init__.py").write_text("raise AssertionError('it is looked for, not imported')")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setenv("ROCM_PATH", "/srv/rocm")
    of_rocm = [d for d in _gpu.library_dirs() if "/rocm/" in d and not d.startswith(str(tmp_path))]
    assert of_rocm[:3] == ["/srv/rocm/lib", "/opt/rocm/lib", "/opt/rocm/core/lib"]
    found = [str(Path(d).relative_to(tmp_path)) for d in _gpu.library_dirs() if d.startswith(str(tmp_path))]
    assert sorted(found) == ["_rocm_sdk_core/lib", "nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib", "torch/lib"]


# ---- Ahead of time ----


def invoke(*arguments: str):
    return CliRunner().invoke(cli.app, ["compile", *arguments])


@pytest.mark.parametrize(
    ("platform", "arguments", "expected"),
    [
        ("cuda", ["--arch", "sm_90"], "sm_90, 132 units, batch 1: compiled in"),
        ("cuda", ["--arch", "sm_90a", "--units", "7"], "sm_90, 7 units, batch 1: compiled in"),
        ("rocm", ["--arch", "gfx950", "--batch", "3"], "gfx950, 256 units, batch 3: compiled in"),
        ("rocm", [], "gfx942, 132 units, batch 1: compiled in"),
    ],
)
def test_compile_command(make_fake, platform, arguments, expected, environment):
    fake = make_fake(platform)
    if "--arch" in arguments:
        fake.devices = 0
    else:
        environment("MONOKERNEL_CUDA_LIBRARY", "/nowhere")
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(expected)
    assert Path(result.stdout.split(": ")[-1].strip()).exists()
    assert fake.compiles == 1
    make_fake(platform).devices = fake.devices
    assert "in the cache already" in invoke(*arguments).stdout


def test_compile_ahead_gives_the_kernel_that_decode_asks_for(make_fake, environment):
    make_fake()
    spec = spec_of()
    _gpu.compile_ahead(spec, _gpu.Target("cuda", "sm_90", 5), batch=2, capacity=16)
    fake = make_fake()
    environment("MONOKERNEL_NO_COMPILE", "1")
    call = make_call(spec=spec, plan=make_plan(spec, platform="cuda", units=5))
    call.attributes["task_heads"] = np.int64(int(re.search(r"TASK_HEADS (\d+)", stub_of(spec)).group(1)))
    call.run()
    assert fake.launches == 1


@pytest.mark.parametrize(
    ("platform", "arch", "capacity", "units", "groups", "dtype"),
    [
        ("cuda", "sm_90", 16, 132, 1, None),
        ("cuda", "sm_90", 257, 132, 1, None),
        ("cuda", "sm_90", 1024, 5, 1, "float32"),
        ("rocm", "gfx942", 16, 6, 2, None),
        ("rocm", "gfx942", 300, 48, 1, "float16"),
    ],
)
def test_the_command_that_the_error_names_gives_the_kernel(
    make_fake, environment, monkeypatch, platform, arch, capacity, units, groups, dtype
):
    """Also where it is not the kernel that the command gives by default."""
    register()
    module = sys.modules["jax_monokernel.decode"]  # the package's attribute of this name is the function
    monkeypatch.setattr(module, "TARGET", f"jax_monokernel_decode_on_fake_{platform}")
    spec = pretrained_spec(models.SMALL, dtype=dtype)
    tape = pack(spec, random_weights(spec), make_plan(spec, platform=platform, units=units, groups=groups))
    state, params = state_of(spec, [3, 3], capacity=capacity), params_of(spec, 2)

    make_fake(platform)
    environment("MONOKERNEL_NO_COMPILE", "1")
    with pytest.raises(DECODE_ERRORS, match="forbids compiling") as error:
        jax.block_until_ready(decode(tape, state, params, max_new_tokens=1))
    (command,) = re.findall("ahead of time: jax-monokernel compile (.*)", str(error.value))
    assert f"--arch {arch} " in command

    environment("MONOKERNEL_NO_COMPILE", None)
    result = invoke(*(str(models.SMALL) if word == "CHECKPOINT" else word for word in shlex.split(command)))
    assert result.exit_code == 0, result.output

    fake = make_fake(platform)
    environment("MONOKERNEL_NO_COMPILE", "1")
    jax.block_until_ready(decode(tape, state, params, max_new_tokens=1))
    assert (fake.compiles, fake.launches) == (0, 1)


def test_compile_ahead_of_groups_makes_both_kernels(make_fake):
    """The one whose words stay on dies, and the one for work-groups that are elsewhere."""
    fake = make_fake("rocm")
    arguments = {"batch": 1, "capacity": 16, "groups": 2}
    _gpu.compile_ahead(spec_of(), _gpu.Target("rocm", "gfx942", 6), **arguments)
    assert fake.compiles == 2
    assert "#define MK_NEAR 1\n" in fake.source
    _gpu.compile_ahead(spec_of(), _gpu.Target("rocm", "gfx942", 6), **arguments)
    assert fake.compiles == 2


def test_compile_ahead_for_weights_that_are_placed(make_fake):
    fake = make_fake("rocm")
    arguments = {"batch": 1, "capacity": 16, "groups": 1}
    _gpu.compile_ahead(spec_of(), _gpu.Target("rocm", "gfx942", 6), **arguments)
    assert "MK_PLACED" not in fake.source
    _gpu.compile_ahead(spec_of(), _gpu.Target("rocm", "gfx942", 6), **arguments, placed=True)
    assert "#define MK_PLACED 1\n" in fake.source
    assert fake.compiles == 2
    with pytest.raises(ValueError, match="can be placed for rocm"):
        _gpu.compile_ahead(spec_of(), _gpu.Target("cuda", "sm_90", 6), **arguments, placed=True)


def stub_of(spec):
    from jax_monokernel.plan import attention_tasks

    plan = Plan(platform="cuda", units=5)
    splits, heads = attention_tasks(spec, plan, 2, 16)
    return _native.gpu_stub(**program(spec, plan), batch=2, splits=splits, task_heads=heads, shared_bytes=65536)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "sm_80"], "does not run on sm_80"),
        (["--arch", "h100"], "is no GPU architecture"),
        (["--arch", "sm_103"], "give the number of multiprocessors"),
        (
            ["--arch", "sm_120"],
            "does not run on sm_120; supported are sm_90 (H100, H200), sm_100 (B200), sm_103 (B300)",
        ),
        (["--arch", "sm_110a"], "does not run on sm_110; supported are"),
        (["--arch", "sm_90", "--model", "/nowhere"], "/nowhere"),
        ([], "no GPU was found here; name an architecture"),
    ],
)
def test_compile_command_errors(make_fake, arguments, message, environment):
    make_fake("cuda").devices = 0
    environment("MONOKERNEL_HIP_LIBRARY", "/nowhere")
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def nvrtc_version() -> str | None:
    _native.gpu_library_dirs(_gpu.library_dirs())
    try:
        return _native.gpu_compiler("cuda")[0]
    except RuntimeError:
        return None


needs_nvrtc = pytest.mark.skipif(
    nvrtc_version() is None, reason="NVRTC is not installed (pip install nvidia-cuda-nvrtc)"
)
# A model whose streams are even: its waves divide registers.
EVEN = {"hidden_size": 1024, "intermediate_size": 3072, "vocab_size": 151936}


@needs_nvrtc
@pytest.mark.parametrize(
    ("options", "batch"),
    [
        ({}, 1),
        ({"dtype": "float32", "kv_dtype": "float32"}, 3),
        (EVEN, 1),
        (EVEN, 16),
        ({"hidden_size": 576, "intermediate_size": 1536, "post_norm": True}, 2),
        ({"hidden_size": 576, "intermediate_size": 1536, "groups": 2}, 2),
    ],
)
def test_nvrtc_compiles_the_kernel(environment, tmp_path, options, batch):
    environment("MONOKERNEL_CACHE_DIR", str(tmp_path))
    spec, groups = spec_of(**{k: v for k, v in options.items() if k != "groups"}), options.get("groups")
    target = _gpu.Target("cuda", "sm_90", 132)
    compiled = _gpu.compile_ahead(spec, target, batch=batch, capacity=64, groups=groups)
    assert compiled.code[:4] == b"\x7fELF"
    assert b"monokernel" in compiled.code
    assert 0 < compiled.seconds < 120


@needs_nvrtc
@pytest.mark.parametrize(("arch", "since"), [("sm_100", (12, 8)), ("sm_103", (12, 9))])  # sm_90 is above
def test_nvrtc_compiles_the_kernel_for_every_architecture_that_is_accepted(environment, tmp_path, arch, since):
    """With all its instructions: what a model's plan leaves out would not show that an architecture lacks it."""
    version = nvrtc_version()
    if tuple(map(int, version.removeprefix("nvrtc-").split("."))) < since:
        pytest.skip(f"{version} does not know {arch}")
    environment("MONOKERNEL_CACHE_DIR", str(tmp_path))
    compiled = _gpu.compile_ahead(spec_of(**EVEN), _gpu.Target("cuda", arch, 148), batch=1, capacity=64)
    assert compiled.code[:4] == b"\x7fELF"


@needs_nvrtc
@pytest.mark.parametrize("batch", [1, 16])
def test_nvrtc_takes_at_most_20_s_for_a_large_model(environment, tmp_path, batch):
    """Of Llama-3.2-1B's shape, at its first use. It is CPU time: what else this machine does is not counted."""
    environment("MONOKERNEL_CACHE_DIR", str(tmp_path))
    spec = SHAPES["llama3.2-1b"].spec()
    start = time.process_time()
    compiled = _gpu.compile_ahead(spec, _gpu.Target("cuda", "sm_90", 132), batch=batch, capacity=2048)
    assert compiled.seconds > 0
    assert time.process_time() - start <= 20
