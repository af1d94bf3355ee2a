"""`pretrain train --precision fp8` through its command line: plan, exact resume, switches of precision, export, refusals."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shared.model.fp8_linear import Fp8Linear
from shared.training import loop
from tests.tools.pretrain.runs import REPOSITORY, killed, run, words
from tests.training_runs import record, tensors

FP8 = {"precision": "fp8", "fp8_recipe": "delayed", "fp8_amax_history": 3, "fp8_bf16_layers": "1,0"}


@pytest.fixture(scope="module")
def fp8(source, data, tmp_path_factory) -> Path:
    """A run of the delayed recipe that nothing disturbed."""
    target = tmp_path_factory.mktemp("fp8") / "run"
    assert run(source, data, target, **FP8) == 0
    return target


def test_the_plan_says_what_is_in_fp8_and_what_is_not(source, data, tmp_path, capsys):
    assert run(source, data, tmp_path / "run", **{**FP8, "steps": 2}) == 0
    said = capsys.readouterr().err
    assert "delayed, a scale per tensor, of the amax of 3 updates; gradients in E5M2, the rest in E4M3" in said
    assert "in bf16     first 1 and last 0 layers, embedding, output layer, norms, attention" in said


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "blockwise"])
def test_every_recipe_learns_as_bf16_does(recipe, source, data, tmp_path):
    options = {"validate_every": 0, "save_every": 100}
    assert run(source, data, tmp_path / "bf16", precision="bf16", **options) == 0
    assert (
        run(source, data, tmp_path / "fp8", precision="fp8", fp8_recipe=recipe, fp8_bf16_layers="0,0", **options) == 0
    )
    ours, theirs = (record(tmp_path / name) for name in ("fp8", "bf16"))
    losses, wanted = ([row["loss"] for row in rows if "loss" in row] for rows in (ours, theirs))
    assert wanted[-1] < wanted[0] - 2
    # Twelve updates from random weights at a rate of 1e-2: the loss falls by 0.1 an update at the end, FP8 is one apart.
    assert sum(losses[-3:]) / 3 == pytest.approx(sum(wanted[-3:]) / 3, abs=0.15)
    assert losses != wanted


def test_metrics_and_report_have_shares_by_kind(fp8):
    rows = [row for row in record(fp8) if "loss" in row]
    assert all(
        {"fp8_clipped_weights", "fp8_underflow_gradients", "fp8_late_scales", "fp8_fallbacks"} <= row.keys()
        for row in rows
    )
    assert "fp8_layers" not in rows[0]
    last = rows[-1]["fp8_layers"]["underflow"]["gradients"]
    assert len(last) == 2
    assert last[0] == 0  # in bf16
    assert sum(row["fp8_late_scales"] for row in rows) > 0
    report = (fp8 / "report.html").read_text()
    for title in ("FP8 elements clipped", "FP8 elements rounded to zero by layer", "above their history", "guard"):
        assert title in report
    assert json.loads((fp8 / "manifest.json").read_text())["facts"]["fp8"].startswith("delayed")


def test_a_killed_run_goes_on_bit_for_bit(fp8, source, data, tmp_path):
    target = tmp_path / "run"
    killed(words(source, data, target, **FP8), after=7)
    assert json.loads((target / "manifest.json").read_text())["iteration"] == 4
    assert run(source, data, target, **FP8) == 0
    assert record(target) == record(fp8)
    ours, theirs = tensors(target), tensors(fp8)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_precision_is_switched_by_extend_and_said(fp8, source, data, tmp_path, capsys):
    target = tmp_path / "run"
    shutil.copytree(fp8, target)
    assert run(source, data, target, precision="bf16", steps=14, extend=True) == 0
    assert "precision   bf16, was fp8 (delayed" in capsys.readouterr().err
    assert "fp8" not in json.loads((target / "manifest.json").read_text())["facts"]
    assert run(source, data, target, precision="fp8", fp8_bf16_layers="0,0", steps=16, extend=True) == 0
    assert re.search(r"precision   fp8 \(tensorwise.*was bf16 before", capsys.readouterr().err)
    rows = [row for row in record(target) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 17))
    assert ["fp8_fallbacks" in row for row in rows[11:]] == [True, False, False, True, True]
    assert max(row["loss"] for row in rows[12:]) < rows[0]["loss"] - 2
    assert run(source, data, target, precision="fp32", steps=18, extend=True) == 2
    assert (
        "has bf16 weights, and --extend does not change them; give --precision bf16 or fp8" in capsys.readouterr().err
    )


def test_the_export_passes_over_the_state(fp8, tmp_path):
    convert = REPOSITORY / "tools/convert/.venv/bin/convert"
    target = tmp_path / "hf"
    words = [str(convert), "to-hf", f"--source={fp8}", f"--target={target}"]
    done = subprocess.run(words, check=True, timeout=400, capture_output=True, text=True)
    assert re.search(
        r"decoder.layers\.\S+_extra_state/\S+ and 3 more: FP8 scales and amax histories, left out", done.stderr
    )
    (file,) = target.glob("*.safetensors")
    exported, weights = load_file(file), tensors(fp8)
    assert not any("extra_state" in name for name in exported)
    wanted = weights["decoder.layers.mlp.linear_fc2.weight"]
    assert all(torch.equal(exported[f"model.layers.{index}.mlp.down_proj.weight"], wanted[index]) for index in range(2))


def test_adapters_are_trained_on_an_fp8_base_and_published(source, data, tmp_path):
    options = {**FP8, "fp8_recipe": "rowwise", "lora_rank": 4, "steps": 4}
    options.pop("fp8_amax_history")
    assert run(source, data, tmp_path / "run", **options) == 0
    rows = [row for row in record(tmp_path / "run") if "loss" in row]
    assert {row["fp8_clipped_weights"] for row in rows} == {0.0}
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["facts"]["fp8"].startswith("rowwise")
    assert rows[-1]["loss"] < rows[0]["loss"]
    convert = REPOSITORY / "tools/convert/.venv/bin/convert"
    words = [
        str(convert),
        "to-hf",
        f"--source={tmp_path / 'run'}",
        f"--base={source / 'hf'}",
        f"--target={tmp_path / 'hf'}",
    ]
    subprocess.run(words, check=True, timeout=400)
    adapter = load_file(tmp_path / "hf" / "adapter_model.safetensors")
    assert any(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)


def test_an_infinity_stops_the_run_though_the_loss_is_finite(source, data, tmp_path, capsys, monkeypatch):
    """Clamped to 448, it would go unseen."""
    plain, calls = loop.fp8_update.end_update, []

    def planted(model, device):
        calls.append(1)
        if len(calls) == 6:
            layer = next(module for chunk in model for module in chunk.modules() if isinstance(module, Fp8Linear))
            layer.fp8_state.tensors["activations"].record(torch.tensor(torch.inf), torch.zeros(3, dtype=torch.int64))
        return plain(model, device)

    monkeypatch.setattr(loop.fp8_update, "end_update", planted)
    assert run(source, data, tmp_path / "run", **FP8) == 1
    said = capsys.readouterr().err
    assert "update 6: activations of the linear layers of layer 1 have infinity or NaN; update 4 is saved" in said


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"fp8_recipe": "delayed"}, "--fp8-recipe belongs to --precision fp8, not fp32"),
        ({"fp8_bf16_layers": "1,1"}, "--fp8-bf16-layers belongs to --precision fp8"),
        (
            {"precision": "fp8", "fp8_amax_history": 16},
            "--fp8-amax-history belongs to --fp8-recipe delayed, not tensorwise",
        ),
        ({"precision": "fp8"}, "--fp8-bf16-layers 1,1 leaves none of 2 layers in FP8"),
        ({"precision": "fp8", "fp8_bf16_layers": "1"}, "--fp8-bf16-layers"),
        ({"precision": "fp8", "fp8_bf16_layers": "0,-1"}, "--fp8-bf16-layers"),
        ({"precision": "fp8", "fp8_recipe": "int8"}, "--fp8-recipe"),
        (
            {"precision": "fp8", "fp8_recipe": "mxfp8", "fp8_bf16_layers": "0,0"},
            "--fp8-recipe mxfp8: MXFP8 needs a GPU of compute capability 10.0 or higher; give --fp8-recipe blockwise",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_nothing_written(source, data, tmp_path, capsys, options, text):
    assert run(source, data, tmp_path / "run", **options) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
