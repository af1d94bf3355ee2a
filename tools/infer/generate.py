"""`infer generate`: a jsonl file of prompts in, a directory with their completions out."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.checkpoint.directory.publish import publish
from shared.cli import log, progress
from tools.infer.engine import check_supported, complete, model_config, open_source, start
from tools.infer.prompts import check_length, encode, load_tokenizer, read_rows
from tools.infer.settings import engine_arguments, prepare_environment

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams

OUTPUT = "generations.jsonl"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How completions are drawn."""

    max_tokens: int
    temperature: float  # 0: greedy
    top_p: float
    samples: int  # completions of each prompt
    seed: int

    def of_row(self, index: int) -> SamplingParams:
        """Sampling of the row with this index; vLLM gives sample i of a row the seed `seed + i`."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            output_kind=RequestOutputKind.FINAL_ONLY,  # else each output holds one of the samples
            n=self.samples,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed + index * self.samples,
        )

    @property
    def fields(self) -> tuple[str, ...]:
        """What the output adds to a row."""
        one = self.samples == 1
        return ("completion" if one else "completions", "finish_reason", "prompt_tokens", "completion_tokens")


def run(
    source: Path,
    prompts: Path,
    target: Path,
    *,
    sampling: Sampling,
    batch_size: int | None,
    max_model_len: int | None,
    precision: str | None,
    tensor_parallel: int,
    overwrite: bool,
) -> None:
    """Complete every row of `prompts` and publish `target`. UserError names the line that cannot be used."""
    rows = read_rows(prompts, sampling.fields)
    with publish(target, kind="result", inputs={"source": source, "prompts": prompts}, overwrite=overwrite) as out:
        prepare_environment()
        model = open_source(source)
        check_supported(model)  # first: such a model's tokenizer, too, may be code of its own
        tokenizer = load_tokenizer(model)
        places = [f"--prompts {prompts}:{row.line}" for row in rows]
        encoded = [encode(tokenizer, row.prompt, place) for row, place in zip(rows, places, strict=True)]
        arguments = engine_arguments(
            model,
            precision=precision,
            max_model_len=max_model_len,
            tensor_parallel=tensor_parallel,
            batch_size=batch_size,
            seed=sampling.seed,
        )
        context = model_config(arguments).max_model_len
        for ids, place in zip(encoded, places, strict=True):
            check_length(ids, context, place)
        llm = start(arguments)
        requests = {str(index): (ids, sampling.of_row(index)) for index, ids in enumerate(encoded)}
        began = time.monotonic()
        finished: dict[str, RequestOutput] = {}
        with progress(len(rows), "prompts", "generating") as advance:
            for output in complete(llm, requests):
                if output.finished:
                    finished[output.request_id] = output
                    advance(1)
        seconds = time.monotonic() - began
        tokens = 0
        with (out.path / OUTPUT).open("w", encoding="utf-8") as file:
            for index, row in enumerate(rows):
                answer = _answer(finished[str(index)], sampling)
                tokens += answer["completion_tokens"] if sampling.samples == 1 else sum(answer["completion_tokens"])
                file.write(json.dumps(row.fields | answer, ensure_ascii=False) + "\n")
        out.describe(
            rows=len(rows),
            prompt_tokens=sum(map(len, encoded)),
            completion_tokens=tokens,
            seconds=round(seconds, 2),
            engine="vllm",
        )
    log(f"{len(rows)} prompts, {tokens} tokens in {seconds:.1f} s ({tokens / seconds:.0f} tokens/s): {target / OUTPUT}")


def _answer(output: RequestOutput, sampling: Sampling) -> dict[str, Any]:
    """The fields that the output adds to a row: single values, or a list of each with several samples."""
    assert len(output.outputs) == sampling.samples
    ordered = sorted(output.outputs, key=lambda completion: completion.index)
    texts = [completion.text for completion in ordered]
    reasons = [completion.finish_reason for completion in ordered]
    counts = [len(completion.token_ids) for completion in ordered]
    one = sampling.samples == 1
    values = [texts, reasons, len(output.prompt_token_ids or ()), counts]
    return {
        name: value[0] if one and isinstance(value, list) else value
        for name, value in zip(sampling.fields, values, strict=True)
    }
