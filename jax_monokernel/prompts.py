"""Prompts in any form that people have them, as padded token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jax_monokernel.prefill import bucket
from jax_monokernel.protocol import TextTokenizer

# One text, texts, lists of token ids, or an array of token ids [tokens] or [batch, tokens].
Prompt = str | Sequence[str] | Sequence[Sequence[int]] | np.ndarray | jax.Array


def token_rows(
    prompt: Prompt, lengths: Any, *, tokenizer: TextTokenizer | None, continued: Sequence[bool] | None
) -> list[np.ndarray]:
    """A prompt's token ids, one integer array per row, not yet held against the vocabulary.

    Args:
      prompt: see `Prompt`.
      lengths: with an array [batch, tokens] only: ids of each row that count, by default all.
      tokenizer: for texts.
      continued: for a state that is gone on with: whether each of its rows holds something. Those rows get no
        beginning token, and may be empty.

    Raises:
      ValueError: none of these forms, an empty row, or another number of rows than the state has.
    """
    if isinstance(prompt, jax.core.Tracer):
        raise ValueError("the prompt is being traced; inside jit, use prefill and decode themselves")
    if isinstance(prompt, np.ndarray | jax.Array):
        rows = _array_rows(np.asarray(prompt), lengths)
    else:
        if lengths is not None:
            raise ValueError("lengths go with a prompt that is an array [batch, tokens]; lists have their own")
        rows = _list_rows(prompt, tokenizer, continued)
    begun = [False] * len(rows) if continued is None else continued
    if len(begun) != len(rows):
        raise ValueError(f"{len(rows)} prompts for a state of {len(begun)} rows; expected one per row")
    for i, row in enumerate(rows):
        if not row.size and not begun[i]:
            raise ValueError(f"row {i} of the prompt is empty; expected at least one token")
    return rows


def pad(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Rows as int32 [batch, width], the width a bucket, and their lengths, int32 [batch]."""
    lengths = np.array([row.size for row in rows], np.int32)
    tokens = np.zeros((len(rows), bucket(int(lengths.max()))), np.int32)
    for padded, row in zip(tokens, rows, strict=True):
        padded[: row.size] = row
    return tokens, lengths


def _array_rows(array: np.ndarray, lengths: Any) -> list[np.ndarray]:
    _check_integers(array, "the prompt")
    if array.ndim == 1 and lengths is None:
        array = array[None]
    if array.ndim != 2 or array.shape[0] < 1:
        raise ValueError(f"the prompt has shape {list(array.shape)}; expected [batch, tokens]")
    if lengths is None:
        return list(array)
    counts = np.asarray(lengths)
    _check_integers(counts, "lengths")
    if counts.shape != array.shape[:1] or np.any((counts < 0) | (counts > array.shape[1])):
        raise ValueError(
            f"lengths are {counts.tolist()}; expected {array.shape[0]} numbers from 0 to {array.shape[1]}, one per row"
        )
    return [row[:n] for row, n in zip(array, counts, strict=True)]


def _list_rows(prompt: Any, tokenizer: TextTokenizer | None, continued: Sequence[bool] | None) -> list[np.ndarray]:
    if isinstance(prompt, str):
        prompt = [prompt]
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes) or not len(prompt):
        raise ValueError(
            f"the prompt is {_short(prompt)}; expected a text, a list of texts, a list of lists of token ids, or an "
            "integer array [batch, tokens]"
        )
    if all(isinstance(row, str) for row in prompt):
        if tokenizer is None:
            raise ValueError("the prompt is text, but the model has no tokenizer; pass token ids")
        begun = [] if continued is None else continued
        encoded = [
            tokenizer.encode(text, add_special_tokens=not (i < len(begun) and begun[i]))
            for i, text in enumerate(prompt)
        ]
        return [np.array(ids, np.int64) for ids in encoded]
    if all(isinstance(i, int | np.integer) and not isinstance(i, bool) for i in prompt):
        prompt = [prompt]
    return [_id_row(i, row) for i, row in enumerate(prompt)]


def _id_row(index: int, row: Any) -> np.ndarray:
    name = f"row {index} of the prompt"
    if not isinstance(row, Sequence | np.ndarray | jax.Array) or isinstance(row, str | bytes):
        raise ValueError(f"{name} is {_short(row)}; expected a list of token ids")
    try:
        ids = np.asarray(row)
    except ValueError:  # ragged again
        raise ValueError(f"{name} is {_short(row)}; expected a list of token ids") from None
    if ids.ndim != 1:
        raise ValueError(f"{name} has shape {list(ids.shape)}; expected a list of token ids")
    if not ids.size:
        return np.zeros(0, np.int64)
    _check_integers(ids, name)
    return ids


def _check_integers(array: np.ndarray, name: str) -> None:
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name} has {array.dtype} values; expected integers")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
