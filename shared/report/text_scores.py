"""Results of measured text, in the form of lm-evaluation-harness's results.json, whichever engine measured it."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.report.page import REPORT, render, write
from shared.report.tables import table

if TYPE_CHECKING:
    from shared.data.text_windows import Document

RESULTS = "results.json"
_METRICS = ("bits_per_byte", "byte_perplexity", "word_perplexity")


def log_likelihoods(documents: Sequence[Document], windows: Sequence[int], values: Sequence[float]) -> list[float]:
    """Of each document, in nats: the sum over its windows, whose documents are `windows`."""
    sums = [0.0] * len(documents)
    for document, value in zip(windows, values, strict=True):
        sums[document] += value
    return sums


def text_report(
    documents: Sequence[Document],
    likelihoods: Sequence[float],
    *,
    engine: str,
    model_arguments: Mapping[str, Any],
    window: int,
    stride: int,
    seconds: float,
) -> dict[str, Any]:
    """results.json: bits per byte, byte and word perplexity of each file, over its documents together.

    Args:
        documents: the texts.
        likelihoods: log-likelihood of each document, in nats.
        engine: what computed them.
        model_arguments: the model and how it was loaded.
        window: tokens of a window.
        stride: tokens that a window after the first predicts.
        seconds: of the computation.
    """
    files = list(dict.fromkeys(document.file for document in documents))
    results: dict[str, dict[str, Any]] = {}
    for file in files:
        own = [index for index, document in enumerate(documents) if document.file == file]
        nats = -sum(likelihoods[index] for index in own)
        size = sum(documents[index].utf8_bytes for index in own)
        words = sum(documents[index].words for index in own)
        results[file] = {
            "alias": file,
            "bits_per_byte,none": nats / size / math.log(2),
            "byte_perplexity,none": _exp(nats / size),
            "word_perplexity,none": _exp(nats / words),
        }
    counts = {file: sum(document.file == file for document in documents) for file in files}
    settings = {"output_type": "loglikelihood_rolling", "window": window, "stride": stride}
    return {
        "results": results,
        "group_subtasks": {file: [] for file in files},
        "configs": {file: {"task": file, "dataset_path": "text", **settings} for file in files},
        "versions": dict.fromkeys(files, 1.0),
        "n-shot": dict.fromkeys(files, 0),
        "higher_is_better": {file: dict.fromkeys(_METRICS, False) for file in files},
        "n-samples": {file: {"original": count, "effective": count} for file, count in counts.items()},
        "config": {"model": engine, "model_args": dict(model_arguments)},
        "engine": engine,
        "window": window,
        "stride": stride,
        "date": time.time(),
        "total_evaluation_time_seconds": str(seconds),
    }


def write_text_report(
    directory: Path,
    report: Mapping[str, Any],
    documents: Sequence[Document],
    likelihoods: Sequence[float],
    *,
    model: str,
) -> None:
    """results.json, report.html, and for each file samples_FILE.jsonl: each document's log-likelihood and size."""
    (directory / RESULTS).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for file in report["results"]:
        with (directory / f"samples_{file}.jsonl").open("w", encoding="utf-8") as out:
            for document, value in zip(documents, likelihoods, strict=True):
                if document.file == file:
                    out.write(json.dumps(_sample(document, value)) + "\n")
    rows = [
        (
            file,
            str(report["n-samples"][file]["effective"]),
            f"{sum(document.utf8_bytes for document in documents if document.file == file):,}",
            f"{sum(len(document.tokens) for document in documents if document.file == file):,}",
            *(f"{values[f'{metric},none']:.5g}" for metric in _METRICS),
        )
        for file, values in report["results"].items()
    ]
    header = ("file", "documents", "bytes", "tokens", "bits per byte", "byte perplexity", "word perplexity")
    page = render(
        title=f"{model}: likelihood of text",
        subtitle=f"windows of {report['window']} tokens, stride {report['stride']}",
        tiles={"engine": report["engine"], "files": str(len(rows))},
        figures=(),
        tables=[table("Results", header, rows, numbers=header[1:])],
    )
    write(directory / REPORT, page)


def metrics_of(report: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """{file: {metric: value}}, for a manifest and a table."""
    return {
        file: {metric: values[f"{metric},none"] for metric in _METRICS} for file, values in report["results"].items()
    }


def _sample(document: Document, value: float) -> dict[str, Any]:
    return {
        "doc_id": document.number,
        "filter": "none",
        "metrics": list(_METRICS),
        "doc_hash": hashlib.sha256(document.text.encode()).hexdigest(),
        "bits_per_byte": [value, document.utf8_bytes],
        "byte_perplexity": [value, document.utf8_bytes],
        "word_perplexity": [value, document.words],
    }


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
