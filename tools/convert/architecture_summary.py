"""An architecture in a few lines: sizes, and differences from a plain decoder.

The plain decoder is LLaMA: pre-norm RMSNorm, rotary attention without biases, SwiGLU, untied head.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from itertools import pairwise
from typing import Any

from shared.architecture.architecture import (
    Architecture,
    Attention,
    GatedDeltaNet,
    Head,
    LatentAttention,
    Layer,
    Norm,
    Rotary,
)

# Values of the plain decoder that are not the field's default.
_PLAIN: dict[tuple[type, str], Any] = {
    (Attention, "rotary"): Rotary(),
    (Head, "tied"): False,
    (Norm, "epsilon"): 1e-5,
}
_NAMES = {Attention: "attention", LatentAttention: "MLA", GatedDeltaNet: "gated delta net"}
_MAX_LISTED = 8  # elements of a tuple


def architecture_lines(a: Architecture) -> list[str]:
    """Sizes; mixers and MLPs with their layer indices; other differences from the plain decoder."""
    lines = [
        f"{a.num_layers} layers, hidden_size {a.hidden_size}, vocab_size {a.vocab_size}, "
        f"max_position_embeddings {a.max_position_embeddings}"
    ]
    for part in ("mixer", "mlp"):
        lines += _by_layer(a, [_named(getattr(layer, part)) for layer in a.layers])
    lines += _by_layer(a, [", ".join(_differences(layer, skip=("mixer", "mlp"))) for layer in a.layers])
    said = {"family", "hidden_size", "vocab_size", "max_position_embeddings", "layers"}
    for field in fields(a):
        value = getattr(a, field.name)
        if field.name in said or value == _plain(Architecture, field):
            continue
        if field.name == "mtp":
            lines.append(f"mtp: depth {value.depth}, {_mtp_layer(value.layer, a.layers)}")
        elif field.name == "head":
            found = [*_differences(value, skip=("norm",)), *_head_norm(a)]
            lines += [f"head: {', '.join(found)}"] if found else []
        else:
            shown = ", ".join(_differences(value)) if is_dataclass(value) else _value(value)
            lines.append(f"{field.name}: {shown or 'yes'}")
    return lines


def _by_layer(a: Architecture, texts: Sequence[str]) -> list[str]:
    """One line per distinct text, with its layer indices."""
    lines = []
    for text in filter(None, dict.fromkeys(texts)):
        indices = [index for index, own in enumerate(texts) if own == text]
        lines.append(f"{_layers(indices, a.num_layers)}: {text}")
    return lines


def _layers(indices: Sequence[int], count: int) -> str:
    if len(indices) == count:
        return "all layers"
    steps = {after - before for before, after in pairwise(indices)}
    if len(indices) > 2 and len(steps) == 1 and steps != {1}:
        return f"layers {indices[0]}, {indices[1]}, .. {indices[-1]}"
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][1] == index - 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    shown = ", ".join(f"{first}-{last}" if first < last else str(first) for first, last in runs)
    return f"layer{'s' * (len(indices) > 1)} {shown}"


def _mtp_layer(layer: Layer, layers: tuple[Layer, ...]) -> str:
    if layer in layers:
        return f"each as layer {layers.index(layer)}"
    rest = ", ".join(_differences(layer, skip=("mixer", "mlp")))
    return "; ".join(filter(None, [_named(layer.mixer), _named(layer.mlp), rest]))


def _head_norm(a: Architecture) -> list[str]:
    """The final norm, if it differs from the layers' norm."""
    if a.head.norm == a.layers[-1].norm:
        return []
    return [f"norm({', '.join(_differences(a.head.norm))})" if a.head.norm else "no norm"]


def _named(value: Any) -> str:
    return f"{_NAMES.get(type(value), type(value).__name__)} {', '.join(_differences(value))}"


def _differences(value: Any, *, skip: tuple[str, ...] = ()) -> Iterator[str]:
    """`name value` of each field that has no default or differs from the plain decoder; nested: `name(...)`."""
    for field in fields(value):
        own, name = getattr(value, field.name), field.name
        if name in skip or own == _plain(type(value), field):
            continue
        if is_dataclass(own) and not isinstance(own, type):
            nested = ", ".join(_differences(own))
            if nested or _plain(type(value), field) is None:
                yield f"{name}({nested})" if nested else name
        elif own is None or isinstance(own, bool):
            yield name if own else f"no {name}"
        else:
            yield f"{name} {_value(own)}"


def _plain(holder: type, field: Field[Any]) -> Hashable:
    if (holder, field.name) in _PLAIN:
        found: Hashable = _PLAIN[holder, field.name]
        return found
    return MISSING if field.default_factory is MISSING and field.default is MISSING else _default(field)


def _default(field: Field[Any]) -> Hashable:
    found: Hashable = field.default if field.default_factory is MISSING else field.default_factory()
    return found


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        return f"of {len(value)} values" if len(value) > _MAX_LISTED else "/".join(map(_value, value))
    return f"{value:.12g}" if isinstance(value, float) else str(value)
