"""`pretrain train` through its command line: exact resume, signals, other layouts, errors."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

os.environ["OMP_NUM_THREADS"] = "1"

from shared.architecture.architecture import Alibi, Architecture
from shared.checkpoint.directory.publish import publish
from shared.cli import invoked
from shared.data.indexed import IndexedWriter
from shared.families import registry
from shared.runtime.silence_warnings import silence
from shared.training.recorder import Recorder
from tools.pretrain.cli import tool

silence()

REPOSITORY = Path(__file__).parents[3]
TIMING = {"seconds", "tokens_per_second", "memory_bytes"}
VOCAB = 300
TRAIN_TOKENS = 6000
MODEL = registry.from_config(
    {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
    }
)
OPTIONS = {
    "steps": 12,
    "sequence_length": 32,
    "global_batch_size": 8,
    "micro_batch_size": 4,
    "learning_rate": 1e-2,
    "precision": "fp32",
    "save_every": 4,
    "validate_every": 6,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A Megatron directory with random weights and no tokenizer."""
    return random_model(tmp_path_factory.mktemp("source") / "model", MODEL)


def random_model(directory: Path, model: Architecture) -> Path:
    from megatron.core import dist_checkpointing

    from shared.model import gpt, weights
    from shared.parallel import ParallelConfig
    from shared.runtime import process_groups
    from shared.training.state import write_from_threads

    (directory / "release").mkdir(parents=True)
    (directory / "hf").mkdir()
    process_groups.initialize(ParallelConfig(), 5)
    chunks = gpt.build(model, ParallelConfig(), dtype=torch.float32, perform_initialization=True)
    write_from_threads()
    dist_checkpointing.save(weights.sharded_state_dict(chunks)["model"], str(directory / "release"))
    (directory / "hf" / "config.json").write_text(json.dumps(registry.to_config(model)))
    (directory / "latest_checkpointed_iteration.txt").write_text("release")
    return directory


