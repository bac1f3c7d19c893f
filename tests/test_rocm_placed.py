"""Placement end to end: homes of pages to tokens, with the stand-ins for HIP and hipRTC and homes that are made up."""

from __future__ import annotations

import dataclasses
import functools
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding import (
    DECODE_ERRORS,
    assert_same_decode,
    mixed_params,
    reference_of_mixed,
    spec_of,
    state_of,
    tape_of,
    weights_of,
)
from gpu_decode import gpu_plan, gpu_tape_of
from gpu_fakes import make_call, register

from jax_monokernel import Tape, _native, decode, generate, memory_report, pack, prepare, stream, unpack
from jax_monokernel._gpu_tape import page_count
from jax_monokernel.decode import TARGET
from jax_monokernel.plan import Plan, geometry
from jax_monokernel.tape import DIES, check_layout, pack_placed
from jax_monokernel.tape_parts import embedding_rows, unpack_layer
from jax_monokernel.topology import Found, Measurement, near, pack_near, topology_of
from jax_monokernel.topology.probe import Place

PAGE = 4096


def measured(domain_of: dict[int, int], units_of_die: int = 1, gain: float = 1.2) -> Found:
    """A device with so many units on each XCD, and the memory that is near it."""
    places = [Place(die, 0, cu) for die in sorted(domain_of) for cu in range(units_of_die)]
    n = len(places)
    found = Measurement(
        name="made up",
        platform="rocm",
        arch="gfx942",
        driver_version=1,
        places=places,
        groups=np.arange(n) // units_of_die,
        domains=np.array([domain_of[place.xcc] for place in places]),
        domain_separation=9.0,
        profiles=np.zeros((n, 1)),
        latency=np.full((n, n), 500.0),
        latency_loaded=np.full((n, n), 900.0),
        load_gb_s=1.0,
        granule_bytes=PAGE,
        block_bytes=PAGE,
        homes=np.zeros(16, np.int8),
        near_ns=100.0,
        far_ns=200.0,
        home_margin=9.0,
        stream={"device": 1000.0, "device_near": 1000.0 * gain},
        seconds=1.0,
    )
    return Found(topology_of(found), found)


