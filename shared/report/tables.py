"""Tables of a report, as inline HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

TABLE_STYLE = """
section.tables { display: block; }
section.tables figure { margin-bottom: 16px; padding-bottom: 16px; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin-top: 10px; font-size: 14px; }
th { color: var(--dim); font-weight: 500; font-size: 12px; text-align: left; }
th, td { padding: 6px 12px 6px 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
td { white-space: pre-wrap; overflow-wrap: anywhere; }
th.number, td.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
"""


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[str] = ()) -> str:
    """A `<figure>` with a table; an empty string without rows.

    Args:
        title: its heading.
        header: names of the columns.
        rows: texts, one for each column.
        numbers: columns that are set to the right.
    """
    if not rows:
        return ""

    def cells(kind: str, texts: Sequence[str]) -> str:
        return "".join(
            f"<{kind}{' class=number' * (name in numbers)}>{escape(text)}</{kind}>"
            for name, text in zip(header, texts, strict=True)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return (
        f"<figure><figcaption><h2>{escape(title)}</h2></figcaption>"
        f"<table><thead><tr>{cells('th', header)}</tr></thead><tbody>{body}</tbody></table></figure>"
    )
