"""Assistant masks against the messages, for templates with and without generation marks."""

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tools.sft.conversations import Conversation
from tools.sft.preview import decoded
from tools.sft.spans import Renderer

TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "  what is it?\n"},
    {"role": "assistant", "content": "it is  \U0001f600"},
    {"role": "user", "content": "\u00e9"},
    {"role": "assistant", "content": "  def hello(): \n"},
]


def _said(directory: Path, messages: list[dict[str, str]]) -> list[str]:
    """The decoded stretches of tokens that carry a loss."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokens = Renderer(tokenizer).tokens(Conversation(messages=messages))
    expected = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(tokens.ids) == expected, "the ids are those of the rendered conversation"
    return [text for loss, text in decoded(tokenizer, tokens) if loss]


@pytest.mark.parametrize("trims", [True, False])
@pytest.mark.parametrize("template", ["marked", "chatml"])
def test_the_assistants_words_and_the_end_of_its_turns(
    tokenizers: Callable[..., Path], template: str, trims: bool
) -> None:
    expected = ["it is  \U0001f600<|im_end|>", "  def hello(): \n<|im_end|>"]
    assert _said(tokenizers(template, trims=trims), TALK) == expected


def test_the_trained_tokenizers_template(tokenizers: Callable[..., Path]) -> None:
    """A turn of an assistant that comes first, and the last word left to the user."""
    talk = [{"role": "assistant", "content": "hello"}, {"role": "user", "content": "what"}]
    for template in ("marked", "chatml"):
        assert _said(tokenizers(template), talk) == ["hello<|im_end|>"]


def test_earlier_turns_may_be_rendered_otherwise_once_they_are_past(tokenizers: Callable[..., Path]) -> None:
    said = _said(tokenizers("thinking"), TALK)
    assert said == ["it is  \U0001f600<|im_end|>", "<think>\n\n</think>\n\n  def hello(): \n<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("backwards", r"message 2: the model's prompt before it ends with .*, the conversation has .* there"),
        ("shouting", "message 2: the chat template rewrites it or leaves it out"),
    ],
)
def test_a_template_without_a_sure_answer_is_refused(
    tokenizers: Callable[..., Path], template: str, problem: str
) -> None:
    renderer = Renderer(AutoTokenizer.from_pretrained(tokenizers(template)))
    with pytest.raises(ValueError, match=problem):
        renderer.tokens(Conversation(messages=TALK))


def test_what_the_template_refuses_is_said(tokenizers: Callable[..., Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizers("chatml"))
    tokenizer.chat_template = "{{ raise_exception('no system message, please') }}"
    with pytest.raises(ValueError, match="refuses these messages: no system message, please"):
        Renderer(tokenizer).tokens(Conversation(messages=TALK))


@pytest.mark.parametrize("template", ["marked", "chatml"])
def test_tools_are_rendered_or_named(tokenizers: Callable[..., Path], template: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizers(template))
    talk = Conversation(messages=TALK, tools=[{"type": "function", "function": {"name": "weather"}}])
    assert Renderer(tokenizer).tokens(talk).notes == (
        "the chat template does not render 'tools', so the model does not see them",
    )
    tokenizer.chat_template = "{% for t in tools %}{{ t.function.name }}\n{% endfor %}" + tokenizer.chat_template
    tokens = Renderer(tokenizer).tokens(talk)
    assert tokenizer.decode(tokens.ids).startswith("weather\n")
    assert not tokens.notes
