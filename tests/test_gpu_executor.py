"""The CPU that runs the GPU kernel in tests computes what a GPU computes, and notices what a GPU would not forgive."""

from __future__ import annotations

import functools
import re

import gpu_host
import ml_dtypes
import numpy as np
import pytest
from gpu_host import POLICIES, Fault, HostError

UNITS, WAVES = 3, 4  # of which two are stream waves
SHARED = 8192


def stub(body: str, *, wave: int, units: int = UNITS, declarations: str = "") -> str:
    defines = {"UNITS": units, "WAVES": 2, "SERVICE_WAVES": WAVES - 2, "WAVE_SIZE": wave, "SHARED_BYTES": SHARED}
    lines = [f"#define MK_{name} {value}" for name, value in defines.items()]
    lines += ['#include "arch/arch.h"', "using namespace mk;", declarations]
    return "\n".join([*lines, f"MK_KERNEL(1) void monokernel(Args args) {{\n{body}\n}}\n"])


@functools.cache
def library(cases: tuple[tuple[str, str], ...], wave: int, sanitize: bool = False, declarations: str = ""):
    """One library with many kernels: args.eos_count says which one runs."""
    bodies = (f"// {name}\nif (args.eos_count == {i}) {{\n{body}\n}}" for i, (name, body) in enumerate(cases))
    return gpu_host.build(stub("\n".join(bodies), wave=wave, declarations=declarations), sanitize=sanitize)


WAVE_SIZES = pytest.mark.parametrize("wave", [32, 64])

# ---- Exchanges of words between units ----

# Every unit publishes 100 words a round that depend on all words of the round before. The bits of args.max_new_tokens
# leave parts of the exchange out. The result is in args.k_cache: [units][rounds] u32.
EXCHANGE = """
constexpr int kWords = 100, kRounds = 12;
const bool one_buffer = args.max_new_tokens & 1, no_barrier = args.max_new_tokens & 2;
u32* words = (u32*)args.workspace;
u32* sums = (u32*)arch::shared();  // [waves]
const int threads = MK_WAVES_ALL * arch::kWave, index = arch::wave() * arch::kWave + arch::lane();
u32 state = arch::unit() + 1;
for (u32 round = 0; round < kRounds; round++) {
  const u32 parity = one_buffer ? (round & 1) ^ 1 : ((round >> 1) & 1) ^ 1;
  u32* buffer = words + (one_buffer ? 0 : (round & 1) * MK_UNITS * kWords);
  for (int i = index; i < kWords; i += threads) {
    arch::store_word(buffer + arch::unit() * kWords + i, (state * 2654435761u + i * 40503u) << 1 | parity);
  }
  u32 sum = 0;
  const u64 deadline = arch::ticks() + args.timeout_ticks;
  for (int i = index; i < MK_UNITS * kWords; i += threads) {
    u32 word;
    while (((word = arch::load_word(buffer + i)) & 1) != parity) {
      if (arch::ticks() > deadline) {
        if (arch::claim(words + 2 * MK_UNITS * kWords)) {
          args.report->reason = kTimeout;
          args.report->word = i;
          args.report->token = round;
          args.report->unit = arch::unit();
        }
        word = 0;
        break;
      }
    }
    sum = sum * 31 + (word >> 1);
  }
  for (int step = 1; step < arch::kWave; step *= 2) sum += arch::shuffle_xor(sum, step);
  if (arch::lane() == 0) sums[arch::wave()] = sum;
  if (!no_barrier) arch::unit_sync();
  state = 0;
  for (int i = 0; i < MK_WAVES_ALL; i++) state = state * 17 + sums[i];
  arch::unit_sync();
  if (index == 0) ((u32*)args.k_cache)[arch::unit() * kRounds + round] = state;
}
""".replace("MK_WAVES_ALL", str(WAVES))
ROUNDS, WORDS = 12, 100


def exchange_library(wave: int, sanitize: bool = False):
    return library((("exchange", EXCHANGE),), wave, sanitize)


