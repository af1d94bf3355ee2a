"""`infer reload`: a client of `/v1/policy`."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.parse
import urllib.request
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path
from typing import Any

from shared.console import log
from shared.errors import StageError, UserError
from tools.infer.api_keys import api_keys


def run(url: str, source: Path, *, version: str | None, api_key_file: Path | None, timeout: int) -> None:
    """Ask the server at `url` for an exchange of its weights, and wait for it.

    Raises:
        UserError: the server is not there, needs a key, takes no weights, or not those of `source`.
        StageError: the exchange failed, or took longer than `timeout` seconds.
    """
    path = Path(os.path.abspath(source))  # links stay: the server follows its own
    key = api_keys(api_key_file)[0] if api_key_file else None
    asked = {"path": str(path), "version": version or path.name}
    answer = _post(f"{base_of(url)}/policy", asked, key, timeout, url)
    log(f"{url} answers with {answer['path']}, version {answer['version']}")


def base_of(url: str) -> str:
    """`http://HOST:PORT/v1` of an address with or without `/v1`. UserError if it is none."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise UserError(f"--url {url} is not an address such as http://127.0.0.1:8000/v1")
    return f"{url.rstrip('/').removesuffix('/v1').rstrip('/')}/v1"


def _post(address: str, body: dict[str, Any], key: str | None, timeout: int, url: str) -> dict[str, Any]:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(address, data=json.dumps(body).encode(), headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            result: dict[str, Any] = json.load(answer)
            return result
    except urllib.error.HTTPError as error:
        raise _refused(error, url) from None
    except TimeoutError:
        raise StageError(f"{url} did not answer within {timeout} s; see its log, or give a longer --timeout") from None
    except urllib.error.URLError as error:
        raise UserError(f"--url {url}: {getattr(error.reason, 'strerror', None) or error.reason}") from None
    except (HTTPException, ConnectionError, ValueError) as error:
        raise StageError(
            f"{url}: the answer broke off ({error or type(error).__name__}); see the server's log"
        ) from None


def _refused(error: urllib.error.HTTPError, url: str) -> Exception:
    if error.code == HTTPStatus.UNAUTHORIZED:
        return UserError(f"--url {url} needs a key: give --api-key-file")
    if error.code in (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED):
        return UserError(f"--url {url} takes no other weights; start the server with `infer serve --reload-from DIR`")
    try:
        reason = json.load(error)["error"]["message"]
    except (ValueError, KeyError, TypeError, OSError, HTTPException):
        reason = f"status {error.code}"
    kind = StageError if error.code >= HTTPStatus.INTERNAL_SERVER_ERROR else UserError
    return kind(f"--url {url}: {reason}")
