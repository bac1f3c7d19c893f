"""The topology probe: its device code, its launches on a stand-in for drivers, and a simulated device."""

from __future__ import annotations

import re
import sys

import amd_code
import numpy as np
import pytest
from gpu_fakes import PLATFORMS
from simulated_gpu import SimulatedGpu
from test_gpu_build import nvrtc_version
from test_topology_evaluate import same_partition

from jax_monokernel import _native
from jax_monokernel import topology as tp
from jax_monokernel.topology import probe as probe_module
from jax_monokernel.topology import store
from jax_monokernel.topology.measure import homes_of_pages
from jax_monokernel.topology.placement import report
from jax_monokernel.topology.probe import Probe, places

# ---- A simulated device ----

MI300X = {
    "platform": "rocm",
    "domain_of": (0, 0, 1, 1, 2, 2, 3, 3),
    "masks": (0b1000011, 0b10100),
    "rotate": True,
}
H200 = {"group_of": tuple(i // 18 for i in range(132)), "domain_of": (0, 1, 0, 1, 1, 0, 1, 0)}
DEVICES = {
    "h200": H200,
    "h200_slices": H200 | {"slice_ns": 12.0, "noise": 0.005},
    "h200_fine_interleave": H200 | {"granule": 512},
    "h200_only_first_looks": H200 | {"tells": ("first",)},
    "h200_coarse_interleave": H200 | {"granule": 1 << 16},
    "one_domain": {"group_of": tuple(i // 20 for i in range(60)), "domain_of": (0, 0, 0), "masks": ()},
    "one_domain_slices": {"group_of": tuple(i // 20 for i in range(60)), "domain_of": (0, 0, 0), "masks": ()}
    | {"slice_ns": 6.0, "noise": 0.005},
    "mi300x": MI300X | {"group_of": tuple(i % 8 for i in range(96))},
    "mi300x_cut_down": MI300X | {"group_of": (0,) * 12 + (1,) * 11 + (2,) * 12 + (3,) * 8 + (4, 5, 6, 7) * 9},
    "mi355x": MI300X
    | {"group_of": tuple(i % 8 for i in range(64)), "domain_of": (0,) * 4 + (1,) * 4, "masks": (0b101,)},
    "cpx": MI300X | {"group_of": (0,) * 12, "domain_of": (0,), "masks": ()},
    "qpx": MI300X | {"group_of": (0, 1) * 12, "domain_of": (0, 0), "masks": ()},
}


@pytest.fixture(scope="module", params=DEVICES)
def simulated(request):
    device = SimulatedGpu(**DEVICES[request.param])
    found = tp.measure(device, device.platform)
    assert not found.missing
    return device, found


def units_in_order(device: SimulatedGpu) -> np.ndarray:
    """The device's units as the probe numbers them: by place."""
    return np.argsort(device.place_numbers())


def test_groups_and_domains_are_found(simulated):
    device, found = simulated
    order = units_in_order(device)
    assert same_partition(found.groups, np.asarray(device.group_of)[order])
    assert same_partition(found.domains, device.domain(order))


def test_homes_are_found(simulated):
    device, found = simulated
    if len(set(device.domain_of)) == 1:
        assert (found.homes == 0).all()
        return
    assert found.granule_bytes == min(device.granule, 16384)
    true = device.home(np.arange(len(found.homes)) * found.block_bytes)
    known = found.homes >= 0
    assert known.mean() > 0.95
    counts = np.zeros((int(found.domains.max()) + 1,) * 2, int)
    np.add.at(counts, (found.homes[known], true[known]), 1)
    # All by flags; of looks a few meet a refresh of the memory in most passes.
    assert counts.max(axis=1).sum() >= (1 if device.platform == "rocm" else 0.998) * counts.sum()
    assert len(set(counts.argmax(axis=1))) == len(counts)
    # A domain's number is the same for units and for memory.
    order = units_in_order(device)
    for d in range(int(found.domains.max()) + 1):
        unit = order[int(np.argmax(found.domains == d))]
        assert device.domain(np.array([unit]))[0] == true[int(np.argmax(found.homes == d))]


def test_latencies_and_rates_are_found(simulated):
    device, found = simulated
    topology = tp.topology_of(found)
    if device.platform == "rocm":
        assert topology.constant("hand_off_in_group_us") == pytest.approx(device.in_xcd_ns / 1e3, rel=0.03)
    off = ~np.eye(device.units, dtype=bool)
    assert not np.isnan(found.latency[off]).any()
    ratio = np.median(found.latency_loaded[off] / found.latency[off])
    assert ratio == pytest.approx(4, rel=0.2)
    if len(set(device.group_of)) > 1:
        whole = np.bincount(device.group_of).max()
        rate = topology.constant("stream_group_gb_s")
        assert device.unit_gb_s * 0.99 < rate / whole < device.unit_gb_s * device.near_gain * 1.01
    else:
        assert "stream_group_gb_s" not in topology.constants
    if len(set(device.domain_of)) > 1:
        near, far = topology.constant("stream_device_near_gb_s"), topology.constant("stream_device_far_gb_s")
        assert near / far == pytest.approx(device.near_gain, rel=0.02)
        # NVIDIA's flags do not tell.
        apart = 2 * (device.far_ns - device.near_ns) if device.platform == "rocm" else 0
        assert found.far_ns - found.near_ns == pytest.approx(apart, rel=0.2, abs=5)
    else:
        assert "stream_device_near_gb_s" not in topology.constants


def test_the_topology_of_a_measurement(simulated):
    device, found = simulated
    topology = tp.topology_of(found)
    assert topology.units == device.units
    assert {c.basis for c in topology.constants.values()} == {"measured"}
    sizes = sorted(len(g.units) for g in topology.groups())
    assert sizes == sorted(np.bincount(device.group_of).tolist())
    if device.platform == "rocm":
        assert [g.name for g in topology.groups()] == [f"XCD {x}" for x in sorted(set(device.group_of))]
    assert tp.Topology.from_json(topology.to_json()) == topology


def test_what_looks_tell(simulated):
    device, found = simulated
    if device.platform == "rocm" or len(set(device.domain_of)) == 1:
        assert found.looked is None
        return
    looked = found.looked
    for kind, of in looked["kinds"].items():
        assert of["tells"] == (kind in device.tells)
        if of["tells"]:
            near, far = np.diag(of["ns"]).mean(), np.diag(np.fliplr(of["ns"])).mean()
            assert far - near == pytest.approx(device.far_ns - device.near_ns, rel=0.15)
            assert of["contrast_ns"] == pytest.approx(device.far_ns - device.near_ns, rel=0.15)
    shares = np.array(looked["page_shares"])
    assert len(shares) > 150
    assert looked["kind"] in device.tells
    expected = np.round(shares) if device.granule >= 4096 else 0.5
    assert (np.abs(shares - expected) < 0.05).all()
    said = "\n".join(tp.topology_of(found).notes)
    assert ("have one home each" if device.granule >= 4096 else "no home of their own") in said


def test_halves_whose_memory_no_look_tells():
    device = SimulatedGpu(**H200 | {"tells": ()})
    found = tp.measure(device, "cuda")
    assert found.looked["kind"] is None
    assert (found.domains == 0).all()
    assert (found.homes == 0).all()
    topology = tp.topology_of(found)
    assert [g.name for g in topology.root.children] == ["L2 half 0", "L2 half 1"]
    assert "no home of any memory was found" in topology.notes


def test_rates_are_of_all_memory():
    device = SimulatedGpu(**H200 | {"tells": ()})
    seen = []
    run = device.run
    device.run = lambda **work: (seen.append(work), run(**work))[1]
    tp.measure(device, "cuda")
    pages = device.memory_bytes // 4096
    for work in seen:
        if len(work["jobs"]) and len(work["blocks"]):  # hand-offs while all read
            assert work["block_shift"] == 12
            assert len(set(work["blocks"].tolist())) == pages
    device_rate = [w for w in seen if w["steps"] and (w["readings"][:, 1] > 0).all() and len(w["blocks"]) > pages * 0.9]
    assert len(device_rate) == 3
    assert all(w["block_shift"] == 12 for w in device_rate)
    # In order, and each time from elsewhere.
    starts = [w["blocks"][int(w["readings"][0][0])] for w in device_rate]
    assert len(set(starts)) == 3
    assert (np.diff(device_rate[0]["blocks"].astype(int)) > 0).all()


# ---- Launches that would last too long, and steps that fail ----


@pytest.fixture
def only_its_work(monkeypatch):
    """A launch may take what its work is said to take, and nothing beside that."""
    monkeypatch.setattr(probe_module, "START_S", 0.0)


def with_limits(device: SimulatedGpu) -> list[float]:
    limits, run = [], device.run
    device.run = lambda **work: (limits.append(work["limit_s"]), run(**work))[1]
    return limits


@pytest.mark.parametrize("name", ["h200", "h200_fine_interleave", "mi300x"])
def test_a_slow_device_is_measured_within_the_limits(only_its_work, name):
    device = SimulatedGpu(**DEVICES[name] | {"slow": 8.0})  # 12 us for a hand-off while all read
    limits = with_limits(device)
    assert not tp.measure(device, device.platform).missing
    assert max(limits) <= 2.0


def test_looks_are_cut_into_launches(only_its_work):
    device = SimulatedGpu(**H200 | {"slow": 20.0})
    probe, limits = Probe(device, "cuda"), with_limits(device)
    blocks = np.arange(30000) % 8192
    times = probe.look([blocks, blocks[:7000], *[blocks[:0]] * 130], shift=12, kinds=3, touch=2048)
    assert max(limits) <= 2.0 < sum(limits)
    assert [t.shape for t in times] == [(3, 30000), (3, 7000)] + [(3, 0)] * 130
    own = times[0][1]
    assert np.median(own) == pytest.approx(20 * 150, rel=0.1)
    assert (times[0] > 0).all()
    assert (times[1] > 0).all()
    far = device.home(blocks * 4096) != device.domain(units_in_order(device)[:1])
    assert np.median(times[0][2][far]) - np.median(times[0][2][~far]) == pytest.approx(20 * 80, rel=0.1)


def test_hand_offs_are_cut_into_launches(only_its_work):
    device = SimulatedGpu(**H200 | {"slow": 40.0})
    probe, limits = Probe(device, "cuda"), with_limits(device)
    long = np.array([[0, 1, 128]] * 5000)
    (a, b), _ = probe.play([long, np.array([[2, 3, 256]] * 7)])
    assert max(limits) <= 2.0 < sum(limits)
    assert not np.isnan(a).any()
    assert not np.isnan(b).any()
    # One job is not cut: its launch may take as long as it is said to.
    probe.play([long[:1]], batches=2, rounds=80000)
    assert limits[-1] > 2.0


def test_what_takes_too_long_is_said(only_its_work):
    device = SimulatedGpu(**H200 | {"slow": 500.0})
    probe = Probe(device, "cuda")
    with pytest.raises(tp.ProbeError, match=r"job 0, of units 4 and 5 over the word at byte 4096, took longer than"):
        probe.play([np.array([[4, 5, 128]])])
    with pytest.raises(tp.ProbeError, match=r"looking at memory took longer than 0\.\d seconds"):
        probe.look([np.arange(5000), *[np.arange(0)] * 131], shift=12)
    with pytest.raises(tp.ProbeError, match="reading memory took longer"):
        Probe(SimulatedGpu(unit_gb_s=0.5), "cuda").read([np.arange(8)] * 12)


def test_two_tracks_over_one_word_do_not_end():
    probe = Probe(SimulatedGpu(**H200), "cuda")
    tracks = [np.array([[0, 1, 512], [0, 1, 128]]), np.array([[2, 3, 128]])]
    with pytest.raises(tp.ProbeError, match=r"job 0, of units 2 and 3 over the word at byte 4096"):
        probe.play(tracks)


FAILURES = {  # by what is recognized, of a launch's work: what is missing then
    "flags": (lambda w: len(w["tracks"]) > 1, {"hand-offs over words of each part"}),
    "loaded": (lambda w: len(w["jobs"]) and len(w["blocks"]), {"hand-offs while all units read"}),
    "homes": (lambda w: w["looks"] and w["block_shift"] == 12, {"by change looks 4096 bytes live together; *"}),
    "looks": (lambda w: w["looks"], {"what units wait for 6144 lines of memory"}),
    "one unit": (
        lambda w: w["steps"] > 4096 and np.count_nonzero(w["readings"][:, 1]) == 1,
        {"reads from near and far memory"},
    ),
    "all": (
        lambda w: len(w["unit_of"]),
        {"which units are near each other", "hand-offs between all pairs of units"}
        | {"hand-offs while all units read", "reads from near and far memory"},
    ),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_what_was_measured_is_kept_if_a_step_fails(tmp_path, failure):
    fails, missing = FAILURES[failure]
    device, run = SimulatedGpu(**H200), SimulatedGpu.run

    def failing(**work):
        if fails(work):
            raise RuntimeError("the device is on fire")
        return run(device, **work)

    device.run = failing
    said: list[str] = []
    found = tp.measure(device, "cuda", report=said.append)
    assert {re.sub(r"; where.*", "; *", what) for what in found.missing} == missing
    assert set(found.missing.values()) == {"the device is on fire"}
    assert said.count("this failed: the device is on fire") == len(missing)
    tp.record(tmp_path / "a.json", found)
    again = tp.recorded(tmp_path / "a.json")
    assert again.missing == found.missing
    topology = tp.topology_of(again)
    for what in found.missing:
        assert f"not measured: {what}: the device is on fire" in topology.notes
    has = set(topology.constants)
    assert ("hand_off_across_groups_us" in has) == (failure != "all")
    assert ("hand_off_across_groups_loaded_us" in has) == (failure not in ("all", "loaded"))
    assert ("stream_device_gb_s" in has) == (failure != "all")
    assert ("stream_unit_gb_s" in has) == (failure not in ("all", "one unit"))
    assert ("near_word_us" in has) == (failure in ("loaded", "one unit"))
    assert found.domains.any() == (failure in ("loaded", "one unit", "flags"))  # homes were told
    assert (found.looked is not None) == (failure not in ("looks", "all"))
    if failure == "homes":
        assert any("have one home each" in note for note in topology.notes)
    if failure != "all":
        assert [g.name for g in topology.root.children] == ["L2 half 0", "L2 half 1"]
    pytest.importorskip("matplotlib")
    from jax_monokernel.topology.draw import draw

    assert len(draw(tp.Found(topology, again), tmp_path)) == 3


def test_amd_steps_that_fail():
    device, run = SimulatedGpu(**DEVICES["mi300x"]), SimulatedGpu.run

    def failing(**work):
        if len(work["tracks"]) > 1:
            raise RuntimeError("the device is on fire")
        return run(device, **work)

    device.run = failing
    found = tp.measure(device, "rocm")
    assert list(found.missing) == ["4 memory domains; which memory is where"]
    assert not found.domains.any()
    assert found.profiles.shape == (96, 32)
    assert not np.isnan(found.latency[0, 1:]).any()
    assert found.stream["device"] > 0


def test_recording(tmp_path):
    found = tp.measure(SimulatedGpu(**H200), "cuda")
    for name in ("a.json", "b.json.gz"):
        tp.record(tmp_path / name, found)
        again = tp.recorded(tmp_path / name)
        assert again.looked == found.looked
        assert tp.tree(tp.topology_of(again)).splitlines()[:8] == tp.tree(tp.topology_of(found)).splitlines()[:8]
    with pytest.raises(ValueError, match=r"ends with .json or .json.gz"):
        tp.record(tmp_path / "c.txt", found)
    (tmp_path / "d.json").write_text("{}")
    with pytest.raises(ValueError, match="is no measurement of a topology"):
        tp.recorded(tmp_path / "d.json")
    (tmp_path / "e.json").write_text('{"version": 99, "measurement": {}}')
    with pytest.raises(ValueError, match="version 99"):
        tp.recorded(tmp_path / "e.json")


def test_placement_on_a_measured_device():
    from tape_specs import DecoderSpec, LayerSpec, RopeSpec

    from jax_monokernel.plan import Plan

    device = SimulatedGpu(**H200)
    found = tp.measure(device, "cuda")
    spec = DecoderSpec(
        vocab_size=512, hidden_size=256, intermediate_size=1024, num_heads=8, num_kv_heads=4, head_dim=32,
        layers=(LayerSpec(),) * 4, ropes=(RopeSpec(theta=1e4, rotary_dim=32),), dtype="bfloat16",
    )  # fmt: skip
    plan, topology = Plan(platform="cuda", units=device.units), tp.topology_of(found)
    near = np.array([topology.near_domain()[u] for u in range(device.units)])
    pages = len(tp.page_traffic(spec, plan, near, 2))
    placed = tp.place_tape(spec, plan, topology, found.homes[:pages])
    assert placed.local_before == pytest.approx(0.5, abs=0.05)
    assert placed.local_after > 0.85  # the halves have not the same number of units
    line = report(spec, tp.Found(topology, found))
    assert re.fullmatch(
        r"traffic local \d+\.\d%, remote \d+\.\d% -> local \d+\.\d%, remote \d+\.\d%: .* pages move", line
    )


def test_units_that_move():
    device = SimulatedGpu(**DEVICES["mi300x"])
    probe = Probe(device, "rocm")
    device.number[3] = 3 << 13 | 15 << 8
    with pytest.raises(tp.ProbeError, match="units changed between two launches"):
        probe.read([np.arange(8)] * probe.units)
    device.number[8] = device.number[0]
    with pytest.raises(tp.ProbeError, match="two work-groups on one unit"):
        Probe(device, "rocm")


def test_places():
    reports = np.zeros((2, 16), np.uint32)
    reports[:, 0] = [0x6A5F1, 0x03]
    reports[:, 1] = [5, 0]
    first = places(reports, "rocm")[0]
    assert (first.xcc, first.se, first.cu) == (5, 1, 5)  # 0xA5F1: CU 5, SH 0, SE 1
    assert first.number == 5 << 7 | (0x6A5F1 >> 8 & 0x7F)
    assert places(reports, "cuda")[1].number == 3


# ---- The device code ----


@pytest.mark.skipif(nvrtc_version() is None, reason="NVRTC is not installed (pip install nvidia-cuda-nvrtc)")
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_nvrtc_compiles_it(arch):
    import ctypes

    library = ctypes.CDLL(_native.gpu_compiler("cuda")[1])
    program, log_size = ctypes.c_void_p(), ctypes.c_size_t()
    source = _native.gpu_probe_source().encode()
    assert library.nvrtcCreateProgram(ctypes.byref(program), source, b"probe.cu", 0, None, None) == 0
    options = [f"--gpu-architecture={arch}".encode(), b"--std=c++17", b"-default-device"]
    error = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    library.nvrtcGetProgramLogSize(program, ctypes.byref(log_size))
    log = ctypes.create_string_buffer(log_size.value)
    library.nvrtcGetProgramLog(program, log)
    assert error == 0, log.value.decode()
    size = ctypes.c_size_t()
    assert library.nvrtcGetPTXSize(program, ctypes.byref(size)) == 0
    text = ctypes.create_string_buffer(size.value)
    assert library.nvrtcGetPTX(program, text) == 0
    ptx = text.value.decode()
    entries = set(re.findall(r"\.entry (\w+)", ptx))
    assert entries == {"topology_probe", "topology_clusters_2", "topology_clusters_4", "topology_clusters_8"}
    assert "ld.relaxed.gpu.global.u32" in ptx
    assert "st.relaxed.gpu.global.u32" in ptx
    assert "atom.relaxed.gpu.global.or.b32" in ptx
    library.nvrtcDestroyProgram(ctypes.byref(program))


@amd_code.needs_clang
@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_clang_compiles_it(arch):
    assembly = amd_code.compile_source(_native.gpu_probe_source(), arch)
    numbers = amd_code.metadata(assembly)
    assert numbers["max_flat_workgroup_size"] == 576
    assert numbers["vgpr_spill_count"] == numbers["sgpr_spill_count"] == numbers["private_segment_fixed_size"] == 0
    lines = re.findall(r"^\t([a-z]\w*[^;\n]*?)\s*(?:;.*)?$", assembly.read_text(), re.MULTILINE)
    assert not [line for line in lines if re.match(r"flat_|scratch_|s_trap|buffer_(wbl2|inv)", line)]
    # Words go past the caches of a compute unit, both ways; blocks are read once; and where a unit is, is read.
    assert [line for line in lines if re.fullmatch(r"global_store_dword .* sc1", line)]
    assert [line for line in lines if re.fullmatch(r"global_load_dword .* sc1", line)]
    assert sum(bool(re.fullmatch(r"global_load_dwordx4 .* nt", line)) for line in lines) == 8
    assert [line for line in lines if re.fullmatch(r"global_atomic_or .* sc0", line)]
    assert {"HW_REG_HW_ID", "HW_REG_XCC_ID"} <= set(re.findall(r"HW_REG_\w+", "\n".join(lines)))
    assert amd_code.link(assembly, arch).stat().st_size > 0


# ---- Its launches, on threads of the host ----

NOTHING = {
    "unit_of": np.zeros(0, np.uint32),
    "jobs": np.zeros((0, 2), np.uint32),
    "tracks": np.zeros((0, 2), np.uint32),
    "track_of": np.zeros(0, np.int32),
    "blocks": np.zeros(0, np.uint32),
    "readings": np.zeros((0, 2), np.uint32),
    "block_shift": 12,
    "steps": 0,
    "batches": 1,
    "rounds": 2,
    "warm_up": 1,
    "limit_s": 5.0,
}


@pytest.fixture
def make_probe(make_fake):
    def make(platform="cuda", units=5):
        fake = make_fake(platform)
        fake.units = units
        fake.most_bytes = 17 << 20
        return fake, _native.GpuProbe(platform, 0, 64 << 20)

    return make


@pytest.mark.parametrize("platform", PLATFORMS)
def test_all_pairs_play(make_probe, platform):
    fake, probe = make_probe(platform)
    assert (probe.units, probe.memory_bytes, probe.driver_version) == (5, 16 << 20, 13000)
    pairs = [(a, b) for a in range(5) for b in range(5) if a != b]
    jobs = np.array([[a | b << 16, i % 7 * 128] for i, (a, b) in enumerate(pairs)], np.uint32)
    work = NOTHING | {"jobs": jobs, "tracks": np.array([[0, 20]], np.uint32), "track_of": np.zeros(5, np.int32)}
    for _ in range(2):
        times, reports = probe.run(**work)
        assert (times > 0).all()
        assert (times[:, 0] <= times[:, 1]).all()
        assert reports[:, 2].tolist() == [0] * 5
        assert reports[:, 3].tolist() == [20] * 5
    assert fake.launches == 2
    before = fake.allocations
    del probe
    assert fake.allocations == before - 1


def test_tracks_run_side_by_side_while_others_read(make_probe):
    _, probe = make_probe()
    jobs = np.array([[0 | 3 << 16, 0], [0 | 3 << 16, 128], [4 | 1 << 16, 256]], np.uint32)
    work = {
        "jobs": jobs,
        "tracks": np.array([[0, 2], [2, 1]], np.uint32),
        "track_of": np.array([0, 1, 0, 0, 1], np.int32),
        "blocks": np.arange(100, 160, dtype=np.uint32),
        "readings": np.array([[i * 12, 12] for i in range(5)], np.uint32),
    }
    times, reports = probe.run(**NOTHING | work)
    assert (times > 0).all()
    assert reports[:, 3].tolist() == [2, 1, 2, 2, 1]
    assert (reports.view(np.uint64)[:, 5] > 0).all()


@pytest.mark.parametrize("shift", [7, 9, 12])
def test_units_read_as_many_blocks_as_they_should(make_probe, shift):
    _, probe = make_probe()
    blocks = np.arange(3 * (8192 >> shift), dtype=np.uint32)
    readings = np.array(
        [[0, len(blocks)], [0, 0], [0, 8192 >> shift], [8192 >> shift, 2 * (8192 >> shift)], [0, 0]], np.uint32
    )
    _, reports = probe.run(**NOTHING | {"blocks": blocks, "readings": readings, "block_shift": shift, "steps": 64})
    assert reports.view(np.uint64)[:, 5].tolist() == [64, 0, 64, 64, 0]


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("kinds", [1, 2, 3])
@pytest.mark.parametrize("touch", [0, 16384])
def test_units_look_at_lines(make_fake, platform, kinds, touch):
    fake = make_fake(platform)
    fake.units = 3
    memory = np.random.default_rng(0).integers(0, 2**32, 32768, np.uint32)
    memory = memory[-memory.ctypes.data % 4096 // 4 :][:24576]
    before = memory.copy()
    probe = _native.GpuProbe(platform, 0, memory.nbytes, memory.ctypes.data)
    blocks = np.array([0, 5, 31, 2, 7], np.uint32)
    readings = np.array([[0, 3], [3, 0], [3, 2]], np.uint32)
    work = {"blocks": blocks, "readings": readings, "block_shift": 7, "looks": kinds, "touch": touch}
    lines, reports = probe.run(**NOTHING | work)
    assert lines.shape == (5, 4)
    missing = 0xFFFFFFFF
    assert (lines[:, :kinds] < missing).all()
    assert (lines[:, kinds:3] == missing).all()
    assert not reports[:, 2].any()
    del probe
    np.testing.assert_array_equal(memory, before)


def test_looks_that_take_too_long(make_probe):
    _, probe = make_probe()
    blocks = np.zeros(20000, np.uint32)
    readings = np.array([[0, 20000]] + [[0, 0]] * 4, np.uint32)
    work = {"blocks": blocks, "readings": readings, "looks": 3, "rounds": 1000, "limit_s": 0.01}
    _, reports = probe.run(**NOTHING | work)
    assert reports[:, 2].tolist() == [1, 0, 0, 0, 0]


def test_a_wait_that_would_not_end(make_probe):
    _, probe = make_probe()
    # Unit 2 waits for unit 1, which is told that it is nobody's unit and so does not answer.
    places = np.full(2048, 0xFFFFFFFF, np.uint32)
    places[[0, 2, 3, 4]] = [0, 2, 3, 4]
    work = NOTHING | {
        "unit_of": places,
        "jobs": np.array([[2 | 1 << 16, 0]], np.uint32),
        "tracks": np.array([[0, 1]], np.uint32),
        "track_of": np.zeros(5, np.int32),
        "blocks": np.arange(8, dtype=np.uint32),
        "readings": np.array([[0, 8]] * 5, np.uint32),
        "limit_s": 0.3,
    }
    _, reports = probe.run(**work)
    assert reports[:, 2].tolist() == [1, 0, 1, 1, 1]
    times, reports = probe.run(**work | {"unit_of": NOTHING["unit_of"]})  # and the device is as before
    assert not reports[:, 2].any()
    assert (times > 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batches": 0}, "number of rounds"),
        ({"rounds": 0}, "number of rounds"),
        ({"limit_s": float("nan")}, "limit"),
        ({"limit_s": 1e9}, "limit"),
        ({"block_shift": 13}, "128 to 4096"),
        ({"unit_of": np.zeros(7, np.uint32)}, "wrong size"),
        ({"track_of": np.zeros(4, np.int32)}, "table for 4 units"),
        ({"track_of": np.zeros(5, np.int32)}, "a track that is not there"),
        ({"tracks": np.array([[0, 1]], np.uint32)}, "jobs that are not there"),
        ({"blocks": np.array([4096, 0], np.uint32)}, "outside its memory"),
        ({"readings": np.array([[0, 2]] * 5, np.uint32)}, "list of blocks"),
        ({"readings": np.array([[0, 1]] * 5, np.uint32), "blocks": np.zeros(4, np.uint32)}, "less than 8 KiB"),
        ({"looks": 4}, "looks of a kind"),
        ({"job": (0, 1, 0), "looks": 1}, "jobs beside looks"),
        ({"touch": 2}, "no word's"),
        ({"blocks": np.array([0], np.uint32), "touch": 1 << 28}, "outside its memory"),
        ({"readings": np.array([[0, 2]] * 5, np.uint32), "looks": 1}, "list of blocks"),
        ({"job": (0, 0, 0)}, "two of the device's"),
        (
            {
                "jobs": np.array([[0 | 1 << 16, 8], [0 | 1 << 16, 0], [2 | 3 << 16, 4], [2 | 3 << 16, 8]], np.uint32),
                "tracks": np.array([[0, 2], [2, 2]], np.uint32),
                "track_of": np.array([0, 0, 1, 1, -1], np.int32),
            },
            "one word for two tracks",
        ),
        ({"job": (0, 5, 0)}, "two of the device's"),
        ({"job": (0, 1, 1 << 19)}, "outside its memory"),
        ({"job": (0, 1, 0), "track_of": np.array([0, -1, 0, 0, 0], np.int32)}, "another track"),
        ({"jobs": np.zeros(3, np.uint32)}, "expected 2 numbers"),
    ],
)
def test_work_that_would_not_end_or_reach_outside_is_refused(make_probe, changes, message):
    _, probe = make_probe()
    if "job" in changes:
        a, b, place = changes.pop("job")
        job = {"jobs": np.array([[a | b << 16, place]], np.uint32), "tracks": np.array([[0, 1]], np.uint32)}
        changes = job | {"track_of": np.zeros(5, np.int32)} | changes
    with pytest.raises(ValueError, match=message):
        probe.run(**NOTHING | changes)


def test_too_little_memory(make_fake):
    make_fake().most_bytes = 1 << 20
    with pytest.raises(RuntimeError, match="too little free memory"):
        _native.GpuProbe("cuda", 0, 1 << 30)


def test_a_device_on_which_the_probe_does_not_fit(make_fake):
    make_fake().occupancy = 0
    with pytest.raises(RuntimeError, match="does not fit on a multiprocessor"):
        _native.GpuProbe("cuda", 0, 1 << 30)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_measuring_and_discovering(make_fake, platform, monkeypatch):
    fake = make_fake(platform)
    fake.units = 4
    fake.most_bytes = 17 << 20
    assert tp.discover(platform).measurement is None
    said: list[str] = []
    found = tp.measure_device(platform, report=said.append)
    assert said[-1].startswith("saved as ")
    assert sorted(len(g.units) for g in found.topology.groups()) == [2, 2]
    again = tp.discover(platform)
    assert again.measurement is not None
    assert again.topology.root == found.topology.root
    with monkeypatch.context() as patch:  # what the probe does not measure is what is published
        patch.setattr(sys.modules["jax_monokernel.topology.discover"], "part_for", lambda *_: tp.part("H200"))
        constants = tp.discover(platform).topology.constants
    assert constants["gather_us"] == tp.part("H200").constants["gather_us"]
    assert {name for name, c in constants.items() if c.basis == "measured"} == set(found.topology.constants)
    fake.driver_version = 13010
    make_fake(platform).driver_version = 13010
    assert store.load("Fake GPU", 4, 13010) is None


def test_homes_of_somebody_elses_memory(make_fake):
    mine = DEVICES["mi300x"]
    device = SimulatedGpu(**mine)
    found = tp.measure(device, "rocm")
    homes = homes_of_pages(SimulatedGpu(**mine, memory_bytes=300 * 4096), found).homes
    assert same_partition(homes, device.home(np.arange(300) * 4096))
    with pytest.raises(tp.ProbeError, match="other units than were measured"):
        homes_of_pages(SimulatedGpu(platform="rocm"), found)
    with pytest.raises(tp.ProbeError, match="flags do not tell their homes there"):
        homes_of_pages(SimulatedGpu(**H200), tp.measure(SimulatedGpu(**H200), "cuda"))


@pytest.mark.parametrize("whole", [True, False], ids=["answered", "unanswered"])
def test_words_of_somebody_elses_memory_stay(make_fake, whole):
    make_fake().units = 3
    memory = np.random.default_rng(0).integers(0, 2**32, 4096, np.uint32)
    memory = memory[-memory.ctypes.data % 4096 // 4 :][:2048]
    before = memory.copy()
    assert memory.ctypes.data % 4096 == 0
    probe = _native.GpuProbe("cuda", 0, memory.nbytes, memory.ctypes.data)
    assert probe.memory_bytes == 8192
    unit_of = np.full(2048, 0xFFFFFFFF, np.uint32)
    unit_of[[0, 1, 2] if whole else [0, 2]] = [0, 1, 2] if whole else [0, 2]
    jobs = np.array([[0 | 1 << 16, 0], [2 | 1 << 16, 130]], np.uint32)
    work = {"jobs": jobs, "tracks": np.array([[0, 2]], np.uint32), "track_of": np.zeros(3, np.int32)}
    _, reports = probe.run(**NOTHING | work | {"unit_of": unit_of, "limit_s": 5.0 if whole else 0.2})
    assert bool(reports[:, 2].any()) != whole
    del probe
    np.testing.assert_array_equal(memory, before)
    with pytest.raises(ValueError, match="does not begin at a page"):
        _native.GpuProbe("cuda", 0, 4096, memory.ctypes.data + 256)


def test_homes_are_for_measured_devices_and_arrays_on_gpus():
    import jax.numpy as jnp

    with pytest.raises(ValueError, match="device that was measured"):
        tp.page_homes(jnp.zeros(4096), tp.Found(tp.part("H200"), None))
    found = tp.measure(SimulatedGpu(), "cuda")
    with pytest.raises(ValueError, match="expected one GPU"):
        tp.page_homes(jnp.zeros(4096), tp.Found(tp.topology_of(found), found))
