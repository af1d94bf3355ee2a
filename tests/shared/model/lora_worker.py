"""Trains adapters in worlds of one and two processes, from an adapter of PEFT: `python lora_worker.py DIRECTORY`.

DIRECTORY/layouts.json: by case, by layout the world size, the fields of ParallelConfig and of TrainingConfig, and whether experts
are computed one by one. Reads what peft_reference.py wrote, and the base as DIRECTORY/<case>/megatron. Writes
DIRECTORY/<case>/<layout>: the state after three updates, and results.json.
"""

import importlib.util
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

from shared.runtime.silence_warnings import silence

silence()

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from shared.families import registry  # noqa: E402
from shared.mapping.adapters import LoraSettings, adapted_linears, adapter_copies, peft_names  # noqa: E402
from shared.model import gpt, lora, weights  # noqa: E402
from shared.model.experts import GroupedExperts  # noqa: E402
from shared.parallel import ParallelConfig  # noqa: E402
from shared.runtime import process_groups  # noqa: E402
from shared.training import loop, state  # noqa: E402
from shared.training.config import TrainingConfig  # noqa: E402
from shared.training.optimizer import build_optimizer, set_learning_rate, wrap  # noqa: E402
from tests.workers import forked_world  # noqa: E402

TESTS = Path(__file__).parents[1]


def module(name: str, path: Path):
    specification = importlib.util.spec_from_file_location(name, path)
    made = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(made)
    return made


Words = module("layouts_worker", TESTS / "training" / "layouts_worker.py").Words


class Session:
    """A model with adapters, from PEFT's or from a saved state."""

    def __init__(self, directory: Path, config: TrainingConfig, *, loop_of_experts: bool, saved: Path | None) -> None:
        self.config = config
        self.device = process_groups.initialize(config.parallel, 1)
        # transformers saves no MTP layers.
        self.architecture = replace(registry.from_files(directory / "hf"), mtp=None)
        if self.architecture.moe:  # transformers adds no balancing loss unless asked to
            self.architecture = self.architecture.with_values(moe={"auxiliary_loss": 0.0})
        self.chunks = gpt.build(
            self.architecture,
            config.parallel,
            dtype=torch.float32,
            recompute=config.recompute,
            **loop.model_overrides(config),
        )
        weights.load(self.chunks, directory / "megatron" / "release")
        loop.trainable_of(config, self.architecture).apply(self.chunks)
        if saved is None:
            lora.fill(self.chunks, load_file(directory / "adapter" / "adapter_model.safetensors"))
        else:
            weights.load_adapters(self.chunks, saved)
        for each in (each for chunk in self.chunks for each in chunk.modules() if isinstance(each, GroupedExperts)):
            each._foreign = "this test" if loop_of_experts else None
        self.model = wrap(self.chunks, overlap=config.overlap)
        self.optimizer = build_optimizer(config, self.model)
        if saved is not None:
            state.load(saved, self.model, self.optimizer)

    def train(self, first: int, last: int, look=lambda: None) -> list[list[float]]:
        """Loss and gradient norm of the updates; `look` is called between the backward pass and the first update."""
        rows = []
        for step in range(first, last):
            loss = loop.forward_backward(self.config, self.model, Words(), step * 8, self.device)
            if step == first:
                look()
            set_learning_rate(self.optimizer, 1e-2)
            _, norm, _ = self.optimizer.step()
            rows.append([loss.mean, float(norm)])
        return rows

    def gradient_error(self, wanted: dict[str, torch.Tensor]) -> float:
        """The worst relative error of the gradient of an A or B, on one process."""
        names = peft_names(adapted_linears(registry.table_of(self.architecture), self.config.lora.targets))
        found = {name: torch.zeros(each.shape) for name, each in wanted.items()}
        for layer in lora.adapted_modules(self.chunks):
            own = {"lora_A": layer.lora_A.main_grad}
            sizes = [piece.adapted_rows for piece in layer.linear.pieces]
            parts = layer.lora_B.main_grad.split(sizes)
            own |= {f"lora_B{piece.part}": part for piece, part in zip(layer.linear.pieces, parts, strict=True)}
            for copy in adapter_copies(layer.linear, names, layer.settings.rank):
                found[copy.peft][copy.block] = own[copy.tensor][copy.rows]
        return max(float((found[name] - each).norm() / each.norm()) for name, each in wanted.items())


def run(directory: Path, name: str, layout: dict) -> dict:
    numbers = {**layout["config"], "recompute": tuple(layout["config"]["recompute"])}
    settings = LoraSettings(**{**layout["lora"], "targets": tuple(layout["lora"]["targets"])})
    parallel = ParallelConfig(processes=layout["processes"], **layout["parallel"])
    config = TrainingConfig(**{**numbers, "parallel": parallel, "lora": settings})

    def session(saved: Path | None = None) -> Session:
        return Session(directory, config, loop_of_experts=layout["loop_of_experts"], saved=saved)

    first = session()
    alone, found = layout["processes"] == 1, {}
    wanted = load_file(directory / "gradients.safetensors")
    found["first"] = first.train(
        0, 3, (lambda: found.update(gradient=first.gradient_error(wanted))) if alone else lambda: None
    )
    target = directory / name
    if torch.distributed.get_rank() == 0:
        target.mkdir()
    torch.distributed.barrier()
    state.save(target, first.model, first.optimizer, step=3)
    found["trained"] = sum(each.numel() for each in first.chunks[0].parameters() if each.requires_grad)
    if layout["resume"]:
        found["continued"] = first.train(3, 5)
        found["resumed"] = session(target).train(3, 5)
    if not alone and layout["resume"]:
        found["resumed_from_one_process"] = session(directory / "one").train(3, 5)
    return found


def worker(rank: int, directory: Path, processes: int) -> None:
    results: dict = {}
    for case, layouts in json.loads((directory / "layouts.json").read_text()).items():
        for name, layout in layouts.items():
            if layout["processes"] == processes:
                results.setdefault(case, {})[name] = run(directory / case, name, layout)
    if rank == 0:
        (directory / f"{os.environ['WORLD_SIZE']}.json").write_text(json.dumps(results))


def main(directory: Path) -> None:
    results: dict = {}
    for processes in (1, 2):
        if not forked_world(processes, worker, directory, processes):
            sys.exit(1)
        for case, found in json.loads((directory / f"{processes}.json").read_text()).items():
            results[case] = results.get(case, {}) | found
    (directory / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
