"""Rules of the source tree: imports point down, tests mirror sources, files stay short, file names are unique.

Imports are read from the sources and followed transitively. Imports under `if TYPE_CHECKING` are ignored.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    path.relative_to(ROOT)
    for folder in ("shared", "tools", "demo", "containers", "tests")
    for path in (ROOT / folder).rglob("*.py")
    if not any(part.startswith(".venv") or part == "build" for part in path.parts)
)

# From the bottom up. A module imports from its own entry (the longest that it begins with) and from rows below it:
# entries of one row do not know each other.
LAYERS = (
    ("shared.errors",),
    ("shared.console", "shared.foreign_formats", "shared.invocation", "shared.precision"),
    ("shared.cli | shared.help", "shared.architecture", "shared.kernels"),
    ("shared.mapping", "shared.parallel"),
    ("shared.checkpoint.dtypes | shared.checkpoint.files",),
    ("shared.checkpoint.formats.safetensors_file",),  # its TensorInfo describes the bytes that are copied
    ("shared.checkpoint.copy",),
    ("shared.quantized",),
    (
        "shared.checkpoint.directory.manifest | shared.checkpoint.directory.auxiliary_files",
    ),  # config.json of a directory
    ("shared.checkpoint.formats",),
    ("shared.checkpoint.directory",),
    ("shared.checkpoint.lora",),
    ("shared.families",),
    ("shared.weight_account",),
    ("shared.runtime", "shared.rehearsal"),
    ("shared.data", "shared.report"),
    ("shared.model",),
    ("shared.training",),
    ("tools.convert", "tools.pretrain", "tools.sft", "tools.rlhf", "tools.infer"),
)

# No chain of imports leads from the first to the second. A tool's cli answers usage errors at once: what is slow to
# import is imported inside its functions.
UNREACHED = {
    "shared.architecture": ("torch", "megatron", "numpy"),
    "shared.mapping": ("torch", "megatron"),
    "shared.parallel": ("torch", "megatron", "numpy"),
    "shared.checkpoint": ("torch", "megatron"),
    "shared.quantized": ("torch", "megatron"),
    "shared.families": ("torch", "megatron"),
    "shared.weight_account": ("torch", "transformers", "megatron"),
    "shared.kernels": ("megatron",),
    "tools.convert.cli": ("torch", "megatron", "transformers", "numpy"),
    "tools.pretrain.cli": ("torch", "megatron", "transformers", "numpy"),
    "tools.sft.cli": ("torch", "megatron", "transformers", "numpy"),
    "tools.rlhf.cli": ("torch", "megatron", "transformers", "deepspeed", "trl"),
    "tools.infer.cli": ("torch", "megatron", "transformers", "vllm"),
}

_SUBJECT = "one subject: as described in architecture, as named in families, as computed in model"
# File names that stand in several folders of shared and tools, and why.
SHARED_NAMES = {
    "__init__.py": "a package",
    "cli.py": "the command line of each tool, and what they have in common",
    "options.py": "the flags of training and of rlhf",
    "prepare.py": "the command of that name in pretrain and in sft",
    "train.py": "the command of that name in pretrain and in sft",
    "evaluate_text.py": "the command of that name in pretrain and in infer",
    "attention.py": _SUBJECT,
    "embedding_and_head.py": _SUBJECT,
    "gated_delta_net.py": _SUBJECT,
    "mla.py": _SUBJECT,
    "moe.py": _SUBJECT,
    "mtp.py": _SUBJECT,
    "norm.py": _SUBJECT,
    "prefix_lm.py": _SUBJECT,
    "lora.py": "adapters: trained in model, of transformers' models in rlhf",
    "data.py": "what is trained on: rows of tokens in training, prompts and pairs in rlhf",
    "state.py": "what a resume needs beside the weights: of training, of rlhf",
    "engine.py": "the seam of engines: that train in rlhf, that generate in infer",
    "spec.py": "a specification: of Megatron-Core layers, of rewards",
}


def module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCES if path.parts[0] in ("shared", "tools")}


@cache
def imports(module: str) -> dict[str, bool]:
    """Imports of a module: full name for this repository's modules, top-level name for libraries. True: at import time;
    False: only inside functions."""
    found: dict[str, bool] = {}

    def note(name: str, at_once: bool) -> None:
        own = name
        while own and own not in MODULES:
            own = own.rpartition(".")[0]
        parts = own.split(".")
        packages = [".".join(parts[:length]) for length in range(1, len(parts))]  # importing a.b.c runs a and a.b first
        names = [own, *(p for p in packages if p in MODULES)] if own else [name.split(".")[0]]
        for each in names:
            found[each] = found.get(each, False) or at_once

    def visit(node: ast.AST, at_once: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
                continue
            if isinstance(child, ast.Import):
                for alias in child.names:
                    note(alias.name, at_once)
            elif isinstance(child, ast.ImportFrom):
                for alias in child.names:
                    note(f"{child.module}.{alias.name}", at_once)
            visit(child, at_once and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    visit(ast.parse((ROOT / MODULES[module]).read_text(encoding="utf-8")), True)
    found.pop(module, None)
    return found


def within(module: str, entry: str) -> bool:
    return any(module == part or module.startswith(f"{part}.") for part in entry.split(" | "))


def layer(module: str) -> tuple[int, str] | None:
    """(row, entry) of the longest entry that is a prefix of the module name."""
    fitting = [
        (max(len(part) for part in entry.split(" | ") if within(module, part)), row, entry)
        for row, entries in enumerate(LAYERS)
        for entry in entries
        if within(module, entry)
    ]
    return max(fitting)[1:] if fitting else None


def chains(start: str) -> Iterator[list[str]]:
    """The shortest import chain from `start` to every module and library imported with it."""
    paths = {start: [start]}
    queue = [start]
    for module in queue:
        for name in (n for n, at_once in imports(module).items() if at_once and n not in paths):
            paths[name] = [*paths[module], name]
            yield paths[name]
            if name in MODULES:
                queue.append(name)


def test_imports_point_down() -> None:
    """shared imports no tool, a tool no other tool, a folder of shared none above it; also inside functions."""
    modules = {module for module, path in MODULES.items() if path.name != "__init__.py"}
    offenders = [
        f"{module} has no row in LAYERS of {Path(__file__).name}" for module in sorted(modules) if layer(module) is None
    ]
    for module in sorted(MODULES):
        row, entry = layer(module) or (-1, "no row in LAYERS")
        for name in sorted(imports(module)):
            if name in ("tests", "demo", "containers"):
                offenders.append(f"{module} imports {name}")
            target_row, target = (layer(name) if name in modules else None) or (-1, "")
            if target_row >= row and target not in ("", entry):
                offenders.append(f"{module} ({entry}) imports {name} ({target}), which is not below it: see LAYERS")
    assert not offenders, "\n".join(offenders)


def test_what_no_chain_of_imports_reaches() -> None:
    offenders = {}  # one chain for each import at the end of chains
    for subject, libraries in UNREACHED.items():
        members = [module for module in sorted(MODULES) if within(module, subject)]
        assert members, f"{subject} of UNREACHED is not there"
        for module in members:
            for chain in chains(module):
                if chain[-1] in libraries:
                    offenders.setdefault((subject, *chain[-2:]), " -> ".join(chain))
    assert not offenders, "\n".join(offenders.values())


def test_tests_mirror_sources() -> None:
    """tests/shared/x/test_y.py tests shared/x/y.py, or a folder of files that are tested together."""
    offenders = []
    for path in (p for p in SOURCES if p.parts[0] == "tests" and p.name.startswith("test_")):
        folder = Path(*path.parts[1:-1])
        if folder.parts[:1] not in (("shared",), ("tools",)):
            continue
        subject = path.stem.removeprefix("test_")
        known = {p.stem.replace("-", "_") for p in (ROOT / folder).glob("*")}
        if subject not in known and not subject.startswith(("every_", "end_to_end_")):
            offenders.append(f"{path} stands for no file of {folder}")
    assert not offenders, "\n".join(offenders)


def test_files_stay_readable() -> None:
    counts = {path: len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    offenders = [f"{path} has {lines} lines: split it" for path, lines in counts.items() if lines >= 500]
    assert not offenders, "\n".join(offenders)


def test_a_file_name_stands_for_one_thing() -> None:
    places = defaultdict(list)
    for path in MODULES.values():
        places[path.name].append(str(path))
    repeated = {name: found for name, found in places.items() if len(found) > 1}
    offenders = [f"{name}: {', '.join(found)}" for name, found in repeated.items() if name not in SHARED_NAMES]
    offenders += [
        f"{name}: one place now, remove it from SHARED_NAMES" for name in SHARED_NAMES.keys() - repeated.keys()
    ]
    assert not offenders, "\n".join(offenders)
