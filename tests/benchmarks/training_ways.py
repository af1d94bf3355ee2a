"""The ways of training that `bench_train.py` compares."""

from __future__ import annotations

import atexit
import contextlib
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from shared.architecture.architecture import Architecture
from shared.families import registry
from shared.model import gpt
from shared.parallel import ParallelConfig
from shared.report.metrics import Metrics
from shared.runtime import process_groups, progress
from shared.runtime.stop_request import StopRequest
from shared.training.config import TrainingConfig
from shared.training.data import Batch
from shared.training.loop import forward_backward, model_overrides
from shared.training.optimizer import build_optimizer, set_learning_rate, wrap
from shared.training.read_ahead import ReadAhead
from shared.training.samplers import Indices

if TYPE_CHECKING:
    from tests.benchmarks.bench_train import Shape

RATE, DECAY, BETAS, EPSILON, CLIP = 1e-4, 0.1, (0.9, 0.95), 1e-8, 1.0


class Random:
    """Random tokens, a function of the position."""

    def __init__(self, shape: Shape) -> None:
        self.sequence_length, self._vocab = shape.sequence, shape.vocab

    def __len__(self) -> int:
        return 1 << 30

    def batch(self, positions: Indices) -> Batch:
        generator = np.random.default_rng(positions)
        rows = generator.integers(0, self._vocab, (len(positions), self.sequence_length + 1))
        samples = torch.from_numpy(rows)
        return Batch(tokens=samples[:, :-1].contiguous(), labels=samples[:, 1:].contiguous())


def configuration(shape: Shape) -> dict[str, Any]:
    """config.json of the model."""
    return {
        "model_type": "qwen3",
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.groups,
        "head_dim": shape.hidden // shape.heads,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.sequence,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    }


def make(shape: Shape) -> dict[str, Callable[[int], float]]:
    """Name -> a function that makes the update of an index and returns its loss."""
    config = training_config(shape)
    device = process_groups.initialize(config.parallel, 1)
    torch.manual_seed(1)
    architecture = registry.from_config(configuration(shape))
    transformers = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**configuration(shape)), attn_implementation="sdpa", dtype=torch.float32
    ).to(device)
    chunk = built(architecture, config, torch.float32)
    positions = torch.arange(shape.sequence, device=device).expand(shape.micro, -1)

    def of_megatron(batch: Batch) -> torch.Tensor:
        losses: torch.Tensor = chunk(batch.tokens, positions, None, labels=batch.labels)
        return losses.mean()

    def of_transformers(batch: Batch) -> torch.Tensor:
        logits = transformers(input_ids=batch.tokens, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch.labels.flatten())

    return {
        "loop": loop(shape, config, architecture, device),
        "megatron": plain(shape, of_megatron, chunk.parameters(), device),
        "transformers": plain(shape, of_transformers, transformers.parameters(), device),
    }


def built(architecture: Architecture, config: TrainingConfig, dtype: torch.dtype) -> gpt.LanguageModel:
    """Random weights."""
    (chunk,) = gpt.build(
        architecture, config.parallel, dtype=dtype, perform_initialization=True, **model_overrides(config)
    )
    return chunk


def training_config(shape: Shape) -> TrainingConfig:
    return TrainingConfig(
        steps=1000,
        sequence_length=shape.sequence,
        micro_batch_size=shape.micro,
        global_batch_size=shape.global_,
        learning_rate=RATE,
        min_learning_rate=RATE,
        schedule="constant",
        warmup_steps=0,
        decay_steps=0,
        weight_decay=DECAY,
        mtp_loss_scaling_factor=0.0,
        clip_grad=CLIP,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        seed=1,
        precision="bf16" if torch.cuda.is_available() else "fp32",
        fp8=None,
        recompute=("none",),
        moe_router_bias_update_rate=0.0,
        parallel=ParallelConfig(),
        save_every=1000,
        keep=1,
        async_save=False,
        log_every=1000,
        validate_every=0,
        validation_sequences=1,
        backend=None,
        attention_backend=None,
        overlap=True,
    )


def loop(
    shape: Shape, config: TrainingConfig, architecture: Architecture, device: torch.device
) -> Callable[[int], float]:
    """The update of `shared.training.loop`, watched and recorded in metrics.jsonl."""
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    model = wrap([built(architecture, config, dtype)], overlap=config.overlap)
    optimizer = build_optimizer(config, model)
    data = ReadAhead(Random(shape), ahead=shape.global_, pin=device.type == "cuda")
    schedule = config.learning_rates()
    stop, folder = StopRequest(), tempfile.TemporaryDirectory(prefix="bench-train-")
    metrics = Metrics(Path(folder.name), resumed_step=None, track=())
    atexit.register(lambda: (progress.end(), metrics.close(), folder.cleanup()))
    progress.begin(3600.0)

    def update(index: int) -> float:
        progress.update(index + 1)
        started = time.perf_counter()
        loss = forward_backward(config, model, data, index * shape.global_, device)
        progress.at("optimizer")
        rate = schedule.learning_rate(index + 1)
        set_learning_rate(optimizer, rate)
        stop.ask(device)
        _, norm, _ = optimizer.step()
        seconds = time.perf_counter() - started
        progress.updated(seconds)
        progress.at("recording")
        metrics.append(
            step=index + 1,
            loss=loss.mean,
            learning_rate=rate,
            gradient_norm=norm,
            targets=loss.targets,
            seconds=seconds,
        )
        assert not stop.answer()
        return loss.mean

    return update


def plain(
    shape: Shape,
    loss_of: Callable[[Batch], torch.Tensor],
    parameters: Iterable[torch.nn.Parameter],
    device: torch.device,
) -> Callable[[int], float]:
    """The update as a page of torch."""
    weights = list(parameters)
    groups = [
        {"params": [each for each in weights if each.dim() > 1], "weight_decay": DECAY},
        {"params": [each for each in weights if each.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, eps=EPSILON, fused=True)
    data, micro_batches = Random(shape), shape.global_ // shape.micro

    def update(index: int) -> float:
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=device)
        for micro_batch in range(micro_batches):
            first = index * shape.global_ + micro_batch * shape.micro
            batch = data.batch(np.arange(first, first + shape.micro)).to(device)
            with torch.autocast(device.type, torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext():
                loss = loss_of(batch) / micro_batches
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(weights, CLIP)
        optimizer.step()
        return total.item()

    return update
