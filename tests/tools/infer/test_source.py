"""`--source`: a tensor that is missing is named before an engine starts, by every command."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from shared.errors import UserError
from tools.infer.source import open_hf_directory


@pytest.mark.parametrize("engine", ["vllm", "hf"])
def test_every_command_asks(engine, launcher, models, tmp_path):
    source = shutil.copytree(models("llama"), tmp_path / "model")
    weights = load_file(source / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "fox"}\n')
    (tmp_path / "task.yaml").write_text(
        "task: t\ndataset_path: json\ndataset_kwargs: {data_files: prompts.jsonl}\noutput_type: loglikelihood_rolling\n"
        'test_split: train\ndoc_to_text: ""\ndoc_to_target: "{{prompt}}"\nmetric_list: [{metric: bits_per_byte}]\n'
    )
    out = tmp_path / "out"
    commands = [("evaluate", "--tasks", tmp_path / "task.yaml", "--target", out, "--engine", engine)]
    if engine == "vllm":
        commands += [
            ("generate", "--prompts", tmp_path / "prompts.jsonl", "--target", out),
            ("chat",),
            ("serve", "--port", 0),
        ]
    for command in commands:
        done = launcher(*command, "--source", source)
        assert done.code == 2, done.stderr
        assert "model.layers.1.mlp.up_proj.weight is missing" in done.stderr
        assert not out.exists()


@pytest.mark.parametrize(
    ("files", "command"),
    [
        (
            {"latest_checkpointed_iteration.txt": "1", "iter_0000001/.metadata": "x", "iter_0000001/common.pt": "x"}
            | {"iter_0000001/metadata.json": "{}", "hf/config.json": "{}"},
            "`convert to-hf --source {} --target DIR`",
        ),
        (
            {"adapter_config.json": json.dumps({"peft_type": "LORA"}), "adapter_model.safetensors": "x"},
            "`convert merge-lora --source BASE --adapter {} --target DIR`",
        ),
    ],
    ids=["megatron", "adapter"],
)
def test_another_kind_of_directory_names_the_command_that_makes_a_model_of_it(files, command, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as caught:
        open_hf_directory(tmp_path)
    assert command.format(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