def write_data(target: Path, vocab_size: int = VOCAB, data_format: str = "indexed") -> Path:
    """Documents that count upwards: the next token can be learned."""
    rng = np.random.default_rng(1)
    with invoked("pretrain", "prepare", {}), publish(target, kind="dataset", inputs={}) as out:
        splits = {}
        for split, tokens in (("train", TRAIN_TOKENS), ("validation", 700)):
            lengths = [100] * (tokens // 100)
            starts = rng.integers(0, 40, len(lengths))
            documents = [(start + np.arange(100)) % 40 for start in starts]
            writer = IndexedWriter(out.path / split, np.dtype(np.uint16))
            writer.add(np.concatenate(documents), lengths)
            writer.close()
            splits[split] = {"tokens": tokens, "documents": len(lengths), "utf8_bytes": 3 * tokens}
        (out.path / "tokenizer").mkdir()
        (out.path / "tokenizer" / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
        out.describe(format=data_format, splits=splits, vocab_size=vocab_size, eos_token_id=0, dtype="uint16")
    return target


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data")


def words(source: Path, data: Path, target: Path, **options) -> list[str]:
    """The command line."""
    flags = {"source": source, "data": data, "target": target, **OPTIONS, **options}
    return ["train", *(f"--{name.replace('_', '-')}={value}" for name, value in flags.items() if value is not None)]


def run(source: Path, data: Path, target: Path, **options) -> int:
    """The command in this process; its exit code."""
    with pytest.raises(SystemExit) as ended:
        tool.run(words(source, data, target, **options))
    return ended.value.code or 0


def record(directory: Path) -> list[dict]:
    """metrics.jsonl without what the clock and the machine decide."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMING} for line in lines]


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of the last iteration."""
    from megatron.core import dist_checkpointing

    tracker = (directory / "latest_checkpointed_iteration.txt").read_text()
    name = tracker if tracker == "release" else f"iter_{int(tracker):07d}"
    loaded = dist_checkpointing.load_plain_tensors(str(directory / name))
    return {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}


@pytest.fixture(scope="module")
def whole(source, data, tmp_path_factory) -> Path:
    """A run that nothing disturbed."""
    target = tmp_path_factory.mktemp("whole") / "run"
    assert run(source, data, target) == 0
    return target


@pytest.fixture(scope="module")
def stopped(source, data, tmp_path_factory) -> Path:
    """The same run, told to stop after update 6 by a signal."""
    target = tmp_path_factory.mktemp("stopped") / "run"
    plain = Recorder.updated

    def updated(self, step, *numbers):
        plain(self, step, *numbers)
        if step == 6:
            os.kill(os.getpid(), signal.SIGUSR1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "updated", updated)
        assert run(source, data, target) == 75
    return target


def test_mtp_layers_learn_or_stay(data, tmp_path, capsys):
    """DeepSeek V3's; without a loss all of their weights stay, correction biases included."""
    model = replace(registry.sizes()["deepseek-v3-tiny"], vocab_size=VOCAB)
    source = random_model(tmp_path / "source", model)
    before = tensors(source)
    assert run(source, data, tmp_path / "trained") == 0
    assert "mtp         1 layer, trained, loss times 0.1\n" in capsys.readouterr().err
    rows = record(tmp_path / "trained")
    losses = [row["mtp_loss"] for row in rows if "mtp_loss" in row]
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.5
    assert [row["step"] for row in rows if "validation_mtp_loss" in row] == [0, 6, 12]
    assert run(source, data, tmp_path / "kept", mtp_loss_scaling_factor=0) == 0
    assert "mtp         1 layer, frozen (--mtp-loss-scaling-factor 0)\n" in capsys.readouterr().err
    assert not any("mtp_loss" in name for row in record(tmp_path / "kept") for name in row)
    trained, kept = tensors(tmp_path / "trained"), tensors(tmp_path / "kept")
    mtp = [name for name in before if name.startswith("mtp.") and "_extra_state" not in name]
    assert len(mtp) > 15
    for name in mtp:
        assert torch.equal(kept[name], before[name]), name
        assert not torch.equal(trained[name], before[name]), name
    assert not torch.equal(kept["output_layer.weight"], before["output_layer.weight"])


def test_a_source_without_the_mtp_layers_that_config_json_declares(data, tmp_path, capsys):
    model = replace(registry.sizes()["deepseek-v3-tiny"], vocab_size=VOCAB)
    source = random_model(tmp_path / "source", replace(model, mtp=None))
    (source / "hf" / "config.json").write_text(json.dumps(registry.to_config(model)))
    assert run(source, data, tmp_path / "run", steps=1, validate_every=0) == 0
    assert "mtp         off (config.json declares MTP layers, the checkpoint has none)\n" in capsys.readouterr().err
    assert not any(name.startswith("mtp.") for name in tensors(tmp_path / "run"))


def test_a_model_without_mtp_layers_has_no_mtp_loss(source, data, tmp_path, capsys):
    assert run(source, data, tmp_path / "run", mtp_loss_scaling_factor=0.3) == 2
    assert (
        "--mtp-loss-scaling-factor belongs to models with MTP (multi-token prediction) layers"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()


def test_it_learns_and_records(whole):
    rows = record(whole)
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 1.0
    validations = [row for row in rows if "validation_loss" in row]
    assert [row["step"] for row in validations] == [0, 6, 12]
    assert validations[0]["validation_targets"] == 699  # all of the split but the first token
    per_byte = validations[-1]["validation_loss"] / np.log(2) / 3
    assert validations[-1]["bits_per_byte"] == pytest.approx(per_byte)


def test_the_run_directory_is_a_checkpoint(whole):
    manifest = json.loads((whole / "manifest.json").read_text())
    assert (manifest["kind"], manifest["state"], manifest["iteration"]) == ("megatron", "finished", 12)
    assert manifest["facts"]["consumed_tokens"] == 12 * 8 * 32
    assert sorted(path.name for path in whole.glob("iter_*")) == ["iter_0000008", "iter_0000012"]
    assert (whole / "hf" / "tokenizer.json").is_file()  # of the data: the source has none
    assert "<svg" in (whole / "report.html").read_text()
    assert list((whole / "tensorboard").iterdir())


def test_a_finished_run_is_not_run_again(whole, source, data, capsys):
    before = record(whole)
    assert run(source, data, whole, processes=2, keep=5) == 0  # neutral options: the same run
    assert "already done" in capsys.readouterr().err
    assert run(source, data, whole, learning_rate=2e-2) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert record(whole) == before


def test_a_killed_run_goes_on_bit_for_bit(whole, source, data, tmp_path):
    """SIGKILL right after update 7, which is recorded, with update 4 the last that is saved."""
    script = """
import os, signal, sys
from shared.training.recorder import Recorder
plain = Recorder.updated
def updated(self, step, *numbers):
    plain(self, step, *numbers)
    if step == 7:
        os.kill(os.getpid(), signal.SIGKILL)
Recorder.updated = updated
from tools.pretrain.cli import tool
tool.run(sys.argv[1:])
"""
    target = tmp_path / "run"
    killed = subprocess.run(
        [sys.executable, "-c", script, *words(source, data, target)],
        cwd=REPOSITORY,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert record(target)[-1]["step"] == 7
    assert json.loads((target / "manifest.json").read_text())["iteration"] == 4
    assert run(source, data, target) == 0
    assert record(target) == record(whole)
    ours, theirs = tensors(target), tensors(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_signal_saves_and_the_run_goes_on_bit_for_bit(whole, stopped, source, data, tmp_path):
    manifest = json.loads((stopped / "manifest.json").read_text())
    assert (manifest["state"], manifest["iteration"]) == ("running", 6)
    target = tmp_path / "run"
    shutil.copytree(stopped, target)
    assert run(source, data, target) == 0
    assert record(target) == record(whole)


def test_a_damaged_save_is_named_and_the_one_before_it_is_used(whole, stopped, source, data, tmp_path, capsys):
    """A flipped bit in the newest of two saves: the run resumes from the older one, and ends with the same numbers."""
    target = tmp_path / "run"
    shutil.copytree(stopped, target)
    shard = max((target / "iter_0000006").glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert run(source, data, target) == 0
    told = capsys.readouterr().err
    assert f"{shard} is damaged: its content has changed since it was saved; resuming from iter_0000004" in told
    assert "resuming after update 4 of 12" in told
    assert record(target) == record(whole)
    ours, theirs = tensors(target), tensors(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_truncated_save_without_another_is_an_error(stopped, source, data, tmp_path, capsys):
    target = tmp_path / "run"
    shutil.copytree(stopped, target)
    shutil.rmtree(target / "iter_0000004")
    shard = min((target / "iter_0000006").glob("*.distcp"))
    size = shard.stat().st_size
    os.truncate(shard, size - 5)
    assert run(source, data, target) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.endswith(
        f"{shard} has {size - 5} bytes instead of {size}, and no earlier iteration is kept; begin again with --overwrite"
    )


def test_another_layout_takes_the_run_up(whole, stopped, source, data, tmp_path):
    """Two tensor-parallel processes go on where one stopped."""
    target = tmp_path / "run"
    shutil.copytree(stopped, target)
    command = Path(sys.executable).with_name("pretrain")
    done = subprocess.run(
        [str(command), *words(source, data, target, processes=2, tensor_parallel=2)],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "another layout" in done.stderr
    found, expected = record(target), record(whole)
    assert [row.keys() for row in found] == [row.keys() for row in expected]
    for name in ("loss", "validation_loss"):
        ours = [row[name] for row in found if name in row]
        # fp32 sums in another order; a few units in the last place, magnified a little by Adam over six updates
        assert ours == pytest.approx([row[name] for row in expected if name in row], rel=1e-5)


def test_learning_rate_zero_leaves_the_weights(source, data, tmp_path):
    assert run(source, data, tmp_path / "run", learning_rate=0.0, steps=2) == 0
    before, after = tensors(source), tensors(tmp_path / "run")
    assert before.keys() <= after.keys()
    for name in before:
        rows = VOCAB if name in ("embedding.word_embeddings.weight", "output_layer.weight") else None  # no padding
        assert torch.equal(before[name][:rows], after[name][:rows]), name


def test_a_loss_that_is_no_number_stops_the_run_and_saves_nothing_over(source, data, tmp_path, capsys):
    assert run(source, data, tmp_path / "run", learning_rate=1e25, clip_grad=0, save_every=1) == 1
    message = capsys.readouterr().err
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    step = manifest["iteration"]
    assert f"update {step + 1} is" in message
    assert f"update {step} is saved" in message
    assert all(bool(tensor.isfinite().all()) for tensor in tensors(tmp_path / "run").values())


def test_one_epoch_by_default(source, data, tmp_path, capsys):
    """Stopped by its data's end: 187 sequences of 32 are 5 updates of 32."""
    assert run(source, data, tmp_path / "run", steps=None, global_batch_size=32, validate_every=0) == 0
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["iteration"] == (TRAIN_TOKENS - 1) // 32 // 32
    plan = capsys.readouterr().err
    assert "0.86 epochs" in plan


def test_the_export_has_the_validation_loss_in_transformers(whole, data, tmp_path):
    """The trained weights, converted, as transformers computes them."""
    from transformers import AutoModelForCausalLM

    convert = REPOSITORY / "tools/convert/.venv/bin/convert"
    target = tmp_path / "hf"
    subprocess.run([str(convert), "to-hf", f"--source={whole}", f"--target={target}"], check=True, timeout=120)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    ids = torch.from_numpy(np.fromfile(data / "validation.bin", dtype=np.uint16).astype(np.int64))
    total = 0.0
    for start in range(0, len(ids) - 1, 32):
        piece = ids[start : start + 33]
        with torch.no_grad():
            logits = model(piece[None, :-1]).logits[0]
        total += float(torch.nn.functional.cross_entropy(logits, piece[1:], reduction="sum"))
    # two implementations of the same fp32 arithmetic
    assert total / (len(ids) - 1) == pytest.approx(record(whole)[-1]["validation_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"sequence_length": 129}, "--sequence-length"),
        ({"global_batch_size": 9}, "--global-batch-size"),
        ({"processes": 3, "tensor_parallel": 2}, "--processes"),
        ({"decay_steps": 3}, "--schedule wsd"),
        ({"warmup_steps": 13}, "--warmup-steps"),
        ({"tensor_parallel": 8, "micro_batch_size": 1}, "--tensor-parallel"),
    ],
)
def test_what_does_not_fit_is_refused_with_nothing_written(source, data, tmp_path, capsys, options, flag):
    assert run(source, data, tmp_path / "run", **options) == 2
    assert flag in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_not_supported_is_refused_with_nothing_written(source, data, tmp_path, capsys, monkeypatch):
    family = registry.FAMILIES["llama"]
    with_alibi = {"attention": {"alibi": Alibi()}}
    reads_it = replace(family, read=lambda fields: family.read(fields).with_values(**with_alibi))
    monkeypatch.setitem(registry.FAMILIES, "llama", reads_it)
    assert run(source, data, tmp_path / "run") == 2
    assert "llama: ALiBi with rotary embedding: supported in conversion, not in training" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "text"),
    [({"vocab_size": VOCAB + 1}, "model's tokenizer"), ({"data_format": "packed"}, "pretrain prepare")],
)
def test_data_for_another_model_is_refused(source, tmp_path, capsys, changes, text):
    data = write_data(tmp_path / "data", **changes)
    assert run(source, data, tmp_path / "run") == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_data_of_another_tokenizer_is_refused(source, data, tmp_path, capsys):
    other = tmp_path / "model"
    shutil.copytree(source, other)
    (other / "hf" / "tokenizer.json").write_text('{"model": {"vocab": {"b": 0}}}')
    assert run(other, data, tmp_path / "run") == 2
    assert "another tokenizer" in capsys.readouterr().err
