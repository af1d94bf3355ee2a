"""Words after `--` of `infer serve`."""

from __future__ import annotations

import pytest

from shared.errors import UserError
from tools.infer.engines.vllm_flags import parse


def test_flags_are_those_of_the_engine_and_those_of_the_server():
    words = [
        "--tool-call-parser",
        "hermes",
        "--enable-auto-tool-choice",
        "--no-enable-prefix-caching",
        "--max-logprobs=7",
        "--reasoning-parser",
        "qwen3",
    ]
    flags = parse([*words, "--hf-overrides.rope_theta", "5"])
    assert flags.engine == {
        "enable_prefix_caching": False,
        "max_logprobs": 7,
        "hf_overrides": {"rope_theta": 5},
        "reasoning_parser": "qwen3",
    }
    assert flags.frontend == {"tool_call_parser": "hermes", "enable_auto_tool_choice": True}
    options = flags.options("--model", "m", "--port", "1")
    assert (options.model, options.port, options.max_logprobs) == ("m", 1, 7)
    assert options.tool_call_parser == "hermes"
    assert options.structured_outputs_config.reasoning_parser == "qwen3"
    assert parse([]).options("--model", "m").structured_outputs_config.reasoning_parser == ""


def test_no_words_set_nothing():
    flags = parse([])
    assert (flags.engine, flags.frontend) == ({}, {})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tool-cal-parser", "hermes"], "vLLM has no flag --tool-cal-parser; did you mean --tool-call-parser"),
        (["--max-logprobs", "many"], "argument --max-logprobs: invalid"),
        (["--max-logprobs"], "argument --max-logprobs: expected one argument"),
        (["--max-logpro", "3"], "vLLM has no flag --max-logpro; did you mean --max-logprobs"),
        (["--model", "elsewhere"], "--model is infer's --source"),
        (["elsewhere"], "'elsewhere' follows no flag; the model is --source"),
        (["--dtype", "float16"], "--dtype is infer's --precision"),
        (["--api-key", "secret"], "--api-key is infer's --api-key-file"),
        (["--uds", "/tmp/socket"], "--uds is for other servers"),
    ],
)
def test_what_is_not_taken_is_one_line(words, message):
    with pytest.raises(UserError, match=message):
        parse(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--enable-auto-tool-choice"], "--enable-auto-tool-choice requires --tool-call-parser"),
        (["--enable-auto-tool-choice", "--tool-call-parser", "no-such"], "invalid tool call parser: no-such"),
        (["--reasoning-parser", "no-such"], "invalid reasoning parser: no-such"),
    ],
)
def test_values_that_exclude_each_other_are_one_line(words, message):
    with pytest.raises(UserError, match=message):
        parse(words).options("--model", "m")
