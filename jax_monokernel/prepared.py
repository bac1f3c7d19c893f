"""Models made ready to decode: weights by role, and packed into a tape once."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import threading
import weakref
from typing import Any

import jax

from jax_monokernel.plan import Plan, make_plan
from jax_monokernel.prefill import prefill
from jax_monokernel.protocol import DecoderModel, PrefillFunction, TextTokenizer
from jax_monokernel.spec import DecoderSpec
from jax_monokernel.tape import Tape, pack
from jax_monokernel.weights import DecoderWeights, check_weights

_pack = jax.jit(pack, static_argnums=(0, 2))


class PackedWeights:
    """A model's weights as they were at one time, by role (for prefill) and as a tape (for decode).

    The tape is packed when it is first asked for.
    """

    def __init__(self, spec: DecoderSpec, weights: DecoderWeights, plan: Plan | None = None):
        self.spec = spec
        self.weights = weights
        self._plan = plan
        self._tape: Tape | None = None
        self._lock = threading.Lock()

    @property
    def tape(self) -> Tape:
        """The packed weights; another copy of them."""
        with self._lock:
            if self._tape is None:
                self._tape = _pack(self.spec, self.weights, self._plan or make_plan(self.spec))
            return self._tape


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """All that `generate` needs of a model, with its weights as they were when this was made."""

    packed: PackedWeights
    prefill: PrefillFunction
    tokenizer: TextTokenizer | None
    eos_token_id: tuple[int, ...]

    @property
    def spec(self) -> DecoderSpec:
        """What the model computes."""
        return self.packed.spec

    @property
    def weights(self) -> DecoderWeights:
        """The weights by role."""
        return self.packed.weights

    @property
    def tape(self) -> Tape:
        """The weights as decode reads them."""
        return self.packed.tape


def prepare(model: DecoderModel | Prepared, plan: Plan | None = None) -> Prepared:
    """Packs a model's weights; `generate` takes the result in place of the model.

    `generate(model, ...)` does this by itself and keeps the tape while the model lives and its parameters stay the same
    arrays; it packs again when they have changed. Prepare a model yourself to choose the plan, to pay for packing at a
    time of your choice, or where looking for changes costs too much: what is prepared never changes.

    Args:
      model: see `DecoderModel`.
      plan: device geometry; by default that of this machine's CPU.

    Raises:
      ValueError: not such a model, or weights that do not fit its spec.
    """
    if isinstance(model, Prepared):
        return model
    spec = _checked_spec(model)
    prepared = _describe(model, PackedWeights(spec, _checked_weights(model, spec), plan))
    _ = prepared.tape
    return prepared


def prepared_for(model: DecoderModel | Prepared) -> Prepared:
    """As `prepare`, but packs only when a tape is needed, and uses what earlier calls packed."""
    if isinstance(model, Prepared):
        return model
    return _describe(model, _packed_once(model))


@dataclasses.dataclass(frozen=True)
class _Entry:
    model: weakref.ref[Any]
    leaves: tuple[weakref.ref[Any], ...]
    packed: PackedWeights


# By id, as models need not be hashable. An entry goes when its model does.
_cache: dict[int, _Entry] = {}
_cache_lock = threading.Lock()


def _packed_once(model: DecoderModel) -> PackedWeights:
    spec = _checked_spec(model)
    # Stacking a module's parameters anew for each call would cost more than a short decode, so its parameters are
    # watched. Of other models the weights themselves are.
    nnx = sys.modules.get("flax.nnx")  # importing it costs half a second; who has a module has imported it
    module = nnx is not None and isinstance(model, nnx.Module)
    weights = None if module else _checked_weights(model, spec)
    watched = nnx.state(model, nnx.Not(nnx.RngState)) if nnx is not None and module else weights
    leaves = jax.tree.leaves(watched)
    # jax.Arrays do not change: the same arrays are the same values. Of anything else nothing is known.
    lasting = all(isinstance(leaf, jax.Array) for leaf in leaves)
    with _cache_lock:
        entry = _cache.get(id(model))
        if (
            lasting
            and entry is not None
            and entry.model() is model
            and entry.packed.spec == spec
            and len(entry.leaves) == len(leaves)
            and all(ref() is leaf for ref, leaf in zip(entry.leaves, leaves, strict=True))
        ):
            return entry.packed
        _cache.pop(id(model), None)
    packed = PackedWeights(spec, _checked_weights(model, spec) if weights is None else weights)
    if lasting:
        key = id(model)
        try:
            ref = weakref.ref(model, lambda _: _cache.pop(key, None))
        except TypeError:  # its class has no place for weak references
            return packed
        with _cache_lock:
            _cache[key] = _Entry(ref, tuple(weakref.ref(leaf) for leaf in leaves), packed)
    return packed


def _describe(model: DecoderModel, packed: PackedWeights) -> Prepared:
    function = getattr(model, "prefill", None) or prefill
    if not callable(function) or inspect.ismethod(function):
        raise ValueError(
            f"{type(model).__name__}.prefill must be a staticmethod (spec, weights, tokens, lengths, state) -> state: "
            "what it needs of the model comes in as weights, so that it compiles once"
        )
    tokenizer = getattr(model, "tokenizer", None)
    eos = getattr(model, "eos_token_id", None)
    if eos is None:
        eos = getattr(tokenizer, "eos_token_id", None)
    ids = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
    return Prepared(packed, function, tokenizer, ids)


def _checked_spec(model: DecoderModel) -> DecoderSpec:
    spec = getattr(model, "spec", None)
    if not isinstance(spec, DecoderSpec) or not callable(getattr(model, "decoder_weights", None)):
        raise ValueError(
            f"expected a model with `spec` and `decoder_weights()` (see DecoderModel), got {type(model).__name__}"
        )
    return spec


def _checked_weights(model: DecoderModel, spec: DecoderSpec) -> DecoderWeights:
    weights = model.decoder_weights()
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(weights)):
        raise ValueError("the model's weights are being traced; inside jit, use prefill, pack and decode themselves")
    check_weights(spec, weights)
    return weights
