"""`infer card`: results of evaluations in the model card of what is published."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.repocard_data import model_index_to_eval_results

from shared.checkpoint.directory.manifest import CARD, MANIFEST, Inputs, input_fingerprint
from shared.checkpoint.directory.model_card import card_fields, set_fields
from shared.checkpoint.directory.open import WEIGHTS, open_checkpoint
from shared.checkpoint.directory.publish import publish
from shared.checkpoint.files import files_below
from shared.console import log
from shared.errors import UserError
from tools.infer.evaluation_record import OUTPUT as RESULTS

_TASK = "text-generation"  # the Hub's name of what these models do
_INDEX = "model-index"
_LOCAL = ("json", "csv", "text", "parquet", "arrow")  # readers of files, no datasets of the Hub

Entry = dict[str, Any]  # of `results` in a model index


def run(source: Path, results: Sequence[Path], target: Path, *, overwrite: bool) -> None:
    """Publish `target`. UserError if a result is of another model."""
    inputs: Inputs = {"source": source, "results": results}
    with publish(target, kind="hf", inputs=inputs, overwrite=overwrite) as out:
        model = open_checkpoint(source, kinds=("hf",), flag="--source")
        found = [entry for path in results for entry in _entries(path, source)]
        index = _index(target.name, [*_earlier(card_fields(source / CARD)), *found])
        known = model.manifest.files if model.manifest else {}
        for file in files_below(source):
            name = file.relative_to(source).as_posix()
            if name == MANIFEST or (known and name not in {*known, CARD}):  # nothing of unknown origin is published
                continue
            _place(file, out.path / name)
            if name in known and name != CARD:
                out.record_hash(name, known[name].hash)
        set_fields(out.path / CARD, {_INDEX: index})
        out.describe(**model.facts)
    log(f"{sum(len(entry['metrics']) for entry in found)} metrics in {target / CARD}")


def _entries(path: Path, source: Path) -> list[Entry]:
    """The tasks of a published evaluation. UserError if it is none, or of another directory."""
    manifest = open_checkpoint(path, kinds=("result",), flag="--results").manifest
    if manifest is None or not (path / RESULTS).is_file():
        raise UserError(f"--results {path} is no result of `infer evaluate`: it has no {RESULTS}")
    parent = next((parent for parent in manifest.parents if parent.flag == "source"), None)
    if parent is None or parent.fingerprint != input_fingerprint(source):
        raise UserError(
            f"--results {path} was measured on {parent.name if parent else 'nothing'}, which is not --source {source} as it is; "
            "evaluate this directory"
        )
    report = json.loads((path / RESULTS).read_text(encoding="utf-8"))
    return [_entry(report, task) for task in report["results"]]


def _entry(report: Mapping[str, Any], task: str) -> Entry:
    config, values = report["configs"].get(task, {}), report["results"][task]
    path = config.get("dataset_path")
    dataset = {
        "name": task,
        "type": task if path is None or path in _LOCAL else path,
        "config": config.get("dataset_name"),
        "split": config.get("test_split") or config.get("validation_split"),
        "args": {"num_few_shot": report["n-shot"].get(task, 0)},
    }
    metrics = []
    for key, value in values.items():
        metric, comma, filter_name = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, (int, float)):
            error = values.get(f"{metric}_stderr,{filter_name}")
            metrics.append(
                {
                    "type": metric,
                    "value": value,
                    "name": metric if filter_name == "none" else f"{metric} ({filter_name})",
                }
                | ({"args": {"stderr": error}} if isinstance(error, (int, float)) else {})
            )
    return {
        "task": {"type": _TASK},
        "dataset": {name: value for name, value in dataset.items() if value is not None},
        "metrics": metrics,
    }


def _earlier(fields: Mapping[str, Any]) -> list[Entry]:
    """The results that a card has. UserError if huggingface_hub cannot read them."""
    if not fields.get(_INDEX):
        return []
    try:
        model_index_to_eval_results(fields[_INDEX])
        return [entry for model in fields[_INDEX] for entry in model["results"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--source: {_INDEX} of its {CARD} cannot be read ({error}); mend or remove it") from None


def _index(name: str, entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """A model index. A metric replaces an earlier one of the same dataset: task, split and few-shot examples."""
    merged: list[Entry] = []
    for entry in entries:
        same = next((other for other in merged if other["dataset"] == entry["dataset"]), None)
        if same is None:
            merged.append(entry)
        else:
            new = {(metric["type"], metric.get("name")) for metric in entry["metrics"]}
            kept = [metric for metric in same["metrics"] if (metric["type"], metric.get("name")) not in new]
            same["metrics"] = [*kept, *entry["metrics"]]
    return [{"name": name, "results": merged}]


def _place(file: Path, place: Path) -> None:
    """Link weights, copy the rest, which people edit."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix in WEIGHTS:
        try:
            os.link(file.resolve(), place)
        except OSError:  # another file system
            shutil.copyfile(file, place)
    else:
        shutil.copyfile(file, place)
