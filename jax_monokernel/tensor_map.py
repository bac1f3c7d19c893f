"""Which checkpoint tensor holds which weights: the vocabulary of a family's tensor map."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from jax_monokernel.spec import DecoderSpec
from jax_monokernel.weights import layer_shapes


@dataclasses.dataclass(frozen=True)
class Part:
    """A run of rows (axis 0) of one checkpoint tensor: one role's weights, of one layer where the role has layers.

    A tensor map gives, per tensor name, the parts it holds in order; their shapes agree in every axis but the first.
    """

    role: str  # "embedding", "final_norm", "head", or "layers.<name>" as in `LayerWeights`
    layer: int | None  # index of the layer; None for a role outside the layers
    shape: tuple[int, ...]  # without the layer axis


TensorMap = Mapping[str, Sequence[Part]]


def tensor_shapes(spec: DecoderSpec, tensor_map: TensorMap) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of a map, which must hold every weight of `spec` exactly once.

    Raises:
      ValueError: the map names a role or layer that the spec does not have, gives one twice or in another shape, or
        leaves one out.
    """
    shapes = role_shapes(spec)
    missing = {(role, layer) for role in shapes for layer in _layers(spec, role)}
    tensors = {}
    for name, parts in tensor_map.items():
        for part in parts:
            if (part.role, part.layer) not in missing:
                raise ValueError(
                    f"the tensor map puts role {part.role!r}, layer {part.layer}, in {name!r}; the spec has no such "
                    "part, or the map gives it twice"
                )
            if part.shape != shapes[part.role]:
                raise ValueError(
                    f"the tensor map gives {part.role!r} in {name!r} the shape {list(part.shape)}; the spec asks for "
                    f"{list(shapes[part.role])}"
                )
            missing.remove((part.role, part.layer))
        if not parts or len({part.shape[1:] for part in parts}) != 1:
            raise ValueError(f"the tensor map joins parts of different widths in {name!r}, or none")
        tensors[name] = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    if missing:
        role, layer = min(missing, key=str)
        raise ValueError(f"the tensor map leaves out role {role!r}, layer {layer} ({len(missing)} parts in all)")
    return tensors


def role_shapes(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """Shape of every role the spec has, without the layer axis."""
    matrix = (spec.vocab_size, spec.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {"embedding": matrix, "final_norm": (spec.hidden_size,)}
    if not spec.tied_head:
        shapes["head"] = matrix
    return shapes | {f"layers.{name}": shape for name, shape in layer_shapes(spec).items()}


def _layers(spec: DecoderSpec, role: str) -> Sequence[int | None]:
    return range(spec.num_layers) if role.startswith("layers.") else (None,)
