"""`infer generate`: completes the prompts of a file."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shared.checkpoint.copy.journal import JOURNAL
from shared.checkpoint.directory.auxiliary_files import read_config
from shared.checkpoint.directory.manifest import Inputs
from shared.checkpoint.directory.publish import publish
from shared.cli import log, progress
from shared.data.chat_template import template_arguments
from shared.errors import StageError, UserError
from tools.infer.engines.engine import Completion, EngineSettings, Request, open_engine
from tools.infer.engines.sampling import FIELD, Sampling, check_schema
from tools.infer.environment import prepare_environment
from tools.infer.prompts import Prompt, check_length, encode, load_tokenizer, read_prompts
from tools.infer.source import open_hf_directory

OUTPUT = "generations.jsonl"


def run(
    source: Path,
    prompts: Path,
    target: Path,
    *,
    sampling: Sampling,
    settings: EngineSettings,
    overwrite: bool,
    json_schema: Path | None = None,
    template_argument: Sequence[str] = (),
) -> None:
    """Complete every row of `prompts` and publish `target`. UserError for an invalid row, with its line.

    Completions are saved in the unpublished directory; an interrupted run resumes from them.
    """
    if settings.engine == "hf" and settings.batch_size is not None:
        raise UserError(
            f"--batch-size {settings.batch_size}: transformers generates one sequence at a time; leave it out"
        )
    rows = read_prompts(prompts, _ADDED)
    arguments = template_arguments(template_argument)
    if json_schema:
        schema = read_config(json_schema)
        check_schema(schema, f"--json-schema {json_schema}")
        sampling = sampling.model_copy(update={"json_schema": schema})
    samplings = _of_rows(rows, sampling)
    inputs: Inputs = {"source": source, "prompts": prompts} | ({"json_schema": json_schema} if json_schema else {})
    with publish(target, kind="result", inputs=inputs, overwrite=overwrite, resumable=True) as out:
        prepare_environment()
        model = open_hf_directory(source)
        with closing(open_engine(model, settings)) as engine, Finished(out.path, out.work) as finished:
            tokenizer = load_tokenizer(model)  # after the engine's checks: a tokenizer may need remote code
            requests = []
            for row, own in zip(rows, samplings, strict=True):
                engine.check(own, row.place)
                ids = encode(tokenizer, row.prompt, row.place, row.tools, arguments | row.template_arguments)
                check_length(ids, engine.context_length, row.place)
                requests.append(Request(prompt=ids, sampling=own))
            completions = finished.completions
            left = [index for index in range(len(rows)) if index not in completions]
            if completions:
                log(f"resuming: {len(completions)} of {len(rows)} prompts were finished by an earlier run")
            began, new = time.monotonic(), 0
            if left:
                engine.load()
                began = time.monotonic()
            with kept(finished, len(rows)), progress(len(left), "prompts", "generating") as advance:
                for number, samples in engine.generate([requests[index] for index in left]) if left else ():
                    finished.add(left[number], samples)
                    new += sum(len(sample.tokens) for sample in samples)
                    advance(1)
            seconds = time.monotonic() - began
        with kept(finished, len(rows)), (out.path / OUTPUT).open("w", encoding="utf-8") as file:
            for index, (row, request) in enumerate(zip(rows, requests, strict=True)):
                answer = _answer(len(request.prompt), completions[index], tokenizer)
                file.write(json.dumps(row.fields | answer, ensure_ascii=False) + "\n")
        tokens = sum(len(sample.tokens) for samples in completions.values() for sample in samples)
        out.describe(
            rows=len(rows),
            prompt_tokens=sum(len(request.prompt) for request in requests),
            completion_tokens=tokens,
            seconds=round(seconds, 2),
            engine=engine.name,
        )
    speed = f"{new} tokens in {seconds:.1f} s ({new / max(seconds, 1e-9):.0f} tokens/s)"
    log(f"{len(rows)} prompts, {speed}: {target / OUTPUT}")


class Finished:
    """Journal of finished completions in the unpublished directory: one line per prompt.

    Args:
        directory: the unpublished directory.
        work: the run's fingerprint; a journal with another fingerprint is discarded.
    """

    def __init__(self, directory: Path, work: str) -> None:
        path = directory / JOURNAL
        lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []  # a kill may truncate the last line
        if not lines or json.loads(lines[0]) != {"work": work}:
            lines = [json.dumps({"work": work}).encode()]
        self.completions: dict[int, list[Completion]] = {
            line["prompt"]: [Completion(**sample) for sample in line["samples"]] for line in map(json.loads, lines[1:])
        }
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        self._file = path.open("a", encoding="utf-8")

    def add(self, prompt: int, samples: list[Completion]) -> None:
        """Record the samples of a prompt."""
        self.completions[prompt] = samples
        line = {"prompt": prompt, "samples": [asdict(sample) for sample in samples]}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def __enter__(self) -> Finished:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


@contextmanager
def kept(finished: Finished, prompts: int) -> Iterator[None]:
    """An engine's crash, or a full disk, is a StageError: what is finished stays, and the same command resumes."""
    try:
        yield
    except (UserError, StageError):
        raise
    except Exception as error:  # engines raise anything
        traceback.print_exc()
        reason = (str(error).strip().splitlines() or [""])[0]
        raise StageError(
            f"stopped by {type(error).__name__}{f' ({reason})' if reason else ''}; {len(finished.completions)} of {prompts} "
            "prompts are finished and kept; the same command does the rest"
        ) from error


_ADDED = ("completion", "completions", "finish_reason", "prompt_tokens", "completion_tokens", "logprobs")  # to a row


def _of_rows(rows: Sequence[Prompt], sampling: Sampling) -> list[Sampling]:
    """The sampling of each row. Without one of its own, a row's seed follows those of all samples before it."""
    found, seed = [], sampling.seed
    for row in rows:
        given = row.fields.get(FIELD)
        own = sampling.of_row(given, row.place)
        if not (isinstance(given, dict) and "seed" in given):
            own = own.model_copy(update={"seed": seed})
        found.append(own)
        seed += own.samples
    return found


def _answer(prompt_tokens: int, samples: list[Completion], tokenizer: Any) -> dict[str, Any]:
    """Fields added to a row: values for one sample, lists for several."""
    one = len(samples) == 1
    values: dict[str, list[Any]] = {
        "completion" if one else "completions": [sample.text for sample in samples],
        "finish_reason": [sample.finish_reason for sample in samples],
        "completion_tokens": [len(sample.tokens) for sample in samples],
    }
    if samples[0].logprobs is not None:
        values["logprobs"] = [
            [
                [{"token": tokenizer.decode([number]), "id": number, "logprob": value} for number, value in known]
                for known in sample.logprobs or ()
            ]
            for sample in samples
        ]
    answer = {name: each[0] if one else each for name, each in values.items()}
    return answer | {"prompt_tokens": prompt_tokens}
