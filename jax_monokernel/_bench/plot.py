"""Pictures of results: tokens per second and milliseconds per token of each peer."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

_NAMES = {"ours": "jax_monokernel", "jax_loop": "jitted JAX loop"}
_COLOURS = {"ours": "#2f6fb5", "jax_loop": "#d9a441"}


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
    """One group of bars for each result; the read roof as a line over it, tenth to ninetieth percentile as whiskers.

    Args:
      results: as `jax-monokernel bench` writes them.
      path: .svg or .png.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(5.0, 1.6 * len(results) + 2), 6.2), layout="constrained")
    canvas = (FigureCanvasSVG if path.suffix == ".svg" else FigureCanvasAgg)(figure)
    speed, latency = figure.subplots(2, 1, sharex=True)
    kinds = [kind for kind in _NAMES if any(kind in result["peers"] for result in results)]
    width = 0.8 / len(kinds)
    for number, kind in enumerate(kinds):
        there = [i for i, result in enumerate(results) if kind in result["peers"]]
        numbers = [results[i]["peers"][kind] for i in there]
        x = np.array(there) + (number - (len(kinds) - 1) / 2) * width
        bars = speed.bar(
            x, [n["tokens_per_second"] for n in numbers], width * 0.95, label=_NAMES[kind], color=_COLOURS[kind]
        )
        speed.bar_label(bars, fmt="%.0f", fontsize=7)
        ms = [n["ms_per_step"] for n in numbers]
        spread = np.array([[m["median"] - m["p10"], m["p90"] - m["median"]] for m in ms]).T
        latency.bar(x, [m["median"] for m in ms], width * 0.95, yerr=spread, capsize=2, color=_COLOURS[kind])
    for i, result in enumerate(results):
        if "probe" in result["peers"]:
            workload, rate = result["workload"], result["peers"]["probe"]["gb_per_second"] * 1e9
            roof = workload["batch"] * rate / workload["bytes_per_step"]
            label = "read roof" if i == 0 else None
            speed.hlines(roof, i - 0.45, i + 0.45, color="#444444", linestyle="--", linewidth=1, label=label)
    speed.set_ylabel("tokens per second")
    latency.set_ylabel("ms per step, p10 to p90")
    labels = [
        f"{w['model']}\nbatch {w['batch']}\nprompt {w['prompt_tokens']}"
        for w in (result["workload"] for result in results)
    ]
    latency.set_xticks(range(len(results)), labels, fontsize=7)
    for axes in (speed, latency):
        axes.margins(y=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    speed.legend(fontsize=7, loc="lower center", ncols=3, bbox_to_anchor=(0.5, 1))
    about = results[0]
    commit = (about["commit"] or f"version {about['versions'].get('jax-monokernel', 'unknown')}")[:20]
    commit += " with changes" if about["dirty"] else ""
    driver = about["device"].get("driver_version")
    where = about["device"]["name"] + (f", driver {driver}" if driver else "")
    figure.supxlabel(f"{where}; {commit}; {about['date'][:10]}", fontsize=7)
    metadata = {"Date": None} if path.suffix == ".svg" else None
    canvas.print_figure(path, metadata=metadata)
