"""Throughput and latency of `infer serve` beside bare `vllm serve` on the same directory: `make bench-serve`.

    python tests/benchmarks/bench_serve.py [--size tiny small] [--rounds 60] [--pairs 8] [--requests 64] [--record]

vLLM's benchmark client sends the same load both ways in rounds of four short runs, infer vllm vllm infer, the next vllm infer
infer vllm: what rises or falls on the machine within a round meets both alike. It is done twice:

    one server   one process and engine, whose requests pass the code of `infer` or go past it (`one_server.py`): `--rounds`
    two servers  `infer serve` and `vllm serve` with the same engine (arguments and environment of `infer`'s for this machine);
                 one idles while the other is measured: `--pairs`, each of PAIR_ROUNDS rounds

Two servers of one command differ by 5 to 10% for as long as they run, so both are started anew for each pair, and many pairs
are needed to see 2%. In one server nothing else differs. A figure is that of all replies; a ratio's interval of 95% is the
bootstrap's (Efron 1979), over rounds or over pairs.
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
from tests.benchmarks.one_server import WAYS, switch  # noqa: E402

RESULTS = Path(__file__).with_name("results")
GOAL = 0.02
# hidden, FFN, layers: the smaller the model, the more of a request is the server
SIZES = {"tiny": (64, 96, 2), "small": (512, 1536, 4)}
CONCURRENCY = 8
INPUT, OUTPUT = 64, 32  # tokens
PAIR_ROUNDS = 4
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


def measure(size: str, rounds: int, pairs: int, requests: int) -> dict[str, list[dict[str, Any]]]:
    """The runs in one server, each round a pair, and those of pairs of servers; after a round that does not count."""
    from tools.infer.environment import prepare_environment

    prepare_environment()  # all servers have it from here
    with tempfile.TemporaryDirectory(prefix="bench-serve-") as place:
        source = model(size, Path(place) / "model")
        return {
            "one server": _one_server(source, Path(place), rounds, requests),
            "two servers": [_two_servers(source, Path(place), number, requests) for number in range(pairs)],
        }


def _one_server(source: Path, logs: Path, rounds: int, requests: int) -> list[dict[str, Any]]:
    port = _free_pair()
    words = [sys.executable, str(Path(__file__).with_name("one_server.py")), *commands(source, port)["infer"][1:]]
    with served(words, port, logs / "one.log") as server:
        _round(0, dict.fromkeys(WAYS, server), source, requests, switched=True)
        return [
            _round(turn, dict.fromkeys(WAYS, server), source, requests, switched=True) for turn in range(1, rounds + 1)
        ]


def _two_servers(source: Path, logs: Path, number: int, requests: int) -> dict[str, Any]:
    port = _free_pair()
    words = commands(source, port)
    with ExitStack() as stack:
        servers = {
            way: stack.enter_context(served(words[way], port + WAYS.index(way), logs / f"{way}.log"))
            for way in order(number)[:2]
        }
        turns = [(PAIR_ROUNDS + 1) * number + turn for turn in range(PAIR_ROUNDS + 1)]
        found = [_round(turn, servers, source, requests) for turn in turns][1:]
    return {
        **{way: [run for each in found for run in each[way]] for way in WAYS},
        "load_average": max(each["load_average"] for each in found),
    }


def _round(
    turn: int, servers: Mapping[str, tuple[Any, int]], source: Path, requests: int, *, switched: bool = False
) -> dict[str, Any]:
    """Four runs; `switched`: the servers are one."""
    from tools.infer import bench

    found: dict[str, Any] = {way: [] for way in WAYS}
    for place, way in enumerate(order(turn)):
        there, pid = servers[way]
        if switched:
            switch(there.base, way)
        # both ways have the same prompts
        load = bench.Load(requests=requests, input_tokens=INPUT, output_tokens=OUTPUT, seed=2 * turn + place // 2)
        before = processor(tree(pid))
        said = bench.client(there, source, CONCURRENCY, load)
        found[way].append(run(said, processor(tree(pid)) - before))
    return {**found, "load_average": round(os.getloadavg()[0], 2)}


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


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: the overhead of `infer serve` over `vllm serve`."""
    lines = ["| model | of | figure | infer | vllm | overhead | 95% |", "|---|---|---|---|---|---|---|"]
    for size, of in ((size, of) for size, results in found.items() for of in results):
        for figure in FIGURES:
            each = found[size][of][figure]
            low, high = each["interval"]
            cells = size, of, figure, f"{each['infer']:,.2f}", f"{each['vllm']:,.2f}", f"{each['overhead']:+.1%}"
            lines.append(f"| {' | '.join(cells)} | {low:+.1%} to {high:+.1%} |")
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["tiny"])
    parser.add_argument("--rounds", type=int, default=60, help="of four runs, in one server")
    parser.add_argument("--pairs", type=int, default=8, help="of servers")
    parser.add_argument("--requests", type=int, default=64, help="of a run")
    parser.add_argument("--record", action="store_true", help="replace the record")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args(words)
    described = machine("torch", "vllm", "transformers")
    path = record_path(described, given.results, of="serve")
    runs = {size: measure(size, given.rounds, given.pairs, given.requests) for size in given.size}
    found = {size: {of: summary(pairs) for of, pairs in each.items() if pairs} for size, each in runs.items()}
    own = round(own_ms(), 5)
    share = {size: round(own / result["one server"]["processor"]["vllm"], 6) for size, result in found.items()}
    print(f"{described}\n\n{table(found)}\n\ninfer's own code: {own} ms of a reply, {share} of vllm's", flush=True)
    marks = [f"{size}, {of}: {each}" for size in found for of, result in found[size].items() for each in misses(result)]
    marks += [f"{size}: infer's own code {each:.1%}" for size, each in share.items() if each > GOAL]
    for mark in marks:
        print(f"BEYOND {GOAL:.0%} {mark}")
    if given.record:
        given.results.mkdir(exist_ok=True)
        loads = [pair["load_average"] for each in runs.values() for pairs in each.values() for pair in pairs]
        content = {
            "machine": described,
            "load": {
                "concurrency": CONCURRENCY,
                "requests": given.requests,
                "input_tokens": INPUT,
                "output_tokens": OUTPUT,
            },
            "load_average": {"least": min(loads), "most": max(loads)},
            "rounds": {"one server": given.rounds, "two servers": [given.pairs, PAIR_ROUNDS]},
            "results": found,
            "own_ms": own,
            "own_share": share,
        }
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(f"recorded in {path}")
    return 1 if marks else 0


if __name__ == "__main__":
    raise SystemExit(main())
