"""The timeline tool of benchmarks/ on made-up timelines."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

_REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_REPOSITORY))

from benchmarks import timeline  # noqa: E402


def made_up() -> np.ndarray:
    """Two tracks; the second begins 100 ns later and has one event less."""
    events = np.zeros((2, 8, 2), np.uint64)
    for track, delay in enumerate((0, 100)):
        for i, event in enumerate((0, 2, 3, 21)[: 4 - track]):
            events[track, i] = (1000 * i << 8 | event, 5_000 + delay + 500 * i)
    return events


def test_spans_end_with_their_event():
    first, second = timeline.spans(made_up())
    assert first == [("await qkv", 0, 500), ("publish qkv", 500, 1000), ("attend", 1000, 1500)]
    assert second == [("multiply qkv", 100, 600), ("publish qkv", 600, 1100)]


def test_the_table_adds_up():
    lines = timeline.table(made_up()).splitlines()
    assert [line.split()[0] for line in lines] == ["service"] * 3 + ["stream"] * 2
    assert lines[0].split()[:4] == ["service", "await", "qkv", "0.50"]
    assert lines[-1].split()[-4:] == ["0.50", "0.50", "0.50", "us"]


def test_the_table_is_of_a_token_where_tracks_hold_several():
    """Of unlike numbers: 2.5 tokens of 900 ns by the service wave, and a stream wave that only multiplies."""
    events = np.zeros((2, 8, 2), np.uint64)
    start, multiplied = timeline.EVENTS.index("start of a token"), timeline.EVENTS.index("multiply head")
    for i, (event, time) in enumerate([(start, 0), (start, 900), (2, 1300), (start, 1800), (2, 2250)]):
        events[0, i] = (i << 8 | event, 5_000 + time)
    for i in range(8):
        events[1, i] = (i << 8 | multiplied, 5_000 + 450 * i)
    lines = timeline.table(events).splitlines()
    assert [line.split()[:6] for line in lines if line.startswith("stream")] == [
        ["stream", "multiply", "head", "0.90", "us", "a"]
    ]
    assert "".join(lines).count("us a token") == 3


def test_names_are_those_of_the_kernel():
    text = (_REPOSITORY / "ffi/gpu/kernel/service.h").read_text()
    body = re.sub(r"//.*", "", text[text.index("enum Event") : text.index("constexpr int kTraceEvents")])
    names = re.findall(r"\bk[A-Z]\w+", body.replace("kPhaseEvents * kPhases", ""))
    assert names[:4] == ["kGathered", "kFilled", "kMultiplied", "kPublished"]
    assert len(timeline.EVENTS) == 4 * 5 + len(names) - 4
    assert names[4:] == ["kPrepared", "kAttended", "kCombined", "kTokenStart", "kCandidates", "kChosen", "kKnown"]


def test_files(tmp_path):
    np.save(tmp_path / "t.npy", made_up())
    arguments = [str(tmp_path / "t.npy"), "--trace", str(tmp_path / "t.json")]
    timeline.main(arguments)
    trace = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert [e["name"] for e in trace if e["tid"] == 1] == ["thread_name", "multiply qkv", "publish qkv"]
    assert trace[1]["dur"] == 0.5
    pytest.importorskip("matplotlib", reason="pictures need matplotlib (pip install .[bench])")
    timeline.main([*arguments, "--picture", str(tmp_path / "t.svg")])
    assert (tmp_path / "t.svg").read_text().count("unit") >= 2


@pytest.mark.parametrize(
    ("events", "message"),
    [
        (np.zeros((2, 8), np.uint64), "a timeline is u64"),
        (np.zeros((2, 8, 2), np.uint64), "the timeline is empty"),
        (np.full((1, 2, 2), 250, np.uint64), "event 250 is not one of"),
    ],
)
def test_other_arrays_are_refused(events, message):
    with pytest.raises(ValueError, match=message):
        timeline.spans(events)
