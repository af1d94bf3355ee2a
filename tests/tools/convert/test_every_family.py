"""Every family against transformers, on its tiny sizes. No family is named here.

Hugging Face -> Megatron -> Hugging Face is bitwise identical. Logits agree over hundreds of positions: on one process, at
TP=2 with sequence parallelism, at PP=2. One training step gives the same loss and gradients.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.architecture.architecture import Architecture
from shared.checkpoint.formats.hugging_face import HfReader
from shared.families import registry
from shared.families.common.transformers_workarounds import with_workarounds
from shared.model.prefix_lm import with_blank
from tests.references.prediction import Predicting

POSITIONS, CONTINUED = 256, 32
# fp32 sums in another order, as `convert verify` explains: 1e-4 of the logits' spread.
TOLERANCE = 1e-4
# The same for gradients, which are sums over 256 positions of products of such numbers: relative to the largest of the
# model, since some are zero but for rounding (a bias of keys shifts all scores alike).
GRADIENT_TOLERANCE = 1e-4


def test_round_trip_and_logits(
    size: str,
    tiny_sizes: dict[str, Architecture],
    write_architecture: Any,
    convert: Any,
    remote_code: Any,
    tmp_path: Path,
    proof: Any,
) -> None:
    architecture = tiny_sizes[size]
    source, target, back = (tmp_path / name for name in ("hf", "megatron", "back"))
    write_architecture(source, architecture)
    with proof("round trip", size=size):
        assert convert("to-megatron", "--source", source, "--target", target).code == 0
        assert convert("to-hf", "--source", target, "--target", back).code == 0
        for file in (file for file in source.rglob("*") if file.is_file()):
            assert (back / file.relative_to(source)).read_bytes() == file.read_bytes(), file
    with proof("logits", size=size) as figures:
        answer = convert(
            "verify", "--source", source, "--target", target, "--positions", "288", *remote_code(architecture)
        )
        assert answer.code == 0, answer.err
        found = json.loads(target.with_name("megatron.certificate.json").read_text())["logits"]
        figures["difference"] = found["max_difference"] / found["spread"]
        assert found["positions"] == 288
        assert figures["difference"] < TOLERANCE
        assert found["spread"] > 0.1  # logits that a misplaced row would change


@pytest.fixture(scope="module")
def worker() -> Any:
    import importlib.util

    path = Path(__file__).with_name("family_worker.py")
    specification = importlib.util.spec_from_file_location("family_worker", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def reference(source: Path, ids: torch.Tensor, worker: Any, architecture: Architecture) -> dict[str, Any]:
    """transformers' continuation of the ids, the logits of both, and the loss and gradients of one step."""
    from transformers import AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    from tools.convert.verify_logits import attention_of

    remote = registry.FAMILIES[architecture.family].remote
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, attn_implementation=attention_of(architecture), trust_remote_code=remote
    ).eval()
    with_workarounds(model)
    with torch.no_grad():
        everything = {"attention_mask": torch.ones_like(ids), "eos_token_id": -1, "pad_token_id": 0}
        if not remote:
            ids = model.generate(ids, max_new_tokens=CONTINUED, do_sample=False, **everything)
        while ids.shape[1] < POSITIONS + CONTINUED:  # our references have no cache
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        logits = model(ids).logits
    rows = worker.rows_of(ids, architecture)
    if architecture.mtp:
        return {"ids": ids, "logits": logits} | reference_further(source, ids, rows, worker)
    scores = model(rows[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), rows[:, 1:].flatten())
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    gradients = revert_weight_conversion(model, gradients)  # under the names that files have, one for every expert
    return {"ids": ids, "logits": logits, "loss": loss.item(), "gradients": gradients}


