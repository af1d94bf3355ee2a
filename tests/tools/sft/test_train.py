"""`sft train` through its command line: loss on targets only, exact resume, two processes equal one."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

os.environ["OMP_NUM_THREADS"] = "1"

from shared.checkpoint.directory.publish import publish
from shared.cli import invoked
from shared.families import registry
from shared.runtime.silence_warnings import silence
from tests import training_runs
from tests.training_runs import random_model, record, signalled
from tests.workers import ROOT
from tools.sft.cli import tool

silence()

VOCAB, LENGTH = 200, 24
MODEL = registry.from_config(
    {
        "model_type": "qwen2",
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
)
OPTIONS = {"epochs": 2, "global_batch_size": 4, "learning_rate": 5e-3, "precision": "fp32", "save_every": 4}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A Megatron directory with random weights."""
    return random_model(tmp_path_factory.mktemp("source") / "model", MODEL)


def write_data(target: Path, *, noise: int | None = None, seq_length: int = LENGTH) -> Path:
    """Rows of two conversations: a question of random tokens without a loss, then an answer that counts upwards.

    Every second row ends in padding. With `noise` the tokens of the padding are other ones.
    """
    rng = np.random.default_rng(1)
    with invoked("sft", "prepare", {"noise": noise}), publish(target, kind="dataset", inputs={}) as out:
        splits = {}
        for split, rows in (("train", 18), ("validation", 5)):
            tokens = rng.integers(100, VOCAB, (rows, LENGTH)).astype(np.int32)
            labels = np.full((rows, LENGTH), -100, np.int32)
            segments = np.zeros((rows, LENGTH), np.int32)
            for row in range(rows):
                for number, start in ((1, 0), (2, 12))[: 1 + row % 2]:
                    answer = np.arange(6) + rng.integers(0, 20)
                    tokens[row, start + 6 : start + 12] = answer
                    labels[row, start + 5 : start + 11] = answer
                    segments[row, start : start + 12] = number
            if noise is not None:
                tokens[segments == 0] = noise
            for part, array in (("tokens", tokens), ("labels", labels), ("segments", segments)):
                np.save(out.path / f"{split}.{part}.npy", array)
            splits[split] = {
                "sequences": rows,
                "tokens": int((segments > 0).sum()),
                "target_tokens": int((labels >= 0).sum()),
                "conversations": int(segments.max(1).sum()),
            }
        (out.path / "tokenizer").mkdir()
        (out.path / "tokenizer" / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
        out.describe(format="packed", seq_length=seq_length, splits=splits, vocab_size=VOCAB)
    return target


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data")


def words(source: Path, data: Path | str, target: Path, **options) -> list[str]:
    """The command line."""
    return training_runs.words("train", **{"source": source, "data": data, "target": target, **OPTIONS, **options})


def run(source: Path, data: Path | str, target: Path, **options) -> int:
    """The command in this process; its exit code."""
    return training_runs.exit_code(tool, words(source, data, target, **options))


@pytest.fixture(scope="module")
def whole(source, data, tmp_path_factory) -> Path:
    """A run that nothing disturbed."""
    target = tmp_path_factory.mktemp("whole") / "run"
    assert run(source, data, target) == 0
    return target


@pytest.fixture(scope="module")
def stopped(source, data, tmp_path_factory) -> Path:
    """The same run, stopped by a signal after update 5, so that the data is in the middle of its first epoch."""
    target = tmp_path_factory.mktemp("stopped") / "run"
    with signalled(signal.SIGTERM, after=5):
        assert run(source, data, target) == 75
    return target


def test_epochs_make_the_steps_and_it_learns(whole):
    updates = [row for row in record(whole) if "loss" in row]
    assert len(updates) == 9  # 2 x 18 rows in updates of 4
    assert updates[-1]["loss"] < updates[0]["loss"] - 0.3
    manifest = json.loads((whole / "manifest.json").read_text())
    assert (manifest["kind"], manifest["state"], manifest["iteration"]) == ("megatron", "finished", 9)


def test_only_targets_count(whole, data):
    labels = np.load(data / "train.labels.npy")
    rows = record(whole)
    total = sum(row["targets"] for row in rows if "loss" in row)
    assert total == 2 * (labels >= 0).sum()  # every row twice
    validation = [row["validation_targets"] for row in rows if "validation_loss" in row]
    assert set(validation) == {(np.load(data / "validation.labels.npy") >= 0).sum()}


def test_padding_is_invisible(whole, source, tmp_path):
    """Other tokens in the padding leave every number as it is."""
    data = write_data(tmp_path / "data", noise=7)
    assert run(source, data, tmp_path / "run") == 0
    assert record(tmp_path / "run") == record(whole)


def test_the_first_loss_is_the_mean_over_each_conversation_alone(whole, source, data):
    """No packing and no mask on the other side: every validation conversation goes through the model by itself."""
    from shared.model import gpt, logits, weights
    from shared.parallel import ParallelConfig
    from shared.runtime import process_groups

    layout = ParallelConfig()
    process_groups.initialize(layout, 1)
    chunks = gpt.build(MODEL, layout, dtype=torch.float32)
    weights.load(chunks, source / "release")
    tokens, labels, segments = (
        torch.from_numpy(np.load(data / f"validation.{part}.npy").astype(np.int64))
        for part in ("tokens", "labels", "segments")
    )
    total, count = 0.0, 0
    for row in range(len(tokens)):
        for number in range(1, int(segments[row].max()) + 1):
            mine = segments[row] == number
            scores = logits.logits(chunks, tokens[row][mine][None])[0]
            total += float(
                torch.nn.functional.cross_entropy(scores, labels[row][mine], ignore_index=-100, reduction="sum")
            )
            count += int((labels[row][mine] >= 0).sum())
    first = next(row for row in record(whole) if "validation_loss" in row)
    # fp32 sums in another order
    assert first["validation_loss"] == pytest.approx(total / count, rel=2e-6)


def test_a_stopped_run_goes_on_bit_for_bit(whole, stopped, source, data, tmp_path):
    target = tmp_path / "run"
    shutil.copytree(stopped, target)
    assert run(source, data, target) == 0
    assert record(target) == record(whole)


def test_two_processes_take_the_run_up(whole, stopped, source, data, tmp_path):
    target = tmp_path / "run"
    shutil.copytree(stopped, target)
    command = Path(sys.executable).with_name("sft")
    done = subprocess.run(
        [str(command), *words(source, data, target, processes=2)],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for name in ("loss", "validation_loss"):
        ours = [row[name] for row in record(target) if name in row]
        theirs = [row[name] for row in record(whole) if name in row]
        # fp32 sums in another order; a few units in the last place, magnified a little by Adam over four updates
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "flag"),
    [({"steps": 3}, "--epochs"), ({"epochs": None, "steps": 3, "warmup_steps": 4}, "--warmup-steps")],
)
def test_what_does_not_fit_is_refused_with_nothing_written(source, data, tmp_path, capsys, options, flag):
    assert run(source, data, tmp_path / "run", **options) == 2
    assert flag in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_several_datasets_are_blended(source, data, tmp_path, capsys):
    """Shares of 3 and 1: 18 rows of the first are an epoch of 24 samples."""
    other = write_data(tmp_path / "other", noise=7)
    given = {"data_weights": "0.75,0.25", "epochs": 1}
    assert run(source, f"{data},{other}", tmp_path / "run", **given) == 0
    plan = capsys.readouterr().err
    assert "data        75.0% data: 1.00 epochs of 18 sequences\n" in plan
    assert "data        25.0% other: 0.33 epochs of 18 sequences\n" in plan
    rows = [row for row in record(tmp_path / "run") if "loss" in row]
    assert len(rows) == 6

    longer = write_data(tmp_path / "longer", seq_length=LENGTH + 1)
    assert run(source, f"{data},{longer}", tmp_path / "none") == 2
    assert f"--data has rows of {LENGTH} and {LENGTH + 1} tokens; prepare all of one length" in capsys.readouterr().err
    (tmp_path / "pair.idx").touch()
    assert run(source, f"{data},{tmp_path / 'pair'}", tmp_path / "none") == 2
    assert "is a plain Megatron pair, without conversations" in capsys.readouterr().err