EIGHT = measured({die: die for die in range(8)})
FOUR = measured({die: die // 2 for die in range(8)})  # as an MI300X
GROUPS = measured({0: 0, 1: 1}, units_of_die=2)


def home_of(address: np.ndarray, domains: int) -> np.ndarray:
    """Homes that a hash of the address's bits gives, as channels do."""
    page = address // PAGE
    masks = (0b1011001, 0b0110110, 0b1100101)[: (domains - 1).bit_length()]
    return sum((np.bitwise_count(page & mask).astype(int) & 1) << bit for bit, mask in enumerate(masks))


def pages_of(array: jax.Array) -> np.ndarray:
    """Addresses of the whole pages in an array."""
    begin = array.unsafe_buffer_pointer()
    first = begin + -begin % PAGE
    return np.arange(first, begin + array.nbytes - PAGE + 1, PAGE)


@pytest.fixture
def rocm(rocm_stand_in, monkeypatch):
    """The stand-ins, with `decode` calling the handler for ROCM, and homes by `home_of`."""
    register()
    monkeypatch.setattr(sys.modules["jax_monokernel.decode"], "TARGET", "jax_monokernel_decode_on_fake_rocm")
    made_up = lambda array, found: home_of(pages_of(array), len(found.topology.domains))  # noqa: E731
    monkeypatch.setattr(near, "page_homes", made_up)
    return rocm_stand_in


def count_readings(rocm, tape: Tape, found: Found) -> None:
    """Has what is read of a tape counted, by the homes that its memory has now."""
    assert found.measurement is not None
    of_dies = np.full(DIES, 254)
    for place, domain in zip(found.measurement.places, found.measurement.domains, strict=True):
        of_dies[place.xcc] = domain
    pages = pages_of(tape.streams)
    rocm.set_homes(pages[0], home_of(pages, len(found.topology.domains)), of_dies)


@functools.partial(jax.jit, static_argnames="steps")
def run(tape, state, params, steps=16):
    return decode(tape, state, params, max_new_tokens=steps, return_log_probs=True)


def plain_and_placed(spec, plan, found: Found):
    weights = jax.tree.map(jnp.asarray, weights_of(spec))
    tape, placement = pack_near(spec, weights, plan, found=found)
    return jax.tree.map(jnp.asarray, gpu_tape_of(spec, plan)), tape, placement


@pytest.mark.parametrize(("found", "name"), [(EIGHT, "windows"), (FOUR, "longrope")], ids=["eight", "four"])
def test_most_of_what_units_read_is_near_them(rocm, found, name):
    """As the executor counts it: which work-group read which address."""
    spec = spec_of(name)
    plain, placed, placement = plain_and_placed(spec, gpu_plan(spec, 64, 8), found)
    rocm.dies = 8
    local = []
    for tape in (plain, placed):
        count_readings(rocm, tape, found)
        got = run(tape, state_of(spec), mixed_params(spec, 3))
        assert_same_decode(got, reference_of_mixed(spec), spec, state_of(spec))
        local.append(rocm.local)
    assert placement.order is not None
    assert placed.pages is not None
    assert "pages move" in placement.describe()
    # Pages of whole slots are counted, which a wave does not always fill.
    assert local[1] == pytest.approx(placement.local_after, abs=0.12)
    assert local[1] > local[0] + 0.35
    assert placement.local_before == pytest.approx(1 / len(found.topology.domains), abs=0.12)


@pytest.mark.parametrize(("dies", "launches"), [(2, 1), (3, 2)])
def test_groups_whose_weights_are_placed(rocm, dies, launches):
    """And on a device whose dies have another number of units than was measured: the same tokens, not as near."""
    spec = spec_of("windows")
    _, tape, placement = plain_and_placed(spec, gpu_plan(spec, 64, 4, groups=2), GROUPS)
    assert placement.order is not None
    rocm.devices, rocm.dies = 4, dies
    device = jax.devices()[3]  # no other test's: it remembers where groups were
    operands = jax.device_put((tape, state_of(spec), mixed_params(spec, 3)), device)
    count_readings(rocm, operands[0], GROUPS)
    before = rocm.launches
    assert_same_decode(run(*operands), reference_of_mixed(spec), spec, state_of(spec))
    assert rocm.launches == before + launches


class Model:
    """What `prepare` takes."""

    def __init__(self, name: str = "windows", seed: int = 0) -> None:
        from naive import random_weights

        self.spec, self.eos_token_id = spec_of(name), ()
        self.weights = jax.tree.map(jnp.asarray, random_weights(self.spec, seed=seed))

    def decoder_weights(self):
        return self.weights


def say(model) -> list[int]:
    return generate(model, [[3, 1, 4], [2]], max_new_tokens=8, do_sample=False).tokens.tolist()


@pytest.fixture
def placing(rocm, monkeypatch):
    """Where `discover` finds a device that was measured."""
    monkeypatch.setattr(near, "discover", lambda platform, device: EIGHT)
    rocm.dies = 8
    return rocm


def test_prepare_places_by_itself_and_generates_the_same(placing, monkeypatch):
    models = [Model(seed=seed) for seed in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["jax_monokernel.decode"], "TARGET", "jax_monokernel_decode")
        want = [say(prepare(model, Plan(platform="cpu", units=1))) for model in models]
    plan = gpu_plan(models[0].spec, 64, 8)
    for keep in (True, False):
        ready = prepare(models[0], plan, keep_weights=keep)
        assert ready.tape.pages is not None
        assert ready.placement is not None
        assert ready.placement.local_after > 0.6
        assert say(ready) == want[0]
    # With a mailbox.
    pieces = list(stream(ready, [[3, 1, 4]], max_new_tokens=8, do_sample=False))
    assert [piece.token for piece in pieces] == [t for t in want[0][0] if t >= 0]
    # Other weights: over the same memory, whose homes are known; or in new memory, which is looked at again.
    address = ready.tape.streams.unsafe_buffer_pointer()
    again = ready.repack(models[1], donate=True)
    assert again.tape.streams.unsafe_buffer_pointer() == address
    assert again.placement is ready.placement
    assert say(again) == want[1]
    other = again.repack(models[0])
    assert other.tape.pages is not None
    assert other.placement is not again.placement
    assert say(other) == want[0]
    plain = prepare(models[0], plan, placement=False)
    assert (plain.tape.pages, plain.placement) == (None, None)
    assert say(plain) == want[0]
    assert memory_report(other).tape > memory_report(plain).tape


@pytest.mark.parametrize(
    ("found", "units", "platform", "reason"),
    [
        (measured({0: 0, 1: 1}, gain=1.01), 2, "rocm", "not faster"),
        (Found(EIGHT.topology, None), 8, "rocm", "was not measured"),
        (EIGHT, 7, "rocm", "plan has 7 units and the device 8"),
        (EIGHT, 8, "cuda", "units on cuda read larger pieces"),
        (measured({0: 0, 1: 0}), 2, "rocm", "equally far"),
    ],
    ids=["rates", "unmeasured", "units", "cuda", "one_domain"],
)
def test_where_it_does_not_pay_tapes_are_as_they_were(rocm, found, units, platform, reason):
    spec = spec_of("plain")
    weights = jax.tree.map(jnp.asarray, weights_of(spec))
    plan = gpu_plan(spec, 64 if platform == "rocm" else 32, units)
    tape, placement = pack_near(spec, weights, plan, found=found)
    assert placement.order is None
    assert reason in placement.describe()
    assert jax.tree.structure(tape) == jax.tree.structure(pack(spec, weights, plan))
    np.testing.assert_array_equal(tape.streams, gpu_tape_of(spec, plan).streams)


def test_homes_that_cannot_be_found_and_memory_that_moves(placing, monkeypatch):
    def fails(array, found):
        raise RuntimeError("the device is in use")

    spec = spec_of("plain")
    with monkeypatch.context() as patch:
        patch.setattr(near, "page_homes", fails)
        ready = prepare(Model("plain"), gpu_plan(spec, 64, 8))
        assert ready.tape.pages is None
        assert ready.placement.describe() == "pages stay where they are: the device is in use"
    moves = lambda *args: jax.tree.map(jnp.copy, original(*args))  # noqa: E731
    original = near.pack_over
    monkeypatch.setattr(near, "pack_over", moves)
    ready = prepare(Model("plain"), gpu_plan(spec, 64, 8))
    assert ready.tape.pages is None
    assert "did not pack" in ready.placement.describe()


# ---- Tapes ----


@pytest.mark.parametrize(("name", "dtype"), [("windows", "bfloat16"), ("longrope", "float32")])
def test_a_placed_tape_is_unpacked_as_it_was_packed(name, dtype):
    spec = spec_of(name, dtype)
    weights, plan = jax.tree.map(jnp.asarray, weights_of(spec)), gpu_plan(spec_of(name), 64, 5, waves=3)
    count = geometry(spec, plan).unit_begin[-1] * jnp.dtype(dtype).itemsize // PAGE
    rng = np.random.default_rng(1)
    pages = jnp.asarray(rng.permutation(count) * 16 + 7, jnp.int32)
    tape = jax.jit(pack_placed, static_argnums=(0, 2))(spec, weights, plan, pages, jnp.zeros(DIES, jnp.int32))
    # Page by page, where the table says.
    raw = np.asarray(gpu_tape_of(spec, plan).streams).view(np.uint8).reshape(count, PAGE)
    got = np.asarray(tape.streams).view(np.uint8).reshape(-1)
    for i, place in enumerate(np.asarray(pages) * 256):
        np.testing.assert_array_equal(got[place : place + PAGE], raw[i])
    jax.tree.map(np.testing.assert_array_equal, unpack(tape), weights)
    for index in range(spec.num_layers):
        layer = jax.jit(unpack_layer)(tape, jnp.int32(index))
        jax.tree.map(lambda a, b, i=index: np.testing.assert_array_equal(a, b[i]), layer, weights.layers)
    tokens = jnp.arange(spec.vocab_size)
    np.testing.assert_array_equal(embedding_rows(tape, tokens), weights.embedding)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"die_units": None}, "both of pages and die_units"),
        ({"pages": jnp.zeros(3, jnp.int32)}, r"tape\.pages is int32\[3\]; .* ask for int32\[36\]"),
        ({"die_units": jnp.zeros(3, jnp.int32)}, r"tape\.die_units is int32\[3\]; .* ask for int32\[16\]"),
        ({"streams": jnp.zeros((6, 8192))}, r"tape\.streams is float32\[6, 8192\]; .* ask for float32\[37, 1024\]"),
        ({"plan": Plan(platform="cpu", units=2)}, "packed for cpu; only ROCm's can be"),
        ({"plan": Plan(platform="cuda", units=6)}, "packed for cuda; only ROCm's can be"),
    ],
    ids=["one", "pages", "die_units", "streams", "cpu", "cuda"],
)
def test_tapes_that_cannot_be(change, message):
    spec = spec_of("plain")
    tape = dataclasses.replace(
        gpu_tape_of(spec, gpu_plan(spec, 64, 6)),
        streams=jnp.zeros((37, 1024)),
        pages=jnp.arange(36, dtype=jnp.int32) * 16,
        die_units=jnp.zeros(DIES, jnp.int32),
    )
    check_layout(tape)
    with pytest.raises(
        ValueError, match=message.replace("[6,8192]", "[6, 8192]").replace(r"\[6,8192\]", r"\[6, 8192\]")
    ):
        decode(dataclasses.replace(tape, **change), state_of(spec), mixed_params(spec, 3), max_new_tokens=2)


