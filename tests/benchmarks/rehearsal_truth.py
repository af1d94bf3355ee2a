"""The peak of a training run, twice: as torch's CPU allocator counts it in a real run, and as a rehearsal says it.

Run as `python rehearsal_truth.py cpu|stubs NAME...`, the second in an environment of `with_stubs`; prints JSON, by case. The run
is two updates of two micro batches, of rank 0. A case is a fork of one process, so that it begins with an empty allocator.

A CPU computes as a GPU does where it runs the same operations. Where it does not, both are made to run the same: attention is
`eager` where GPUs have a kernel that the CPU lacks; casts to FP8 are torch's operations, in place of Triton's kernels; and what
gloo and the CPU's product of FP8 matrices copy is outside of torch's allocator.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from shared.runtime.silence_warnings import silence  # noqa: E402

silence()

from shared.architecture.architecture import MLP, MTP, Architecture, MoE  # noqa: E402
from shared.kernels.fp8.recipes import Fp8Recipe  # noqa: E402
from shared.mapping.adapters import LoraSettings  # noqa: E402
from shared.parallel import ParallelConfig, ranks_needed  # noqa: E402
from shared.rehearsal import fake_world, reexecute  # noqa: E402

if reexecute.playing():
    fake_world.before_forking()

import torch  # noqa: E402

from tests.layouts.cases import GQA, MLA, MODELS  # noqa: E402

CPU, STUBS = "cpu", "stubs"
LENGTH, ROWS, VOCABULARY = 256, 2, 1024
_PHASE = "phase "


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run. `changes`: of the configuration."""

    architecture: Architecture
    changes: dict[str, Any] = field(default_factory=dict)
    packed: bool = False
    layout: dict[str, Any] = field(default_factory=dict)  # of `ParallelConfig`


def _cases() -> dict[str, Case]:
    heads = replace(GQA, heads=4, groups=4, head_dim=32, qk_norm=None)
    groups = replace(heads, groups=1)
    latent = replace(
        MLA, heads=4, q_lora_rank=64, kv_lora_rank=32, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32
    )
    mlp = MLP(ffn_hidden_size=384)
    experts = MoE(experts=8, top_k=2, expert=MLP(ffn_hidden_size=192))
    windows = replace(groups, window=64)

    def wide(mixer: Any, mlp: Any = mlp, **fields: Any) -> Architecture:
        of = MODELS["GQA"].with_layers(lambda layer: replace(layer, mixer=mixer, mlp=mlp))
        sizes = {"hidden_size": 128, "vocab_size": VOCABULARY, "max_position_embeddings": LENGTH}
        return replace(of, **sizes, **fields)

    dense = wide(heads)
    layer = dense.layers[0]
    nets = replace(
        MODELS["gated delta net"].with_layers(lambda layer: replace(layer, mlp=mlp)),
        hidden_size=128,
        vocab_size=VOCABULARY,
        max_position_embeddings=LENGTH,
    )
    fp8 = Fp8Recipe(name="tensorwise", format="hybrid", amax_history=16, power_of_two_scales=False, bf16_layers=(0, 0))
    eager = {"attention_backend": "eager"}
    return {
        "dense, fp32": Case(architecture=dense, changes={"precision": "fp32"}),
        "dense": Case(architecture=dense),
        "GQA": Case(architecture=wide(groups)),
        "packed, eager attention": Case(architecture=wide(groups), changes=eager, packed=True),
        "windows, eager attention": Case(architecture=wide(windows), changes=eager),
        "MLA, eager attention": Case(architecture=wide(latent), changes=eager),
        "MoE": Case(architecture=wide(heads, experts)),
        "MTP": Case(architecture=wide(heads, mtp=MTP(depth=1, layer=layer))),
        "gated delta net": Case(architecture=nets),
        "LoRA": Case(
            architecture=dense, changes={"lora": LoraSettings(rank=16, alpha=32, targets=("all-linear",))}
        ),
        "FP8": Case(architecture=dense, changes={"fp8": fp8}),
        "selective recomputation": Case(architecture=dense, changes={"recompute": ("selective",)}),
        "full recomputation": Case(architecture=dense, changes={"recompute": ("full",)}),
        "TP 2": Case(architecture=dense, layout={"tensor": 2}),
        "TP 2 SP": Case(architecture=dense, layout={"tensor": 2, "sequence_parallel": True}),
    }  # fmt: skip


