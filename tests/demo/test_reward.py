"""The verifiable reward: real bodies count, reward hacks do not."""

import pytest
from reward import header_of, parses, share_that_parses

HEADER = 'def area(width, height=2):\n    """Width times height."""'
PLAIN = f"Complete this function.\n\n{HEADER}"


@pytest.mark.parametrize("prompt", [PLAIN, f"<|user|>{PLAIN}<|endoftext|><|assistant|>"])
@pytest.mark.parametrize(
    "reply",
    [
        "    return width * height",
        "    if width:\n        return width * height\n    return 0",
        "    # why\n    total = width\n    total *= height\n    return total\n",
    ],
)
def test_bodies_count(prompt: str, reply: str) -> None:
    assert parses([prompt], [reply]) == [1.0]


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "\n\n",
        "    pass",
        "    ...",
        "    # a comment",
        '    "another text"',
        "    return",
        "    return None",
        "    width",
        "    return width",  # one name is not a body
        "    return left * right",  # none of the parameters
        "    print(width, height)\n    print(width, height)",  # the same again
        "    return width * height\nprint(width, height)",  # goes on after the function
        "    return width * height\ndef other(): pass",
        "return width * height",  # not indented
        "    return width * (height",
        "    return width * height\n  return",
        "    return width height",
        "    \x00return width * height",
        "    return " + "(" * 5000 + "width, height" + ")" * 5000,
    ],
)
def test_anything_else_does_not(reply: str) -> None:
    assert parses([PLAIN], [reply]) == [0.0]


def test_a_function_without_parameters_needs_none() -> None:
    header = 'def now():\n    """The time."""'
    assert parses([header], ["    return time.monotonic()"]) == [1.0]


def test_each_reply_has_its_own_reward_and_columns_are_let_pass() -> None:
    assert parses([PLAIN] * 2, ["    return width * height", "x"], name=["a", "b"]) == [1.0, 0.0]


def test_a_prompt_without_a_function_is_an_error() -> None:
    assert header_of(PLAIN) == HEADER
    with pytest.raises(ValueError, match="no function to complete"):
        parses(["What is the time?"], [""])


def test_the_metric_is_the_mean_over_the_replies_to_a_request() -> None:
    doc = {"messages": [{"role": "user", "content": PLAIN}]}
    assert share_that_parses(doc, [["    return width * height", "    return ("]]) == {
        "parses": 0.5,
        "characters": (len("return width * height") + len("return (")) / 2,
    }