def reference_further(source: Path, ids: torch.Tensor, rows: torch.Tensor, worker: Any) -> dict[str, Any]:
    """The same of a model that predicts tokens further ahead, and the logits of those."""
    predicting = Predicting(source, source.with_suffix(".predicting"))
    with torch.no_grad():
        _, further = predicting.logits(ids)
    scores, ahead = predicting.logits(rows[:, :-1])
    total = torch.nn.functional.cross_entropy(scores.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum")
    later = torch.nn.functional.cross_entropy(ahead.flatten(0, 1), rows[:, 2:].flatten(), reduction="sum")
    loss = (total + worker.SCALE * later) / rows[:, 1:].numel()
    loss.backward()
    return {"loss": loss.item(), "gradients": predicting.gradients(), "further": further}


@pytest.fixture(scope="module")
def work(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_sizes: dict[str, Architecture],
    write_architecture: Any,
    worker: Any,
) -> tuple[Path, dict[str, Any]]:
    """What two processes made of each model, at each layout, and what transformers makes of it."""
    from tools.convert.cli import tool

    folder = tmp_path_factory.mktemp("families")
    known = {}
    for size, architecture in tiny_sizes.items():
        source = write_architecture(folder / f"{size}.hf", architecture, dtype="fp32")
        with pytest.raises(SystemExit) as ended:
            tool.run(["to-megatron", "--source", str(source), "--target", str(folder / f"{size}.megatron")])
        assert not ended.value.code
        ids = with_blank(torch.randint(509, (1, POSITIONS), generator=torch.Generator().manual_seed(1)), architecture)
        known[size] = reference(source, ids, worker, architecture)
        torch.save(known[size]["ids"], folder / f"{size}.ids.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, Path(__file__).with_name("family_worker.py"), folder]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), port],
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"},
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
    return folder, known


def test_two_processes_run_and_train_as_transformers_does(
    work: tuple[Path, dict[str, Any]],
    tiny_sizes: dict[str, Architecture],
    worker: Any,
    convert: Any,
    tmp_path: Path,
    subtests: pytest.Subtests,
    proof: Any,
) -> None:
    """One test, so that the processes are started once, however the tests are dealt over workers."""
    folder, known = work
    for size, layout in ((name, at) for name, a in tiny_sizes.items() for at in worker.layouts_of(a)):
        made, theirs = torch.load(folder / f"{size}.{layout}.pt"), known[size]
        architecture, at = tiny_sizes[size], {"size": size, "layout": layout}
        with subtests.test("logits and greedy continuation", **at), proof(f"logits {layout}", size=size) as figures:
            assert made["logits"].shape == (1, POSITIONS + CONTINUED, 509)
            difference = (made["logits"] - theirs["logits"]).abs().max() / theirs["logits"].std()
            figures |= {"difference": difference.item(), "tokens": CONTINUED}
            assert difference < TOLERANCE
            # Each next token given the same tokens before it: the continuations are equal, by induction.
            assert torch.equal(made["logits"][:, POSITIONS - 1 : -1].argmax(-1), theirs["ids"][:, POSITIONS:])
        if architecture.mtp:
            with subtests.test("logits of tokens further ahead", **at):
                assert made["further"].shape == (1, POSITIONS + CONTINUED, 509)
                off = (made["further"][:, :-1] - theirs["further"]).abs().max() / theirs["further"].std()
                assert off < TOLERANCE
        with subtests.test("loss and gradients of a step", **at), proof(f"training {layout}", size=size) as figures:
            figures["loss"] = abs(made["loss"] / theirs["loss"] - 1)
            assert figures["loss"] < 1e-5
            target = tmp_path / f"{size}.{layout}"
            words = ("--source", folder / f"{size}.{layout}.gradients", "--hf-files", folder / f"{size}.hf")
            answer = convert("to-hf", *words, "--dtype", "fp32", "--target", target)
            assert answer.code == 0, answer.err
            figures["difference"] = check_gradients(architecture, HfReader(target), theirs["gradients"])
        with subtests.test("a file for each rank, from before torch_dist", size=size, layout=layout):
            target = tmp_path / f"{size}.{layout}.of-ranks"
            words = ("--source", folder / f"{size}.{layout}.ranks", "--hf-files", folder / f"{size}.hf")
            answer = convert("to-hf", *words, "--target", target)
            if getattr(architecture.attention, "qk_norm", None) == "each_head":  # no module of Megatron-Core's
                assert answer.code == 2
                assert "QK norms with a weight per head are not Megatron-LM's" in answer.err
                continue
            if architecture.mtp and layout == "ep2":  # the worker leaves such layers in these files only
                assert answer.code == 2
                assert "MTP layers in rank files are not supported; save as torch_dist" in answer.err
                continue
            assert answer.code == 0, answer.err
            before, after = HfReader(folder / f"{size}.hf"), HfReader(target)
            without = replace(architecture, mtp=None)
            entries = registry.table_of(without if architecture.mtp else architecture).entries()
            kept = {source.name for entry in entries for source in entry.sources}
            kept |= registry.table_of(architecture).required_pass_through().keys()
            assert after.tensors.keys() == kept
            assert architecture.mtp or kept == before.tensors.keys()
            for name in after.tensors:
                assert b"".join(map(bytes, before.rows(name))) == b"".join(map(bytes, after.rows(name))), name


def check_gradients(a: Architecture, reader: HfReader, theirs: dict[str, torch.Tensor]) -> float:
    """The largest difference, relative to the largest gradient."""
    differences = []
    # Gradients are brought back as if they were weights: those held less one come with one added.
    plus_one = {s.name for entry in registry.table_of(a).entries() if entry.zero_centered_gamma for s in entry.sources}
    largest = max(gradient.abs().max() for gradient in theirs.values())
    # Not trained by gradients, though kept with the weights.
    beside = registry.table_of(a).required_pass_through()
    trained = {name for name in reader.tensors.keys() - beside if not name.endswith("e_score_correction_bias")}
    assert trained == theirs.keys()
    for name, expected in theirs.items():
        data = bytearray(b"".join(map(bytes, reader.rows(name))))
        ours = torch.frombuffer(data, dtype=torch.float32).view(reader.tensors[name].shape)
        differences.append(((ours - int(name in plus_one) - expected).abs().max() / largest).item())
        assert differences[-1] < GRADIENT_TOLERANCE, name
        assert expected.abs().max() > 0, name
    return max(differences)
