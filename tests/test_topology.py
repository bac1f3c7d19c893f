"""The model of a device, known parts, the CPUs of a machine, and what is kept on disk."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
from pathlib import Path

import pytest
from simulated_gpu import SimulatedGpu

from jax_monokernel import _native
from jax_monokernel import topology as tp
from jax_monokernel.cli import main
from jax_monokernel.plan import available_cpus
from jax_monokernel.topology import measure_host, store
from jax_monokernel.topology.host import parse_cpu_list
from jax_monokernel.topology.probe import Probe

# ---- Parts ----

MODES = [(name, mode) for name in tp.part_names() for mode in tp.modes(name) or [""]]


def made(name: str, mode: str) -> tp.Topology:
    compute, _, memory = mode.partition("/")
    return tp.part(name, compute=compute or "SPX", memory=memory or "NPS1")


@pytest.mark.parametrize(("name", "mode"), MODES, ids=[f"{n}-{m}".replace("/", "_") for n, m in MODES])
def test_every_mode_of_every_part(name, mode):
    found = made(name, mode)
    units = found.root.all_units()
    assert sorted(units) == list(range(found.units))
    assert set(found.near_domain()) == set(units)
    assert found.mode == mode
    assert all(c.basis == "published" and c.source for c in found.constants.values())
    if len(found.domains) > 1:
        assert found.interleave.granule_bytes == 4096
        assert len(set(found.near_domain().values())) == len(found.groups("iod"))
    whole = made(name, tp.modes(name)[0] if mode else "")
    parts = {"SPX": 1, "DPX": 2, "TPX": 3, "QPX": 4, "CPX": len(whole.groups("xcd"))}
    if mode:
        compute, memory = mode.split("/")
        assert found.units * parts[compute] == whole.units
        total = sum(d.bytes for d in whole.domains)
        assert sum(d.bytes for d in found.domains) * int(memory[3:]) == total
        assert "stream_device_gb_s" not in found.constants or compute == "SPX"


def test_modes():
    """Those of Linux's amdgpu driver, which has another rule for gfx950."""
    of_mi300x = ["SPX/NPS1", "DPX/NPS1", "DPX/NPS2", "QPX/NPS1", "QPX/NPS4", "CPX/NPS1", "CPX/NPS4"]
    of_mi355x = ["SPX/NPS1", "DPX/NPS1", "DPX/NPS2", "QPX/NPS1", "QPX/NPS2", "CPX/NPS1", "CPX/NPS2"]
    assert tp.modes("MI300X") == tp.modes("MI325X") == of_mi300x
    assert tp.modes("MI300A") == ["SPX/NPS1", "TPX/NPS1", "TPX/NPS4", "CPX/NPS1", "CPX/NPS4"]
    assert tp.modes("MI350X") == tp.modes("MI355X") == of_mi355x
    assert tp.modes("H200") == []


@pytest.mark.parametrize(
    ("name", "groups", "units", "domains"),
    [("MI300X", 8, 304, 4), ("MI325X", 8, 304, 4), ("MI300A", 6, 228, 4), ("MI350X", 8, 256, 2), ("MI355X", 8, 256, 2)],
)
def test_sizes(name, groups, units, domains):
    found = tp.part(name)
    assert len(found.groups()) == groups
    assert {len(g.units) for g in found.groups()} == {units // groups}
    assert (found.units, len(found.domains)) == (units, domains)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "MI999"}, r"MI999 is not a part that is known; these are: MI300X, .*B200"),
        ({"name": "MI300X", "compute": "TPX"}, r"MI300X has no mode TPX/NPS1; its modes are SPX/NPS1, DPX/NPS1"),
        ({"name": "MI300X", "memory": "NPS4"}, r"no mode SPX/NPS4"),
        ({"name": "MI300A", "compute": "QPX"}, r"no mode QPX/NPS1"),
        ({"name": "H200", "compute": "CPX"}, r"H200 has no partitions"),
    ],
)
def test_wrong_parts(arguments, message):
    with pytest.raises(ValueError, match=message):
        tp.part(**arguments)


