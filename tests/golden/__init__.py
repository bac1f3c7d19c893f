"""Golden data: what Hugging Face transformers computes for the configs in `cases`. make_golden.py makes it."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np

from golden.cases import CASES
from golden.weights import random_prompt, random_tensors

DATA = Path(__file__).parent / "data"
NEW_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class Golden:
    """One case's inputs and what transformers makes of them in float32."""

    name: str
    config: dict[str, Any]  # as a config.json would hold it
    saved_config: dict[str, Any]  # as transformers writes it back
    shapes: dict[str, tuple[int, ...]]  # of every tensor of a saved checkpoint
    seed: int
    prompt: list[int]
    positions: list[int]  # within the prompt, where `logits` are kept
    logits: np.ndarray  # f32 [positions, vocab]
    greedy: list[int]  # the 64 tokens that follow the prompt
    log_probs: np.ndarray  # f32 [64], of these tokens, computed with a KV cache

    def tensors(self) -> dict[str, np.ndarray]:
        """The checkpoint's tensors, f32 with values exact in bfloat16."""
        return case_tensors(self.name, self.shapes, self.seed)


def case_tensors(name: str, shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """A case's weights for one seed."""
    case = CASES[name]
    norm_mean = 0.0 if case.config["model_type"].startswith("gemma") else 1.0
    return random_tensors(shapes, seed, embedding_std=case.embedding_std, norm_mean=norm_mean)


def case_prompt(name: str, seed: int) -> list[int]:
    """A case's prompt for one seed."""
    case = CASES[name]
    return random_prompt(case.config["vocab_size"], case.prompt_length, seed)


@functools.cache
def read(name: str) -> Golden:
    """One case's golden data."""
    stored = json.loads((DATA / f"{name}.json").read_text())
    with np.load(DATA / "logits.npz") as arrays:
        logits, log_probs = arrays[f"{name}/logits"], arrays[f"{name}/log_probs"]
    return Golden(
        name=name,
        config=dict(CASES[name].config),
        saved_config=stored["saved_config"],
        shapes={tensor: tuple(shape) for tensor, shape in stored["shapes"].items()},
        seed=stored["seed"],
        prompt=case_prompt(name, stored["seed"]),
        positions=stored["positions"],
        logits=logits,
        greedy=stored["greedy"],
        log_probs=log_probs,
    )
