"""From seconds to the numbers that are reported."""

from __future__ import annotations

from typing import Any

import numpy as np


def summarize(found: dict[str, Any]) -> dict[str, Any]:
    """Adds to `found` (as `run.measure` gives it) medians over rounds, and per-round comparisons.

    Comparisons are medians of the ratios within each round: what slows the machine down for a while then cancels.
    """
    workload, peers = found["workload"], found["peers"]
    steps, bytes_per_step = workload["new_tokens"], workload["bytes_per_step"]
    rates = {}  # bytes per second of each round
    for label, peer in peers.items():
        seconds = np.array(peer["seconds"])
        rates[label] = (peer["bytes"] if "bytes" in peer else bytes_per_step * steps) / seconds
    summary = {}
    for label, peer in peers.items():
        numbers: dict[str, Any] = {"gb_per_second": _rounded(np.median(rates[label]) / 1e9)}
        if "bytes" not in peer:
            per_step = np.array(peer["seconds"]) / steps
            numbers["tokens_per_second"] = _rounded(workload["batch"] / np.median(per_step))
            numbers["ms_per_step"] = _distribution(per_step * 1e3)
            if "probe" in rates:
                numbers["share_of_probe"] = _rounded(np.median(rates[label] / rates["probe"]))
            if "ours" in rates and label != "ours":
                numbers["ours_is_faster_by"] = _rounded(np.median(rates["ours"] / rates[label]))
        if "joules" in peer:  # of each round
            joules = np.median(np.array(peer["joules"])) / steps / workload["batch"]
            numbers["joules_per_token"] = _rounded(joules)
        if "energy" in peer and peer["energy"]["joules"] > 0:
            joules = peer["energy"]["joules"] / peer["energy"]["calls"] / steps / workload["batch"]
            numbers["joules_per_token"] = _rounded(joules)
        if np.size(peer.get("steps", ())):  # too many to keep one by one
            single = np.array(peer["steps"]) * 1e3
            numbers["ms_of_single_steps"] = _distribution(single) | {"p99": _rounded(np.percentile(single, 99))}
        kept = {name: value for name, value in peer.items() if name != "steps"}
        for name in ("seconds", "best", "joules"):
            if name in kept:
                kept[name] = [_rounded(value) for value in kept[name]]
        summary[label] = numbers | kept
    return {"workload": workload, "peers": summary}


def _distribution(values: np.ndarray) -> dict[str, float]:
    """Median, tenth and ninetieth percentile, and minimum of all values."""
    points = {"median": 50, "p10": 10, "p90": 90, "min": 0}
    return {name: _rounded(np.percentile(values, point)) for name, point in points.items()}


def _rounded(value: float) -> float:
    """Five significant digits: more than the measurement has."""
    return float(f"{value:.5g}")


def describe(label: str, peer: dict[str, Any]) -> str:
    """One line about one peer's summary."""
    line = f"{label:24} {peer['gb_per_second']:7.1f} GB/s"
    if "tokens_per_second" in peer:
        ms = peer["ms_per_step"]
        line += f" {peer['tokens_per_second']:9.1f} tok/s"
        line += f"  {ms['median']:.3f} ms/step ({ms['p10']:.3f} to {ms['p90']:.3f})"
        if "ms_of_single_steps" in peer:
            line += f", 99% of single steps in {peer['ms_of_single_steps']['p99']:.3f}"
        line += f"  {peer['share_of_probe']:.0%} of the read roof" if "share_of_probe" in peer else ""
        line += f"  {peer['joules_per_token']:.4g} J/token" if "joules_per_token" in peer else ""
        line += f"  ours is {peer['ours_is_faster_by']:.2f}x" if "ours_is_faster_by" in peer else ""
    return line
