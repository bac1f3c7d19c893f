"""Models from Hugging Face checkpoints (folders or hub ids), and back."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import huggingface_hub
import jax
import jax.numpy as jnp
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from jax_monokernel.checkpoint_saving import CONFIG
from jax_monokernel.checkpoints import Checkpoint, CheckpointError, load_weights, save_weights
from jax_monokernel.models.decoder import Decoder
from jax_monokernel.models.origin import Origin
from jax_monokernel.models.registry import Family, canonical_name, family_of
from jax_monokernel.safetensors_file import short
from jax_monokernel.spec import DecoderSpec, DTypeName

# What the hub is asked for. Subfolders and "consolidated" files hold the same weights in other forms.
_ALLOW = ["*.json", "*.safetensors", "*.jinja"]
_IGNORE = ["*/*", "consolidated*"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# Files beside the weights that travel with a model.
_COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_STORED = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def from_pretrained(
    path_or_hub_id: str | os.PathLike[str],
    *,
    dtype: Any = None,
    device: jax.Device | jax.sharding.Sharding | None = None,
    revision: str | None = None,
    progress: bool | None = None,
) -> Decoder:
    """A model with the weights of a Hugging Face checkpoint.

    Args:
      path_or_hub_id: a folder with config.json and safetensors files, or the id of a model on the Hugging Face hub
        ("organisation/name"), which is downloaded unless it is in the local cache.
      dtype: of the weights: bfloat16, float16 or float32, by name or as a dtype. None: as config.json says.
      device: where to put them; None for JAX's default device.
      revision: branch, tag or commit on the hub.
      progress: whether to show a progress bar for loading on stderr; None shows it for checkpoints above 1 GB on a
        terminal. Downloads show the hub client's own bars, which HF_HUB_DISABLE_PROGRESS_BARS=1 turns off.

    Raises:
      CheckpointError: nothing there, damaged files, tensors missing, left over or of the wrong shape.
      ValueError: a dtype or a model type that is not supported, or a config with something that changes the mathematics
        and is not supported.
    """
    checkpoint = Checkpoint(_folder(path_or_hub_id, revision))
    config = checkpoint.config
    family, spec = _described(checkpoint, dtype)
    weights = load_weights(
        checkpoint,
        spec,
        family.tensor_map(spec),
        device=device,
        progress=progress,
        rename=functools.partial(canonical_name, config["model_type"]),
    )
    return Decoder.from_weights(spec, weights, origin=Origin(checkpoint.path.absolute(), json.dumps(config)))


def pretrained_spec(path_or_hub_id: str | os.PathLike[str], *, dtype: Any = None) -> DecoderSpec:
    """What the model of a checkpoint computes, without loading its weights.

    Arguments and errors are those of `from_pretrained`.
    """
    return _described(Checkpoint(_folder(path_or_hub_id, None)), dtype)[1]


def _described(checkpoint: Checkpoint, dtype: Any) -> tuple[Family, DecoderSpec]:
    name = _dtype_name(dtype) if dtype is not None else _stored_dtype(checkpoint)
    family = family_of(checkpoint.config)
    return family, family.spec_from_config(checkpoint.config, dtype=name)


def save_pretrained(
    model: Decoder,
    path: str | os.PathLike[str],
    *,
    config: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> None:
    """Writes a model as a Hugging Face checkpoint folder that `from_pretrained` and transformers read.

    The tokenizer and generation_config.json of a loaded model are copied along.

    Args:
      model: what to save.
      path: the folder; made if need be.
      config: config.json's contents; by default those that the model was loaded with.
      max_shard_bytes: above this the weights are split over several files.
      overwrite: replace a checkpoint that is there.

    Raises:
      CheckpointError: the folder holds a checkpoint and `overwrite` is not set, there is no config, it describes
        another model, or a file cannot be written.
    """
    config = model.config if config is None else config
    if config is None:
        raise CheckpointError(
            "this model was not loaded from a checkpoint, so nothing says what config.json should hold; pass config="
        )
    config = _text_part(config)
    spec = model.spec
    family = family_of(config)
    described = family.spec_from_config(config, dtype=spec.dtype)
    if described.replace(kv_dtype=spec.kv_dtype) != spec:
        fields = [f for f in described.__dataclass_fields__ if getattr(described, f) != getattr(spec, f)]
        raise CheckpointError(f"the config describes another model than this one; they differ in {', '.join(fields)}")
    folder = model.origin.folder if model.origin is not None else None
    companions = [] if folder is None else [folder / n for n in _COMPANIONS if os.path.exists(folder / n)]
    save_weights(
        path,
        spec,
        model.decoder_weights(),
        family.tensor_map(spec),
        config,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
        extra_files=companions,
    )


def _folder(path_or_hub_id: str | os.PathLike[str], revision: str | None) -> Path:
    if not isinstance(path_or_hub_id, str | os.PathLike):
        raise CheckpointError(
            f"{path_or_hub_id!r} is no checkpoint; expected the path of a folder, or a Hugging Face hub id such as "
            "'organisation/name'"
        )
    name = os.fspath(path_or_hub_id)
    path = Path(os.path.expanduser(name))  # Path.expanduser raises for users that there are not
    if name and os.path.isdir(path):
        return path
    if name and os.path.exists(path):
        raise CheckpointError(f"{name} is a file; expected the folder it is in")
    if not isinstance(path_or_hub_id, str) or not _HUB_ID.fullmatch(name):
        raise CheckpointError(
            f"{name!r} is not a folder here, nor a Hugging Face hub id such as 'organisation/name'; check the path"
        )
    return _download(name, revision)


def _download(hub_id: str, revision: str | None) -> Path:
    """The folder in the local cache that holds a hub model's files."""
    failed = f"{hub_id!r} is not a folder here, and could not be fetched from the Hugging Face hub: "
    try:
        folder = huggingface_hub.snapshot_download(
            hub_id, revision=revision, allow_patterns=_ALLOW, ignore_patterns=_IGNORE
        )
    except GatedRepoError as error:  # a kind of RepositoryNotFoundError
        raise CheckpointError(f"{failed}accept its terms on its page, then log in with `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{failed}no such model, or a private one; check the id, or log in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{failed}it has no revision {revision!r}; expected a branch, tag or commit") from error
    except Exception as error:  # network libraries, the hub and the file system all have their own
        raise CheckpointError(f"{failed}{type(error).__name__}: {error}") from error
    if not os.path.isdir(folder):  # nothing of it was asked for
        raise CheckpointError(f"{failed}it has no {CONFIG} and no .safetensors files")
    return Path(folder)


