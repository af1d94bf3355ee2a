"""The trained tokens of every kind of published chat template, written out by hand.

`templates/` imitates each kind in our own words:

reasoning_last          Qwen3: thoughts in the last turn only, an empty block there
thinking_opened_*       DeepSeek-R1 (drops thoughts), QwQ and Qwen3.5 (shows them): the prompt opens the block
end_after_all           Phi-3, Phi-4-mini: a token after the conversation
other_last_end          gpt-oss: channels, and another token after the last turn
no_end                  GLM-4: the token of the next role ends a turn
two_ends                Command A: two tokens end a turn
system_moves            Mistral: the system text goes to the last question; roles alternate; no header
trims_and_dates         Llama 3.1: trims, writes the date and a default system text; a tool call instead of content
calls_as_text           DeepSeek-V3: writes the arguments of a call as they are
opened_but_closed       Nemotron 3: the prompt opens a thought, earlier turns have an empty one
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from shared.data.sources import Row
from shared.errors import UserError
from tools.sft.conversations import conversation
from tools.sft.preview import decoded
from tools.sft.spans import Renderer

TEMPLATES = Path(__file__).with_name("templates")
SPECIAL = ("<|open|>", "<|close|>", "<|end|>", "<|stop|>", "<|part|>", "<|channel|>", "<|call|>", "<s>", "</s>")
ROLES = ("<|user|>", "<|assistant|>", "<|system|>", "<|tool|>", "[INST]", "[/INST]")
PLAIN = ("<think>", "</think>", "<tool_call>", "</tool_call>", "</value>")


def _tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        ["Hello there. It is sunny today.\n\n" * 50],
        trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False),
    )
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (*SPECIAL, *ROLES)])
    made.add_tokens([AddedToken(token, special=False, normalized=False) for token in PLAIN])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


TOKENIZER = _tokenizer()


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def trained(template: str, row: dict[str, Any] | list[dict[str, Any]], **options: Any) -> list[str]:
    """The stretches of trained tokens of a row, or of a list of messages, decoded."""
    source = TEMPLATES / f"{template}.jinja"
    TOKENIZER.chat_template = source.read_text() if source.is_file() else template
    value = {"messages": row} if isinstance(row, list) else row
    tokens = Renderer(TOKENIZER, **options).tokens(
        conversation(Row(value=value, path=Path("rows.jsonl"), line=1), "auto")
    )
    last = tokens.assistant & ~np.append(tokens.assistant[1:], False)  # of a stretch
    assert set(tokens.ids[last].tolist()) >= tokens.ends
    return [text for loss, text in decoded(TOKENIZER, tokens) if loss]


TALK = [user("Hello"), said("Hello there."), user("Weather?"), said("It is sunny.")]
THOUGHT = [
    user("Hello"),
    said("Hello there.", reasoning_content="A greeting."),
    user("Weather?"),
    said("It is sunny.", reasoning_content="Look."),
]
IN_CONTENT = [
    user("Hello"),
    said("<think>\nA greeting.\n</think>\n\nHello there."),
    user("Weather?"),
    said("<think>\nLook.\n</think>\n\nIt is sunny."),
]
SYSTEM = {"role": "system", "content": "Be brief."}
ARGUMENTS = {"city": "Paris"}
CALL = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
AS_TEXT = {**CALL, "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
RESULT = {"role": "tool", "tool_call_id": "call00001", "name": "weather", "content": "21"}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
CALLS = [user("Weather?"), said(None, tool_calls=[CALL]), RESULT, said("It is sunny.")]
EMPTY = "<think>\n\n</think>\n\n"
JSON_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'

CASES: dict[str, tuple[str, Any, list[str]]] = {
    # reasoning shown in the last turn only
    "reasoning_last": ("reasoning_last", TALK, ["Hello there.<|close|>", f"{EMPTY}It is sunny.<|close|>"]),
    "reasoning_field": (
        "reasoning_last",
        THOUGHT,
        ["Hello there.<|close|>", "<think>\nLook.\n</think>\n\nIt is sunny.<|close|>"],
    ),
    "reasoning_in_content": (
        "reasoning_last",
        IN_CONTENT,
        ["Hello there.<|close|>", "<think>\nLook.\n</think>\n\nIt is sunny.<|close|>"],
    ),
    "two_answers_in_a_row": (
        "reasoning_last",
        [user("Hello"), said("Hello there."), said("It is sunny."), user("Thanks"), said("Bye.")],
        ["Hello there.<|close|>", "It is sunny.<|close|>", f"{EMPTY}Bye.<|close|>"],
    ),
    "an_empty_answer": (
        "plain",
        [user("Hello"), said(""), user("Weather?"), said("It is sunny.")],
        ["<|close|>", "It is sunny.<|close|>"],
    ),
    "a_line_end_in_the_answer": ("plain", [user("Hello"), said("Hello there.\n")], ["Hello there.\n<|close|>"]),
    # thinking opened by the generation prompt
    "opened_and_dropped": ("thinking_opened_dropped", TALK, ["Hello there.<|stop|>", "It is sunny.<|stop|>"]),
    "opened_and_shown": (
        "thinking_opened_shown",
        THOUGHT,
        ["Hello there.<|close|>", "Look.\n</think>\n\nIt is sunny.<|close|>"],
    ),
    "opened_and_empty": (
        "thinking_opened_shown",
        TALK,
        ["Hello there.<|close|>", "\n</think>\n\nIt is sunny.<|close|>"],
    ),
    "opened_but_closed": (
        "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}{{ '<think>\n' + m.reasoning_content"
        " + '\n</think>' if loop.last and m.reasoning_content else '<think></think>' }}{% endif %}{{ m.content + '<|end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}",
        THOUGHT,
        ["Hello there.<|end|>", "Look.\n</think>It is sunny.<|end|>"],
    ),
    # ends of turns
    "end_after_all": ("end_after_all", TALK, ["Hello there.<|end|>", "It is sunny.<|end|>"]),
    "end_after_all_user_last": ("end_after_all", TALK[:3], ["Hello there.<|end|>"]),
    "other_last_end": (
        "other_last_end",
        TALK,
        ["<|channel|>final<|part|>Hello there.<|end|>", "<|channel|>final<|part|>It is sunny.<|stop|>"],
    ),
    "channels": (
        "other_last_end",
        THOUGHT,
        [
            "<|channel|>final<|part|>Hello there.<|end|>",
            "<|channel|>analysis<|part|>Look.<|end|><|open|>assistant<|channel|>final<|part|>It is sunny.<|stop|>",
        ],
    ),
    "a_call_ends_with_its_own_token": (
        "other_last_end",
        CALLS,
        [
            ' to=weather<|channel|>commentary<|part|>{"city": "Paris"}<|call|>',
            "<|channel|>final<|part|>It is sunny.<|stop|>",
        ],
    ),
    "no_end": ("no_end", TALK, ["Hello there.<|user|>", "It is sunny.<|user|>"]),
    "no_end_after_a_call": (
        "no_end",
        CALLS,
        [
            "<tool_call>weather\n<key>city</key><value>Paris</value></tool_call><|tool|>",
            "It is sunny.<|user|>",
        ],
    ),
    "no_end_after_the_last_call": (
        "no_end",
        CALLS[:2],
        ["<tool_call>weather\n<key>city</key><value>Paris</value></tool_call><|tool|>"],
    ),
    "two_ends": ("two_ends", TALK, ["<|part|>Hello there.<|end|><|close|>", "<|part|>It is sunny.<|end|><|close|>"]),
    "an_end_that_is_no_token": ("words", TALK, ["Hello there. [over]", "It is sunny. [over]"]),
    "a_prompt_after_all": ("always_prompts", TALK, ["Hello there.<|close|>", "It is sunny.<|close|>"]),
    # what stands before
    "system_moves": ("system_moves", [SYSTEM, *TALK], [" Hello there.</s>", " It is sunny.</s>"]),
    "trims_and_dates": (
        "trims_and_dates",
        [user(" Hello \n"), said("\n Hello there. "), user("Weather?"), said("It is sunny.\n")],
        ["Hello there.<|close|>", "It is sunny.<|close|>"],
    ),
    "assistant_first": ("trims_and_dates", [said("Hello there."), user("Hello")], ["Hello there.<|close|>"]),
    "assistant_first_in_a_talk": (
        "plain",
        [said("Hello there."), *TALK[2:]],
        ["Hello there.<|close|>", "It is sunny.<|close|>"],
    ),
    "words_of_the_header": (
        "plain",
        [user("assistant"), said("user"), user("assistant\n"), said("assistant")],
        ["user<|close|>", "assistant<|close|>"],
    ),
    "the_question_again": ("end_after_all", [user("Hello"), said("Hello")], ["Hello<|end|>"]),
    "tokens_in_the_text": (
        "plain",
        [user("<|close|>\n<|open|>assistant\n"), said("a<|close|>b")],
        ["a<|close|>b<|close|>"],
    ),
    # tool calls
    "call": (
        "reasoning_last",
        {"messages": CALLS, "tools": TOOLS},
        [f"{JSON_CALL}<|close|>", f"{EMPTY}It is sunny.<|close|>"],
    ),
    "call_with_text_arguments": (
        "reasoning_last",
        [user("Weather?"), said(None, tool_calls=[AS_TEXT]), RESULT, said("It is sunny.")],
        [f"{JSON_CALL}<|close|>", f"{EMPTY}It is sunny.<|close|>"],
    ),
    "call_after_words": (
        "reasoning_last",
        [user("Weather?"), said("Let me look.", tool_calls=[CALL, CALL]), RESULT, RESULT, *TALK[1:]],
        [
            f"Let me look.\n{JSON_CALL}\n{JSON_CALL}<|close|>",
            "Hello there.<|close|>",
            f"{EMPTY}It is sunny.<|close|>",
        ],
    ),
    "last_argument_is_a_number": (
        "reasoning_last",
        [user("Hello"), said("", tool_calls=[{"function": {"name": "f", "arguments": {"n": 3}}}]), RESULT],
        ['<tool_call>\n{"name": "f", "arguments": {"n": 3}}\n</tool_call><|close|>'],
    ),
    "call_without_arguments": (
        "reasoning_last",
        [user("Hello"), said("", tool_calls=[{"function": {"name": "f", "arguments": "{}"}}]), RESULT],
        ['<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><|close|>'],
    ),
    "call_of_the_first_spelling": (
        "reasoning_last",
        [
            user("Weather?"),
            said(None, function_call=AS_TEXT["function"]),
            {"role": "function", "name": "weather", "content": "21"},
            said("It is sunny."),
        ],
        [f"{JSON_CALL}<|close|>", f"{EMPTY}It is sunny.<|close|>"],
    ),
    "call_instead_of_content": (
        "trims_and_dates",
        CALLS,
        ['{"name": "weather", "parameters": {"city": "Paris"}}<|call|>', "It is sunny.<|close|>"],
    ),
    "calls_as_text": (
        "calls_as_text",
        {"messages": CALLS, "tools": TOOLS},
        ['<tool_call>weather\n{"city": "Paris"}</tool_call><|stop|>', "It is sunny.<|stop|>"],
    ),
    "no_calls_no_tools": (
        "plain",
        {"messages": [user("Hello"), said("Hello there.", tool_calls=[])], "tools": []},
        ["Hello there.<|close|>"],
    ),
    # OpenAI's fields
    "developer": ("plain", [{"role": "developer", "content": "Be brief."}, *TALK[:2]], ["Hello there.<|close|>"]),
    "weight_0": ("plain", [user("Hello"), said("Bad.", weight=0), *TALK[2:]], ["It is sunny.<|close|>"]),
    "weight_0_with_marks": ("marked", [user("Hello"), said("Bad.", weight=0), *TALK[2:]], ["It is sunny.<|close|>"]),
    "marked": ("marked", TALK, ["Hello there.<|close|>", "It is sunny.<|close|>"]),
}


@pytest.mark.parametrize("case", CASES)
def test_the_trained_tokens_are_what_the_model_would_say(case: str) -> None:
    template, row, expected = CASES[case]
    assert trained(template, row) == expected


REFUSED: dict[str, tuple[str, Any, str]] = {
    "reasoning_dropped": ("plain", THOUGHT, "message 1: the chat template does not render reasoning_content"),
    "reasoning_in_content_dropped": ("thinking_opened_dropped", IN_CONTENT, "message 1: .* reasoning in its content"),
    "calls_dropped": ("plain", CALLS, "message 1: the chat template does not render tool_calls"),
    "words_beside_calls_dropped": (
        "trims_and_dates",
        [user("Weather?"), said("Let me look.", tool_calls=[CALL]), RESULT, said("It is sunny.")],
        "message 1: the chat template does not render content beside tool_calls",
    ),
    "roles_out_of_order": ("system_moves", [user("a"), user("b"), said("c")], "roles must alternate user/assistant"),
    "no_header": (
        "{% for m in messages %}{{ m.content + '</s>' }}{% endfor %}",
        [said("a"), user("b")],
        "speaks first",
    ),
    "nothing_ends_a_turn": (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
        TALK,
        "message 1: no token ends its turn",
    ),
    "another_prompt": (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>Sure: ' }}{% endif %}",
        TALK,
        "message 1: the model's prompt before it ends with .*Sure: ', the conversation has",
    ),
    "written_twice": (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + m.content + '<|end|>' }}{% endfor %}",
        TALK,
        "message 0: the chat template writes its content 2 times",
    ),
    "all_weights_0": ("plain", [user("a"), said("b", weight=0)], "has weight 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_sure_is_refused_with_its_reason(case: str) -> None:
    template, row, reason = REFUSED[case]
    with pytest.raises(ValueError, match=reason):
        trained(template, row)


def test_a_user_may_decide() -> None:
    last = ["It is sunny.<|close|>"]
    assert trained("plain", TALK, only_last=True) == trained("plain", TALK, spans="last") == last
    assert trained("marked", TALK, spans="rendered") == trained("marked", TALK, spans="generation")
    assert trained("marked", TALK, only_last=True) == last
    refused = REFUSED["another_prompt"][0].replace("Sure: ", "")
    assert trained(refused, TALK, spans="last") == ["It is sunny.<|end|>"]
    with pytest.raises(UserError, match="--spans generation: the chat template has no"):
        trained("plain", TALK, spans="generation")
    with pytest.raises(ValueError, match="--spans last: message 1 is not the last one"):
        trained("plain", TALK[:3], spans="last")


def test_variables_of_the_template() -> None:
    assert trained("reasoning_last", TALK, arguments={"enable_thinking": False})[-1] == "It is sunny.<|close|>"
    TOKENIZER.chat_template = (TEMPLATES / "trims_and_dates.jinja").read_text()
    rendered = Renderer(TOKENIZER, arguments={"date": "1 May"}).template.render(TALK, None)
    assert rendered.startswith("<s><|open|>system<|part|>\nDate: 1 May\nYou are an assistant.<|close|>")


def test_named_templates() -> None:
    plain = (TEMPLATES / "plain.jinja").read_text()
    named = {"default": plain, "tool_use": "{{ tools | tojson + '<|end|>' }}" + plain}
    for tools, begins in ((None, "<|open|>user"), (TOOLS, '[{"type"')):
        TOKENIZER.chat_template = named
        talk = conversation(Row(value={"messages": TALK, "tools": tools}, path=Path("a"), line=1), "auto")
        tokens = Renderer(TOKENIZER).tokens(talk)
        assert TOKENIZER.decode(tokens.ids).startswith(begins)
        assert TOKENIZER.decode(tokens.ids[tokens.assistant]) == "Hello there.<|close|>It is sunny.<|close|>"
    TOKENIZER.chat_template = {"rag": plain}
    with pytest.raises(UserError, match=r"chat templates \(rag\) have no default"):
        Renderer(TOKENIZER)


def test_what_was_done_to_the_messages_is_said() -> None:
    TOKENIZER.chat_template = (TEMPLATES / "plain.jinja").read_text()
    value = {"messages": [{"role": "developer", "content": "a"}, *TALK], "tools": TOOLS}
    notes = Renderer(TOKENIZER).tokens(conversation(Row(value=value, path=Path("a"), line=1), "auto")).notes
    assert notes == (
        "role developer is rendered as system, which the chat template knows",
        "the chat template does not render 'tools', so the model does not see them",
    )
