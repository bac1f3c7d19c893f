"""The tables of docs/amd.md held against machine code: scope bits and waits of hand-offs, instructions per KiB."""

from __future__ import annotations

import re

import pytest
from amd_code import Kernel, instructions, needs_clang
from amd_review import Instruction, cost, review
from decoding import spec_of
from gpu_host import ROOT
from test_gpu_cross_compile import LARGE, kernel_atoms, large

from jax_monokernel.plan import Plan, make_plan

pytestmark = needs_clang

KERNELS = {
    "llama-gfx942": lambda: large("gfx942", 1),
    "splits-gfx950": lambda: Kernel(spec_of("nope", "bfloat16"), Plan(platform="rocm", units=7), 1, 2, arch="gfx950"),
}


@pytest.fixture(scope="module", params=KERNELS)
def reviewed(request) -> tuple[Instruction, ...]:
    return review(KERNELS[request.param]())


def table(heading: str) -> list[list[str]]:
    """The cells of a table in docs/amd.md, without its header."""
    text = (ROOT / "docs" / "amd.md").read_text()
    section = text[text.index(f"## {heading}\n") :]
    rows = re.search(r"^\|.*\n\|[-|: ]+\|\n((?:\|.*\n)+)", section, re.MULTILINE)
    assert rows is not None, heading
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[1].splitlines()]


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]*)`", cell)


OPERATIONS = {code(name)[0]: code(wanted) for name, wanted, _ in table("Scope bits")}
NEAR_OPERATIONS = {code(name)[0]: code(wanted) for name, wanted, _ in table("Inside an XCD")}
HANDOFFS = {row[0].split(",")[0]: row[1:] for row in table("Hand-offs, instruction by instruction")}


# ---- Scope bits ----


def test_lines_change_no_instruction():
    kernel = KERNELS["llama-gfx942"]()

    def code_of(path):
        return [re.sub(r"\.L\w+", "label", line) for line in instructions(path)]

    assert code_of(kernel.assembly_with_lines) == code_of(kernel.assembly)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_are_the_instructions_of_the_table(reviewed, operation):
    mine = {i.text for i in reviewed if i.functions[:1] == (operation,) and not i.text.startswith("s_waitcnt")}
    assert mine == {text for text in OPERATIONS[operation] if not text.startswith("s_waitcnt")}


def test_scope_bits_are_where_the_table_has_them_and_nowhere_else(reviewed):
    for instruction in reviewed:
        if not re.search(r" (sc0|sc1|nt)|^buffer_", instruction.text):
            continue
        function = instruction.functions[0] if instruction.functions else "?"
        if function in ("?", "monokernel") and instruction.text == "global_load_dwordx4 nt":
            continue  # weights: the compiler has moved the load
        assert instruction.text in OPERATIONS.get(function, []), instruction


def test_scope_bits_where_pages_are_placed():
    """The table of pages is only read, so its loads need none; the numbers of units are taken by atomic additions."""
    found = review(large("gfx942", 1, placed=True))
    wanted = OPERATIONS | {"add": NEAR_OPERATIONS["add"]}
    for instruction in found:
        if re.search(r" (sc0|sc1|nt)|^buffer_", instruction.text) and instruction.text != "global_load_dwordx4 nt":
            assert instruction.text in wanted.get(instruction.functions[0], []), instruction
    looks = {i.text for i in found if i.functions[:1] == ("look",) and not i.text.startswith("s_waitcnt")}
    assert looks == {"global_load_dwordx2"}


def loads_words(instruction: Instruction) -> bool:
    """Whether it loads words of a hand-off, until they are there."""
    waits = {"wait_words", "wait_word_places"} & set(instruction.functions)
    return bool(waits) and instruction.text.startswith("global_load") and "give_up" not in instruction.functions


SUMS = {name: cells for name, cells in HANDOFFS.items() if name.endswith("_sums")}  # of plans with groups only


@pytest.mark.parametrize("handoff", [name for name in HANDOFFS if name not in SUMS])
def test_every_handoff_is_written_and_read_past_the_caches(reviewed, handoff):
    writers, readers, _ = (set(code(cell)) for cell in HANDOFFS[handoff])
    if handoff == "h3_partial" and not any("p2_combine" in i.functions for i in reviewed):
        pytest.skip("this kernel has one split")
    stores = [i for i in reviewed if i.functions[:1] == ("store_word",) and writers & set(i.functions)]
    loads = [i for i in reviewed if loads_words(i) and readers & set(i.functions)]
    assert {i.text for i in stores} == {"global_store_dword sc1"}
    assert loads
    assert {i.text for i in loads} <= {"global_load_dwordx2 sc1", "global_load_dword sc1"}


def test_every_wait_for_words_is_in_the_table(reviewed):
    readers = {function for _, names, _ in HANDOFFS.values() for function in code(names)}
    for instruction in filter(loads_words, reviewed):
        assert readers & set(instruction.functions), instruction


def test_caches_are_written_back_before_the_candidates_and_dropped_after_them(reviewed):
    texts = [i.text for i in reviewed]
    (write_back,) = (n for n, text in enumerate(texts) if text == "buffer_wbl2 sc1")
    assert reviewed[write_back].functions[:2] == ("release", "publish_candidates")
    (drop,) = (n for n, text in enumerate(texts) if text == "buffer_inv sc1")
    assert reviewed[drop].functions[:2] == ("acquire", "choose")
    assert re.match(r"s_waitcnt vmcnt\(0\)", texts[drop - 1])
    # The logits are read after that, and only there.
    logits = [
        n for n, i in enumerate(reviewed) if "load_shared_data" in i.functions and i.text.startswith("global_load")
    ]
    assert logits
    assert all({"request", "choose"} <= set(reviewed[n].functions) for n in logits)


# ---- Words that stay inside an XCD ----

NEAR_HANDOFFS = ("h1_qkv", "h2_attended", "h3_partial", "h4_projected", "h5_inner", "h6_residual", "h9_final")


@pytest.fixture(scope="module", params=["gfx942", "gfx950"])
def near(request) -> tuple[Instruction, ...]:
    return review(large(request.param, 1, groups=8, near=True))


@pytest.mark.parametrize("operation", NEAR_OPERATIONS)
def test_operations_inside_an_xcd(near, operation):
    mine = {i.text for i in near if i.functions[:1] == (operation,) and not i.text.startswith("s_waitcnt")}
    assert mine == set(NEAR_OPERATIONS[operation])


def test_scope_bits_inside_an_xcd_are_nowhere_else(near):
    for instruction in near:
        if not re.search(r" (sc0|sc1|nt)|^buffer_", instruction.text) or instruction.text == "global_load_dwordx4 nt":
            continue
        function = instruction.functions[0] if instruction.functions else "?"
        assert instruction.text in (OPERATIONS | NEAR_OPERATIONS).get(function, []), instruction


def test_sums_cross_xcds_and_what_groups_exchange_does_not(near):
    writers, readers = ({f for h in NEAR_HANDOFFS for f in code(HANDOFFS[h][column])} for column in (0, 1))
    stores = [i for i in near if i.functions[:1] in (("store_word",), ("store_near_word",))]
    inside = [
        i for i in stores if (writers | {"reduce_sums"}) & set(i.functions) and "prepare_heads" not in i.functions
    ]
    assert {i.functions[0] for i in inside} == {"store_near_word"}
    loads = [i for i in near if loads_words(i)]
    assert SUMS.keys() == {"h10_out_sums", "h11_down_sums"}
    for handoff, (stored, waited, _) in SUMS.items():
        sums = [i for i in stores if set(code(stored)) & set(i.functions)]
        assert {(i.functions[0], i.text) for i in sums} == {("store_word", "global_store_dword sc1")}, handoff
        gathered = {i.text for i in loads if set(code(waited)) & set(i.functions)}
        assert gathered
        assert gathered <= {"global_load_dwordx2 sc1", "global_load_dword sc1"}
    across = {"gather_candidates", "p7_sample", "reduce_sums"}
    for instruction in loads:
        stays = not across & set(instruction.functions)
        assert not stays or readers & set(instruction.functions), instruction
        assert instruction.functions[0].startswith("load_near_word" if stays else "load_word"), instruction


def test_the_l1_is_dropped_before_every_look(near):
    """Measured by others on an MI300X: without that, neither plain loads nor those with sc0 ever see a change."""
    accesses = [i for i in near if not i.text.startswith("s_waitcnt")]
    looks = [n for n, i in enumerate(accesses) if i.functions[0].startswith("load_near_word")]
    assert looks
    for n in looks:
        before = next(i for i in reversed(accesses[:n]) if not i.functions[0].startswith("load_near_word"))
        assert before.functions[0] == "look_again", (before, accesses[n])


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_write_back_is_waited_for(kernel):
    """It counts as a memory operation. Compilers before LLVM's change 178316 do not know, so arch::release waits."""
    lines = instructions(KERNELS[kernel]().assembly)
    (write_back,) = (n for n, line in enumerate(lines) if line.startswith("buffer_wbl2"))
    assert re.match(r"s_waitcnt .*vmcnt\(0\)", lines[write_back + 1])


# ---- How fast instructions let weights go ----

# Published bandwidth that reading alone reaches, compute units and clock.
DEVICES = {"gfx942": (4.24e12, 304, 2.1e9), "gfx950": (6.9e12, 256, 2.4e9)}
NEEDED = 1.3
RATES = table("Instructions for a KiB of weights")


@pytest.mark.parametrize(("arch", "batch"), [("gfx942", 1), ("gfx950", 16)])
def test_looking_pages_up_takes_few_instructions(arch, batch):
    plain, placed = (cost(large(arch, batch, placed=p), kernel_atoms()) for p in (False, True))
    assert placed.group_slots / placed.group_atoms < plain.group_slots / plain.group_atoms + 1
    assert placed.slots < 1.01 * plain.slots


@pytest.mark.parametrize("row", RATES, ids=lambda row: "-".join(row[:3]))
def test_issuing_is_faster_than_memory(row):
    device, batch, chunk, slots, flush, chunk_end, per_atom, ratio = row
    arch, _, groups = device.removesuffix(" groups").partition(", ")
    kernel = large(arch, int(batch), chunk_atoms=int(chunk), groups=int(groups or 1), near=bool(groups))
    counted = cost(kernel, kernel_atoms())
    bandwidth, units, clock = DEVICES[arch]
    rate = counted.rate(kernel.plan.waves) * units * clock / bandwidth
    in_run = counted.group_slots / counted.group_atoms
    found = (in_run, counted.flush_slots, counted.chunk_slots, counted.slots, 1 / rate)
    said = (float(slots), float(flush), float(chunk_end), float(per_atom), 1 / float(ratio))
    assert all(a <= 1.05 * b for a, b in zip(found, said, strict=True)), f"docs/amd.md: {found[:4]}, {rate:.2f}"
    assert rate >= NEEDED, f"instructions allow {rate:.2f} of what memory gives"


def test_the_table_has_the_plans_that_are_chosen():
    rows = {(device, int(batch), int(chunk)) for device, batch, chunk, *_ in RATES}
    for arch, (_, units, _) in DEVICES.items():
        plan = make_plan(LARGE, platform="rocm", units=units)
        assert {(arch, batch, plan.chunk_atoms) for batch in (1, 16)} <= rows
        assert plan.groups == 1
