"""`infer generate`: prompts of a jsonl file in, a directory with their completions out."""

from __future__ import annotations

import json
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from shared.checkpoint.directory.publish import publish
from shared.cli import log, progress
from tools.infer.engines.engine import Completion, EngineSettings, Request, Sampling, open_engine
from tools.infer.environment import prepare_environment
from tools.infer.prompts import check_length, encode, load_tokenizer, read_rows
from tools.infer.source import open_source

OUTPUT = "generations.jsonl"


def run(
    source: Path, prompts: Path, target: Path, *, sampling: Sampling, settings: EngineSettings, overwrite: bool
) -> None:
    """Complete every row of `prompts` and publish `target`. UserError names the line that cannot be used."""
    rows = read_rows(prompts, output_fields(sampling.samples))
    with publish(target, kind="result", inputs={"source": source, "prompts": prompts}, overwrite=overwrite) as out:
        prepare_environment()
        model = open_source(source)
        with closing(open_engine(model, settings)) as engine:  # before the tokenizer, which may be remote code
            tokenizer = load_tokenizer(model)
            requests = []
            for index, row in enumerate(rows):
                place = f"--prompts {prompts}:{row.line}"
                ids = encode(tokenizer, row.prompt, place)
                check_length(ids, engine.context_length, place)
                seeded = replace(sampling, seed=sampling.seed + index * sampling.samples)
                requests.append(Request(prompt=ids, sampling=seeded))
            engine.load()
            began = time.monotonic()
            completions: dict[int, list[Completion]] = {}
            with progress(len(rows), "prompts", "generating") as advance:
                for index, finished in engine.generate(requests):
                    completions[index] = finished
                    advance(1)
            seconds = time.monotonic() - began
        with (out.path / OUTPUT).open("w", encoding="utf-8") as file:
            for index, (row, request) in enumerate(zip(rows, requests, strict=True)):
                answer = _answer(len(request.prompt), completions[index])
                file.write(json.dumps(row.fields | answer, ensure_ascii=False) + "\n")
        tokens = sum(len(sample.tokens) for samples in completions.values() for sample in samples)
        out.describe(
            rows=len(rows),
            prompt_tokens=sum(len(request.prompt) for request in requests),
            completion_tokens=tokens,
            seconds=round(seconds, 2),
            engine=engine.name,
        )
    log(f"{len(rows)} prompts, {tokens} tokens in {seconds:.1f} s ({tokens / seconds:.0f} tokens/s): {target / OUTPUT}")


def output_fields(samples: int) -> tuple[str, ...]:
    """The fields that the output adds to a row."""
    return ("completion" if samples == 1 else "completions", "finish_reason", "prompt_tokens", "completion_tokens")


def _answer(prompt_tokens: int, samples: list[Completion]) -> dict[str, Any]:
    """The fields that the output adds to a row: values of the one sample, or a list over several."""
    texts = [sample.text for sample in samples]
    reasons = [sample.finish_reason for sample in samples]
    counts = [len(sample.tokens) for sample in samples]
    one = len(samples) == 1
    values = [texts, reasons, prompt_tokens, counts]
    return {
        name: value[0] if one and isinstance(value, list) else value
        for name, value in zip(output_fields(len(samples)), values, strict=True)
    }
