"""`infer rollouts` as a trainer uses it: sampled tokens, their log-probabilities, and the version of the policy."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.checkpoint.formats.weights_digest import weights_digest
from tests.hostile.hostile import LEAST, attack
from tests.tools.infer.adapters import make_adapter, merged_into, restamped
from tests.tools.infer.broadcasting import broadcast
from tests.tools.infer.http_server import Server, call

ROOT = Path(__file__).resolve().parents[3]
TEMPERATURE = 0.7
TOLERANCE = 2e-5  # transformers and vLLM add in other orders, both in fp32, in 2 layers
PROMPT = [5, 9, 33, 70]
SECONDS = 20  # of hostile requests; test_served_adapters.py has some, too, beside an operator


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
    assert found.random >= LEAST
    assert any(status.startswith("4") for status in found.statuses)


@pytest.fixture(scope="module")
def of_adapters(launcher, first, policies):
    """A server that takes adapters."""
    words = ("--source", first, "--policies", policies, "--lora-rank", 8, "--port", 0)
    server = Server(launcher, "rollouts", *words)
    yield server
    done = server.stop()
    assert done.code == 0, done.stderr
    assert "Traceback" not in done.stderr


def continued(server, name):
    choice = server.completion(model=name, prompt=PROMPT, ignore_eos=True, max_tokens=16)
    return choice["token_ids"], choice["logprobs"]["token_logprobs"]


def test_an_adapter_answers_under_its_version_as_the_merged_policy_does(of_adapters, server, first, policies):
    url, base = f"{of_adapters.url}/policy", weights_digest(first)
    start = {
        "version": "default",
        "path": str(first),
        "precision": "fp32",
        "model": "policy",
        "lora_rank": 8,
        "base": base,
    }
    assert call(url) == (200, start)
    assert continued(of_adapters, "policy") == continued(of_adapters, "policy")
    unadapted, said = continued(of_adapters, "policy"), {}
    for version in ("run-1", "run-2", "run-3"):
        folder = make_adapter(policies / version, first, version=version, seed=int(version[-1]))
        body = {"adapter": str(folder), "version": version}
        status, answer = call(url, body)
        assert (status, answer) == (200, start | {"version": version, "path": str(folder), "model": version})
        assert call(url, body) == (200, answer), "a publication whose answer was lost"
        merged = merged_into(shutil.copytree(first, policies / f"merged-{version}"), folder)
        assert call(f"{server.url}/policy", {"path": str(merged), "version": f"merged-{version}"})[0] == 200
        said[version] = continued(of_adapters, version)
        tokens, log_probs = continued(server, "policy")
        assert said[version][0] == tokens != unadapted[0]
        assert said[version][1] == pytest.approx(log_probs, abs=TOLERANCE)
        sampled = of_adapters.completion(
            model=version, prompt=PROMPT, temperature=TEMPERATURE, seed=3, ignore_eos=True, max_tokens=16
        )
        assert gap(merged, sampled["token_ids"], sampled["logprobs"]["token_logprobs"]) < TOLERANCE
        shutil.rmtree(folder)  # a trainer removes what has been taken
        assert {model["id"] for model in call(f"{of_adapters.url}/models")[1]["data"]} == {"policy", version}
    assert len({tuple(tokens) for tokens, _ in said.values()}) == 3
    for gone in ("run-1", "run-2", "run-4"):
        status, answer = call(f"{of_adapters.url}/completions", {"model": gone, "prompt": PROMPT, "max_tokens": 1})
        assert (status, f"`{gone}` does not exist" in answer["error"]["message"]) == (404, True)
    assert continued(of_adapters, "policy") == unadapted

    whole = make_adapter(policies / "whole", first, version="run-4", seed=4)
    other = make_adapter(policies / "other", first, version="run-3", seed=5)
    wide = make_adapter(policies / "wide", first, version="run-4", seed=4, rank=16)
    b = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    a = b.replace("lora_B", "lora_A")
    for fault, asked, wanted, message in (
        (restamped(whole, "half", drop=[b]), "run-4", 409, "model.layers.1.mlp.up_proj has no lora_B"),
        (restamped(whole, "none", drop=[a, b]), "run-4", 409, "lacks the tensors of model.layers.1.mlp.up_proj"),
        (restamped(whole, "nan", nan=b), "run-4", 409, f"{b} has numbers that are NaN"),
        (restamped(whole, "stale", version="run-3"), "run-4", 409, "is of version run-3, and was published as run-4"),
        (restamped(whole, "based", base="0" * 32), "run-4", 409, "was trained on another base than this server's"),
        (wide, "run-4", 409, "has rank 16, and this server has room for 8"),
        (other, "run-3", 409, "differs from the one that was published as run-3"),
        (restamped(whole, "named", version="policy"), "policy", 409, "conflicts with a served base model"),
        (policies / "absent", "run-4", 409, "is not a directory"),
        (first, "run-4", 403, f"is not below {policies}"),
    ):
        status, answer = call(url, {"adapter": str(fault), "version": asked})
        assert (status, message in answer["error"]["message"]) == (wanted, True), answer
        assert call(url)[1]["version"] == "run-3"
        assert continued(of_adapters, "run-3") == said["run-3"]
    status, answer = call(url, {"path": str(policies / "merged-run-1"), "version": "run-4"})
    assert (status, answer["error"]["message"][:34]) == (403, "this server takes adapters alone; ")
    status, answer = call(f"{server.url}/policy", {"adapter": str(whole), "version": "run-4"})
    assert (status, answer["error"]["message"][:28]) == (403, "this server takes no adapter")


def test_requests_in_flight_end_with_the_version_that_they_began_with(of_adapters, first, policies):
    url = f"{of_adapters.url}/policy"
    for number in (7, 8):
        make_adapter(policies / f"run-{number}", first, version=f"run-{number}", seed=number)
    assert call(url, {"adapter": str(policies / "run-7"), "version": "run-7"})[0] == 200

    asked = {"prompt": PROMPT, "max_tokens": 60, "ignore_eos": True, "temperature": 0, "return_token_ids": True}
    tokens: list[int] = []

    def stream():
        body = json.dumps(asked | {"model": "run-7", "stream": True}).encode()
        request = urllib.request.Request(f"{of_adapters.url}/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            for line in answer:
                if line.startswith(b"data: {"):
                    tokens.extend(json.loads(line[6:])["choices"][0]["token_ids"])

    alone = of_adapters.completion(model="run-7", **asked)["token_ids"]
    with ThreadPoolExecutor(1) as beside:
        running = beside.submit(stream)
        while len(tokens) < 3:
            assert not running.done(), running.result()
            time.sleep(0.001)
        assert call(url, {"adapter": str(policies / "run-8"), "version": "run-8"})[0] == 200
        assert len(tokens) == 60, "it was answered while a request of the one before was computed"
        running.result()
    assert tokens == alone
    assert call(f"{of_adapters.url}/completions", asked | {"model": "run-7"})[0] == 404
    assert of_adapters.completion(model="run-8", **asked)["token_ids"] != alone


def test_a_trainer_of_an_adapter_agrees_with_the_server(of_adapters, first, policies, tmp_path):
    """`rlhf rloo --lora-rank --publish-by adapter`, in its own environment, three updates."""
    starts = ("The quick", "brown fox", "def f", "return x")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": start}) + "\n" for start in starts))
    reward = "def short(prompts, completions, **columns):\n    return [-len(text) / 10 for text in completions]\n"
    (tmp_path / "reward.py").write_text(reward)
    before = {path.name for path in policies.iterdir()}
    words = ["rloo", "--source", first, "--prompts", tmp_path / "prompts.jsonl", "--target", tmp_path / "trained"]
    words += ["--reward", f"py:{tmp_path / 'reward.py'}:short", "--steps", 3, "--generations", 4, "--max-new-tokens", 8]
    words += ["--global-batch-size", 8, "--micro-batch-size", 8, "--precision", "fp32", "--temperature", TEMPERATURE]
    words += ["--learning-rate", 1e-2, "--lora-rank", 4, "--publish-by", "adapter", "--policies", policies]
    command = [ROOT / "tools/rlhf/.venv/bin/rlhf", *map(str, words), "--rollouts", of_adapters.url]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "trained" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    assert max(row["log_prob_gap"] for row in rows) < 1e-5  # fp32, two programs
    said = call(f"{of_adapters.url}/policy")[1]
    assert said["version"] == said["model"]
    assert re.fullmatch(r"trained-[0-9a-f]{8}-[0-9a-f]{8}-2", said["version"])
    assert {path.name for path in policies.iterdir()} == before
    assert continued(of_adapters, said["version"])[1] != continued(of_adapters, "policy")[1]


def test_flags_that_change_the_distribution_are_refused(launcher, first, policies):
    words = ("rollouts", "--source", first, "--policies", policies, "--port", 0, "--", "--generation-config", "auto")
    done = launcher(*words)
    assert (done.code, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "after --: --generation-config is set by infer itself here; leave it out" in done.stderr
    done = launcher("rollouts", "--source", first, "--port", 0)
    assert (done.code, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "--policies: give the folder below which the trainer publishes, or --broadcasts" in done.stderr
