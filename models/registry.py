"""From a config.json's `model_type` to the family that handles it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from jax_monokernel.models import (
    gemma2,
    gemma3,
    granite,
    llama,
    mistral,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    smollm3,
)
from jax_monokernel.spec import DecoderSpec, DTypeName
from jax_monokernel.tensor_map import TensorMap


class Family(Protocol):
    """What a family gives: these two functions, here of a module models/<family>.py."""

    def spec_from_config(self, config: Mapping[str, Any], *, dtype: DTypeName) -> DecoderSpec:
        """What the model of a parsed config.json computes, with weights in `dtype`.

        Raises:
          ValueError: a field is missing, of the wrong type, or would change the mathematics and is not handled; the
            message names it.
        """
        ...

    def tensor_map(self, spec: DecoderSpec) -> TensorMap:
        """What each tensor of a checkpoint holds, for a spec that this family made."""
        ...


FAMILIES: dict[str, Family] = {
    "gemma2": gemma2,
    "gemma3": gemma3,
    "gemma3_text": gemma3,
    "granite": granite,
    "llama": llama,
    "mistral": mistral,
    "olmo2": olmo2,
    "phi3": phi3,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "smollm3": smollm3,
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a parsed config.json, by its model_type.

    Raises:
      ValueError: model_type is missing or not one of `FAMILIES`.
    """
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        what = "no model_type" if model_type is None else f"model_type {str(model_type)[:80]!r}, which is not supported"
        raise ValueError(
            f"config.json has {what}; expected one of {', '.join(sorted(FAMILIES))}. A model of another kind can be "
            "used through a DecoderSpec of its own"
        )
    return family


def canonical_name(model_type: str, name: str) -> str | None:
    """What a tensor map calls a checkpoint's tensor; None for one that text needs nothing of (parts for images)."""
    return gemma3.text_tensor_name(name) if model_type == "gemma3" else name
