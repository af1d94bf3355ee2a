"""`pretrain evaluate-text`: one process against logits in float64, and every layout against one process."""

import json
import math
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from shared.data.text_windows import Document, windows_of
from tests import training_runs
from tests.tools.pretrain.runs import MODEL, MOE, tool
from tests.workers import results_of

WORDS = [f"w{number}" for number in range(290)]
WORKER = Path(__file__).with_name("text_worker.py")


@pytest.fixture(scope="module")
def directory(source, tmp_path_factory) -> Path:
    """A Megatron directory `model` with a tokenizer of words, and texts."""
    directory = tmp_path_factory.mktemp("text")
    (directory / "model").mkdir()
    for path in source.iterdir():
        if path.name != "hf":
            (directory / "model" / path.name).symlink_to(path)
    (directory / "model" / "hf").mkdir()
    (directory / "model" / "hf" / "config.json").write_bytes((source / "hf" / "config.json").read_bytes())
    words = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(["<eos>", *WORDS])}, unk_token="<eos>")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>").save_pretrained(directory / "model" / "hf")
    (directory / "long.txt").write_text(" ".join(WORDS[number * 7 % 290] for number in range(130)))
    (directory / "rows.jsonl").write_text('{"text": "w1 w2 w9"}\n{"text": "w5"}\n')
    return directory


def evaluated(directory: Path, target: Path, **options) -> int:
    options = {"source": directory / "model", "text": f"{directory}/long.txt,{directory}/rows.jsonl", **options}
    return training_runs.exit_code(tool, training_runs.words("evaluate-text", target=target, **options))


def tokens_of(text: str) -> list[int]:
    return [int(word[1:]) + 1 for word in text.split()]


def test_bits_per_byte_are_those_of_the_logits(directory, tmp_path, capsys):
    assert evaluated(directory, tmp_path / "out", window=24, stride=10) == 0
    from shared.model import gpt, weights
    from shared.model.logits import logits
    from shared.parallel import ParallelConfig
    from shared.runtime import process_groups

    process_groups.initialize(ParallelConfig(), 1)
    chunks = gpt.build(MODEL, ParallelConfig(), dtype=torch.float32)
    weights.load(chunks, directory / "model" / "release")
    ids = [0, *tokens_of((directory / "long.txt").read_text())]
    nats, place = 0.0, 1
    while place < len(ids):  # from the definition: `place` is the next token to predict
        end = min(24 if place == 1 else place + 9, len(ids) - 1)
        begin = max(0, end - 24)
        scores = logits(chunks, torch.tensor([ids[begin:end]]))[0].double().log_softmax(-1)
        nats -= sum(scores[target - 1 - begin, ids[target]].item() for target in range(place, end + 1))
        place = end + 1
    size = (directory / "long.txt").stat().st_size
    report = json.loads((tmp_path / "out/results.json").read_text())
    # fp32 losses of 130 tokens, summed in float64
    assert report["results"]["long.txt"]["bits_per_byte,none"] == pytest.approx(nats / size / math.log(2), rel=1e-6)
    assert (report["window"], report["stride"], report["engine"]) == (24, 10, "megatron")
    assert report["n-samples"]["rows.jsonl"]["effective"] == 2
    assert "long.txt  " in capsys.readouterr().out
    assert evaluated(directory, tmp_path / "out", window=24, stride=10) == 0  # already done
    assert evaluated(directory, tmp_path / "out", window=24, stride=9) == 2

    # The same command on two processes, as it is typed
    options = {
        "source": directory / "model",
        "text": f"{directory}/long.txt,{directory}/rows.jsonl",
        "window": 24,
        "stride": 10,
    }
    line = training_runs.words("evaluate-text", target=tmp_path / "two", **options, processes=2, tensor_parallel=2)
    command = Path(sys.executable).with_name("pretrain")
    done = subprocess.run([command, *line], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "two/results.json").read_text())
    assert two["config"]["model_args"]["layout"] == "tensor 2"
    for file, values in report["results"].items():
        for name, value in values.items():
            wanted = pytest.approx(value, rel=2e-6) if isinstance(value, float) else value
            assert two["results"][file][name] == wanted, (file, name)


def test_every_layout_gives_the_same_likelihoods(directory):
    texts = [(directory / "long.txt").read_text(), "w1 w2 w9", "w5"]
    documents = [Document(file="a", number=0, text=text, tokens=tokens_of(text)) for text in texts]
    windows = list(windows_of(documents, 0, 24, 10))
    (directory / "windows.json").write_text(json.dumps([asdict(window) for window in windows]))
    training_runs.random_model(directory / "moe", MOE)
    found = results_of(WORKER, directory)
    from shared.model import gpt, weights
    from shared.parallel import ParallelConfig
    from shared.runtime import process_groups
    from shared.training.text_likelihood import window_likelihoods

    process_groups.initialize(ParallelConfig(), 1)

    def of_one_process(model, place):
        chunks = gpt.build(model, ParallelConfig(), dtype=torch.float32, calculate_per_token_loss=True)
        weights.load(chunks, directory / place / "release")
        return window_likelihoods(chunks, windows, length=24, micro_batch_size=5)

    one, moe = of_one_process(MODEL, "model"), of_one_process(MOE, "moe")
    assert set(found) == {"tensor, pipeline", "context, data", "data", "expert, tensor"}
    # fp32: sums over ranks are in another order
    assert found.pop("expert, tensor") == pytest.approx(moe, rel=2e-6)
    assert found == {name: pytest.approx(one, rel=2e-6) for name in found}
    assert len(one) == len(moe) == len(windows) > 10


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"window": 127}, "--window 127: the model's context of 128 tokens takes windows up to 126"),
        ({"stride": 200}, "--stride 200 is longer than the window of 126 tokens"),
        ({"tensor_parallel": 3, "processes": 3}, "--tensor-parallel 3"),
        ({"text_key": "body"}, "no key 'body'"),
        ({"iteration": 7}, "--iteration 7 is not in"),
    ],
)
def test_what_does_not_fit_is_refused(directory, tmp_path, capsys, options, says):
    assert evaluated(directory, tmp_path / "out", **options) == 2
    error = capsys.readouterr().err
    assert says in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
