"""Scores of text: the sums over documents and windows."""

from __future__ import annotations

import json
import math

import pytest

from shared.data.text_windows import Document
from shared.report.text_scores import log_likelihoods, metrics_of, text_report, write_text_report

DOCUMENTS = [
    Document(file="a.txt", number=0, text="één <b>", tokens=[1, 2]),
    Document(file="rows.jsonl", number=0, text="a b c", tokens=[1]),
    Document(file="rows.jsonl", number=1, text="d", tokens=[1]),
]


def test_a_file_is_the_sum_of_its_documents(tmp_path):
    values = log_likelihoods(DOCUMENTS, [0, 0, 1, 2], [-1.0, -2.0, -4.0, -5.0])
    assert values == [-3.0, -4.0, -5.0]
    report = text_report(
        DOCUMENTS, values, engine="hf", model_arguments={"dtype": "float32"}, window=8, stride=4, seconds=1.0
    )
    assert metrics_of(report)["a.txt"]["bits_per_byte"] == pytest.approx(3 / 9 / math.log(2), rel=1e-15)
    assert metrics_of(report)["rows.jsonl"] == {
        "bits_per_byte": pytest.approx(9 / 6 / math.log(2), rel=1e-15),
        "byte_perplexity": pytest.approx(math.exp(9 / 6), rel=1e-15),
        "word_perplexity": pytest.approx(math.exp(9 / 4), rel=1e-15),
    }
    write_text_report(tmp_path, report, DOCUMENTS, values, model="<llama>")
    assert json.loads((tmp_path / "results.json").read_text()) == report
    rows = [json.loads(line) for line in (tmp_path / "samples_rows.jsonl.jsonl").read_text().splitlines()]
    assert [row["bits_per_byte"] for row in rows] == [[-4.0, 5], [-5.0, 1]]
    page = (tmp_path / "report.html").read_text()
    assert "&lt;llama&gt;" in page
    assert page.count("<tr>") == 3


def test_a_perplexity_beyond_floats_is_infinite():
    report = text_report(DOCUMENTS[:1], [-1e6], engine="hf", model_arguments={}, window=8, stride=8, seconds=0)
    assert metrics_of(report)["a.txt"]["byte_perplexity"] == math.inf
