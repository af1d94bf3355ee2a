"""What `pretrain train` reads: blends, epochs, document masks, plain Megatron pairs, runs of the first version."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

os.environ["OMP_NUM_THREADS"] = "1"

from shared.checkpoint.directory.manifest import read_manifest
from shared.families import registry
from shared.training import samplers
from shared.training.loop import Run
from tests.tools.pretrain.runs import TRAIN_TOKENS, run, write_data
from tests.training_runs import random_model, record, signalled, tensors
from tools.pretrain.train_bpe import train, write

SEQUENCES = (TRAIN_TOKENS - 1) // 32


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """A second dataset, a quarter of the first."""
    return write_data(tmp_path_factory.mktemp("other") / "other", train_tokens=TRAIN_TOKENS // 4)


@pytest.fixture(scope="module")
def blended(source, data, other, tmp_path_factory) -> Path:
    """A run of both that nothing disturbed."""
    target = tmp_path_factory.mktemp("blended") / "run"
    assert run(source, f"{data},{other}", target, data_weights="0.7,0.3") == 0
    return target


def facts(target: Path) -> dict:
    """The manifest's."""
    return json.loads((target / "manifest.json").read_text())["facts"]


def test_a_blend_states_its_epochs_and_goes_on_bit_for_bit(blended, source, data, other, tmp_path, capsys):
    target = tmp_path / "run"
    with signalled(signal.SIGUSR1, after=6):
        assert run(source, f"{data},{other}", target, data_weights="0.7,0.3") == 75
    plan = capsys.readouterr().err
    assert "run         12 updates = 3,072 tokens; " in plan
    assert "data        70.0% data: 0.36 epochs of 187 sequences\n" in plan
    assert "data        30.0% other: 0.63 epochs of 46 sequences\n" in plan
    assert facts(target)["data"][1] == {"name": "other", "share": 0.3, "sequences": 46, "epochs": round(15 / 46, 4)}
    assert (
        run(source, f"{data},{other}", target, data_weights="7,3") == 2
    )  # other words for the same shares: another run
    assert "(--data-weights [0.7, 0.3], now [7.0, 3.0])" in capsys.readouterr().err
    assert run(source, f"{data},{other}", target, data_weights="0.7,0.3") == 0
    assert record(target) == record(blended)
    assert [fact["epochs"] for fact in facts(target)["data"]] == [round(67 / 187, 4), round(29 / 46, 4)]
    ours, theirs = tensors(target), tensors(blended)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_epochs_say_how_long(source, data, other, tmp_path, capsys):
    """Without weights an epoch is all of both; the last update is not begun."""
    options = {"steps": None, "validate_every": 0, "save_every": 500}
    assert run(source, f"{data},{other}", tmp_path / "run", epochs=2, **options) == 0
    plan = capsys.readouterr().err
    steps = 2 * (SEQUENCES + 46) // 8
    assert f"run         {steps} updates" in plan
    assert "80.3% data: 1.99 epochs of 187 sequences\n" in plan
    assert "19.7% other: 2.00 epochs of 46 sequences\n" in plan
    assert run(source, data, tmp_path / "other", epochs=2, steps=3) == 2
    assert "--epochs and --steps both say how long" in capsys.readouterr().err


def test_a_document_mask_has_fewer_targets_and_its_own_metrics(source, data, tmp_path, capsys):
    """Documents of 100 tokens: 60 of the 6000 are no targets."""
    assert run(source, data, tmp_path / "run", steps=3, document_mask=True) == 0
    assert "documents   attention within each, positions restart" in capsys.readouterr().err
    rows = record(tmp_path / "run")
    targets = [row["targets"] for row in rows if "targets" in row]
    assert all(240 < count <= 256 for count in targets)
    assert sum(targets) < 3 * 256
    first = next(row for row in rows if "validation_loss" in row)
    assert first["validation_targets"] == 700 - 7
    assert first["bits_per_byte"] == pytest.approx(first["validation_loss"] / np.log(2) / (2100 / 693))


def test_a_prefix_lm_has_no_document_mask(data, tmp_path, capsys):
    prefix = registry.sizes()["glm-10b-tiny"]
    assert prefix.prefix
    source = random_model(tmp_path / "source", prefix)
    assert run(source, data, tmp_path / "run", document_mask=True) == 2
    assert "--document-mask: the model of --source" in (said := capsys.readouterr().err)
    assert "is a prefix LM (glm10b)" in said


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """Of 270 tokens, fewer than the model's."""
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    folder.mkdir()
    write(train(iter(["one two three two one two three"] * 9), 270), folder)
    (folder / "NOTES").write_text("which no run copies")
    return folder


@pytest.fixture
def pair(tmp_path) -> Path:
    """A prefix, written by Megatron's own builder in a type that Baton does not write."""
    builder = IndexedDatasetBuilder(str(tmp_path / "text_document.bin"), dtype=np.int64)
    for start in range(40):
        builder.add_document((start + torch.arange(50)) % 40, [50])
    builder.finalize(str(tmp_path / "text_document.idx"))
    return tmp_path / "text_document"