def _text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the language model alone, which is all that is loaded from a checkpoint for text and images."""
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        return config
    shared = {k: config[k] for k in ("tie_word_embeddings", "bos_token_id", "eos_token_id") if k in config}
    return {"model_type": f"{config.get('model_type')}_text", **text, **shared}


def _dtype_name(dtype: Any) -> DTypeName:
    with contextlib.suppress(TypeError):  # not a dtype at all; the message below says what is
        dtype = jnp.dtype(dtype).name
    for name in get_args(DTypeName):
        if dtype == name:
            return name
    raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(get_args(DTypeName))}")


def _stored_dtype(checkpoint: Checkpoint) -> DTypeName:
    text = checkpoint.config.get("text_config")
    for section in (checkpoint.config, text if isinstance(text, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            if section.get(key) is not None:
                return _known_dtype(checkpoint, str(section[key]).removeprefix("torch."))
    largest = max(checkpoint.tensors.values(), key=lambda info: math.prod(info.shape), default=None)
    return _known_dtype(checkpoint, "not given" if largest is None else _STORED.get(largest.dtype, largest.dtype))


def _known_dtype(checkpoint: Checkpoint, stored: str) -> DTypeName:
    try:
        return _dtype_name(stored)
    except ValueError:
        raise CheckpointError(
            f"{checkpoint.path}: the weights' dtype is {short(stored)}, which cannot be used as it is; pass "
            f"dtype=, one of {', '.join(get_args(DTypeName))}"
        ) from None
