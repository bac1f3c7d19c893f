"""The model of a token's time, against what was measured and against itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from rocm_stand_in import StandIn
from simulated_gpu import SimulatedGpu

from benchmarks import predictions
from benchmarks.calibration import MEASURED_H200
from jax_monokernel import performance
from jax_monokernel._bench.shapes import SHAPES
from jax_monokernel.performance import Calibration, choose_groups, predict
from jax_monokernel.plan import Plan, make_plan
from jax_monokernel.topology import (
    Constant,
    Group,
    Topology,
    discover,
    gpus,
    measure,
    part,
    store,
    topology_of,
)

SMALL = ("qwen3-0.6b", "llama3.2-1b", "smollm2-135m")


def with_constants(topology: Topology, **values: float) -> Topology:
    changed = {k: Constant(v, "published", "test") for k, v in values.items()}
    return dataclasses.replace(topology, constants={**topology.constants, **changed})


@pytest.mark.parametrize("point", MEASURED_H200, ids=lambda point: "-".join(map(str, point)))
def test_what_was_measured_on_an_h200(point):
    shape, batch, context, capacity = point
    found = predict(SHAPES[shape].spec(), part("H200"), batch=batch, context=context, capacity=capacity)
    assert found.token_us == pytest.approx(MEASURED_H200[point], rel=0.1)


def test_parts_add_up():
    spec = SHAPES["qwen3-0.6b"].spec()
    found = predict(spec, part("MI300X"))
    assert found.chain_us == pytest.approx(found.attention_us + sum(p.chain_us for p in found.phases))
    assert found.token_us == pytest.approx(found.layers * found.layer_us + found.head_us)
    assert max(found.chain_us, found.stream_us) <= found.layer_us <= found.chain_us + found.stream_us
    weights = sum(p.bytes for p in found.phases) * spec.num_layers + spec.vocab_size * spec.hidden_size * 2
    assert weights == pytest.approx(1.192e9, rel=0.01)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(SMALL),
    st.floats(0.3, 4),
    st.floats(0.1, 1),
    st.floats(500, 9000),
    st.sampled_from(["flat", "hierarchical"]),
)
def test_what_is_slower_takes_longer(shape, across, ratio, rate, kind):
    spec, base = SHAPES[shape].spec(), part("MI300X")
    values = {
        "gather_us": across, "hand_off_across_groups_us": across, "hand_off_in_group_us": across * ratio,
        "stream_device_gb_s": rate,
    }  # fmt: skip
    found = predict(spec, with_constants(base, **values), kind).token_us
    assert found >= predict(spec, with_constants(base, **values | {"stream_device_gb_s": rate * 1.1}), kind).token_us
    assert found > predict(spec, with_constants(base, **values | {"gather_us": across * 0.9}), kind).token_us
    slower = dataclasses.replace(Calibration(), heads_us=5.0)
    assert predict(spec, with_constants(base, **values), kind, calibration=slower).token_us > found


def test_two_kinds_of_plan():
    spec, device = SHAPES["smollm2-135m"].spec(), part("MI300X")
    # Where a chip-wide hand-off costs little more than one inside a group, partial sums are not worth it; where it
    # costs several times as much, they are.
    assert predict(spec, device, "flat").token_us < predict(spec, device, "hierarchical").token_us
    flat, groups = (predict(spec, device, kind, loaded=True) for kind in ("flat", "hierarchical"))
    assert groups.token_us < flat.token_us
    assert [p.name for p in groups.phases] == ["qkv", "o", "gate_up", "down"]
    assert groups.phases[0].hand_off_us > groups.phases[3].hand_off_us
    # Three KV heads cannot be dealt to eight groups: attention stays chip-wide. A group's part of the inner width is
    # filled up to whole atoms.
    assert [p.hand_off_us for p in groups.phases][1] == [p.hand_off_us for p in flat.phases][1]
    assert flat.stream_us < groups.stream_us < 1.1 * flat.stream_us
    spec = SHAPES["llama3.2-1b"].spec()
    flat, groups = (predict(spec, device, kind, loaded=True) for kind in ("flat", "hierarchical"))
    assert groups.phases[1].hand_off_us < flat.phases[1].hand_off_us / 3
    assert groups.stream_us == flat.stream_us


def test_the_choice_of_groups():
    device = part("MI300X")
    for shape in SMALL:
        spec = SHAPES[shape].spec()
        assert choose_groups(spec, device) == 1  # published hand-offs of an idle device: no gain, or too little
        assert choose_groups(spec, device, loaded=True) == 8
        assert choose_groups(spec, part("H200"), loaded=True) == 1  # its groups share a cache with the others
        slow = with_constants(device, gather_us=3.0, hand_off_across_groups_us=3.0, hand_off_in_group_us=0.6)
        assert choose_groups(spec, slow) == 8
    assert choose_groups(SHAPES["qwen3-0.6b"].spec(), part("MI350X")) == 1  # hand-offs are not known
    unequal = dataclasses.replace(device, root=dataclasses.replace(device.root, children=(
        Group("xcd", "XCD 0", (0, 1)), Group("xcd", "XCD 1", (2,)))))  # fmt: skip
    assert choose_groups(SHAPES["qwen3-0.6b"].spec(), unequal, loaded=True) == 1


def test_make_plan_asks_the_model_of_time(monkeypatch):
    spec = SHAPES["qwen3-0.6b"].spec()
    assert make_plan(spec, platform="rocm", units=304).groups == 1
    assert make_plan(spec, platform="rocm", units=304, groups=8).groups == 8
    monkeypatch.setattr(performance, "LEAST_GAIN", -1.0)
    assert make_plan(spec, platform="rocm", units=304) == Plan(platform="rocm", units=304, groups=8)
    assert make_plan(spec, platform="rocm", units=303).groups == 1  # of no known part
    assert make_plan(spec, platform="cuda", units=132).groups == 1


@pytest.mark.parametrize(("in_xcd_ns", "groups"), [(250.0, 8), (900.0, 1)])
def test_a_measured_device_decides(rocm_stand_in, environment, tmp_path, in_xcd_ns, groups):
    """What the probe has found of the device here is what make_plan goes by: hand-offs inside XCDs, and across them."""
    copy = StandIn(tmp_path, like=rocm_stand_in)
    for name, value in (copy.variables | {"MONOKERNEL_CACHE_DIR": str(tmp_path / "cache")}).items():
        environment(name, value)
    copy.units = 96
    (here, *_) = (described for platform, _, described in gpus() if platform == "rocm")
    device = SimulatedGpu(
        platform="rocm", group_of=tuple(i % 8 for i in range(96)), domain_of=(0,) * 8, masks=(), rotate=True,
        in_xcd_ns=in_xcd_ns, near_ns=500.0, name=here["name"], driver_version=here["driver_version"],
    )  # fmt: skip
    spec = SHAPES["qwen3-0.6b"].spec()
    assert make_plan(spec, platform="rocm", units=96).groups == 1
    found = dataclasses.replace(measure(device, "rocm"), device_id=here["uuid"])
    assert store.save(found) is not None
    assert discover("rocm").topology.root == topology_of(found).root
    assert make_plan(spec, platform="rocm", units=96).groups == groups == choose_groups(spec, topology_of(found))


def test_placement():
    spec, device = SHAPES["llama3.2-1b"].spec(), with_constants(part("MI355X"), stream_device_near_gb_s=7590.0)
    device = with_constants(device, gather_us=0.9)
    without = predict(spec, device, local_before=0.5, local_after=0.5)
    placed = predict(spec, device, local_before=0.5, local_after=1.0)
    assert placed.stream_us == pytest.approx(without.stream_us / 1.1)
    assert without.token_us > predict(spec, device, local_before=0.5, local_after=0.75).token_us > placed.token_us


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (("stream_device_gb_s",), "does not say stream_device_gb_s"),
        (("gather_us", "hand_off_across_groups_us"), "says neither gather_us nor"),
        (("hand_off_across_groups_loaded_us",), "does not say hand_off_across_groups_loaded_us"),
    ],
)
def test_missing_constants(missing, message):
    device = part("MI300X")
    device = dataclasses.replace(device, constants={k: v for k, v in device.constants.items() if k not in missing})
    with pytest.raises(ValueError, match=message):
        predict(SHAPES["qwen3-0.6b"].spec(), device, loaded=True)


def test_the_documented_table_is_what_the_model_says():
    text = (Path(__file__).parents[1] / "docs" / "performance.md").read_text()
    for row in predictions.rows():
        assert row in text, "run `python -m benchmarks.predictions` and put its table there"
