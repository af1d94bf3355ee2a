"""Random and hostile requests beside ordinary ones against a running server: `make test-hostile`.

    python tests/hostile/hostile.py --source DIR [--minutes 30] [--record]

schemathesis makes requests of the server's own /openapi.json, valid and invalid ones; clients beside it send completions and
chats, streamed and not, break connections off in the middle, and send broken HTTP. An operator exchanges the weights for the
same ones of another directory, and loads, asks and unloads an adapter. At the end, and all the while, the greedy answer is that
of the beginning. Memory of the server and its engine is read every few seconds.

Failures: a 5xx that is not in `KNOWN`, a request without an answer, another greedy answer, memory that grows.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.benchmarks.measured import anonymous, tree  # noqa: E402
from tests.hostile.known import is_known  # noqa: E402

SCHEMATHESIS = ROOT / "tests/hostile/.venv/bin/schemathesis"
RECORD = ROOT / "tests/benchmarks/results/hostile-cpu.json"  # of a container: hostile-image-cpu.json
ANSWER = 60  # seconds within which a request has an answer
END = 180  # seconds in which the last requests of schemathesis, and itself, end
LEAST = 20  # requests of schemathesis: on a busy machine its start takes longer than a short run
LONGER = 20  # seconds, of the first run after the time is up; the second has twice that, and so on
GROWTH = 0.05  # of the memory, from the second to the last fifth of the time
SETTLED = 10  # minutes; a shorter run is a warm-up, whose memory is not judged
_PROMPT = {"prompt": "The quick", "max_tokens": 8, "temperature": 0}
_BROKEN = (
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{\"prompt\"",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"\x00\xff\x16\x03\x01" * 20,
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
)  # fmt: skip


@dataclass
class Outcome:
    """What was sent, and what is wrong."""

    statuses: Counter[str] = field(default_factory=Counter)
    known: Counter[str] = field(default_factory=Counter)  # 5xx of vLLM's own, by name
    wrong: list[str] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)  # (seconds, bytes)

    @property
    def random(self) -> int:
        """How many requests were schemathesis's."""
        return self.statuses.total() - self.statuses["ordinary"] - self.statuses["operator"]


