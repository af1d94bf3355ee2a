"""Open the source of a conversion: a Hugging Face directory, or SwissArmyTransformer rank files joined into one."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from shared.architecture.architecture import Architecture
from shared.checkpoint.directory.auxiliary_files import check_auxiliary_files, read_config
from shared.checkpoint.directory.open import Checkpoint, open_checkpoint
from shared.checkpoint.formats.hugging_face import LAYOUT, HfReader
from shared.checkpoint.formats.swiss_army_transformer import (
    SETTINGS,
    JoinedTensor,
    SatReader,
    head_dims,
    join_ranks,
)
from shared.cli import log
from shared.errors import UserError
from shared.families import registry
from tools.convert.hf_files import PASS_THROUGH_FILE

_CONFIG = "config.json"
_FAMILY = "glm130b"  # the one family whose rank files can be joined


def open_hf_source(
    source: Path, hf_files: Path | None, verify: Literal["content", "small"] = "small", strip_prefix: str | None = None
) -> tuple[Checkpoint, HfReader]:
    """The checkpoint at --source and the reader of its tensors.

    Raises:
        UserError: the checkpoint is incomplete, or neither --source nor --hf-files has a config.json.
    """
    checkpoint = open_checkpoint(source, kinds=("hf",), flag="--source", verify=verify, per_rank="hf")
    if hf_files and (source / _CONFIG).is_file():
        raise UserError(f"--hf-files: the source has a {source / _CONFIG}; leave the flag out, or move that file away")
    if checkpoint.manifest is None:
        _check_names([source, *filter(None, [hf_files])])
    if hf_files:
        check_auxiliary_files(hf_files, "--hf-files")
    if not checkpoint.rank_files:
        return checkpoint, HfReader(source, strip_prefix=strip_prefix or "")
    if strip_prefix:
        raise UserError("--strip-prefix belongs to Hugging Face directories; leave it out")
    joined = join_ranks(checkpoint.rank_files)
    return checkpoint, SatReader(source, joined, _config(source, hf_files, joined), hf_files)


def source_architecture(
    reader: HfReader, source: Path, ignored: tuple[str, ...]
) -> tuple[Architecture, dict[str, Any]]:
    """The architecture of a source's config.json, and the manifest's fact of the fields passed over.

    `ignored`: --ignore-config-field; the names in the source's own manifest are added.
    """
    registry.check_ignored(reader.config, ignored)
    names = sorted({*ignored, *registry.recorded_ignored(source)})
    architecture = registry.from_config(registry.with_auxiliary_fields(reader.config, source), names)
    return architecture, ignored_fact(names)


def ignored_fact(names: Collection[str]) -> dict[str, Any]:
    """The manifest's fact of --ignore-config-field; said in the log, too."""
    if not names:
        return {}
    log(f"config.json: {', '.join(names)} passed over (--ignore-config-field); carried, without effect here")
    return {"ignored_config_fields": list(names)}


def _check_names(directories: list[Path]) -> None:
    """UserError for a source file with the name of one of our files in `hf/`: to-hf would not restore it."""
    for path in (directory / name for directory in directories for name in (LAYOUT, PASS_THROUGH_FILE)):
        if path.exists():
            raise UserError(f"{path}: the name is reserved for a file that to-megatron writes; rename or remove it")


def inputs_of(source: Path, hf_files: Path | None) -> dict[str, Path]:
    """Input directories by flag."""
    return {"source": source} | ({"hf_files": hf_files} if hf_files else {})


def _config(source: Path, hf_files: Path | None, joined: Mapping[str, JoinedTensor]) -> dict[str, Any]:
    """config.json of --source or --hf-files; without one, that of the published model with the same shapes."""
    given = next((d / _CONFIG for d in (source, hf_files) if d and (d / _CONFIG).is_file()), None)
    config = read_config(given) if given else _published(source, _facts(joined))
    place = given or source
    if registry.family_of(config).name != _FAMILY:
        raise UserError(
            f"{place}: model_type is {config['model_type']}; SwissArmyTransformer rank files are read for {_FAMILY} only"
        )
    architecture = registry.from_config(config)
    if (source / SETTINGS).is_file():
        told = read_config(source / SETTINGS)
        for name, value in told.items():
            if name in config and config[name] != value:
                raise UserError(
                    f"{source / SETTINGS}: {name} is {value!r}, in {place} {config[name]!r}; give --hf-files DIR with the "
                    "config.json of this model"
                )
        registry.from_config(told | config)  # UserError for a field that the family does not support
    if other := head_dims(joined) - {architecture.attention.head_dim}:
        raise UserError(
            f"{place}: num_attention_heads is {architecture.attention.heads}, inv_freq in the rank files "
            f"implies {architecture.hidden_size // other.pop()}; give --hf-files DIR with the config.json of this model"
        )
    return config


def _facts(joined: Mapping[str, JoinedTensor]) -> dict[str, int]:
    """Fields of config.json that follow from the shapes."""
    shapes = {name: held.tensor.shape for name, held in joined.items()}
    layers = {int(found[1]) for name in shapes if (found := re.match(r"transformer\.layers\.(\d+)\.", name))}
    vocab, hidden = (*shapes.get("transformer.word_embeddings.weight", ()), 0, 0)[:2]
    _, inner = (*shapes.get("transformer.layers.0.mlp.dense_4h_to_h.weight", ()), 0, 0)[:2]
    return {
        "num_layers": max(layers, default=-1) + 1,
        "hidden_size": hidden,
        "inner_hidden_size": inner,
        "vocab_size": vocab,
    }


def _published(source: Path, facts: Mapping[str, int]) -> dict[str, Any]:
    for name, size in registry.FAMILIES[_FAMILY].sizes.items():
        config = registry.to_config(size)
        if facts.items() <= config.items():
            log(
                f"config.json: of {name}, which has the shapes of {source}; its heads, context length and tokens are assumed"
            )
            return config
    shown = ", ".join(f"{name} {value}" for name, value in facts.items())
    raise UserError(
        f"{source}: no published model has its shapes ({shown}), and heads, context length and tokens are not in it; "
        "give --hf-files DIR with a config.json"
    )
