"""Plays tiny models in layouts, each rank in a fork of this process, whose CUDA runtime is stubs.

Run as `python rehearsal_worker.py DIRECTORY` in an environment of `with_stubs`. Writes `DIRECTORY/results.pkl`: by case what each
played rank found.
"""

import os
import pickle
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

from shared.runtime.silence_warnings import silence

silence()

from shared.rehearsal import fake_world, reexecute  # noqa: E402

if reexecute.playing():  # the tests import LORA from here
    fake_world.before_forking()

import torch  # noqa: E402

from shared.families import registry  # noqa: E402
from shared.kernels.attention import sdpa  # noqa: E402
from shared.kernels.fp8.recipes import Fp8Recipe  # noqa: E402
from shared.mapping.adapters import LoraSettings  # noqa: E402
from shared.model import gpt, weights  # noqa: E402
from shared.parallel import ParallelConfig  # noqa: E402
from shared.rehearsal.forks import in_forks  # noqa: E402
from shared.runtime import process_groups  # noqa: E402
from shared.training import loop, rehearse  # noqa: E402
from shared.training.optimizer import held_bytes  # noqa: E402
from shared.training.rehearsal_report import Played  # noqa: E402
from tests.layouts.cases import MODELS, ONE_SEGMENT  # noqa: E402
from tests.layouts.worker import Rows, config  # noqa: E402

FP8 = Fp8Recipe(name="tensorwise", format="hybrid", amax_history=16, power_of_two_scales=False, bf16_layers=(0, 0))
LORA = LoraSettings(rank=8, alpha=16, targets=("all-linear",))

# name: (model, layout, changes of the configuration, ranks played; None: all)
CASES = {
    "one GPU": ("GQA", {}, {}, None),
    "full recomputation": ("GQA", {}, {"recompute": ("full",)}, None),
    "moments in host memory": ("GQA", {}, {"offload_optimizer": True}, None),
    "LoRA": ("GQA", {}, {"lora": LORA}, None),
    "FP8": ("GQA", {}, {"fp8": FP8}, None),
    "packed, TP 2 SP": ("packed", {"tensor": 2, "sequence_parallel": True}, {}, None),
    "interleaved pipeline": ("windows", {"pipeline": 2, "virtual_pipeline": 2}, {}, None),
    "MLA, CP 2": ("MLA", {"context": 2}, {}, [0]),
    "MoE, EP 2, TP 2 SP": (
        "MoE, correction bias, shared expert",
        {"processes": 4, "expert": 2, "tensor": 2, "sequence_parallel": True},
        {},
        None,
    ),
    "delta net": ("gated delta net", {"processes": 2}, {}, [0]),
    "delta net, TP 2 SP": ("gated delta net", {"tensor": 2, "sequence_parallel": True}, {}, None),
    "MLA, TP 2 SP, PP 2": ("MLA", {"tensor": 2, "sequence_parallel": True, "pipeline": 2}, {}, [0, 2]),
    "MTP, PP 2": ("GLM-4.5", {"pipeline": 2}, {}, None),
    "frozen MTP, PP 2": ("GLM-4.5", {"pipeline": 2}, {"mtp_loss_scaling_factor": 0.0}, None),
    "tied head, PP 2": ("tied head", {"pipeline": 2}, {}, None),
    "LoRA, TP 2 SP": ("GQA", {"tensor": 2, "sequence_parallel": True}, {"lora": LORA}, [0]),
    "LoRA on experts, EP 2": ("MoE, aux loss", {"expert": 2}, {"lora": LORA}, [0]),
    "packed, CP 2": ("packed", {"context": 2}, {}, [0]),
    "FP8, packed, TP 2 SP": ("packed", {"tensor": 2, "sequence_parallel": True}, {"fp8": FP8}, [0]),
    "MoE, FP8": ("MoE, aux loss", {}, {"fp8": FP8}, [0]),
    "sinks": ("sinks", {}, {}, None),
}
ARCHITECTURES = MODELS | {
    "tied head": replace(MODELS["GQA"], head=replace(MODELS["GQA"].head, tied=True)),
    "GLM-4.5": registry.sizes()["glm4-moe-tiny"],
}