@pytest.mark.parametrize(
    ("name", "arch", "units", "groups", "note"),
    [
        ("AMD Instinct MI300X", "gfx942", 304, 8, None),
        ("AMD Instinct MI300X VF", "gfx942", 256, 8, "256 of 304 units are active"),
        ("AMD Instinct MI300X VF", "gfx942", 38, 1, "memory partition is not known"),
        ("AMD Instinct MI300X", "gfx942", 300, 0, "has 304 units"),
        ("AMD Instinct MI355X", "gfx950", 64, 2, "memory partition is not known"),
        ("Strange GPU", "gfx942", 80, 0, "nothing is known"),
        ("AMD Instinct MI300X", "gfx950", 304, 0, "nothing is known"),
    ],
)
def test_devices_that_are_not_the_whole_part(name, arch, units, groups, note):
    found = tp.part_for(name, arch, units, "rocm")
    assert found.units == units
    assert len(found.groups("xcd")) == groups
    assert note is None or any(note in n for n in found.notes)
    if units != 304:
        assert "stream_device_gb_s" not in found.constants


@pytest.mark.parametrize(("name", "units"), [("NVIDIA H200", 132), ("NVIDIA H100 PCIe", 114), ("NVIDIA B200", 148)])
def test_nvidia_devices(name, units):
    arch = "sm_100" if "B200" in name else "sm_90"
    found = tp.part_for(name, arch, units, "cuda")
    assert found.units == units
    assert found.name == name
    assert "memory_peak_gb_s" in found.constants
    assert "memory_peak_gb_s" not in tp.part_for(name, arch, units - 32, "cuda").constants
    assert any("measure" in n for n in found.notes)


# ---- The model ----


@pytest.mark.parametrize("name", tp.part_names())
def test_json(name):
    found = tp.part(name)
    assert tp.Topology.from_json(json.loads(json.dumps(found.to_json()))) == found


@pytest.mark.parametrize(
    "data", [{}, {"root": 3}, {**tp.part("H200").to_json(), "root": {}}], ids=["empty", "root", "part"]
)
def test_wrong_json(data):
    with pytest.raises(ValueError, match="no topology of this version"):
        tp.Topology.from_json(data)


def test_what_a_topology_must_be():
    good = tp.part("MI300X")
    with pytest.raises(ValueError, match="a unit in two groups"):
        dataclasses.replace(good, root=tp.Group("device", "x", (), (good.root, good.root)))
    with pytest.raises(ValueError, match="near a memory domain that AMD Instinct MI300X does not have"):
        dataclasses.replace(good, domains=good.domains[:2])
    with pytest.raises(ValueError, match="not speed_of_light"):
        dataclasses.replace(good, constants={"speed_of_light": tp.Constant(1, "published", "x")})
    with pytest.raises(ValueError, match="where it comes from"):
        tp.Constant(1.0, "measured", "")
    with pytest.raises(ValueError, match="units belong to the innermost group"):
        tp.Group("device", "x", (1,), (tp.Group("xcd", "y"),))


def test_near_domains_are_those_of_the_group_around():
    inner = tp.Group("xcd", "a", (0, 1))
    root = tp.Group("device", "d", (), (tp.Group("iod", "i", (), (inner,), (1,)), tp.Group("xcd", "b", (2,))))
    found = dataclasses.replace(tp.part("MI300X"), root=root)
    assert found.near_domain() == {0: 1, 1: 1, 2: 0}


@pytest.mark.parametrize("name", ["MI300A", "H200"])
def test_text(name):
    found = tp.part(name)
    text = tp.tree(found)
    for _, group in found.root.walk():
        assert group is found.root or f"{group.name}: {len(group.all_units())} units" in text
    for constant, value in found.constants.items():
        assert re.search(rf"^{constant} +{value.value:.6g} +published: ", text, re.MULTILINE)