CONVERT = ROOT / "tools" / "convert" / ".venv" / "bin" / "python"
LORA = {"lora_rank": 4, "lora_alpha": 8, "learning_rate": 2e-2}


@pytest.fixture(scope="module")
def adapted(source, data, tmp_path_factory) -> Path:
    """A run with LoRA that nothing disturbed."""
    target = tmp_path_factory.mktemp("adapted") / "run"
    assert run(source, data, target, **LORA) == 0
    return target


def test_lora_learns_and_saves_adapters_only(adapted, source, whole):
    from shared.checkpoint.directory.manifest import input_fingerprint
    from shared.checkpoint.formats.torch_dist_reader import TorchDistReader

    updates = [row for row in record(adapted) if "loss" in row]
    assert updates[-1]["loss"] < updates[0]["loss"] - 0.3
    assert updates[0]["loss"] == pytest.approx(record(whole)[1]["loss"], rel=1e-6)  # B is zero at first
    reader = TorchDistReader(adapted / "iter_0000009")
    assert {key.rpartition(".")[2] for key in reader.tensors} == {"lora_A", "lora_B"}
    assert len(reader.tensors) == 2 * 4
    fact = json.loads((adapted / "manifest.json").read_text())["facts"]["adapter"]
    base = fact.pop("base")
    assert fact == {"rank": 4, "alpha": 8.0, "rslora": False, "dropout": 0.0, "targets": ["all-linear"]}
    assert (adapted / base["path"]).resolve() == source
    assert base["fingerprint"] == input_fingerprint(source)


