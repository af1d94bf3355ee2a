"""Ask every model of a server all prompts over HTTP. Standard library only."""

from __future__ import annotations

import json
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from serve import ask

AT_ONCE = 40  # requests that the server has at a time


def all_models(url: str, name: str, prompts: Path) -> dict[str, list[str]]:
    """Questions, and replies by model: the base and its adapters, the base first."""
    every = [json.loads(line)["messages"] for line in prompts.read_text(encoding="utf-8").splitlines()]
    with urllib.request.urlopen(f"{url}/models", timeout=60) as answer:
        models = [model["id"] for model in json.load(answer)["data"]]
    found = {"questions": [messages[-1]["content"] for messages in every]}
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        for model in sorted(models, key=lambda model: (model != name, model)):
            found[model] = list(pool.map(lambda messages, model=model: ask(url, model, messages), every))
            print(f"{model}: {len(every)} replies", file=sys.stderr)
    finally:  # a stop does not wait for replies: the server's end ends them
        pool.shutdown(wait=False, cancel_futures=True)
    return found
