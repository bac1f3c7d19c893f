"""Plans and the geometry that follows from them."""

from __future__ import annotations

import itertools
import math

import jax
import pytest
from decoding import SPECS
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tape_specs import fits, specs

from jax_monokernel import LayerSpec
from jax_monokernel._bench.shapes import SHAPES
from jax_monokernel.plan import PHASES, VECTOR_ROLES, Plan, available_cpus, geometry, make_plan
from jax_monokernel.weights import layer_shapes, weight_shapes


@settings(max_examples=300, deadline=None)
@given(spec=specs(), units=st.integers(1, 400))
def test_tiles_cover_every_matrix_and_never_overlap(spec, units):
    plan = Plan(platform="cpu", units=units)
    geo = geometry(spec, plan)
    used: list[list[tuple[int, int]]] = [[] for _ in range(units)]
    for phase in PHASES:
        m = geo.matrices[phase]
        together = 2 if phase == "gate_up" and spec.gated else 1
        assert m.rows == m.tiles * 16
        assert m.cols % geo.k_group == 0
        assert m.begin[0] == 0
        assert m.begin[-1] == m.tiles
        shares = [b - a for a, b in itertools.pairwise(m.begin)]
        assert min(shares) >= 0
        assert max(shares) - min(shares) <= together  # as even as tiles allow
        assert all(b % together == 0 for b in m.begin)  # a gate tile and its up tile stay together
        for u in range(units):
            # A tile starts on a cache line's worth of rows, whatever the dtype.
            assert m.offset[u] % 16 == 0
            end = m.offset[u] + shares[u] * m.tile_elems
            if phase == "head":
                assert m.offset[u] >= geo.layer_elems * spec.num_layers
                assert end <= geo.unit_elems
            else:
                assert end <= geo.layer_elems
                used[u].append((m.offset[u], end))
    for ranges in used:
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ranges))
    assert geo.layer_elems % 32 == 0
    assert geo.unit_elems % 32 == 0


@settings(max_examples=100, deadline=None)
@given(spec=specs())
def test_constants_hold_every_vector_once(spec):
    geo = geometry(spec, Plan(platform="cpu", units=2))
    shapes = layer_shapes(spec)
    ranges = []
    for role in VECTOR_ROLES:
        offset = geo.vector_offset[role]
        assert (offset == -1) == (role not in shapes)
        if role in shapes:
            ranges.append((offset, offset + shapes[role][0]))
    edges = [0, *(edge for pair in sorted(ranges) for edge in pair), geo.layer_constants]
    assert edges[::2] == edges[1::2]  # no gap, no overlap
    assert geo.inv_freq_offset == geo.final_norm_offset + spec.hidden_size
    rows = sum(2 if rope.scaling == "longrope" else 1 for rope in spec.ropes)
    assert geo.layer_constants_offset == geo.inv_freq_offset + rows * spec.rotary_dim // 2
    assert geo.constants == geo.layer_constants_offset + spec.num_layers * geo.layer_constants


def test_default_plan_uses_the_cpus_but_no_more_than_there_is_work_for(monkeypatch):
    monkeypatch.delenv("MONOKERNEL_THREADS", raising=False)
    spec = SPECS["plain"]  # 20 rows: two tiles
    assert make_plan(spec) == Plan(platform="cpu", units=min(available_cpus(), 2))
    wide = spec.replace(hidden_size=4096, intermediate_size=4096, num_heads=512, num_kv_heads=512)
    assert make_plan(wide).units == available_cpus()


def test_environment_overrides_the_number_of_threads(monkeypatch):
    monkeypatch.setenv("MONOKERNEL_THREADS", "7")
    assert make_plan(SPECS["plain"]).units == 7
    assert make_plan(SPECS["plain"], units=3).units == 3


