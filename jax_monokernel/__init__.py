"""The whole decode of an LLM request as one XLA custom call."""

import importlib
from typing import TYPE_CHECKING, Any

try:
    import jax_monokernel._native  # noqa: F401  before what would fail in less clear words without it
except ModuleNotFoundError as error:
    if error.name != "jax_monokernel._native":
        raise
    raise ImportError(
        f"this is the source folder of jax_monokernel ({__path__[0]}), which has no native part. Python prefers it to "
        "an installed package when it is started beside it: start it in another folder, or pip install -e . in this one"
    ) from None

from jax_monokernel._export import export_program
from jax_monokernel._version import __version__
from jax_monokernel.decode import cancel, decode
from jax_monokernel.generate import Generation, generate
from jax_monokernel.memory import MemoryReport, memory_report
from jax_monokernel.plan import Plan, make_plan
from jax_monokernel.prefill import prefill
from jax_monokernel.prepared import Prepared, prepare
from jax_monokernel.protocol import DecoderModel
from jax_monokernel.sampling import GenerationConfig, SamplingParams, sample, sampling_params
from jax_monokernel.spec import DecoderSpec, LayerSpec, RopeSpec
from jax_monokernel.state import FULL, RUNNING, STOPPED, DecodeResult, DecodeState, empty_state
from jax_monokernel.tape import Tape, pack, unpack
from jax_monokernel.weights import DecoderWeights, LayerWeights, weight_shapes

if TYPE_CHECKING:
    from jax_monokernel.chat import Chat, Turn
    from jax_monokernel.chat_template import ChatTemplate
    from jax_monokernel.streaming import Piece, Stream, stream

__all__ = [
    "FULL",
    "RUNNING",
    "STOPPED",
    "Chat",
    "ChatTemplate",
    "DecodeResult",
    "DecodeState",
    "DecoderModel",
    "DecoderSpec",
    "DecoderWeights",
    "Generation",
    "GenerationConfig",
    "LayerSpec",
    "LayerWeights",
    "MemoryReport",
    "Piece",
    "Plan",
    "Prepared",
    "RopeSpec",
    "SamplingParams",
    "Stream",
    "Tape",
    "Turn",
    "__version__",
    "cancel",
    "decode",
    "empty_state",
    "export_program",
    "generate",
    "make_plan",
    "memory_report",
    "pack",
    "prefill",
    "prepare",
    "sample",
    "sampling_params",
    "stream",
    "unpack",
    "weight_shapes",
]

# What few programs need, and needs modules of its own.
_LATER = {
    "Chat": "chat",
    "ChatTemplate": "chat_template",
    "Piece": "streaming",
    "Stream": "streaming",
    "Turn": "chat",
    "stream": "streaming",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(f"jax_monokernel.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
