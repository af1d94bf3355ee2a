"""`infer bench`: vLLM's own benchmark client against a running server, at one concurrency after the other."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path
from typing import Any

from shared.checkpoint.directory.publish import publish
from shared.console import log, progress
from shared.errors import StageError, UserError
from shared.report.page import REPORT, write
from tools.infer.api_keys import api_keys
from tools.infer.bench_report import page, table
from tools.infer.environment import prepare_environment
from tools.infer.prompts import load_tokenizer
from tools.infer.reload import base_of
from tools.infer.source import open_hf_directory

OUTPUT = "bench.json"
LATENCIES = ("ttft", "tpot", "itl", "e2el")  # vLLM's names
_WAIT = 60  # seconds, for the list of models


@dataclass(frozen=True, kw_only=True)
class Load:
    """The requests of a run. Prompts are random tokens of the model's vocabulary; a reply is never shorter than asked for."""

    requests: int
    input_tokens: int  # of a prompt
    output_tokens: int  # of a reply
    seed: int


@dataclass(frozen=True, kw_only=True)
class Served:
    """A model of a running server."""

    base: str  # http://HOST:PORT
    name: str
    context: int | None  # tokens; None if the server does not say
    key: str | None = None


def run(
    url: str,
    source: Path,
    target: Path,
    *,
    concurrency: Sequence[int],
    load: Load,
    model: str | None,
    api_key_file: Path | None,
    overwrite: bool,
) -> None:
    """Measure and publish `target`.

    Raises:
        UserError: the server is not there, needs a key, does not serve the model, or the load does not fit the model.
        StageError: a request failed.
    """
    levels = sorted(set(concurrency))
    if beyond := [level for level in levels if level > load.requests]:
        raise UserError(f"--concurrency {beyond[0]} is above --requests {load.requests}: no run would reach it")
    with publish(target, kind="result", inputs={"source": source}, overwrite=overwrite) as out:
        directory = open_hf_directory(source)
        load_tokenizer(directory)  # vLLM's client would take it from the hub, or run its code
        served = find(url, model, api_keys(api_key_file)[0] if api_key_file else None)
        needed = load.input_tokens + load.output_tokens
        if served.context is not None and needed > served.context:
            raise UserError(
                f"--input-tokens {load.input_tokens} and --output-tokens {load.output_tokens}: the server's context is "
                f"{served.context} tokens; give smaller ones"
            )
        prepare_environment()
        runs = []
        with progress(len(levels) * load.requests, "requests", "measuring") as advance:
            for level in levels:
                runs.append(measure(served, directory, level, load))
                advance(load.requests)
        server = {"url": served.base, "model": served.name}
        report = {"server": server, "load": asdict(load), "client": _client(), "runs": runs}
        (out.path / OUTPUT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        write(out.path / REPORT, page(report))
        out.describe(metrics={str(each["concurrency"]): each for each in runs})
    log(f"measured: {target / OUTPUT} and {target / REPORT}")
    print(table(runs))


def find(url: str, model: str | None, key: str | None) -> Served:
    """The model of that name, or the server's first. UserError if there is none."""
    base = base_of(url)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{base}/models", headers=headers), timeout=_WAIT) as answer:
            models = {each["id"]: each.get("max_model_len") for each in json.load(answer)["data"]}
    except urllib.error.HTTPError as error:
        if error.code == HTTPStatus.UNAUTHORIZED:
            raise UserError(f"--url {url} needs a key: give --api-key-file") from None
        raise UserError(f"--url {url}: {base}/models answers with status {error.code}") from None
    except urllib.error.URLError as error:
        raise UserError(f"--url {url}: {getattr(error.reason, 'strerror', None) or error.reason}") from None
    except (HTTPException, OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"--url {url}: {base}/models is not a list of models: no server of OpenAI's API") from None
    if model is None and models:
        model = next(iter(models))
    if model is None or model not in models:
        there = ", ".join(models) or "none"
        raise UserError(f"--model {model}: the server at {url} does not serve it; it serves: {there}")
    return Served(base=base.removesuffix("/v1"), name=model, context=models[model], key=key)


def measure(served: Served, tokenizer: Path, concurrency: int, load: Load) -> dict[str, Any]:
    """One run of vLLM's client: counts, tokens a second, and mean, p50 and p99 of each latency in ms.

    ttft: time to the first token of a reply; tpot: mean time of its later tokens; itl: time between two events of its
    stream; e2el: the whole reply. `LATENCIES` names them. StageError if a request fails.
    """
    found = client(served, tokenizer, concurrency, load)
    return {
        "concurrency": concurrency,
        "requests": found["completed"],
        "seconds": round(found["duration"], 4),
        "input_tokens": found["total_input_tokens"],
        "output_tokens": found["total_output_tokens"],
        "requests_per_second": round(found["request_throughput"], 4),
        "output_tokens_per_second": round(found["output_throughput"], 2),
        "total_tokens_per_second": round(found["total_token_throughput"], 2),
    } | {
        f"{name}_ms": {kind: round(float(found[f"{kind}_{name}_ms"]), 3) for kind in ("mean", "p50", "p99")}
        for name in LATENCIES
    }


def client(served: Served, tokenizer: Path, concurrency: int, load: Load) -> dict[str, Any]:
    """What vLLM's client says of one run, with each reply's numbers. StageError if a request fails."""
    import asyncio

    from vllm.benchmarks.serve import add_cli_args, main_async
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    words = {
        "--backend": "openai",
        "--base-url": served.base,
        "--model": served.name,
        "--tokenizer": tokenizer,
        "--dataset-name": "random",
        "--random-input-len": load.input_tokens,
        "--random-output-len": load.output_tokens,
        "--num-prompts": load.requests,
        "--max-concurrency": concurrency,
        "--num-warmups": concurrency,
        "--seed": load.seed,
        "--temperature": 0,
        "--percentile-metrics": ",".join(LATENCIES),
        "--metric-percentiles": "50,99",
        # a second run with the same seed would find its prompts in the prefix cache
        "--extra-body": json.dumps({"cache_salt": secrets.token_hex(16)}),
    }
    if served.key:
        words["--header"] = f"Authorization=Bearer {served.key}"
    listed = [str(word) for pair in words.items() for word in pair]
    asked = parser.parse_args([*listed, "--save-detailed", "--disable-tqdm"])
    os.environ.pop("OPENAI_API_KEY", None)  # the client would send it, whose ever it is
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        found: dict[str, Any] = asyncio.run(main_async(asked))
    if found["failed"]:
        reason = next(error.strip().splitlines()[-1] for error in found["errors"] if error)
        raise StageError(f"{found['failed']} of {load.requests} requests failed at concurrency {concurrency}: {reason}")
    return found


def _client() -> str:
    import vllm

    return f"vllm {vllm.__version__}"
