"""Tables of a report."""

from __future__ import annotations

from shared.report.page import render
from shared.report.tables import table


def test_texts_are_escaped_and_numbers_to_the_right():
    found = table("<One>", ("name", "value"), [("<a>", "1"), ("b & c", "2")], numbers=("value",))
    assert "<h2>&lt;One&gt;</h2>" in found
    assert "<td>&lt;a&gt;</td><td class=number>1</td>" in found
    assert "<td>b &amp; c</td>" in found
    assert "<th>name</th><th class=number>value</th>" in found
    assert table("empty", ("name",), []) == ""


def test_a_page_with_tables_has_their_style_and_one_without_does_not():
    with_tables = render(title="t", tiles={}, figures=(), tables=[table("a", ("b",), [("c",)])])
    assert '<section class="tables"><figure>' in with_tables
    assert "border-collapse" in with_tables
    assert "border-collapse" not in render(title="t", tiles={}, figures=())
