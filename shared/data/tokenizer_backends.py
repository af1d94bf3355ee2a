"""What turns texts into ids: `tokenizers`, the reference, or `fastokens`, many times faster, where its ids are the same.

The same ids are not believed: the first 10 MB of the user's own text are encoded by both, and while the rest is encoded, one
text in `SAMPLED` again. `verdict` falls back to the reference and says why.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
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
        self._tokenizer = _reference_tokenizer(_plain(tokenizer_json))

    def encode(self, texts: list[str]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        each = [np.array(e.ids, np.uint32) for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        ids = np.concatenate(each) if each else np.zeros(0, np.uint32)
        return ids, np.array([len(one) for one in each], np.int64)


class Fast:
    """fastokens, on one thread: the work is parallel over processes."""

    def __init__(self, tokenizer_json: str) -> None:
        os.environ["FASTOKENS_BPE_THREADS"] = os.environ["RAYON_NUM_THREADS"] = "1"
        self._tokenizer = _fast_tokenizer(_plain(tokenizer_json))

    def encode(self, texts: list[str]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        ids, offsets = self._tokenizer.encode_batch_flat(texts, add_special_tokens=False, split_special_tokens=True)
        ends = np.frombuffer(offsets, np.int64)  # uint64 by its documentation, and far below 2^63
        return np.frombuffer(ids, np.uint32), ends[1:] - ends[:-1]


def open_backend(name: str, tokenizer_json: str) -> Backend:
    """The back end of this name. To open the same again takes no time."""
    return Fast(tokenizer_json) if name == FAST else Reference(tokenizer_json)


def warm_up(tokenizer_json: Path, names: Sequence[str]) -> None:
    """Open these back ends of a tokenizer.json before it is known what transformers makes of it: mostly the same, and then
    the second opening takes no time. What goes wrong is told by that one.
    """
    with _broad_errors():
        for name in names:
            open_backend(name, tokenizer_json.read_text(encoding="utf-8"))


@lru_cache(maxsize=2)
def _plain(tokenizer_json: str) -> str:
    """A tokenizer.json without what is not asked of a back end."""
    return json.dumps(json.loads(tokenizer_json) | {"truncation": None, "padding": None, "post_processor": None})


@lru_cache(maxsize=1)
def _reference_tokenizer(content: str) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(content)
    tokenizer.encode_special_tokens = True
    return tokenizer


@lru_cache(maxsize=1)
def _fast_tokenizer(content: str) -> Any:
    import fastokens

    return fastokens.Tokenizer.from_json_str(json.dumps(_in_one_pattern(json.loads(content))))


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


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Some texts by both back ends."""

    size: int = 0
    """Bytes of UTF-8."""
    problem: str | None = None
    """Why fastokens cannot be used; None if the ids are the same."""


def choice_without_comparing(wanted: str, source_bytes: int) -> Choice | None:
    """The back end where nothing need be compared; None where it depends on the text.

    Args:
        wanted: auto or tokenizers.
        source_bytes: of all sources.
    """
    if wanted == REFERENCE:
        return _reference("--tokenizer-backend")
    if source_bytes < WORTH_IT:
        return _reference(f"the sources have less than {WORTH_IT >> 20} MiB, which is too little for {FAST} to pay")
    return None


def compare(tokenizer_json: str, texts: list[str]) -> Compared:
    """The ids of these texts by both back ends."""
    with _broad_errors() as problem:
        place = first_difference(Fast(tokenizer_json), Reference(tokenizer_json), texts)
        if place is not None:
            return Compared(problem=f"{FAST} gives other ids for {_shown(texts[place])}")
        return Compared(size=sum(len(text.encode()) for text in texts))
    return Compared(problem=f"{FAST} cannot run this tokenizer ({problem[0]})")


def verdict(compared: Iterable[Compared]) -> Choice:
    """The back end, by the `beginning` of the text: fastokens if every id is the same."""
    size = 0
    for each in compared:
        if each.problem is not None:
            return _reference(each.problem)
        size += each.size
    if not size:
        return _reference("the sources have no text")
    version = importlib.metadata.version(FAST)
    reason = f"those of {REFERENCE} {importlib.metadata.version(REFERENCE)} on the first {size} bytes of text"
    return Choice(name=FAST, version=version, reason=reason, compared_bytes=size)


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


def beginning(texts: Iterable[str]) -> Iterator[list[str]]:
    """The first `COMPARED_BYTES` of the user's texts, which come in pieces of a bounded size, about a megabyte at a time."""
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


def _shown(text: str) -> str:
    return repr(text[:60] + ("..." if len(text) > 60 else ""))