def test_lora_stopped_and_resumed_is_the_run_that_nothing_disturbed(adapted, source, data, tmp_path):
    target = tmp_path / "run"
    with signalled(signal.SIGTERM, after=5):
        assert run(source, data, target, **LORA) == 75
    assert run(source, data, target, **LORA) == 0
    assert record(target) == record(adapted)
    assert run(source, data, target, **LORA) == 0  # already done


def test_lora_saved_asynchronously_and_resumed_is_the_run_that_nothing_disturbed(adapted, source, data, tmp_path):
    target, options = tmp_path / "run", LORA | {"async_save": "true", "save_every": 2}
    with signalled(signal.SIGTERM, after=5):
        assert run(source, data, target, **options) == 75
    assert run(source, data, target, **options) == 0
    assert record(target) == record(adapted)


@pytest.fixture(scope="module")
def peft(adapted, source, tmp_path_factory) -> Path:
    """The adapter of `adapted`, as `convert to-hf --base` publishes it. The base has no weights here: only their names count."""
    folder = tmp_path_factory.mktemp("peft")
    shutil.copytree(source / "hf", folder / "base")
    paths = ("--source", adapted, "--base", folder / "base", "--target", folder / "adapter")
    command = [CONVERT, "-m", "tools.convert.cli", "to-hf", *map(str, paths)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder / "adapter"


def test_an_adapter_of_peft_is_gone_on_with(adapted, peft, source, data, tmp_path, capfd):
    """Validation before the first update is that after the last of the run that it was published from."""
    target = tmp_path / "run"
    assert run(source, data, target, adapter=peft, learning_rate=2e-2) == 0
    before, after = (
        [row["validation_loss"] for row in record(place) if "validation_loss" in row] for place in (adapted, target)
    )
    assert after[0] == pytest.approx(before[-1], rel=1e-6)  # fp32
    assert after[-1] < after[0]
    assert f"adapter     {peft}, trained on another base, or another conversion" in capfd.readouterr().err
    manifest = json.loads((target / "manifest.json").read_text())
    assert manifest["contract_version"] == 2
    assert [parent["flag"] for parent in manifest["parents"]] == ["source", "data", "adapter"]
    fact = manifest["facts"]["adapter"]
    assert (fact["rank"], fact["alpha"], len(fact["targets"])) == (4, 8.0, 7)
    assert run(source, data, target, adapter=peft, learning_rate=2e-2) == 0  # already done


def test_weight_decay_of_adapters_is_zero_unless_asked_for(adapted, source, data, tmp_path):
    assert run(source, data, tmp_path / "run", **LORA, lora_weight_decay=0.5, steps=9, epochs=None) == 0
    decayed, plain = ([row["loss"] for row in record(place) if "loss" in row] for place in (tmp_path / "run", adapted))
    assert decayed[0] == plain[0]
    assert decayed[-1] != plain[-1]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"use_dora": True}, "use_dora of adapter_config.json is not trained here; merge the adapter"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern: adapters of different ranks or scales are not trained here"),
        ({"r": 8}, "lora_A.weight is [4, 96], the model of --source asks for [8, 96]"),
        ({"peft_type": "LOHA"}, "only LORA adapters are read"),
    ],
)
def test_adapters_that_are_not_gone_on_with(peft, source, data, tmp_path, capfd, change, text):
    changed = shutil.copytree(peft, tmp_path / "adapter")
    (changed / "manifest.json").unlink()
    config = json.loads((changed / "adapter_config.json").read_text())
    (changed / "adapter_config.json").write_text(json.dumps(config | change))
    assert run(source, data, tmp_path / "run", adapter=changed) == 2
    assert text in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_damaged_adapter_and_none_are_not_gone_on_with(peft, source, data, tmp_path, capfd):
    damaged = shutil.copytree(peft, tmp_path / "adapter")
    weights = damaged / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert run(source, data, tmp_path / "run", adapter=damaged) == 2
    assert "adapter_model.safetensors is damaged" in capfd.readouterr().err
    assert run(source, data, tmp_path / "run", adapter=source) == 2
    assert "has no adapter_config.json; give a directory of PEFT" in capfd.readouterr().err


