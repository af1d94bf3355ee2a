"""Auxiliary files of a run: the source's, the dataset's tokenizer if the source has none, and the chat format trained with."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.checkpoint.directory.auxiliary_files import read_config
from shared.checkpoint.directory.model_card import Stage, write_card
from shared.console import log
from shared.data.tokenizer import chat_templates, copy_tokenizer, set_chat_templates
from shared.training.data_sources import DataSource
from shared.training.plan import Inputs

GENERATION_CONFIG = "generation_config.json"


@contextlib.contextmanager
def run_hf_files(inputs: Inputs) -> Iterator[Path]:
    """Context manager: a directory with the auxiliary files (config.json, tokenizer, ...).

    A model trained on conversations gets their chat template, and the tokens that end its turns among the end tokens of
    generation_config.json: otherwise it would be served with a format that it does not know, and not stop. If the source is
    a run itself, that training goes into the model card.
    """
    own, first = inputs.source.hf_files, inputs.data[0]
    without = not (own / "tokenizer.json").is_file() and first.tokenizer.is_dir()
    chats = [source for source in inputs.data if source.facts.get("format") == "packed"]
    templates = chat_templates(chats[0].tokenizer) if chats else None
    changed = templates is not None and templates != chat_templates(own)
    ends = _further_ends(own, chats)
    training = Stage.of_run(inputs.source.manifest)
    if not (without or changed or ends or training):
        yield own
        return
    with tempfile.TemporaryDirectory() as scratch:
        merged = Path(scratch) / "hf"
        if without:
            copy_tokenizer(first.tokenizer, merged)
        shutil.copytree(own, merged, dirs_exist_ok=True)  # the source's own files win
        if changed and templates is not None:
            had = "had another" if chat_templates(own) else "had none"
            log(f"chat template: of --data {chats[0].path}, which the model is trained with (--source {had})")
            set_chat_templates(merged, templates)
            for other in chats[1:]:
                if chat_templates(other.tokenizer) != templates:
                    log(f"--data {other.path} was rendered with another chat template, which is not published")
        if ends:
            _add_ends(merged, ends)
        if training:
            write_card(merged, training, name=inputs.source.path.name)
        yield merged


def end_tokens(inputs: Inputs) -> set[int]:
    """The tokens that generation stops at: the model's own, and those that end turns in the data."""
    return {*_known_ends(inputs.source.hf_files), *_further_ends(inputs.source.hf_files, list(inputs.data))}


def _further_ends(own: Path, chats: list[DataSource]) -> list[int]:
    """Tokens that end the assistant's turns in the data, and that generation would not stop at."""
    ends = {int(number) for source in chats for number in source.facts.get("turn_end_token_ids", [])}
    return sorted(ends - set(_known_ends(own)))


def _known_ends(directory: Path) -> list[int]:
    """The end tokens of generation_config.json, else of config.json."""
    for name in (GENERATION_CONFIG, "config.json"):
        known = read_config(directory / name).get("eos_token_id") if (directory / name).is_file() else None
        if known is not None:
            return [int(number) for number in (known if isinstance(known, list) else [known])]
    return []


def _add_ends(directory: Path, ends: list[int]) -> None:
    path = directory / GENERATION_CONFIG
    every = [*ends, *_known_ends(directory)]  # first what ends a turn, then what ends a text
    if path.is_file():
        settings: dict[str, Any] = read_config(path)
    else:  # transformers reads these from config.json only where there is no generation_config.json
        config = read_config(directory / "config.json")
        settings = {name: config[name] for name in ("bos_token_id", "pad_token_id") if config.get(name) is not None}
    settings["eos_token_id"] = every if len(every) > 1 else every[0]
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    log(f"{GENERATION_CONFIG}: eos_token_id {settings['eos_token_id']}, with the tokens that end a turn in the data")