def exchange(library, *, one_buffer=False, no_barrier=False, timeout=1_000_000, **options):
    out = np.zeros((UNITS, ROUNDS), np.uint32)
    done = gpu_host.run(
        library,
        {
            "k_cache": out,
            "workspace": np.zeros(2 * UNITS * WORDS + 4, np.uint32),
            "max_new_tokens": one_buffer + 2 * no_barrier,
            "timeout_ticks": timeout,
        },
        **options,
    )
    return out, done


def exchange_in_numpy(wave: int) -> np.ndarray:
    state = np.arange(1, UNITS + 1, dtype=np.uint32)
    out = []
    index = np.arange(UNITS * WORDS)
    for _ in range(ROUNDS):
        words = state[:, None] * np.uint32(2654435761) + np.arange(WORDS, dtype=np.uint32) * np.uint32(40503)
        words = (words << 1 >> 1).ravel()
        per_lane = np.zeros(WAVES * wave, np.uint32)
        for start in range(0, UNITS * WORDS, WAVES * wave):
            part = index[start : start + WAVES * wave]
            per_lane[: len(part)] = per_lane[: len(part)] * np.uint32(31) + words[part]
        total = np.uint64(0)
        for s in per_lane.reshape(WAVES, wave).sum(axis=1, dtype=np.uint32):
            total = (total * np.uint64(17) + np.uint64(s)) % np.uint64(2**32)
        state = np.full(UNITS, total, np.uint32)
        out.append(state)
    return np.stack(out, axis=1)


@WAVE_SIZES
@pytest.mark.parametrize("stores", gpu_host.STORES)
@pytest.mark.parametrize("policy", POLICIES)
def test_an_exchange_that_is_right_works_in_every_order(policy, stores, wave):
    for seed in range(3):
        out, done = exchange(exchange_library(wave), policy=policy, stores=stores, unit=seed % UNITS, seed=seed)
        np.testing.assert_array_equal(out, exchange_in_numpy(wave))
        assert done.report["reason"] == 0
        assert done.stores == UNITS * ROUNDS * WORDS
        assert (done.delayed > 0) == (stores != "now")


@WAVE_SIZES
def test_an_exchange_that_is_right_passes_every_check(wave):
    for seed in range(3):
        out, _ = exchange(exchange_library(wave, sanitize=True), seed=seed)
        np.testing.assert_array_equal(out, exchange_in_numpy(wave))


