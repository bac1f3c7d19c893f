"""Models made ready to decode: weights by role, and packed into a tape once."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax

from jax_monokernel._packing import pack_jitted, pack_over
from jax_monokernel.plan import Plan, make_plan
from jax_monokernel.prefill import prefill
from jax_monokernel.protocol import DecoderModel, PrefillFunction, TextTokenizer
from jax_monokernel.spec import DecoderSpec
from jax_monokernel.state import DecodeState
from jax_monokernel.tape import Tape, unpack
from jax_monokernel.weights import DecoderWeights, check_weights, used_up

if TYPE_CHECKING:
    from jax_monokernel.topology.placement import Placement

# As `PrefillFunction`, from weights by role or from a tape.
SourcePrefill = Callable[[DecoderSpec, DecoderWeights | Tape, jax.Array, jax.Array, DecodeState], DecodeState]


def pack_for(
    spec: DecoderSpec, weights: DecoderWeights, plan: Plan, *, near: bool = True
) -> tuple[Tape, Placement | None]:
    """Packs weights near the units that read them where that pays and `near` allows it, and elsewhere as `pack` does.

    Returns:
      The tape, and how its pages were placed; None where that was not asked for, or where nobody would.
    """
    if plan.platform != "rocm" or not near:
        return pack_jitted(spec, weights, plan), None
    # Not above: they take time to import.
    from jax_monokernel.topology.near import pack_near
    from jax_monokernel.topology.placement import Placement

    try:
        return pack_near(spec, weights, plan)
    except (ValueError, RuntimeError) as error:  # no such device, or it is in use: decoding does without
        return pack_jitted(spec, weights, plan), Placement(None, float("nan"), float("nan"), str(error))


class PackedWeights:
    """A model's weights as they were at one time, by role (for prefill) and as a tape (for decode).

    The tape is packed when it is first asked for. Either may be all that there is.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        weights: DecoderWeights | None,
        plan: Plan | None = None,
        tape: Tape | None = None,
        *,
        near: bool = True,
        placement: Placement | None = None,
    ):
        self.spec = spec
        self.weights = weights
        self.plan = plan
        self.near = near  # whether pages may be placed
        self.placement = placement  # of the tape
        self._tape = tape
        self._gone = False
        self._lock = threading.Lock()

    @property
    def tape(self) -> Tape:
        """The packed weights; another copy of them."""
        with self._lock:
            if self._gone:
                raise ValueError("these weights were used up by repack(donate=True); use what it returned")
            if self._tape is None:
                assert self.weights is not None
                plan = self.plan or make_plan(self.spec)
                self._tape, self.placement = pack_for(self.spec, self.weights, plan, near=self.near)
            return self._tape

    @property
    def tape_if_packed(self) -> Tape | None:
        """The tape, or None where nothing has asked for it yet."""
        with self._lock:
            return self._tape

    def without_weights(self) -> PackedWeights:
        """The same, as a tape alone."""
        tape = self.tape
        return PackedWeights(self.spec, None, tape.plan, tape, near=self.near, placement=self.placement)

    def use_up(self) -> Tape:
        """The tape, for good: it cannot be had again."""
        tape = self.tape
        with self._lock:
            if self._gone:  # by another thread, just now
                raise ValueError("these weights were used up by repack(donate=True); use what it returned")
            self._gone, self._tape, self.weights = True, None, None
        return tape


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """All that `generate` needs of a model, with its weights as they were when this was made."""

    packed: PackedWeights
    prefill: SourcePrefill
    tokenizer: TextTokenizer | None
    eos_token_id: tuple[int, ...]

    @property
    def spec(self) -> DecoderSpec:
        """What the model computes."""
        return self.packed.spec

    @property
    def weights(self) -> DecoderWeights:
        """The weights by role.

        Raises:
          ValueError: they were not kept.
        """
        if self.packed.weights is None:
            raise ValueError("the weights by role were not kept; use `source`, or prepare(model, keep_weights=True)")
        return self.packed.weights

    @property
    def source(self) -> DecoderWeights | Tape:
        """What `prefill` reads: the weights by role where they are kept, else the tape."""
        weights = self.packed.weights
        return self.packed.tape if weights is None else weights

    @property
    def keeps_weights(self) -> bool:
        """Whether the weights are held by role as well."""
        return self.packed.weights is not None

    @property
    def tape(self) -> Tape:
        """The weights as decode reads them."""
        return self.packed.tape

    @property
    def placement(self) -> Placement | None:
        """How the tape's pages were placed in memory, on ROCm (`topology.pack_near`); None elsewhere, or not packed."""
        return self.packed.placement

    def repack(self, model: DecoderModel | DecoderWeights, *, donate: bool = False) -> Prepared:
        """The same with other weights: after a training step, with a LoRA merged, or another model of equal spec.

        Packing, prefill and decode are the same compiled programs with other operands.

        Args:
          model: the new weights, or a model that has them. A model's tokenizer and eos_token_id are used as well.
          donate: write the new tape over this one's memory. This one cannot be used afterwards; decodes that are
            running finish first.

        Raises:
          ValueError: another spec, weights that do not fit it, or something that was used up before.
        """
        spec, plan = self.spec, self.tape.plan
        if isinstance(model, DecoderWeights):
            check_weights(spec, model)
            weights, described = model, self
        else:
            if _checked_spec(model) != spec:
                raise ValueError("the model has another spec than the one that was packed; use prepare(model)")
            weights, described = _checked_weights(model, spec), _describe(model, self.packed)
        keep = self.keeps_weights
        near, placement = self.packed.near, self.packed.placement
        if donate:
            old = self.packed.use_up()
            address = old.streams.unsafe_buffer_pointer()
            tape = pack_over(spec, weights, plan, (old.streams, old.constants), old.pages, old.die_units)
            moved = old.pages is not None and tape.streams.unsafe_buffer_pointer() != address
        if not donate or moved:
            tape, placement = pack_for(spec, weights, plan, near=near)
        packed = PackedWeights(spec, weights if keep else None, plan, tape, near=near, placement=placement)
        return dataclasses.replace(described, packed=packed)


