"""The model card, README.md: a stage that changes weights adds where they come from, and how to load them.

Front matter: https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from shared.checkpoint.directory.auxiliary_files import read_config
from shared.checkpoint.directory.manifest import CARD, Inputs, Manifest
from shared.console import log
from shared.invocation import Invocation

BEGIN = "<!-- lineage: written by the tools, and written again by the next one; the text around it is kept -->"
END = "<!-- end of lineage -->"
_SECTION = re.compile(f"{re.escape(BEGIN)}\n(.*?){re.escape(END)}\n?", re.DOTALL)
_FRONT_MATTER = re.compile(r"---\r?\n(.*?\r?\n)?---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_OF_OTHER_WEIGHTS = ("model-index", "eval_results")  # measured before this stage
_OF_THE_MODEL = ("tensors", "parameters", "micro_batch_size")  # numbers among a manifest's facts that are no results
_MAKES_WEIGHTS = ("pretrain", "sft")
_OF_THE_LICENCE = ("license", "license_name", "license_link", "language")  # of the base, and of what was made from it


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One command that changed weights."""

    command: str  # "sft train"
    version: str
    inputs: Sequence[tuple[str, str]]  # flag and name of each
    figures: Mapping[str, float]

    @classmethod
    def of_run(cls, manifest: Manifest | None) -> Stage | None:
        """The training that published a directory; None if it was no training."""
        if manifest is None or manifest.tool not in _MAKES_WEIGHTS:
            return None
        inputs = [(parent.flag, parent.name) for parent in manifest.parents]
        command = f"{manifest.tool} {manifest.command}"
        return cls(command=command, version=manifest.version, inputs=inputs, figures=_figures(manifest.facts))

    @classmethod
    def of_this(cls, command: Invocation, inputs: Inputs, facts: Mapping[str, Any]) -> Stage:
        """The running command."""
        names = [
            (flag, path.resolve().name)
            for flag, given in inputs.items()
            for path in ([given] if isinstance(given, Path) else given)
        ]
        words = f"{command.tool} {command.command}"
        return cls(command=words, version=command.version, inputs=names, figures=_figures(facts))

    def line(self) -> str:
        """For the list of stages."""
        inputs = ", ".join(f"`--{flag.replace('_', '-')} {name}`" for flag, name in self.inputs)
        figures = ", ".join(f"{name} {_shown(value)}" for name, value in self.figures.items())
        return f"1. `{self.command}` {self.version}: {inputs}{f'; {figures}' * bool(figures)}"


def _figures(facts: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: value
        for name, value in facts.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name not in _OF_THE_MODEL
    }


