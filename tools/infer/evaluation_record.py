"""results.json of `infer evaluate`, in the form that lm-evaluation-harness writes with --output_path."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.precision import DTYPES
from tools.infer.engines.engine import EngineSettings

if TYPE_CHECKING:
    from lm_eval.api.model import LM

OUTPUT = "results.json"
# The harness's names for classes of models.
_CLASSES = {"server": "local-completions"}


@dataclass(frozen=True, kw_only=True)
class Seeds:
    """Of the generators of random numbers, as the harness seeds them."""

    python: int
    numpy: int
    torch: int
    fewshot: int

    @classmethod
    def of(cls, seed: int | None) -> Seeds:
        """One seed for all; None: the harness's own."""
        from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

        other = DEFAULT_OTHER_SEED if seed is None else seed
        return cls(python=DEFAULT_RANDOM_SEED if seed is None else seed, numpy=other, torch=other, fewshot=other)


@dataclass(frozen=True, kw_only=True)
class HarnessRun:
    """What an evaluation ran with."""

    source: Path
    engine: str
    settings: EngineSettings
    limit: int | None
    bootstrap: int
    generation: Mapping[str, Any]
    seeds: Seeds
    chat_template: str | None  # where prompts are rendered by it
    seconds: float  # of loading and evaluating
    url: str | None  # of the server that answered

    def model_arguments(self) -> dict[str, Any]:
        """`--model_args` of the harness."""
        settings = self.settings
        given: dict[str, Any] = {"pretrained": str(self.source)}
        if self.url:
            given |= {"base_url": self.url, "tokenizer": str(self.source)}
        if settings.precision:
            given["dtype"] = str(DTYPES[settings.precision]).removeprefix("torch.")
        if settings.max_model_len:
            given["max_length"] = settings.max_model_len
        if settings.tensor_parallel != 1:
            given["tensor_parallel_size"] = settings.tensor_parallel
        return given


def record(results: Mapping[str, Any], lm: LM, run: HarnessRun) -> dict[str, Any]:
    """The harness's results with what its command line adds: model, seeds, versions, hashes of the examples.

    What it asks pip and git for is left empty.

    Args:
        results: of `lm_eval.evaluator.evaluate`.
        lm: the harness's model.
        run: what it ran with.
    """
    from lm_eval.loggers.utils import add_tokenizer_info
    from lm_eval.utils import hash_string, sanitize_model_name

    hashes = {
        task: hash_string("".join(row["doc_hash"] + row["prompt_hash"] + row["target_hash"] for row in rows))
        for task, rows in results["samples"].items()
    }
    report = {name: value for name, value in results.items() if name != "samples"}
    report["config"] = {
        "model": _CLASSES.get(run.engine, run.engine),
        "model_args": run.model_arguments(),
        "batch_size": run.settings.batch_size,
        "batch_sizes": [],
        "device": None,
        "use_cache": None,
        "limit": run.limit,
        "bootstrap_iters": run.bootstrap,
        "gen_kwargs": dict(run.generation) or None,
        "random_seed": run.seeds.python,
        "numpy_seed": run.seeds.numpy,
        "torch_seed": run.seeds.torch,
        "fewshot_seed": run.seeds.fewshot,
    }
    report |= {
        "git_hash": None,
        "date": time.time(),
        "pretty_env_info": "",
        "transformers_version": version("transformers"),
        "lm_eval_version": version("lm-eval"),
        "upper_git_hash": None,
        "task_hashes": hashes,
        "model_source": _CLASSES.get(run.engine, run.engine),
        "model_name": str(run.source),
        "model_name_sanitized": sanitize_model_name(str(run.source)),
        "system_instruction": None,
        "system_instruction_sha": None,
        "fewshot_as_multiturn": True,
        "chat_template": run.chat_template,
        "chat_template_sha": hash_string(run.chat_template) if run.chat_template else None,
        "total_evaluation_time_seconds": str(run.seconds),
        "engine": run.engine,
    }
    add_tokenizer_info(report, lm)
    return report


def plain(value: Any) -> Any:
    """JSON values: functions by name, NaN and infinity as null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int, bool)):
        return value
    return getattr(value, "__name__", str(value))
