"""Pictures of devices."""

from __future__ import annotations

import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_gpu import SimulatedGpu
from tape_specs import specs
from test_topology import MODES, made

from jax_monokernel import topology as tp
from jax_monokernel.plan import PHASES, Plan, geometry
from jax_monokernel.topology.draw import draw, plan_of_units

pytest.importorskip("matplotlib")


def test_a_measured_device(tmp_path):
    from decoding import spec_of

    found = tp.measure(SimulatedGpu(group_of=(0,) * 5 + (1,) * 7 + (2,) * 4, domain_of=(0, 1, 1)), "cuda")
    device = tp.Found(tp.topology_of(found), found)
    spec = spec_of("windows", "bfloat16")
    paths = draw(device, tmp_path / "new" / "folder", spec=spec, model="A model", format="svg")
    assert [p.name for p in paths] == ["groups.svg", "latency.svg", "homes.svg", "plan.svg"]
    groups, latency, homes, plan = (p.read_text() for p in paths)
    for text in (
        "Simulated: 16 units",
        "L2 half 1 · ",
        " · 11<",
        "cluster 0 · ",
        " · 7<",
        "domain 0",
        "hand-off in group:",
        ">15<",
    ):
        assert text in groups
    assert "nothing else runs" in latency
    assert "4,096 bytes live together" in homes
    assert "A model" in plan
    assert ">h0" in plan
    assert all(phase in plan for phase in PHASES)


@pytest.mark.parametrize(("name", "mode"), [m for m in MODES if m[0] in ("MI300A", "MI355X", "H200")], ids=str)
def test_parts(name, mode, tmp_path):
    (path,) = draw(tp.Found(made(name, mode), None), tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_cpus(tmp_path):
    (path,) = draw(tp.discover("cpu"), tmp_path, format="svg")
    assert "core" in path.read_text()


def test_errors(tmp_path, monkeypatch):
    device = tp.Found(tp.part("H200"), None)
    with pytest.raises(ValueError, match="expected png or svg"):
        draw(device, tmp_path, format="gif")
    from decoding import spec_of

    with pytest.raises(ValueError, match="the plan has 7 units and NVIDIA H200 has 132"):
        draw(device, tmp_path, spec=spec_of("windows"), plan=Plan(platform="cuda", units=7))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"pip install 'jax-monokernel\[pictures\]'"):
        draw(device, tmp_path)


def test_a_plan_with_groups(tmp_path):
    """Eight KV heads on eight XCDs: each has its own, in the picture too."""
    from decoding import spec_of

    spec = spec_of("nope", "bfloat16").replace(num_heads=16, num_kv_heads=8)
    device = tp.Found(tp.part("MI300X"), None)
    plan = Plan(platform="rocm", units=304, groups=8)
    heads = [unit["heads"] for unit in plan_of_units(spec, plan)]
    assert [[h for unit in heads[38 * xcd : 38 * xcd + 38] for h in unit] for xcd in range(8)] == [
        [2 * xcd, 2 * xcd + 1] for xcd in range(8)
    ]
    (_, path) = draw(device, tmp_path, spec=spec, plan=plan, format="svg")
    text = path.read_text()
    assert "8 groups of neighbouring units" in text
    assert text.count("columns, of its group") == 4
    (_, path) = draw(device, tmp_path, spec=spec, format="svg")
    assert "of its group" not in path.read_text()  # by published constants the flat plan is taken


@settings(max_examples=60, deadline=None)
@given(specs(), st.integers(1, 20), st.sampled_from([1, 1, 2, 3]), st.sampled_from(["cpu", "cuda", "rocm"]))
def test_what_units_hold(spec, members, groups, platform):
    groups = 1 if platform == "cpu" else groups
    plan = Plan(platform=platform, units=members * groups, groups=groups)
    try:
        geo = geometry(spec, plan)
    except ValueError:
        return  # a head dimension that GPUs do not do, or fewer rows than groups
    held = plan_of_units(spec, plan)
    assert [unit["group"] for unit in held] == [u // members for u in range(plan.units)]
    parts = dict.fromkeys(("qkv", "o"), geo.attention_groups) | dict.fromkeys(("gate_up", "down"), geo.mlp_groups)
    real = {"qkv": (spec.q_size + 2 * spec.kv_size) // geo.attention_groups, "head": spec.vocab_size}
    real |= {"o": spec.hidden_size, "down": spec.hidden_size}
    for phase, matrix in geo.matrices.items():
        for group in range(parts.get(phase, 1)):
            end = 0
            for unit in held if parts.get(phase, 1) == 1 else held[group * members : (group + 1) * members]:
                first, last = unit["rows"][phase]
                assert first == end
                assert first <= last
                end = last
            assert real.get(phase, 1) <= end <= matrix.rows // parts.get(phase, 1)
    heads = [Counter(h for unit in held if unit["group"] == g for h in unit["heads"]) for g in range(groups)]
    every = {} if platform == "cpu" else dict.fromkeys(range(spec.num_heads), 1)
    assert sum(heads, Counter()) == every
    if geo.attention_groups > 1:  # whole KV heads, each in one group
        each = spec.num_heads // groups
        assert [sorted(of_group) for of_group in heads] == [
            list(range(g * each, g * each + each)) for g in range(groups)
        ]
