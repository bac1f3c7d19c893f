"""What a model offers so that `generate` can run it. docs/add-a-model.md shows how."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, runtime_checkable

import jax

from jax_monokernel.spec import DecoderSpec
from jax_monokernel.state import DecodeState
from jax_monokernel.weights import DecoderWeights

# (spec, weights, tokens int32 [batch, width], lengths int32 [batch], state) -> state: as `prefill.prefill`, pure and
# jittable. All that it needs of the model must come in through its arguments.
PrefillFunction = Callable[[DecoderSpec, DecoderWeights, jax.Array, jax.Array, DecodeState], DecodeState]


@runtime_checkable
class DecoderModel(Protocol):
    """A model of any class that can say what it computes and hand over its weights.

    `generate` also uses these attributes of a model, where it has them:

      prefill: a `PrefillFunction` (a staticmethod of the class), in place of the package's own.
      tokenizer: a `TextTokenizer`, for prompts and results as text.
      eos_token_id: int or ints, the tokens that end a text, unless the call says otherwise. By default the tokenizer's.
    """

    @property
    def spec(self) -> DecoderSpec:
        """What the model computes."""

    def decoder_weights(self) -> DecoderWeights:
        """The weights' current values, by role and stacked over layers, as `weight_shapes(self.spec)` gives them."""


class TextTokenizer(Protocol):
    """Text to token ids and back: `jax_monokernel.tokenizer.Tokenizer`, or anything like it.

    It may have an `eos_token_id`, see `DecoderModel`.
    """

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Ids of a text; with what begins a text, such as a BOS token, if add_special_tokens."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids, without special tokens."""
