"""Sliding windows: config.json fields, and which layers have one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from shared.architecture.architecture import Architecture, Attention, Layer
from shared.errors import UserError
from shared.families.common.decoder import Decoder, local_rotary_of, rotary_of, with_mixer
from shared.families.common.fields import Fields, rope_fields_by_kind

Windows = tuple[int | None, ...]  # of each layer, in tokens; None: full attention
_KINDS = {"full_attention", "sliding_attention"}


def every(period: int, num_layers: int) -> range:
    """Every `period`-th layer, as indices from 0: period - 1, 2 * period - 1.."""
    return range(period - 1, num_layers, period)


def read_windows(fields: Fields, num_layers: int, default_window: int, default_full: Iterable[int]) -> Windows:
    """Windows from `layer_types` and `sliding_window`; `default_full`: full-attention layers without `layer_types`."""
    full = set(default_full)
    default = [f"{'full' if layer in full else 'sliding'}_attention" for layer in range(num_layers)]
    kinds = fields.get("layer_types", list, default)
    if len(kinds) != num_layers or set(kinds) - _KINDS:
        raise UserError(
            f"config.json: layer_types is {kinds!r}; full_attention or sliding_attention is required for each of "
            f"{num_layers} layers"
        )
    window = fields.nullable("sliding_window", int, default_window)
    return tuple(None if kind == "full_attention" else window for kind in kinds)


def windowed(windows: Windows, **changes: Any) -> Callable[[int, Layer], Layer]:
    """`vary` for `Decoder.build`: sets the windows; sliding-window mixers also get `changes`."""

    def vary(index: int, layer: Layer) -> Layer:
        window = windows[index]
        return layer if window is None else with_mixer(layer, window=window, **changes)

    return vary


def windows_of(a: Architecture) -> Windows:
    """The window of each layer."""
    return tuple(layer.mixer.window if isinstance(layer.mixer, Attention) else None for layer in a.layers)


def write_windows(a: Architecture) -> dict[str, Any]:
    """Inverse of `read_windows`."""
    windows = windows_of(a)
    return {
        "sliding_window": next((window for window in windows if window is not None), None),
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
    }


def write_rope_by_kind(a: Architecture) -> dict[str, Any]:
    """`rope_parameters` by layer type, for families whose sliding-window layers have their own RoPE."""
    full = rotary_of(a)
    return rope_fields_by_kind(full.theta, full.scaling, (local_rotary_of(a) or full).theta)


def read_optional_windows(fields: Fields, num_layers: int, full: Iterable[int]) -> Windows:
    """Qwen: windows only with `use_sliding_window`; `full`: the full-attention layers then."""
    if fields.get("use_sliding_window", bool, False):
        return read_windows(fields, num_layers, 4096, full)
    fields.expect("layer_types", ["full_attention"] * num_layers, why="use_sliding_window is false")
    fields.ignore("sliding_window")
    return (None,) * num_layers


def write_optional_windows(a: Architecture) -> dict[str, Any]:
    """Inverse of `read_optional_windows`."""
    written = write_windows(a)
    used = written["sliding_window"] is not None
    return {"use_sliding_window": used, **(written if used else {})}


def limit_to_first_chunk(fields: Fields, decoder: Decoder) -> Decoder:
    """Limit max_position_embeddings to the first chunk of dual chunk attention (Qwen 1M models).

    Dual chunk attention equals full attention within the first chunk (chunk_size - local_size tokens). transformers
    computes full attention at any length, so longer sequences would differ.
    """
    given = fields.optional("dual_chunk_attention_config", dict)
    if given is None:
        return decoder
    chunk = Fields(given)
    first = chunk.get("chunk_size", int) - chunk.get("local_size", int)
    return replace(decoder, max_position_embeddings=min(decoder.max_position_embeddings, first))