class Client:
    """Requests to a server over connections of their own."""

    def __init__(self, url: str) -> None:
        self.address = urllib.parse.urlsplit(url)
        assert self.address.hostname
        assert self.address.port

    def connect(self, seconds: float = ANSWER) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(str(self.address.hostname), self.address.port, timeout=seconds)

    def post(self, path: str, body: Any, seconds: float = ANSWER) -> tuple[int, Any]:
        with contextlib.closing(self.connect(seconds)) as connection:
            connection.request("POST", f"/v1/{path}", json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())

    def openapi(self) -> bytes:
        with contextlib.closing(self.connect()) as connection:
            connection.request("GET", "/openapi.json")
            return connection.getresponse().read()

    def greedy(self, **further: str) -> str:
        status, answer = self.post("completions", _PROMPT | further)
        assert status == 200, f"a plain request is answered with {status}: {answer}"
        return str(answer["choices"][0]["text"])

    def stream(self, path: str, body: Any, lines: int | None) -> None:
        """Read so many lines of a stream and break off; None: to its end, which must be the event [DONE]."""
        with contextlib.closing(self.connect()) as connection:
            words = json.dumps(body | {"stream": True})
            connection.request("POST", f"/v1/{path}", words, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            if lines is None:
                text = answer.read()
                assert answer.status != 200 or text.rstrip().endswith(b"data: [DONE]"), text[-200:]
            for _ in range(lines or 0):
                answer.readline()

    def broken(self, sent: bytes) -> None:
        """Send bytes, wait no time for an answer, and leave."""
        with socket.create_connection((str(self.address.hostname), self.address.port), timeout=ANSWER) as connection:
            connection.sendall(sent)


def _ordinary(client: Client, expected: str) -> list[Callable[[], None]]:
    """What clients do besides schemathesis, in turn."""
    messages = {"messages": [{"role": "user", "content": "fox " * 20}], "max_tokens": 40}
    long = _PROMPT | {"max_tokens": 100, "ignore_eos": True}

    def same() -> None:
        said = client.greedy()
        assert said == expected, f"the greedy answer has become {said!r}, it was {expected!r}"

    def too_long() -> None:
        status, _ = client.post("completions", _PROMPT | {"prompt": "fox " * 5000})
        assert status == 400, f"a prompt beyond the context is answered with {status}"

    return [
        same,
        lambda: client.stream("completions", long, None),
        lambda: client.stream("completions", long, 5),
        lambda: client.stream("chat/completions", messages, None),
        lambda: client.stream("chat/completions", messages, 3),
        too_long,
        *(lambda sent=sent: client.broken(sent) for sent in _BROKEN),  # type: ignore[misc]
    ]


def _operator(client: Client, expected: str, folder: Path) -> Callable[[], None]:
    """One exchange of the weights, and the life of an adapter: `folder` has the directories `same` and `adapter`."""
    first: list[str] = []

    def act() -> None:
        for path, body in (
            ("policy", {"path": str(folder / "same"), "version": "same"}),  # waits for requests in flight
            ("load_lora_adapter", {"lora_name": "operator", "lora_path": str(folder / "adapter")}),
        ):
            status, answer = client.post(path, body, END)
            assert status == 200, f"{path} is answered with {status}: {answer}"
        try:
            said = client.greedy(model="operator")
        finally:  # else the next load fails, too
            status, answer = client.post("unload_lora_adapter", {"lora_name": "operator"})
        assert said != expected, "the adapter changes nothing"
        first.append(said)
        assert said == first[0], f"the adapter's greedy answer is {said!r}, it was {first[0]!r}"
        assert status == 200, f"unload_lora_adapter is answered with {status}: {answer}"

    return act


def attack(
    url: str,
    pid: int,
    seconds: float,
    *,
    seed: int = 0,
    ordinary: int = 2,
    every: float = 5.0,
    exchanged: Path | None = None,
) -> Outcome:
    """Load the server for so many seconds.

    Args:
        url: of the server, with /v1.
        pid: its process, for the memory of its tree.
        seconds: length, or until schemathesis has made LEAST requests.
        seed: of schemathesis.
        ordinary: clients beside schemathesis.
        every: seconds between two looks at the memory.
        exchanged: the operator's directories `same` and `adapter` are in it; None: there is no operator.
    """
    client, outcome = Client(url), Outcome()
    expected = client.greedy()
    began, over = time.monotonic(), threading.Event()

    def look() -> None:
        while not over.wait(every):
            outcome.memory.append((round(time.monotonic() - began, 1), anonymous(tree(pid))))

    def act(name: str, deed: Callable[[], None]) -> None:
        try:
            deed()
            outcome.statuses[name] += 1
        except AssertionError as error:
            outcome.wrong.append(f"{name}: {error}")
        except (OSError, http.client.HTTPException, ValueError) as error:
            outcome.wrong.append(f"{name}: {type(error).__name__}: {error}")

    def ask(number: int) -> None:
        deeds = _ordinary(client, expected)
        turn = number
        while not over.is_set():
            act("ordinary", deeds[turn % len(deeds)])
            turn += 1

    def operate(folder: Path) -> None:
        deed = _operator(client, expected, folder)
        while not over.wait(every):
            act("operator", deed)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(ordinary)]
    if exchanged is not None:
        threads.append(threading.Thread(target=operate, args=(exchanged,)))
    threads.append(threading.Thread(target=look))
    for thread in threads:
        thread.start()
    try:
        _random(client, url.removesuffix("/v1"), began + seconds, seed, outcome)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    try:
        said = client.greedy()
        if said != expected:
            outcome.wrong.append(f"the greedy answer is {said!r}, it was {expected!r}")
    except (AssertionError, OSError, http.client.HTTPException, ValueError) as error:
        outcome.wrong.append(f"no answer at the end: {error}")
    return outcome


