"""`infer bench` against a server whose times are known, and its refusals. test_rollouts.py has it against an engine."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from shared.errors import UserError
from shared.invocation import invoked
from tools.infer.bench import Load, find, run
from tools.infer.bench_report import page, table

FIRST, LATER, STEPS = 0.2, 0.05, 5  # seconds to the first token and to each later one; tokens
KEY = "of-ours"


class Timed(BaseHTTPRequestHandler):
    """Streams a reply of STEPS tokens at known times."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if self.headers.get("Authorization") != f"Bearer {KEY}":
            return self.answer(401, {"error": {}})
        if self.path == "/v1/models":
            return self.answer(200, {"data": [{"id": "m", "max_model_len": 64}, {"id": "other"}]})
        return self.answer(404, {})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/completions":
            return self.answer(404, {})  # no /tokenize
        server = self.server
        with server.one:
            server.seen.append((self.headers.get("Authorization"), body))
            server.now += 1
            server.most.append(server.now)
            failing = server.fails
        if failing:
            with server.one:
                server.now -= 1
            return self.answer(500, {})
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for step in range(STEPS):
            time.sleep(LATER if step else FIRST)
            self.event(json.dumps({"choices": [{"text": "x"}]}))
        with server.one:  # the client may send the next one from here on
            server.now -= 1
        self.event(json.dumps({"choices": [], "usage": {"completion_tokens": STEPS, "prompt_tokens": 8}}))
        self.event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")
        return None

    def event(self, text):
        data = f"data: {text}\n\n".encode()
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def answer(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *words):
        pass


@pytest.fixture
def timed():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Timed)
    server.one, server.seen, server.now, server.most, server.fails = threading.Lock(), [], 0, [], False
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def keys(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"{KEY}\n")
    return path


def test_it_measures_the_times_of_a_server_that_are_known(launcher, models, timed, keys, tmp_path):
    words = ["--source", models("llama"), "--target", tmp_path / "out", "--api-key-file", keys]
    words += ["--concurrency", "4,1", "--requests", 4, "--input-tokens", 8, "--output-tokens", STEPS]
    done = launcher("bench", timed.url, *words)
    assert done.code == 0, done.stderr
    report = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert report["server"] == {"url": timed.url, "model": "m"}
    assert report["load"] == {"requests": 4, "input_tokens": 8, "output_tokens": STEPS, "seed": 0}
    assert [each["concurrency"] for each in report["runs"]] == [1, 4]
    whole = FIRST + (STEPS - 1) * LATER
    for each, rounds in zip(report["runs"], (4, 1), strict=True):
        # A sleep is at least as long as asked for. Above: what a busy machine adds.
        for name, known in (("ttft", FIRST), ("tpot", LATER), ("itl", LATER), ("e2el", whole)):
            found = each[f"{name}_ms"]
            for kind in ("mean", "p50"):
                assert 0.9 * known * 1e3 < found[kind] < 1.9 * known * 1e3, (name, kind, each)
            assert found["p50"] <= found["p99"]
        assert (each["requests"], each["input_tokens"], each["output_tokens"]) == (4, 32, 4 * STEPS)
        assert rounds * whole < each["seconds"] < 2 * rounds * whole
        assert each["requests_per_second"] == pytest.approx(4 / each["seconds"], rel=1e-3)
        assert each["output_tokens_per_second"] == pytest.approx(4 * STEPS / each["seconds"], rel=1e-2)
        assert each["total_tokens_per_second"] == pytest.approx((4 * STEPS + 32) / each["seconds"], rel=1e-2)

    # as many before a run as it has at once; the servers sees no more than asked for at once
    assert len(timed.seen) == 1 + 4 + 4 + 4
    assert max(timed.most[:5]) == 1
    assert max(timed.most[5:]) == 4
    assert {key for key, _ in timed.seen} == {f"Bearer {KEY}"}
    bodies = [body for _, body in timed.seen]
    assert all((body["model"], body["max_tokens"], body["ignore_eos"], body["temperature"]) == ("m", STEPS, True, 0)
               for body in bodies)  # fmt: skip
    assert len({body["prompt"] for body in bodies}) == 4, "both runs have the same four prompts"
    assert sorted(Counter(body["cache_salt"] for body in bodies).values()) == [5, 8], "one prefix cache for both runs"

    html = (tmp_path / "out" / "report.html").read_text()
    assert html.count("<figure>") == 5
    assert "over concurrency" in html
    assert "over updates" not in html
    assert done.stdout == table(report["runs"]) + "\n"
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["kind"] == "result"
    assert manifest["facts"]["metrics"]["4"] == report["runs"][1]
    assert KEY not in html + json.dumps(report) + json.dumps(manifest)


