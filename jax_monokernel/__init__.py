"""The whole decode of an LLM request as one XLA custom call."""

from jax_monokernel._version import __version__
from jax_monokernel.sampling import GenerationConfig, SamplingParams, sample, sampling_params
from jax_monokernel.spec import DecoderSpec, LayerSpec, RopeSpec
from jax_monokernel.state import DecodeState, empty_state
from jax_monokernel.weights import DecoderWeights, LayerWeights

__all__ = [
    "DecodeState",
    "DecoderSpec",
    "DecoderWeights",
    "GenerationConfig",
    "LayerSpec",
    "LayerWeights",
    "RopeSpec",
    "SamplingParams",
    "__version__",
    "empty_state",
    "sample",
    "sampling_params",
]
