"""Throughput and latency of `infer serve` beside bare `vllm serve` on the same directory: `make bench-serve`.

    python tests/benchmarks/bench_serve.py [--size tiny small] [--pairs 8] [--rounds 4] [--requests 64] [--record]

Both servers run at the same time with the same engine (arguments and environment of `infer`'s for this machine); one idles while
the other is measured. vLLM's benchmark client sends the same load to both in rounds of four short runs, infer vllm vllm infer,
the next vllm infer infer vllm: what rises or falls on the machine within a round meets both alike. Two servers of one command
differ by 5 to 10% for as long as they run, so both are started anew for each pair. A figure is that of all replies of all
pairs; a ratio's interval of 95% is the bootstrap's (Efron 1979) over pairs.
The goal is 2%: of throughput, and of the 99th percentile of whole replies, of the time to the first token and of that of a
later one. Beside them stands the processor time of a request, all processes of the server together: what others do on the machine
changes it less. And the processor time that the code of `infer` itself takes of a streamed reply: it stands between the server
and vLLM's application in one place, which counts requests in flight (`tools/infer/drain.py`), and is timed there alone.

The mark and the exit code 1: an overhead beyond the goal even at the kinder end of the interval. `--record` replaces the
record of this kind of machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.benchmarks.bench_train import machine, record_path  # noqa: E402
from tests.benchmarks.measured import processor, tree  # noqa: E402

RESULTS = Path(__file__).with_name("results")
GOAL = 0.02
# hidden, FFN, layers: the smaller the model, the more of a request is the server
SIZES = {"tiny": (64, 96, 2), "small": (512, 1536, 4)}
CONCURRENCY = 8
INPUT, OUTPUT = 64, 32  # tokens
WAYS = ("infer", "vllm")
LATENCIES = ("ttft", "tpot", "e2el")  # of each reply, in ms
# name -> whether more is better
FIGURES = {
    "processor": False,
    "throughput": True,
    "ttft_p99": False,
    "tpot_p99": False,
    "e2el_p50": False,
    "e2el_p99": False,
}
JUDGED = ("throughput", "ttft_p99", "tpot_p99", "e2el_p99")
RESAMPLES = 1000

Pair = Mapping[str, Sequence[Mapping[str, Any]]]  # of a way: the runs of one server


def figures(pairs: Sequence[Pair], way: str) -> dict[str, float]:
    """Of all replies: processor time of a request in ms, output tokens a second, percentiles in ms."""
    runs = [run for pair in pairs for run in pair[way]]
    total = {name: sum(run[name] for run in runs) for name in ("tokens", "seconds", "processor_ms", "requests")}
    found = {"throughput": total["tokens"] / total["seconds"], "processor": total["processor_ms"] / total["requests"]}
    for latency in LATENCIES:
        every = np.concatenate([run[latency] for run in runs])
        p50, p99 = np.percentile(every, [50, 99])
        found |= {f"{latency}_p50": float(p50), f"{latency}_p99": float(p99)}
    return {name: found[name] for name in FIGURES}


def overheads(ours: Mapping[str, float], theirs: Mapping[str, float]) -> dict[str, float]:
    """How much worse `infer` is in each figure: 0.02 is 2%."""
    return {
        name: theirs[name] / ours[name] - 1 if more_is_better else ours[name] / theirs[name] - 1
        for name, more_is_better in FIGURES.items()
    }


def summary(pairs: Sequence[Pair]) -> dict[str, Any]:
    """{figure: overhead, its interval of 95%, and the figure of both} of pairs."""
    ours, theirs = (figures(pairs, way) for way in WAYS)
    random = np.random.default_rng(0)
    drawn = []
    for _ in range(RESAMPLES):
        again = [pairs[number] for number in random.integers(len(pairs), size=len(pairs))]
        drawn.append(overheads(*(figures(again, way) for way in WAYS)))
    return {
        name: {
            "overhead": round(overhead, 4),
            "interval": [round(float(end), 4) for end in np.percentile([each[name] for each in drawn], [2.5, 97.5])],
            WAYS[0]: round(ours[name], 3),
            WAYS[1]: round(theirs[name], 3),
        }
        for name, overhead in overheads(ours, theirs).items()
    }


def misses(found: Mapping[str, Any]) -> list[str]:
    """Figures whose overhead is beyond the goal even at the kinder end of its interval."""
    return [
        f"{figure}: {found[figure]['overhead']:+.1%} ({found[figure]['interval'][0]:+.1%} to {found[figure]['interval'][1]:+.1%})"
        for figure in JUDGED
        if found[figure]["interval"][0] > GOAL
    ]


def model(size: str, path: Path) -> Path:
    """A random LLaMA with a tokenizer."""
    from tests.tools.infer.tiny_models import tiny_model

    hidden, ffn, layers = SIZES[size]
    return tiny_model("llama", path, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers)


def commands(source: Path, port: int) -> dict[str, list[str]]:
    """The two servers' command lines, for the same engine."""
    from tools.infer.engines.engine import EngineSettings
    from tools.infer.engines.vllm_arguments import engine_arguments

    arguments = engine_arguments(source, EngineSettings())
    words = ["serve", arguments.pop("model"), "--port", str(port + 1), "--served-model-name", "m"]
    arguments.pop("use_tqdm_on_load")
    for name, value in arguments.items():
        flag = f"--{name.replace('_', '-')}"
        words += [flag] if value is True else [flag, str(value)]
    bin_ = Path(sys.executable).parent
    return {
        "infer": [
            str(bin_ / "infer"),
            "serve",
            "--source",
            str(source),
            "--port",
            str(port),
            "--served-model-name",
            "m",
        ],
        "vllm": [str(bin_ / "vllm"), *words],
    }