def _shown(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def write_card(directory: Path, stage: Stage, *, name: str, adapter: Path | None = None) -> None:
    """Write README.md of a Hugging Face directory.

    A README.md that is there, the base's, keeps its text, its licence and its other fields; `base_model` becomes the
    directory that this stage began with, and results measured on the base are left out. The lineage of earlier stages goes on.

    Args:
        directory: it has its config.json, and the README.md of the stage's source if that had one.
        stage: what made the weights.
        name: of the directory when published.
        adapter: a directory that this stage merges: stages and data of its card go on, too.
    """
    path = directory / CARD
    fields, body = _parted(_text(path))
    base = next((source for flag, source in stage.inputs if flag == "source"), None)
    earlier = _SECTION.search(body)
    lines = _stages(body)
    if adapter:
        trained, of_adapter = _parted(_text(adapter / CARD))
        lines += [line for line in _stages(of_adapter) if line not in lines]
        data = [*_listed(fields.get("datasets")), *_listed(trained.get("datasets"))]
        fields |= {"datasets": data} if data else {}
    foreign = base if body.strip() and not earlier else None
    section = _section(directory, [*lines, stage.line()], name, foreign)
    body = (
        body[: earlier.start()] + section + body[earlier.end() :]
        if earlier
        else section + (f"\n{body}" if foreign else "")
    )
    front = yaml.safe_dump(_fields(fields, stage, base, directory), sort_keys=False, allow_unicode=True)
    path.write_bytes(f"---\n{front}---\n\n{body.lstrip()}".encode(errors="surrogateescape"))


def write_adapter_card(directory: Path, stage: Stage | None, *, name: str, base: Path, link: str) -> None:
    """Write README.md of a directory of PEFT: licence and lineage of the base, and this training.

    The text of the base's own card is about the base, and is not repeated.

    Args:
        directory: of the adapter.
        stage: the training; None if nothing says which.
        name: of the directory when published.
        base: the Hugging Face directory of the base, with its config.json.
        link: the base as adapter_config.json names it.
    """
    fields, body = _parted(_text(base / CARD))
    lines = _stages(body)
    loader = _loader(base)
    front = {
        **{key: fields[key] for key in _OF_THE_LICENCE if key in fields},
        "library_name": "peft",
        "base_model": base.resolve().name,
        "base_model_relation": "adapter",
        "tags": ["lora"],
        **({"pipeline_tag": loader[1]} if loader else {}),
        **(_of_the_data(stage, []) if stage else {}),
    }
    parts = [f"# {name}", "", f"A LoRA adapter of `{base.resolve().name}`.", "", "## How it was made", ""]
    parts += [*lines, *([stage.line()] if stage else []), ""]
    if loader:
        remote = ", trust_remote_code=True" * ("auto_map" in read_config(base / "config.json"))
        parts += [
            *("## How to load it", "", "```python", "from peft import PeftModel"),
            *(f"from transformers import {loader[0]}, AutoTokenizer", ""),
            f'base = {loader[0]}.from_pretrained("{link}", dtype="auto"{remote})  # as seen from here',
            f'model = PeftModel.from_pretrained(base, "{name}")',
            f'tokenizer = AutoTokenizer.from_pretrained("{name}"{remote})',
            *("```", ""),
        ]
    section = "\n".join([BEGIN, *parts, END, ""])
    written = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    (directory / CARD).write_bytes(f"---\n{written}---\n\n{section}".encode(errors="surrogateescape"))


def set_fields(path: Path, fields: Mapping[str, Any]) -> None:
    """Set fields of the front matter of a README.md, which may be absent. The text below it is kept to the byte."""
    earlier, body = _parted(_text(path))
    front = yaml.safe_dump({**earlier, **fields}, sort_keys=False, allow_unicode=True)
    path.write_bytes(f"---\n{front}---\n{body}".encode(errors="surrogateescape"))


def card_fields(path: Path) -> dict[str, Any]:
    """The front matter of a README.md; empty without one."""
    return _parted(_text(path))[0]


def _text(path: Path) -> str:
    """Of a README.md; empty without one."""
    return path.read_bytes().decode(errors="surrogateescape") if path.is_file() else ""


def _stages(body: str) -> list[str]:
    """The lines of earlier stages."""
    earlier = _SECTION.search(body)
    return [line for line in earlier[1].splitlines() if line.startswith("1. ")] if earlier else []


def _parted(text: str) -> tuple[dict[str, Any], str]:
    """Front matter and text; all is text if there is no front matter that can be read."""
    found = _FRONT_MATTER.match(text)
    if not found:
        return {}, text
    try:
        fields = yaml.safe_load(found[1] or "") or {}
    except yaml.YAMLError:
        fields = None
    if not isinstance(fields, dict):
        log(f"{CARD}: its front matter is no YAML mapping, and becomes text")
        return {}, text
    return fields, text[found.end() :]


def _fields(fields: Mapping[str, Any], stage: Stage, base: str | None, directory: Path) -> dict[str, Any]:
    result = {key: value for key, value in fields.items() if key not in _OF_OTHER_WEIGHTS}
    if left_out := sorted({*fields} - {*result}):
        log(f"{CARD}: {', '.join(left_out)} left out, they are of --source")
    result.setdefault("library_name", "transformers")
    if base:
        result |= {"base_model": base, "base_model_relation": "finetune"}
    if loader := _loader(directory):
        result["pipeline_tag"] = loader[1]
    return result | _of_the_data(stage, _listed(fields.get("datasets")))


def _of_the_data(stage: Stage, earlier: Sequence[Any]) -> dict[str, Any]:
    """The fields that name data and metrics."""
    datasets = [name for flag, name in stage.inputs if flag in ("data", "prompts")]
    metrics = [name for name, value in stage.figures.items() if isinstance(value, float)]
    every = list(dict.fromkeys([*earlier, *datasets]))
    return {**({"datasets": every} if every else {}), **({"metrics": metrics} if metrics else {})}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _section(directory: Path, lines: Sequence[str], name: str, foreign: str | None) -> str:
    parts = [f"# {name}", "", "## How it was made", "", *lines, ""]
    if loader := _loader(directory):
        remote = ", trust_remote_code=True" * ("auto_map" in read_config(directory / "config.json"))
        parts += [
            *("## How to load it", "", "```python"),
            *(f"from transformers import {loader[0]}, AutoTokenizer", ""),
            f'model = {loader[0]}.from_pretrained("{name}", dtype="auto"{remote})',
            f'tokenizer = AutoTokenizer.from_pretrained("{name}"{remote})',
            *("```", ""),
        ]
    if foreign:
        parts += [f"What follows is the text of `{foreign}`, which this model was made from.", ""]
    return "\n".join([BEGIN, *parts, END, ""])


def _loader(directory: Path) -> tuple[str, str] | None:
    """Class of transformers that loads the model, and the Hub's name of its task; None if neither is known."""
    (architecture, *_) = read_config(directory / "config.json").get("architectures") or [""]
    if architecture.endswith("ForSequenceClassification"):
        return "AutoModelForSequenceClassification", "text-classification"
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return "AutoModelForCausalLM", "text-generation"
    return None
