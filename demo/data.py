"""The demo's data: the source code of Python's standard library, available on every machine.

    python3 demo/data.py DIR

Whole modules or packages are held out, by the hash of their names. The data depends on the interpreter's standard library
only. Written to DIR:

    train/                  source files for pretraining
    heldout.jsonl           {"text"}: pieces of held-out modules, for bits per byte
    sft.jsonl               {"messages"}: complete this function -> its body; held out: sft-heldout.jsonl
    preferences.jsonl       {"prompt", "chosen", "rejected"}: real and damaged bodies
    prompts.jsonl           {"messages"}: prompts for PPO; held out: prompts-heldout.jsonl
    tasks/                  lm-evaluation-harness tasks: bits per byte of heldout.jsonl, replies to prompts-heldout.jsonl
"""

from __future__ import annotations

import ast
import hashlib
import json
import random
import shutil
import sys
import sysconfig
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from damage import damaged
from reward import INDENT, REQUEST, is_body

# Atypical modules: tests, tables, long documents as strings, bundled wheels, whole programs.
EXCLUDED = {
    *("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data"),
    *("encodings", "ensurepip", "_pyrepl", "__pycache__", "this.py", "antigravity.py"),
}
HELD_OUT_SHARE = 0.10  # of modules
HELD_OUT_SALT = "demo:"  # chosen so that no large package is held out
HEADER_CHARACTERS = 160  # longest signature and docstring
BODY_CHARACTERS = 120  # longest body
BODY_LINES = 6
STRETCH_BYTES = 4000  # size of a held-out document
STRETCHES = 40  # held-out documents, evenly spaced
PREFERENCES = 900  # pairs for the reward model
SAMPLES = 2  # replies to each held-out request
MAX_NEW_TOKENS = 48  # in PPO and in the evaluation of replies
TEMPERATURE = 0.8  # in PPO and in the evaluation of replies

TEXT_TASK = """\
task: heldout
dataset_path: json
dataset_kwargs:
  data_files:
    test: ../heldout.jsonl
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: bits_per_byte
metadata:
  version: 1.0
"""
REPLIES_TASK = f"""\
task: replies
dataset_path: json
dataset_kwargs:
  data_files:
    test: ../prompts-heldout.jsonl
test_split: test
output_type: generate_until
repeats: {SAMPLES}
doc_to_text: "{{{{messages[0].content}}}}"
doc_to_target: ""
generation_kwargs:
  until: []
  do_sample: true
  temperature: {TEMPERATURE}
  max_gen_toks: {MAX_NEW_TOKENS}
filter_list:
  - name: samples
    filter:
      - function: take_first_k
        k: {SAMPLES}
process_results: !function reward.share_that_parses
metric_list:
  - metric: parses
    aggregation: mean
    higher_is_better: true
  - metric: characters
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


@dataclass(frozen=True, kw_only=True)
class Function:
    """A short function: prompt and reference reply."""

    header: str
    """Signature and the docstring's first line."""
    body: str
    """Everything after the docstring, indented by four spaces."""

    @property
    def request(self) -> str:
        """The user's message."""
        return REQUEST + self.header


def modules(library: Path) -> Iterator[tuple[str, Path]]:
    """(relative name, file) of every UTF-8 source file of the library that parses, sorted by name."""
    for file in sorted(library.rglob("*.py"), key=lambda f: f.relative_to(library).parts):
        relative = file.relative_to(library)
        if EXCLUDED.intersection(relative.parts) or relative.parts[0].startswith(("config-", "_sysconfigdata")):
            continue
        try:
            _parse(file.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, SyntaxError):
            continue  # e.g. files that declare another encoding
        yield relative.as_posix(), file


