"""Plain Megatron-Core loads converted checkpoints, gives transformers' logits, and its checkpoints are exported bit for bit."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.checkpoint.formats.hugging_face import HfReader
from shared.checkpoint.formats.torch_dist_reader import TorchDistReader
from shared.families import registry

MODELS = ("llama-gqa", "qwen2-tied", "qwen3")
LAYOUTS = ("tp2", "pp2")
MOE = "mixtral"
FORMS = ("layer", "expert", "list")  # of keys, in megatron_worker.py; list: `moe_layer_freq`
POSITIONS = 288
# fp32 sums in another order (ranks add their parts of a row): a few 1e-6 of logits that spread over about 10.
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, write_checkpoint: Any, write_architecture: Any) -> Path:
    """What the two processes made of each model, at each layout."""
    folder = tmp_path_factory.mktemp("work")
    convert = [sys.executable, "-m", "tools.convert.cli", "to-megatron"]
    moe = registry.sizes()["mixtral-tiny"].with_values(vocab_size=259)
    for name in (*MODELS, MOE):
        path = folder / f"{name}.hf"
        source = write_architecture(path, moe) if name == MOE else write_checkpoint(path, name)
        subprocess.run([*convert, "--source", source, "--target", folder / f"{name}.megatron"], check=True)
        ids = torch.randint(259, (1, POSITIONS), generator=torch.Generator().manual_seed(1))
        torch.save(ids, folder / f"{name}.ids.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    worker = Path(__file__).with_name("megatron_worker.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, worker, folder, str(rank), port],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        texts = [process.communicate(timeout=1200)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for process, text in zip(ranks, texts, strict=True):
        assert process.returncode == 0, text[-4000:]
    return folder


@pytest.fixture(scope="module")
def reference(work: Path) -> dict[str, dict[str, torch.Tensor]]:
    """transformers' logits and greedy continuation."""
    from transformers import AutoModelForCausalLM

    found = {}
    for name in MODELS:
        model = AutoModelForCausalLM.from_pretrained(work / f"{name}.hf", dtype=torch.float32).eval()
        ids = torch.load(work / f"{name}.ids.pt")
        with torch.no_grad():
            found[name] = {"logits": model(ids).logits}
            continued = model.generate(ids, max_new_tokens=32, do_sample=False, eos_token_id=-1, pad_token_id=0)
        found[name]["continued"] = continued[:, -32:]
    return found


def test_plain_megatron_core_at_tp2_and_pp2(
    work: Path, reference: Any, convert: Any, tmp_path: Path, subtests: pytest.Subtests
) -> None:
    """One test, so that the processes are started once, however the tests are dealt over workers."""
    for name, layout in product(MODELS, LAYOUTS):
        made = torch.load(work / f"{name}.{layout}.pt")
        with subtests.test("logits are those of transformers", name=name, layout=layout):
            ours, theirs = made["logits"], reference[name]["logits"]
            assert ours.shape == theirs.shape == (1, POSITIONS, 259)
            assert theirs.std() > 1  # logits that a misplaced row would change
            assert (ours - theirs).abs().max() < TOLERANCE
        with subtests.test("greedy continuation is that of transformers", name=name, layout=layout):
            assert made["continued"].shape == (1, 32)
            assert torch.equal(made["continued"], reference[name]["continued"])
        with subtests.test("what Megatron-Core saved exports bit for bit", name=name, layout=layout):
            check_export(work / f"{name}.{layout}", work / f"{name}.hf", tmp_path / f"{name}.{layout}", convert)
    named = [(f"{MOE}.{layout}.{form}", MOE) for layout in (*LAYOUTS, "ep2") for form in FORMS]
    for directory, name in (*named, *((f"{name}.tp2.expert", name) for name in MODELS)):
        with subtests.test("layers and experts under keys of their own export bit for bit", name=directory):
            keys = TorchDistReader(work / directory / "iter_0000007").tensors
            assert "decoder.layers.1.self_attention.linear_proj.weight" in keys
            single = "decoder.layers.1.mlp.experts.experts.3.linear_fc2.weight"
            assert (single in keys) == (name == MOE and directory.endswith("expert"))
            check_export(work / directory, work / f"{name}.hf", tmp_path / directory, convert)
    for layout in (*LAYOUTS, "ep2"):
        with subtests.test("the local spec's name of the norm before experts", layout=layout):
            directory = f"{MOE}.{layout}.local"
            keys = TorchDistReader(work / directory / "iter_0000007").tensors
            assert "decoder.layers.mlp.linear_fc1.layer_norm_weight" in keys
            check_export(work / directory, work / f"{MOE}.hf", tmp_path / directory, convert)


def check_export(saved: Path, source: Path, target: Path, convert: Any) -> None:
    """Row and column shards of two ranks, fp32, padded for another layout: the bf16 source's bits come back."""
    words = ("--source", saved, "--hf-files", source, "--dtype", "bf16", "--target", target)
    answer = convert("to-hf", *words)
    assert answer.code == 0, answer.err
    before, after = HfReader(source), HfReader(target)
    assert before.tensors.keys() == after.tensors.keys()
    for tensor in before.tensors:
        assert b"".join(map(bytes, before.rows(tensor))) == b"".join(map(bytes, after.rows(tensor))), tensor