@pytest.mark.parametrize("value", ["0", "-1", "two", "", "1.5", "99999"])
def test_bad_thread_counts_in_the_environment_are_named(monkeypatch, value):
    monkeypatch.setenv("MONOKERNEL_THREADS", value)
    with pytest.raises(
        ValueError, match=r"MONOKERNEL_THREADS is '.*'; expected|Plan.units is 99999; expected 1 to 4096"
    ):
        make_plan(SPECS["plain"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"platform": "tpu", "units": 1}, "Plan.platform is 'tpu'; expected one of"),
        ({"platform": "cpu", "units": 0}, "Plan.units is 0; expected 1 to 4096"),
        ({"platform": "cpu", "units": 4097}, "Plan.units is 4097; expected 1 to 4096"),
        ({"platform": "cuda", "units": 2, "waves": -1}, "Plan.waves is -1; expected at least 1, or 0 for 8"),
        ({"platform": "cuda", "units": 2, "wave_size": 16}, "a GPU plan has waves of 32 or 64 lanes"),
    ],
    ids=["platform", "none", "many", "waves", "wave_size"],
)
def test_bad_plans_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Plan(**options)


@pytest.mark.parametrize("platform", ["cuda", "rocm"])
def test_gpu_plans_need_their_number_of_units(platform):
    with pytest.raises(ValueError, match=f"no {platform} device here, so a plan for it needs units="):
        make_plan(SPECS["plain"], platform=platform)
    plan = make_plan(SPECS["plain"], platform=platform, units=132)
    assert (plan.platform, plan.units) == (platform, 132)


@pytest.mark.parametrize(("units", "chunk"), [(304, 8), (256, 16), (100, 8)], ids=["MI300X", "MI350X", "unknown"])
def test_chunks_are_as_large_as_shared_memory_allows(units, chunk):
    for groups in (None, 1):
        assert make_plan(SPECS["plain"], platform="rocm", units=units, groups=groups).chunk_atoms == chunk


def test_gpu_kernels_need_pairs_of_16_bit_elements():
    spec = SPECS["nope"].replace(head_dim=5, ropes=(), layers=(LayerSpec(rope=None),), kv_dtype="bfloat16")
    with pytest.raises(ValueError, match="head_dim is 5; use kv_dtype"):
        geometry(spec, Plan(platform="cuda", units=2))
    with pytest.raises(ValueError, match="head_dim is 5; use kv_dtype"):
        make_plan(spec, platform="cuda", units=2)
    plan = make_plan(spec.replace(kv_dtype="float32"), platform="cuda", units=2)
    assert math.prod(geometry(spec.replace(kv_dtype="float32"), plan).stream_shape) > 0


@pytest.mark.parametrize(
    ("shape", "waves"),
    [("smollm2-135m", 6), ("qwen2.5-0.5b", 7), ("qwen3-0.6b", 8), ("llama3.2-1b", 8), ("llama3.1-8b", 8)],
)
def test_stream_waves_of_cuda_are_those_that_rows_fit(shape, waves):
    """Rows of 576, 896, 1024, 2048 and 4096 columns; and the tape of each takes 3% more than the weights at most."""
    spec = SHAPES[shape].spec()
    plan = make_plan(spec, platform="cuda", units=132)
    assert plan.waves == waves
    weights = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(weight_shapes(spec)))
    untied = 0 if spec.tied_head else spec.vocab_size * spec.hidden_size
    assert math.prod(geometry(spec, plan).stream_shape) + untied < 1.03 * weights


@settings(max_examples=100, deadline=None)
@given(spec=specs(), units=st.integers(1, 40), platform=st.sampled_from(["cuda", "rocm"]))
def test_gpu_tiles_are_dealt_evenly(spec, units, platform):
    if spec.head_dim % 2:
        spec = spec.replace(kv_dtype="float32")
    plan = Plan(platform=platform, units=units)
    geo = geometry(spec, plan)
    counts = {phase: [b - a for a, b in itertools.pairwise(m.begin)] for phase, m in geo.matrices.items()}
    for phase, m in geo.matrices.items():
        assert m.rows == m.tiles * plan.tile_rows
        assert m.cols % geo.atom_cols == 0
        assert sum(counts[phase]) == m.tiles
        dealt = [n for n in counts[phase] if n] if phase == "head" else counts[phase]
        assert max(dealt) - min(dealt) <= 1
    assert counts["o"] == counts["down"]  # the same unit adds both to its rows of the residual stream
    if spec.post_norm:  # who follows the residual stream gives something in every layer
        assert all(q + g > 0 for q, g, h in zip(counts["qkv"], counts["gate_up"], counts["head"], strict=True) if h)