def run(name: str) -> loop.Run:
    model, layout, changes, _ = CASES[name]
    parallel = ParallelConfig(**{"processes": _needed(layout), **layout})
    architecture, rows = ARCHITECTURES[model], Rows(model not in ONE_SEGMENT)
    source = SimpleNamespace(iteration_path=Path("/nowhere"), path=Path("/nowhere"))
    return loop.Run(
        config=rehearse.shortened(replace(config(parallel), backend="local", precision="bf16", **changes)),
        inputs=SimpleNamespace(source=source, architecture=architecture, adapter=None),
        target=Path("/nowhere"),
        overwrite=False,
        extend=False,
        blend=None,
        order="permutation",
        datasets=lambda order: (rows, rows),
        packed=rows.packed,
        track=(),
    )


def _needed(layout: dict) -> int:
    needed = 1
    for name in ("tensor", "pipeline", "context", "expert"):
        needed *= layout.get(name, 1)
    return needed


def work() -> Iterator[tuple[tuple[str, int], partial]]:
    for name, (_, _, _, ranks) in CASES.items():
        given = run(name)
        for rank in range(given.config.parallel.processes) if ranks is None else ranks:
            yield (name, rank), partial(play, given, rank)


def play(given: loop.Run, rank: int) -> tuple[Played, dict[str, int]]:
    """The rank, and what its weights, gradients and optimizer held after the first update."""
    held: dict[str, int] = {}

    def hold(model, optimizer):
        held.update(held_bytes(model, optimizer))
        # AdamW's count of steps, 4 bytes for each tensor, is no state of a weight
        states = (state for part in optimizer.chained_optimizers for state in part.optimizer.state.values())
        held["optimizer"] -= sum(state["step"].nbytes for state in states)
        return held

    loop.held_bytes = hold
    return rehearse.play(given, rank, 70 << 30, quiet=True), held


def kernels(capability: int) -> dict[str, str]:
    """torch's choice of a kernel for what `sdpa.masked` passes on, by the kind of attention and whether cuDNN may be chosen."""
    os.environ["BATON_STUB_CAPABILITY"] = str(capability)
    fake_world.join(0, 1)
    found: dict[str, str] = {}
    for cudnn, (kind, (heads, groups, head_dim, value_dim, masked)) in product((False, True), ATTENTION.items()):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        q, k, v = (
            torch.empty(1, each, 256, width, dtype=torch.bfloat16, device="cuda", requires_grad=True)
            for each, width in ((heads, head_dim), (groups, head_dim), (groups, value_dim))
        )
        mask = torch.ones(1, 1, 256, 256, dtype=torch.bool, device="cuda") if masked else None

        def ask(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, name: str = f"{kind}, cuDNN {cudnn}", **given
        ) -> torch.Tensor:
            found[name] = _KERNELS[torch._fused_sdp_choice(q, k, v, **given)]
            return q

        sdpa.scaled_dot_product_attention = ask
        sdpa.masked(q, k, v, mask, scale=None)
    return found


def loading() -> int:
    """Bytes that a load allocates beside the weights."""
    fake_world.join(0, 1)
    process_groups.initialize(ParallelConfig(), 1)
    chunks = gpt.build(MODELS["GQA"], ParallelConfig(), dtype=torch.bfloat16)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    rehearse.allocate_as_loading(chunks)
    return torch.cuda.max_memory_allocated() - before


# heads, groups, head_dim, value_dim, mask
ATTENTION = {
    "causal": (8, 8, 128, 128, False),
    "grouped queries": (8, 2, 128, 128, False),
    "wide heads": (8, 2, 256, 256, False),
    "MLA": (8, 8, 192, 128, False),
    "mask": (8, 8, 128, 128, True),
    "mask, grouped queries": (8, 2, 128, 128, True),
    "mask, MLA": (8, 8, 192, 128, True),
}
_KERNELS = {0: "math", 1: "flash", 2: "efficient", 3: "cuDNN"}


def main(directory: Path) -> None:
    weights.saved_shapes = lambda path: {}  # test_end_to_end_rehearsal.py has a checkpoint
    weights.wanted_shapes = lambda chunks, saved: {}
    functions = dict(work()) | {("kernels", each): partial(kernels, each) for each in (80, 89, 90, 100)}
    functions["loading", 0] = loading
    found = in_forks(functions, at_once=2, returned=rehearse.UserError)
    (directory / "results.pkl").write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
