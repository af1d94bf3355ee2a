"""vLLM's own answers of status 5xx, which tests/hostile/known.py lists, from vLLM's own code alone."""

from __future__ import annotations

import json

import pytest
from fastapi.testclient import TestClient
from openai.types.responses import ResponseFunctionToolCallOutputItem, ResponseOutputMessage, ResponseOutputRefusal
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.entrypoints.openai.responses.utils import construct_input_messages
from vllm.renderers.chat_utils import _parse_chat_message_content_mm_part
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tests.hostile.known import is_known


def test_the_server_of_vllm_alone_answers_501_for_apis_of_other_models() -> None:
    """vLLM's own application without a model of such an API: the answer that tests/hostile/known.py takes for vLLM's own."""
    app = build_app(make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", "m"]), ("generate",))
    app.state.enable_server_load_tracking = False
    answer = TestClient(app, raise_server_exceptions=False).post("/v1/systemone", json={"state": "x", "questions": {}})
    assert answer.status_code == 501
    assert is_known({"status": 501, "path": "/v1/systemone", "said": answer.text})


@pytest.mark.parametrize("content", [[], [ResponseOutputRefusal(refusal="", type="refusal")]])
def test_an_earlier_reply_without_text_is_an_error_of_vllm(content) -> None:
    earlier = ResponseOutputMessage(id="", content=content, role="assistant", status="completed", type="message")
    with pytest.raises((IndexError, AttributeError)) as caught:
        construct_input_messages(request_instructions=None, request_input=[earlier])
    assert is_known({"status": 500, "path": "/v1/responses", "said": str(caught.value)})


def test_a_tools_output_in_parts_is_an_error_of_vllm() -> None:
    part = {"type": "input_text", "text": "fox"}
    item = {"type": "function_call_output", "id": "", "call_id": None, "output": [part], "status": "completed"}
    (message,) = construct_input_messages(
        request_instructions=None,
        request_input=[ResponseFunctionToolCallOutputItem.model_validate(item | {"call_id": "c"})],
    )
    with pytest.raises(AssertionError) as caught:
        _parse_chat_message_content_mm_part(message["content"][0])
    said = f'"message":"{caught.value}","type":"InternalServerError"'
    row = {"status": 500, "path": "/v1/responses", "said": said, "body": json.dumps({"input": [item]})}
    assert is_known(row) == "tool output in parts"
    assert not is_known(row | {"body": json.dumps({"input": "fox"})})
