"""What every model family shares: reading a config.json without losing a field, and naming a checkpoint's tensors.

A config.json is read with Hugging Face transformers' meaning: the same field names, and the same defaults where a file
leaves a field out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jax_monokernel.spec import Activation, DecoderSpec, DTypeName, LayerSpec, RopeSpec
from jax_monokernel.tensor_map import Part, TensorMap
from jax_monokernel.weights import layer_shapes

# Fields without a part in the forward computation at inference: bookkeeping, training, token ids, generation options
# (these belong to generation_config.json, but old files keep them here).
# fmt: off
_HARMLESS = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "architectures",
    "attention_dropout", "attn_implementation", "auto_map", "bad_words_ids", "begin_suppress_tokens",
    "bos_token_id", "cache_implementation", "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype",
    "early_stopping", "embd_pdrop", "embedding_dropout", "encoder_no_repeat_ngram_size", "eos_token_id",
    "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id",
    "gradient_checkpointing", "hidden_dropout", "id2label", "initializer_range", "is_llama_config",
    "keys_to_ignore_at_inference", "label2id", "length_penalty", "max_length", "max_new_tokens", "min_length",
    "model_type", "name_or_path", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_labels",
    "num_return_sequences", "output_attentions", "output_hidden_states", "output_scores", "pad_token_id", "prefix",
    "pretraining_tp", "problem_type", "remove_invalid_values", "repetition_penalty", "resid_pdrop", "return_dict",
    "return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params", "temperature",
    "tf_legacy_loss", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript", "transformers.js_config",
    "transformers_version", "typical_p", "unsloth_fixed", "unsloth_version", "use_bfloat16", "use_cache",
})
# fmt: on

# Fields that would change the mathematics, but not at these values. A family that handles one of them reads it, and
# then its entry here does not apply.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "add_cross_attention": (False,),
    "attention_bias": (False,),
    "chunk_size_feed_forward": (0,),
    "embedding_multiplier": (1,),
    "full_attn_mod": (1,),
    "interpolate_factor": (1,),
    "is_decoder": (False, True),
    "is_encoder_decoder": (False,),
    "lm_head_bias": (False,),
    "logits_scaling": (1,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1,),
    "pruned_heads": ({},),
    "residual_multiplier": (1,),
    "rope_interleaved": (False,),
    "tie_encoder_decoder": (False,),
    "use_bidirectional_attention": (False,),
    "use_mrope": (False,),
    "use_sliding_window": (False,),
}

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}

# More layers than any model; a corrupt file must not make us build a list of billions.
_MAX_LAYERS = 10_000
_F32_TINY, _F32_MAX = 2.0**-126, 3.4028234e38


class ConfigReader:
    """Typed access to the fields of a config.json object, remembering which were read.

    Args:
      config: the parsed JSON object.
      defaults: what transformers takes where the file leaves a field out.
      where: how messages call this object.

    Every reading method raises ValueError, naming the field and what was expected, for a value of another type.
    """

    def __init__(self, config: object, defaults: Mapping[str, Any] | None = None, *, where: str = "config.json"):
        if not isinstance(config, Mapping):
            raise ValueError(f"{where} is {_show(config)}; expected a JSON object")
        self.where = where
        self._config = config
        self._defaults = defaults or {}
        self._read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        """Whether the file itself sets `name` to something other than null."""
        return self._config.get(name) is not None

    def raw(self, name: str) -> Any:
        """The value, or its default; None where neither exists."""
        self._read.add(name)
        return self._config[name] if name in self._config else self._defaults.get(name)

    def fail(self, name: str, expected: str) -> ValueError:
        """The error for a field that does not hold what was expected."""
        return ValueError(f"{self.where}: {name} is {_show(self._config.get(name))}; expected {expected}")

    def optional_integer(self, name: str, *, minimum: int = 1, maximum: int = 2**31 - 1) -> int | None:
        """An int, or None for null."""
        value = self.raw(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
            raise self.fail(name, f"an integer from {minimum} to {maximum}")
        return value

    def integer(self, name: str, *, minimum: int = 1, maximum: int = 2**31 - 1) -> int:
        """An int."""
        value = self.optional_integer(name, minimum=minimum, maximum=maximum)
        if value is None:
            raise self._missing(name, "an integer")
        return value

    def optional_number(self, name: str, *, zero: bool = False) -> float | None:
        """A finite positive float, or 0 where `zero` allows it, or None for null."""
        value = self.raw(name)
        if value is None:
            return None
        if not _is_number(value) or value < 0 or (value == 0 and not zero):
            raise self.fail(name, "a number of at least 0" if zero else "a positive number")
        return float(value)

    def number(self, name: str, *, zero: bool = False) -> float:
        """A finite positive float, or 0 where `zero` allows it."""
        value = self.optional_number(name, zero=zero)
        if value is None:
            raise self._missing(name, "a number")
        return value

    def boolean(self, name: str) -> bool:
        """A bool; null and absent without a default count as false."""
        value = self.raw(name)
        if value is not None and not isinstance(value, bool):
            raise self.fail(name, "true or false")
        return bool(value)

    def optional_string(self, name: str) -> str | None:
        """A str, or None for null."""
        value = self.raw(name)
        if value is not None and not isinstance(value, str):
            raise self.fail(name, "a string")
        return value

    def numbers(self, name: str) -> tuple[float, ...]:
        """A list of finite positive numbers."""
        value = self.raw(name)
        if value is None:
            raise self._missing(name, "a list of numbers")
        if not isinstance(value, list | tuple) or not all(_is_number(x) and x > 0 for x in value):
            raise self.fail(name, "a list of positive numbers")
        return tuple(float(x) for x in value)

    def optional_object(self, name: str) -> Mapping[str, Any] | None:
        """A JSON object, or None for null."""
        value = self.raw(name)
        if value is not None and not isinstance(value, Mapping):
            raise self.fail(name, "a JSON object")
        return value

    def ignore(self, *names: str) -> None:
        """Marks fields as known to have no effect on this family."""
        self._read.update(names)

    def finish(self) -> None:
        """Raises ValueError for the first field that nothing has read and that may change the mathematics."""
        for name, value in self._config.items():
            if name in self._read or name in _HARMLESS or value is None:
                continue
            accepted = _NEUTRAL.get(name, ())
            # By type as well, because False == 0 and True == 1.
            if any(value == x and isinstance(value, bool) == isinstance(x, bool) for x in accepted):
                continue
            raise ValueError(
                f"{self.where}: {name} = {_show(value)} is not supported for this kind of model and may change what it "
                "computes" + (f"; supported here: {' or '.join(map(_show, accepted))}" if accepted else "")
            )

    def _missing(self, name: str, kind: str) -> ValueError:
        return ValueError(f"{self.where}: {name} is {'null' if name in self._config else 'missing'}; expected {kind}")


def common_fields(c: ConfigReader, dtype: DTypeName, *, activation: str = "hidden_act") -> dict[str, Any]:
    """The arguments of `DecoderSpec` that mean the same in every family."""
    hidden, heads = c.integer("hidden_size"), c.integer("num_attention_heads")
    head_dim = c.optional_integer("head_dim")
    if head_dim is None:
        if hidden % heads:
            raise ValueError(
                f"{c.where}: hidden_size ({hidden}) must be a multiple of num_attention_heads ({heads}) where "
                "head_dim is not given"
            )
        head_dim = hidden // heads
    act = c.raw(activation)
    if not isinstance(act, str) or act not in _ACTIVATIONS:
        raise c.fail(activation, f"one of {', '.join(_ACTIVATIONS)}")
    return {
        "vocab_size": c.integer("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": c.integer("intermediate_size"),
        "num_heads": heads,
        "num_kv_heads": c.optional_integer("num_key_value_heads") or heads,
        "head_dim": head_dim,
        "norm_eps": c.number("rms_norm_eps", zero=True),
        "activation": _ACTIVATIONS[act],
        "tied_head": c.boolean("tie_word_embeddings"),
        "dtype": dtype,
    }


def layer_count(c: ConfigReader) -> int:
    """num_hidden_layers."""
    return c.integer("num_hidden_layers", maximum=_MAX_LAYERS)


def layer_types(c: ConfigReader, default: Sequence[str]) -> tuple[str, ...]:
    """layer_types where the file has them, else `default`: "full_attention" or "sliding_attention" per layer."""
    value = c.raw("layer_types")
    if value is None:
        return tuple(default)
    known = ("full_attention", "sliding_attention")
    if not isinstance(value, list | tuple) or not all(isinstance(x, str) and x in known for x in value):
        raise c.fail("layer_types", f"a list of {' or '.join(known)}")
    if len(value) != len(default):
        raise ValueError(
            f"{c.where}: layer_types has {len(value)} entries; expected num_hidden_layers = {len(default)}"
        )
    return tuple(value)


def uniform_layers(c: ConfigReader, window: int | None) -> tuple[LayerSpec, ...]:
    """Layers that are all alike. Refuses layer_types that say otherwise: transformers ignores them in such families."""
    kind = "full_attention" if window is None else "sliding_attention"
    expected = [kind] * layer_count(c)
    if list(layer_types(c, expected)) != expected:
        raise c.fail("layer_types", f"{kind} for every layer of this kind of model, or no such field")
    if window is not None and "use_sliding_window" in c and not c.boolean("use_sliding_window"):
        raise c.fail("use_sliding_window", "no such field in this kind of model; sliding_window: null switches it off")
    return tuple(LayerSpec(window=window) for _ in expected)


def windowed_layers(
    c: ConfigReader, kinds: Sequence[str], window: int | None, rope_of: Mapping[str, int] | None = None
) -> tuple[LayerSpec, ...]:
    """Layers by kind: sliding ones get `window`, and each kind the rope that `rope_of` gives it (else rope 0)."""
    if window is None and "sliding_attention" in kinds:
        raise ValueError(
            f"{c.where}: some layers have sliding attention, but no window is in force; set sliding_window (and "
            "use_sliding_window where the model has that field), or make all layer_types full_attention"
        )
    return tuple(
        LayerSpec(window=window if kind == "sliding_attention" else None, rope=rope_of[kind] if rope_of else 0)
        for kind in kinds
    )


def unique_ropes(ropes: Mapping[str, RopeSpec]) -> tuple[tuple[RopeSpec, ...], dict[str, int]]:
    """The distinct ropes in order, and each key's index among them."""
    distinct = tuple(dict.fromkeys(ropes.values()))
    return distinct, {kind: distinct.index(rope) for kind, rope in ropes.items()}


