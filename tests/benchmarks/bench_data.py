"""Speed of `pretrain prepare` beside what it is made of, and beside Megatron-LM's way: `make bench-data`.

    python tests/benchmarks/bench_data.py --work WORK [--megabytes 200] [--tokenizer DIR] [--workers 2] [--record]

The text is the standard library's source and the documentation in installed packages, as JSON lines, repeated with one word in
ten changed. The tokenizer is by default one of 49,152 tokens, trained on its first 20 MB.

    reading      reading and parsing alone
    tokenizer    the back end of prepare alone, on texts in memory
    both         one after the other on the same cores, which no program that does both can pass
    tokenizers   Hugging Face's tokenizers alone, on the first 10 MB
    prepare      the whole command, in time of its workers: steady, without starting, comparing and joining
    command      the whole command, all of it
    Megatron-LM  the loop of its tools/preprocess_data.py, written again: json.loads and the tokenizer in a pool of processes,
                 megatron.core's IndexedDatasetBuilder in the parent; on the first 10 MB

Figures are MB of JSON lines per second on `--workers` cores: bytes over the CPU seconds of all processes, times the cores. They
suffer less from other work on the machine than the wall clock does, which is beside them, but caches are shared: reading,
tokenizer and prepare are taken part by part in turn, the best of `ROUNDS`. `--record` keeps the figures in `results/`.
"""

from __future__ import annotations

import argparse
import ast
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.benchmarks.bench_train import RESULTS, machine, record_path  # noqa: E402

VOCABULARY, TRAINED_ON, BEGINNING = 49_152, 20_000_000, 10_000_000
ROUNDS = 3
Seconds = dict[str, float]


def write_corpus(path: Path, size: int) -> None:
    """About `size` bytes of JSON lines."""
    rng, texts = random.Random(0), list(_texts())
    rng.shuffle(texts)
    words = sorted({word for text in texts[:2000] for word in re.findall(r"[A-Za-z]{3,12}", text)})
    written = number = 0
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            text = texts[number % len(texts)]
            if number >= len(texts):
                parts = re.split(r"(\W+)", text)
                parts[::2] = [rng.choice(words) if rng.random() < 0.1 else part for part in parts[::2]]
                text = "".join(parts)
            number += 1
            written += file.write(json.dumps({"id": number, "text": text}, ensure_ascii=bool(number % 2)) + "\n")


def _texts() -> Iterator[str]:
    """Docstrings, pages and sources."""
    library = Path(sysconfig.get_path("stdlib")).resolve()
    for path in [*sorted(library.rglob("*.py")), *sorted(Path(sysconfig.get_path("purelib")).rglob("*"))]:
        if path.suffix not in (".py", ".md", ".rst", "") or not path.is_file() or path.stat().st_size > 1 << 20:
            continue
        try:
            text = path.read_text(encoding="utf-8")
            if path.suffix == ".py" and library not in path.resolve().parents:
                nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
                yield from filter(None, map(ast.get_docstring, nodes))
            else:
                yield text
        except (ValueError, SyntaxError):
            continue