def test_runs_are_repeatable():
    runs = [exchange(exchange_library(32), seed=seed)[1] for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def fails(attempt) -> bool:
    try:
        out, done = attempt()
    except HostError:
        return True
    return done.report["reason"] != 0 or not np.array_equal(out, exchange_in_numpy(32))


@pytest.mark.parametrize("policy", ["random", "starve"])
def test_words_that_are_used_again_too_early_are_noticed(policy):
    attempts = [
        functools.partial(exchange, exchange_library(32), one_buffer=True, timeout=20_000, policy=policy, seed=seed)
        for seed in range(10)
    ]
    assert sum(map(fails, attempts)) >= 5


def test_a_missing_barrier_is_noticed_by_its_results():
    attempts = [functools.partial(exchange, exchange_library(32), no_barrier=True, seed=seed) for seed in range(10)]
    assert sum(map(fails, attempts)) >= 5


def test_a_missing_barrier_is_noticed_as_a_race():
    with pytest.raises(
        HostError, match=r"shared memory of unit \d.*: (not written before|a race with a \w+ by unit \d)"
    ):
        exchange(exchange_library(32, sanitize=True), no_barrier=True, policy="round_robin", stores="now")


@pytest.mark.parametrize("kind", ["drop", "hold", "flip"])
def test_a_word_that_never_comes_ends_in_a_report(kind):
    nth = 7 * UNITS * WORDS + 20
    _, done = exchange(exchange_library(32), timeout=20_000, fault=Fault(kind, nth), seed=3)
    assert done.faults == 1
    assert done.report["reason"] == 1
    assert done.report["token"] >= 6
    # Only words in the range count.
    _, done = exchange(exchange_library(32), fault=Fault(kind, 0, begin=2 * UNITS * WORDS * 4))
    assert done.faults == 0


# Unit 0 sends ten pairs of a value and then a flag. Bits of args.max_new_tokens: 1 release, 2 acquire.
FLAG = """
u32* words = (u32*)args.workspace;
if (arch::wave() == 0) {
  for (u32 i = 0; i < 10; i++) {
    if (arch::unit() == 0 && arch::lane() == 0) {
      arch::store_word(words + 2 * i, i + 100);
      if (args.max_new_tokens & 1) arch::release();
      arch::store_word(words + 2 * i + 1, 1);
    }
    if (arch::unit() != 0) {
      while (arch::load_word(words + 2 * i + 1) == 0) {}
      if (args.max_new_tokens & 2) arch::acquire();
      const u32 value = arch::load_word(words + 2 * i);
      if (arch::lane() == 0) ((u32*)args.k_cache)[arch::unit() * 10 + i] = value;
    }
  }
}
"""


@pytest.mark.parametrize("fences", [0, 1, 3])
def test_only_fences_order_two_words(fences):
    wrong = 0
    for seed in range(10):
        out = np.zeros((UNITS, 10), np.uint32)
        words = np.zeros(64, np.uint32)
        kernel = library((("flag", FLAG),), 32)
        gpu_host.run(kernel, {"k_cache": out, "workspace": words, "max_new_tokens": fences}, seed=seed)
        wrong += (out[1:] != np.arange(100, 110)).sum()
    assert (wrong == 0) == (fences == 3)


# ---- Matrix instructions ----

# One instruction of each unit: registers [units][lanes][4 of c, 4 of a, 2 of b] in args.streams, c to args.k_cache.
MMA = """
if (arch::wave() == 0) {
  const u32* from = (const u32*)args.streams + (arch::unit() * arch::kWave + arch::lane()) * 10;
  float c[4];
  for (int i = 0; i < 4; i++) c[i] = arch::as_f32(from[i]);
#if MK_WAVE_SIZE == 32
  const u32 a[4] = {from[4], from[5], from[6], from[7]};
  arch::mma_16x8x16<BF16>(c, a, from[8], from[9]);
#else
  const u32 a[2] = {from[4], from[5]}, b[2] = {from[8], from[9]};
  arch::mfma_4x4x4<BF16, LANES>(c, a, b);
#endif
  float* to = (float*)args.k_cache + (arch::unit() * arch::kWave + arch::lane()) * 4;
  for (int i = 0; i < 4; i++) to[i] = c[i];
}
"""


def pack(values: np.ndarray) -> np.ndarray:
    """Registers of two 16-bit elements each, along the last axis."""
    return np.ascontiguousarray(values).view(np.uint32)


def warp_fragments(a, b, c):
    """Registers [lanes, 10] of m16n8k16 from its matrices; and where c's elements are, [lanes, 4]."""
    # In 8x8 blocks of A and C a lane has two neighbours in a row: of block row lane // 4, columns lane % 4.
    blocks = a.reshape(2, 8, 2, 4, 2).transpose(1, 3, 2, 0, 4).reshape(32, 4 * 2)  # registers: row blocks vary fastest
    columns = b.T.reshape(8, 2, 4, 2).transpose(0, 2, 1, 3).reshape(32, 2 * 2)
    place = np.arange(128).reshape(2, 8, 4, 2).transpose(1, 2, 0, 3).reshape(32, 4)
    return np.concatenate([c.ravel()[place].view(np.uint32), pack(blocks), pack(columns)], axis=1), place


def wavefront_fragments(a, b, c):
    """The same of 16 blocks of 4x4x4: a, b, c [16, 4, 4]."""
    rows = np.zeros((64, 4), np.uint32)
    rows[:, :2] = pack(a.reshape(64, 4))
    place = np.arange(256).reshape(16, 4, 4).transpose(0, 2, 1).reshape(64, 4)
    columns = pack(b.transpose(0, 2, 1).reshape(64, 4))
    return np.concatenate([c.ravel()[place].view(np.uint32), rows, columns], axis=1), place


# Of how many equal parts of a wavefront's lanes the last operand comes from which: all lanes, halves, quarters.
LANES = [(1, 0), (2, 0), (2, 1), (4, 0), (4, 1), (4, 2), (4, 3)]


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize(("wave", "parts", "part"), [(32, 1, 0), *((64, *x) for x in LANES)], ids=lambda n: str(n))
def test_matrix_instructions_multiply_matrices(wave, parts, part, dtype):
    rng = np.random.default_rng(5)
    source = MMA.replace("BF16", str(dtype != np.float16).lower())
    cases = tuple((f"{x}", source.replace("LANES", f"{x[0]}, {x[1]}")) for x in (LANES if wave == 64 else LANES[:1]))
    kernel = library(cases, wave)
    shapes = [(16, 16), (16, 8), (16, 8)] if wave == 32 else [(16, 4, 4)] * 3
    registers, want, places = [], [], []
    for _ in range(UNITS):
        a, b, c = (rng.standard_normal(shape, np.float32) for shape in shapes)
        a[..., 0, :2] *= 2.0**-18  # float16: subnormal
        a, b = a.astype(dtype), b.astype(dtype)
        lanes, place = (warp_fragments if wave == 32 else wavefront_fragments)(a, b, c)
        registers.append(lanes)
        places.append(place)
        size = 16 // parts  # blocks of a part
        columns = b if wave == 32 else b[np.arange(16) % size + part * size]
        want.append((a.astype(np.float64) @ columns.astype(np.float64) + c).ravel())
    out = np.zeros((UNITS, wave, 4), np.float32)
    case = LANES.index((parts, part))
    gpu_host.run(kernel, {"streams": np.stack(registers), "k_cache": out, "eos_count": case})
    for i in range(UNITS):
        np.testing.assert_allclose(out[i], want[i][places[i]], rtol=0, atol=1e-5)


# ---- What is not forgiven ----

MISTAKES = {
    "half a wave shuffles": (
        "if (arch::lane() < 16) arch::shuffle(1u, 0);",
        r"lanes 0-15 wait at shuffle for lanes that have left",
    ),
    "branches meet at different places": (
        "if (arch::lane() == 3) arch::wave_sync();\nelse arch::any(true);",
        r"lane 3.*wave_sync while lanes 0-2 of the wave wait at any|at any while",
    ),
    "half a wave at a barrier": (
        "if (arch::lane() < 8) arch::unit_sync();",
        r"lanes 0-7 wait at unit_sync for lanes that have left",
    ),
    "a wave misses a barrier": (
        "if (arch::wave() != 2) arch::unit_sync();",
        r"nobody can go on:\n(.*\n)*unit 1, wave 3: lanes 0-\d+ wait at unit_sync",
    ),
    "waves meet in different orders": (
        "if (arch::wave() == 0) { arch::group_sync<1, 2>(); arch::group_sync<2, 2>(); }\n"
        "if (arch::wave() == 1) { arch::group_sync<2, 2>(); arch::group_sync<1, 2>(); }",
        r"nobody can go on:\n.*wait at group_sync<1, 2>.*\n.*wait at group_sync<2, 2>",
    ),
    "other waves meet": (
        "if (arch::wave() < 2) arch::group_sync<1, 2>();\narch::unit_sync();\n"
        "if (arch::wave() >= 2) arch::group_sync<1, 2>();",
        r"waves 2-3 meet at group_sync<1, 2>, where waves 0-1 met before",
    ),
    "sizes of a barrier": (
        "if (arch::wave() == 0) arch::group_sync<1, 2>();\nif (arch::wave() == 1) arch::group_sync<1, 3>();",
        r"group_sync<1, [23]>, but other waves wait there as group_sync<1, [23]>",
    ),
    "a word that nobody writes": (
        "while (arch::load_word((u32*)args.workspace) == 0) {}",
        r"no end after 30000 steps:\nunit 0, wave 0: lanes 0-\d+ were last at",
    ),
    "a word that is none": ("arch::load_word((u32*)args.streams);", r"is no word of an operand"),
    "a word outside": ("arch::store_word((u32*)args.workspace + 64, 1);", r"is no word of an operand"),
    "a misaligned load": ("arch::load_words((u32*)args.workspace + 1);", r"is no multiple of 16 bytes"),
    "a read beyond an operand": (
        "arch::load_once((const char*)args.streams + 8192);",
        r"is in none of the kernel's operands",
    ),
    "a write beside an operand": ("((u32*)args.k_cache)[64] = 1;", r"the kernel wrote beside k_cache"),
    "a write to what is only read": ("*(u32*)args.streams = 1;", r"the kernel changed streams"),
    "a write beyond shared memory": (
        "*(u32*)(arch::shared() + MK_SHARED_BYTES) = arch::unit();",
        r"unit 0 wrote outside its shared memory, at byte 8192 of 8192",
    ),
}
RING_MISTAKES = {
    32: {
        "a ring that is not waited for": (
            "r.start(arch::shared(), nullptr, args.streams, 8192); r.read<1>(0, w);",
            r"Ring::read of a slot that was not waited for",
        ),
        "a ring that is read too late": (
            "r.start(arch::shared(), nullptr, args.streams, 8192); r.wait(); r.done<2>(0); r.read<1>(1, w);",
            r"Ring::read of atom 1 or one after it, which is done",
        ),
        "a slot that is left too early": (
            "r.start(arch::shared(), nullptr, args.streams, 8192); r.wait(); r.done<4>(0); r.next();",
            r"Ring::next of a slot whose atoms are not all done",
        ),
        "a ring that is left open": (
            "r.start(arch::shared(), nullptr, args.streams, 8192);",
            r"left the kernel without Ring::drain",
        ),
        "half a slot": (
            "r.start(arch::shared(), nullptr, args.streams, 4096 + 512);",
            r"no whole number of slots",
        ),
    },
    64: {
        "a ring that is read too late": (
            "r.start(nullptr, nullptr, args.streams, 8192); r.done<2>(0); r.read<1>(1, w);",
            r"atom 1 of the ring, where atom 2 comes next",
        ),
        "an atom that is left out": (
            "r.start(nullptr, nullptr, args.streams, 8192); r.read<1>(0, w); r.read<1>(1, w);",
            r"atom 1 of the ring, where atom 0 comes next",
        ),
        "a ring that is left open": (
            "r.start(nullptr, nullptr, args.streams, 8192);",
            r"left the kernel without Ring::drain",
        ),
        "a stream that is too long": (
            "r.start(nullptr, nullptr, args.streams, 16384);",
            r"is in none of the kernel's operands",
        ),
    },
}
RING = """
#if defined(MK_REGISTER_RING)
struct Ring : arch::Ring {};
constexpr int kTurn = Ring::kAtoms;
#else
struct Ring : arch::Ring<1, 8> {};
constexpr int kTurn = Ring::kSlotAtoms;
#endif
"""

# What only instrumented builds notice: the body, and the message.
HIDDEN_MISTAKES = {
    "a lane reads what another one writes": (
        "u32* at = (u32*)arch::shared() + arch::wave() * 64;\nat[arch::lane()] = 1;\n"
        "const volatile u32 v = at[arch::lane() ^ 1]; (void)v;",
        r"shared memory of unit \d.*(a race with a write by unit \d, wave \d, lane \d+|not written before)",
    ),
    "a lane overwrites what another one reads": (
        "u32* at = (u32*)arch::shared() + arch::wave() * 64;\nat[arch::lane()] = 1;\narch::wave_sync();\n"
        "const volatile u32 v = at[arch::lane() ^ 1]; (void)v;\nat[arch::lane()] = 2;",
        r"shared memory of unit \d.*: a race with a (read|write) by unit \d, wave \d, lane \d+",
    ),
    "shared memory is read before it is written": (
        "const volatile u32 v = ((u32*)arch::shared())[arch::lane()]; (void)v;",
        r"reads byte \d+ of 8192 of shared memory of unit \d.*: not written before",
    ),
    "an unwritten part of the workspace is read": (
        "const volatile u32 v = ((u32*)args.workspace)[40]; (void)v;",
        r"reads byte 32 of 128 of workspace behind the words.*: not written before",
    ),
    "units write the same byte": (
        "if (arch::wave() == 0 && arch::lane() == 0) *(char*)args.k_cache = 1;",
        r"writes byte 0 of 256 of k_cache.*: a race with a write by unit \d, wave 0, lane 0",
    ),
    "a unit reads what was not released": (
        "u32* words = (u32*)args.workspace;\n"
        "if (arch::wave() == 0 && arch::lane() == 0) {\n"
        "  if (arch::unit() == 0) { *(u32*)args.k_cache = 1; arch::store_word(words, 1); }\n"
        "  if (arch::unit() == 1) {\n"
        "    while (arch::load_word(words) == 0) {}\n"
        "    arch::acquire(); const volatile u32 v = *(u32*)args.k_cache; (void)v;\n"
        "  }\n"
        "}",
        r"reads byte 0 of 256 of k_cache.*: a race with a write by unit 0",
    ),
    "a unit reads what it did not acquire": (
        "u32* words = (u32*)args.workspace;\n"
        "if (arch::wave() == 0 && arch::lane() == 0) {\n"
        "  if (arch::unit() == 0) { *(u32*)args.k_cache = 1; arch::release(); arch::store_word(words, 1); }\n"
        "  if (arch::unit() == 1) {\n"
        "    while (arch::load_word(words) == 0) {}\n"
        "    arch::load_shared_data(args.k_cache);\n"
        "  }\n"
        "}",
        r"reads byte 0 of 256 of k_cache.*: a race with a write by unit 0",
    ),
    "a release before the barrier": (
        "if (arch::unit() == 0) {\n"
        "  if (arch::wave() == 1 && arch::lane() == 0) *(u32*)args.k_cache = 1;\n"
        "  if (arch::wave() == 0 && arch::lane() == 0) {\n"
        "    for (int i = 0; i < 100; i++) arch::ticks();\n"
        "    arch::release(); arch::store_word((u32*)args.workspace, 1);\n"
        "  }\n"
        "}\n"
        "if (arch::unit() == 1 && arch::wave() == 0 && arch::lane() == 0) {\n"
        "  while (arch::load_word((u32*)args.workspace) == 0) {}\n"
        "  arch::acquire(); const volatile u32 v = *(u32*)args.k_cache; (void)v;\n"
        "}",
        r"reads byte 0 of 256 of k_cache.*: a race with a write by unit 0, wave 1, lane 0",
    ),
    "a read beyond an operand": (
        "const volatile u32 v = ((u32*)args.streams)[2048 + arch::lane()]; (void)v;",
        r"is in none of the kernel's operands",
    ),
    "a write beyond shared memory": (
        "((u32*)arch::shared())[MK_SHARED_BYTES / 4] = 1;",
        r"is in none of the kernel's operands|writes byte 8192 of 8192",
    ),
    "a misaligned vector": (
        "const volatile u32 v = ((Vec4*)((char*)args.streams + 8))->x; (void)v;",
        r"undefined behaviour: a null or misaligned pointer",
    ),
    "an index outside its array": (
        "volatile int i = 4; float c[4] = {}; const volatile float v = c[i]; (void)v;",
        r"undefined behaviour: an index outside its array",
    ),
    "a shift by too much": (
        "volatile int i = 32; const volatile u32 v = 1u << i; (void)v;",
        r"undefined behaviour: a shift by too much",
    ),
}
HARMLESS = {
    "waves that add to a counter": (
        "u32* counter = (u32*)arch::shared();\n"
        "if (arch::wave() == 0 && arch::lane() == 0) *counter = 0;\narch::unit_sync();\n"
        "arch::shared_add(counter, 1);\narch::unit_sync();\n"
        "if (*counter != arch::kWave * 4) arch::load_word(nullptr);"
    ),
    "a hand-over inside a wave": (
        "u32* at = (u32*)arch::shared() + arch::wave() * 64;\nat[arch::lane()] = 1;\narch::wave_sync();\n"
        "const volatile u32 v = at[arch::lane() ^ 1]; (void)v;\narch::wave_sync();\nat[arch::lane()] = 2;"
    ),
    "data that is released and acquired": (
        "u32* words = (u32*)args.workspace;\n"
        "if (arch::unit() == 0 && arch::wave() == 1) *((u32*)args.k_cache + arch::lane()) = 1;\n"
        "arch::unit_sync();\n"
        "if (arch::wave() == 0) {\n"
        "  if (arch::unit() == 0 && arch::lane() == 0) { arch::release(); arch::store_word(words, 1); }\n"
        "  if (arch::unit() == 1) { while (arch::load_word(words) == 0) {} arch::acquire(); }\n"
        "}\n"
        "arch::unit_sync();\n"
        "if (arch::unit() == 1) { const volatile u32 v = ((u32*)args.k_cache)[arch::lane()]; (void)v; }"
    ),
    "a ring": (
        "if (arch::wave() == 0) {\n"
        "  Ring r; Vec4 w[2]; r.start(arch::shared(), nullptr, args.streams, 8 * arch::kWave * 16);\n"
        "  for (int turn = 0; turn < 3; turn++) {\n"
        "    r.wait();\n"
        "    for (int i = 0; i < kTurn; i += 2) {\n"
        "      r.read<2>(i, w); r.done<2>(i);\n"
        "      const u32 want = ((const u32*)args.streams)[(i % 8 * arch::kWave + arch::lane()) * 4];\n"
        "      if (w[0].x != want) arch::load_word(nullptr);\n"
        "    }\n"
        "    r.next();\n"
        "  }\n"
        "  r.drain();\n"
        "}"
    ),
}


def bodies(cases: dict) -> tuple[tuple[str, str], ...]:
    return tuple((name, case if isinstance(case, str) else case[0]) for name, case in cases.items())


def run_case(cases: dict, name: str, wave: int, *, sanitize: bool, **options) -> None:
    kernel = library(bodies(cases), wave, sanitize, RING)
    args = {
        "streams": np.arange(2048, dtype=np.uint32),
        "k_cache": np.zeros(64, np.uint32),
        "workspace": np.zeros(64, np.uint32),
        "eos_count": list(cases).index(name),
    }
    gpu_host.run(kernel, args, exchange_bytes=128, max_steps=30_000, **options)


@WAVE_SIZES
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name, wave):
    with pytest.raises(HostError) as error:
        run_case(MISTAKES, name, wave, sanitize=False, policy="forward")
    assert re.search(MISTAKES[name][1], str(error.value)), error.value


@pytest.mark.parametrize(("wave", "name"), [(wave, name) for wave in (32, 64) for name in RING_MISTAKES[wave]])
def test_mistakes_with_a_ring_are_named(wave, name):
    cases = {
        name: ("Ring r; [[maybe_unused]] Vec4 w[1]; " + body, m) for name, (body, m) in RING_MISTAKES[wave].items()
    }
    with pytest.raises(HostError) as error:
        run_case(cases, name, wave, sanitize=False)
    assert re.search(cases[name][1], str(error.value)), error.value


@pytest.mark.parametrize("name", HIDDEN_MISTAKES)
def test_instrumented_builds_find_mistakes_without_effect(name):
    with pytest.raises(HostError) as error:
        run_case(HIDDEN_MISTAKES, name, 32, sanitize=True, policy="round_robin", stores="now")
    assert re.search(HIDDEN_MISTAKES[name][1], str(error.value)), error.value


@WAVE_SIZES
@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_allowed_is_no_mistake(name, wave):
    for seed in range(3):
        run_case(HARMLESS, name, wave, sanitize=True, seed=seed)
