"""Tags of thinking in a stream."""

from __future__ import annotations

import itertools

import pytest

from tools.infer.thinking import parts


def joined(pieces: list[str], *, thinking: bool = False) -> dict[str, str]:
    texts = {"tag": "", "thinking": "", "answer": ""}
    for kind, text in parts(pieces, thinking=thinking):
        texts[kind] += text
    return texts


REPLY = "\n<think>\nsum < it</think>\n\n4 </think> <think>"


def test_however_a_reply_is_cut_its_parts_are_the_same():
    wanted = {"tag": "\n<think></think>\n\n", "thinking": "\nsum < it", "answer": "4 </think> <think>"}
    assert joined([REPLY]) == joined(list(REPLY)) == wanted
    for size in range(2, 12):
        pieces = ["".join(group) for group in itertools.batched(REPLY, size)]
        assert joined(pieces) == wanted
        assert "".join(text for _, text in parts(pieces, thinking=False)) == REPLY


def test_an_open_tag_in_the_prompt():
    assert joined(["su", "m</thi", "nk>4"], thinking=True) == {"tag": "</think>", "thinking": "sum", "answer": "4"}
    assert joined(["cut off </thi"], thinking=True)["thinking"] == "cut off </thi"


@pytest.mark.parametrize("text", ["4", "", " 4", "<thin", "<b>4</b>", "  "])
def test_an_answer_without_thinking(text):
    assert joined(list(text)) == {"tag": "", "thinking": "", "answer": text}


def test_an_answer_comes_at_once():
    came = []

    def pieces():
        for text in ("4", "2"):
            came.append(text)
            yield text

    assert next(parts(pieces(), thinking=False)).text == "4"
    assert came == ["4"]
