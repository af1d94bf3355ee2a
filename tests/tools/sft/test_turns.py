"""Where a turn lies in the text, apart from tokens: what is written after it stays outside."""

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tests.tools.sft.test_every_template import TALK, TOKENIZER
from tools.sft.template import Template
from tools.sft.turns import Turns


def _turns(template: str, messages: list[dict[str, Any]]) -> list[str]:
    TOKENIZER.chat_template = template
    found = Turns(Template(TOKENIZER), messages, None)
    located = found.locate([number for number, said in enumerate(messages) if said["role"] == "assistant"])
    return [located.text[start:end] for start, end in located.spans]


BODY = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>\n' }}{% endfor %}"
PROMPT = "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"


@pytest.mark.parametrize("after", ["", "<|stop|>", "\n\n", "<|stop|>\n"])
def test_a_turn_ends_before_what_follows_the_conversation(after: str) -> None:
    template = BODY + "{% if not add_generation_prompt %}{{ '" + after.replace("\n", "\\n") + "' }}{% endif %}" + PROMPT
    assert _turns(template, TALK)[0] == "Hello there.<|end|>"
    assert _turns(template, TALK[:2])[0] == "Hello there.<|end|>"


def test_the_last_of_several_end_tokens_ends_a_turn() -> None:
    assert _turns(BODY.replace("<|end|>", "<|end|>\n<|close|>") + PROMPT, TALK)[0] == "Hello there.<|end|>\n<|close|>"


def test_a_tokenizer_without_special_tokens_finds_words() -> None:
    plain = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER.backend_tokenizer, eos_token="a")
    plain.chat_template = BODY
    assert Template(plain).closing(" [over]\nUSER: .", " [over]\n", called=False, special=False) == len(" [over]")
    assert Template(plain).closing("\nUSER: .", "\n", called=False, special=False) is None