def test_a_base_that_changed_since_the_run_is_refused(adapted, data, tmp_path, capfd):
    other = random_model(tmp_path / "other", MODEL, seed=6)
    assert run(other, data, adapted, **LORA) == 2
    assert "with another --source, or its content has changed" in capfd.readouterr().err


def test_the_plan_of_lora_says_what_it_saves(source, data, tmp_path, capfd):
    assert (
        run(source, data, tmp_path / "run", steps=1, epochs=None, **LORA, lora_targets="q_proj,v_proj", rslora="true")
        == 0
    )
    out = "".join(capfd.readouterr())
    # Two layers of A [4, 64] twice, B [64, 4] and [32, 4].
    assert "lora        rank 4, scale 4: 0.00 M parameters" in out
    assert "for q_proj, v_proj" in out
    assert "trained whole: " in out
    assert " of states, " in out


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lora_alpha": 8}, "--lora-alpha belongs to LoRA; give --lora-rank"),
        ({"rslora": "true"}, "--rslora belongs to LoRA"),
        ({"lora_rank": 4, "lora_targets": "query"}, "the model has no linear layer query; it has down_proj"),
        ({"lora_rank": 4, "mtp_loss_scaling_factor": 0.1}, "are not run with LoRA"),
        ({"lora_rank": 4, "backend": "te"}, "--backend te: its modules join the norm"),
        ({"lora_rank": 0}, "--lora-rank"),
        ({"lora_rank": 4, "lora_dropout": 1.0}, "--lora-dropout"),
        ({"lora_weight_decay": 0.1}, "--lora-weight-decay belongs to LoRA; give --lora-rank"),
        ({"lora_rank": 4, "weight_decay": 0.1}, "give --lora-weight-decay for its A and B"),
        ({"lora_rank": 4, "adapter": "{peft}"}, "says rank, alpha and targets; leave it out"),
    ],
)
def test_mistakes_of_lora(peft, source, data, tmp_path, capfd, options, text):
    options = {name: peft if value == "{peft}" else value for name, value in options.items()}
    assert run(source, data, tmp_path / "run", **options) == 2
    assert text in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_with_lora_is_no_source(adapted, data, tmp_path, capfd):
    assert run(adapted, data, tmp_path / "run") == 2
    assert "holds LoRA adapters only, without their base" in capfd.readouterr().err