def held_out(name: str) -> bool:
    """Whether a file is held out, by the hash of its top-level module name."""
    top = name.split("/")[0].removesuffix(".py").lstrip("_")
    digest = hashlib.sha256((HELD_OUT_SALT + top).encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32 < HELD_OUT_SHARE


def functions(source: str) -> Iterator[Function]:
    """The short functions of a file with a docstring and a non-trivial body."""
    lines = source.splitlines()
    for node in ast.walk(_parse(source)):
        if not isinstance(node, ast.FunctionDef) or len(node.body) < 2:
            continue
        summary = (ast.get_docstring(node) or "").split("\n")[0].strip()
        if not summary or '"""' in summary or "\\" in summary:
            continue
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        header = f'def {node.name}({ast.unparse(node.args)}){returns}:\n{INDENT}"""{summary}"""'
        text = textwrap.dedent("\n".join(lines[node.body[0].end_lineno : node.end_lineno])).strip("\n")
        body = textwrap.indent(text, INDENT)
        short = len(header) <= HEADER_CHARACTERS and len(body) <= BODY_CHARACTERS and body.count("\n") < BODY_LINES
        if short and is_body(header, body):
            yield Function(header=header, body=body)


def stretches(text: str) -> Iterator[str]:
    """Pieces of about `STRETCH_BYTES`, cut between lines; a short last piece is dropped."""
    piece, size = [], 0
    for line in text.splitlines(keepends=True):
        piece.append(line)
        size += len(line.encode())
        if size >= STRETCH_BYTES:
            yield "".join(piece)
            piece, size = [], 0


def write(library: Path, directory: Path) -> dict[str, int]:
    """Write all files into an empty directory. Returns counts."""
    pieces: list[str] = []
    pairs: dict[bool, dict[str, Function]] = {True: {}, False: {}}
    for name, file in modules(library):
        text = file.read_text(encoding="utf-8")
        apart = held_out(name)
        if apart:
            pieces += stretches(text)
        else:
            (directory / "train" / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / "train" / name).write_text(text, encoding="utf-8")
        for function in functions(text):
            pairs[apart].setdefault(function.header, function)
    for header in pairs[False].keys() & pairs[True].keys():  # a function also in a training module is not held out
        del pairs[True][header]

    train, rest = (list(pairs[apart].values()) for apart in (False, True))
    order = random.Random(0)
    order.shuffle(train)
    order.shuffle(rest)
    chosen = pieces[:: max(1, len(pieces) // STRETCHES)][:STRETCHES]
    rows(directory / "heldout.jsonl", [{"text": text} for text in chosen])
    rows(directory / "sft.jsonl", [_conversation(function) for function in train])
    rows(directory / "sft-heldout.jsonl", [_conversation(function) for function in rest])
    rows(directory / "preferences.jsonl", [_preference(function) for function in train[:PREFERENCES]])
    rows(directory / "prompts.jsonl", [_prompt(function) for function in train])
    rows(directory / "prompts-heldout.jsonl", [_prompt(function) for function in rest])
    (directory / "tasks").mkdir()
    (directory / "tasks" / "heldout.yaml").write_text(TEXT_TASK, encoding="utf-8")
    (directory / "tasks" / "replies.yaml").write_text(REPLIES_TASK, encoding="utf-8")
    shutil.copy(Path(__file__).with_name("reward.py"), directory / "tasks")  # for `!function reward.NAME` of the task
    return {
        "train_files": sum(1 for _ in (directory / "train").rglob("*.py")),
        "heldout_bytes": sum(len(text.encode()) for text in chosen),
        "functions": len(train),
        "heldout_functions": len(rest),
    }


def _conversation(function: Function) -> dict[str, object]:
    return {"messages": [*_messages(function), {"role": "assistant", "content": function.body}]}


def _prompt(function: Function) -> dict[str, object]:
    return {"messages": _messages(function)}


def _preference(function: Function) -> dict[str, object]:
    seed = int.from_bytes(hashlib.sha256(function.header.encode()).digest()[:4], "big")
    worse = damaged(function.body, random.Random(seed))
    return {
        "prompt": _messages(function),
        "chosen": [{"role": "assistant", "content": function.body}],
        "rejected": [{"role": "assistant", "content": worse}],
    }


def _messages(function: Function) -> list[dict[str, str]]:
    return [{"role": "user", "content": function.request}]


def rows(path: Path, content: Sequence[Mapping[str, object]]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content), encoding="utf-8")


def _parse(source: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SyntaxWarning about escapes in the library's source
        return ast.parse(source)


def written_whole(directory: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill the directory, which appears when it is whole; print what `write` returns."""
    if directory.exists():
        print(f"already done: {directory}", file=sys.stderr)
        return
    new = directory.with_name(directory.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    counts = write(new)
    new.rename(directory)
    if counts is not None:
        print(json.dumps(counts))


def main(directory: Path) -> None:
    """Write the directory atomically."""
    written_whole(directory, lambda new: write(Path(sysconfig.get_path("stdlib")), new))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: data.py DIR")
    main(Path(sys.argv[1]))
