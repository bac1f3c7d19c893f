"""The whole decode of an LLM request as one XLA custom call."""

from jax_monokernel import _export as _export  # for what it registers
from jax_monokernel._version import __version__
from jax_monokernel.chat import Chat, Turn
from jax_monokernel.chat_template import ChatTemplate
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
    "Plan",
    "Prepared",
    "RopeSpec",
    "SamplingParams",
    "Tape",
    "Turn",
    "__version__",
    "cancel",
    "decode",
    "empty_state",
    "generate",
    "make_plan",
    "memory_report",
    "pack",
    "prefill",
    "prepare",
    "sample",
    "sampling_params",
    "unpack",
    "weight_shapes",
]
