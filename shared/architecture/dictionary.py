"""Architecture to and from JSON, as stored in manifests.

Version 2: nested dataclasses, each with its `class`; `layers` are runs of equal layers, `{"first": 0, "last": 2, ...}`.
Version 1, without a `version` key: flat fields, written by the first releases (`shared.architecture.version_1`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from itertools import groupby
from types import UnionType
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from shared.architecture import version_1
from shared.errors import UserError

if TYPE_CHECKING:
    from shared.architecture.architecture import Architecture

VERSION = 2


def write(architecture: Architecture) -> dict[str, Any]:
    """Version 2 of the dictionary."""
    data: dict[str, Any] = {"version": VERSION, "num_layers": architecture.num_layers}
    for field in fields(architecture):
        value = getattr(architecture, field.name)
        data[field.name] = _runs(value) if field.name == "layers" else _written(value)
    return data


def read(data: Mapping[str, Any]) -> Architecture:
    """The architecture from JSON of any version; UserError for an unknown version or damaged data."""
    from shared.architecture.architecture import Architecture

    version = data.get("version", 1)
    try:
        if version == 1:
            return version_1.read(data)
        if version != VERSION:
            raise UserError(
                f"manifest.json: facts.architecture.version is {version!r}; this release reads 1 to {VERSION}; "
                "upgrade this tool to the release that wrote the directory"
            )
        given = {name: value for name, value in data.items() if name not in ("version", "num_layers")}
        layers: list[Any] = []
        hints = get_type_hints(Architecture)
        (layer_class, _) = get_args(hints["layers"])
        for run in given["layers"]:
            own = {name: value for name, value in run.items() if name not in ("first", "last")}
            layers += [_read(layer_class, own)] * (run["last"] - run["first"] + 1)
        return _read(Architecture, given | {"layers": tuple(layers)})
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"manifest.json: facts.architecture is damaged: {error!r}; convert the model again") from None


def _runs(layers: tuple[Any, ...]) -> list[dict[str, Any]]:
    runs = []
    first = 0
    for layer, run in groupby(layers):
        count = len(list(run))
        runs.append({"first": first, "last": first + count - 1, **_written(layer)})
        first += count
    return runs


def _written(value: Any) -> Any:
    if is_dataclass(value):
        data = {field.name: _written(getattr(value, field.name)) for field in fields(value)}
        return {"class": type(value).__name__, **data}
    return list(value) if isinstance(value, tuple) else value


def _read(annotation: Any, value: Any) -> Any:
    """The value of a field with this annotation, from JSON."""
    if not isinstance(value, Mapping):
        return tuple(value) if isinstance(value, list) else value
    classes: tuple[Any, ...] = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    name = value.get("class", getattr(annotation, "__name__", None))
    chosen: Any = next((one for one in classes if is_dataclass(one) and getattr(one, "__name__", "") == name), None)
    if chosen is None:
        raise ValueError(f"there is no {name}")
    hints = get_type_hints(chosen)
    known = {field.name for field in fields(chosen)}
    given = {name: each for name, each in value.items() if name != "class"}
    if unknown := sorted(given.keys() - known):
        raise ValueError(f"{chosen.__name__} has no {unknown[0]}")
    return chosen(**{name: _read(hints[name], each) for name, each in given.items()})
