"""Requests to servers: dealt in turn, asked again, and given up with the server's address."""

import socket
import time

import pytest

from shared.errors import StageError, UserError
from tests.tools.rlhf.rollout.rollout_server import serving
from tools.rlhf.rollout import servers
from tools.rlhf.rollout.servers import Servers, base_of, read_key


def request(seed, tokens=4):
    return {
        "model": "policy", "prompt": [5, 6, 7], "max_tokens": tokens, "temperature": 5.0, "top_p": 1.0, "top_k": 0,
        "seed": seed, "logprobs": 0, "return_token_ids": True, "ignore_eos": True, "stop_token_ids": [1],
    }  # fmt: skip


def of(*running, timeout=20.0, key=None):
    return Servers(addresses=tuple(server.url for server in running), timeout=timeout, key=key)


def nobody():
    """An address where nobody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_an_address_is_one_with_or_without_v1():
    assert {base_of(f"http://host:8000{end}") for end in ("", "/", "/v1", "/v1/")} == {"http://host:8000/v1"}


def test_a_server_says_its_model_context_and_precision(server):
    server.max_model_len = 64
    (said,) = of(server).describe()
    assert (said.model, said.max_model_len, said.precision) == ("policy", 64, "fp32")
    assert of(server).versions() == ["default"]


def test_requests_are_dealt_in_turn_and_answered_in_order(server, world):
    with serving(world.policy) as other:
        both = of(server, other)
        choices = both.complete([request(seed) for seed in range(5)])
        assert sorted(r["seed"] for r in server.requests) == [0, 2, 4]
        assert sorted(r["seed"] for r in other.requests) == [1, 3]
    alone = of(server).complete([request(seed) for seed in range(5)])
    assert [c["token_ids"] for c in choices] == [c["token_ids"] for c in alone]
    assert len({tuple(c["token_ids"]) for c in choices}) == 5


def test_an_aborted_reply_is_asked_for_again_with_its_seed(server, impatient):
    left = [2]

    def abort(choice):
        if left[0]:
            left[0] -= 1
            choice["finish_reason"] = "abort"

    server.answer = abort
    (choice,) = of(server).complete([request(3)])
    assert choice["token_ids"]
    assert [r["seed"] for r in server.requests] == [3, 3, 3]
    server.answer = lambda choice: choice.update(finish_reason="abort")
    with pytest.raises(StageError, match=f"{server.url} breaks off every reply"):
        of(server).complete([request(3)])


def test_a_server_may_be_away_for_a_while(server, impatient):
    server.failing = 503
    began = time.monotonic()

    def back(body):
        raise AssertionError("not while it fails")

    server.before = back
    import threading

    def mend():
        server.failing, server.before = None, lambda body: None

    threading.Timer(0.4, mend).start()
    (choice,) = of(server).complete([request(1)])
    assert choice["token_ids"]
    assert time.monotonic() - began > 0.4


def test_a_server_that_is_away_is_named(server, impatient):
    for address in (nobody(), server.url):
        server.failing = 500
        gone = Servers(addresses=(address,), timeout=20.0)
        began = time.monotonic()
        with pytest.raises(StageError, match=f"{address} has not answered .* the last saved state is kept"):
            gone.complete([request(1)])
        assert time.monotonic() - began < 2 * servers.PATIENCE
        with pytest.raises(UserError, match=address):
            gone.describe()


def test_a_server_that_hangs_is_named_long_before_the_time_limit(server, impatient):
    """Its connections stay open, as those of a stopped process do."""
    server.dumb = True
    for call in (lambda: of(server, timeout=60.0).complete([request(1)]), of(server, timeout=60.0).versions):
        began = time.monotonic()
        with pytest.raises(StageError, match=f"{server.url} has not answered"):
            call()
    assert time.monotonic() - began < 2 * (servers.PATIENCE + servers.PROBE_TIMEOUT + servers.PROBE_EVERY)


def test_replies_have_a_time_limit(server):
    server.before = lambda body: time.sleep(1.0)
    with pytest.raises(StageError, match=f"{server.url} took longer than --rollout-timeout 0.3 s"):
        of(server, timeout=0.3).complete([request(1)])


def test_what_a_server_refuses_is_said_in_its_words(server, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(server.directory / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(StageError, match="lacks model.norm.weight"):
        of(server).publish(tmp_path, "one", to=[server.url])
    server.key = "secret"
    with pytest.raises(UserError, match="--rollout-key-file"):
        of(server).describe()
    assert of(server, key="secret").versions() == ["default"]


def test_another_server_is_not_taken_for_one(server):
    server.get = lambda path: (404, {})
    with pytest.raises(UserError, match="takes no policy; start the server with `infer rollouts`"):
        of(server).describe()


def test_a_key_is_the_first_line(tmp_path):
    file = tmp_path / "key"
    file.write_text("\n  one  \ntwo\n")
    assert read_key(file) == "one"
    for content in ("", "kéy\n"):
        file.write_text(content)
        with pytest.raises(UserError, match="--rollout-key-file"):
            read_key(file)
