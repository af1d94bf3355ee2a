"""`pretrain train` through its command line: exact resume, signals, other layouts, errors."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.tools.pretrain.runs import REPOSITORY, TRAIN_TOKENS, VOCAB, killed, run, words, write_data
from tests.training_runs import random_model, record, tensors

os.environ["OMP_NUM_THREADS"] = "1"

from shared.architecture.architecture import Alibi
from shared.families import registry
from shared.runtime.silence_warnings import silence

silence()


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


def test_the_correction_bias_moves_at_the_rate_given(data, tmp_path, capsys):
    model = replace(registry.sizes()["deepseek-v3-tiny"], vocab_size=VOCAB)
    source = random_model(tmp_path / "source", model)
    before = tensors(source)
    names = [name for name in before if name.endswith("router.expert_bias")]
    assert names
    for rate in (None, 0.25, 0.0):
        target = tmp_path / f"run-{rate}"
        options = {} if rate is None else {"moe_router_bias_update_rate": rate}
        assert run(source, data, target, steps=1, validate_every=0, **options) == 0
        for name, bias in ((name, tensors(target)[name]) for name in names):
            step = 1e-3 if rate is None else rate
            moved = bias - before[name]
            assert torch.allclose(moved.abs() * (moved != 0), step * (moved != 0), atol=1e-6), name
            assert bool((moved != 0).any()) == (step > 0), name
    rows = [row for row in record(tmp_path / "run-None") if "loss" in row]
    assert {"moe_expert_load", "moe_highest_expert_load"} <= rows[0].keys()
    capsys.readouterr()


def test_a_model_without_correction_bias_has_no_rate_of_it(source, moe, data, tmp_path, capsys):
    for each in (source, moe[0]):
        assert run(each, data, tmp_path / "run", moe_router_bias_update_rate=0.01) == 2
        assert "--moe-router-bias-update-rate belongs to MoE models" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
    assert run(source, data, tmp_path / "run", moe_router_bias_update_rate=-1) == 2
    assert "--moe-router-bias-update-rate" in capsys.readouterr().err


def test_micro_batches_of_a_loss_over_them_stay(moe, data, tmp_path, capsys):
    source, alone = moe
    rows = [row for row in record(alone) if "loss" in row]
    assert all({"moe_load_balancing_loss", "moe_expert_load", "moe_highest_expert_load"} <= row.keys() for row in rows)
    target = tmp_path / "run"
    shutil.copytree(alone, target)
    manifest = json.loads((target / "manifest.json").read_text())
    assert manifest["facts"]["micro_batch_size"] == 2
    for state, options in (("finished", {}), ("running", {}), ("running", {"overwrite": True})):
        (target / "manifest.json").write_text(json.dumps({**manifest, "state": state}))
        assert run(source, data, target, **{**MOE_OPTIONS, "micro_batch_size": 4, **options}) == 2
        message = capsys.readouterr().err
        assert "was trained with --micro-batch-size 2, now it is 4" in message
        assert "give --micro-batch-size 2, or --extend" in message
    more = {**MOE_OPTIONS, "micro_batch_size": 4, "steps": 4, "extend": True}
    assert run(source, data, target, **more) == 0
    assert "  balance " in capsys.readouterr().err
    assert json.loads((target / "manifest.json").read_text())["facts"]["micro_batch_size"] == 4


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
    target = tmp_path / "run"
    killed(words(source, data, target), after=7)
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


def test_another_layout_takes_the_run_up(whole, stopped, source, data, tmp_path):
    """Two tensor-parallel processes go on where one stopped."""
    target = tmp_path / "run"
    shutil.copytree(stopped, target)
    command = Path(sys.executable).with_name("pretrain")
    done = subprocess.run(
        [str(command), *words(source, data, target, processes=2, tensor_parallel=2)],
        capture_output=True,
        text=True,
        timeout=400,
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


@pytest.mark.parametrize(
    "layout",
    [
        {"processes": 2, "expert_parallel": 2},
        {
            "processes": 2,
            "tensor_parallel": 2,
            "sequence_parallel": True,
            "expert_parallel": 2,
            "expert_tensor_parallel": 1,
        },
    ],
    ids=["EP 2", "TP 2, EP 2, ETP 1"],
)
def test_experts_are_spread_over_processes(moe, data, tmp_path, layout):
    """Against one process: the first update; and one process resumes what two have saved, with the numbers of two."""
    source, alone = moe
    command = Path(sys.executable).with_name("pretrain")
    target = tmp_path / "run"
    done = subprocess.run(
        [str(command), *words(source, data, target, **MOE_OPTIONS, **layout)],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "expert 2" in done.stderr
    first, expected = (next(row for row in record(path) if "loss" in row) for path in (target, alone))
    for name in ("loss", "gradient_norm"):
        assert first[name] == pytest.approx(expected[name], rel=1e-6)  # fp32 sums in another order
    ours, theirs = tensors(target), tensors(alone)
    assert ours.keys() == theirs.keys()  # one name for an expert's weights, whichever rank has them

    more = {**MOE_OPTIONS, "steps": 4, "extend": True}
    resumed, onwards = tmp_path / "resumed", tmp_path / "onwards"
    shutil.copytree(target, resumed)
    shutil.copytree(target, onwards)
    assert run(source, data, resumed, **more) == 0
    done = subprocess.run([str(command), *words(source, data, onwards, **more, **layout)], timeout=400, check=False)
    assert done.returncode == 0
    one, two = ([row["loss"] for row in record(path) if "loss" in row] for path in (resumed, onwards))
    assert one[2] == pytest.approx(two[2], rel=1e-5)


MOE_OPTIONS = {"steps": 2, "save_every": 2, "validate_every": 0, "micro_batch_size": 2}


@pytest.fixture(scope="module")
def moe(data, tmp_path_factory):
    """An MoE model with the balancing loss, and a run of it in one process."""
    folder = tmp_path_factory.mktemp("moe")
    size = registry.sizes()["qwen3-moe-tiny"].with_values(moe={"auxiliary_loss": 0.001})
    source = random_model(folder / "source", replace(size, vocab_size=VOCAB))
    assert run(source, data, folder / "alone", **MOE_OPTIONS) == 0
    return source, folder / "alone"


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
    subprocess.run([str(convert), "to-hf", f"--source={whole}", f"--target={target}"], check=True, timeout=400)
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
        ({"track": "tensorboard,wandb"}, "install wandb`"),
        ({"track": "none,tensorboard"}, "none stands alone"),
        ({"track": "neptune"}, "--track neptune"),
        ({"recompute": "mlp,moe"}, "moe needs a model with MoE layers; leave moe out"),
        ({"recompute": "full,mlp"}, "full stands alone"),
        ({"recompute": ","}, "--recompute"),
        ({"backend": "te"}, "--backend te: there is no GPU; leave --backend out for Megatron-Core's own modules"),
        ({"backend": "apex"}, "--backend apex"),
        (
            {"attention_backend": "varlen"},
            "--attention-backend varlen does not carry this model's attention here: CUDA only;",
        ),
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


def test_a_finished_run_is_extended(whole, source, data, tmp_path, capsys):
    """12 updates at a constant rate, then 4 more with another rate and batch: as one run whose options change there."""
    target, more = (
        tmp_path / "run",
        {"steps": 16, "learning_rate": 5e-3, "schedule": "constant", "global_batch_size": 4},
    )
    shutil.copytree(whole, target)
    assert run(source, data, target, **more) == 2
    told = capsys.readouterr().err
    assert "--steps 12, now 16" in told
    assert "--global-batch-size 8, now 4" in told
    assert told.endswith("use --overwrite, or --extend to go on from it\n")
    assert run(source, data, target, seed=1) == 2
    assert "--extend" not in capsys.readouterr().err
    assert run(source, data, target, extend=True, **more | {"steps": 12}) == 2
    assert "--extend needs more --steps than that, not 12" in capsys.readouterr().err
    assert run(source, data, target, extend=True, seed=1, **more) == 2
    assert "--seed 0, now 1" in capsys.readouterr().err
    assert record(target) == record(whole)  # nothing was written

    assert run(source, data, target, extend=True, **more) == 0
    assert "resuming after update 12 of 16" in capsys.readouterr().err
    rows = record(target)
    added = [row for row in rows if row["step"] > 12 and "loss" in row]
    assert rows[: len(record(whole))] == record(whole)
    assert [row["step"] for row in added] == [13, 14, 15, 16]
    assert {row["learning_rate"] for row in added} == {5e-3}
    assert [row["samples"] for row in added] == [12 * 8 + 4 * count for count in (1, 2, 3, 4)]
    manifest = json.loads((target / "manifest.json").read_text())
    assert (manifest["state"], manifest["facts"]["consumed_tokens"]) == ("finished", (12 * 8 + 4 * 4) * 32)
    assert max(row["loss"] for row in added) < record(whole)[0]["validation_loss"] - 1  # optimizer and weights are kept
    assert run(source, data, target, **more) == 0  # it is now that run
    assert "already done" in capsys.readouterr().err


def test_an_extended_run_equals_a_longer_one(source, data, tmp_path):
    """At a constant rate 8 updates, extended to 12, are 12 updates, bit for bit."""
    constant = {"schedule": "constant", "validate_every": 0}
    assert run(source, data, tmp_path / "long", **constant) == 0
    assert run(source, data, tmp_path / "short", steps=8, **constant) == 0
    assert run(source, data, tmp_path / "short", steps=12, extend=True, **constant) == 0
    ours, theirs = tensors(tmp_path / "short"), tensors(tmp_path / "long")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_kept_iteration_is_a_source(whole, data, tmp_path, capsys):
    """Learning rate 0 shows which weights a run started from."""
    from megatron.core import dist_checkpointing

    assert run(whole, data, tmp_path / "run", iteration=8, learning_rate=0.0, steps=1) == 0
    weights = dist_checkpointing.load_plain_tensors(str(whole / "iter_0000008"))
    started, last = tensors(tmp_path / "run"), tensors(whole)
    name = "decoder.layers.mlp.linear_fc2.weight"
    assert torch.equal(started[name], weights[name])
    assert not torch.equal(started[name], last[name])

    convert, exported = REPOSITORY / "tools/convert/.venv/bin/convert", tmp_path / "hf"
    subprocess.run([convert, "to-hf", f"--source={whole}", "--iteration=8", f"--target={exported}"], check=True)
    written = load_file(exported / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(written.float(), weights[name][0].float())

    assert run(whole, data, tmp_path / "other", iteration=4, steps=1) == 2
    assert "--iteration 4 is not in --source" in capsys.readouterr().err
