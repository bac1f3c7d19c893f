"""What the performance model says of AMD's parts: the table of docs/performance.md. Nothing of it is measured.

python -m benchmarks.predictions
"""

from __future__ import annotations

import dataclasses

from jax_monokernel._bench.shapes import SHAPES
from jax_monokernel.performance import predict
from jax_monokernel.topology import Constant, Topology, part

PARTS = ("MI300X", "MI355X")
MODELS = ("smollm2-135m", "qwen3-0.6b", "llama3.2-1b", "2.3b", "llama3.1-8b")
NEAR_GAIN = 1.1  # near memory over all of it: MI350's published gain on matrix-vector products
LOCAL_BEFORE = {"MI300X": 0.25, "MI355X": 0.5}  # pages go round four dies, or two
LOCAL_AFTER = 0.97
HAND_OFFS = ("gather_us", "hand_off_in_group_us", "hand_off_across_groups_us", "hand_off_across_groups_loaded_us")


def device(name: str) -> Topology:
    """A part with what it lacks: hand-offs of MI300X, and the rate from near memory."""
    topology, known = part(name), part("MI300X").constants
    rate = topology.constant("stream_device_gb_s")
    assert rate is not None
    assumed = {key: known[key] for key in HAND_OFFS if key not in topology.constants}
    near = Constant(rate * NEAR_GAIN, "published", "assumed: see NEAR_GAIN")
    return dataclasses.replace(topology, constants={**topology.constants, **assumed, "stream_device_near_gb_s": near})


def rows() -> list[str]:
    """Lines of the table, Markdown. Times are microseconds a token."""
    plans = [f"{kind}{how}" for how in ("", ", placed", ", loaded") for kind in ("flat", "hierarchical")]
    columns = ["µs a token", *plans, "floor", "tok/s: loaded/polled/floor"]
    lines = ["| " + " | ".join(columns) + " |", "| --- |" + " --: |" * (len(columns) - 1)]
    for shape in MODELS:
        spec = SHAPES[shape].spec()
        for name in PARTS:
            on = device(name)
            placed = {"local_before": LOCAL_BEFORE[name], "local_after": LOCAL_AFTER}
            found = [predict(spec, on, kind) for kind in ("flat", "hierarchical")]
            found += [predict(spec, on, kind, **placed) for kind in ("flat", "hierarchical")]
            found += [predict(spec, on, kind, loaded=True) for kind in ("flat", "hierarchical")]
            times = [f.token_us for f in found]
            head_bytes = spec.vocab_size * spec.hidden_size * 2
            rate = on.constant("stream_device_gb_s")
            assert rate is not None
            floor = found[0].stream_us * spec.num_layers + head_bytes / rate / 1e3
            speeds = "/".join(f"{1e6 / t:,.0f}" for t in (min(times[4:]), min(times[:2]), floor))
            cells = [f"{SHAPES[shape].title}, {name}", *(f"{t:,.0f}" for t in (*times, floor)), speeds]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Prints the table."""
    print("\n".join(rows()))


if __name__ == "__main__":
    main()
