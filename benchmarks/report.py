"""Writes the README's benchmark section and its picture from the committed results: `python -m benchmarks.report`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from jax_monokernel._bench import plot
from jax_monokernel._bench.machine import BUSY
from jax_monokernel._bench.plot import COLOURS, NAMES, SVG_SETTINGS, where
from jax_monokernel._bench.shapes import SHAPES

_REPOSITORY = Path(__file__).resolve().parent.parent
_RESULTS = _REPOSITORY / "benchmarks" / "results"
START, END = "<!-- benchmarks:start -->", "<!-- benchmarks:end -->"
GPU_START, GPU_END = "<!-- gpu:start -->", "<!-- gpu:end -->"
_GPU_COLUMNS = ("jax_monokernel, tok/s", "jitted JAX loop, tok/s", "faster by", "GB/s", "of read roof")
PICTURE, GPU_PICTURE = Path("docs/images/decode-cpu.svg"), Path("docs/images/decode-gpu.svg")
SWEEP = Path("docs/images/sweep-cpu.svg")


def load_results(folder: Path = _RESULTS) -> list[dict[str, Any]]:
    """All results in `folder` in the order of the table: by shape, batch, prompt length, threads."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    order = list(SHAPES)

    def key(result: dict[str, Any]) -> tuple:
        workload = result["workload"]
        threads = workload.get("threads", 0)
        return order.index(_shape(workload)), workload["batch"], workload["prompt_tokens"], threads

    return sorted(results, key=key)


def _shape(workload: dict[str, Any]) -> str:
    return workload.get("shape") or workload["model"]  # as the first results have it, and as those of today


