"""The plan's bytes of states are those of the tensors that there are, on each of two processes.

Of models that a DeepSpeed engine trains, that transformers' Trainer trains, and that are frozen.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
WORKER = """
import gc, json, sys
import torch
from pathlib import Path
from types import SimpleNamespace
from peft import get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from tools.rlhf.engines.deepspeed import DeepSpeedEngine, EngineOptions, frozen_model, initialize_distributed
from tools.rlhf.engines.trl import common_arguments
from tools.rlhf.lora import Adapters, held_dtype
from tools.rlhf.memory_plan import frozen, trained_by_accelerate, trained_by_deepspeed
from tools.rlhf.models import load_policy, open_source
from tools.rlhf.options import DPOOptions

distributed = initialize_distributed()
path = Path(sys.argv[1])
source = open_source(path)
adapters = Adapters.open(DPOOptions(source=path, data=path, target=path / "none", lora_rank=4), source)
LARGE = 1 << 26  # the bucket of ZeRO-3's reductions, whatever the model

def held():
    found = {}
    for each in gc.get_objects():
        if type(each) in (torch.Tensor, torch.nn.Parameter):
            for tensor in (each, each.grad if each.is_leaf else None):
                if tensor is not None and tensor.untyped_storage().nbytes() < LARGE:
                    found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(found.values())

rows = []
gc.collect()
gc.freeze()  # what libraries made at import is not looked through each time
for zero, precision, lora in [(2, "bf16", True), (0, "fp32", False), (0, "bf16", False), (2, "fp32", False), (3, "bf16", False)]:
    gc.collect()
    before = held()
    model = load_policy(source, torch.bfloat16 if precision == "bf16" else torch.float32)
    if lora:
        model = adapters.attach(model, 0)
    planned = trained_by_deepspeed("policy", model, bf16=precision == "bf16", zero=zero, world_size=distributed.world_size)
    options = EngineOptions(zero=zero, precision=precision, micro_batch_size=4, accumulation=1, max_gradient_norm=1.0)
    engine = DeepSpeedEngine(model, options, distributed)
    ids = torch.randint(3, 90, (4, 8))
    engine.set_learning_rate(1e-3)
    for _ in range(2):
        loss = engine(input_ids=ids, labels=ids, use_cache=False).loss
        engine.backward(loss)
        del loss
        gc.collect()
        full = held() - before
        engine.step()
    gc.collect()
    between = planned.total - (0 if zero == 3 else planned.gradients)  # ZeRO-3 keeps its gradients' memory
    rows.append([zero, precision, lora, planned.total, full, between, held() - before])
    del model, engine

class Look(TrainerCallback):  # with DeepSpeed, after its update as well
    def on_pre_optimizer_step(self, *unused, **named):
        self.full = held() - before

    def on_step_end(self, *unused, **named):
        gc.collect()
        self.after = held() - before

for zero, precision, lora in [(0, "fp32", False), (0, "bf16", True), (0, "bf16", False), (2, "bf16", False), (3, "bf16", False)]:
    gc.collect()
    before = held()
    given = {"micro_batch_size": 4, "global_batch_size": 8, "zero": zero, "precision": precision, "learning_rate": 1e-3}
    options = DPOOptions(source=path, data=path, target=path / "none", **given)
    model = load_policy(source, held_dtype(precision, adapters if lora else None))
    if lora:
        model = get_peft_model(model, adapters.config())  # as TRL does: adapters are float32
    context = SimpleNamespace(state=SimpleNamespace(path=Path(sys.argv[2])))
    arguments = TrainingArguments(**common_arguments(context, options, distributed) | {"save_strategy": "no"}, max_steps=2)
    look, texts = Look(), [{"input_ids": torch.randint(3, 90, (8,)), "labels": torch.randint(3, 90, (8,))} for _ in range(16)]
    trainer = Trainer(model=model, args=arguments, train_dataset=texts, callbacks=[look])
    planned = trained_by_accelerate("policy", trainer.model, options, bf16=precision == "bf16", world_size=distributed.world_size)
    trainer.train()
    between = planned.total - (0 if zero == 3 else planned.gradients)
    rows.append([zero, precision, lora, between if zero else planned.total, look.full, between, look.after])
    del model, trainer, look, arguments
    unset_hf_deepspeed_config()

for zero in (0, 3):
    gc.collect()
    before = held()
    model = load_policy(source, torch.bfloat16)
    planned = frozen("reference", model, sharded=zero == 3, world_size=distributed.world_size)
    options = EngineOptions(zero=zero, precision="bf16", micro_batch_size=4, accumulation=1, max_gradient_norm=1.0)
    engine = frozen_model(model, options)
    with torch.no_grad():
        engine(input_ids=torch.randint(3, 90, (4, 8)), use_cache=False)
    gc.collect()
    rows.append([zero, "frozen", False, *[planned.total, held() - before] * 2])
    del model, engine
print("ROWS", json.dumps(rows))
"""


def test_planned_bytes_are_those_of_the_tensors(world, tmp_path):
    """With gradients, in front of an update; and after it."""
    (tmp_path / "worker.py").write_text(WORKER)
    job = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    environment = {name: value for name, value in os.environ.items() if name not in job} | {"PYTHONPATH": str(ROOT)}
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    job = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", tmp_path / "worker.py", world.policy, tmp_path / "state"],
            stdout=subprocess.PIPE, text=True, env=environment | job | {"RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in "01"
    ]  # fmt: skip
    said = [rank.communicate()[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    lines = [line for text in said for line in text.splitlines() if line.startswith("ROWS")]
    assert len(lines) == 2
    for zero, precision, lora, planned, full, between, after in (
        row for line in lines for row in json.loads(line.removeprefix("ROWS"))
    ):
        where = (
            f"ZeRO {zero}, {precision}, LoRA {lora}: {planned} planned, {full} held; {between} planned, {after} held"
        )
        # Beside the states: padding of what is cut, buffers of the model, and the last logits, 12 KiB, which DeepSpeed holds;
        # until the update, ZeRO-2 holds the last gradient that it has cut, the embedding's, 24 KiB.
        # ZeRO-3 keeps trained parameters of fewer than 1e5 numbers whole as well: here all, in bf16 a quarter of the plan.
        whole = planned // 4 if zero == 3 and precision != "frozen" else 0
        last = 4 * 96 * 64 if zero == 2 else 0
        assert abs(full - planned - whole) < 0.02 * planned + 16384 + last, where
        assert abs(after - between - whole) < 0.02 * between + 16384, where
