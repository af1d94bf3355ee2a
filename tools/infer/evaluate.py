"""`infer evaluate`: lm-evaluation-harness in this process, offline, on any engine."""

from __future__ import annotations

import json
import math
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.checkpoint.directory.publish import publish
from shared.cli import log
from shared.errors import UserError
from tools.infer.engines.engine import EngineSettings, open_engine
from tools.infer.environment import prepare_environment
from tools.infer.source import open_source

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.tasks.manager import TaskDict

    from tools.infer.tasks import Chosen

OUTPUT = "results.json"
_BOOTSTRAP = 1000  # resamples for the standard error of metrics without a formula; the harness's 100,000 take minutes
_PUBLISHED = ("results", "groups", "group_subtasks", "versions", "n-shot", "higher_is_better", "n-samples")


def run(
    source: Path,
    tasks: tuple[str, ...],
    target: Path,
    *,
    limit: int | None,
    apply_chat_template: bool,
    keep_samples: bool,
    settings: EngineSettings,
    overwrite: bool,
) -> None:
    """Evaluate and publish `target`. UserError names the task or file that cannot be used."""
    prepare_environment()
    with tempfile.TemporaryDirectory(prefix="infer-") as cache:
        from tools.infer.tasks import choose  # imports the harness, which reads the environment

        chosen = choose(tasks, Path(cache))
        inputs: dict[str, Path | Sequence[Path]] = {"source": source, "tasks": chosen.files}
        with publish(target, kind="result", inputs=inputs, overwrite=overwrite) as out:
            model = open_source(source)
            if apply_chat_template:
                _check_chat_template(model)
            loaded = _load_tasks(chosen, settings.seed)
            began = time.monotonic()
            with closing(open_engine(model, settings)) as engine:
                lm = engine.harness_model()
                ready = time.monotonic()
                results = _evaluate(lm, loaded, limit, apply_chat_template, settings.seed)
                seconds = time.monotonic() - ready
            if keep_samples:
                _write_samples(out.path, results["samples"])
            report = {key: results[key] for key in _PUBLISHED if key in results}
            report |= {"engine": engine.name, "lm_eval": version("lm-eval"), "limit": limit, "seed": settings.seed}
            (out.path / OUTPUT).write_text(json.dumps(_plain(report), indent=1) + "\n", encoding="utf-8")
            metrics = {task: _metrics(values) for task, values in results["results"].items()}
            out.describe(engine=engine.name, metrics=metrics, seconds=round(seconds, 2))
    log(f"evaluated in {seconds:.1f} s after {ready - began:.1f} s to load: {target / OUTPUT}")
    print(table(metrics, {task: count["effective"] for task, count in results["n-samples"].items()}))


def _load_tasks(chosen: Chosen, seed: int) -> TaskDict:
    """The harness's tasks with their data. UserError names the task whose data cannot be loaded."""
    found: list[Any] = []
    for spec in chosen.specs:
        name = spec["task"] if isinstance(spec, dict) else spec
        try:
            loaded = chosen.manager.load([spec])
        except Exception as error:  # `datasets` and a task's own functions raise anything
            where = (
                "" if isinstance(spec, dict) else " (is its dataset in the local cache? HF_HUB_OFFLINE=0 may fetch it)"
            )
            raise UserError(f"--tasks {name}: cannot be loaded{where}: {error or type(error).__name__}") from error
        found += loaded["groups"].values() if loaded["groups"] else loaded["tasks"].values()
    try:
        tasks = chosen.manager.load(found)
    except ValueError as error:
        raise UserError(f"--tasks: {error}; leave one of them out") from None
    for task in tasks["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)
    return tasks


def _evaluate(lm: LM, tasks: TaskDict, limit: int | None, apply_chat_template: bool, seed: int) -> dict[str, Any]:
    """The harness's results. Not by its `simple_evaluate`, which runs pip and git to describe the machine."""
    import numpy
    import torch
    from lm_eval.evaluator import evaluate

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    results = evaluate(
        lm,
        tasks,
        limit=limit,
        apply_chat_template=apply_chat_template,
        bootstrap_iters=_BOOTSTRAP,
        fewshot_as_multiturn=True,
    )
    assert results is not None  # None on ranks above 0, and there is one rank
    return dict(results)


def _check_chat_template(source: Path) -> None:
    from tools.infer.prompts import load_tokenizer

    if not load_tokenizer(source).chat_template:
        raise UserError(f"--apply-chat-template: the tokenizer of {source} has no chat template; leave the flag out")


def _metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """{"bits_per_byte,none": 1.2, "bits_per_byte_stderr,none": "N/A", "alias": ...} -> {"bits_per_byte": 1.2}.

    A metric through a filter other than "none" keeps its name: {"exact_match,strict": ...}.
    """
    return {
        name.removesuffix(",none"): float(value)
        for name, value in sorted(values.items())
        if isinstance(value, (int, float)) and "," in name and "_stderr," not in name
    }


def table(metrics: Mapping[str, Mapping[str, float]], counts: Mapping[str, int]) -> str:
    """The results as lines of text: task, examples, metric, value."""
    rows = [("task", "examples", "metric", "value")]
    for task, values in metrics.items():
        rows += [(task, str(counts.get(task, "")), name, f"{value:.4f}") for name, value in values.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join((row[0].ljust(widths[0]), row[1].rjust(widths[1]), row[2].ljust(widths[2]), row[3].rjust(widths[3])))
        for row in rows
    )


def _write_samples(directory: Path, samples: Mapping[str, list[dict[str, Any]]]) -> None:
    for task, rows in samples.items():
        with (directory / f"samples_{task.replace('/', '_')}.jsonl").open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(_plain(row), ensure_ascii=False) + "\n")


def _plain(value: Any) -> Any:
    """JSON values: functions by name, numbers that JSON lacks as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int, bool)):
        return value
    return getattr(value, "__name__", str(value))
