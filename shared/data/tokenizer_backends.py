"""What turns texts into ids: `tokenizers`, the reference, or `fastokens`, many times faster, where its ids are the same.

The same ids are not believed: the first 10 MB of the user's own text are encoded by both, and while the rest is encoded, one
text in `SAMPLED` again. `choose` falls back to the reference and says why.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

REFERENCE, FAST = "tokenizers", "fastokens"
COMPARED_BYTES = 10_000_000
WORTH_IT = 32 << 20  # bytes of sources: of fewer, encoding the first 10 MB twice takes longer than it saves
SAMPLED = 4096
# Digits one by one, then GPT-2's pattern, as one pattern (SmolLM, StarCoder, Granite): fastokens is four times faster on it.
_DIGITS_THEN_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"


class Backend(Protocol):
    """Texts to ids. Special tokens spelt out in a text are plain text, and nothing is added around it."""

    def encode(self, texts: list[str]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """The ids of all texts, concatenated, and the number of ids of each."""


class Reference:
    """Hugging Face's `tokenizers`."""

    def __init__(self, tokenizer_json: str) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_str(tokenizer_json)
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, texts: list[str]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        each = [np.array(e.ids, np.uint32) for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        ids = np.concatenate(each) if each else np.zeros(0, np.uint32)
        return ids, np.array([len(one) for one in each], np.int64)


class Fast:
    """fastokens, by default on one thread: the work is parallel over processes."""

    def __init__(self, tokenizer_json: str, threads: int = 1) -> None:
        # The second is also what `tokenizers` reads when it encodes for the first time in a process.
        os.environ["FASTOKENS_BPE_THREADS"] = os.environ["RAYON_NUM_THREADS"] = str(threads)
        import fastokens

        content = json.loads(tokenizer_json)
        content |= {"truncation": None, "padding": None, "post_processor": None}
        self._tokenizer = fastokens.Tokenizer.from_json_str(json.dumps(_in_one_pattern(content)))

    def encode(self, texts: list[str]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        ids, offsets = self._tokenizer.encode_batch_flat(texts, add_special_tokens=False, split_special_tokens=True)
        ends = np.frombuffer(offsets, np.int64)  # uint64 by its documentation, and far below 2^63
        return np.frombuffer(ids, np.uint32), ends[1:] - ends[:-1]


def open_backend(name: str, tokenizer_json: str) -> Backend:
    """The back end of this name."""
    return Fast(tokenizer_json) if name == FAST else Reference(tokenizer_json)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The back end of a run."""

    name: str
    version: str
    reason: str
    compared_bytes: int
    """Bytes of text that both encoded, with the same ids."""

    def __str__(self) -> str:
        return f"ids by {self.name} {self.version}: {self.reason}"


def choose(wanted: str, tokenizer_json: str, texts: Iterable[str], *, source_bytes: int, workers: int) -> Choice:
    """The back end to use: fastokens if `wanted` is "auto", there is much text, and the ids of its beginning are the same.

    Args:
        wanted: auto or tokenizers.
        tokenizer_json: the content of tokenizer.json.
        texts: the user's texts, in pieces of a bounded size.
        source_bytes: of all sources.
        workers: cores to compare on.
    """
    if wanted == REFERENCE:
        return _reference("--tokenizer-backend")
    if source_bytes < WORTH_IT:
        return _reference(f"the sources have less than {WORTH_IT >> 20} MiB, which is too little for {FAST} to pay")
    compared = 0
    with _broad_errors() as problem, _threads(workers):
        fast, reference = Fast(tokenizer_json, workers), Reference(tokenizer_json)
        for batch in _batches(texts):
            if (place := first_difference(fast, reference, batch)) is not None:
                return _reference(f"{FAST} gives other ids for {_shown(batch[place])}")
            compared += sum(len(text.encode()) for text in batch)
    if problem:
        return _reference(f"{FAST} cannot run this tokenizer ({problem[0]})")
    version = importlib.metadata.version(FAST)
    reason = f"those of {REFERENCE} {importlib.metadata.version(REFERENCE)} on the first {compared} bytes of text"
    return Choice(name=FAST, version=version, reason=reason, compared_bytes=compared)


def first_difference(fast: Backend, reference: Backend, texts: list[str]) -> int | None:
    """Index of the first text to which the two give different ids."""
    (ids, lengths), (right, right_lengths) = fast.encode(texts), reference.encode(texts)
    if np.array_equal(lengths, right_lengths) and np.array_equal(ids, right):
        return None
    ends, right_ends = np.cumsum(lengths), np.cumsum(right_lengths)
    for index, (length, end, right_length, right_end) in enumerate(
        zip(lengths, ends, right_lengths, right_ends, strict=True)
    ):
        if not np.array_equal(ids[end - length : end], right[right_end - right_length : right_end]):
            return index
    raise AssertionError("the ids differ, and those of no text do")


def _reference(reason: str) -> Choice:
    return Choice(name=REFERENCE, version=importlib.metadata.version(REFERENCE), reason=reason, compared_bytes=0)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """The first `COMPARED_BYTES`, about a megabyte at a time."""
    batch: list[str] = []
    size = total = 0
    for text in texts:
        batch.append(text)
        size += len(text.encode())
        if size >= 1 << 20 or total + size >= COMPARED_BYTES:
            yield batch
            total += size
            batch, size = [], 0
            if total >= COMPARED_BYTES:
                return
    if batch:
        yield batch


def _in_one_pattern(content: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer.json with the pre-tokenizer as one pattern, where it splits digits off and then words as GPT-2 does."""
    steps = (content.get("pre_tokenizer") or {}).get("pretokenizers") or []
    if (
        [step.get("type") for step in steps] == ["Digits", "ByteLevel"]
        and steps[0].get("individual_digits")
        and steps[1].get("use_regex", True)
        and not steps[1].get("add_prefix_space")
    ):
        split = {"type": "Split", "pattern": {"Regex": _DIGITS_THEN_GPT2}, "behavior": "Isolated", "invert": False}
        return content | {
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, steps[1] | {"use_regex": False}]}
        }
    return content


@contextlib.contextmanager
def _broad_errors() -> Iterator[list[str]]:
    """Keeps what a library raises, its panics included, which are no `Exception`. Errors of reading pass."""
    from shared.errors import UserError

    problem: list[str] = []
    try:
        yield problem
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit, AssertionError):
        raise
    except BaseException as error:  # noqa: BLE001 -- a panic of Rust is no Exception
        problem.append(str(error).splitlines()[0] if str(error) else type(error).__name__)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """The reference encodes on so many threads."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if count > 1 else "false"
    try:
        yield
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = before or "false"


def _shown(text: str) -> str:
    return repr(text[:60] + ("..." if len(text) > 60 else ""))
