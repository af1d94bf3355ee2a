"""`convert families`: the supported model families, their named sizes, and recorded test results."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from shared.errors import UserError
from shared.families import registry
from shared.families.family import Family
from tools.convert import proofs
from tools.convert.proofs import Outcome, Record

_WIDE = 150  # minimum terminal width of the table
# Heading -> proofs. A cell shows the worst outcome of these proofs over the family's tested sizes.
_COLUMNS = {
    "round trip": ("round trip",),
    "TE": ("te round trip",),
    "logits": ("logits",),
    "TP=2": ("logits tp2",),
    "PP=2": ("logits pp2",),
    "EP=2": ("logits ep2",),
    "training": ("training tp2", "training pp2", "training ep2"),
    "mistakes": ("mistakes",),
    "vLLM": ("vllm",),
}
_INDENTED: dict[str, Any] = {"initial_indent": "  ", "subsequent_indent": "    ", "break_on_hyphens": False}
_MEANING = (
    "Tiny sizes, fp32 unless noted. round trip, TE: Hugging Face to Megatron-Core or TransformerEngine and back, bit for bit. "
    "logits, TP=2, PP=2, EP=2: largest difference from transformers / standard deviation of the logits (from the published "
    "arithmetic where transformers lacks the family). training: largest difference of a step's gradients / largest gradient. "
    "mistakes: deliberate mistakes in the family found by verify. vLLM: greedy tokens of the export equal to transformers', "
    "on CPU; where vLLM has only bf16 there, RMS difference of log-probabilities from fp32 / their standard deviation. "
    "published: published configurations with every tensor accounted for."
)


def run(markdown: bool, as_json: bool) -> None:
    """Print the families: a table, a list on a narrow terminal, Markdown or JSON."""
    if markdown and as_json:
        raise UserError("--markdown and --json: give one of them")
    record = proofs.load()
    if as_json:
        print(json.dumps(_data(record), indent=2))
    elif markdown:
        print("\n".join(_markdown(record)))
    else:
        console = Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else 160)
        if console.width >= _WIDE:
            _print_table(console, record)
        else:
            for line in _list(record, console.width):
                console.print(line, markup=False, soft_wrap=True)
        for line in [_MEANING, *_notes(record), *_runs(record), *_later(record)]:
            console.print(line, markup=False)


def _print_table(console: Console, record: Record) -> None:
    table = Table("model_type", "models", "sizes for convert init", *_COLUMNS, "published", box=None, pad_edge=False)
    for family in registry.FAMILIES.values():
        models = f"{family.title}\n[dim]{family.hf_class}[/dim]"
        table.add_row(family.name, models, "\n".join(_sizes(family)), *_cells(family, record).values())
    console.print(table)
    console.print()


def _list(record: Record, width: int) -> Iterator[str]:
    for family in registry.FAMILIES.values():
        cells = "; ".join(f"{heading} {cell}" for heading, cell in _cells(family, record).items())
        yield textwrap.fill(f"{family.name}: {family.title} ({family.hf_class})", width, subsequent_indent="    ")
        for text in (f"sizes: {', '.join(_sizes(family))}", cells):
            yield textwrap.fill(text, width, **_INDENTED)
    yield ""


def _markdown(record: Record) -> Iterator[str]:
    yield "# Model families and test results"
    yield ""
    yield "Printed by `convert families --markdown`; recorded by `make proofs`."
    yield ""
    yield _MEANING
    yield ""
    headings = ("model_type", "models", "class", *_COLUMNS, "published")
    yield f"| {' | '.join(headings)} |"
    yield f"|{'---|' * len(headings)}"
    for family in registry.FAMILIES.values():
        yield f"| {' | '.join((family.name, family.title, family.hf_class, *_cells(family, record).values()))} |"
    yield ""
    yield from (f"- {line}" for line in [*_notes(record), *_runs(record)])


def _data(record: Record) -> dict[str, Any]:
    families = {
        family.name: {
            "title": family.title,
            "class": family.hf_class,
            "sizes": {name: size.parameter_count() for name, size in family.sizes.items()},
            "state": proofs.state(family, record) or "recorded",
            "proofs": {
                name: {proof: proofs.outcome(family, name, proof, record) for proof in proofs.proofs_of(size)}
                for name, size in proofs.tested_sizes(family).items()
            },
            "published": proofs.published(family, record),
            "run": record["families"].get(family.name, {}).get("run"),
        }
        for family in registry.FAMILIES.values()
    }
    return {"families": families, "runs": record["runs"]}


def _cells(family: Family, record: Record) -> dict[str, str]:
    """Cells by heading."""
    if why := proofs.state(family, record):
        return dict.fromkeys((*_COLUMNS, "published"), why)
    cells = {heading: _cell(heading, _outcomes(family, names, record)) for heading, names in _COLUMNS.items()}
    models = proofs.published(family, record).values()
    failed = any(found["result"] != "proven" for found in models)
    return cells | {"published": "FAILED" if failed else str(len(models))}


def _outcomes(family: Family, names: tuple[str, ...], record: Record) -> list[Outcome]:
    sizes = proofs.tested_sizes(family)
    wanted = [(name, proof) for name, size in sizes.items() for proof in proofs.proofs_of(size) if proof in names]
    return [proofs.outcome(family, name, proof, record) for name, proof in wanted]


def _cell(heading: str, found: list[Outcome]) -> str:
    """The worst of several outcomes."""
    results = [outcome["result"] for outcome in found]
    if not found:
        return "-"  # EP of a dense model
    if "failed" in results:
        return "FAILED"
    if "not run" in results:
        return "not run"
    proven = [outcome for outcome in found if outcome["result"] == "proven"]
    if not proven:
        return f"not in {heading}"
    some = "" if len(proven) == len(found) else f" ({len(proven)} of {len(found)} sizes)"
    if "of" in proven[0]:
        return f"{sum(outcome['caught'] for outcome in proven)} of {sum(outcome['of'] for outcome in proven)}{some}"
    if "difference" in proven[0]:
        return f"{_round(outcome['difference'] for outcome in proven)}{some}"
    if all("tokens" in outcome for outcome in proven):
        return f"{min(outcome['tokens'] for outcome in proven)} tokens{some}"
    if "precision" in proven[0]:  # tokens are compared in fp32 only
        return f"{_round(outcome['log_probabilities'] for outcome in proven)} in {proven[0]['precision']}{some}"
    return f"equal{some}"


def _round(differences: Iterable[float]) -> str:
    """The largest difference, to one digit."""
    return f"{max(differences):.0e}".replace("e-0", "e-")


def _notes(record: Record) -> Iterator[str]:
    """Recorded reasons of outcomes."""
    for family in registry.FAMILIES.values():
        if proofs.state(family, record):
            continue
        for name, size in proofs.tested_sizes(family).items():
            for proof in proofs.proofs_of(size):
                found = proofs.outcome(family, name, proof, record)
                if "reason" in found:
                    yield f"{name}, {proof}, {found['result']}: {found['reason']}"


def _runs(record: Record) -> Iterator[str]:
    """Date, revision, families and library versions of each run."""
    for name, run in record["runs"].items():
        families = [family for family, entry in record["families"].items() if entry["run"] == name]
        who = "all families" if len(families) == len(registry.FAMILIES) else ", ".join(families)
        versions = "; ".join(
            f"{tool} with {', '.join(f'{package} {version}' for package, version in packages.items())}"
            for tool, packages in sorted(run["versions"].items())
        )
        yield f"{run['date']}, revision {run['revision']}, {who}: {versions}"
    if not record["runs"]:
        yield "No proof is recorded."


def _later(record: Record) -> Iterator[str]:
    """A note if shared code changed since a run."""
    if any(run["code"] != proofs.code() for run in record["runs"].values()):
        yield "Shared code has changed since; `make proofs` records anew."


def _sizes(family: Family) -> list[str]:
    return [f"{name} ({_short(size.parameter_count())})" for name, size in family.sizes.items()]


def _short(parameters: int) -> str:
    for divisor, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if parameters >= divisor:
            return f"{parameters / divisor:.3g}{unit}"
    return str(parameters)