def in_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work` says, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def in_turn(corpus: Path, recipe: Any, folder: Path) -> Seconds:
    """CPU seconds of reading, of the tokenizer on texts in memory, and of both with all that a worker does with them."""
    from shared.data import parts
    from shared.data.documents import line_blocks
    from shared.data.tokenizer_backends import REFERENCE, open_backend

    folder.mkdir()
    parts.init_worker(recipe, folder)
    parts._backend(REFERENCE)  # opened once a worker, however long it works
    backend = open_backend(recipe.backend, recipe.tokenizer_json)
    spent = dict.fromkeys(("reading", "tokenizer", "prepare"), 0.0)
    for part in parts.plan([corpus]):

        def read() -> None:
            for piece in part.pieces:  # noqa: B023 -- called in this step of the loop
                for _ in line_blocks(piece, "text"):
                    pass

        blocks = [texts for piece in part.pieces for _, texts in line_blocks(piece, "text")]
        best = dict.fromkeys(spent, float("inf"))
        for _ in range(ROUNDS):
            for name, work in (
                ("reading", read),
                ("tokenizer", lambda: [backend.encode(texts) for texts in blocks]),  # noqa: B023
                ("prepare", lambda: parts.tokenize_part(part)),  # noqa: B023
            ):
                start = time.process_time()
                work()
                best[name] = min(best[name], time.process_time() - start)
            for file in folder.iterdir():
                file.unlink()
        spent = {name: seconds + best[name] for name, seconds in spent.items()}
    shutil.rmtree(folder)
    return spent


def encoding(corpus: Path, tokenizer_json: str, cut: str | None, name: str) -> float:
    from shared.data.documents import documents
    from shared.data.parts import BATCH_CHARACTERS, plan
    from shared.data.tokenizer_backends import open_backend

    backend, spent = open_backend(name, tokenizer_json), 0.0
    for part in plan([corpus]):
        texts = [
            text
            for piece in part.pieces
            for _, several in documents(piece, "text", cut, BATCH_CHARACTERS)
            for text in several
        ]
        start = time.process_time()
        for first in range(0, len(texts), 500):
            backend.encode(texts[first : first + 500])
        spent += time.process_time() - start
    return spent


def _encode_line(line: str) -> list[int]:
    """`Encoder.encode` of Megatron-LM's tools/preprocess_data.py, for one key, with --append-eod."""
    tokenizer = _encode_line.tokenizer  # type: ignore[attr-defined]
    return [*tokenizer(json.loads(line)["text"]).input_ids, tokenizer.eos_token_id]


def _open_tokenizer(folder: Path) -> None:
    from transformers import AutoTokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encode_line.tokenizer = AutoTokenizer.from_pretrained(folder)  # type: ignore[attr-defined]


def megatron(corpus: Path, tokenizer: Path, prefix: Path, workers: int) -> Seconds:
    """The loop of preprocess_data.py: `pool.imap(encoder.encode, file, 32)`, `builder.add_document`, `finalize`."""
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    wall, own = time.monotonic(), time.process_time()
    with multiprocessing.get_context("spawn").Pool(workers, _open_tokenizer, (tokenizer,)) as pool:
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
        with corpus.open(encoding="utf-8") as file:
            for ids in pool.imap(_encode_line, file, 32):
                builder.add_document(torch.tensor(ids), [len(ids)])
        builder.finalize(f"{prefix}.idx")
        pool.close()
        pool.join()
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = time.process_time() - own + children.ru_utime + children.ru_stime
    return {"wall": time.monotonic() - wall, "cpu": spent}


def command(corpus: Path, tokenizer: Path, target: Path, workers: int) -> tuple[Seconds, dict[str, Any]]:
    """`pretrain prepare`, from its start to its end."""
    shutil.rmtree(target, ignore_errors=True)
    before, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    words = ["--source", corpus, "--tokenizer", tokenizer, "--target", target, "--workers", str(workers)]
    subprocess.run([sys.executable, "-m", "tools.pretrain.cli", "prepare", *words], cwd=ROOT, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    facts = json.loads((target / "manifest.json").read_text(encoding="utf-8"))["facts"]
    return {"wall": time.monotonic() - wall, "cpu": cpu}, facts


def measure(work: Path, megabytes: float, tokenizer: Path | None, workers: int) -> dict[str, Any]:
    """Every figure."""
    from tools.pretrain.prepare import _open_recipe

    work.mkdir(parents=True, exist_ok=True)
    corpus, beginning = work / f"text-{megabytes:g}.jsonl", work / "beginning.jsonl"
    if not corpus.is_file():
        write_corpus(corpus, int(megabytes * 1e6))
    _head(corpus, beginning, BEGINNING)
    if tokenizer is None:
        tokenizer = work / "tokenizer"
        _train(corpus, tokenizer)
    size, small = corpus.stat().st_size / 1e6, beginning.stat().st_size / 1e6
    spent, facts = command(corpus, tokenizer, work / "data", workers)
    backend = facts["tokenizer_backend"]["name"]
    recipe = replace(_open_recipe(tokenizer, "text", None, None)[0], backend=backend)
    loop = in_process_megatron(beginning, tokenizer, work / "megatron", workers)
    seconds = in_process(in_turn, corpus, recipe, work / "parts")
    found = {name: size / each for name, each in seconds.items()} | {
        "both": size / (seconds["reading"] + seconds["tokenizer"]),
        "tokenizers": small / in_process(encoding, beginning, recipe.tokenizer_json, recipe.cut, "tokenizers"),
        "command": size / spent["cpu"],
        "Megatron-LM": small / loop["cpu"],
    }
    slower = min(found["reading"], found["tokenizer"])
    return {
        "megabytes": round(size, 1),
        "workers": workers,
        "vocab_size": facts["vocab_size"],
        "tokenizer_backend": facts["tokenizer_backend"],
        "MB/s": {name: _rounded(workers * rate) for name, rate in found.items()},
        "ratios": {
            "prepare / slower of reading and tokenizer": _rounded(found["prepare"] / slower),
            "prepare / both": _rounded(found["prepare"] / found["both"]),
            "command / slower of reading and tokenizer": _rounded(found["command"] / slower),
            "prepare / tokenizers": _rounded(found["prepare"] / found["tokenizers"]),
            "prepare / Megatron-LM": _rounded(found["prepare"] / found["Megatron-LM"]),
            "command / Megatron-LM": _rounded(found["command"] / found["Megatron-LM"]),
        },
        "wall seconds of the command": round(spent["wall"], 1),
        "CPU seconds of the command beside the steady work": round(spent["cpu"] - seconds["prepare"], 1),
    }


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def table(found: dict[str, Any]) -> str:
    """The rates as lines of a table."""
    rows = [f"| {name} | {rate:.3g} | {1000 * found['workers'] / rate:.2f} |" for name, rate in found["MB/s"].items()]
    return "\n".join([f"| | MB/s on {found['workers']} cores | CPU ms per MB |", "|---|---|---|", *rows])


def in_process_megatron(corpus: Path, tokenizer: Path, prefix: Path, workers: int) -> Seconds:
    """`megatron` in a process of its own, whose children are its pool only."""
    words = [str(each) for each in (corpus, tokenizer, prefix, workers)]
    answer = subprocess.run(
        [sys.executable, __file__, "--loop", *words], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return dict(json.loads(answer.stdout.splitlines()[-1]))


def _head(corpus: Path, path: Path, size: int) -> None:
    with corpus.open("rb") as file, path.open("wb") as out:
        while out.tell() < size and (line := file.readline()):
            out.write(line)


def _train(corpus: Path, folder: Path) -> None:
    from tools.pretrain.train_bpe import train, write

    if not (folder / "tokenizer.json").is_file():
        head = folder.with_name("trained-on.jsonl")
        _head(corpus, head, TRAINED_ON)
        folder.mkdir(exist_ok=True)
        with head.open(encoding="utf-8") as file:
            write(train((json.loads(line)["text"] for line in file), VOCABULARY), folder)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("bench-work"))
    parser.add_argument("--megabytes", type=float, default=200)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--loop", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    if given.loop:
        corpus, tokenizer, prefix, workers = given.loop
        print(json.dumps(megatron(Path(corpus), Path(tokenizer), Path(prefix), int(workers))))
        return
    tokenizer = given.tokenizer.resolve() if given.tokenizer else None
    found = measure(given.work.resolve(), given.megabytes, tokenizer, given.workers)
    described = machine()
    print(table(found))
    print(json.dumps({"machine": described, "results": found}, indent=1), flush=True)
    if given.record:
        path = record_path(described, given.results, of="data")
        path.write_text(json.dumps({"machine": described, "results": found}, indent=1) + "\n", encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
