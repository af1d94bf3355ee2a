"""Which layers of a model have a sliding window, as configurations say it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from shared.architecture.architecture import Architecture
from shared.errors import UserError
from shared.families.common.fields import Fields

_KINDS = {"full_attention", "sliding_attention"}


def every(period: int, num_layers: int) -> tuple[int, ...]:
    """The last layer, from 0, of each run of `period`: those that see everything in most families."""
    return tuple(range(period - 1, num_layers, period))


def window_fields(
    fields: Fields, num_layers: int, default_window: int, default_full: tuple[int, ...]
) -> dict[str, Any]:
    """`layer_types` and `sliding_window`; the layers that see everything are `default_full` unless given."""
    default = [f"{'full' if layer in default_full else 'sliding'}_attention" for layer in range(num_layers)]
    kinds = fields.get("layer_types", list, default)
    if len(kinds) != num_layers or set(kinds) - _KINDS:
        raise UserError(f"config.json: layer_types = {kinds!r} does not say full or sliding for {num_layers} layers")
    window = fields.nullable("sliding_window", int, default_window)
    full = tuple(index for index, kind in enumerate(kinds) if kind == "full_attention")
    if window is None or len(full) == num_layers:
        return {"sliding_window": None, "full_attention_layers": ()}
    return {"sliding_window": window, "full_attention_layers": full}


def written_window_fields(a: Architecture) -> dict[str, Any]:
    """The same backwards."""
    kinds = ["full" if a.window(layer) is None else "sliding" for layer in range(a.num_layers)]
    return {"sliding_window": a.sliding_window, "layer_types": [f"{kind}_attention" for kind in kinds]}


def chunked_positions(fields: Fields, common: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of an Architecture, of a model that ends where dual chunk attention (Qwen's of 1M tokens) begins to differ.

    Tokens see those of their own chunk as ever, and those of others at other distances: within the first of them it is
    plain attention, which transformers computes however long a sequence is.
    """
    given = fields.optional("dual_chunk_attention_config", dict)
    if given is None:
        return dict(common)
    chunk = Fields(given)
    first = chunk.get("chunk_size", int) - chunk.get("local_size", int)
    return {**common, "max_position_embeddings": min(common["max_position_embeddings"], first)}


def optional_window_fields(fields: Fields, num_layers: int, full: Iterable[int]) -> dict[str, Any]:
    """Qwen's, of which `use_sliding_window` says whether there are any; `full` are then those that see everything."""
    if fields.get("use_sliding_window", bool, False):
        return window_fields(fields, num_layers, 4096, tuple(full))
    fields.expect("layer_types", ["full_attention"] * num_layers, why="use_sliding_window is false")
    fields.ignore("sliding_window")
    return {}


def written_optional_window_fields(a: Architecture) -> dict[str, Any]:
    """The same backwards."""
    if a.sliding_window is None:
        return {"use_sliding_window": False}
    return {"use_sliding_window": True, **written_window_fields(a)}