# ---- CPUs ----


def write(path: Path, text: str | int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


@pytest.fixture
def sysfs(tmp_path) -> Path:
    """Two packages, two nodes each, two L3 caches a node, two cores with two threads a cache: 32 CPUs."""
    for cpu in range(32):
        core = cpu % 16
        base = tmp_path / "cpu" / f"cpu{cpu}"
        write(base / "topology" / "physical_package_id", core // 8)
        write(base / "topology" / "thread_siblings_list", f"{core},{core + 16}")
        for index, (level, kind, shared) in enumerate(
            [(1, "Data", 1), (1, "Instruction", 1), (2, "Unified", 1), (3, "Unified", 2)]
        ):
            first = core // shared * shared
            ranges = ",".join(f"{a}-{a + shared - 1}" for a in (first, first + 16))
            write(base / "cache" / f"index{index}" / "level", level)
            write(base / "cache" / f"index{index}" / "type", kind)
            write(base / "cache" / f"index{index}" / "size", "32768K")
            write(base / "cache" / f"index{index}" / "shared_cpu_list", ranges)
    for node in range(4):
        write(
            tmp_path / "node" / f"node{node}" / "cpulist", f"{node * 4}-{node * 4 + 3},{node * 4 + 16}-{node * 4 + 19}"
        )
        write(tmp_path / "node" / f"node{node}" / "meminfo", f"Node {node} MemTotal:       {(node + 1) * 1024} kB")
        write(tmp_path / "node" / f"node{node}" / "distance", " ".join("10" if n == node else "20" for n in range(4)))
    return tmp_path


def test_a_large_host(sysfs):
    found = tp.host_topology(sysfs, range(32))
    assert [len(found.groups(kind)) for kind in ("package", "numa_node", "l3", "core")] == [2, 4, 8, 16]
    assert sorted(found.root.all_units()) == list(range(32))
    assert {g.units for g in found.groups("core")} == {(c, c + 16) for c in range(16)}
    assert found.near_domain()[21] == 1
    assert [d.bytes for d in found.domains] == [(n + 1) * 1024 * 1024 for n in range(4)]
    assert "10 is local: 0: 10 20 20 20;" in found.notes[0]


def test_a_part_of_a_host(sysfs):
    found = tp.host_topology(sysfs, [5, 21, 6, 12])
    assert [len(found.groups(kind)) for kind in ("package", "numa_node", "l3", "core")] == [2, 2, 3, 3]
    assert sorted(found.root.all_units()) == [5, 6, 12, 21]
    assert [d.name for d in found.domains] == ["node 1", "node 3"]
    assert found.near_domain() == {5: 0, 6: 0, 12: 1, 21: 0}


def test_a_host_that_says_nothing(tmp_path):
    found = tp.host_topology(tmp_path, [0, 3])
    assert found.root.all_units() == (0, 3)
    assert (len(found.domains), len(found.groups("l3"))) == (1, 1)
    with pytest.raises(ValueError, match="at least one CPU"):
        tp.host_topology(tmp_path, [])


def test_this_host(environment, tmp_path):
    environment("MONOKERNEL_CACHE_DIR", str(tmp_path))
    found = tp.host_topology()
    assert found.units >= available_cpus()
    assert tp.discover("cpu").topology == found


def test_measuring_this_host(monkeypatch, capsys, environment, tmp_path):
    environment("MONOKERNEL_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(measure_host, "_BYTES_EACH", 1 << 20)
    before = os.sched_getaffinity(0)
    code, out, err = command(monkeypatch, capsys, "--platform", "cpu", "--measure")
    assert code == 0
    assert re.search(r"saved as .*/topology-.*-cpu-0-[0-9a-f]{8}\.json$", err.strip())
    assert os.sched_getaffinity(0) == before
    found = tp.discover("cpu").topology
    assert {c.basis for c in found.constants.values()} == {"measured"}
    assert found.root == tp.host_topology().root
    assert {"stream_unit_gb_s", "stream_group_gb_s", "stream_device_gb_s"} <= set(found.constants)
    if max(len([c for _, c in g.walk() if c.kind == "core"]) for g in found.groups()) > 1:
        assert 0.001 < found.constants["hand_off_in_group_us"].value < 1000
    for name, constant in found.constants.items():
        assert re.search(rf"^{name} +{constant.value:.6g} +measured: ", out, re.MULTILINE)
    (path,) = tmp_path.iterdir()
    for text in ("", "[]", '{"version": 1}', '{"version": 1, "constants": {"hand_off_in_group_us": "?", "x": 1}}'):
        path.write_text(text)
        assert tp.discover("cpu").topology == tp.host_topology()


def test_pairs_and_groups_that_are_measured(sysfs, monkeypatch):
    """Cores of one L3, and of two; one thread of a core; CPUs that cannot be used are left out."""
    asked = []

    def ping_pong(cpu, other, rounds, batches):
        asked.append((cpu, other))
        if 3 in (cpu, other):
            raise RuntimeError("not here")
        return [50.0, 40.0 if cpu // 2 == other // 2 else 90.0]

    on: list[list[int]] = []
    monkeypatch.setattr(measure_host._native, "ping_pong", ping_pong)
    monkeypatch.setattr(measure_host, "_rate_gb_s", lambda cpus: on.append(list(cpus)) or 10.0 * len(cpus))
    found = measure_host.measure_host(tp.host_topology(sysfs, range(32)))
    values = {name: constant.value for name, constant in found.constants.items()}
    assert values.pop("hand_off_in_group_us") == pytest.approx(0.04)
    assert values.pop("hand_off_across_groups_us") == pytest.approx(0.05)
    assert values == {"stream_unit_gb_s": 10, "stream_group_gb_s": 20, "stream_device_gb_s": 160}
    assert on == [[0], [0, 1], list(range(16))]
    assert {pair for pair in asked if pair[0] // 2 == pair[1] // 2} == {(c, c + 1) for c in range(0, 16, 2)}
    assert all(max(pair) < 16 for pair in asked)


@pytest.mark.parametrize("arguments", [(0, 0, 10, 1), (-1, 1, 10, 1), (0, 1, 0, 1), (0, 1, 10, 0), (0, 1 << 20, 10, 1)])
def test_pairs_that_cannot_be(arguments):
    with pytest.raises(ValueError, match="ping_pong needs two CPUs"):
        _native.ping_pong(*arguments)


def test_a_cpu_that_is_not_there():
    with pytest.raises(RuntimeError, match="may not run on CPU 0 or 1023"):
        _native.ping_pong(0, 1023, 10, 1)


@pytest.mark.parametrize(("text", "cpus"), [("", set()), ("3", {3}), ("0-2,5,7-8\n", {0, 1, 2, 5, 7, 8})])
def test_cpu_lists(text, cpus):
    assert parse_cpu_list(text) == cpus


# ---- On disk ----


def test_a_measurement_is_kept(environment, tmp_path):
    environment("MONOKERNEL_CACHE_DIR", str(tmp_path))
    device = SimulatedGpu()
    found = tp.measure(device, "cuda")
    path = store.save(found)
    assert path is not None
    assert path.parent == tmp_path
    again = store.load(device.name, device.units, device.driver_version)
    assert again is not None
    assert tp.topology_of(again).root == tp.topology_of(found).root
    assert tp.topology_of(again).constants.keys() == tp.topology_of(found).constants.keys()
    assert again.places == found.places
    assert (again.homes == found.homes[: len(again.homes)]).all()
    assert store.load(device.name, device.units, device.driver_version + 1) is None
    assert store.load(device.name, device.units - 1, device.driver_version) is None
    for text in ("", "{", "[]", '{"version": 0}', '{"version": 1, "measurement": {"places": [[1]]}}'):
        path.write_text(text)
        assert store.load(device.name, device.units, device.driver_version) is None


def test_a_folder_that_cannot_be_written(environment, tmp_path):
    (tmp_path / "file").write_text("")
    environment("MONOKERNEL_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert store.save(tp.measure(SimulatedGpu(), "cuda")) is None


# ---- The command ----


def command(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["jax-monokernel", "topology", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    output = capsys.readouterr()
    return exit_.value.code or 0, output.out, output.err


def test_command(monkeypatch, capsys):
    code, out, err = command(monkeypatch, capsys, "--part", "mi300a/tpx/nps4")
    assert (code, err) == (0, "")
    assert out.startswith("AMD Instinct MI300A (rocm, gfx942, TPX/NPS4): 76 units\n")
    code, out, _ = command(monkeypatch, capsys, "--platform", "cpu", "--model", "small")
    assert code == 0
    assert "core" in out
    assert "placement of small's pages: pages stay where they are: all memory is equally far" in out or "NUMA" in out


def test_command_shows_what_was_recorded(monkeypatch, capsys, tmp_path):
    (file, *_) = (Path(__file__).parents[1] / "benchmarks" / "results" / "topology").glob("h200-*.json.gz")
    code, out, err = command(monkeypatch, capsys, "--recorded", str(file), "--pictures", str(tmp_path))
    assert (code, err) == (0, "")
    assert out.startswith("NVIDIA H200 (cuda, sm_90): 132 units\n├─ L2 half 0: 66 units")
    assert {path.name for path in tmp_path.iterdir()} == {"groups.png", "latency.png", "homes.png"}


def test_command_keeps_what_was_measured_before_a_failure(monkeypatch, capsys, make_fake, tmp_path):
    fake = make_fake("cuda")
    fake.units, fake.most_bytes = 4, 17 << 20

    def fails(*_, **__):
        raise tp.ProbeError("reading memory took longer than 4.0 seconds")

    file = tmp_path / "found.json.gz"
    with monkeypatch.context() as patch:
        patch.setattr(Probe, "read", fails)
        code, out, err = command(patch, capsys, "--platform", "cuda", "--measure", "--output", str(file))
    assert code == 2
    assert "not measured: reads from near and far memory: reading memory took longer than 4.0 seconds" in out
    assert "hand_off" in out
    assert err.strip().endswith("error: not all was measured: reading memory took longer than 4.0 seconds")
    assert "not kept, as something is missing" in err
    assert (tp.recorded(file).latency[0, 1:] > 0).all()
    assert tp.discover("cuda").measurement is None
    code, _, err = command(monkeypatch, capsys, "--platform", "cuda", "--measure")
    assert (code, "saved as" in err) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--part", "MI9"], "MI9 is not a part"),
        (["--part", "MI300X", "--groups", "8"], "give --model and --pictures too"),
        (["--part", "MI300X", "--groups", "7", "--model", "small", "--pictures", "x"], "for 304 units on rocm"),
        (["--part", "H200", "--measure"], "leave --measure"),
        (["--recorded", "x.json", "--measure"], "leave --measure, --part and --platform out"),
        (["--recorded", "nowhere.json"], "nowhere.json"),
        (["--output", "x.json"], "give --measure too"),
        (["--output", "x.txt", "--measure"], "ends with .json or .json.gz"),
        (["--platform", "tpu"], "expected cpu, cuda or rocm"),
        (["--platform", "cuda", "--device", "99"], "no cuda device 99"),
        (["--part", "H200", "--model", "/nowhere"], "/nowhere"),
        (["--part", "H200", "--pictures", "x", "--format", "gif"], "expected png or svg"),
    ],
)
def test_command_errors(monkeypatch, capsys, arguments, message, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, _, err = command(monkeypatch, capsys, *arguments)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