def test_a_plain_pair_is_trained_on_also_in_a_blend(source, other, pair, tokenizer, tmp_path, capsys):
    options = {"steps": 3, "tokenizer": tokenizer, "validate_every": None}
    assert run(source, pair, tmp_path / "run", **options) == 0
    assert "validation  none: the data has no validation split" in capsys.readouterr().err
    manifest = read_manifest(tmp_path / "run", flag="")
    assert [parent.flag for parent in manifest.parents] == ["source", "data", "tokenizer"]
    assert manifest.facts["data"][0] | {"epochs": 0} == {
        "name": "text_document",
        "share": 1.0,
        "sequences": 1999 // 32,
        "epochs": 0,
    }
    names = {path.name for path in tokenizer.iterdir()} - {"NOTES"}
    assert {path.name for path in (tmp_path / "run" / "hf").iterdir()} == names | {"config.json"}
    assert run(source, f"{pair}.bin", tmp_path / "run", **options) == 0  # by either name
    assert "already done" in capsys.readouterr().err
    with Path(f"{pair}.bin").open("r+b") as file:
        file.write(b"\1")
    assert run(source, pair, tmp_path / "run", **options) == 2
    assert "another --data, or its content has changed" in capsys.readouterr().err
    assert run(source, f"{other},{pair}", tmp_path / "blend", **options) == 2  # `other` has a tokenizer of its own
    assert f"--data {pair} was made with another tokenizer than --data {other} has" in capsys.readouterr().err


def test_mistakes_in_what_is_read_are_one_line_each(source, data, other, pair, tokenizer, tmp_path, capsys):
    def refused(data, says: str, **options) -> None:
        assert run(source, data, tmp_path / "refused", steps=1, validate_every=None, **options) == 2
        said = capsys.readouterr().err.strip()
        assert says in said
        assert said.count("\n") == 0

    refused(pair, "is a plain Megatron pair, which does not say what its ids mean; name the directory")
    refused(data, "--tokenizer belongs to plain Megatron pairs", tokenizer=tokenizer)
    refused(f"{data},{data}", f"--data {data}: given twice")
    refused(f"{data},{other}", "--data-weights has 1 number and --data 2", data_weights="0.7")
    refused(data, "--data-weights has 1 number and --data 1", data_weights="1")
    refused(f"{data},{other}", "--data-weights 0.7,-1: input should be greater than 0", data_weights="0.7,-1")
    refused(",", "--data ,: ")
    refused(tmp_path / "nowhere", "does not exist")
    Path(f"{pair}.bin").write_bytes(np.full(2000, 270, np.int64).tobytes())
    refused(pair, "token 0 is id 270, and the tokenizer of --tokenizer has ids below 270", tokenizer=tokenizer)
    Path(f"{pair}.bin").write_bytes(b"\0" * 15992)
    refused(
        pair,
        "text_document.bin has 15992 bytes, and text_document.idx promises 16000: it is truncated",
        tokenizer=tokenizer,
    )


def test_a_run_of_the_first_version_keeps_its_order(stopped, whole, source, data, tmp_path, monkeypatch):
    """Its manifest says nothing about the order, and its fingerprint nothing about the options added since."""
    target = tmp_path / "run"
    shutil.copytree(stopped, target)
    for path in (target / "manifest.json", target / "iter_0000006" / "manifest.json", target / "run.json"):
        content = json.loads(path.read_text())
        for name in ("iteration", "data_weights", "epochs", "document_mask", "tokenizer"):
            del content["options"][name]
        for name in ("data", "data_order"):
            content.get("facts", {}).pop(name, None)
        path.write_text(json.dumps(content))
    monkeypatch.setattr(samplers, "TABLE_ITEMS", 1)  # a new run would begin with the computed order
    assert run(source, data, target) == 0
    assert record(target) == record(whole)


def test_a_run_keeps_the_order_that_it_began_with(source, data, tmp_path, monkeypatch):
    target, options = tmp_path / "run", {"steps": 4, "save_every": 2, "validate_every": 0}
    monkeypatch.setattr(samplers, "TABLE_ITEMS", 1)
    opened = []
    plain = Run.__init__
    monkeypatch.setattr(
        Run, "__init__", lambda self, **given: plain(self, **given | {"datasets": _kept(given, opened)})
    )
    with signalled(signal.SIGUSR1, after=2):
        assert run(source, data, target, **options) == 75
    assert facts(target)["data_order"] == "scattered"
    monkeypatch.undo()
    monkeypatch.setattr(
        Run, "__init__", lambda self, **given: plain(self, **given | {"datasets": _kept(given, opened)})
    )
    assert run(source, data, target, **options) == 0
    assert opened == ["scattered", "scattered"]
    assert facts(target)["data_order"] == "scattered"


def _kept(given, opened: list):
    """The function that opens the datasets; it notes the order."""
    return lambda order: opened.append(order) or given["datasets"](order)
