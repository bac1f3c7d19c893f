"""Draws docs/images/data-path.svg and hand-offs.svg from the numbers of a real plan: `python docs/images/draw.py`.

The model is Qwen3-0.6B in bf16, the device 132 units of an H200. tests/test_docs.py draws them again and
compares.
"""

import xml.sax.saxutils
from pathlib import Path

import jax
import numpy as np

from jax_monokernel import DecoderSpec, Plan, weight_shapes
from jax_monokernel._bench.shapes import SHAPES, kv_bytes, weight_bytes
from jax_monokernel.plan import attention_tasks, geometry

FOLDER = Path(__file__).parent
MODEL, DEVICE, UNITS = "Qwen3-0.6B", "H200", 132
CAPACITY = 256  # of the KV cache in the picture of hand-offs
GREY, BLUE, GREEN, YELLOW = "#f1f1f1", "#dbe7f5", "#dcecd9", "#f6e7c6"


class Svg:
    """A picture with a white background."""

    def __init__(self, width: int, height: int):
        self._size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
        self._parts = [f'<rect width="{width}" height="{height}" fill="white"/>']

    def box(self, x: float, y: float, width: float, height: float, fill: str, *lines: str) -> None:
        """A box with its first line in bold."""
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" fill="{fill}" stroke="#555"/>'
        )
        top = y + height / 2 - 8 * (len(lines) - 1) + 4
        for i, line in enumerate(lines):
            self.text(x + width / 2, top + 16 * i, line, bold=i == 0)

    def text(
        self, x: float, y: float, text: str, *, bold: bool = False, anchor: str = "middle", size: int = 12
    ) -> None:
        """One line; y is its base line."""
        weight = ' font-weight="bold"' if bold else ""
        self._parts.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}"{weight}>'
            f"{xml.sax.saxutils.escape(text)}</text>"
        )

    def arrow(self, *points: tuple[float, float]) -> None:
        """A line through points with a head at the last one."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self._parts.append(f'<polyline points="{path}" fill="none" stroke="#333" marker-end="url(#head)"/>')

    def save(self, path: Path, title: str) -> None:
        """Writes the file."""
        head = (
            '<defs><marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" '
            'orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="#333"/></marker></defs>'
        )
        body = "\n".join(self._parts)
        path.write_text(
            f'<svg xmlns="http://www.w3.org/2000/svg" {self._size} font-family="sans-serif" fill="#111">\n'
            f"<title>{title}</title>\n{head}\n{body}\n</svg>\n"
        )


def megabytes(size: float) -> str:
    """A size in MB or GB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} KB"


def data_path(spec: DecoderSpec, plan: Plan, path: Path) -> None:
    """From a checkpoint to tokens, with the sizes of what lies on the way."""
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weight_shapes(spec)))
    stream = int(np.diff(geometry(spec, plan).unit_begin).max()) * np.dtype(np.float16).itemsize
    position, read = megabytes(kv_bytes(spec, 1)), megabytes(weight_bytes(spec))
    svg = Svg(920, 400)
    svg.box(20, 40, 170, 60, GREY, "checkpoint or", "your Flax NNX module")
    svg.box(250, 20, 190, 44, BLUE, "DecoderSpec", "what it computes; static")
    svg.box(250, 84, 190, 60, BLUE, "DecoderWeights", f"by role, {megabytes(weights)}")
    svg.arrow((190, 60), (250, 42))
    svg.arrow((190, 80), (250, 110))
    svg.box(20, 200, 170, 60, GREY, "Plan", f"{plan.units} units of an {DEVICE}", f"waves of {plan.wave_size} lanes")
    svg.box(250, 200, 190, 60, BLUE, "Tape", f"{plan.units} streams of {megabytes(stream)}", "each in the order of use")
    svg.arrow((345, 144), (345, 200))
    svg.text(352, 178, "pack, once", anchor="start")
    svg.arrow((190, 230), (250, 230))
    svg.box(510, 84, 170, 60, GREEN, "prefill", "ordinary JAX,", "all prompt tokens but one")
    svg.arrow((440, 114), (510, 114))
    svg.box(510, 20, 170, 44, GREY, "prompt", "tokens, lengths, key")
    svg.arrow((595, 64), (595, 84))
    state = "DecodeState", "KV cache, last token, key", f"{position} a position"
    svg.box(730, 84, 170, 60, BLUE, *state)
    svg.arrow((680, 114), (730, 114))
    call = "decode: one XLA custom call", "all layers, head, sampling, stop check, KV append"
    svg.box(510, 190, 390, 80, YELLOW, *call, f"reads {read} of weights for each token")
    svg.arrow((440, 230), (510, 230))
    svg.arrow((800, 144), (800, 190))
    svg.arrow((860, 190), (860, 144))
    svg.text(868, 172, "donated", anchor="start", size=10)
    svg.box(250, 300, 190, 60, GREY, "SamplingParams", "operands: no recompilation", "when they change")
    svg.arrow((440, 330), (560, 330), (560, 270))
    svg.box(640, 310, 260, 44, GREY, "tokens, lengths, log-probabilities")
    svg.arrow((770, 270), (770, 310))
    svg.text(20, 385, f"Sizes: {MODEL}, bf16, plan for {plan.units} units", anchor="start", size=11)
    svg.save(path, "The path of the data")


