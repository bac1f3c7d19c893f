"""Makes the golden data of tests/golden/data with torch and transformers: python tests/golden/make_golden.py [CASE ...]

Every case runs in float32 on the CPU. Its seed is the first one whose greedy run has a clear winner at every step, so
that tokens can be compared exactly, and varied tokens. Without arguments everything is made again, and versions.json
records the libraries' versions.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))

from golden import DATA, NEW_TOKENS, case_prompt, case_tensors
from golden.cases import CASES

_MIN_MARGIN = 2e-3  # of the best logit over the next one, in units of the largest logit
_MIN_DISTINCT = 12  # different tokens among the 64
_MIN_EFFECT = 2e-4  # of a change that must matter, in units of the largest logit; ten times the tests' tolerance
_KEPT_POSITIONS = 8


def build(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """transformers' model of a config.json, without weights of any meaning."""
    config = {"pad_token_id": None, **copy.deepcopy(config)}  # defaults may lie outside these vocabularies
    hf_config = transformers.CONFIG_MAPPING[config.pop("model_type")](**config)
    model = transformers.AutoModelForCausalLM.from_config(hf_config, attn_implementation="eager", dtype=dtype)
    return model.eval()


def stored_shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Tensors that save_pretrained writes, by name."""
    tied = model._tied_weights_keys if model.config.tie_word_embeddings else {}
    return {name: tuple(t.shape) for name, t in model.state_dict().items() if name not in tied}


def fill(model: torch.nn.Module, tensors: dict[str, np.ndarray]) -> None:
    """Gives a model its weights."""
    missing, unexpected = model.load_state_dict({k: torch.tensor(v) for k, v in tensors.items()}, strict=False)
    tied = set(model._tied_weights_keys) if model.config.tie_word_embeddings else set()
    if set(missing) != tied or unexpected:
        raise RuntimeError(f"weights do not fit: missing {missing}, unexpected {unexpected}")
    model.tie_weights()


@torch.no_grad()
def prompt_logits(model: torch.nn.Module, prompt: list[int]) -> np.ndarray:
    """f32 [prompt, vocab], without a cache."""
    return model(torch.tensor([prompt]), use_cache=False).logits[0].float().numpy()


@torch.no_grad()
def greedy_run(model: torch.nn.Module, prompt: list[int], count: int) -> tuple[list[int], np.ndarray]:
    """The next `count` tokens and their logits f32 [count, vocab], with a KV cache and one call per token."""
    tokens, rows = [], []
    out = model(torch.tensor([prompt]), use_cache=True)
    for _ in range(count):
        rows.append(out.logits[0, -1].float().numpy())
        tokens.append(int(rows[-1].argmax()))
        out = model(torch.tensor([[tokens[-1]]]), past_key_values=out.past_key_values, use_cache=True)
    return tokens, np.stack(rows)


def margin(rows: np.ndarray) -> float:
    """The smallest lead of a best logit, in units of the largest logit."""
    best = np.sort(rows, axis=-1)[:, -2:]
    return float((best[:, 1] - best[:, 0]).min() / np.abs(rows).max())


def check_effects(name: str, shapes: dict[str, tuple[int, ...]], seed: int, logits: np.ndarray) -> None:
    """Raises unless every change that the case says matters does."""
    for change in CASES[name].matters:
        other = build({**CASES[name].config, **change})
        if stored_shapes(other) != shapes:
            raise RuntimeError(f"{name}: {change} asks for other weights")
        fill(other, case_tensors(name, shapes, seed))
        effect = np.abs(prompt_logits(other, case_prompt(name, seed)) - logits).max() / np.abs(logits).max()
        if effect < _MIN_EFFECT:
            raise RuntimeError(f"{name}: {change} changes logits by {effect:.1e} only")


def make(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """One case: what its JSON file holds, and its arrays."""
    for seed in range(200):
        # A fresh model each time: ropes with dynamic scaling remember the longest sequence they have seen.
        model = build(CASES[name].config)
        shapes = stored_shapes(model)
        fill(model, case_tensors(name, shapes, seed))
        prompt = case_prompt(name, seed)
        tokens, rows = greedy_run(model, prompt, NEW_TOKENS)
        if margin(rows) >= _MIN_MARGIN and len(set(tokens)) >= _MIN_DISTINCT:
            break
    else:
        raise RuntimeError(f"{name}: no seed with clear and varied greedy tokens; last {margin(rows):.1e}, {tokens}")
    model = build(CASES[name].config)
    fill(model, case_tensors(name, shapes, seed))
    logits = prompt_logits(model, prompt)
    check_effects(name, shapes, seed, logits)
    positions = sorted({round(i * (len(prompt) - 1) / (_KEPT_POSITIONS - 1)) for i in range(_KEPT_POSITIONS)})
    stored = {
        "seed": seed,
        "positions": positions,
        "greedy": tokens,
        "saved_config": json.loads(model.config.to_json_string(use_diff=True)),
        "shapes": {tensor: list(shape) for tensor, shape in shapes.items()},
    }
    log_probs = torch.log_softmax(torch.tensor(rows, dtype=torch.float64), dim=-1).numpy()[
        np.arange(NEW_TOKENS), tokens
    ]
    print(f"{name:32} seed {seed:3}  margin {margin(rows):.1e}  distinct {len(set(tokens))}")
    return stored, {f"{name}/logits": logits[positions], f"{name}/log_probs": log_probs.astype(np.float32)}


def main(names: list[str]) -> None:
    """Makes the named cases, or all of them and the version record."""
    torch.set_num_threads(1)
    DATA.mkdir(exist_ok=True)
    arrays: dict[str, np.ndarray] = {}
    if names:
        with np.load(DATA / "logits.npz") as old:
            arrays = {key: old[key] for key in old}
    else:
        versions = {"transformers": transformers.__version__, "torch": torch.__version__, "numpy": np.__version__}
        (DATA / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")
    for name in names or CASES:
        stored, new = make(name)
        arrays |= new
        text = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in stored.items())
        (DATA / f"{name}.json").write_text(f"{{\n{text}\n}}\n")
    np.savez_compressed(DATA / "logits.npz", **dict(sorted(arrays.items())))


if __name__ == "__main__":
    main(sys.argv[1:])
