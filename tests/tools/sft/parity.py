"""`sft train` beside TRL's SFTTrainer: 20 updates on the same packed tokens. `python -m tests.tools.sft.parity` writes the table.

Each side's classes, data loading, loss, clipping, AdamW and PEFT adapters are its own.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Collection
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from shared.checkpoint.directory.publish import publish
from shared.cli import invoked
from shared.training.data import PackedSequences
from shared.training.samplers import batch_positions
from tests.record_proofs import revision
from tests.training_runs import exit_code, record, words
from tests.workers import ROOT
from tools.sft.cli import tool

CONVERT = ROOT / "tools" / "convert" / ".venv" / "bin" / "python"
TRL = ROOT / "tools" / "rlhf" / ".venv" / "bin" / "python"
PAGE = ROOT / "tools" / "sft" / "PARITY.md"
TOLERANCE = 1e-5  # of each update's loss: fp32 sums in another order, over 20 updates
UPDATES, ROWS, LENGTH, VOCAB, SEED = 20, 4, 32, 96, 7
RATE, DECAY, BETAS = 1e-3, 0.01, (0.9, 0.95)

_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.1,
    "pad_token_id": 0,
}
_GATED = {**_SMALL, "intermediate_size": 80, "num_key_value_heads": 2, "max_position_embeddings": 64}
_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_MLP = ["gate_proj", "up_proj", "down_proj"]
_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# name -> config.json, arguments of PEFT's LoraConfig
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"config": {**_GATED, "model_type": "llama"}, "lora": {"target_modules": _ATTENTION + _MLP}},
    "qwen3": {
        "config": {**_GATED, "model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
        "lora": {"target_modules": _ATTENTION + _MLP, "use_rslora": True},
    },
    "bloom": {  # ALiBi
        "config": {**{k: v for k, v in _SMALL.items() if "heads" not in k and "layers" not in k}, "model_type": "bloom"}
        | {"n_layer": 2, "n_head": 4},
        "lora": {"target_modules": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]},
    },
    "qwen3_moe": {
        "config": {
            **_GATED,
            "model_type": "qwen3_moe",
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "router_aux_loss_coef": 0.0,  # the formulas of the balancing loss differ
        },
        "lora": {"target_modules": _ATTENTION, "target_parameters": _EXPERTS},
    },
}
WHAT = {"llama": "LLaMA-like", "qwen3": "Qwen3-like, tied", "bloom": "ALiBi (BLOOM)", "qwen3_moe": "MoE (Qwen3)"}
CASES = [(model, lora) for model in MODELS for lora in (False, True)]

ABOUT = f"""# Fine-tuning beside TRL