def _random(client: Client, base: str, until: float, seed: int, outcome: Outcome) -> None:
    """Runs of schemathesis until the time is up, LEAST requests at least; each request is accounted for."""
    with tempfile.TemporaryDirectory(prefix="hostile-") as place:
        log = Path(place) / "requests.jsonl"
        log.touch()
        schema = Path(place) / "openapi.json"
        schema.write_bytes(client.openapi())  # schemathesis itself waits 10 seconds for it, whatever it is told
        environment = os.environ | {
            "SCHEMATHESIS_HOOKS": "hooks",
            "PYTHONPATH": str(Path(__file__).parent),
            "BATON_REQUESTS_LOG": str(log),
        }
        words = [SCHEMATHESIS, "run", schema, "--url", base, "--checks", "not_a_server_error", "--mode", "all"]
        words += ["--continue-on-failure", "--no-shrink", "--request-timeout", str(ANSWER), "--workers", "2"]
        words += ["--suppress-health-check", "all", "--phases", "examples,coverage,fuzzing", "--warnings", "off"]
        late = 0
        while (left := int(until - time.monotonic())) > 0 or log.read_bytes().count(b"\n") < LEAST:
            if left < -END:
                outcome.wrong.append(f"schemathesis has not made {LEAST} requests {END} s after its time")
                break
            if left <= 0:
                late += 1
                left = LONGER * late
            with (Path(place) / "said").open("w+", encoding="utf-8") as said:
                try:
                    run = subprocess.run(
                        [*words, "--max-time", str(left), "--seed", str(seed)],
                        env=environment,
                        cwd=place,
                        stdout=said,
                        stderr=subprocess.STDOUT,
                        check=False,
                        timeout=left + END,
                    )
                except subprocess.TimeoutExpired:
                    outcome.wrong.append(f"schemathesis has not ended {END} s after its time")
                    break
                if run.returncode not in (0, 1):
                    said.seek(0)
                    raise RuntimeError(f"schemathesis ended with {run.returncode}: {said.read()[-3000:]}")
            seed += 1
        for line in log.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            status = row["status"]
            outcome.statuses[str(status)] += 1
            if status is not None and status < 500:
                continue
            if name := is_known(row):
                outcome.known[name] += 1
            else:
                outcome.wrong.append(json.dumps(row))


def growth(memory: Sequence[tuple[float, int]]) -> float:
    """How much larger the memory is in the last fifth of the time than in the second, as a share of that.

    The first fifth fills caches and pools.
    """
    last = memory[-1][0]
    fifth = [[size for at, size in memory if last * n / 5 <= at <= last * (n + 1) / 5] for n in range(5)]
    return statistics.median(fifth[4]) / statistics.median(fifth[1]) - 1


