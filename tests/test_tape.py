"""Packing weights into a tape, and taking them out again."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding import SPECS, assert_bit_equal, numpy_in_place_of_jax
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from naive import random_weights
from tape_specs import fits, specs

from jax_monokernel import _gpu_tape
from jax_monokernel import tape as tape_module
from jax_monokernel.plan import Plan, geometry, make_plan
from jax_monokernel.tape import LAYOUT_VERSION, Tape, pack, unpack
from jax_monokernel.weights import DecoderWeights, weight_shapes

BITS = {2: np.uint16, 4: np.uint32}


def numbered_weights(spec) -> DecoderWeights:
    """Weights that hold consecutive bit patterns: never zero, NaN or infinite, and all different if dtype is f32."""
    start = 0

    def fill(shape: jax.ShapeDtypeStruct) -> np.ndarray:
        nonlocal start
        dtype = np.dtype(shape.dtype)
        first = 0x0400 if dtype.itemsize == 2 else 0x00800000  # the smallest normal number of either
        count = int(np.prod(shape.shape))
        bits = first + (start + np.arange(count)) % (0x7400 if dtype.itemsize == 2 else 2**30)
        start += count
        return bits.astype(BITS[dtype.itemsize]).view(dtype).reshape(shape.shape)

    return jax.tree.map(fill, weight_shapes(spec))


def bits_of(x) -> np.ndarray:
    x = np.asarray(x)
    return x.view(BITS[x.dtype.itemsize])


@settings(max_examples=300, deadline=None)
@given(spec=specs(), units=st.integers(1, 20))
def test_unpacking_gives_back_every_bit(spec, units):
    weights = numbered_weights(spec)
    with numpy_in_place_of_jax():
        tape = pack(spec, weights, Plan(platform="cpu", units=units))
        assert isinstance(tape.streams, np.ndarray)  # otherwise every example compiles
        assert_bit_equal(unpack(tape), weights)


@settings(max_examples=100, deadline=None)
@given(
    spec=specs(),
    members=st.integers(1, 5),
    groups=st.integers(1, 4),
    grouped=st.sampled_from([(True, True), (True, False), (False, True)]),
    platform=st.sampled_from(["cuda", "rocm"]),
)
def test_every_weight_is_on_a_tape_for_gpus_once(spec, members, groups, grouped, platform):
    if spec.head_dim % 2:
        spec = spec.replace(kv_dtype="float32")
    plan = Plan(
        platform=platform, units=groups * members, groups=groups, group_attention=grouped[0], group_mlp=grouped[1]
    )
    assume(fits(spec, plan))
    weights = numbered_weights(spec)
    with numpy_in_place_of_jax(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(_gpu_tape, "jnp", np)
        got = bits_of(pack(spec, weights, plan).streams)
    w = weights.layers
    matrices = [m for m in (w.q, w.k, w.v, w.o, w.gate, w.up, w.down, weights.output_matrix) if m is not None]
    want = np.sort(np.concatenate([bits_of(m).reshape(-1) for m in matrices]))
    np.testing.assert_array_equal(np.sort(got[got != 0]), want)


@pytest.mark.parametrize(
    ("name", "platform", "options"),
    [
        ("plain", "cuda", {"groups": 1}),
        ("plain", "rocm", {"groups": 2}),  # attention and the MLP
        ("nope", "cuda", {"groups": 3}),  # one KV head: the MLP alone
        ("post_norm", "rocm", {"groups": 6}),
        ("plain", "cuda", {"groups": 2, "group_mlp": False}),
    ],
)
def test_unpacking_a_tape_for_gpus_gives_back_every_bit(name, platform, options):
    spec = SPECS[name]
    weights, plan = random_weights(spec), Plan(platform=platform, units=6, **options)
    tape = jax.jit(lambda w: pack(spec, w, plan))(weights)
    assert_bit_equal(jax.jit(unpack)(tape), weights)


@settings(max_examples=200, deadline=None)
@given(spec=specs(), units=st.integers(1, 20))
def test_every_weight_is_on_the_tape_once_and_the_rest_is_zero(spec, units):
    weights = numbered_weights(spec)
    plan = Plan(platform="cpu", units=units)
    with numpy_in_place_of_jax():
        tape = pack(spec, weights, plan)
    w = weights.layers
    matrices = [m for m in (w.q, w.k, w.v, w.o, w.gate, w.up, w.down, weights.output_matrix) if m is not None]
    want = np.sort(np.concatenate([bits_of(m).reshape(-1) for m in matrices]))
    got = bits_of(tape.streams)
    np.testing.assert_array_equal(np.sort(got[got != 0]), want)
    # Each unit has the share that the geometry gives it, so no unit reads another's.
    geo = geometry(spec, plan)
    assert got.shape == (units, geo.unit_elems)
    for u in range(units):
        tiles = {phase: m.begin[u + 1] - m.begin[u] for phase, m in geo.matrices.items()}
        room = sum(
            count * geo.matrices[phase].tile_elems * (1 if phase == "head" else spec.num_layers)
            for phase, count in tiles.items()
        )
        assert np.count_nonzero(got[u]) <= room

    vectors = [getattr(w, role) for role in tape_module.VECTOR_ROLES if getattr(w, role) is not None]
    floats = np.concatenate([np.asarray(v, np.float32).reshape(-1) for v in [weights.final_norm, *vectors]])
    rope = slice(geo.inv_freq_offset, geo.layer_constants_offset)
    np.testing.assert_array_equal(np.sort(np.delete(tape.constants, rope)), np.sort(floats))
    assert tape.constants.dtype == np.float32
    assert tape.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(tape))
    assert (tape.embedding is None) == spec.tied_head
    assert tape.bytes_per_token == sum(m.nbytes for m in [*matrices, weights.final_norm, *vectors])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("name", "units"), [("nope", 1), ("windows", 3), ("post_norm", 20)])
def test_jitted_packing_equals_eager_packing(name, units, dtype):
    spec = SPECS[name].replace(dtype=dtype)
    weights, plan = random_weights(spec), Plan(platform="cpu", units=units)
    tape = jax.jit(lambda w: pack(spec, w, plan))(weights)
    with numpy_in_place_of_jax():
        plain = pack(spec, jax.tree.map(np.asarray, weights), plan)
    assert_bit_equal(tape, plain)
    assert_bit_equal(jax.jit(unpack)(tape), weights)
    if (name, dtype) == ("nope", "bfloat16"):  # slow: every operation is compiled alone
        assert_bit_equal(pack(spec, weights, plan), plain)
        assert_bit_equal(unpack(tape), weights)


def test_a_tile_keeps_rows_side_by_side_and_bf16_columns_in_pairs():
    spec = SPECS["plain"].replace(dtype="bfloat16", tied_head=False)
    weights = random_weights(spec)
    tape = jax.jit(lambda w: pack(spec, w, Plan(platform="cpu", units=2)))(weights)
    head = geometry(spec, tape.plan).matrices["head"]
    tile = np.asarray(tape.streams)[1, head.offset[1] :][: head.tile_elems].reshape(-1, 16, 2)
    row = head.begin[1] * 16
    np.testing.assert_array_equal(tile[3, 5], np.asarray(weights.head)[row + 5, 6:8])


def test_the_default_plan_is_the_cpus(monkeypatch):
    monkeypatch.setenv("MONOKERNEL_THREADS", "2")
    spec = SPECS["plain"]
    assert jax.eval_shape(lambda w: pack(spec, w), random_weights(spec)).plan == make_plan(spec)


def small_tape(**changes) -> Tape:
    spec = SPECS["nope"]
    with numpy_in_place_of_jax():
        tape = pack(spec, numbered_weights(spec), Plan(platform="cpu", units=2))
    return dataclasses.replace(tape, **changes)


def test_another_layout_version_is_refused():
    tape = small_tape(layout_version=LAYOUT_VERSION + 1)
    with pytest.raises(ValueError, match=rf"layout version {LAYOUT_VERSION + 1}, .* pack the weights again"):
        unpack(tape)


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("streams", lambda x: x[:, :-1], r"tape.streams is float32\[2, .*\]; spec and plan ask for float32\[2, "),
        ("streams", lambda x: x[:1], r"tape.streams is float32\[1, "),
        ("streams", lambda x: x.astype(jnp.bfloat16), r"tape.streams is bfloat16.*ask for float32"),
        ("constants", lambda x: x[1:], r"tape.constants is float32\["),
        ("constants", lambda x: x.astype(jnp.float16), r"tape.constants is float16"),
        ("embedding", lambda x: x[1:], r"tape.embedding is float32\[36, 20\]; spec and plan ask for float32\[37, 20\]"),
        ("embedding", lambda x: None, "tape.embedding must be None exactly when the spec ties the head"),
    ],
    ids=["short", "units", "dtype", "constants", "constants-dtype", "embedding", "no-embedding"],
)
def test_arrays_that_do_not_fit_are_named(field, change, message):
    tape = small_tape()
    bad = dataclasses.replace(tape, **{field: change(getattr(tape, field))})
    with pytest.raises(ValueError, match=message):
        unpack(bad)


def test_weights_that_do_not_fit_are_named():
    spec, weights = SPECS["nope"], random_weights(SPECS["nope"])
    without = dataclasses.replace(weights, layers=dataclasses.replace(weights.layers, q_bias=None))
    with pytest.raises(ValueError, match=r"weights lack layers.q_bias"):
        pack(spec, without)
    with pytest.raises(ValueError, match=r"weights\.layers\.q is float32.*asks for bfloat16"):
        pack(
            spec.replace(dtype="bfloat16"), dataclasses.replace(weights, embedding=weights.embedding.astype("bfloat16"))
        )


def test_spec_and_plan_are_static_parts_of_a_tape():
    tape = small_tape()
    leaves, structure = jax.tree.flatten(tape)
    assert len(leaves) == 3
    again = jax.tree.unflatten(structure, leaves)
    assert (again.spec, again.plan, again.layout_version) == (tape.spec, tape.plan, tape.layout_version)
    other = dataclasses.replace(tape, plan=Plan(platform="rocm", units=2))
    assert jax.tree.structure(other) != structure