def prepare(
    model: DecoderModel | Prepared, plan: Plan | None = None, *, keep_weights: bool = True, placement: bool = True
) -> Prepared:
    """Packs a model's weights; `generate` takes the result in place of the model.

    `generate(model, ...)` does this by itself and keeps the tape while the model lives and its parameters stay the same
    arrays; it packs again when they have changed. Prepare a model yourself to choose the plan, to pay for packing at a
    time of your choice, or where looking for changes costs too much: what is prepared never changes.

    Args:
      model: see `DecoderModel`.
      plan: device geometry; by default that of where JAX puts arrays.
      keep_weights: whether to hold the weights by role as well. If not, prefill unpacks one layer after the other from
        the tape, and once the model itself is dropped, memory holds one copy of the weights. A `prefill` that the model
        brings gets them unpacked all at once, for the time of a call.
      placement: whether pages of the tape may be placed near the units that read them, on a GPU of AMD's that was
        measured and where that is faster (`topology.pack_near`). `Prepared.placement` says what came of it.

    Raises:
      ValueError: not such a model, or weights that do not fit its spec.
    """
    if isinstance(model, Prepared):
        if keep_weights or not model.keeps_weights:
            return model
        return dataclasses.replace(model, packed=model.packed.without_weights())
    spec = _checked_spec(model)
    packed = PackedWeights(spec, _checked_weights(model, spec), plan, near=placement)
    jax.block_until_ready(packed.tape)
    return _describe(model, packed if keep_weights else packed.without_weights())


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
            and not used_up(leaves)
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
    if function is not prefill:
        function = _from_tapes_too(function)
    tokenizer = getattr(model, "tokenizer", None)
    eos = getattr(model, "eos_token_id", None)
    if eos is None:
        eos = getattr(tokenizer, "eos_token_id", None)
    ids = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
    return Prepared(packed, function, tokenizer, ids)


@functools.lru_cache(maxsize=64)
def _from_tapes_too(function: PrefillFunction) -> SourcePrefill:
    """A model's own prefill, which knows weights by role, given either. The same function each time, as jit needs."""

    def prefill_unpacked(
        spec: DecoderSpec, weights: DecoderWeights | Tape, tokens: jax.Array, lengths: jax.Array, state: DecodeState
    ) -> DecodeState:
        by_role = unpack(weights) if isinstance(weights, Tape) else weights
        return function(spec, by_role, tokens, lengths, state)

    return prefill_unpacked


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
    if used_up(weights):
        raise ValueError(
            "the model's parameters were donated to another call, a training step say, and are gone; give the model "
            "those that came back (nnx.update), or prepare(model, keep_weights=False) before it is trained"
        )
    return weights
