"""Internals of transformers that sft relies on: docs/upstream.md."""

from __future__ import annotations

from transformers.utils import chat_template_utils

from tests.upstream import relies_on
from tools.sft.spans import GENERATION_TAG

MARKED = "{% for m in messages %}<{{ m.role }}>{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"


def test_a_template_marks_what_the_assistant_says() -> None:
    rendered, marks = chat_template_utils.render_jinja_template(
        conversations=[[{"role": "assistant", "content": "yes"}]],
        tools=None,
        chat_template=MARKED,
        return_assistant_tokens_mask=True,
        eos_token="</s>",
    )
    assert (rendered, [list(spans) for spans in marks]) == (["<assistant>yes"], [[(11, 14)]]), "tools/sft/spans.py"


def test_the_mark_is_found_by_this_pattern() -> None:
    relies_on(
        "tools/sft/spans.py",
        chat_template_utils.render_jinja_template,
        f"re.search(r'{GENERATION_TAG.pattern}', chat_template)".replace(r"\{%", r"\{\%").replace(r"%\}", r"\%\}"),
    )
