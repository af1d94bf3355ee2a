"""`rlhf score`: rewards of the replies of a file, by a reward model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from shared.checkpoint.copy.journal import JOURNAL
from shared.checkpoint.directory.open import open_checkpoint
from shared.checkpoint.directory.publish import Publication, publish
from shared.console import log, progress
from shared.data.sources import Row, rows_of
from shared.data.tokenizer import open_tokenizer
from shared.errors import StageError, UserError
from shared.precision import DTYPES
from tools.rlhf.calibration import calibration
from tools.rlhf.data import end_token_id, sequence
from tools.rlhf.engines.deepspeed import silence_libraries
from tools.rlhf.options import ScoreOptions
from tools.rlhf.rewards.reward_model import load_reward_model, score
from tools.rlhf.scored_rows import ends, replies_of
from tools.rlhf.transformers_model import context_length

OUTPUT = "scores.jsonl"
_BATCHES = 32  # that are read, sorted by length and written at a time


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A row, with the token sequences of its replies by the column that is added."""

    row: Row
    sequences: dict[str, list[tuple[int, ...]]]


def run(options: ScoreOptions) -> None:
    """Score every row and publish the target. Rows that were scored by an interrupted run are not scored again."""
    inputs = {"source": options.source, "data": options.data}
    with publish(options.target, kind="result", inputs=inputs, overwrite=options.overwrite, resumable=True) as out:
        silence_libraries()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        precision = options.precision or ("bf16" if device.type == "cuda" else "fp32")
        place = f"--source {options.source}"
        open_checkpoint(options.source, kinds=("hf",), flag="--source")
        model = load_reward_model(options.source, getattr(torch, DTYPES[precision]), place=place).to(device)
        tokenizer = open_tokenizer(options.source, flag="--source")
        context = context_length(model.config, tokenizer)
        # Every row is read before the first is scored: an error of the last one is known at once.
        total = sum(1 for _ in _scored(options.data, tokenizer, context))
        if not total:
            raise UserError(f"--data {options.data}: no row in it")
        done = _resume(out)
        log(f"model     {options.source} ({type(model).__name__}, context {context}), {precision} on {device.type}")
        log(f"rows      {total}" + (f", {done} of them scored by an earlier run" if done else ""))
        rows = islice(_scored(options.data, tokenizer, context), done, None)
        pad = model.config.get_text_config().pad_token_id
        with (
            (out.path / OUTPUT).open("a", encoding="utf-8") as file,
            progress(total - done, "rows", "scoring") as advance,
        ):
            while window := list(islice(rows, options.micro_batch_size * _BATCHES)):
                scores = _scores([s for each in window for said in each.sequences.values() for s in said],
                                 model, pad, device, options.micro_batch_size)  # fmt: skip
                taken = iter(scores)
                for each in window:
                    file.write(json.dumps(each.row.value | _added(each, taken), ensure_ascii=False) + "\n")
                file.flush()
                advance(len(window))
        result = _summary(out.path / OUTPUT)
        out.describe(**result, precision=precision)
    print(json.dumps(result), flush=True)
    log(f"{result['rows']} rows: {options.target / OUTPUT}")


def _scored(data: Path, tokenizer: Any, context: int) -> Iterator[Scored]:
    """Rows with their token sequences, `[prompt, reply, end]`. UserError for one that does not fit the context."""
    end = end_token_id(tokenizer)
    for row in rows_of(data, flag="--data"):
        ended = ends(row)
        sequences = {}
        for name, said in replies_of(row).items():
            found = []
            for reply, whole in zip(said, ended[name], strict=True):
                prompt, ids = sequence(row, reply, tokenizer, end)
                ids = (*prompt, *(ids if whole else ids[:-1]))
                if not ids:
                    raise row.error("a reply and its prompt are empty: there is nothing to score")
                if len(ids) > context:
                    raise row.error(
                        f"a prompt with its reply has {len(ids)} tokens, and the model's context is {context}"
                    )
                found.append(ids)
            sequences[name] = found
        yield Scored(row=row, sequences=sequences)


def _scores(sequences: Sequence[Sequence[int]], model: Any, pad: int, device: torch.device, size: int) -> list[float]:
    """Scores in the order of `sequences`; batches are of like lengths."""
    scores = torch.zeros(len(sequences), dtype=torch.float64)
    by_length = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    for start in range(0, len(sequences), size):
        batch = by_length[start : start + size]
        scores[batch] = score(model, [sequences[i] for i in batch], pad, device).double()
    return scores.tolist()


def _added(each: Scored, scores: Iterator[float]) -> dict[str, Any]:
    """The columns added to a row."""
    added: dict[str, Any] = {}
    for name, said in each.sequences.items():
        values = list(islice(scores, len(said)))
        if not all(map(math.isfinite, values)):
            raise StageError(
                f"{each.row.path}:{each.row.line}: the reward model's score is {values}; are its weights finite?"
            )
        added[name] = values if name == "rewards" else values[0]
    return added


def _resume(out: Publication) -> int:
    """Rows written by an earlier run of the same command; a line that a kill cut short is removed."""
    journal, output = out.path / JOURNAL, out.path / OUTPUT
    header = json.dumps({"work": out.work}) + "\n"
    if not journal.is_file() or journal.read_text(encoding="utf-8") != header:
        output.unlink(missing_ok=True)
        journal.write_text(header, encoding="utf-8")
    if not output.is_file():
        return 0
    lines = whole = 0
    with output.open("rb+") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            lines, whole = lines + 1, whole + len(line)
        file.truncate(whole)
    return lines


def _summary(path: Path) -> dict[str, Any]:
    """Means of a file of scored rows; of pairs, accuracy and calibration, too."""
    count, sums, margins = 0, dict[str, list[float]](), list[float]()
    with path.open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            count += 1
            for name in ("reward", "rewards", "reward_chosen", "reward_rejected"):
                if name in row:
                    values = row[name] if isinstance(row[name], list) else [row[name]]
                    total = sums.setdefault("reward" if name == "rewards" else name, [0.0, 0.0])
                    total[0] += sum(values)
                    total[1] += len(values)
            if "reward_chosen" in row:
                margins.append(row["reward_chosen"] - row["reward_rejected"])
    result: dict[str, Any] = {"rows": count} | {name: total / n for name, (total, n) in sums.items()}
    if margins:
        result |= {"pairs": len(margins), "accuracy": sum(margin > 0 for margin in margins) / len(margins)}
        result |= calibration(margins).facts
    return result
