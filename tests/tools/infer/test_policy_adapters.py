"""Adapters as a policy: every tensor that PEFT would adapt, the server's base, the version; and a copy that stays as checked.

The faults that a trainer's publication can have are posted to a server in test_rollouts.py.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file

from shared.checkpoint.formats.weights_digest import weights_digest
from shared.errors import UserError
from tests.tools.infer.adapters import CONFIG, WEIGHTS, make_adapter, restamped
from tools.infer import policy_adapters
from tools.infer.policy_adapters import PolicyAdapters
from tools.infer.weight_check import ServedWeights


@pytest.fixture
def base(models):
    return models("llama")


@pytest.fixture
def taken(base):
    return PolicyAdapters(
        base=weights_digest(base), shapes=ServedWeights.read(base).shapes, rank=8, modules=None, fused={}
    )


@pytest.fixture
def adapter(base, tmp_path):
    return make_adapter(tmp_path / "adapter", base, version="1")


def fields(path, **changes):
    (path / CONFIG).write_text(json.dumps(json.loads((path / CONFIG).read_text()) | changes))


def test_what_is_held_stays_as_it_was_checked(taken, adapter, tmp_path):
    held = taken.hold(adapter, "1", tmp_path / "copy")
    assert (held.version, held.origin, held.path) == ("1", adapter, tmp_path / "copy")
    assert [(held.path / name).read_bytes() for name in (CONFIG, WEIGHTS)] == [
        (adapter / name).read_bytes() for name in (CONFIG, WEIGHTS)
    ]
    again = taken.hold(adapter, "1", tmp_path / "again")
    assert again.content == held.content
    fields(adapter, lora_alpha=16)
    assert taken.hold(adapter, "1", tmp_path / "other").content != held.content


def test_an_adapter_that_changes_while_it_is_read_is_refused(taken, adapter, tmp_path, monkeypatch):
    copyfile = shutil.copyfile

    def late(source, target):
        copyfile(source, target)
        fields(adapter, lora_alpha=16)

    monkeypatch.setattr(policy_adapters.shutil, "copyfile", late)
    with pytest.raises(UserError, match=f"adapter {adapter} has changed while it was read"):
        taken.hold(adapter, "1", tmp_path / "copy")


@pytest.mark.parametrize("targets", [["q_proj", "self_attn.v_proj"], r"model\.layers\.\d+\.self_attn\.(q|v)_proj"])
def test_targets_are_ends_of_names_or_a_pattern_of_whole_ones(taken, base, tmp_path, targets):
    adapter = make_adapter(tmp_path / "adapter", base, version="1", targets=["q_proj", "v_proj"])
    fields(adapter, target_modules=targets)
    taken.hold(adapter, "1", tmp_path / "copy")
    name = "model.layers.1.self_attn.v_proj"
    lacking = restamped(adapter, "lacking", drop=[f"base_model.model.{name}.lora_{side}.weight" for side in "AB"])
    with pytest.raises(UserError, match=f"{lacking} lacks the tensors of {name}, which its target_modules name"):
        taken.hold(lacking, "1", tmp_path / "other")


def test_a_fused_projection_that_vllm_has_in_parts_is_refused_by_name(taken, adapter, tmp_path):
    fused = replace(taken, fused={"up_proj": ["one", "two"]})
    with pytest.raises(UserError, match=r"adapts model.layers.0.mlp.up_proj, and vLLM .* its parts alone \(one, two\)"):
        fused.hold(adapter, "1", tmp_path / "copy")


def test_another_base_or_version_is_refused_by_name(taken, adapter, tmp_path):
    based = restamped(adapter, "based", base="0" * 32)
    with pytest.raises(UserError, match=f"{based} was trained on another base than this server's --source: .* 0000"):
        taken.hold(based, "1", tmp_path / "copy")
    with pytest.raises(UserError, match="is of version 1, and was published as 2"):
        taken.hold(adapter, "2", tmp_path / "copy")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda path: fields(path, exclude_modules=["q_proj"]),
            "has exclude_modules; a policy's adapter names modules by",
        ),
        (lambda path: fields(path, layers_to_transform=[0]), "has layers_to_transform"),
        (lambda path: (path / CONFIG).unlink(), "is no adapter of PEFT"),
        (lambda path: shutil.rmtree(path), "is not a directory"),
        (
            lambda path: save_file(load_file(path / WEIGHTS), path / WEIGHTS, metadata={"format": "pt"}),
            "does not say of which version and base it is",
        ),
    ],
)
def test_what_cannot_be_checked_is_refused(taken, adapter, tmp_path, change, message):
    change(adapter)
    with pytest.raises(UserError, match=message):
        taken.hold(adapter, "1", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
