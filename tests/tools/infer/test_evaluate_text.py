"""`infer evaluate-text`: both engines against transformers in float64, windows written out here."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from shared.data.text_options import TextOptions
from shared.data.text_windows import Document, windows_of
from shared.errors import UserError
from tests.tools.infer.engines.double import EngineDouble
from tools.infer import evaluate_text
from tools.infer.engines.engine import EngineSettings


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    draw = random.Random(1)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "dogs"]
    (folder / "book.txt").write_text(" ".join(draw.choices(words, k=150)))
    rows = [" ".join(draw.choices(words, k=count)) for count in (2, 20)]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return folder


def in_float64(source: Path, text: str, window: int, stride: int) -> float:
    """Nats: each token by the last window that begins early enough, straight from the definition."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64)
    ids = [tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]
    nats, place = 0.0, 1
    while place < len(ids):
        end = min(window if place == 1 else place - 1 + stride, len(ids) - 1)  # the last target
        begin = max(0, end - window)
        with torch.no_grad():
            scores = model(torch.tensor([ids[begin:end]])).logits[0].log_softmax(-1)
        nats -= sum(scores[target - 1 - begin, ids[target]].item() for target in range(place, end + 1))
        place = end + 1
    return nats


@pytest.mark.parametrize(
    ("engine", "flags", "window", "stride"), [("vllm", (), 126, 126), ("hf", ("--window", 40, "--stride", 15), 40, 15)]
)
def test_bits_per_byte_equal_a_float64_computation(engine, flags, window, stride, launcher, models, texts, tmp_path):
    source = models("llama")
    words = ("--source", source, "--text", texts, "--target", tmp_path / "out", "--engine", engine)
    done = launcher("evaluate-text", *words, *flags, "--precision", "fp32")
    assert done.code == 0, done.stderr
    results = json.loads((tmp_path / "out/results.json").read_text())["results"]
    book, rows = (texts / "book.txt").read_text(), [json.loads(line)["text"] for line in (texts / "rows.jsonl").open()]
    for file, documents in {"book.txt": [book], "rows.jsonl": rows}.items():
        nats = sum(in_float64(source, text, window, stride) for text in documents)
        wanted = nats / math.log(2) / sum(len(text.encode()) for text in documents)
        # fp32 log-probabilities carry a relative error of about 1e-6
        assert results[file]["bits_per_byte,none"] == pytest.approx(wanted, rel=2e-5)
        assert f"{file}  {results[file]['bits_per_byte,none']:.6f} bits per byte" in done.stdout


def test_windows_are_those_of_the_harness():
    """With the stride of a whole window; its context_len is what they overlap by, and one."""
    from lm_eval.utils import get_rolling_token_windows

    tokens = list(range(100, 157))
    for window, stride in ((8, 8), (8, 3), (60, 60), (10, 1)):
        theirs = get_rolling_token_windows(tokens, 7, window, window - stride + 1)
        document = Document(file="a", number=0, text="", tokens=tokens)
        assert [(each.inputs, each.targets) for each in windows_of([document], 7, window, stride)] == list(theirs)


def test_a_window_beyond_the_context_is_refused(models, texts, monkeypatch, tmp_path):
    from shared.cli import invoked

    monkeypatch.setattr(evaluate_text, "open_engine", EngineDouble().open)
    with (
        invoked("infer", "evaluate-text", {}),
        pytest.raises(UserError, match="--window 63: the model's context of 64"),
    ):
        options = TextOptions(text=(texts,), target=tmp_path / "out", window=63)
        evaluate_text.run(models("llama"), options, settings=EngineSettings())
    assert not (tmp_path / "out").exists()
