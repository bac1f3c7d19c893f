"""Pictures of a device: its groups and memory, latencies, homes of pages, and a plan laid on it. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jax_monokernel.performance import choose_groups
from jax_monokernel.plan import PHASES, Plan, attention_tasks, geometry, make_plan
from jax_monokernel.topology import lines
from jax_monokernel.topology.discover import Found
from jax_monokernel.topology.layout import DOMAIN_COLOURS, INK, LINE, Layout
from jax_monokernel.topology.measurement import Measurement, halves
from jax_monokernel.topology.model import Topology

if TYPE_CHECKING:
    from jax_monokernel.spec import DecoderSpec

FORMATS = ("png", "svg")
SETTINGS: dict[Any, Any] = {
    "font.size": 9,
    "font.family": "sans-serif",  # DejaVu Sans; an SVG names what else will do
    "svg.fonttype": "none",
    "svg.hashsalt": "topology",
    "image.interpolation": "none",  # in an SVG a matrix is then a pixel for each number
    "axes.edgecolor": LINE,
}


def draw(
    found: Found,
    folder: Path,
    *,
    spec: DecoderSpec | None = None,
    plan: Plan | None = None,
    model: str = "",
    format: str = "png",
) -> list[Path]:
    """Draws all that is known.

    Args:
      found: the device.
      folder: where files go; made if needed.
      spec: the model whose plan is drawn; none by default.
      plan: by default the model's plan for as many units as the device has, and what `choose_groups` says of it.
      model: its name, for the title.
      format: "png" or "svg".

    Returns:
      The files: groups, and for a measured device latency and homes, and for a model plan.

    Raises:
      ValueError: another format, or matplotlib is missing, naming what to install.
      OSError: files that cannot be written.
    """
    if format not in FORMATS:
        raise ValueError(f"the format of pictures is {format}; expected png or svg")
    pyplot = _pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    makers: list[tuple[str, Callable[[Any], Any]]] = [("groups", lambda p: draw_groups(p, found.topology))]
    if found.measurement is not None:
        makers.append(("latency", lambda p: draw_latency(p, found)))
        makers.append(("homes", lambda p: draw_homes(p, found)))
    if spec is not None:
        laid = plan or _default_plan(found.topology, spec)
        makers.append(("plan", lambda p: draw_plan(p, found.topology, spec, laid, model)))
    written = []
    with pyplot.rc_context(SETTINGS):
        for name, make in makers:
            figure = make(pyplot)
            path = folder / f"{name}.{format}"
            metadata = {"Date": None} if format == "svg" else None  # the same picture is the same file
            figure.savefig(path, dpi=150, bbox_inches="tight", facecolor="white", metadata=metadata)
            pyplot.close(figure)
            written.append(path)
    return written


def _default_plan(topology: Topology, spec: DecoderSpec) -> Plan:
    groups = choose_groups(spec, topology)
    return make_plan(spec, platform=topology.platform, units=topology.units, groups=groups)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise ValueError("pictures need matplotlib: pip install 'jax-monokernel[pictures]'") from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


# ---- Groups ----


def draw_groups(pyplot: Any, topology: Topology) -> Any:
    """The die map: groups as they nest, units coloured by the memory that is near them, and memory beside its group."""
    colours = {unit: DOMAIN_COLOURS[d % 8] for unit, d in topology.near_domain().items()}
    if len(topology.domains) < 2:
        colours = dict.fromkeys(colours, DOMAIN_COLOURS[0])
    figure, axes = _blank(pyplot)
    layout = Layout(axes, topology, lambda unit: (colours[unit], str(unit)))
    layout.draw()
    figure.set_size_inches(*layout.inches())
    axes.set_title(_title(topology), loc="left", fontsize=11, color=INK)
    said = [f"{_constant_text(name, c.value)} ({c.basis})" for name, c in topology.constants.items()]
    if said:
        half = math.ceil(len(said) / 2)
        rows = ["     ".join(f"{x:<52}" for x in pair) for pair in zip(said[:half], [*said[half:], ""], strict=False)]
        text = "\n".join(row.rstrip() for row in rows)
        axes.text(0, layout.height + 1.2, text, va="top", family="monospace", fontsize=7, color="#444444")
        line = 0.135 / layout.scale()  # inches
        axes.set_ylim(layout.height + 1.3 + line * len(rows), -0.6)
    return figure


def _constant_text(name: str, value: float) -> str:
    unit = "GB/s" if name.endswith("_gb_s") else "µs"
    plain = name.removesuffix("_gb_s").removesuffix("_us").replace("_", " ").replace("hand off", "hand-off")
    return f"{plain}: {value:,.4g} {unit}" if value < 1000 else f"{plain}: {value:,.0f} {unit}"


def _title(topology: Topology) -> str:
    mode = f", {topology.mode}" if topology.mode else ""
    return f"{topology.name}{mode}: {topology.units} units ({topology.platform} {topology.arch})"


def _blank(pyplot: Any) -> tuple[Any, Any]:
    figure, axes = pyplot.subplots()
    axes.set_aspect("equal")
    axes.axis("off")
    return figure, axes


# ---- Measured matrices ----


def _unit_order(found: Found) -> tuple[np.ndarray, list[int], list[str]]:
    """Units by memory domain or half of the L2, then group; where groups begin; their names, "" of a narrow one."""
    m = found.measurement
    assert m is not None
    parts = None if m.domains.any() or m.platform == "rocm" else halves(m)
    parts = m.domains if parts is None else parts
    order = np.lexsort((np.arange(len(m.groups)), m.groups, parts))
    keys = list(zip(parts[order].tolist(), m.groups[order].tolist(), strict=True))
    starts = [i for i, key in enumerate(keys) if i == 0 or keys[i - 1] != key]
    kind = "XCD" if m.platform == "rocm" else "cluster"
    # Names of groups that are narrower than a line of text would lie on each other.
    wide = np.diff([*starts, len(order)]) * 44 >= len(order)
    return order, starts, [f"{kind} {keys[i][1]}" if w else "" for i, w in zip(starts, wide, strict=True)]


def draw_latency(pyplot: Any, found: Found) -> Any:
    """Heat-maps of the hand-off between every pair of units: idle and while all units read."""
    m = found.measurement
    assert m is not None
    order, starts, names = _unit_order(found)
    figure, both = pyplot.subplots(1, 2, figsize=(13.5, 6.2), constrained_layout=True)
    word = "the word lives near the unit that asks" if m.domains.any() else "all over one word"
    panels = (
        (m.latency, f"nothing else runs; {word}"),
        (m.latency_loaded, f"while all units read ({m.load_gb_s:,.0f} GB/s)"),
    )
    for axes, (times, what) in zip(both, panels, strict=True):
        shown = times[np.ix_(order, order)]
        known = shown[~np.isnan(shown)]
        low, high = np.quantile(known, [0.01, 0.99]) if known.size else (0, 1)
        image = axes.imshow(np.ma.masked_invalid(shown), cmap="viridis", vmin=low, vmax=max(high, low + 1))
        for start in starts[1:]:
            axes.axhline(start - 0.5, color="white", linewidth=0.6)
            axes.axvline(start - 0.5, color="white", linewidth=0.6)
        ends = [*starts[1:], len(order)]
        middles = [(a + b - 1) / 2 for a, b in zip(starts, ends, strict=True)]
        axes.set_xticks(middles, names, rotation=90, fontsize=7)
        axes.set_yticks(middles, names, fontsize=7)
        axes.set_xlabel("answers")
        axes.set_ylabel("asks")
        axes.set_title(f"{what}\nmedian {np.median(known) if known.size else 0:,.0f} ns", fontsize=9)
        figure.colorbar(image, ax=axes, shrink=0.85, label="one flag, one way (ns)")
    figure.suptitle(f"{m.name}: hand-off between every pair of its {len(m.places)} units", fontsize=11)
    return figure


def draw_homes(pyplot: Any, found: Found, rows: int = 64) -> Any:
    """Where the blocks of the probe's memory live, row by row, and how reads from near and far differ."""
    from matplotlib.colors import BoundaryNorm, ListedColormap

    m = found.measurement
    assert m is not None
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(13.5, 5.2), gridspec_kw={"width_ratios": [2.1, 1]}, constrained_layout=True
    )
    count = int(m.domains.max()) + 1
    columns = 128
    shown = m.homes[: rows * columns]
    rows = max(1, len(shown) // columns)
    shown = shown[: rows * columns].reshape(rows, -1)
    colours = ListedColormap(["#ffffff", *DOMAIN_COLOURS[:count]])
    left.imshow(shown, cmap=colours, norm=BoundaryNorm(np.arange(-1.5, count + 0.5), count + 1), aspect="auto")
    unit = "page" if m.block_bytes == 4096 else "block"
    left.set_xlabel(f"{unit} of {m.block_bytes:,} bytes in the row")
    left.set_ylabel(f"rows of {columns} {unit}s")
    known = m.homes[m.homes >= 0]
    shares = np.bincount(known, minlength=count) / max(len(known), 1)
    from matplotlib.patches import Patch

    legend = [Patch(color=DOMAIN_COLOURS[d], label=f"domain {d}: {shares[d]:.1%}") for d in range(count)]
    if (m.homes < 0).any():
        legend.append(Patch(facecolor="#ffffff", edgecolor=LINE, label=f"undecided: {np.mean(m.homes < 0):.1%}"))
    left.legend(handles=legend, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(legend), frameon=False, fontsize=8)
    names = [n for n in ("unit", "domain", "device") if n in m.stream]
    kinds = [k for k in ("", "_near", "_far") if any(n + k in m.stream for n in names)]
    paint = {"": "#9a9a9a", "_near": "#009E73", "_far": "#D55E00"}
    label = {"": "all memory", "_near": "near memory", "_far": "far memory"}
    for i, kind in enumerate(kinds):
        base = [m.stream.get(n + kind, 0.0) / max(m.stream.get(n, 1.0), 1e-9) for n in names]
        at = np.arange(len(names)) + (i - (len(kinds) - 1) / 2) * 0.27
        bars = right.bar(at, base, 0.25, color=paint[kind], label=label[kind])
        texts = [f"{m.stream[n + kind]:,.0f}" if n + kind in m.stream else "" for n in names]
        right.bar_label(bars, texts, fontsize=7, padding=2)
    right.set_xticks(range(len(names)), [f"one {n}" if n != "device" else "the device" for n in names])
    right.set_ylabel("rate over that from all memory; GB/s above")
    right.set_ylim(0, max(1.3, right.get_ylim()[1] * 1.15))
    if kinds:
        right.legend(frameon=False, fontsize=8, ncols=len(kinds), loc="upper center")
    for side in ("top", "right"):
        right.spines[side].set_visible(False)
    one = count == 1
    title = "all memory is equally far" if one else f"{m.granule_bytes:,} bytes live together"
    figure.suptitle(f"{m.name}: where memory lives ({title}{'' if one else _told_by(m)})", fontsize=11)
    return figure


def _told_by(m: Measurement) -> str:
    """The times by which homes were found."""
    if m.looked is not None and m.looked["kind"] is not None:
        near, far = lines.waits(m.looked, m.looked["kind"])
        return f"; {lines.NAMES[m.looked['kind']]}: {near:.0f} ns near, {far:.0f} ns elsewhere"
    return "" if np.isnan(m.near_ns) else f"; flags {m.near_ns:.0f} ns near, {m.far_ns:.0f} ns far"


# ---- Plan ----


def plan_of_units(spec: DecoderSpec, plan: Plan) -> list[dict[str, Any]]:
    """What each unit of a plan holds: {"group": number, "rows": {phase: (first, end)}, "heads": query heads}.

    Rows are of the phase's matrix, or where that is cut for groups of its group's part of it (gate_up: a gate and an up
    row on GPUs count as two). Heads are those that it attends with for a request alone with a short context.
    """
    geo = geometry(spec, plan)
    parts = {"qkv": geo.attention_groups, "o": geo.attention_groups, "gate_up": geo.mlp_groups, "down": geo.mlp_groups}
    pair = 2 if spec.gated else 1
    real = {"qkv": (spec.q_size + 2 * spec.kv_size) // geo.attention_groups, "head": spec.vocab_size}
    if plan.platform != "cpu":
        real |= {"gate_up": geo.inner_cols * pair, "o": spec.hidden_size, "down": spec.hidden_size}
    held: list[dict[str, Any]] = []
    for unit in range(plan.units):
        group = unit // plan.members
        rows = {}
        for phase in PHASES:
            m = geo.matrices[phase]
            per_tile, per_group = m.rows // m.tiles, m.rows // parts.get(phase, 1)
            before = group * per_group if parts.get(phase, 1) > 1 else 0
            first, end = (min(m.begin[i] * per_tile - before, real.get(phase, m.rows)) for i in (unit, unit + 1))
            rows[phase] = (first, end)
        held.append({"group": group, "rows": rows, "heads": []})
    if plan.platform == "cpu":
        return held
    _, heads = attention_tasks(spec, plan, 1, 2048)
    each = spec.num_heads // geo.attention_groups  # heads of a group, whose units take them by turns
    among = plan.units // geo.attention_groups
    for head in range(0, spec.num_heads, heads):
        unit = head // each * among + head % each // heads % among
        held[unit]["heads"] += list(range(head, head + heads))
    return held


def draw_plan(pyplot: Any, topology: Topology, spec: DecoderSpec, plan: Plan, model: str = "") -> Any:
    """The plan on the device: which units attend with which heads, and which rows of each matrix a unit holds."""
    if plan.units != topology.units:
        raise ValueError(f"the plan has {plan.units} units and {topology.name} has {topology.units}")
    held = plan_of_units(spec, plan)
    units = list(topology.root.all_units())  # the plan's unit i runs on the i-th of them
    group = spec.num_heads // spec.num_kv_heads
    shades = pyplot.get_cmap("tab20")

    def look(unit: int) -> tuple[Any, str]:
        heads = held[units.index(unit)]["heads"]
        if not heads:
            return "#e4e4e0", ""
        text = f"h{heads[0]}" if len(heads) == 1 else f"h{heads[0]}-{heads[-1]}"
        text = text if len(text) < 5 else text.replace("-", "-\n")
        red, green, blue, _ = shades(heads[0] // group % 20)
        return (0.4 + 0.6 * red, 0.4 + 0.6 * green, 0.4 + 0.6 * blue), text  # light enough for the text

    figure = pyplot.figure(constrained_layout=True)
    top, bottom = figure.subplots(2, 1, gridspec_kw={"height_ratios": [3, 1.3]})
    top.set_aspect("equal")
    top.axis("off")
    layout = Layout(top, topology, look)
    layout.draw()
    width, height = layout.inches()
    figure.set_size_inches(max(width, 9), height * max(1, 9 / width) * 0.8 + 4.2)
    colours = "a colour is a key/value head" if any(h["heads"] for h in held) else "attention is not tied to units"
    where = (
        f"{plan.groups} groups of neighbouring units, one after the other"
        if plan.groups > 1
        else "it runs where its work-group starts"
    )
    top.set_title(
        f"attention: unit → query heads ({colours}). Unit i of the plan is drawn at the i-th place; {where}",
        loc="left",
        fontsize=9,
    )

    geo = geometry(spec, plan)
    cut = {p for p in PHASES[:2] if geo.attention_groups > 1} | {p for p in PHASES[2:4] if geo.mlp_groups > 1}
    for row, phase in enumerate(PHASES):
        counts = np.array([h["rows"][phase][1] - h["rows"][phase][0] for h in held], float)
        m = geo.matrices[phase]
        shown = counts / max(counts.max(), 1)
        extent = (-0.5, plan.units - 0.5, row + 0.42, row - 0.42)
        bottom.imshow(shown[None], extent=extent, cmap="Blues", vmin=0, vmax=2.2, aspect="auto")
        low, high = int(counts.min()), int(counts.max())
        each = f"{high}" if low == high else f"{low} to {high}"
        bottom.text(
            plan.units + 0.01 * plan.units,
            row,
            f"{each} rows a unit, {m.cols:,} columns{', of its group' * (phase in cut)}",
            va="center",
            fontsize=7,
        )
        for unit in _labelled(plan.units):
            first, end = held[unit]["rows"][phase]
            if end > first:
                bottom.text(unit, row, f"{first:,}", ha="left", va="center", fontsize=6.5, color=INK)
    bottom.set_yticks(range(len(PHASES)), PHASES)
    bottom.set_xlim(-0.5, plan.units - 0.5)
    bottom.set_ylim(len(PHASES) - 0.45, -0.55)
    bottom.set_xlabel("unit of the plan; the number at a place is the first row that the unit there holds")
    for side in ("top", "right", "left"):
        bottom.spines[side].set_visible(False)
    bottom.tick_params(left=False)
    shape = f"{spec.num_layers} layers, {spec.num_heads} heads on {spec.num_kv_heads}, hidden {spec.hidden_size}"
    title = f"{model or 'model'}: {shape}"
    figure.suptitle(f"{title}  on  {_title(topology)}", fontsize=11)
    return figure


def _labelled(units: int) -> list[int]:
    """Units whose rows are written down: as many as there is room for."""
    return list(range(0, units, max(1, math.ceil(units / 16))))
