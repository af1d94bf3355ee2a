"""`infer compare`: two results of `infer evaluate`, example by example."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shared.checkpoint.directory.manifest import Inputs
from shared.checkpoint.directory.open import open_checkpoint
from shared.checkpoint.directory.publish import publish
from shared.console import log
from shared.errors import UserError
from shared.report.page import REPORT, render, write
from shared.report.tables import table
from tools.infer import paired_bootstrap
from tools.infer.evaluation_record import OUTPUT as RESULTS
from tools.infer.paired_bootstrap import CONFIDENCE, Difference, Statistic

OUTPUT = "comparison.json"
# Metrics of the harness that are no mean over examples; a result's own number says whether that is right.
_STATISTICS: dict[str, Statistic] = {
    "perplexity": paired_bootstrap.perplexity,
    "word_perplexity": paired_bootstrap.weighted_perplexity,
    "byte_perplexity": paired_bootstrap.weighted_perplexity,
    "bits_per_byte": paired_bootstrap.bits_per_byte,
}
_SAME = 1e-9  # relative: sums of the same numbers in another order


@dataclass(frozen=True, kw_only=True)
class Result:
    """A published evaluation."""

    name: str  # of the evaluated model
    flag: str
    report: Mapping[str, Any]  # results.json
    samples: Mapping[str, Sequence[Mapping[str, Any]]]  # of each task


def run(baseline: Path, source: Path, target: Path, *, resamples: int, seed: int, overwrite: bool) -> None:
    """Compare and publish `target`. UserError if the two were not measured on the same examples."""
    inputs: Inputs = {"baseline": baseline, "source": source}
    with publish(target, kind="result", inputs=inputs, overwrite=overwrite) as out:
        first, second = _read(baseline, "--baseline"), _read(source, "--source")
        _announce_differences(first, second)
        found = compare(first, second, resamples=resamples, seed=seed)
        if not found:
            raise UserError(f"--source {source}: no metric is in both results; evaluate both on the same --tasks")
        report = {
            "baseline": first.name,
            "source": second.name,
            "resamples": resamples,
            "seed": seed,
            "confidence": CONFIDENCE,
            "tasks": {task: {name: asdict(each) for name, each in metrics.items()} for task, metrics in found.items()},
        }
        (out.path / OUTPUT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        write(out.path / REPORT, _page(first, second, found, resamples))
        out.describe(differences={task: {n: d.difference for n, d in of.items()} for task, of in found.items()})
    log(f"compared: {target / OUTPUT}, {REPORT}")
    for row in _rows(found):
        print("  ".join(row))


def compare(first: Result, second: Result, *, resamples: int, seed: int) -> dict[str, dict[str, Difference]]:
    """{task: {metric or "metric,filter": difference}} of the metrics in both results.

    Each metric is drawn with the same seed: the same examples.
    """
    found: dict[str, dict[str, Difference]] = {}
    for task in first.samples:
        if task not in second.samples:
            log(f"{task}: only in {first.name}")
            continue
        pairs = _paired(task, first, second)
        for filter_name, metric in _metrics(pairs):
            key = metric if filter_name == "none" else f"{metric},{filter_name}"
            of = [(a, b) for a, b in pairs if a["filter"] == filter_name and metric in a and metric in b]
            values = [_values([pair[side][metric] for pair in of]) for side in (0, 1)]
            statistic = _STATISTICS.get(metric, paired_bootstrap.mean)
            if values[0] is None or values[1] is None or values[0].shape != values[1].shape:
                log(f"{task}: {key} is no number of each example, so it is not compared")
                continue
            difference = paired_bootstrap.paired_bootstrap(
                values[0], values[1], statistic, resamples=resamples, seed=seed
            )
            published = [side.report["results"][task].get(f"{metric},{filter_name}") for side in (first, second)]
            if not all(
                isinstance(wanted, (int, float)) and math.isclose(wanted, own, rel_tol=_SAME, abs_tol=_SAME)
                for wanted, own in zip(published, (difference.first, difference.second), strict=True)
            ):
                log(f"{task}: {key} is no mean over examples, so it is not compared")
                continue
            found.setdefault(task, {})[key] = difference
    for task in second.samples.keys() - first.samples.keys():
        log(f"{task}: only in {second.name}")
    return found


def _read(path: Path, flag: str) -> Result:
    checkpoint = open_checkpoint(path, kinds=("result",), flag=flag)
    if not (path / RESULTS).is_file():
        raise UserError(f"{flag} {path} is no result of `infer evaluate`: it has no {RESULTS}")
    report = json.loads((path / RESULTS).read_text(encoding="utf-8"))
    samples = {}
    for task in report["n-samples"]:
        file = path / f"samples_{task.replace('/', '_')}.jsonl"
        if not file.is_file():
            raise UserError(f"{flag} {path} has no {file.name}; evaluate with --keep-samples")
        samples[task] = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert checkpoint.manifest is not None
    name = next((parent.name for parent in checkpoint.manifest.parents if parent.flag == "source"), path.name)
    return Result(name=name, flag=f"{flag} {path}", report=report, samples=samples)


def _announce_differences(first: Result, second: Result) -> None:
    for name, words in (
        ("engine", "engine"),
        ("max_length", "longest text"),
        ("chat_template_sha", "chat template"),
        ("lm_eval_version", "lm-evaluation-harness"),
        ("n-shot", "few-shot examples"),
    ):
        if (one := first.report.get(name)) != (other := second.report.get(name)):
            log(f"not the same in both: {words}: {one} and {other}")


def _paired(task: str, first: Result, second: Result) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Rows of the same example and filter. UserError if the examples differ."""
    own, other = ({(row["doc_id"], row["filter"]): row for row in side.samples[task]} for side in (first, second))
    if own.keys() != other.keys():
        raise UserError(
            f"{second.flag}: {task} has {len(other)} examples, and the baseline {len(own)}; evaluate both with the same --limit"
        )
    for key, row in own.items():
        if row["doc_hash"] != other[key]["doc_hash"]:
            raise UserError(f"{second.flag}: example {key[0]} of {task} is another one than the baseline's")
    return [(row, other[key]) for key, row in own.items()]