Written by `make parity`: {UPDATES} updates of `sft train` and of TRL's `SFTTrainer` on the same packed tokens, fp32, AdamW
(rate {RATE}, betas {BETAS[0]} and {BETAS[1]}, decay {DECAY}, clip 1), {ROWS} rows of {LENGTH} tokens an update, two
conversations a row. The models are tiny and random; LoRA begins with an adapter that PEFT wrote, with A and B random. Every
loss must agree within {TOLERANCE:.0e} of itself: fp32 sums in another order. TRL packs rows without padding; BLOOM's class in
transformers knows no packed rows, so there each conversation is a row. Without balancing loss of experts: its formula is
transformers' own.
"""
Numbers = list[list[float]]  # loss and gradient norm of each update


def case_name(model: str, *, lora: bool) -> str:
    return f"{model}, {'LoRA' if lora else 'full'}"


def write_data(target: Path) -> Path:
    """Rows of two conversations of different lengths, every second row with padding: a question, and an answer that counts up."""
    rng, rows = np.random.default_rng(3), 44  # 80 samples: not a whole number of epochs
    with invoked("sft", "prepare", {}), publish(target, kind="dataset", inputs={}) as out:
        tokens = np.zeros((rows, LENGTH), np.int32)
        labels, segments = np.full_like(tokens, -100), np.zeros_like(tokens)
        for row in range(rows):
            middle, end = int(rng.integers(8, 24)), LENGTH - (row % 2) * int(rng.integers(1, 6))
            for number, (start, stop) in enumerate(((0, middle), (middle, end)), start=1):
                said = (np.arange(stop - start) * int(rng.integers(1, 5)) + rng.integers(2, VOCAB)) % (VOCAB - 2) + 2
                tokens[row, start:stop], segments[row, start:stop] = said, number
                answer = int(rng.integers(1, stop - start - 2))
                labels[row, start + answer : stop - 1] = said[answer + 1 :]
        for part, array in (("tokens", tokens), ("labels", labels), ("segments", segments)):
            np.save(out.path / f"train.{part}.npy", array)
        (out.path / "tokenizer").mkdir()
        (out.path / "tokenizer" / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
        split = {"sequences": rows, "tokens": int((segments > 0).sum()), "target_tokens": int((labels >= 0).sum())}
        out.describe(format="packed", seq_length=LENGTH, splits={"train": split}, vocab_size=VOCAB)
    return target


def conversations(data: Path) -> list[Any]:
    """`[update][row][conversation]`: tokens and labels, in the order in which `sft train` reads them."""
    rows = PackedSequences(data, "train", seed=SEED)
    updates = []
    for update in range(UPDATES):
        batch = rows.batch(batch_positions(first=update * ROWS, micro_batch=0, micro_batch_size=ROWS, rank=0, ranks=1))
        assert batch.segments is not None
        parts = []
        for tokens, labels, segments in zip(batch.tokens, batch.labels, batch.segments, strict=True):
            own = [segments == number for number in range(1, int(segments.max()) + 1)]
            parts.append([(tokens[mask].tolist(), labels[mask].tolist()) for mask in own])
        updates.append(parts)
    return updates


def compare(folder: Path, cases: Collection[tuple[str, bool]]) -> dict[str, tuple[Numbers, Numbers]]:
    """By case the losses and gradient norms of `sft train`, and of TRL. `cases`: of `CASES`, model and LoRA."""
    data = write_data(folder / "data")
    models = dict.fromkeys(model for model, _ in cases)
    options = {"learning_rate": RATE, "weight_decay": DECAY, "adam_beta1": BETAS[0], "adam_beta2": BETAS[1]}
    given = {
        case_name(model, lora=lora): {"model": model, "lora": lora, "options": {**options, "max_grad_norm": 1.0}}
        for model, lora in cases
    }
    (folder / "models.json").write_text(
        json.dumps(
            {name: {**MODELS[name], "lora": {"r": 4, "lora_alpha": 8, **MODELS[name]["lora"]}} for name in models}
        )
    )
    (folder / "updates.json").write_text(json.dumps(conversations(data)))
    (folder / "cases.json").write_text(json.dumps(given))
    reference = [TRL, "-W", "ignore", Path(__file__).with_name("trl_reference.py"), folder]
    done = subprocess.run(reference, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    theirs = json.loads((folder / "results.json").read_text())
    for name in models:
        paths = ("--source", folder / name / "hf", "--target", folder / name / "megatron")
        command = [CONVERT, "-m", "tools.convert.cli", "to-megatron", *paths]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    found = {}
    for model, lora in cases:
        name, target = case_name(model, lora=lora), folder / model / ("lora-run" if lora else "run")
        line = words(
            "train",
            source=folder / model / "megatron",
            data=data,
            target=target,
            steps=UPDATES,
            global_batch_size=ROWS,
            micro_batch_size=2,
            schedule="constant",
            precision="fp32",
            seed=SEED,
            track="none",
            learning_rate=RATE,
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            **(
                {"adapter": folder / model / "adapter", "lora_weight_decay": DECAY} if lora else {"weight_decay": DECAY}
            ),
        )
        assert exit_code(tool, line) == 0, name
        ours = [[row["loss"], row["gradient_norm"]] for row in record(target) if "loss" in row]
        found[name] = (ours, theirs[name])
    return found


def difference(ours: Numbers, theirs: Numbers) -> float:
    """The largest relative difference of the losses."""
    assert len(ours) == len(theirs) == UPDATES
    return max(abs(one[0] - other[0]) / other[0] for one, other in zip(ours, theirs, strict=True))


def table(results: dict[str, tuple[Numbers, Numbers]], versions: dict[str, str]) -> str:
    """The page."""
    said = ", ".join(f"{name} {number}" for name, number in versions.items())
    lines = [
        *ABOUT.splitlines(),
        "",
        f"Run on {datetime.now(UTC):%Y-%m-%d} at {revision()}, {platform.machine()}, {said}.",
        "",
        "| model | trained | loss, first and last update | largest relative difference of a loss | of the first gradient norm |",
        "|---|---|---|---|---|",
    ]
    for model, lora in CASES:
        ours, theirs = results[case_name(model, lora=lora)]
        norm = abs(ours[0][1] - theirs[0][1]) / theirs[0][1]
        losses = f"{theirs[0][0]:.5f}, {theirs[-1][0]:.5f}"
        lines.append(
            f"| {WHAT[model]} | {'LoRA' if lora else 'all'} | {losses} | {difference(ours, theirs):.0e} | {norm:.0e} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        results = compare(Path(scratch), CASES)
    query = "from importlib.metadata import version; print(version('trl'), version('peft'))"
    trl, peft = subprocess.run([TRL, "-c", query], capture_output=True, text=True, check=True).stdout.split()
    versions = {"trl": trl, "peft": peft} | {name: version(name) for name in ("transformers", "megatron-core", "torch")}
    PAGE.write_text(table(results, versions), encoding="utf-8")
    worst = max(difference(*pair) for pair in results.values())
    print(f"{PAGE}: the largest difference is {worst:.1e}")
    sys.exit(worst > TOLERANCE)


if __name__ == "__main__":
    main()