CASES = _cases()


def run_of(case: Case) -> Any:
    """As `loop.train` takes it."""
    from shared.training import loop
    from shared.training.data import Batch
    from tests.layouts.worker import config

    class Rows:
        """Random rows; packed: in four segments."""

        sequence_length = LENGTH

        def __len__(self) -> int:
            return 64

        def batch(self, positions: Any) -> Batch:
            generator = torch.Generator().manual_seed(int(positions[0]))
            tokens = torch.randint(0, case.architecture.vocab_size, (len(positions), LENGTH), generator=generator)
            segments = (torch.arange(LENGTH) * 4 // LENGTH + 1).expand(len(positions), LENGTH).contiguous()
            return Batch(tokens=tokens, labels=tokens.clone(), segments=segments if case.packed else None)

    changed = {
        "precision": "bf16", "backend": "local", "sequence_length": LENGTH, "micro_batch_size": ROWS,
        "global_batch_size": 2 * ROWS, "steps": 2, "validation_sequences": ROWS, "learning_rate": 1e-4,
        "min_learning_rate": 1e-4, **case.changes,
    }  # fmt: skip
    needed = ranks_needed(tensor=case.layout.get("tensor", 1), pipeline=1, context=1, expert=1, expert_tensor=None)
    source = SimpleNamespace(iteration_path=Path("/nowhere"), path=Path("/nowhere"))
    return loop.Run(
        config=replace(config(ParallelConfig(processes=needed, **case.layout)), **changed),
        inputs=SimpleNamespace(source=source, architecture=case.architecture, adapter=None),
        target=Path("/nowhere"),
        overwrite=False,
        extend=False,
        blend=None,  # type: ignore[arg-type]
        order="permutation",
        datasets=lambda order: (Rows(), Rows()),
        packed=case.packed,
        track=(),
    )


def measured(rank: int, name: str, file: Path) -> None:
    """Writes, of rank 0, the peak of each phase of a real run."""
    from torch.profiler import ProfilerActivity, profile, record_function

    from shared.runtime import progress
    from shared.training import loop, rehearse
    from shared.training.storage import Storage

    _communicate_outside()
    _same_casts()
    library = torch.library.Library("aten", "IMPL")
    library.impl("_scaled_mm", _product_outside, "CPU", allow_override=True)
    player = rehearse._Player(rank, names=True)

    def begin(phase: str) -> None:
        where = phase if phase in rehearse._BEFORE_UPDATES else f"{phase} of update {player.update}"
        with record_function(_PHASE + where):
            pass

    def fill(chunks: Any, iteration_path: Path, source: Path) -> None:
        for chunk in chunks:
            for parameter in chunk.parameters():
                torch.nn.init.normal_(parameter, std=0.02)

    progress.listen(begin)
    storage = Storage(open_run=player._open_run, read_weights=fill, recorder=player._recorder)
    with (
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled,
        contextlib.suppress(rehearse._Enough),
    ):
        loop.train(replace(run_of(CASES[name]), storage=storage))
    if rank == 0:
        events = profiled.profiler.kineto_results.events()
        file.write_text(json.dumps(peaks(events)))


def _communicate_outside() -> None:
    """Collectives on memory that is not torch's allocator's. gloo's threads hold tensors, and gather and reduce in copies of
    them; NCCL does not, and a profile does not see what other threads free.
    """
    import numpy as np
    import torch.distributed as dist

    all_reduce, broadcast = dist.all_reduce, dist.broadcast

    def outside(tensor: torch.Tensor) -> torch.Tensor:
        own = torch.from_numpy(np.empty(tensor.nbytes, np.uint8)).view(tensor.dtype).view(tensor.shape)
        return own.copy_(tensor)

    def reduce(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
        own = outside(tensor)
        all_reduce(own, op=op, group=group)
        tensor.copy_(own)
        return _Done()

    def gather(output: torch.Tensor, part: torch.Tensor, group: Any = None, async_op: bool = False) -> Any:
        for rank, piece in zip(dist.get_process_group_ranks(group), output.view(-1, *part.shape), strict=True):
            own = outside(part)
            broadcast(own, rank, group=group)
            piece.copy_(own)
        return _Done()

    def scatter(
        output: torch.Tensor,
        given: torch.Tensor,
        op: Any = dist.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        own = outside(given)
        all_reduce(own, op=op, group=group)
        output.copy_(own.view(-1, *output.shape)[dist.get_rank(group)])
        return _Done()

    ways = {"all_reduce": reduce, "all_gather_into_tensor": gather, "reduce_scatter_tensor": scatter}
    for function, ours in ways.items():
        theirs = getattr(dist, function)
        for module in list(sys.modules.values()):
            for name, value in list(vars(module).items()):
                if value is theirs:
                    setattr(module, name, ours)


def _same_casts() -> None:
    """Casts to FP8 by torch's operations on both sides, but for counts of what is clipped: `count_nonzero` works on a copy in
    int64 on a GPU. Triton's kernels count without one.
    """
    from shared.kernels.fp8 import quantize, torch_coder

    quantize.coder = lambda device: torch_coder
    torch_coder.count = lambda scaled, dtype: torch.zeros(3, dtype=torch.int64, device=scaled.device)


def _product_outside(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    bias: Any = None,
    scale_result: Any = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> torch.Tensor:
    """The product of FP8 matrices without the copies in fp32 that the CPU's makes; its numbers do not matter."""
    return torch.zeros(len(a), b.shape[1], dtype=out_dtype)


class _Done:
    """The handle of a collective."""

    def wait(self) -> None:
        """It has ended."""


def peaks(events: Any) -> dict[str, list[int]]:
    """By phase: bytes allocated when it began, and at most."""
    from torch.autograd import DeviceType

    found: dict[str, list[int]] = {}
    name, now = "before", 0
    found[name] = [0, 0]
    for event in sorted(events, key=lambda each: each.start_ns()):
        if event.name().startswith(_PHASE):
            name = event.name().removeprefix(_PHASE)
            found.setdefault(name, [now, now])
        elif event.name() == "[memory]" and event.device_type() == DeviceType.CPU:
            now += event.nbytes()
            found[name][1] = max(found[name][1], now)
    return found


def rehearsed(name: str) -> dict[str, list[int]]:
    """By phase, the same of torch's CUDA allocator under the stubs."""
    from shared.training import rehearse

    _same_casts()
    played = rehearse.play(run_of(CASES[name]), 0, 1 << 40, quiet=True)
    found: dict[str, list[int]] = {}
    for phase in played.phases:
        of = found.setdefault(phase.name, [phase.before, 0])
        of[1] = max(of[1], phase.peak)
    return found


def main(where: str, names: list[str]) -> None:
    from shared.model import weights
    from shared.rehearsal.forks import in_forks
    from shared.training import loop, rehearse  # noqa: F401 -- imported before the forks
    from tests.workers import forked_world

    weights.saved_shapes = lambda path: {}
    weights.wanted_shapes = lambda chunks, saved: {}
    found: dict[str, Any] = {}
    if where == STUBS:
        found = in_forks({name: partial(rehearsed, name) for name in names}, at_once=1, returned=ValueError)
        for name, each in found.items():
            if not isinstance(each, dict):
                raise SystemExit(f"{name}: {each}\n{getattr(each, 'trace', '')}")
    else:
        with tempfile.TemporaryDirectory() as folder:
            for name in names:
                file = Path(folder) / "peaks.json"
                if not forked_world(run_of(CASES[name]).config.parallel.processes, measured, name, file):
                    raise SystemExit(name)
                found[name] = json.loads(file.read_text())
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:] or list(CASES))
