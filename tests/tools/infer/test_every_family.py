"""Exports of every family: greedy tokens and log-probabilities in vLLM against those of the original in transformers.

For a size of each family also those of our engine on transformers, and what `infer generate` does where vLLM lacks the model.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.families import registry

ROOT = Path(__file__).resolve().parents[3]
CHOSEN = os.environ.get("FAMILIES", "").split()  # as for convert's tests of families; empty: all of them
# `to-hf --family`: for these families the way into vLLM.
AS_ANOTHER = (
    *("yi-tiny=llama", "internlm-tiny=llama", "internlm2-tiny=llama", "baichuan-tiny=llama", "baichuan2-tiny=llama"),
    "qwen-tiny=qwen2",
)
SIZES = [
    name
    for name in (*registry.sizes(), *AS_ANOTHER)
    if "tiny" in name and (not CHOSEN or registry.sizes()[name.partition("=")[0]].family in CHOSEN)
]
# Of log-probabilities, relative to their standard deviation: fp32 sums in another order, as in `convert verify`.
TOLERANCE = 1e-4
# Families that vLLM computes differently, with the tolerance for it.
OTHERWISE = {"bloom": (2e-3, "vLLM computes GELU by the error function, where BLOOM has the approximation by tanh")}
# bf16 only in vLLM: its RMS difference from fp32 may be this multiple of that of transformers in bf16.
ROUNDED = 1.5
# Sizes whose weights are also exchanged while the engine runs: MoE, MLA, QKV fused in three ways, tied embeddings.
# BATON_EXCHANGE=all for every size.
EXCHANGED = {
    *("mixtral-tiny", "deepseek-v3-tiny", "phi3-tiny", "chatglm2-tiny", "bloom-tiny", "gemma2-tiny"),
}
NOT_EXCHANGED = {"qwen3-next-tiny", "qwen3-next-tiny-mixed", "gpt-oss-tiny"}  # `check_exchange` refuses them
# The first tiny size of each family: compared in our engine on transformers, too.
FIRST = {registry.sizes()[name].family: name for name in reversed([name for name in SIZES if "=" not in name])}
REFUSED = {"qwen2-tiny-window": "Sliding window for some but all layers is not supported"}  # in vLLM's words


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an export of each size."""
    folder = tmp_path_factory.mktemp("exports")
    python, worker = ROOT / "tools/convert/.venv/bin/python", Path(__file__).with_name("family_exports.py")
    subprocess.run([python, worker, folder, *SIZES], check=True, cwd=ROOT)
    return folder


@pytest.mark.parametrize("size", SIZES)
def test_exports_continue_in_vllm_as_in_transformers(
    size: str, exports: Path, launcher: Callable[..., Any], proof: Any
) -> None:
    name, _, family = size.partition("=")
    with proof("vllm" if not family else f"vllm as {family}", size=name) as figures:
        exchange = size not in NOT_EXCHANGED and (size in EXCHANGED or os.environ.get("BATON_EXCHANGE") == "all")
        words = ("exchange",) * exchange + ("engine",) * (size in FIRST.values())
        done = launcher(Path(__file__).with_name("family_worker.py"), exports / size, *words)
        said = done.stderr.strip().splitlines()
        assert done.code == 0, "\n".join([*said[-1:], *said[-60:]])
        answer = json.loads((exports / f"{size}.json").read_text())
        assert not (family and "lacking" in answer)
        if "lacking" in answer:
            if "generate" in answer:
                assert (
                    "engine: transformers, which generates one sequence at a time, since vLLM does not run"
                    in done.stderr
                )
                check_greedy(answer["generate"], answer["transformers"])
            pytest.skip(answer["lacking"])
        if size in REFUSED:
            assert REFUSED[size] in answer["refused"]
            pytest.skip(answer["refused"])
        assert "refused" not in answer, answer["refused"]
        ours, theirs = answer["vllm"], answer["transformers"]
        if "engine" in answer:
            check_greedy(answer["engine"], theirs)
        spread = statistics.stdev(theirs["log_probabilities"])
        assert spread > 0.1  # so that a misplaced row changes the log-probabilities
        figures["precision"] = answer["precision"]
        if answer["precision"] == "bf16":
            figures["log_probabilities"] = root_mean_square(differences(ours, theirs)) / spread
            rounded = root_mean_square(differences(answer["rounded"], theirs)) / spread
            assert figures["log_probabilities"] < ROUNDED * rounded
            check_rounded(ours["tokens"], theirs, max(differences(answer["rounded"], theirs)))
            return
        tolerance, otherwise = OTHERWISE.get(registry.sizes()[name].family, (TOLERANCE, ""))
        figures |= {"reason": otherwise} if otherwise else {}
        figures |= {"log_probabilities": max(differences(ours, theirs)) / spread, "tokens": len(ours["tokens"])}
        assert figures["log_probabilities"] < tolerance
        assert ours["tokens"] == theirs["tokens"]
        if exchange:
            assert ours["again"]["log_probabilities"] == ours["log_probabilities"], "not those of a fresh engine"
            assert ours["again"]["tokens"] == ours["tokens"]
            other = statistics.stdev(answer["other"]["log_probabilities"])
            assert max(differences(ours["other"], answer["other"])) / other < tolerance
            assert ours["other"]["tokens"] == answer["other"]["tokens"]
            assert max(differences(ours["other"], ours)) > 0.1 * other, "the weights are the old ones"
        if "seen" in theirs:  # log-probabilities behind an image depend on its pixels
            pairs = zip(ours["seen"], theirs["seen"], strict=True)
            figures["seen"] = max(abs(one - two) for one, two in pairs) / spread
            assert figures["seen"] < tolerance
            assert max(abs(a - b) for a, b in zip(theirs["seen"], theirs["unseen"], strict=True)) > 0.1 * spread


def check_greedy(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Our engines stop at the model's end token, where the comparison goes on."""
    found, wanted = ours["tokens"], theirs["tokens"]
    assert found == wanted[: len(found)]
    assert ours["finish_reason"] == ("length" if len(found) == len(wanted) else "stop")
    assert found


def check_rounded(found: list[int], theirs: dict[str, Any], rounding: float) -> None:
    """Greedy tokens in bf16 are those in fp32, up to a place where two tokens are as likely within rounding.

    `rounding`: the largest difference of a log-probability of transformers in bf16; both tokens have one.
    """
    for token, wanted, likely in zip(found, theirs["tokens"], theirs["likely"], strict=True):
        if token != wanted:
            assert str(token) in likely, "not among the likely ones"
            assert likely[str(wanted)] - likely[str(token)] < 2 * rounding
            return


def differences(some: dict[str, Any], other: dict[str, Any]) -> list[float]:
    """Absolute differences of the log-probabilities of each given token."""
    pairs = zip(some["log_probabilities"], other["log_probabilities"], strict=True)
    return [abs(one - two) for one, two in pairs]


def root_mean_square(values: list[float]) -> float:
    return statistics.fmean(value * value for value in values) ** 0.5