def write_adapter(source: Path, target: Path) -> None:
    """A LoRA adapter of rank 8 on the queries of the first layer, in PEFT's form, large enough to change answers."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    name = "model.layers.0.self_attn.q_proj"
    with safe_open(source / "model.safetensors", "pt") as file:
        rows, columns = file.get_slice(f"{name}.weight").get_shape()
    noise = torch.Generator().manual_seed(0)
    sizes = {"A": (8, columns), "B": (rows, 8)}
    weights = {
        f"base_model.model.{name}.lora_{side}.weight": torch.randn(size, generator=noise)
        for side, size in sizes.items()
    }
    target.mkdir()
    save_file(weights, target / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
    (target / "adapter_config.json").write_text(json.dumps(config | {"layers_to_transform": [0]}), encoding="utf-8")


@contextlib.contextmanager
def serving(source: Path, folder: Path) -> Any:
    """`infer serve` with everything on: (its address, its process id, `folder`)."""
    words = [Path(sys.executable).with_name("infer"), "serve", "--source", source, "--port", "0"]
    words += ["--served-model-name", "m", "--reload-from", folder, "--lora-rank", "8", "--drain", "20"]
    with (folder / "log").open("w", encoding="utf-8") as log:
        server = subprocess.Popen([str(word) for word in words], stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        assert line.startswith("ready "), (folder / "log").read_text(encoding="utf-8")[-3000:]
        yield line.split()[1], server.pid, folder
        server.send_signal(signal.SIGTERM)
        assert server.wait(120) == 0, "the server does not end with code 0"
    finally:
        server.kill()
        server.wait()


@contextlib.contextmanager
def contained(image: str, source: Path, folder: Path) -> Any:
    """The same in a container with no right and nothing to write on but /tmp: (address, process id, `folder` in it)."""
    ours = Path("/policies")
    words = [
        "docker",
        "run",
        "--detach",
        "--rm",
        "--read-only",
        "--tmpfs",
        "/tmp",
        "--cap-drop=ALL",
        "--user",
        "1234:1234",
    ]
    words += ["--security-opt", "no-new-privileges", "--publish", "127.0.0.1::8000", "--env", "OMP_NUM_THREADS=1"]
    words += [
        "--volume",
        f"{source}:/model:ro",
        "--volume",
        f"{folder}:{ours}:ro",
        image,
        "serve",
        "--source",
        "/model",
    ]
    words += ["--host", "0.0.0.0", "--port", "8000", "--served-model-name", "m", "--reload-from", str(ours)]
    words += ["--lora-rank", "8", "--drain", "20"]
    for path in (source, folder, *source.rglob("*"), *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)  # to be read by any user
    name = _docker(*words[1:])
    log = folder / "log"
    try:
        until = time.monotonic() + 900
        while "ready " not in (said := _docker("logs", name)):
            assert time.monotonic() < until, said[-3000:]
            time.sleep(1)
        port = _docker("port", name, "8000/tcp").rpartition(":")[2]
        pid = int(_docker("inspect", "--format", "{{.State.Pid}}", name))
        yield f"http://127.0.0.1:{port}/v1", pid, ours
        log.write_text(_docker("logs", name), encoding="utf-8")
        _docker("kill", "--signal", "TERM", name)
        assert _docker("wait", name) == "0", "the server does not end with code 0"
    finally:
        subprocess.run(["docker", "rm", "--force", name], capture_output=True, check=False)


def _docker(*words: str) -> str:
    done = subprocess.run(["docker", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, f"docker {words[0]}: {done.stdout}"
    return done.stdout.strip()


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="Hugging Face directory to serve; by default a tiny random LLaMA")
    parser.add_argument(
        "--image", help="of infer; its container runs as nobody in particular, read-only; by default no container"
    )
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.relative_to(ROOT)}")
    given = parser.parse_args(words)
    with tempfile.TemporaryDirectory(prefix="hostile-") as place:
        source = given.source
        if source is None:
            from tests.tools.infer.tiny_models import tiny_model

            source = tiny_model("llama", Path(place) / "llama")
        folder = Path(place) / "reload"
        folder.mkdir()
        shutil.copytree(source, folder / "same")
        write_adapter(source, folder / "adapter")
        server = contained(given.image, source, folder) if given.image else serving(source, folder)
        with server as (url, pid, exchanged):
            found = attack(url, pid, given.minutes * 60, seed=given.seed, exchanged=exchanged)
        log = (folder / "log").read_text(encoding="utf-8")
    grown = growth(found.memory)
    grows = grown > GROWTH and given.minutes >= SETTLED
    report = {
        "minutes": given.minutes,
        **({"image": given.image} if given.image else {}),
        "load_average": os.getloadavg(),
        "requests": dict(sorted(found.statuses.items())),
        "known_5xx": dict(sorted(found.known.items())),
        "memory_growth": round(grown, 4),
        "memory_mib": [[at, round(size / 2**20, 1)] for at, size in _thinned(found.memory)],
        "wrong": len(found.wrong),
    }
    print(
        json.dumps({**report, "memory_mib": report["memory_mib"][:: max(1, len(report["memory_mib"]) // 20)]}, indent=1)
    )
    for each in found.wrong[:50]:
        print(f"WRONG {each}")
    if grows:
        print(f"WRONG memory grows by {grown:.1%}")
    if "Traceback" in log:
        print(f"tracebacks in the server's log: {log.count('Traceback')}")
    if given.record:
        path = RECORD.with_name("hostile-image-cpu.json") if given.image else RECORD
        path.write_text(json.dumps(report) + "\n", encoding="utf-8")
    return 1 if found.wrong or grows else 0


def _thinned(memory: Sequence[tuple[float, int]]) -> Sequence[tuple[float, int]]:
    return memory[:: max(1, len(memory) // 120)]


if __name__ == "__main__":
    raise SystemExit(main())
