"""Start `infer serve`, send requests over HTTP, write the replies, stop the server.

    python3 demo/serve.py SERVER_COMMAND_AND_FLAGS... -- PROMPTS.jsonl TARGET.json

sends the first prompt. Standard library only.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import stop_with_parent

MAX_TOKENS = 64
TIMEOUT = 900  # seconds for a reply: requests wait for each other on a busy machine


def ask(url: str, model: str, messages: list[dict[str, str]]) -> str:
    """The assistant's reply, by OpenAI's chat API, greedy."""
    body = {"model": model, "messages": messages, "max_tokens": MAX_TOKENS, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        return str(json.load(answer)["choices"][0]["message"]["content"])


def main(command: list[str], prompts: Path, target: Path, answers: Callable[[str, str, Path], Any]) -> int:
    """Serve, ask, stop; write what `answers` returns, given URL, model name and prompts. Returns the server's exit code."""
    if target.exists():
        print(f"already done: {target}", file=sys.stderr)
        return 0
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=stop_with_parent)  # noqa: PLW1509 -- no threads
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    try:
        assert server.stdout is not None
        for line in server.stdout:  # `ready URL NAME` is printed when the server accepts requests
            if line.startswith("ready "):
                _, url, name = line.split(maxsplit=2)
                break
        else:
            return server.wait() or 1
        content = answers(url, name.strip(), prompts)
    finally:
        server.terminate()
        code = server.wait()
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(target.name + ".new")
    beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    beside.replace(target)
    return code


def first(url: str, name: str, prompts: Path) -> dict[str, Any]:
    """The first prompt and its reply, which are printed, too."""
    messages = json.loads(prompts.read_text(encoding="utf-8").splitlines()[0])["messages"]
    reply = ask(url, name, messages)
    print(f"POST {url}/chat/completions\n{messages[-1]['content']}\n--- the model answers ---\n{reply}")
    return {"messages": messages, "reply": reply}


def arguments(script: str, words: list[str]) -> tuple[list[str], Path, Path]:
    """The words of a command line: server command, prompts, target."""
    if "--" not in words or len(words) - words.index("--") != 3:
        sys.exit(f"usage: {script} SERVER_COMMAND... -- PROMPTS.jsonl TARGET.json")
    split = words.index("--")
    return words[:split], Path(words[split + 1]), Path(words[split + 2])


if __name__ == "__main__":
    sys.exit(main(*arguments("demo/serve.py", sys.argv[1:]), first))