def hand_offs(spec: DecoderSpec, plan: Plan, path: Path) -> None:
    """One layer of the flat plan on a GPU: what every unit multiplies, and what passes between all of them."""
    matrices = geometry(spec, plan).matrices
    qkv = spec.q_size + 2 * spec.kv_size
    rows = [
        ("p1_norm_qkv", "qkv", "h1_qkv", qkv, "query, keys and values"),
        ("p2_attend", None, "h2_attended", spec.q_size, "attended values"),
        ("p3_project_out", "o", "h4_projected", spec.hidden_size, "residual stream"),
        ("p4_gate_up", "gate_up", "h5_inner", spec.intermediate_size, "inner values"),
        ("p5_down", "down", "h6_residual", spec.hidden_size, "residual stream"),
    ]
    svg = Svg(920, 130 + 92 * len(rows))
    shown = ["unit 0", "unit 1", "unit 2", "...", f"unit {plan.units - 1}"]
    for i, name in enumerate(shown):
        svg.text(255 + 110 * i, 30, name, bold=True)
    for number, (phase, matrix, site, words, what) in enumerate(rows):
        y = 44 + 92 * number
        svg.text(20, y + 20, phase, bold=True, anchor="start")
        if matrix:
            m = matrices[matrix]
            counts = [end - begin for begin, end in zip(m.begin, m.begin[1:], strict=False)]
            size = megabytes(m.rows * m.cols * 2)
            svg.text(20, y + 36, f"{m.tiles} tiles of {plan.tile_rows} rows, {size}", anchor="start", size=11)
            labels = [(BLUE, f"{n} tile{'s' * (n != 1)}", megabytes(n * m.tile_elems * 2)) for n in counts]
        else:
            splits, heads = attention_tasks(spec, plan, 1, CAPACITY)
            tasks = spec.num_heads // heads * splits
            svg.text(20, y + 36, f"{tasks} tasks of {heads} query head{'s' * (heads > 1)}", anchor="start", size=11)
            labels = [(GREEN, "a task", "keys, values") if u < tasks else (GREY, "none", "") for u in range(plan.units)]
        for i, unit in enumerate((0, 1, 2, None, plan.units - 1)):
            if unit is None:
                svg.text(255 + 110 * i, y + 26, "...")
            else:
                fill, *lines = labels[unit]
                svg.box(205 + 110 * i, y, 100, 44, fill, *filter(None, lines))
            if unit is not None:
                svg.arrow((255 + 110 * i, y + 44), (255 + 110 * i, y + 56))
        svg.box(205, y + 56, 540, 20, YELLOW, f"{site}: {words:,} words, from any unit to all that need them")
        svg.text(760, y + 70, what, anchor="start", size=11)
        for i in (0, 1, 2, 4):
            svg.arrow((255 + 110 * i, y + 76), (255 + 110 * i, y + 92))
    y = 44 + 92 * len(rows)
    svg.box(205, y, 540, 26, GREY, f"next layer; after {spec.num_layers} of them the head, sampling and the next token")
    what = f"{MODEL}, bf16, batch 1, {CAPACITY} positions of cache, plan for {plan.units} units"
    svg.text(20, y + 60, f"{what}. Weights are requested ahead, across hand-offs.", anchor="start", size=11)
    svg.save(path, "The hand-offs of a layer")


def main(folder: Path = FOLDER) -> None:
    """Draws both."""
    spec = SHAPES["qwen3-0.6b"].spec()
    plan = Plan(platform="cuda", units=UNITS)
    data_path(spec, plan, folder / "data-path.svg")
    hand_offs(spec, plan, folder / "hand-offs.svg")


if __name__ == "__main__":
    main()