# What transformers takes where a Llama's config.json leaves a field out; other families' defaults began as a copy.
LLAMA_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}

# Role -> tensor name within "model.layers.<i>.". Roles with one name share that tensor, in this order along axis 0.
LLAMA_NAMES = {
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
    "attn_norm": "input_layernorm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "o_bias": "self_attn.o_proj.bias",
    "gate_bias": "mlp.gate_proj.bias",
    "up_bias": "mlp.up_proj.bias",
    "down_bias": "mlp.down_proj.bias",
}
# Families with norms after attention and MLP. There, "post_attention_layernorm" means what it says.
POST_NORM_NAMES = LLAMA_NAMES | {
    "attn_post_norm": "post_attention_layernorm.weight",
    "mlp_norm": "pre_feedforward_layernorm.weight",
    "mlp_post_norm": "post_feedforward_layernorm.weight",
}


def tensors_by_name(spec: DecoderSpec, names: Mapping[str, str] = LLAMA_NAMES) -> TensorMap:
    """Checkpoint tensor name -> the parts it holds along axis 0, for every weight `spec` has."""
    shapes = layer_shapes(spec)
    tensors: dict[str, list[Part]] = {
        "model.embed_tokens.weight": [Part("embedding", None, (spec.vocab_size, spec.hidden_size))],
        "model.norm.weight": [Part("final_norm", None, (spec.hidden_size,))],
    }
    if not spec.tied_head:
        tensors["lm_head.weight"] = [Part("head", None, (spec.vocab_size, spec.hidden_size))]
    for layer in range(spec.num_layers):
        for role in names:
            if role in shapes:
                name = f"model.layers.{layer}.{names[role]}"
                tensors.setdefault(name, []).append(Part(f"layers.{role}", layer, shapes[role]))
    return {name: tuple(parts) for name, parts in tensors.items()}


def _is_number(value: object) -> bool:
    """An int or float that float32 can hold, since that is where it will be used; no NaN, no infinity."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return value == 0 or _F32_TINY <= abs(value) <= _F32_MAX


def _show(value: object) -> str:
    """A value as config.json spells it, cut to a readable length."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 80 else text[:77] + "..."
