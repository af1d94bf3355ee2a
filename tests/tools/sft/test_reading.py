"""Which files are read, and options that exclude each other."""

from collections.abc import Callable
from pathlib import Path

import pytest

from shared.errors import UserError
from tools.sft.options import ReadingOptions
from tools.sft.reading import Reader, row_files


def test_a_file_without_rows_is_refused_and_left_out_of_a_folder(tmp_path: Path) -> None:
    for name in ("notes.txt", "a.json", "b.jsonl.gz", "c.arrow"):
        (tmp_path / name).touch()
    found = row_files((tmp_path,), split=None, flag="--source")
    assert [file.name for file in found] == ["a.json", "b.jsonl.gz", "c.arrow"]
    with pytest.raises(UserError, match=r"--source .*notes\.txt: conversations are JSON lines"):
        row_files((tmp_path / "notes.txt",), split=None, flag="--source")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (ReadingOptions(format="alpaca", messages_column="chat"), "--format alpaca and --messages-column both say"),
        (ReadingOptions(template_argument=("enable_thinkng=false",)), "the chat template has no such variable"),
        (ReadingOptions(spans="generation"), "the chat template has no {% generation %} blocks"),
    ],
)
def test_options_without_effect_are_refused(
    tokenizers: Callable[..., Path], options: ReadingOptions, problem: str
) -> None:
    with pytest.raises(UserError, match=problem):
        Reader(tokenizers("chatml"), options)
