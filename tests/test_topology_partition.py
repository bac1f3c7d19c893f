"""How an AMD GPU is divided: what Linux says of it, and what that makes of a device that was not measured."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from rocm_stand_in import StandIn
from test_topology import MODES, made

from jax_monokernel import topology as tp
from jax_monokernel.topology import store
from jax_monokernel.topology.discover import _check_device
from jax_monokernel.topology.partition import Partition, partition_of

AMD = [(name, mode) for name, mode in MODES if mode]
ARCH = {name: tp.part(name).arch for name, _ in AMD}


class Sysfs:
    """Files of a machine that does not exist."""

    def __init__(self, root: Path) -> None:
        self.root, self.nodes = root, 0

    def gpu(self, bus: str, compute: str | None = None, memory: str | None = None) -> None:
        folder = self.root / "bus" / "pci" / "devices" / bus
        folder.mkdir(parents=True)
        for kind, text in (("compute", compute), ("memory", memory)):
            if text is not None:
                (folder / f"current_{kind}_partition").write_text(text + "\n")

    def node(self, *, units: int, location: int, domain: int = 0, xcds: int | None = 1) -> None:
        """A line of each kind that a node of an MI300X has, as far as they matter. CPUs are nodes too."""
        folder = self.root / "class" / "kfd" / "kfd" / "topology" / "nodes" / str(self.nodes)
        folder.mkdir(parents=True)
        lines = {"cpu_cores_count": 0 if units else 96, "simd_count": units * 4, "wave_front_size": 64 if units else 0}
        lines |= {"array_count": 32, "simd_per_cu": 4 if units else 0, "vendor_id": 4098, "location_id": location}
        lines |= {"domain": domain, "unique_id": 11673270660693242239, "gfx_target_version": 90402}
        if xcds is not None:
            lines["num_xcc"] = xcds
        (folder / "properties").write_text("".join(f"{key} {value}\n" for key, value in lines.items()))
        self.nodes += 1


@pytest.fixture
def sysfs(tmp_path) -> Sysfs:
    made = Sysfs(tmp_path)
    made.node(units=0, location=0, xcds=0)
    return made


def fill(sysfs: Sysfs, name: str, mode: str, bus: int = 0xC1) -> tp.Topology:
    """A GPU in a mode, with all its partitions; what one of them should be."""
    want = made(name, mode)
    sysfs.gpu(f"0000:{bus:02x}:00.0", *mode.split("/"))
    for partition in range(tp.part(name).units // want.units):
        sysfs.node(units=want.units, location=bus << 8 | partition << 28, xcds=len(want.groups("xcd")))
    return want


@pytest.mark.parametrize(("name", "mode"), AMD, ids=[f"{n}-{m}".replace("/", "_") for n, m in AMD])
def test_every_mode_is_recognised(sysfs, name, mode):
    want = fill(sysfs, name, mode)
    found = partition_of("0000:C1:00.0", sysfs.root)
    assert found == Partition(*mode.split("/"), len(want.groups("xcd")), want.units)
    assert found.mode == mode
    got = tp.part_for(f"AMD Instinct {name}", ARCH[name], want.units, "rocm", found)
    assert dataclasses.replace(got, name="", root=got.root) == dataclasses.replace(want, name="", root=got.root)
    assert got.root.children == want.root.children
    assert got.notes == ()


def test_gpus_side_by_side(sysfs):
    fill(sysfs, "MI300X", "CPX/NPS4", 0xC1)
    fill(sysfs, "MI300X", "SPX/NPS1", 0xC2)
    sysfs.node(units=304, location=0xC1 << 8, domain=1, xcds=8)
    assert partition_of("0000:c1:00.0", sysfs.root) == Partition("CPX", "NPS4", 1, 38)
    assert partition_of("0000:c2:00.0", sysfs.root) == Partition("SPX", "NPS1", 8, 304)
    assert partition_of("0001:c1:00.0", sysfs.root) == Partition("", "", 8, 304)
    assert partition_of("0000:c3:00.0", sysfs.root) == Partition()


def test_a_partition_in_the_place_of_the_function(sysfs):
    """Some versions of Linux and HIP number partitions there."""
    sysfs.gpu("0000:c1:00.0", "CPX", "NPS1")
    for partition in range(8):
        sysfs.node(units=38, location=0xC1 << 8 | partition)
    for partition in range(8):
        assert partition_of(f"0000:c1:00.{partition}", sysfs.root) == Partition("CPX", "NPS1", 1, 38)


@pytest.mark.parametrize(
    ("bus", "compute", "memory", "want"),
    [
        ("0000:c1:00.0", "UNKNOWN", "UNKNOWN", Partition()),
        ("0000:c1:00.0", "", "NPS1", Partition("", "NPS1")),
        ("0000:c1:00.0", "spx", "nps1", Partition("SPX", "NPS1")),
        ("not an address", "SPX", "NPS1", Partition()),
        ("../../c1", "SPX", "NPS1", Partition()),
    ],
)
def test_what_is_not_a_mode(sysfs, bus, compute, memory, want):
    sysfs.gpu("0000:c1:00.0", compute, memory)
    assert partition_of(bus, sysfs.root) == want


def test_nodes_that_say_nothing(sysfs):
    sysfs.node(units=38, location=0xC1 << 8, xcds=None)  # Linux before 6.5
    assert partition_of("0000:c1:00.0", sysfs.root) == Partition(units=38)
    sysfs.node(units=37, location=0xC1 << 8)  # partitions that are not alike
    assert partition_of("0000:c1:00.0", sysfs.root) == Partition()
    (path,) = sysfs.root.glob("class/kfd/kfd/topology/nodes/0/properties")
    path.write_bytes(b"\xff\xfe simd_count\n")
    assert partition_of("0000:c1:00.0", sysfs.root) == Partition()


def of(name: str, units: int, *partition: str | int) -> tp.Topology:
    return tp.part_for(f"AMD Instinct {name} VF", ARCH[name], units, "rocm", Partition(*partition))


@pytest.mark.parametrize(
    ("name", "units", "partition", "mode", "xcds", "note"),
    [
        # A virtual function with fewer units, as the driver describes it, and as only its units do.
        ("MI300X", 256, ("SPX", "NPS1", 8, 256), "SPX/NPS1", 8, "256 of 304 units are active; 8 XCDs, by the driver"),
        ("MI300X", 256, (), "SPX/NPS1", 8, "256 of 304 units are active; XCDs are taken to have"),
        ("MI300X", 304, ("SPX", "NPS1"), "SPX/NPS1", 8, None),
        # Not what the number of units alone says: 4 XCDs of 32 units, and 128 of 304 units on 8.
        ("MI300X", 128, ("DPX", "NPS2", 4, 128), "DPX/NPS2", 4, "128 of 152 units are active"),
        ("MI300X", 128, ("", "", 4, 128), "DPX/NPS1", 4, "memory partition is not known"),
        ("MI300X", 128, (), "SPX/NPS1", 8, "128 of 304 units"),
        ("MI300X", 36, ("CPX", "NPS4", 1), "CPX/NPS4", 1, "36 of 38 units are active"),
        # A count of XCDs that no mode gives.
        ("MI300X", 266, ("", "", 7), "SPX/NPS1", 7, "266 of 304 units are active; 7 XCDs"),
        ("MI300X", 300, ("SPX", "NPS1", 8), "", 0, "a MI300X has 304 units"),
        ("MI300X", 38, ("CPX", "NPS2"), "CPX/NPS2", 1, None),  # as virtual functions may have it
    ],
)
def test_devices_that_are_not_the_whole_part(name, units, partition, mode, xcds, note):
    found = of(name, units, *partition)
    assert (found.units, found.mode, len(found.groups("xcd"))) == (units, mode, xcds)
    assert sorted(found.root.all_units()) == list(range(units))
    assert (not found.notes) if note is None else any(note in text for text in found.notes)
    assert ("stream_device_gb_s" in found.constants) == (units == 304)


@pytest.mark.parametrize(
    ("units", "partition", "note"),
    [
        (304, ("CPX", "NPS1"), "CPX gives a device of a MI300X at most 38 compute units, and it has 304"),
        (304, ("SPX", "NPS1", 8, 256), "KFD counts 256 compute units and HIP 304"),
        (304, ("SPX", "NPS1", 4), "SPX gives a device 8 XCDs, and KFD counts 4"),
        (304, ("TPX", "NPS1"), "no compute partition mode TPX"),
        (304, ("XPX", "NPS1"), "no compute partition mode XPX"),
        (304, ("SPX", "NPS8"), "no memory partition mode NPS8"),
        (304, ("", "", 9), "9 XCDs are not those of a MI300X"),
    ],
)
def test_units_have_the_last_word(units, partition, note):
    found = of("MI300X", units, *partition)
    assert dataclasses.replace(found, notes=(), name="") == dataclasses.replace(of("MI300X", units), name="")
    (said,) = found.notes
    assert note in said
    assert said.endswith("what the system says of partitions is not used")


# ---- Devices that are here ----


def test_discovering_a_mode(rocm_stand_in, environment, tmp_path, sysfs):
    copy = StandIn(tmp_path, like=rocm_stand_in)  # devices are asked once in a process
    for name, value in copy.variables.items():
        environment(name, value)
    copy.units = 152
    sysfs.gpu("0000:c1:00.0", "DPX", "NPS2")
    found = tp.discover("rocm", sysfs=sysfs.root).topology
    assert (found.mode, found.notes, len(found.domains)) == ("DPX/NPS2", (), 2)
    found = tp.discover("rocm", 1, sysfs=sysfs.root).topology  # of which the system says nothing
    assert (found.mode, len(found.domains)) == ("DPX/NPS1", 4)
    assert found.notes == ("the memory partition is not known, NPS1 is assumed",)


def test_a_device_that_is_too_old_does_not_hide_the_others(make_fake):
    fake = make_fake("cuda")
    fake.devices, fake.old_device = 3, 0
    here = [(ordinal, described["bus"]) for platform, ordinal, described in tp.gpus() if platform == "cuda"]
    assert here == [(1, "0000:c2:00.0"), (2, "0000:c3:00.0")]
    assert tp.discover("cuda").topology.arch == "sm_90"
    assert tp.discover("cuda", 2).topology.arch == "sm_90"
    with pytest.raises(ValueError, match="no cuda device 3 here; 2 were found"):
        tp.discover("cuda", 3)
    fake = make_fake("cuda")
    fake.devices, fake.old_device = 1, 0
    with pytest.raises(ValueError, match=r"no cuda device 0 here; 0 were found\. .*does not run on Fake GPU \(sm_70\)"):
        tp.discover("cuda")


def test_a_measurement_is_of_one_chip_in_one_mode(make_fake, sysfs):
    """Which units are near which memory differs from chip to chip, and a cache folder may be on several machines."""

    def fake_of(uuid: int):
        fake = make_fake("rocm")
        fake.units, fake.most_bytes, fake.uuid = 4, 17 << 20, uuid

    def known(device: int = 0) -> str | None:
        found = tp.discover("rocm", device, sysfs=sysfs.root)
        assert found.measurement is None or found.topology.mode == found.measurement.mode
        return None if found.measurement is None else found.measurement.device_id

    fake_of(17)
    said: list[str] = []
    tp.measure_device("rocm", sysfs=sysfs.root, report=said.append)
    assert re.search(r"topology-fake-gpu-4-13000-(11){16}\.json$", said[-1])
    assert (known(0), known(1)) == ("11" * 16, None)
    measured = tp.discover("rocm", sysfs=sysfs.root).measurement
    _check_device(measured, SimpleNamespace(local_hardware_id=0))
    with pytest.raises(ValueError, match=r"on device 1; another Fake GPU was measured: discover\(device=1\)"):
        _check_device(measured, SimpleNamespace(local_hardware_id=1))
    fake_of(40)
    assert known() is None
    fake_of(17)
    assert known() == "11" * 16
    sysfs.gpu("0000:c1:00.0", "DPX", "NPS1")
    assert known() is None
    tp.measure_device("rocm", sysfs=sysfs.root)
    assert known() == "11" * 16
    (sysfs.root / "bus/pci/devices/0000:c1:00.0/current_memory_partition").write_text("NPS2")
    assert known() is None
    fake_of(0)  # a driver that gives it no UUID: its address says which it is
    assert known() is None
    assert store.save(dataclasses.replace(measured, device_id="0000:c1:00.0", mode="DPX/NPS2")) is not None
    assert known() == "0000:c1:00.0"
