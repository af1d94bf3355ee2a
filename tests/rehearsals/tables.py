"""Tables of what was rehearsed: all of it in docs/rehearsal.md, a row a run in README.md."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.rehearsal.machine import GPUS
from tests.rehearsals.cases import FAMILY_GPUS, GPU, ROWS, largest_of_each_family

RECORDED = Path(__file__).with_name("recorded.json")
ROOT = Path(__file__).resolve().parents[2]
PAGE, README = ROOT / "docs" / "rehearsal.md", ROOT / "README.md"
BEGIN, END = "<!-- make rehearsals: begin -->", "<!-- make rehearsals: end -->"
GiB = 2**30


def write_pages(recorded: Mapping[str, Any]) -> None:
    """Replace what is between the markers."""
    for page, text in ((PAGE, block(recorded)), (README, short_block(recorded))):
        before, _, rest = page.read_text().partition(BEGIN)
        _, _, after = rest.partition(END)
        page.write_text(before + text + after)


def short_block(recorded: Mapping[str, Any]) -> str:
    """The fullest stage of each run, with its markers."""
    lines = ["| H100s, layout | GiB reserved, of 79.6 less 4 | rehearsed in |", "|---|---|---|"]
    for name, stages in recorded["rows"].items():
        fullest = max(each["reserved"] for each in stages)
        short = " (does not fit)" if fullest > GPUS[GPU].usable else ""
        lines.append(f"| {name} | {fullest / GiB:.1f}{short} | {stages[0]['rehearsal_seconds']:.0f} s |")
    return "\n".join([BEGIN, "", *lines, "", END])


def block(recorded: Mapping[str, Any]) -> str:
    """The tables, with their markers."""
    families = ["", *_families(recorded["families"])] if recorded["families"] else []
    return "\n".join([BEGIN, "", *_big(recorded["rows"]), *families, *_missing(recorded), "", END])


def _missing(recorded: Mapping[str, Any]) -> list[str]:
    """What the command has not come to yet."""
    rows = [row.name for row in ROWS if row.name not in recorded["rows"]]
    count = sum(name not in recorded["families"] for name in largest_of_each_family())
    found = [f"Not recorded yet: {'; '.join(rows)}."] if rows else []
    if count:
        found.append(f"Not recorded yet: a layout on {FAMILY_GPUS:,} GPUs of {count} families.")
    return [line for each in found for line in ("", each)]


def _big(rows: Mapping[str, Any]) -> list[str]:
    lines = [
        "| run | stage | states | peak | reserved | MiB moved an update, by group | rehearsed in |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, stages in rows.items():
        for each in stages:
            moved = ", ".join(f"{title} {size:,}" for title, size in each["communication"].items())
            lines.append(
                f"| {name} | {each['stage']} | {each['states'] / GiB:.1f} | {each['peak'] / GiB:.1f} | "
                f"{each['reserved'] / GiB:.1f} | {moved or '-'} | {each['rehearsal_seconds']:.0f} s |"
            )
    return lines


def _families(families: Mapping[str, Any]) -> list[str]:
    lines = ["| family | largest published size | a layout that fits 1,024 H100s | reserved |", "|---|---|---|---|"]
    for name, each in families.items():
        if each["fits"]:
            layout = each["layout"] + (", uneven stages" if "--pipeline-layers" in each["flags"] else "")
            layout += f", recompute {each['flags']['--recompute']}" if "--recompute" in each["flags"] else ""
            lines.append(f"| {name} | {each['model']} | {layout} | {each['reserved'] / GiB:.1f} |")
        else:
            lines.append(f"| {name} | {each['model']} | **none found** | |")
    return lines
