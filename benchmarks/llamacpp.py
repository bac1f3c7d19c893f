"""The llama.cpp peer, through llama-cpp-python's low-level API. Imports nothing of ours."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path

import llama_cpp
import numpy as np

_KV_TYPES = {"float16": llama_cpp.GGML_TYPE_F16, "bfloat16": 30, "float32": llama_cpp.GGML_TYPE_F32}


_errors: list[str] = []


@llama_cpp.llama_log_callback
def _keep_errors(level: int, text: bytes, _user: object) -> None:
    if level == 4:  # GGML_LOG_LEVEL_ERROR
        _errors.append(text.decode(errors="replace").strip())


class LlamaCpp:
    """Greedy decoding of `prompt` (int [batch, tokens], equal lengths) with the model at `gguf`.

    Only `llama_decode` is timed, as llama-bench does: choosing the next token is not, which flatters llama.cpp by the
    time that an arg-max takes. The one-token graph is built before the clock starts.

    Args:
      kv_dtype: of the KV cache.
      flash_attention: 1, 0, or -1 for llama.cpp's own choice.
      mmap: 1 to map the file, 0 to read it into memory.
    """

    def __init__(
        self,
        gguf: Path,
        prompt: np.ndarray,
        new_tokens: int,
        threads: int,
        *,
        kv_dtype: str = "float16",
        flash_attention: int = -1,
        mmap: int = 1,
    ):
        self.settings = {
            "kv_dtype": kv_dtype,
            "flash_attention": flash_attention,
            "mmap": mmap,
            "system_info": llama_cpp.llama_print_system_info().decode().strip(" |"),
        }
        llama_cpp.llama_log_set(_keep_errors, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        model_params.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP if mmap else llama_cpp.LLAMA_LOAD_MODE_NONE
        self._model = llama_cpp.llama_model_load_from_file(str(gguf).encode(), model_params)
        if not self._model:
            raise RuntimeError(f"llama.cpp could not load the GGUF file: {' '.join(_errors)}")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._prompt, self._new_tokens = prompt, new_tokens
        batch, length = prompt.shape

        params = llama_cpp.llama_context_default_params()
        per_row = -(-(length + new_tokens) // 256) * 256  # llama.cpp rounds it so itself
        params.n_ctx, params.n_seq_max, params.kv_unified = batch * per_row, batch, False
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = _KV_TYPES[kv_dtype]
        params.flash_attn_type = flash_attention
        params.no_perf = True
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp could not make a context: {' '.join(_errors)}")
        self._memory = llama_cpp.llama_get_memory(self._context)
        chunk = min(length, params.n_batch)
        self._batch = llama_cpp.llama_batch_init(max(chunk, batch), 0, 1)

        for row in range(batch):
            for start in range(0, length - 1, chunk):
                tokens = prompt[row, start : min(start + chunk, length - 1)]
                self._decode(tokens, np.arange(len(tokens)) + start, np.full(len(tokens), row), logits=False)

    def measure(self) -> dict:
        """{"seconds": of new_tokens steps, "steps": seconds of each, "tokens": int [batch][new_tokens]}."""
        batch, length = self._prompt.shape
        rows = np.arange(batch)
        llama_cpp.llama_memory_seq_rm(self._memory, -1, length - 2, -1)
        self._decode(self._prompt[:, -2], np.full(batch, length - 2), rows)
        last, tokens, steps = self._prompt[:, -1], [], []
        for step in range(self._new_tokens):
            steps.append(self._decode(last, np.full(batch, length - 1 + step), rows))
            last = np.array([self._argmax(int(row)) for row in rows])
            tokens.append(last)
        return {"seconds": sum(steps), "steps": steps, "tokens": np.stack(tokens, axis=1).tolist()}

    def _decode(self, tokens: np.ndarray, positions: np.ndarray, rows: np.ndarray, *, logits: bool = True) -> float:
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i in range(len(tokens)):
            batch.token[i], batch.pos[i] = int(tokens[i]), int(positions[i])
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, int(rows[i]), logits
        start = time.perf_counter()
        status = llama_cpp.llama_decode(self._context, batch)
        llama_cpp.llama_synchronize(self._context)
        seconds = time.perf_counter() - start
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        return seconds

    def _argmax(self, row: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, row)
        return int(np.argmax(np.ctypeslib.as_array(logits, (self._vocab_size,))))
