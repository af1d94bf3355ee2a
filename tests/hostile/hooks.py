"""Loaded by schemathesis (SCHEMATHESIS_HOOKS): a line of JSON for each request, into the file that BATON_REQUESTS_LOG names."""

from __future__ import annotations

import json
import os
import threading
from typing import Any

import schemathesis

_LOG = open(os.environ["BATON_REQUESTS_LOG"], "a", encoding="utf-8", buffering=1)  # noqa: SIM115 -- as long as the process
_ONE = threading.Lock()
_SHOWN = 2000  # characters of a request or an answer


def _note(case: Any, status: int | None, said: str = "", body: Any = None) -> None:
    row = {"method": case.method, "path": case.operation.path, "status": status}
    if said or body is not None:
        row |= {"said": said[:_SHOWN], "body": repr(body)[:_SHOWN]}
    with _ONE:
        _LOG.write(json.dumps(row) + "\n")


@schemathesis.hook
def after_call(context: Any, case: Any, response: Any) -> None:
    """An answer; those of a fault in the server with what was asked and said."""
    if response.status_code >= 500:
        _note(case, response.status_code, response.text, response.request.body)
    else:
        _note(case, response.status_code)


@schemathesis.hook
def after_network_error(context: Any, case: Any, request: Any) -> None:
    """No answer: the time was up, or the connection broke."""
    _note(case, None, "no answer", request.body)
