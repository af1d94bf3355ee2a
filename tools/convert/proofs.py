"""Test results of each family in proofs.json, written by `make proofs`.

    runs: NAME -> date, revision, code, versions of each tool's environment
    families: NAME -> run, description, sizes: SIZE -> PROOF -> outcome, published: MODEL -> outcome

An outcome is a result (proven, failed, or lacking: the feature does not exist), a reason and figures. It is valid for the
tested description only; a family whose description changed is not proven.
"""

from __future__ import annotations

import hashlib
import json
import tokenize
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from shared.architecture.architecture import Architecture
from shared.families import registry
from shared.families.family import Family

RECORD = Path(__file__).with_name("proofs.json")
_SHARED = Path(registry.__file__).parents[1]
_DECIDING = ("architecture", "families", "kernels", "mapping", "model", "quantized")  # packages that proofs depend on

Record = dict[str, Any]
Outcome = dict[str, Any]


def load(path: Path = RECORD) -> Record:
    """The record; empty if there is none."""
    if not path.exists():
        return {"runs": {}, "families": {}}
    record: Record = json.loads(path.read_text(encoding="utf-8"))
    return record


def description(family: Family) -> str:
    """Hash of a family: config.json, architecture and tensor table of every size."""
    described = []
    for name, size in family.sizes.items():
        config = registry.to_config(size)
        described.append([name, config, registry.from_config(config).to_dict(), repr(registry.table_of(size))])
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def code() -> str:
    """Hash of the code that proofs depend on, without comments and docstrings."""
    return digest(_DECIDING)


def digest(parts: Sequence[str]) -> str:
    """Hash of packages and modules (`name.py`) of shared/, without comments and docstrings."""
    hashed = hashlib.sha256()
    for path in sorted(file for part in parts for file in _modules(_SHARED / part)):
        with path.open("rb") as file:
            hashed.update("\0".join(_tokens(file.readline)).encode())
    return hashed.hexdigest()[:16]


def _modules(path: Path) -> Iterable[Path]:
    return (path,) if path.suffix else path.rglob("*.py")


def _tokens(readline: Callable[[], bytes]) -> Iterator[str]:
    """Tokens of a module, without comments, docstrings and line breaks inside statements."""
    ignored = (tokenize.COMMENT, tokenize.NL, tokenize.ENCODING)
    found = [token for token in tokenize.tokenize(readline) if token.type not in ignored]
    begins = (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    for index, token in enumerate(found):
        first = not index or found[index - 1].type in begins
        if not (first and token.type == tokenize.STRING and found[index + 1].type == tokenize.NEWLINE):
            yield {tokenize.INDENT: "indent", tokenize.DEDENT: "dedent"}.get(token.type, token.string)


def tested_sizes(family: Family) -> dict[str, Architecture]:
    """Sizes that the tests run."""
    return {name: size for name, size in family.sizes.items() if "tiny" in name}


def proofs_of(architecture: Architecture) -> list[str]:
    """Proofs of a size, in table order."""
    layouts = ["tp2", "pp2"] + ["ep2"] * bool(architecture.moe)
    logits = [f"logits {layout}" for layout in layouts]
    training = [f"training {layout}" for layout in layouts]
    return ["round trip", "te round trip", "logits", *logits, *training, "mistakes", "vllm"]


def state(family: Family, record: Record) -> str:
    """ "" if the record has the family's current description, else the reason."""
    entry = record["families"].get(family.name)
    if entry is None:
        return "not run"
    return "" if entry["description"] == description(family) else "changed since"


def outcome(family: Family, size: str, proof: str, record: Record) -> Outcome:
    """The recorded outcome of a proof, or `not run`."""
    found: Outcome | None = record["families"].get(family.name, {}).get("sizes", {}).get(size, {}).get(proof)
    return found or {"result": "not run"}


def published(family: Family, record: Record) -> dict[str, Outcome]:
    """Outcomes of published configurations, by model."""
    found: dict[str, Outcome] = record["families"].get(family.name, {}).get("published", {})
    return found


def shortcomings(record: Record) -> list[str]:
    """One line per proof that failed or was not run."""
    found = []
    for family in registry.FAMILIES.values():
        if why := state(family, record):
            found.append(f"{family.name}: {why}")
            continue
        for size, architecture in tested_sizes(family).items():
            results = {proof: outcome(family, size, proof, record) for proof in proofs_of(architecture)}
            found += [f"{size}: {proof}: {_words(o)}" for proof, o in results.items() if o["result"] in _OPEN]
        models = published(family, record)
        found += [f"{model}: {_words(o)}" for model, o in models.items() if o["result"] in _OPEN]
        if not models:
            found.append(f"{family.name}: no published model was accounted for")
    return found


_OPEN = ("failed", "not run")


def _words(found: Outcome) -> str:
    return ": ".join(found[key] for key in ("result", "reason") if key in found)
