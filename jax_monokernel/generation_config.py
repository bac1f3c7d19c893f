"""The options of text generation, checked where they are given."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

_F32_MAX = float(np.finfo(np.float32).max)

# Option: (type, test, what is expected). Upper bounds keep values representable in the operand's dtype.
OPTIONS: dict[str, tuple[type, Callable[[Any], bool], str]] = {
    "max_new_tokens": (int, lambda v: 0 <= v < 2**31, "an integer from 0 to 2147483647"),
    "do_sample": (bool, lambda v: True, "True or False"),
    "temperature": (float, lambda v: 0 <= v <= _F32_MAX, "a finite number of at least 0 (0: greedy)"),
    "top_k": (int, lambda v: 0 <= v < 2**31, "an integer from 0 (off) to 2147483647"),
    "top_p": (float, lambda v: 0 < v <= 1, "a number above 0 and at most 1 (1: off)"),
    "min_p": (float, lambda v: 0 <= v <= 1, "a number from 0 to 1 (0: off)"),
    "repetition_penalty": (float, lambda v: 1e-30 <= v <= 1e30, "a number from 1e-30 to 1e30 (1: off)"),
    "presence_penalty": (float, lambda v: abs(v) <= _F32_MAX, "a finite number (0: off)"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How to generate. Names and meanings are those of Hugging Face's GenerationConfig where it has the option.

    Unlike there, an option that is not given is off (Hugging Face's top_k is 50 by default). Every option but
    eos_token_id may be one value for all requests or a sequence with one value per request.

    Args:
      max_new_tokens: at most so many tokens are generated.
      do_sample: False takes the best token each time, whatever the temperature; filters then change nothing.
      temperature: divides the logits; 0 is greedy.
      top_k: keep the k tokens with the largest logits (and those equal to the k-th); 0 is off.
      top_p: keep the smallest set of best tokens whose probabilities sum to at least top_p; 1 is off.
      min_p: keep tokens whose probability is at least min_p times that of the best token; 0 is off.
      repetition_penalty: of tokens in the prompt or generated, positive logits are divided and others multiplied by it.
      presence_penalty: subtracted from the logits of tokens that were generated (as in the OpenAI API).
      eos_token_id: the id or ids that end a request; None: only its length does.
      logit_bias: added to the logits: a mapping from token id to bias, or an array [vocab] or [batch, vocab]. A bias of
        -inf bans a token.

    Raises:
      TypeError: a value of the wrong type.
      ValueError: a value out of range.
    """

    max_new_tokens: int | Sequence[int] = 128
    do_sample: bool | Sequence[bool] = False
    temperature: float | Sequence[float] = 1.0
    top_k: int | Sequence[int] = 0
    top_p: float | Sequence[float] = 1.0
    min_p: float | Sequence[float] = 0.0
    repetition_penalty: float | Sequence[float] = 1.0
    presence_penalty: float | Sequence[float] = 0.0
    eos_token_id: int | Sequence[int] | None = None
    logit_bias: Mapping[int, float] | np.ndarray | jax.Array | None = None

    def __post_init__(self) -> None:
        for name in OPTIONS:
            object.__setattr__(self, name, _checked_option(name, getattr(self, name)))
        object.__setattr__(self, "eos_token_id", _checked_ids(self.eos_token_id))
        object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))


def _plain(value: Any) -> Any:
    """Arrays as (nested) lists and Python scalars; anything else as it is."""
    _refuse_tracer(value)
    return np.asarray(value).tolist() if isinstance(value, (np.ndarray, np.generic, jax.Array)) else value


def _refuse_tracer(value: Any) -> None:
    if isinstance(value, jax.core.Tracer):
        raise TypeError("GenerationConfig holds concrete values; where they are traced, build SamplingParams from them")


def _checked_option(name: str, value: Any) -> Any:
    """The value, or a tuple of values, as Python scalars of the option's type."""
    kind, accepts, expected = OPTIONS[name]
    value = _plain(value)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return tuple(_checked_scalar(f"{name}[{i}]", v, kind, accepts, expected) for i, v in enumerate(value))
    return _checked_scalar(name, value, kind, accepts, expected)


def _checked_scalar(name: str, value: Any, kind: type, accepts: Callable[[Any], bool], expected: str) -> Any:
    value = _plain(value)
    try:
        if (kind is bool) != isinstance(value, bool) or isinstance(value, str | bytes):
            raise TypeError
        converted = operator.index(value) if kind is int else kind(value)
    except OverflowError:
        raise ValueError(f"{name} is {value!r}; expected {expected}") from None
    except (TypeError, ValueError):
        raise TypeError(f"{name} is {value!r}; expected {expected}") from None
    if not accepts(converted):
        raise ValueError(f"{name} is {value!r}; expected {expected}")
    return converted


def _checked_id(name: str, value: Any) -> int:
    return _checked_scalar(name, value, int, lambda v: 0 <= v < 2**31, "a token id, an integer from 0 to 2147483647")


def _checked_ids(ids: Any) -> tuple[int, ...] | None:
    ids = _plain(ids)
    if ids is None:
        return None
    several = isinstance(ids, Collection) and not isinstance(ids, str | bytes)
    return tuple(_checked_id("eos_token_id", i) for i in (ids if several else (ids,))) or None


def _checked_bias(bias: Any) -> dict[int, float] | np.ndarray | None:
    if bias is None:
        return None
    if isinstance(bias, Mapping):
        expected = "a mapping from token ids to numbers below infinity"
        return {
            _checked_id("logit_bias's key", i): _checked_scalar(
                f"logit_bias[{i}]", b, float, lambda v: v <= _F32_MAX, expected
            )
            for i, b in bias.items()
        }
    _refuse_tracer(bias)
    try:
        with np.errstate(over="ignore"):  # to inf, which is refused below
            array = np.array(bias, np.float32)
    except (TypeError, ValueError):
        raise TypeError("logit_bias is neither a mapping from token ids to numbers nor an array of numbers") from None
    if array.ndim not in (1, 2):
        raise ValueError(f"logit_bias has shape {list(array.shape)}; expected [vocab] or [batch, vocab]")
    if not np.all(array < np.inf):
        raise ValueError("logit_bias has NaN or +inf in it; expected numbers below infinity (-inf bans a token)")
    array.flags.writeable = False
    return array
