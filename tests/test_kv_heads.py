"""Models whose heads do not divide by the groups of a device, and devices that are cut down: what the plan is then."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from test_gpu_groups import make, requests, run

from jax_monokernel import LayerSpec
from jax_monokernel import topology as tp
from jax_monokernel._bench.shapes import SHAPES
from jax_monokernel.performance import choose_groups, predict
from jax_monokernel.plan import PHASES, Plan, geometry
from jax_monokernel.topology import Constant
from jax_monokernel.topology.draw import plan_of_units

# (query heads, KV heads)
HEADS = [(14, 2), (28, 4), (9, 3), (14, 7), (10, 5), (25, 5), (20, 10), (40, 10), (12, 6), (32, 8), (16, 16)]
# (units, groups): MI300X, a virtual function or MI350X, MI300A, and partitions of an MI300X.
DEVICES = [(304, 8), (256, 8), (228, 6), (152, 4), (76, 2), (38, 1)]


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_every_head_and_row_has_one_place(heads, device):
    """Each group has whole KV heads of its own where they divide; else attention is over all units."""
    (num_heads, num_kv_heads), (units, groups) = heads, device
    spec = SHAPES["llama3.2-1b"].spec().replace(num_heads=num_heads, num_kv_heads=num_kv_heads)
    plan = Plan(platform="rocm", units=units, groups=groups)
    geo, held = geometry(spec, plan), plan_of_units(spec, plan)
    divides = num_kv_heads % groups == 0
    assert (geo.attention_groups, geo.mlp_groups) == (groups if divides else 1, groups)
    attends = [[h for unit in held if unit["group"] == g for h in unit["heads"]] for g in range(groups)]
    assert sorted(h for of_group in attends for h in of_group) == list(range(num_heads))
    if divides:
        assert {len(of_group) for of_group in attends} == {num_heads // groups}
    parts = {"qkv": geo.attention_groups, "o": geo.attention_groups, "gate_up": groups, "down": groups, "head": 1}
    rows = {phase: sum(unit["rows"][phase][1] - unit["rows"][phase][0] for unit in held) for phase in PHASES}
    assert rows == {
        "qkv": spec.q_size + 2 * spec.kv_size,
        "o": spec.hidden_size * parts["o"],
        "gate_up": 2 * geo.inner_cols * groups,
        "down": spec.hidden_size * groups,
        "head": spec.vocab_size,
    }
    assert spec.intermediate_size <= geo.inner_cols * groups < spec.intermediate_size + 4 * groups
    # No unit has much more than its share of a layer.
    elements = [
        sum((unit["rows"][p][1] - unit["rows"][p][0]) * geo.matrices[p].cols for p in PHASES[:-1]) for unit in held
    ]
    assert max(elements) < 1.15 * np.mean(elements)


def test_a_virtual_function_with_256_units_and_ten_kv_heads():
    """In full: 256 work-groups on 8 XCDs, words that stay there, and the reference's first token."""
    sizes = {"num_heads": 20, "num_kv_heads": 10, "head_dim": 8, "layers": (LayerSpec(),)}
    kernel = make("nope", 64, 256, 8, near=True, waves=1, service_waves=1, **sizes)
    geo = geometry(kernel.spec, kernel.plan)
    assert (geo.attention_groups, geo.mlp_groups) == (1, 8)
    state, _, want = requests(kernel.spec, 1)
    got, done = run(kernel, 1, dies=[u % 8 for u in range(256)], seed=3)
    assert done.report["reason"] == 0, done.report
    np.testing.assert_array_equal(got.tokens, want.tokens[:, :1])
    np.testing.assert_allclose(got.log_probs, want.log_probs[:, :1], rtol=0, atol=2e-4)
    assert got.state.position[0] == state.position[0] + 1


@pytest.mark.parametrize("loaded_us", [0.7, 3.2])
def test_the_plan_of_a_virtual_function(loaded_us):
    """Flat where nobody knows its bandwidth; by the model of time once it was measured."""
    spec = SHAPES["qwen3-0.6b"].spec()
    device = tp.part_for("AMD Instinct MI300X VF", "gfx942", 256, "rocm")
    with pytest.raises(ValueError, match="does not say stream_device_gb_s"):
        predict(spec, device)
    assert choose_groups(spec, device) == 1
    measured = {"stream_device_gb_s": 3600.0, "hand_off_across_groups_us": loaded_us, "hand_off_in_group_us": 0.6}
    constants = {name: Constant(value, "measured", "test") for name, value in measured.items()}
    assert choose_groups(spec, dataclasses.replace(device, constants=constants)) == (8 if loaded_us > 1 else 1)