def _fastest(result: dict[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    """(label, numbers) of ours, and of each other kind of peer with its fastest setting in this result."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for label, peer in result["peers"].items():
        kind = label.split(":")[0]
        if kind == "ours" and label != "ours":
            continue
        if kind in NAMES and (kind not in found or peer["tokens_per_second"] > found[kind][1]["tokens_per_second"]):
            found[kind] = label, peer
    return found


def section(results: list[dict[str, Any]]) -> str:
    """The README's section as Markdown, without the markers."""
    kinds = [kind for kind in NAMES if any(kind in _fastest(result) for result in results)]
    others = [kind for kind in kinds if kind != "ours"]
    names = [f"{NAMES[kind]}, tok/s" for kind in kinds]
    versus = [f"vs. {NAMES[kind].removeprefix('jitted ')}" for kind in others]
    heads = ["Shape (random weights)", "Batch", "Prompt", *names, *versus, "GB/s", "of read roof"]
    lines = [f"| {' | '.join(heads)} |", f"|---|{'--:|' * (len(heads) - 1)}"]
    for result in results:
        workload = result["workload"]
        peers = {kind: peer for kind, (_, peer) in _fastest(result).items()}
        ours = peers.get("ours", {})
        cells = [
            SHAPES[_shape(workload)].title,
            str(workload["batch"]),
            str(workload["prompt_tokens"]),
            *(_number(peers.get(name, {}).get("tokens_per_second")) for name in kinds),
            *(_number(peers.get(name, {}).get("ours_is_faster_by"), "{:.2f}x") for name in others),
            _number(ours.get("gb_per_second")),
            _number(ours.get("share_of_probe"), "{:.0%}"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        *_slowdowns(results),
        f"![Decode speed]({PICTURE.as_posix()})",
        "",
        *_folded([*_settings(results), *_provenance(results)]),
    ]
    return "\n".join(lines)


def _settings(results: list[dict[str, Any]]) -> list[str]:
    """Which of a peer's settings is shown, where several were measured."""
    places: dict[tuple[str, str, int], list[str]] = {}
    for result in results:
        for kind in ("llama_cpp", "transformers"):
            tried = [label for label in result["peers"] if label.partition(":")[0] == kind]
            if len(tried) > 1:
                workload, (label, _) = result["workload"], _fastest(result)[kind]
                sizes = f"batch {workload['batch']}, prompt {workload['prompt_tokens']}"
                key = NAMES[kind], label.partition(":")[2], len(tried)
                places.setdefault(key, []).append(f"{SHAPES[_shape(workload)].title}, {sizes}")
    lines = []
    for (peer, setting, count), at in places.items():
        name = f"`{setting}`" if setting else "its defaults"
        lines.append(f"- {peer} with {name}, the fastest of {count} settings: {'; '.join(at)}.")
    return [*lines, ""] if lines else []


def _slowdowns(results: list[dict[str, Any]]) -> list[str]:
    """What a longer prompt costs each peer, where a shape was measured with more than one length."""
    lines = []
    shortest: dict[tuple, dict[str, Any]] = {}
    for result in results:
        workload = result["workload"]
        base = shortest.setdefault((workload["shape"], workload["batch"], workload["threads"]), result)
        if base is result:
            continue
        costs = []
        before, after = _fastest(base), _fastest(result)
        for kind, name in NAMES.items():
            if kind in before and kind in after:
                factor = before[kind][1]["tokens_per_second"] / after[kind][1]["tokens_per_second"]
                costs.append(f"{factor:.2f}x for {name}")
        lengths = f"{workload['prompt_tokens']} tokens instead of {base['workload']['prompt_tokens']}"
        title = f"{SHAPES[_shape(workload)].title}, batch {workload['batch']}"
        lines.append(f"- {title}: the time per token after a prompt of {lengths} is {', '.join(costs)}.")
    return [*lines, ""] if lines else []


def _provenance(results: list[dict[str, Any]]) -> list[str]:
    """Where the numbers come from: one line for each different machine, commit or set of versions."""
    lines = []
    for result in results:
        machine, workload = result["machine"], result["workload"]
        dirty = " with uncommitted changes" if result["dirty"] else ""
        busy = f", {result['busy']:.0%} of the CPUs busy with other work" if result["busy"] > BUSY else ""
        packages = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        lines.append(
            f"{machine['cpu']}, {workload['threads']} threads, {machine['memory_gib']:.0f} GiB, {machine['os']}{busy}; "
            f"commit {(result['commit'] or 'unknown')[:12]}{dirty}; {packages}; {workload['dtype']}, greedy, "
            f"{workload['new_tokens']} new tokens; medians of {workload['repeats']} interleaved rounds; "
            f"`{result['command']}`"
        )
    return [f"- {line}" for line in dict.fromkeys(lines)]


def gpu_section(results: list[dict[str, Any]]) -> str:
    """The README's table of GPU results as Markdown, without the markers."""
    lines = [
        f"| Shape (random weights) | Batch | Prompt | {' | '.join(_GPU_COLUMNS)} |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for result in results:
        workload, peers = result["workload"], result["peers"]
        ours, loop = (peers.get(name, {}).get("tokens_per_second") for name in ("ours", "jax_loop"))
        cells = [
            SHAPES[_shape(workload)].title,
            *(str(workload[name]) for name in ("batch", "prompt_tokens")),
            *(_number(speed) for speed in (ours, loop)),
            _number(ours / loop if ours and loop else None, "{:.2f}x"),
            _number(rate := peers.get("ours", {}).get("gb_per_second")),
            _number(rate / roof if rate and (roof := peers.get("probe", {}).get("gb_per_second")) else None, "{:.0%}"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    notes = []
    for result in results:
        device, commit = result["device"], (result["commit"] or "unknown")[:12]
        dirty = " with uncommitted changes" if result["dirty"] else ""
        packages = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        driver = device.get("driver_version", "unknown")
        line = (
            f"- {device['name']}, driver {driver}; commit {commit}{dirty}; {packages}; "
            f"bfloat16, greedy, {result['workload']['new_tokens']} new tokens; medians; `{result['command']}`"
        )
        notes.append(line)
    picture = f"![Decode speed on a GPU]({GPU_PICTURE.as_posix()})"
    return "\n".join([*lines, "", picture, "", *_folded(list(dict.fromkeys(notes)))])


def _folded(lines: list[str]) -> list[str]:
    """What few readers look for, behind a line that unfolds it."""
    return [
        "<details><summary>Device, commit, versions and commands of these numbers</summary>",
        "",
        *lines,
        "",
        "</details>",
    ]


def _number(value: float | None, form: str | None = None) -> str:
    if value is None:
        return "-"
    return form.format(value) if form else f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Bars of tokens per second at the shortest prompt and batch 1, with the read roof as a line, as SVG."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    shown: dict[str, dict[str, Any]] = {}
    for result in results:
        if result["workload"]["batch"] == 1:
            shown.setdefault(_shape(result["workload"]), result)
    with pyplot.rc_context(SVG_SETTINGS | {"font.family": "sans-serif", "font.size": 9}):
        figure, panels = pyplot.subplots(1, len(shown), figsize=(3.1 * len(shown), 3), squeeze=False)
        for axes, (shape, result) in zip(panels[0], shown.items(), strict=True):
            peers = {kind: peer["tokens_per_second"] for kind, (_, peer) in sorted(_fastest(result).items())}
            titles = [NAMES[name].replace(" JAX", "\nJAX") for name in peers]
            bars = axes.bar(titles, list(peers.values()), color=[COLOURS[name] for name in peers], width=0.65)
            axes.bar_label(bars, fmt="%.0f")
            if "probe" in result["peers"]:
                step_bytes = result["workload"].get("bytes_per_step") or result["bytes_per_step"]
                roof = result["peers"]["probe"]["gb_per_second"] * 1e9 / step_bytes
                axes.axhline(roof, color="#444444", linestyle="--", linewidth=1)
                axes.text(1, roof, "read roof", transform=axes.get_yaxis_transform(), ha="right", va="bottom")
            axes.set_title(SHAPES[shape].title)
            axes.margins(y=0.15)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(axis="x", labelsize=7)
        panels[0][0].set_ylabel("tokens per second")
        figure.supxlabel("; ".join(dict.fromkeys(where(result) for result in shown.values())), fontsize=7)
        figure.tight_layout()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None})
        pyplot.close(figure)


def with_section(readme: str, text: str, start: str = START, end: str = END) -> str:
    """`readme` with `text` between the markers.

    Raises:
      ValueError: the markers are not there, once each and in order.
    """
    if readme.count(start) != 1 or readme.count(end) != 1 or readme.index(start) > readme.index(end):
        raise ValueError(f"the README needs one line {start} and, after it, one line {end}")
    before, rest = readme.split(start)
    return f"{before}{start}\n{text}\n{end}{rest.split(end)[1]}"


def main(argv: list[str] | None = None) -> None:
    """Rewrites the README's section and the picture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=_RESULTS, help="folder of JSON files")
    parser.add_argument("--readme", type=Path, default=_REPOSITORY / "README.md")
    arguments = parser.parse_args(argv)
    results = load_results(arguments.results)
    if not results:
        parser.error(f"no results in {arguments.results}; make some with python -m benchmarks.run")
    readme = with_section(arguments.readme.read_text(), section(results))
    gpu_results = load_results(arguments.results / "gpu")
    if gpu_results:
        readme = with_section(readme, gpu_section(gpu_results), GPU_START, GPU_END)
        draw(gpu_results, arguments.readme.parent / GPU_PICTURE)
    arguments.readme.write_text(readme)
    draw(results, arguments.readme.parent / PICTURE)
    # Every workload, with the fastest setting of each peer.
    fastest = [r | {"peers": r["peers"] | {kind: peer for kind, (_, peer) in _fastest(r).items()}} for r in results]
    named = [r | {"workload": r["workload"] | {"model": SHAPES[_shape(r["workload"])].title}} for r in fastest]
    plot.draw(named, arguments.readme.parent / SWEEP)


if __name__ == "__main__":
    main()
