"""What the tests proved of each family when they were last recorded: proofs.json, which `make proofs` writes.

    runs: NAME -> date, revision, code, versions of each tool's environment
    families: NAME -> run, description, sizes: SIZE -> PROOF -> outcome, published: MODEL -> outcome

An outcome is a result (proven, failed, or lacking where the thing does not exist), its reason, and figures. What was
recorded holds for the description that was tested: a family that says otherwise now is not proven.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from shared.architecture.architecture import Architecture
from shared.families import registry
from shared.families.family import Family

RECORD = Path(__file__).with_name("proofs.json")
_SHARED = Path(registry.__file__).parents[1]
_DECIDING = ("architecture", "families", "kernels", "mapping", "model", "quantized")  # what a proof depends on

Record = dict[str, Any]
Outcome = dict[str, Any]


def load(path: Path = RECORD) -> Record:
    """The record; an empty one where none is."""
    if not path.exists():
        return {"runs": {}, "families": {}}
    record: Record = json.loads(path.read_text(encoding="utf-8"))
    return record


def description(family: Family) -> str:
    """Hash of all that a family says: of each size the configuration, what is read from it, and the tensors' table."""
    said = []
    for name, size in family.sizes.items():
        config = registry.to_config(size)
        said.append([name, config, registry.from_config(config).to_dict(), repr(registry.table_of(size))])
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def code() -> str:
    """Hash of the files that say how a family is read, laid out and computed."""
    digest = hashlib.sha256()
    for path in sorted(file for folder in _DECIDING for file in (_SHARED / folder).rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def tested_sizes(family: Family) -> dict[str, Architecture]:
    """Those that the tests run."""
    return {name: size for name, size in family.sizes.items() if "tiny" in name}


def proofs_of(architecture: Architecture) -> list[str]:
    """Every proof of a size, in the order of the tables."""
    layouts = ["tp2", "pp2"] + ["ep2"] * bool(architecture.moe)
    logits = [f"logits {layout}" for layout in layouts]
    training = [f"training {layout}" for layout in layouts]
    return ["round trip", "te round trip", "logits", *logits, *training, "mistakes", "vllm"]


def state(family: Family, record: Record) -> str:
    """Whether what is recorded is of this description: "", or why not."""
    entry = record["families"].get(family.name)
    if entry is None:
        return "not run"
    return "" if entry["description"] == description(family) else "changed since"


def outcome(family: Family, size: str, proof: str, record: Record) -> Outcome:
    """What was recorded of one proof, or that nothing was."""
    found: Outcome | None = record["families"].get(family.name, {}).get("sizes", {}).get(size, {}).get(proof)
    return found or {"result": "not run"}


def published(family: Family, record: Record) -> dict[str, Outcome]:
    """Models whose published configuration's tensors were accounted for."""
    found: dict[str, Outcome] = record["families"].get(family.name, {}).get("published", {})
    return found


def shortcomings(record: Record) -> list[str]:
    """Whatever is not proven, a line each."""
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
