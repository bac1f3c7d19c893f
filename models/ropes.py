"""Rotary embeddings as config.json describes them, in both spellings that are in use.

The older one has `rope_theta`, `partial_rotary_factor` and `rope_scaling` (null for plain ropes) at the top level; the
newer one has all of it in `rope_parameters`. Meaning and defaults are those of transformers' `modeling_rope_utils`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, get_args

from jax_monokernel.models.common import ConfigReader
from jax_monokernel.spec import RopeScaling, RopeSpec


def rope_from_config(
    c: ConfigReader,
    head_dim: int,
    *,
    theta: float = 10_000.0,
    partial: bool = False,
    kinds: tuple[str, ...] = get_args(RopeScaling),
    aliases: Mapping[str, str] | None = None,
) -> RopeSpec:
    """The one rope of a model whose layers all share it.

    Args:
      c: the config; marks the rope fields as read.
      head_dim: width of a head.
      theta: the family's default base.
      partial: whether the family can rotate a leading part of each head only.
      kinds: scalings the family knows.
      aliases: the family's other names for scalings.

    Raises:
      ValueError: a field is unknown, missing, contradictory or of the wrong type; the message names it.
    """
    sections = {name: c.optional_object(name) or {} for name in ("rope_scaling", "rope_parameters")}
    given = {name: params for name, params in sections.items() if params} or {"rope_parameters": {}}
    ropes = {
        parse_rope(
            ConfigReader(params, where=f"{c.where}: {name}"),
            head_dim,
            theta=c.optional_number("rope_theta") or theta,
            fraction=c.optional_number("partial_rotary_factor") or 1.0,
            partial=partial,
            max_position=c.integer("max_position_embeddings"),
            original=c.optional_integer("original_max_position_embeddings"),
            kinds=kinds,
            aliases=aliases,
        )
        for name, params in given.items()
    }
    if len(ropes) > 1:
        raise ValueError(f"{c.where}: rope_scaling and rope_parameters describe different ropes; keep one of them")
    return ropes.pop()


def parse_rope(
    r: ConfigReader,
    head_dim: int,
    *,
    theta: float,
    max_position: int,
    fraction: float = 1.0,
    partial: bool = False,
    original: int | None = None,
    kinds: tuple[str, ...] = get_args(RopeScaling),
    aliases: Mapping[str, str] | None = None,
) -> RopeSpec:
    """The rope of one `rope_scaling` or `rope_parameters` object.

    Args:
      r: the object; all its fields must be known.
      head_dim: width of a head.
      theta: base where the object does not say.
      max_position: the model's context length in tokens.
      fraction: rotated part of a head where the object does not say.
      partial: whether parts other than 1 can be handled.
      original: the top-level original_max_position_embeddings, which wins over the object's own.
      kinds, aliases: as in `rope_from_config`.
    """
    fields: dict[str, Any] = {
        "theta": r.optional_number("rope_theta") or theta,
        "rotary_dim": _rotary_dim(r, head_dim, fraction, partial),
        "scaling": _kind(r, kinds, aliases or {}),
    }
    scaling = fields["scaling"]
    if scaling in ("linear", "dynamic"):
        fields["factor"] = r.number("factor")
    if scaling == "dynamic":
        fields["original_max_position"] = max_position
    if scaling in ("llama3", "yarn", "longrope"):
        inner = r.optional_integer("original_max_position_embeddings")
        old = original or inner or max_position
        fields["original_max_position"] = old
        if scaling == "llama3":
            fields |= _llama3(r)
        else:
            # The longer context over the older one, where the object does not give it.
            factor = r.optional_number("factor") or max_position / old
            fields |= _yarn(r, factor, fields["theta"]) if scaling == "yarn" else _longrope(r, factor, old)
    r.finish()
    return RopeSpec(**fields)


def _kind(r: ConfigReader, kinds: tuple[str, ...], aliases: Mapping[str, str]) -> str:
    """rope_type, or `type` as it was once called."""
    new, old = r.optional_string("rope_type"), r.optional_string("type")
    if new is not None and old is not None and aliases.get(new, new) != aliases.get(old, old):
        raise ValueError(f"{r.where}: rope_type is {new!r} but type is {old!r}; keep one of them")
    kind = new or old or "default"
    kind = aliases.get(kind, kind)
    if kind not in kinds:
        raise ValueError(f"{r.where}: rope_type {kind!r} is not supported; expected one of {', '.join(kinds)}")
    return kind


def _rotary_dim(r: ConfigReader, head_dim: int, fraction: float, partial: bool) -> int:
    fraction = r.optional_number("partial_rotary_factor") or fraction
    rotary_dim = int(head_dim * fraction)
    if rotary_dim != head_dim and not partial:
        raise ValueError(
            f"{r.where}: partial_rotary_factor = {fraction} is not supported for this kind of model (transformers "
            "rotates whole heads here)"
        )
    if rotary_dim < 2 or rotary_dim % 2 or rotary_dim > head_dim:
        raise ValueError(
            f"{r.where}: partial_rotary_factor = {fraction} rotates {rotary_dim} of a head's {head_dim} dimensions; "
            f"expected an even number from 2 to {head_dim}"
        )
    return rotary_dim


def _llama3(r: ConfigReader) -> dict[str, Any]:
    low, high = r.number("low_freq_factor"), r.number("high_freq_factor")
    if high <= low:
        raise ValueError(f"{r.where}: high_freq_factor ({high}) must be larger than low_freq_factor ({low})")
    return {"factor": r.number("factor"), "low_freq_factor": low, "high_freq_factor": high}


def _yarn(r: ConfigReader, factor: float, theta: float) -> dict[str, Any]:
    r.ignore("finetuned")  # a note in early YaRN checkpoints
    if theta <= 1:
        raise ValueError(f"{r.where}: yarn scaling needs rope_theta above 1, got {theta}")
    attention = r.optional_number("attention_factor", zero=True)
    mscale = r.optional_number("mscale", zero=True)
    mscale_all = r.optional_number("mscale_all_dim", zero=True)
    if attention is None:
        # arXiv:2309.00071 eq. 22, and DeepSeek's ratio of two of them.
        attention = _mscale(factor)
        if mscale and mscale_all:
            attention = _mscale(factor, mscale) / _mscale(factor, mscale_all)
    return {
        "factor": factor,
        "attention_factor": attention,
        "beta_fast": r.optional_number("beta_fast") or 32.0,
        "beta_slow": r.optional_number("beta_slow") or 1.0,
        "truncate": r.raw("truncate") is None or r.boolean("truncate"),
    }


def _longrope(r: ConfigReader, factor: float, old: int) -> dict[str, Any]:
    attention = r.optional_number("attention_factor", zero=True)
    if attention is None:
        # arXiv:2402.13753; 1 within the original context.
        attention = 1.0 if factor <= 1 or old < 2 else math.sqrt(1 + math.log(factor) / math.log(old))
    # The factor itself only matters through the attention factor, so it is not part of the rope's meaning.
    return {
        "short_factor": r.numbers("short_factor"),
        "long_factor": r.numbers("long_factor"),
        "attention_factor": attention,
    }


def _mscale(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
