"""`infer evaluate`: lm-evaluation-harness in this process, offline, with either engine."""

from __future__ import annotations

import json
import random
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.checkpoint.directory.publish import publish
from shared.cli import log
from shared.errors import UserError
from shared.report.page import write
from tools.infer.api_keys import api_keys
from tools.infer.engines.engine import Engine, EngineSettings, open_engine
from tools.infer.engines.server import ServerEngine, served_model
from tools.infer.environment import prepare_environment
from tools.infer.evaluation_page import PAGE, page
from tools.infer.evaluation_record import OUTPUT, HarnessRun, Seeds, plain, record
from tools.infer.reload import base_of
from tools.infer.source import open_hf_directory

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.tasks.manager import TaskDict

    from tools.infer.tasks import Chosen


def run(
    source: Path,
    tasks: tuple[str, ...],
    target: Path,
    *,
    limit: int | None,
    num_fewshot: int | None,
    apply_chat_template: bool,
    keep_samples: bool,
    settings: EngineSettings,
    overwrite: bool,
    generation_argument: Sequence[str],
    bootstrap: int,
    seed: int | None,
    server: ServerOptions | None = None,
) -> None:
    """Evaluate and publish `target`. UserError for an invalid task or file.

    `server`: ask this server, of the model `source`, instead of loading it.
    """
    prepare_environment()
    with tempfile.TemporaryDirectory(prefix="infer-") as cache:
        from tools.infer.tasks import choose  # imports the harness, which reads the environment

        generation = generation_arguments(generation_argument)
        seeds = Seeds.of(seed)
        settings = replace(settings, seed=seeds.torch)
        chosen = choose(tasks, Path(cache))
        inputs: dict[str, Path | Sequence[Path]] = {"source": source, "tasks": chosen.files}
        with publish(target, kind="result", inputs=inputs, overwrite=overwrite) as out:
            model = open_hf_directory(source)
            if apply_chat_template:
                _check_chat_template(model)
            _seed(seeds)
            loaded = _load_tasks(chosen, num_fewshot, seeds.fewshot, generation)
            began = time.monotonic()
            opened: Engine | ServerEngine = server.engine(model, settings) if server else open_engine(model, settings)
            with closing(opened) as engine:
                _seed(seeds)  # before the model is loaded, as on the harness's command line
                lm = engine.harness_model()
                ready = time.monotonic()
                results = _evaluate(lm, loaded, limit, apply_chat_template, bootstrap)
                seconds = time.monotonic() - ready
                harness_run = HarnessRun(
                    source=source,
                    engine=engine.name,
                    settings=settings,
                    limit=limit,
                    bootstrap=bootstrap,
                    generation=generation,
                    seeds=seeds,
                    url=server.url if server else None,
                    chat_template=lm.chat_template(True) if apply_chat_template else None,
                    seconds=time.monotonic() - began,
                )
                report = record(results, lm, harness_run)
            if keep_samples:
                _write_samples(out.path, results["samples"])
            (out.path / OUTPUT).write_text(
                json.dumps(plain(report), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
            )
            write(out.path / PAGE, page(source.resolve().name, report, results["samples"]))
            metrics = {task: _metrics(values) for task, values in results["results"].items()}
            out.describe(engine=engine.name, metrics=metrics, seconds=round(seconds, 2))
    log(f"evaluated in {seconds:.1f} s after {ready - began:.1f} s to load: {target / OUTPUT}, {PAGE}")
    print(table(metrics, {task: count["effective"] for task, count in results["n-samples"].items()}))


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """The server of --url."""

    url: str
    name: str | None  # of the model in requests; None: the server's first
    api_key_file: Path | None

    def engine(self, model: Path, settings: EngineSettings) -> ServerEngine:
        """UserError if the server is not there, or does not have the model."""
        for name, value in (
            ("--engine", settings.engine),
            ("--precision", settings.precision),
            ("--max-model-len", settings.max_model_len),
            ("--tensor-parallel", settings.tensor_parallel - 1),
        ):
            if value:
                raise UserError(f"{name} is the server's own with --url; leave it out")
        key = api_keys(self.api_key_file)[0] if self.api_key_file else None
        return ServerEngine(model, served_model(base_of(self.url), self.name, key), settings)


def generation_arguments(words: Sequence[str]) -> dict[str, Any]:
    """`--generation-argument` as the harness reads its --gen_kwargs: numbers and true or false by themselves, else text."""
    from lm_eval.utils import handle_arg_string

    found: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name.isidentifier() or not value:
            raise UserError(f"--generation-argument {word}: write NAME=VALUE, such as max_gen_toks=64")
        if name in found:
            raise UserError(f"--generation-argument {name} is given twice")
        found[name] = handle_arg_string(value)
    return found


def _seed(seeds: Seeds) -> None:
    import numpy
    import torch

    random.seed(seeds.python)
    numpy.random.seed(seeds.numpy)
    torch.manual_seed(seeds.torch)


def _load_tasks(chosen: Chosen, num_fewshot: int | None, seed: int, generation: Mapping[str, Any]) -> TaskDict:
    """The harness's tasks with their data. UserError if a task's data cannot be loaded."""
    found: list[Any] = []
    for spec in chosen.specs:
        name = spec["task"] if isinstance(spec, dict) else spec
        try:
            loaded = chosen.manager.load([spec])
        except Exception as error:  # `datasets` and a task's functions may raise any exception
            entry = chosen.manager.task_index.get(name)
            harness = entry is not None and entry.yaml_path is not None
            where = " (is its dataset in the local cache? HF_HUB_OFFLINE=0 may fetch it)" if harness else ""
            raise UserError(f"--tasks {name}: cannot be loaded{where}: {_words(error)}") from error
        below = {member for members in loaded["group_map"].values() for member in members}
        outermost = [group for group_name, group in loaded["groups"].items() if group_name not in below]
        found += outermost or loaded["tasks"].values()
    try:
        tasks = chosen.manager.load(found)
    except ValueError as error:
        raise UserError(f"--tasks: {error}; leave one of them out") from None
    for name, task in tasks["tasks"].items():
        _set_fewshot(name, task, num_fewshot)
        task.set_fewshot_seed(seed=seed)
    generating = [task for task in tasks["tasks"].values() if task.get_config("output_type") == "generate_until"]
    if generation and not generating:
        raise UserError(
            f"--generation-argument {next(iter(generation))}: no task of --tasks generates text; leave it out"
        )
    for task in generating if generation else ():
        task.set_config(key="generation_kwargs", value=dict(generation), update=True)
    return tasks


def _set_fewshot(name: str, task: Any, wanted: int | None) -> None:
    """Set the number of few-shot examples: --num-fewshot, else the task's, else 0. UserError if the split has too few."""
    own = task.get_config("num_fewshot")
    if wanted is not None and own == 0:
        log(
            f"{name}: num_fewshot: 0 in its file says that the task has none; --num-fewshot leaves it so, as in the harness"
        )
    count = own or 0 if wanted is None or own == 0 else wanted
    task.set_config(key="num_fewshot", value=count)
    if not count:
        return
    settings = task.fewshot_cfg
    if (
        settings.split is None
        and settings.samples is None
        and not (task.has_training_docs() or task.has_validation_docs())
    ):
        settings.split = task.config.test_split  # the harness then excludes the evaluated example
    there = len(task.sampler.fewshot_docs())
    asked = settings.split is not None and settings.split == task.config.test_split
    if count + asked > there:
        of = f"the split {settings.split}" if settings.split else "its few-shot data"
        besides = " besides the one that is asked" if asked else ""
        raise UserError(
            f"--tasks {name}: num_fewshot {count}, and {of} has {max(0, there - asked)} examples{besides}; "
            "give a smaller --num-fewshot"
        )


def _evaluate(lm: LM, tasks: TaskDict, limit: int | None, apply_chat_template: bool, bootstrap: int) -> dict[str, Any]:
    """The harness's results. Its `simple_evaluate` is avoided: it runs pip and git to describe the machine."""
    from lm_eval.evaluator import evaluate

    try:
        results = evaluate(
            lm,
            tasks,
            limit=limit,
            apply_chat_template=apply_chat_template,
            bootstrap_iters=bootstrap,
            fewshot_as_multiturn=True,
        )
    except UserError:
        raise
    except Exception as error:
        if (name := _at_fault(error)) is None:
            raise
        raise UserError(f"--tasks {name}: {_words(error)}") from error
    assert results is not None  # None on ranks above 0 only; there is one rank
    return dict(results)


def _at_fault(error: Exception) -> str | None:
    """The task whose template, data or function raised the error; None if it came from the model."""
    from lm_eval.api.model import LM
    from lm_eval.api.task import Task

    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if isinstance(owner, LM):
            return None
        if isinstance(owner, Task):
            return str(owner.task_name)
        if "agg_fn" in frame.f_locals:  # a metric's aggregation function
            return str(frame.f_locals["task"].task_name)
    return None


def _words(error: Exception) -> str:
    """An error in one line: type, message, and the line in the task's file."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        frame
        for frame in frames
        if "site-packages" not in frame.filename and Path(__file__).parent not in Path(frame.filename).parents
    ]
    place = f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"


def _check_chat_template(source: Path) -> None:
    from tools.infer.prompts import load_tokenizer

    if not load_tokenizer(source).chat_template:
        raise UserError(f"--apply-chat-template: the tokenizer of {source} has no chat template; leave the flag out")


def _metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """{"bits_per_byte,none": 1.2, "bits_per_byte_stderr,none": "N/A", "alias": ...} -> {"bits_per_byte": 1.2}.

    Filters other than "none" stay in the name: {"exact_match,strict": ...}.
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
                file.write(json.dumps(plain(row), ensure_ascii=False) + "\n")
