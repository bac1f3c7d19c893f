"""Turns the timeline of a traced kernel into a trace for Perfetto or chrome://tracing, and into a picture.

python -m benchmarks.gpu_kernel qwen3-0.6b --trace timeline.npy
python -m benchmarks.timeline timeline.npy --trace timeline.json --picture timeline.svg --table
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from jax_monokernel.plan import PHASES

# What has just ended when a track's first lane records an event: enum Event of ffi/gpu/kernel/service.h.
EVENTS = (
    *(f"{what} {phase}" for phase in PHASES for what in ("gather", "fill", "multiply", "publish")),
    "prepare heads",
    "attend",
    "combine",
    "start of a token",
    "find candidates",
    "choose",
    "learn the token",
)
_COLOURS = {
    "gather": "#c8c8c8",
    "fill": "#a0a0a0",
    "await": "#ececec",
    "multiply": "#2f6fb5",
    "publish": "#d9a441",
    "prepare": "#7fb069",
    "attend": "#3d7a3a",
    "combine": "#9ccc8f",
}
_OTHER = "#b04a5a"


def spans(timeline: np.ndarray) -> list[list[tuple[str, int, int]]]:
    """For each track what its wave did: (what, begin, end) in nanoseconds after the first event.

    A unit has two tracks, one after the other: its first service wave, its first stream wave.

    Args:
      timeline: u64 [tracks, events, 2]: clock ticks shifted left by 8 bits beside the event's number, then nanoseconds
        of a clock that all units share; zeros after a track's last event.

    Raises:
      ValueError: an array of another shape, or with events that this version does not know.
    """
    if timeline.ndim != 3 or timeline.shape[2] != 2 or timeline.dtype != np.uint64:
        raise ValueError(f"a timeline is u64 [tracks, events, 2]; this is {timeline.dtype} {list(timeline.shape)}")
    recorded = timeline[..., 1] > 0
    if not recorded.any():
        raise ValueError("the timeline is empty: traces begin with the 17th token of a launch")
    start = int(timeline[..., 1][recorded].min())
    found = []
    for number, (track, known) in enumerate(zip(timeline, recorded, strict=True)):
        events, times = track[known, 0] & np.uint64(255), track[known, 1].astype(np.int64) - start
        if events.size and int(events.max()) >= len(EVENTS):
            raise ValueError(f"event {int(events.max())} is not one of the {len(EVENTS)} that are known here")
        steps = zip(events[1:].tolist(), times[:-1].tolist(), times[1:].tolist(), strict=True)
        # Service waves wait while the stream waves, if those have a track, gather and multiply.
        waits = number % 2 == 0 and number + 1 < len(timeline) and bool(recorded[number + 1].any())
        found.append([(_waiting(EVENTS[event]) if waits else EVENTS[event], begin, end) for event, begin, end in steps])
    return found


def _waiting(what: str) -> str:
    kind, _, rest = what.partition(" ")
    return f"await {rest}" if kind in ("fill", "multiply") else what


def chrome_trace(timeline: np.ndarray) -> dict[str, Any]:
    """The trace as Chrome's JSON: a thread for each track."""
    events: list[dict[str, Any]] = []
    for track, done in enumerate(spans(timeline)):
        events.append({"name": "thread_name", "ph": "M", "pid": 0, "tid": track, "args": {"name": _name(track)}})
        for what, begin, end in done:
            span = {"name": what, "ph": "X", "pid": 0, "tid": track, "ts": begin / 1e3, "dur": (end - begin) / 1e3}
            events.append(span)
    return {"traceEvents": events, "displayTimeUnit": "ns"}


def table(timeline: np.ndarray) -> str:
    """A line for what each kind of wave does: how long in a token, how often, and how long at a time, in microseconds.

    How long in a token is the mean over all units: a kind's share of what its tracks show, of the time from one token's
    start to the next (median), because tracks are cut where their memory ends. Without two starts it is the time a
    unit took. At a time: the tenth percentile, the median and the ninetieth percentile.
    """
    shown = spans(timeline)
    starts = [[end for what, _, end in track if what == "start of a token"] for track in shown[::2]]
    between = np.concatenate([np.diff(track) for track in starts]) if starts else np.array([])
    token = float(np.median(between)) / 1e3 if between.size else None
    lines = []
    for kind in range(2):
        found: dict[str, list[int]] = {}
        for track in shown[kind::2]:
            for what, begin, end in track:
                found.setdefault(what, []).append(end - begin)
        whole = sum(map(sum, found.values())) / 1e3
        for what in sorted(found, key=lambda name: -sum(found[name])):
            micros = np.array(found[what]) / 1e3
            each = (
                f"{micros.sum() / whole * token:9.2f} us a token"
                if token
                else f"{micros.sum() / len(shown[kind::2]):9.2f} us"
            )
            spread = " ".join(f"{value:7.2f}" for value in np.percentile(micros, [10, 50, 90]))
            lines.append(f"{('service', 'stream')[kind]:8s} {what:22s} {each}, {len(micros):7d} times, {spread} us")
    return "\n".join(lines)


def _name(track: int) -> str:
    return f"unit {track // 2}, {('service', 'stream')[track % 2]}"


def draw(timeline: np.ndarray, path: Path, tracks: list[int], begin: float, end: float) -> None:
    """Bars of what some tracks show from `begin` to `end` (microseconds), as SVG."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    figure, axes = pyplot.subplots(figsize=(11, 0.35 * len(tracks) + 1.4))
    shown = spans(timeline)
    for row, track in enumerate(tracks):
        for what, first, last in shown[track]:
            if last / 1e3 >= begin and first / 1e3 <= end:
                colour = _COLOURS.get(what.split()[0], _OTHER)
                axes.broken_barh([(first / 1e3, (last - first) / 1e3)], (row - 0.4, 0.8), facecolors=colour)
    axes.set_xlim(begin, end)
    axes.set_yticks(range(len(tracks)), [_name(track) for track in tracks])
    axes.set_xlabel("microseconds")
    handles = [Patch(color=colour, label=name) for name, colour in _COLOURS.items()]
    axes.legend(handles=handles, ncols=len(handles), loc="lower center", bbox_to_anchor=(0.5, 1), fontsize=7)
    figure.tight_layout()
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Writes the files that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("timeline", type=Path, help="what benchmarks.gpu_kernel --trace wrote")
    parser.add_argument("--trace", type=Path, help="Chrome trace (JSON)")
    parser.add_argument("--table", action="store_true", help="print how long waves take for what")
    parser.add_argument("--picture", type=Path, help="SVG; needs matplotlib")
    parser.add_argument("--units", default="0,1,40,80,120", help="two rows of the picture each")
    parser.add_argument("--begin", type=float, default=0.0, help="of the picture, microseconds")
    parser.add_argument("--length", type=float, default=40.0, help="of the picture, microseconds")
    options = parser.parse_args(argv)
    timeline = np.load(options.timeline, allow_pickle=False)
    try:
        if options.trace:
            options.trace.write_text(json.dumps(chrome_trace(timeline)))
        if options.table:
            print(table(timeline))
        if options.picture:
            units = [unit for unit in map(int, options.units.split(",")) if 0 <= 2 * unit < len(timeline)]
            tracks = [2 * unit + i for unit in units for i in (1, 0)]
            draw(timeline, options.picture, tracks, options.begin, options.begin + options.length)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