@contextmanager
def served(words: Sequence[str], port: int, log: Path) -> Iterator[Any]:
    """A running server: as `tools.infer.bench` knows it, and its process id."""
    from shared.errors import UserError
    from tools.infer.bench import find

    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(words, stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        until = time.monotonic() + 300
        while True:
            try:
                there = find(f"http://127.0.0.1:{port}", "m", None)
                break
            except UserError:
                if process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(
                        f"{words[0]} does not serve: {log.read_text(encoding='utf-8')[-3000:]}"
                    ) from None
                time.sleep(0.5)
        yield there, process.pid
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def measure(size: str, pairs: int, rounds: int, requests: int) -> list[dict[str, Any]]:
    """The runs of pairs of servers, each pair after a round that does not count."""
    from tools.infer.environment import prepare_environment

    prepare_environment()  # both servers have it from here
    with tempfile.TemporaryDirectory(prefix="bench-serve-") as place:
        source = model(size, Path(place) / "model")
        return [_pair(source, Path(place), number, rounds, requests) for number in range(pairs)]


def _pair(source: Path, logs: Path, number: int, rounds: int, requests: int) -> dict[str, Any]:
    from tools.infer import bench

    port = _free_pair()
    words = commands(source, port)
    found: dict[str, Any] = {way: [] for way in WAYS}
    with ExitStack() as stack:
        servers = {
            way: stack.enter_context(served(words[way], port + WAYS.index(way), logs / f"{way}.log"))
            for way in order(number)[:2]
        }
        for turn in range(rounds + 1):
            for place, way in enumerate(order(number + turn)):
                # both ways have the same prompts
                seed = 2 * ((rounds + 1) * number + turn) + place // 2
                load = bench.Load(requests=requests, input_tokens=INPUT, output_tokens=OUTPUT, seed=seed)
                there, pid = servers[way]
                before = processor(tree(pid))
                said = bench.client(there, source, CONCURRENCY, load)
                if turn:
                    found[way].append(run(said, processor(tree(pid)) - before))
    found["load_average"] = round(os.getloadavg()[0], 2)
    return found


def run(said: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """A run from what vLLM's client says of it and the server's processor time."""
    ttft = 1000 * np.array(said["ttfts"])
    later = 1000 * np.array([sum(gaps) for gaps in said["itls"]])
    return {
        "tokens": said["total_output_tokens"],
        "seconds": said["duration"],
        "processor_ms": 1000 * seconds,
        "requests": said["completed"] + CONCURRENCY,  # those that warm up cost the server as much
        "ttft": ttft,
        "tpot": later / (np.array(said["output_lens"]) - 1),
        "e2el": ttft + later,
    }


def own_ms(rounds: int = 2000, repeats: int = 5) -> float:
    """Processor time, in ms, that `InFlight` adds to a reply of OUTPUT events; the least of some repeats."""
    from tools.infer.drain import InFlight

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        for _ in range(OUTPUT + 2):  # the head, the events, their end
            await send({})

    async def nowhere(message: Any) -> None:
        pass

    async def replies(app: Any) -> float:
        began = time.process_time()
        for _ in range(rounds):
            await app({"type": "http"}, nowhere, nowhere)
        return 1000 * (time.process_time() - began) / rounds

    def least(app: Any) -> float:
        return min(asyncio.run(replies(app)) for _ in range(repeats))

    return least(InFlight(answer)) - least(answer)


def order(number: int) -> tuple[str, str, str, str]:
    """The runs of a round: A B B A, or B A A B. The two halves have one run of each way."""
    first, second = WAYS if number % 2 == 0 else WAYS[::-1]
    return first, second, second, first


def _free_pair() -> int:
    import socket

    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            try:
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


def table(found: Mapping[str, Any]) -> str:
    """Markdown: the overhead of `infer serve` over `vllm serve`."""
    lines = ["| model | figure | infer | vllm | overhead | 95% |", "|---|---|---|---|---|---|"]
    for size, result in found.items():
        for figure in FIGURES:
            each = result[figure]
            low, high = each["interval"]
            cells = size, figure, f"{each['infer']:,.2f}", f"{each['vllm']:,.2f}", f"{each['overhead']:+.1%}"
            lines.append(f"| {' | '.join(cells)} | {low:+.1%} to {high:+.1%} |")
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["tiny"])
    parser.add_argument("--pairs", type=int, default=8, help="of servers")
    parser.add_argument("--rounds", type=int, default=4, help="of four runs, of a pair")
    parser.add_argument("--requests", type=int, default=64, help="of a run")
    parser.add_argument("--record", action="store_true", help="replace the record")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args(words)
    described = machine("torch", "vllm", "transformers")
    path = record_path(described, given.results, of="serve")
    pairs = {size: measure(size, given.pairs, given.rounds, given.requests) for size in given.size}
    found = {size: summary(each) for size, each in pairs.items()}
    own = round(own_ms(), 5)
    share = {size: round(own / result["processor"]["vllm"], 6) for size, result in found.items()}
    print(f"{described}\n\n{table(found)}\n\ninfer's own code: {own} ms of a reply, {share} of vllm's", flush=True)
    marks = [f"{size}: {each}" for size, result in found.items() for each in misses(result)]
    marks += [f"{size}: infer's own code {each:.1%}" for size, each in share.items() if each > GOAL]
    for mark in marks:
        print(f"BEYOND {GOAL:.0%} {mark}")
    if given.record:
        given.results.mkdir(exist_ok=True)
        loads = [pair["load_average"] for each in pairs.values() for pair in each]
        content = {
            "machine": described,
            "load": {
                "concurrency": CONCURRENCY,
                "requests": given.requests,
                "input_tokens": INPUT,
                "output_tokens": OUTPUT,
            },
            "load_average": {"least": min(loads), "most": max(loads)},
            "results": {
                size: {"pairs": given.pairs, "rounds": given.rounds, **result} for size, result in found.items()
            },
            "own_ms": own,
            "own_share": share,
        }
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(f"recorded in {path}")
    return 1 if marks else 0


if __name__ == "__main__":
    raise SystemExit(main())
