"""Windows over text: what each token is predicted from."""

from __future__ import annotations

import pytest

from shared.data.text_windows import Document, checked_window, prefix_token, read_documents, windows_of
from shared.errors import UserError


def document(count: int) -> Document:
    return Document(file="a.txt", number=0, text="x" * count, tokens=list(range(1, count + 1)))


@pytest.mark.parametrize(
    ("count", "window", "stride"), [(1, 4, 4), (4, 4, 4), (5, 4, 4), (11, 4, 4), (11, 4, 1), (23, 8, 3)]
)
def test_every_token_is_predicted_once_from_those_before_it(count, window, stride):
    made = list(windows_of([document(count)], 0, window, stride))
    assert [token for each in made for token in each.targets] == list(range(1, count + 1))
    for number, each in enumerate(made):
        assert len(each.inputs) <= window
        # The last input precedes the last target, and so on back: inputs are consecutive, 0 is the prefix.
        assert each.inputs == list(range(each.inputs[0], each.targets[-1]))
        assert each.inputs[-len(each.targets)] == each.targets[0] - 1
        if number:
            assert len(each.targets) <= stride
            assert len(each.inputs) == window
        if number == 0:
            assert each.inputs[0] == 0
            assert len(each.targets) == min(window, count)


def test_documents_have_windows_of_their_own():
    made = list(windows_of([document(3), document(2)], 0, 8, 8))
    assert [(each.document, each.inputs, each.targets) for each in made] == [
        (0, [0, 1, 2], [1, 2, 3]),
        (1, [0, 1], [1, 2]),
    ]


def test_windows_fit_the_context():
    assert checked_window(None, None, 128) == (126, 126)
    assert checked_window(None, 7, 1_000_000) == (2048, 7)
    assert checked_window(126, None, 128) == (126, 126)
    with pytest.raises(UserError, match="--window 127: the model's context of 128 tokens takes windows up to 126"):
        checked_window(127, None, 128)
    with pytest.raises(UserError, match="--stride 9 is longer than the window of 8 tokens"):
        checked_window(8, 9, 128)


class Letters:
    """A tokenizer of one token a letter."""

    bos_token_id: int | None = None
    eos_token_id: int | None = 7

    def __call__(self, text, *, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [ord(letter) for letter in text]}


def test_documents_are_files_and_rows(tmp_path):
    (tmp_path / "book.txt").write_text("één woord")
    (tmp_path / "rows.jsonl").write_text('{"body": "a b"}\n{"body": ""}\n{"body": "c"}\n')
    found = read_documents([tmp_path / "book.txt", tmp_path / "rows.jsonl"], "body", Letters())
    assert [(each.file, each.number, each.utf8_bytes, each.words) for each in found] == [
        ("book.txt", 0, 11, 2),
        ("rows.jsonl", 0, 3, 2),
        ("rows.jsonl", 2, 1, 1),
    ]
    with pytest.raises(UserError, match="no key 'text'"):
        read_documents([tmp_path / "rows.jsonl"], "text", Letters())
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match=r"--text: empty.txt has no text"):
        read_documents([tmp_path / "empty.txt"], "text", Letters())
    (tmp_path / "other").mkdir()
    (tmp_path / "other/book.txt").write_text("x")
    with pytest.raises(UserError, match=r"two files are called book.txt"):
        read_documents([tmp_path / "book.txt", tmp_path / "other/book.txt"], "text", Letters())


def test_a_text_follows_the_bos_token_else_the_eos_token():
    tokenizer = Letters()
    assert prefix_token(tokenizer) == 7
    tokenizer.bos_token_id = 0
    assert prefix_token(tokenizer) == 0
    tokenizer.bos_token_id = tokenizer.eos_token_id = None
    with pytest.raises(UserError, match="neither a bos_token nor an eos_token"):
        prefix_token(tokenizer)
