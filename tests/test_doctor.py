"""jax-monokernel doctor: what it says of this machine, of one with AMD's GPUs (stand-ins), and of broken ones."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
import re
import sys
from pathlib import Path

import jax
import pytest
from gpu_fakes import register
from rocm_stand_in import StandIn
from typer.testing import CliRunner

from jax_monokernel import _self_test, doctor
from jax_monokernel.cli import app
from jax_monokernel.doctor import Line, Machine, redacted, report
from jax_monokernel.plan import Plan, geometry


def ask(machine: Machine | None = None, *, test: bool = True) -> tuple[bool, str]:
    lines: list[str] = []
    works = report(lines.append, test=test, machine=machine)
    return works, "\n".join(lines)


@pytest.fixture
def bare(tmp_path, environment) -> Machine:
    """A machine without GPUs, whatever this one has, and nothing set."""
    environment("MONOKERNEL_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("MONOKERNEL_CUDA_LIBRARY", "MONOKERNEL_HIP_LIBRARY"):
        environment(name, "/nowhere/driver.so")
    for folder in ("sys/bus/pci/devices", "dev/dri", "dev/shm"):
        (tmp_path / folder).mkdir(parents=True)
    return Machine(tmp_path / "sys", tmp_path / "dev")


def add_node(machine: Machine, number: int, bus: int, units: int, xcds: int) -> None:
    """A partition as KFD describes it."""
    folder = machine.sys / "class" / "kfd" / "kfd" / "topology" / "nodes" / str(number)
    folder.mkdir(parents=True)
    text = f"simd_count {4 * units}\nsimd_per_cu 4\ndomain 0\nlocation_id {bus << 8}\nnum_xcc {xcds}\n"
    (folder / "properties").write_text(text)


def add_adapter(machine: Machine, bus: str, vendor: str = "0x1002", **files: str) -> None:
    folder = machine.sys / "bus" / "pci" / "devices" / bus
    folder.mkdir()
    for name, text in {"vendor": vendor, "class": "0x120000", **files}.items():
        (folder / name).write_text(text + "\n")


@pytest.fixture
def no_plugins(monkeypatch):
    """JAX has CPUs only, whatever it has here."""
    local_devices = jax.local_devices

    def devices(*arguments, backend=None, **options):
        if backend != "cpu":
            raise RuntimeError(f"Unknown backend {backend}")
        return local_devices(*arguments, backend=backend, **options)

    monkeypatch.setattr(doctor.jax, "local_devices", devices)
    monkeypatch.setattr(doctor, "_plugins", dict)


@pytest.fixture
def on_rocm(rocm_stand_in, environment, tmp_path_factory, monkeypatch):
    """JAX's device for ROCM is one of its CPU devices, on which `decode` finds stand-ins.

    They are copies, because devices are asked once in a process, and these have few units.
    """
    register()
    jax_device, decode = doctor._jax_device, _self_test._decode

    def device(platform, devices, *more):
        if platform != "rocm":
            return jax_device(platform, devices, *more)
        devices[platform] = jax.devices()[1]
        return Line("JAX", "ok", "1 rocm device")

    def run(spec, platform, *where):
        with monkeypatch.context() as patch:
            if platform == "rocm":
                patch.setattr(sys.modules["jax_monokernel.decode"], "TARGET", "jax_monokernel_decode_on_fake_rocm")
            return decode(spec, platform, *where)

    monkeypatch.setattr(doctor, "_jax_device", device)
    monkeypatch.setattr(_self_test, "_decode", run)
    copy = StandIn(tmp_path_factory.mktemp("few"), like=rocm_stand_in)
    copy.units = 3
    for name, value in copy.variables.items():
        environment(name, value)
    return copy


def test_a_machine_without_gpus(bare):
    works, text = ask(bare)
    assert works
    assert text.splitlines()[-1] == "Everything that is here works."
    assert len(re.findall(r"  ok     cpu, .*: agrees with the reference \(\d", text)) == len(_self_test.SPECS)
    for what in ("NVIDIA GPU of compute capability 9.0", "gfx942 or gfx950", "docs/rocm.md", "Python: 3."):
        assert what in text
    assert "note   driver: jax_monokernel: MONOKERNEL_HIP_LIBRARY is /nowhere/driver.so, which cannot be loaded" in text
    assert "BROKEN" not in text


def test_the_command(monkeypatch):
    asked = []
    monkeypatch.setattr(doctor, "report", lambda print_, test: asked.append(test) or print_("words") or test)
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 0
    result = CliRunner().invoke(app, ["doctor", "--no-test"])
    assert (result.exit_code, result.stdout) == (1, "words\n")
    assert asked == [True, False]


def test_a_machine_with_amd_gpus(bare, on_rocm):
    add_adapter(bare, "0000:c1:00.0", current_compute_partition="SPX", current_memory_partition="NPS1")
    add_adapter(bare, "0000:c2:00.0", current_compute_partition="CPX", current_memory_partition="NPS4")
    add_node(bare, 2, 0xC1, 3, 8)
    add_node(bare, 3, 0xC2, 3, 1)
    works, text = ask(bare)
    assert works, text
    assert re.search(r"ok     driver: HIP 6\.2\.32830, \S*stand_in_hip\.so", text)
    assert "ok     run-time compiler: hiprtc-6.2, " in text
    device = r"AMD Instinct MI300X \(stand-in\), gfx942, 3 compute units, 64 KiB of shared memory each, 192 GiB"
    assert re.search(
        rf"ok     device 0: {device}, compute partition mode SPX, memory partition mode NPS1, 8 XCDs", text
    )
    assert re.search(
        rf"ok     device 1: {device}, compute partition mode CPX, memory partition mode NPS4, 1 XCD\n", text
    )
    assert "note   device 0: a MI300X has 304 units" in text  # 3 on 8 XCDs
    assert "note   device 1: 3 of 38 units are active\n" in text
    assert "ok     peer access: each device reaches each other's memory" in text
    assert len(re.findall(r"  ok     rocm, .*: agrees with the reference", text)) == len(_self_test.SPECS)
    assert str(Path.home()) not in text


def test_the_groups_of_an_amd_gpu_are_tested_too(bare, rocm_stand_in, on_rocm, environment, tmp_path, monkeypatch):
    """With words that stay on an XCD: one launch, so work-groups were found to be where they should."""
    copy = StandIn(tmp_path, like=rocm_stand_in)  # devices are asked once in a process, and remember what was found
    for name, value in copy.variables.items():
        environment(name, value)
    copy.units, copy.dies = 6, 2
    add_adapter(bare, "0000:c1:00.0", current_compute_partition="QPX", current_memory_partition="NPS1")
    add_node(bare, 2, 0xC1, 6, 2)
    monkeypatch.setattr(_self_test, "SPECS", dict(list(_self_test.SPECS.items())[-1:]))
    works, text = ask(bare)
    assert works, text
    assert "note   device 0: 6 of 76 units are active; 2 XCDs, by the driver's count" in text
    lines = re.findall(r"  ok     rocm, (bf16.*): agrees with the reference", text)
    assert [line.rpartition(", ")[2] for line in lines] == ["as most models are", "2 groups of units"]
    assert copy.launches == 2
    assert copy.complaints == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fault": "flip", "fault_store": 1234}, r"DEADLINE_EXCEEDED.*Unit \d waited in layer"),
        ({"units": 2, "break_set": 1}, r"INTERNAL.*could not run the kernel: launch: \w+ is not cleared"),
    ],
    ids=["hang", "driver"],
)
def test_gpus_that_do_not_work(bare, on_rocm, environment, change, message):
    environment("MONOKERNEL_TIMEOUT", "0.0006")
    for name, value in change.items():
        setattr(on_rocm, name, value)
    works, text = ask(bare)
    on_rocm.break_set = 0
    on_rocm.take_complaints()
    assert not works
    assert re.search(rf"  BROKEN rocm, .*: {message}", text), text
    assert re.search(r"  ok     cpu, .*: agrees with the reference", text)
    assert re.match(r"[12] of the things that are here do not work", text.splitlines()[-1])


@pytest.mark.parametrize(("units", "groups"), [(304, 8), (256, 8), (228, 6), (152, 4), (76, 2), (40, 8)])
def test_the_model_of_the_self_test_fits_into_groups(units, groups):
    spec = list(_self_test.SPECS.values())[-1]
    assert geometry(spec, Plan(platform="rocm", units=units, groups=groups)).mlp_groups == groups


def test_results_that_are_wrong(bare, monkeypatch):
    decode = _self_test._decode

    def wrong(spec, *where):
        result = decode(spec, *where)
        return dataclasses.replace(result, tokens=result.tokens + 1, log_probs=result.log_probs + 1)

    monkeypatch.setattr(_self_test, "_decode", wrong)
    works, text = ask(bare)
    assert not works
    assert re.search(r"BROKEN cpu, .*: request 0 has tokens .*where the reference has.*differ by 1 \(", text)


def test_a_compiler_that_is_missing(bare, on_rocm, environment):
    environment("MONOKERNEL_HIPRTC_LIBRARY", "/nowhere/libhiprtc.so")
    works, text = ask(bare, test=False)
    assert not works
    assert re.search(r"BROKEN run-time compiler: .*MONOKERNEL_HIPRTC_LIBRARY is /nowhere/libhiprtc\.so", text)


def test_gpus_without_a_driver(bare, environment):
    for name in ("MONOKERNEL_CUDA_LIBRARY", "MONOKERNEL_HIP_LIBRARY"):
        environment(name, None)
    add_adapter(bare, "0000:c1:00.0")
    add_adapter(bare, "0000:02:00.0", vendor="0x10de")
    works, text = ask(bare, test=False)
    assert not works
    assert re.search(
        r"AMD GPUs.*\n  ok     GPUs in this machine: 1.*\n  BROKEN /dev/kfd: is missing.*--device=/dev/kfd", text
    )
    assert re.search(r"BROKEN driver: .*libamdhip64\.so was not found\. Install ROCm", text)
    assert re.search(r"BROKEN driver: .*libcuda\.so was not found\. Install the NVIDIA driver", text)


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        (0o600, r"BROKEN /dev/kfd: this user may not open it, nor may any group \(-rw-------\): chmod 660, or the"),
        (0o660, r"BROKEN /dev/kfd: this user may not open it \(-rw-rw----, group \S+\): sudo usermod -aG \S+ USER, and "
                r"log in again; in a container docker run --group-add \d+"),
    ],
)  # fmt: skip
def test_a_device_file_that_this_user_may_not_open(bare, monkeypatch, mode, message):
    add_adapter(bare, "0000:c1:00.0")
    for name in ("kfd", "dri/renderD128"):
        (bare.dev / name).touch()
        (bare.dev / name).chmod(mode)
    monkeypatch.setattr(doctor.os, "access", lambda path, how: bare.dev not in Path(path).parents)
    works, text = ask(bare, test=False)
    assert not works
    assert re.search(message, text), text
    assert "BROKEN /dev/dri/renderD128: this user may not open it" in text


def test_all_that_is_missing_is_said_at_once(bare, environment, no_plugins):
    environment("MONOKERNEL_HIP_LIBRARY", None)
    add_adapter(bare, "0000:c1:00.0")
    _, text = ask(bare, test=False)
    for what in ("/dev/kfd: is missing", r"driver: .*Install ROCm 7", "JAX: has no rocm plugin.*jax-rocm7-pjrt=="):
        assert re.search(f"  BROKEN {what}", text), text


def test_a_plugin_without_a_gpu(bare, monkeypatch):
    """JAX says why at its first start only, by an exception that it logs."""
    version = importlib.metadata.version("jaxlib")
    monkeypatch.setattr(doctor, "_plugins", lambda: {"jax-rocm7-pjrt": version, "jax-rocm7-plugin": version})
    local_devices = jax.local_devices

    def devices(*arguments, **options):
        try:
            raise ValueError("No AMD GPUs were found")
        except ValueError:
            logging.getLogger("jax._src.xla_bridge").exception("Exception when calling xla_rocm7.initialize()")
        return local_devices(*arguments, **options)

    monkeypatch.setattr(doctor.jax, "local_devices", devices)
    works, text = ask(bare, test=False)
    assert works
    why = "Exception when calling xla_rocm7.initialize(): No AMD GPUs were found"
    assert f"note   JAX: its rocm plugin is installed, and this machine has no GPU for it: {why}\n" in text


def test_devices_that_a_variable_hides(bare, rocm_stand_in, environment, tmp_path):
    other = StandIn(tmp_path, like=rocm_stand_in)
    other.devices = 0
    environment("MONOKERNEL_HIP_LIBRARY", other.variables["MONOKERNEL_HIP_LIBRARY"])
    environment("HIP_VISIBLE_DEVICES", "7")
    add_adapter(bare, "0000:c1:00.0")
    works, text = ask(bare, test=False)
    assert not works
    assert "BROKEN devices: the driver has none; the system has 1. Are they hidden by HIP_VISIBLE_DEVICES?" in text


def test_a_device_that_is_not_supported_is_no_fault(bare, rocm_stand_in, environment, tmp_path, no_plugins):
    other = StandIn(tmp_path, like=rocm_stand_in)
    other.arch = "gfx1100"
    environment("MONOKERNEL_HIP_LIBRARY", other.variables["MONOKERNEL_HIP_LIBRARY"])
    works, text = ask(bare, test=False)
    assert works
    assert re.search(r"note   device 0: .*not supported.*\n.*does not run on .*\(gfx1100\); supported are", text)
    assert "note   JAX: has no rocm plugin; it would need an AMD Instinct GPU" in text
    assert re.match(r"Everything that is here works\. GPUs that the kernel is not for: \d", text.splitlines()[-1])


def test_an_old_gpu_beside_one_that_is_not(bare, make_fake, no_plugins):
    fake = make_fake("cuda")
    fake.old_device = 0
    works, text = ask(bare, test=False)
    assert re.search(r"note   device 0: Fake GPU, not supported, 132 multiprocessors, ", text)
    assert re.search(r"ok     device 1: Fake GPU, sm_90, 132 multiprocessors, ", text)
    assert not works
    assert "BROKEN JAX: has no cuda plugin, so nothing runs on these GPUs: pip install 'jax[cuda13]==" in text


def test_a_gpu_that_jax_has_no_plugin_for(bare, rocm_stand_in, no_plugins):
    works, text = ask(bare, test=False)
    assert not works
    version = importlib.metadata.version("jaxlib")
    needed = f"pip install jax-rocm7-plugin=={version} jax-rocm7-pjrt=={version}"
    assert f"BROKEN JAX: has no rocm plugin, so nothing runs on these GPUs: {needed}" in text
    assert text.splitlines()[-1] == "1 of the things that are here do not work."


@pytest.mark.parametrize(
    ("suffix", "fits"), [("", True), (".post1", True), ("+rocm7", True), (".1", False), ("1", False)]
)
def test_plugins_of_another_version(bare, monkeypatch, suffix, fits):
    version = importlib.metadata.version("jaxlib") + suffix
    monkeypatch.setattr(doctor, "_plugins", lambda: {"jax-rocm7-pjrt": version, "jax-rocm7-plugin": version})
    text = "\n".join(line.text for line in doctor._software())
    assert f"jax-rocm7-pjrt {version}" in text
    assert ("are of different versions" in text) != fits


def test_names_are_left_out(monkeypatch):
    monkeypatch.setenv("HOME", "/srv/people/alice")
    monkeypatch.setattr(doctor.getpass, "getuser", lambda: "alice")
    monkeypatch.setattr(doctor.socket, "gethostname", lambda: "node-17")
    text = "/srv/people/alice/x.so:/home/bob/lib /srv/people/alice2 by alice on node-17; /opt/rocm/lib/malice.so"
    assert redacted(text) == "~/x.so:~/lib /srv/people/alice2 by USER on HOST; /opt/rocm/lib/malice.so"
