"""Fits the performance model's `Calibration` to what was measured on one H200, and says how well it describes that.

python -m benchmarks.calibration
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path

import numpy as np
from scipy.optimize import minimize

from jax_monokernel._bench.shapes import SHAPES
from jax_monokernel.performance import Calibration, predict
from jax_monokernel.topology import part

RESULTS = Path(__file__).parent / "results" / "gpu_kernel"
TOKENS = 128  # of a measured call


def measured() -> dict[tuple[str, int, int, int], float]:
    """(shape, batch, mean context, capacity): microseconds of a step of the launch, by CUDA events, newest medians."""
    found = {}
    for file in sorted(
        (json.loads(path.read_text()) for path in RESULTS.glob("*.json")), key=lambda file: file["date"]
    ):
        for result in file["results"]:
            context = result["position"] + TOKENS // 2
            point = result["shape"], result["batch"], context, result["capacity"]
            found[point] = statistics.median(result["us_per_token"])
    return found


MEASURED_H200 = measured()
_KEEP = 0.02  # what moving all numbers by a factor of e costs; an error of 1 costs 1


def errors(calibration: Calibration) -> np.ndarray:
    """Predicted over measured, minus 1: f64 [points]."""
    device = part("H200")
    found = [
        predict(SHAPES[shape].spec(), device, batch=batch, context=context, capacity=capacity, calibration=calibration)
        for shape, batch, context, capacity in MEASURED_H200
    ]
    return np.array([f.token_us for f in found]) / np.array(list(MEASURED_H200.values())) - 1


def fit(start: Calibration) -> Calibration:
    """The least largest error, near `start` where the points do not say otherwise, by Nelder and Mead's method."""
    names = [field.name for field in dataclasses.fields(Calibration)]
    before = np.log([getattr(start, name) for name in names])

    def calibration(logs: np.ndarray) -> Calibration:
        return Calibration(**dict(zip(names, np.exp(logs).tolist(), strict=True)))

    def cost(logs: np.ndarray) -> float:
        error = errors(calibration(logs))
        return float(np.abs(error).max() + 0.2 * np.sqrt((error**2).mean()) + _KEEP * np.abs(logs - before).mean())

    logs = before
    for _ in range(4):  # begun anew, as the method gets stuck
        options = {"maxfev": 6000, "xatol": 1e-4, "fatol": 1e-6, "adaptive": True}
        logs = minimize(cost, logs, method="Nelder-Mead", options=options).x
    return calibration(logs)


def main() -> None:
    """Prints the numbers as they are and as they would be fitted anew."""
    now = Calibration()
    for what, found in (("as it is", now), ("fitted", fit(now))):
        print(f"{what}: {', '.join(f'{k} {v:.4g}' for k, v in dataclasses.asdict(found).items())}")
        for point, error, measured in zip(MEASURED_H200, errors(found), MEASURED_H200.values(), strict=True):
            print(f"  {point}: predicted {measured * (1 + error):.0f}, measured {measured:.0f}, {error:+.1%}")


if __name__ == "__main__":
    main()
