"""The transformers peer: a static cache and a compiled step (with CUDA graphs on a GPU), as its manual has it."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._inductor.config
import transformers


class Transformers:
    """Greedy decoding of `prompt` (int [batch, tokens], equal lengths) with the checkpoint in a folder.

    All steps are timed together, arg-max included, from the first until the last token is there.

    Args:
      folder: config.json and weights.
      prompt: token ids.
      new_tokens: steps.
      threads: of PyTorch on a CPU.
      dtype: of weights and cache.
      compiled: 0 runs the model as it is.
      mode: of torch.compile. By default reduce-overhead (CUDA graphs) on a GPU, and default on a CPU.
      freezing: 1 has the compiler take weights for constants, and lay them out as its kernels like.
    """

    def __init__(
        self,
        folder: Path,
        prompt: np.ndarray,
        new_tokens: int,
        threads: int,
        dtype: str,
        *,
        compiled: int = 1,
        mode: str | None = None,
        freezing: int = 0,
    ):
        cuda = torch.cuda.is_available()
        mode = mode or ("reduce-overhead" if cuda else "default")
        device = torch.device("cuda" if cuda else "cpu")
        if not cuda:
            torch.set_num_threads(threads)
        self.settings: dict[str, Any] = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": str(device),
            "compiled": compiled and mode,
            "freezing": freezing,
        }
        self._model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device)
        self._model.eval()
        batch, length = prompt.shape
        self._length, self._new_tokens = length, new_tokens
        self._cache = transformers.StaticCache(config=self._model.config, max_cache_len=length + new_tokens)
        if not hasattr(self._cache.layers[0], "cumulative_length"):
            version = transformers.__version__
            raise RuntimeError(f"this peer was written for transformers 5.23, and {version} has other caches")
        tokens = torch.tensor(prompt, device=device)
        self._last = tokens[:, -1:].clone()
        positions = torch.arange(length - 1, length - 1 + new_tokens, device=device)
        self._positions = positions[:, None, None].expand(-1, batch, 1)
        with torch.no_grad():
            self._model(tokens[:, :-1], past_key_values=self._cache)

        def step(token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
            logits = self._model(token, past_key_values=self._cache, position_ids=position).logits
            return logits[:, -1].argmax(-1, keepdim=True)

        torch._inductor.config.freezing = bool(freezing)
        self._step = torch.compile(step, mode=mode, fullgraph=True, dynamic=False) if compiled else step
        self._synchronize = torch.cuda.synchronize if cuda else contextlib.nullcontext

    @torch.no_grad()
    def measure(self) -> dict[str, Any]:
        """{"seconds": of new_tokens steps, "tokens": int [batch][new_tokens]}."""
        for layer in self._cache.layers:  # in place: a compiled step knows the address
            layer.cumulative_length.fill_(self._length - 1)
        token, tokens = self._last, []
        self._synchronize()
        start = time.perf_counter()
        for position in self._positions:
            torch.compiler.cudagraph_mark_step_begin()
            token = self._step(token, position).clone()  # a graph's output is overwritten by the next run
            tokens.append(token)
        self._synchronize()
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens": torch.cat(tokens, dim=1).cpu().numpy().tolist()}
