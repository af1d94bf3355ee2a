"""`infer evaluate`: lm-evaluation-harness in this process, offline, on vLLM or transformers."""

from __future__ import annotations

import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.checkpoint.directory.publish import publish
from shared.cli import log
from shared.errors import UserError
from shared.families.common.transformers_workarounds import completed
from tools.infer.engine import check_supported, model_config, open_source, reason
from tools.infer.settings import DTYPES, engine_arguments, on_gpu, prepare_environment, read_config

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.tasks.manager import TaskDict

    from tools.infer.tasks import Chosen

OUTPUT = "results.json"
_BOOTSTRAP = 1000  # resamplings for the standard error of metrics without a formula; the harness's 100,000 take minutes
_EVERYTHING = 1_000_000_000  # sequences
_SHOWN = ("results", "groups", "group_subtasks", "versions", "n-shot", "higher_is_better", "n-samples")


def run(
    source: Path,
    tasks: tuple[str, ...],
    target: Path,
    *,
    engine: str,
    limit: int | None,
    batch_size: int | None,
    apply_chat_template: bool,
    keep_samples: bool,
    max_model_len: int | None,
    precision: str | None,
    tensor_parallel: int,
    seed: int,
    overwrite: bool,
) -> None:
    """Evaluate and publish `target`. UserError names the task or file that cannot be used."""
    prepare_environment()
    if engine == "hf" and tensor_parallel != 1:
        raise UserError("--tensor-parallel belongs to --engine vllm; leave it out")
    with tempfile.TemporaryDirectory(prefix="infer-") as cache:
        from tools.infer.tasks import choose  # the harness reads its environment, too

        chosen = choose(tasks, Path(cache))
        inputs: dict[str, Path | Sequence[Path]] = {"source": source, "tasks": chosen.files}
        with publish(target, kind="result", inputs=inputs, overwrite=overwrite) as out:
            model = open_source(source)
            if apply_chat_template:
                _check_chat_template(model)
            loaded = _load_tasks(chosen, seed)
            began = time.monotonic()
            if engine == "vllm":
                lm = _vllm(model, precision, max_model_len, tensor_parallel, batch_size, seed)
            else:
                lm = _transformers(model, precision, max_model_len, batch_size)
            ready = time.monotonic()
            results = _evaluate(lm, loaded, limit, apply_chat_template, seed)
            seconds = time.monotonic() - ready
            if keep_samples:
                _write_samples(out.path, results["samples"])
            report = {key: results[key] for key in _SHOWN if key in results}
            report |= {"engine": engine, "lm_eval": version("lm-eval"), "limit": limit, "seed": seed}
            (out.path / OUTPUT).write_text(json.dumps(_plain(report), indent=1) + "\n", encoding="utf-8")
            metrics = {task: _metrics(values) for task, values in results["results"].items()}
            out.describe(engine=engine, metrics=metrics, seconds=round(seconds, 2))
    log(f"evaluated in {seconds:.1f} s after {ready - began:.1f} s to load: {target / OUTPUT}")
    print(table(metrics, {task: count["effective"] for task, count in results["n-samples"].items()}))


def _load_tasks(chosen: Chosen, seed: int) -> TaskDict:
    """The harness's tasks, their data read. UserError names the task whose data is not to be had."""
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
    """The harness's results. Its `simple_evaluate` would add a report on the machine, for which it runs pip and git."""
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
    assert results is not None  # it is None on ranks other than the first, and there is one
    return dict(results)


def _vllm(
    source: Path,
    precision: str | None,
    max_model_len: int | None,
    tensor_parallel: int,
    batch_size: int | None,
    seed: int,
) -> LM:
    check_supported(source)
    arguments = engine_arguments(
        source,
        precision=precision,
        max_model_len=max_model_len,
        tensor_parallel=tensor_parallel,
        batch_size=batch_size,
        seed=seed,
    )
    model_config(arguments)  # what vLLM refuses is said in one line, before anything is loaded
    from lm_eval.models.vllm_causallms import VLLM

    log(f"loading {source} with vLLM on {'GPU' if on_gpu() else 'CPU'}")
    try:
        # vLLM makes its own batches of all that it is given; the harness's "auto" adds a progress bar to that.
        size = "auto" if sys.stderr.isatty() else _EVERYTHING
        return VLLM(pretrained=arguments.pop("model"), batch_size=size, **arguments)
    except ValueError as error:
        raise UserError(f"--source {source}: {reason(error)}") from None


def _transformers(source: Path, precision: str | None, max_model_len: int | None, batch_size: int | None) -> LM:
    from lm_eval.models.huggingface import HFLM

    log(f"loading {source} with transformers on {'GPU' if on_gpu() else 'CPU'}")
    context = max_model_len or read_config(source).get("max_position_embeddings")
    try:
        lm = HFLM(
            pretrained=str(source),
            dtype=DTYPES[precision] if precision else "auto",
            device="cuda" if on_gpu() else "cpu",
            batch_size=batch_size or 8,
            # The vLLM engine keeps two places of the context free, and both are to cut long texts at the same tokens.
            max_length=context - 2 if context else None,
        )
        completed(lm.model)
        return lm
    except (ValueError, OSError) as error:
        raise UserError(f"--source {source}: {str(error).strip().splitlines()[0]}") from None


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