@settings(max_examples=100, deadline=None)
@given(
    spec=specs(),
    members=st.integers(1, 12),
    groups=st.integers(2, 6),
    grouped=st.sampled_from([(True, True), (True, False), (False, True)]),
    platform=st.sampled_from(["cuda", "rocm"]),
)
def test_groups_have_their_own_tiles(spec, members, groups, grouped, platform):
    if spec.head_dim % 2:
        spec = spec.replace(kv_dtype="float32")
    plan = Plan(
        platform=platform, units=groups * members, groups=groups, group_attention=grouped[0], group_mlp=grouped[1]
    )
    assume(fits(spec, plan))
    geo = geometry(spec, plan)
    whole = grouped[0] and spec.num_kv_heads % groups == 0 and spec.qk_norm != "full"
    assert geo.attention_groups == (groups if whole else 1)
    assert geo.mlp_groups == (groups if grouped[1] else 1)
    assert geo.inner_cols * geo.mlp_groups >= spec.intermediate_size
    of_group = {
        "qkv": geo.attention_groups,
        "o": geo.attention_groups,
        "gate_up": geo.mlp_groups,
        "down": geo.mlp_groups,
    }
    for phase, m in geo.matrices.items():
        shares = [m.begin[(g + 1) * members] - m.begin[g * members] for g in range(groups)]
        assert sum(shares) == m.tiles
        if of_group.get(phase, 1) > 1:
            assert len(set(shares)) == 1
        elif phase != "head" or not spec.post_norm:
            assert max(shares) - min(shares) <= 1
        if phase in ("qkv", "gate_up"):  # whoever adds up a group's sums is waited for
            assert min(shares) > 0
        for g in range(groups):
            counts = [m.begin[u + 1] - m.begin[u] for u in range(g * members, (g + 1) * members)]
            dealt = [n for n in counts if n] if phase == "head" else counts
            assert not dealt or max(dealt) - min(dealt) <= 1
    head = geo.matrices["head"].begin
    if spec.post_norm:
        busy = [
            any(geo.matrices[p].begin[u] < geo.matrices[p].begin[u + 1] for p in ("qkv", "gate_up"))
            for u in range(plan.units)
        ]
        assert all(busy[u] for u in range(plan.units) if head[u] < head[u + 1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"units": 7, "groups": 2},
            "Plan.groups is 2, for 7 units on rocm; expected 1, or on a GPU up to 64 groups of",
        ),
        ({"units": 8, "groups": 0}, "Plan.groups is 0, for 8 units"),
        ({"units": 128, "groups": 128}, "Plan.groups is 128"),
        ({"units": 8, "groups": 2, "platform": "cpu"}, "Plan.groups is 2, for 8 units on cpu"),
        ({"units": 8, "groups": 2, "group_attention": False, "group_mlp": False}, "has attention or the MLP in groups"),
    ],
)
def test_bad_groups_of_a_plan_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Plan(**({"platform": "rocm"} | options))


def test_more_groups_than_tiles_are_named():
    with pytest.raises(ValueError, match="qkv has 6 tiles, too few for 7 groups"):
        geometry(SPECS["nope"], Plan(platform="cuda", units=7, groups=7))  # one KV head, 48 rows


@pytest.mark.parametrize(
    ("shape", "share"),
    [
        ("llama3.2-1b", 0.0),
        ("qwen3-0.6b", 0.0),
        ("llama3.1-8b", 0.0),
        ("qwen2.5-0.5b", 0.12),
        ("smollm2-135m", 0.27),
    ],
)
def test_what_padding_adds_on_nvidia(shape, share):
    """The numbers of docs/kernel.md."""
    spec = SHAPES[shape].spec()
    hidden, inner, q, kv = spec.hidden_size, spec.intermediate_size, spec.q_size, spec.kv_size
    weights = spec.num_layers * hidden * (2 * q + 2 * kv + 3 * inner) + spec.vocab_size * hidden
    matrices = geometry(spec, Plan(platform="cuda", units=132)).matrices
    packed = sum(m.rows * m.cols * (1 if p == "head" else spec.num_layers) for p, m in matrices.items())
    assert packed / weights - 1 == pytest.approx(share, abs=0.005)