def test_a_request_that_fails_is_no_measurement(launcher, models, timed, keys, tmp_path):
    timed.fails = True
    words = ["--source", models("llama"), "--target", tmp_path / "out", "--api-key-file", keys]
    done = launcher("bench", timed.url, *words, "--concurrency", 2, "--requests", 3, "--input-tokens", 8,
                    "--output-tokens", 2)  # fmt: skip
    assert done.code == 1, done.stderr
    assert done.stderr.splitlines()[-1].endswith("3 of 3 requests failed at concurrency 2: Internal Server Error")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"api_key_file": None}, "--url URL needs a key: give --api-key-file"),
        ({"model": "third"}, "--model third: the server at URL does not serve it; it serves: m, other"),
        ({"concurrency": (1, 5)}, "--concurrency 5 is above --requests 4: no run would reach it"),
        ({"load": Load(requests=4, input_tokens=60, output_tokens=5, seed=0)}, "the server's context is 64 tokens"),
        ({"url": "http://127.0.0.1:1"}, "--url http://127.0.0.1:1: Connection refused"),
        ({"url": "127.0.0.1:8000"}, "--url 127.0.0.1:8000 is not an address"),
    ],
)
def test_what_cannot_be_measured_is_refused(models, timed, keys, tmp_path, change, message):
    load = Load(requests=4, input_tokens=8, output_tokens=2, seed=0)
    asked = {"url": timed.url, "concurrency": (1,), "load": load, "model": None, "api_key_file": keys} | change
    with invoked("infer", "bench", {}), pytest.raises(UserError) as refused:
        run(source=models("llama"), target=tmp_path / "out", overwrite=False, **asked)
    assert message.replace("URL", timed.url) in str(refused.value)
    assert not (tmp_path / "out").exists()
    assert timed.seen == []


def test_a_server_of_another_kind_is_refused(timed, monkeypatch):
    monkeypatch.setattr(Timed, "do_GET", lambda self: self.answer(200, ["no models"]))
    with pytest.raises(UserError, match="is not a list of models"):
        find(timed.url, None, None)
    monkeypatch.setattr(Timed, "do_GET", lambda self: self.answer(503, {}))
    with pytest.raises(UserError, match="answers with status 503"):
        find(timed.url, None, None)


def test_the_page_draws_each_latency_over_concurrency():
    latency = {"mean": 2.0, "p50": 1.5, "p99": 9.25}
    names = ("ttft_ms", "tpot_ms", "itl_ms", "e2el_ms")
    speeds = {"requests_per_second": 3.0, "output_tokens_per_second": 30.0, "total_tokens_per_second": 90.0}
    runs = [{"concurrency": level, **speeds, **dict.fromkeys(names, latency)} for level in (1, 16)]
    load = {"requests": 10, "input_tokens": 20, "output_tokens": 10}
    report = {"server": {"url": "http://x", "model": "<m>"}, "load": load, "client": "vllm 1", "runs": runs}
    drawn = page(report)
    assert drawn.count("<polyline") == 2 * 5
    assert "infer bench: &lt;m&gt;" in drawn
    assert drawn.count("<b>9.25</b>") == 4
    first, *rows = table(runs).splitlines()
    assert first.split()[0] == "concurrency"
    assert rows[1].split() == ["16", "3.00", "30.0", *["1.5", "9.2"] * 3]
