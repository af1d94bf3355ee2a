"""`infer rollouts` as a trainer uses it: sampled tokens, their log-probabilities, and the version of the policy."""

from __future__ import annotations

import json
import re
import shutil
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.hostile.hostile import attack
from tests.tools.infer.broadcasting import broadcast
from tests.tools.infer.http_server import Server, call

TEMPERATURE = 0.7
TOLERANCE = 2e-5  # transformers and vLLM add in other orders, both in fp32, in 2 layers
PROMPT = [5, 9, 33, 70]
SECONDS = 12  # of hostile requests; test_served_adapters.py has as many, with an operator


@pytest.fixture(scope="module")
def first(models, tmp_path_factory):
    """The first policy; its generation_config.json would have every token be the likeliest one."""
    path = shutil.copytree(models("llama"), tmp_path_factory.mktemp("first") / "model")
    weights = load_file(path / "model.safetensors")
    weights["lm_head.weight"] *= 0.2  # so that other tokens are likely, too
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((path / "generation_config.json").read_text())
    settings |= {"do_sample": True, "top_k": 1, "temperature": 0.1, "repetition_penalty": 2.0, "max_new_tokens": 2}
    (path / "generation_config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    return tmp_path_factory.mktemp("policies")


@pytest.fixture(scope="module")
def server(launcher, first, policies):
    server = Server(launcher, "rollouts", "--source", first, "--policies", policies, "--broadcasts", "--port", 0)
    yield server
    done = server.stop()
    assert done.code == 0, done.stderr
    assert "Traceback" not in done.stderr


def reply(server, seed):
    """Tokens and their log-probabilities."""
    choice = server.completion(
        model="policy", prompt=PROMPT, temperature=TEMPERATURE, seed=seed, ignore_eos=True, max_tokens=16
    )
    return choice["token_ids"], choice["logprobs"]["token_logprobs"]


def gap(path, tokens, said):
    """Largest difference of log-probabilities from those of transformers."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT + tokens])).logits[0, len(PROMPT) - 1 : -1]
    known = (logits / TEMPERATURE).log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]
    return float((known - torch.tensor(said)).abs().max())


def test_replies_are_of_the_whole_distribution_and_of_their_seeds(server, first):
    with ThreadPoolExecutor(8) as together:
        replies = list(together.map(lambda seed: reply(server, seed), range(8)))
    assert len({tuple(tokens) for tokens, _ in replies}) == 8
    assert all(len(tokens) == 16 for tokens, _ in replies)
    assert max(gap(first, *each) for each in replies) < TOLERANCE
    assert reply(server, 5)[0] == replies[5][0], "a reply depends on its batch"


def test_a_published_policy_is_the_one_that_answers(server, first, policies):
    url = f"{server.url}/policy"
    assert call(url) == (200, {"version": "default", "path": str(first), "precision": "fp32"})
    weights = load_file(first / "model.safetensors")
    for step in (1, 2):
        folder = policies / f"step-{step}"
        folder.mkdir()
        changed = {name: tensor * (1 + step / 4) for name, tensor in weights.items()}
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})  # weights alone
        status, answer = call(url, {"path": str(folder), "version": f"run-{step}"})
        assert (status, answer["version"]) == (200, f"run-{step}")
        assert call(url) == (200, answer)
        whole = shutil.copytree(first, policies.parent / f"whole-{step}")
        shutil.copy(folder / "model.safetensors", whole / "model.safetensors")
        shutil.rmtree(folder)  # a trainer removes what has been taken
        answered = reply(server, 1)
        assert gap(whole, *answered) < TOLERANCE
        assert gap(first, *answered) > 100 * TOLERANCE, "the same as before"

    last = reply(server, 2)
    broken = policies / "broken"
    broken.mkdir()
    del weights["lm_head.weight"]
    save_file(weights, broken / "model.safetensors")
    for path, wanted, message in (
        (broken, 409, "lacks lm_head.weight"),
        (policies / "absent", 409, "is not a directory"),
        (first, 403, f"is not below {policies}"),
    ):
        status, answer = call(url, {"path": str(path), "version": "bad"})
        assert (status, message in answer["error"]["message"]) == (wanted, True), answer
        assert call(url)[1]["version"] == "run-2"
        assert reply(server, 2) == last
    assert call(url, {"path": str(broken)})[0] == 400, "a publication without a version"


def test_a_broadcast_policy_answers_as_the_published_one_to_the_bit(server, first, policies):
    url, long = f"{server.url}/policy", [7, *range(3, 60)]  # the prefix cache keeps full blocks
    folder = policies / "same"
    folder.mkdir()
    changed = {name: tensor * 1.5 for name, tensor in load_file(first / "model.safetensors").items()}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    assert call(url, {"path": str(folder), "version": "directory"})[0] == 200

    def answers():
        greedy = server.completion(model="policy", prompt=long)
        return reply(server, 1), greedy["token_ids"], greedy["logprobs"]["token_logprobs"]

    wanted = answers()
    others = {name: tensor * 0.5 for name, tensor in changed.items()}
    status, answer = broadcast(others, lambda body: call(url, body))
    assert (status, answer["version"], answer["path"]) == (200, "sent", "broadcast of 127.0.0.1")
    assert answers() != wanted
    assert broadcast(changed, lambda body: call(url, body))[0] == 200
    assert answers() == wanted
    faulty = others | {"model.norm.weight": others["model.norm.weight"] * float("nan")}
    lacking = {name: tensor for name, tensor in others.items() if name != "model.norm.weight"}
    assert broadcast(faulty, lambda body: call(url, body))[0] == 409
    assert broadcast(lacking, lambda body: call(url, body))[0] == 409
    assert broadcast(others, lambda body: call(url, body), killed_after=3)[0] == 424
    assert call(url)[1]["version"] == "sent"
    assert answers() == wanted


def totals(server):
    """The server's own counters of prompt tokens, generated tokens and requests."""
    with urllib.request.urlopen(server.url.removesuffix("/v1") + "/metrics", timeout=60) as answer:
        text = answer.read().decode()

    def total(name):
        return sum(float(value) for value in re.findall(rf"^vllm:{name}{{[^}}]*}} (\S+)$", text, re.MULTILINE))

    return [total("prompt_tokens_total"), total("generation_tokens_total"), total("request_success_total")]


def test_a_benchmark_counts_what_the_server_counts(server, launcher, first, tmp_path):
    words = ["--source", first, "--target", tmp_path / "bench", "--concurrency", 4, "--requests", 12]
    before = totals(server)
    done = launcher("bench", server.url, *words, "--input-tokens", 24, "--output-tokens", 16)
    assert done.code == 0, done.stderr
    (run,) = json.loads((tmp_path / "bench" / "bench.json").read_text())["runs"]
    assert (run["requests"], run["input_tokens"], run["output_tokens"]) == (12, 12 * 24, 12 * 16)
    counted = [now - then for now, then in zip(totals(server), before, strict=True)]
    assert counted == [16 * 24, 16 * 16, 16]  # and the four requests before the run
    assert 0 < run["ttft_ms"]["p50"] <= run["ttft_ms"]["p99"] <= run["e2el_ms"]["p99"]


def test_hostile_requests_are_answered(server):
    """`make test-hostile` is the same to `infer serve` for 30 minutes, with its memory."""
    found = attack(server.url, server.pid, SECONDS)
    assert found.wrong == []
    assert found.statuses["ordinary"] > 20
    assert found.statuses.total() > 100
    assert any(status.startswith("4") for status in found.statuses)


def test_flags_that_change_the_distribution_are_refused(launcher, first, policies):
    words = ("rollouts", "--source", first, "--policies", policies, "--port", 0, "--", "--generation-config", "auto")
    done = launcher(*words)
    assert (done.code, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "after --: --generation-config is set by infer itself here; leave it out" in done.stderr
    done = launcher("rollouts", "--source", first, "--port", 0)
    assert (done.code, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "--policies: give the folder below which the trainer publishes, or --broadcasts" in done.stderr