WORSE = {  # than before, soon
    "epochs": None,
    "steps": 12,
    "learning_rate": 0.1,
    "schedule": "constant",
    "validate_every": 1,
    "save_every": 5,
    "keep": 1,
}


def test_the_best_iteration_is_kept_and_a_run_that_gets_worse_ends(source, data, tmp_path, capfd):
    target = tmp_path / "run"
    assert run(source, data, target, **WORSE, early_stop=2, keep_best="true") == 0
    losses = {row["step"]: row["validation_loss"] for row in record(target) if "validation_loss" in row}
    best = min(losses, key=lambda step: losses[step])
    manifest = json.loads((target / "manifest.json").read_text())
    assert 0 < best < 10
    assert (manifest["state"], manifest["iteration"]) == ("finished", best + 2)
    assert sorted(path.name for path in target.glob("iter_*")) == [f"iter_{step:07}" for step in (best, best + 2)]
    wanted = {
        "loss": losses[best],
        "iteration": best,
        "targets": manifest["facts"]["best_validation"]["targets"],
        "since": 2,
    }
    assert manifest["facts"]["best_validation"] == wanted
    said = capfd.readouterr().err
    assert "stopped early: no lower validation loss in 2 validations (--early-stop)" in said
    assert f"lowest validation loss: {losses[best]:.4f}, of update {best}, which is kept: --iteration {best}\n" in said
    assert f"after update {best}</dd>" in (target / "report.html").read_text()
    assert run(source, data, target, **WORSE, early_stop=2, keep_best="true") == 0  # already done
    # its weights are those that were validated
    assert run(target, data, tmp_path / "more", epochs=None, steps=1, iteration=best) == 0
    assert record(tmp_path / "more")[0]["validation_loss"] == losses[best]

    stopped = tmp_path / "stopped"
    with signalled(signal.SIGTERM, after=best + 1):
        assert run(source, data, stopped, **WORSE, early_stop=2, keep_best="true", async_save="true") == 75
    assert run(source, data, stopped, **WORSE, early_stop=2, keep_best="true") == 0
    assert record(stopped) == record(target)
    assert json.loads((stopped / "manifest.json").read_text())["facts"]["best_validation"] == wanted
    assert (stopped / f"iter_{best:07}").is_dir()


@pytest.mark.parametrize("flag", ["validate_every", "keep_best", "early_stop"])
def test_validations_need_a_split(source, data, tmp_path, capfd, flag):
    without = shutil.copytree(data, tmp_path / "data")
    manifest = json.loads((without / "manifest.json").read_text())
    del manifest["facts"]["splits"]["validation"]
    (without / "manifest.json").write_text(json.dumps(manifest))
    name, value = f"--{flag.replace('_', '-')}", "true" if flag == "keep_best" else 2
    assert run(source, without, tmp_path / "run", **{flag: value}) == 2
    assert (
        f"{name}: --data {without} has no validation split; prepare it with --validation-fraction"
        in capfd.readouterr().err
    )
    if flag != "validate_every":
        assert run(source, data, tmp_path / "run", **{flag: value}, validate_every=0) == 2
        assert f"{name} needs validations during the run, and --validate-every is 0" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_rehearsal_plays_packed_rows_with_flash_attention_and_writes_nothing(source, data, tmp_path) -> None:
    """On a GPU without cuDNN's kernel for them (L40S). torch's math kernel would keep all scores."""
    line = training_runs.words(
        "train", source=source, data=data, target=tmp_path / "run", **{**OPTIONS, "precision": "bf16"}
    )
    done = subprocess.run(
        [sys.executable, "-m", "tools.sft.cli", *line, "--rehearse", "--gpu=l40s", "--world=2"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "rehearsal   1 of 2 ranks" in done.stdout
    assert "on L40S (45.0 GiB" in done.stdout
    assert "attention   varlen (packed rows, grouped queries)" in done.stderr
    assert not (tmp_path / "run").exists()
