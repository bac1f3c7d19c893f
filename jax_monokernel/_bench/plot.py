"""Pictures of results: tokens per second and milliseconds per token of each peer."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

NAMES = {
    "ours": "jax_monokernel",
    "llama_cpp": "llama.cpp",
    "transformers": "transformers",
    "jax_loop": "jitted JAX loop",
}
COLOURS = {"ours": "#2f6fb5", "llama_cpp": "#a0a0a0", "transformers": "#b04a5a", "jax_loop": "#d9a441"}
# With these equal results give an equal file.
SVG_SETTINGS: dict[Any, Any] = {"svg.hashsalt": "benchmarks", "svg.fonttype": "none"}


def check(path: Path) -> None:
    """Raises what would keep `draw` from working, before anything is measured.

    Raises:
      ValueError: another format than .svg or .png, no such folder, or no matplotlib.
    """
    if path.suffix not in (".svg", ".png"):
        raise ValueError(f"{path} has another format than .svg or .png")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{path} lies in a folder that is not there")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError('pictures need matplotlib: pip install "jax-monokernel[pictures]"')


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """A column for each model, a group of bars for each workload: tokens per second and milliseconds per step.

    The read roof is a line; whiskers are the tenth and ninetieth percentile.

    Args:
      results: as `jax-monokernel bench` writes them.
      path: .svg or .png.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    columns: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        columns.setdefault(result["workload"]["model"], []).append(result)
    widths = [len(column) for column in columns.values()]
    figure = Figure(figsize=(max(5.0, 1.5 * len(results) + 1.5 * len(columns)), 6.2), layout="constrained")
    canvas = (FigureCanvasSVG if path.suffix == ".svg" else FigureCanvasAgg)(figure)
    panels = figure.subplots(2, len(columns), squeeze=False, sharex="col", width_ratios=widths)
    kinds = [kind for kind in NAMES if any(kind in result["peers"] for result in results)]
    for (speed, latency), (model, column) in zip(panels.T, columns.items(), strict=True):
        _draw_column(speed, latency, column, kinds)
        speed.set_title(model, fontsize=9)
    panels[0, 0].set_ylabel("tokens per second")
    panels[1, 0].set_ylabel("ms per step, p10 to p90")
    handles = {
        label: handle for axes in panels[0] for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), fontsize=7, loc="outside upper center", ncols=len(handles))
    figure.supxlabel("\n".join(dict.fromkeys(where(result) for result in results)), fontsize=7)
    metadata = {"Date": None} if path.suffix == ".svg" else None
    with matplotlib.rc_context(SVG_SETTINGS):
        canvas.print_figure(path, metadata=metadata)


def _draw_column(speed: Any, latency: Any, results: list[dict[str, Any]], kinds: list[str]) -> None:
    """The bars of one model on two axes."""
    width = 0.8 / len(kinds)
    for number, kind in enumerate(kinds):
        there = [i for i, result in enumerate(results) if kind in result["peers"]]
        if not there:
            continue
        numbers = [results[i]["peers"][kind] for i in there]
        x = np.array(there) + (number - (len(kinds) - 1) / 2) * width
        bars = speed.bar(
            x, [n["tokens_per_second"] for n in numbers], width * 0.95, label=NAMES[kind], color=COLOURS[kind]
        )
        speed.bar_label(bars, fmt="{:.4g}", fontsize=7)
        ms = [n["ms_per_step"] for n in numbers]
        spread = np.array([[m["median"] - m["p10"], m["p90"] - m["median"]] for m in ms]).T
        latency.bar(x, [m["median"] for m in ms], width * 0.95, yerr=spread, capsize=2, color=COLOURS[kind])
    for i, result in enumerate(results):
        if "probe" in result["peers"]:
            workload, rate = result["workload"], result["peers"]["probe"]["gb_per_second"] * 1e9
            roof = workload["batch"] * rate / workload["bytes_per_step"]
            line = {"color": "#444444", "linestyle": "--", "linewidth": 1}
            speed.hlines(roof, i - 0.45, i + 0.45, label="read roof", **line)
    work = [result["workload"] for result in results]
    labels = [f"batch {w['batch']}\nprompt {w['prompt_tokens']}" for w in work]
    latency.set_xticks(range(len(results)), labels, fontsize=7)
    for axes in (speed, latency):
        axes.margins(y=0.15)
        axes.spines[["top", "right"]].set_visible(False)


def where(result: dict[str, Any]) -> str:
    """Device, driver and commit of a result, for a picture."""
    commit = (result["commit"] or f"version {result['versions'].get('jax-monokernel', 'unknown')}")[:20]
    name = result.get("device", {}).get("name") or result["machine"]["cpu"]
    driver = result.get("device", {}).get("driver_version")
    threads = result["workload"].get("threads")
    parts = [name, driver and f"driver {driver}", threads and f"{threads} threads", f"commit {commit}"]
    return ", ".join(filter(None, parts)) + (" with changes" if result["dirty"] else "")