def _metrics(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row["filter"], metric) for row, _ in pairs for metric in row["metrics"]))


def _values(values: Sequence[Any]) -> paired_bootstrap.Values | None:
    """[examples] or [examples, 2]; None if an example's value is neither a number nor a pair of them."""
    kinds = {len(value) if isinstance(value, list) else 0 for value in values}
    flat = [number for value in values for number in (value if isinstance(value, list) else [value])]
    if kinds not in ({0}, {2}) or not all(isinstance(number, (int, float)) for number in flat):
        return None
    return np.asarray(values, np.float64)


_HEADER = ("task", "metric", "baseline", "source", "difference", "95% interval", "source larger", "p", "examples")


def _rows(found: Mapping[str, Mapping[str, Difference]]) -> list[tuple[str, ...]]:
    """Lines of text, aligned."""
    rows = [_HEADER, *_cells(found)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    return [
        tuple(
            text.ljust(width) if column < 2 else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _cells(found: Mapping[str, Mapping[str, Difference]]) -> list[tuple[str, ...]]:
    return [
        (
            task,
            metric,
            f"{each.first:.4f}",
            f"{each.second:.4f}",
            f"{each.difference:+.4f}",
            f"{each.low:+.4f} to {each.high:+.4f}",
            f"{each.second_larger:.1%}",
            f"{each.p:.4f}",
            str(each.examples),
        )
        for task, metrics in found.items()
        for metric, each in metrics.items()
    ]


def _page(first: Result, second: Result, found: Mapping[str, Mapping[str, Difference]], resamples: int) -> str:
    return render(
        title=f"{second.name} against {first.name}",
        subtitle=f"Paired bootstrap, {resamples:,} draws of the same examples for both; difference: source minus baseline",
        tiles={"baseline": first.name, "source": second.name, "tasks": str(len(found))},
        figures=(),
        tables=[table("Differences", _HEADER, _cells(found), numbers=_HEADER[2:])],
    )
