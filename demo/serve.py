"""Start `infer serve`, send one request over HTTP, write the reply, stop the server.

    python3 demo/serve.py SERVER_COMMAND_AND_FLAGS... -- PROMPTS.jsonl TARGET.json

Standard library only.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

from measure import stop_with_parent

MAX_TOKENS = 64


def ask(url: str, model: str, messages: list[dict[str, str]]) -> str:
    """The assistant's reply, by OpenAI's chat API."""
    body = {"model": model, "messages": messages, "max_tokens": MAX_TOKENS, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return str(json.load(answer)["choices"][0]["message"]["content"])


def main(command: list[str], prompts: Path, target: Path) -> int:
    """Serve, ask, stop; returns the server's exit code."""
    if target.exists():
        print(f"already done: {target}", file=sys.stderr)
        return 0
    messages = json.loads(prompts.read_text(encoding="utf-8").splitlines()[0])["messages"]
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
        reply = ask(url, name.strip(), messages)
    finally:
        server.terminate()
        code = server.wait()
    print(f"POST {url}/chat/completions\n{messages[-1]['content']}\n--- the model answers ---\n{reply}")
    beside = target.with_name(target.name + ".new")
    beside.write_text(json.dumps({"messages": messages, "reply": reply}, indent=1) + "\n", encoding="utf-8")
    beside.replace(target)
    return code


if __name__ == "__main__":
    if "--" not in sys.argv:
        sys.exit("usage: serve.py SERVER_COMMAND... -- PROMPTS.jsonl TARGET.json")
    split = sys.argv.index("--")
    sys.exit(main(sys.argv[1:split], *map(Path, sys.argv[split + 1 :])))