def test_packing_for_pages_that_are_not_there_is_refused():
    spec = spec_of("plain")
    weights = jax.tree.map(jnp.asarray, weights_of(spec))
    for plan in (gpu_plan(spec, 32, 6), gpu_plan(spec, 64, 6), tape_of(spec, 2).plan):
        with pytest.raises(ValueError, match="pages that can be placed, not 5"):
            pack_placed(spec, weights, plan, jnp.zeros(5, jnp.int32), jnp.zeros(DIES, jnp.int32))


# ---- The custom call ----


@pytest.mark.parametrize(
    ("platform", "changes", "message"),
    [
        ("cuda", {}, "pages of weights can be placed for ROCM"),
        ("rocm", {"pages": np.zeros(3, np.int32)}, r"pages is s32\[3\]; expected s32\[\d+\]"),
        ("rocm", {"pages": np.zeros(40, np.uint32)}, r"pages is u32\[40\]; expected s32\[\d+\]"),
        ("rocm", {"die_units": np.zeros(8, np.int32)}, r"die_units is s32\[8\]; expected s32\[16\]"),
        ("rocm", {}, r"streams is bf16\[\d+\]; expected bf16\[\d+,2048\]"),
    ],
    ids=["cuda", "pages", "dtype", "die_units", "streams"],
)
def test_calls_that_cannot_be(make_fake, platform, changes, message):
    make_fake(platform)
    call = make_call(platform)
    pages = call.operands["streams"].nbytes // PAGE
    if changes:
        call.operands["streams"] = np.zeros((pages + 1, 2048), call.operands["streams"].dtype)
        attributes = call.attributes | {"splits": 1, "task_heads": 1}
        size = _native.gpu_workspace_bytes(**attributes, batch=2, placed=True)
        call.results["workspace"] = jax.ShapeDtypeStruct((size,), jnp.uint8)
    call.operands |= {"pages": np.zeros(pages, np.int32), "die_units": np.zeros(DIES, np.int32)} | changes
    with pytest.raises(DECODE_ERRORS, match=message):
        call.run()


def test_a_decode_of_a_placed_tape_is_exported():
    spec = spec_of("windows")
    plan = gpu_plan(spec, 64, 4)
    pages, units = jax.ShapeDtypeStruct((page_count(spec, plan),), jnp.int32), jax.ShapeDtypeStruct((DIES,), jnp.int32)
    tape = jax.eval_shape(lambda w, p, u: pack_placed(spec, w, plan, p, u), weights_of(spec), pages, units)
    made = jax.export.export(
        run, platforms=["rocm"], disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(TARGET)]
    )(tape, state_of(spec), mixed_params(spec, 3))
    (call,) = re.findall(rf"^.*custom_call @{TARGET}\(.*$", made.mlir_module(), re.MULTILINE)
    operands = re.findall(r"tensor<(\S*?)>", re.search(r" : \((tensor.*)\) ->", call)[1])
    assert operands[0] == f"{pages.shape[0] + 1}x1024xf32"
    assert operands[-2:] == [f"{pages.shape[0]}xi32", "16xi32"]
    again = jax.export.deserialize(made.serialize())
    assert again.in_tree == made.in_tree
