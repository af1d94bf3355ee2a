"""FP8 in a world of two forked processes: linear layers, and tiny models trained and resumed.

Run as `python fp8_worker.py DIRECTORY`: reads `DIRECTORY/cases.json` (cases of models by name: configuration, architecture,
layout, whether adapters are trained, a checkpoint of weights and one of one process after update 2, or null), writes
`DIRECTORY/results.json`.
"""

import json
import sys
from pathlib import Path

from shared.runtime.silence_warnings import silence

silence()

import torch  # noqa: E402
from megatron.core.model_parallel_config import ModelParallelConfig  # noqa: E402
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear  # noqa: E402

from shared.architecture import dictionary  # noqa: E402
from shared.kernels.fp8.matmul import Shards, fp8_linear  # noqa: E402
from shared.kernels.fp8.recipes import KINDS, Fp8Recipe  # noqa: E402
from shared.kernels.fp8.tensor_state import LinearState  # noqa: E402
from shared.mapping.adapters import LoraSettings  # noqa: E402
from shared.model.fp8_linear import fp8_class  # noqa: E402
from shared.parallel import ParallelConfig  # noqa: E402
from shared.runtime import process_groups  # noqa: E402
from shared.training import loop  # noqa: E402, F401 -- imported before the fork
from shared.training.config import TrainingConfig  # noqa: E402
from shared.training.fp8_update import linears_of  # noqa: E402
from shared.training.trainable import Lora  # noqa: E402
from tests.shared.kernels.fp8.examples import recipe  # noqa: E402
from tests.shared.training.layouts_worker import Session  # noqa: E402
from tests.workers import forked_world  # noqa: E402

# B starts at zero: a few updates of a high scale until it matters.
LORA = Lora(LoraSettings(rank=4, alpha=64.0, rslora=False, dropout=0.0, targets=("all-linear",)), seed=1)
RECIPES = ("tensorwise", "delayed", "rowwise", "blockwise")
SEQUENCE, BATCH, INPUTS, OUTPUTS = 128, 2, 256, 256  # halves are whole blocks, of tokens too


def operands() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Input, weight and gradient, of which one half has larger numbers than the other along every axis."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        found = torch.randn(shape, generator=generator)
        for axis, size in enumerate(shape):
            found.narrow(axis, size // 2, size - size // 2).mul_(1.7)
        return found

    return normal(SEQUENCE, BATCH, INPUTS), normal(OUTPUTS, INPUTS), normal(SEQUENCE, BATCH, OUTPUTS)


def alone(used: Fp8Recipe) -> list[torch.Tensor]:
    """Output and gradients of x and W in one process."""
    x, weight, g = operands()
    x.requires_grad_()
    weight.requires_grad_()
    y = fp8_linear(x, weight, LinearState(used), Shards())
    return [y.detach(), *torch.autograd.grad(y, (x, weight), g)]


def own(whole: torch.Tensor, axis: int) -> torch.Tensor:
    return whole.chunk(2, axis)[torch.distributed.get_rank()].contiguous()


def linear(used: Fp8Recipe, direction: str, sequence_parallel: bool) -> float:
    """Largest difference of a tensor-parallel layer from `alone`, relative to the largest number."""
    config = ModelParallelConfig(
        tensor_model_parallel_size=2,
        sequence_parallel=sequence_parallel,
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=torch.float32,
    )
    column = direction == "column"
    base = ColumnParallelLinear if column else RowParallelLinear
    fields = {"gather_output": False} if column else {"input_is_parallel": True}
    layer = fp8_class(base, used, 0, direction)(
        INPUTS, OUTPUTS, config=config, init_method=None, bias=False, skip_bias_add=True, **fields
    )
    x, weight, g = operands()
    y_whole, dx_whole, dw_whole = alone(used)
    layer.weight.data.copy_(own(weight, 0 if column else 1))
    # The axis that each is cut along; None: whole on both ranks.
    outside = 0 if sequence_parallel else None
    x_axis, y_axis = (outside, 2) if column else (2, outside)

    def part(whole: torch.Tensor, axis: int | None) -> torch.Tensor:
        return whole if axis is None else own(whole, axis)

    given = part(x, x_axis).clone().requires_grad_()
    y, _ = layer(given)
    y.backward(part(g, y_axis))
    pairs = [
        (y, part(y_whole, y_axis)),
        (given.grad, part(dx_whole, x_axis)),
        (layer.weight.grad, own(dw_whole, 0 if column else 1)),
    ]
    return max(float((found.detach() - wanted).abs().max() / wanted.abs().max()) for found, wanted in pairs)


def halves_of_tokens(used: Fp8Recipe) -> float:
    """The same for a layer whose tokens are cut, as by context parallelism."""
    x, weight, g = operands()
    given, weight = own(x, 0).clone().requires_grad_(), weight.requires_grad_()
    group = torch.distributed.group.WORLD
    y = fp8_linear(given, weight, LinearState(used), Shards(tokens=(group,)))
    y.backward(own(g, 0))
    torch.distributed.all_reduce(weight.grad)  # as data parallelism does
    y_whole, dx_whole, dw_whole = alone(used)
    pairs = [(y, own(y_whole, 0)), (given.grad, own(dx_whole, 0)), (weight.grad, dw_whole)]
    return max(float((found.detach() - wanted).abs().max() / wanted.abs().max()) for found, wanted in pairs)


class SlowSession(Session):
    """Small steps: a difference of rounding stays one."""

    learning_rate = 1e-3


def configuration(given: dict, **changes) -> TrainingConfig:
    """From JSON."""
    fp8 = Fp8Recipe(**{**given["fp8"], "bf16_layers": tuple(given["fp8"]["bf16_layers"])}) if given["fp8"] else None
    return TrainingConfig(**{**given, "fp8": fp8, "recompute": tuple(given["recompute"]), **changes})


def histories(session: Session) -> dict[str, list[list[float]]]:
    """Amax histories of this rank's FP8 layers."""
    return {
        name: [module.fp8_state.tensors[kind].history.values for kind in KINDS]
        for name, module in linears_of(session.model)
    }


def train(directory: Path, case: dict) -> dict:
    """Two updates; where `one_process` is given a checkpoint and two more, which are made again from both checkpoints."""
    config = configuration(case["config"], parallel=ParallelConfig(processes=2, **case["layout"]))
    architecture = dictionary.read(case["architecture"])
    trainable = LORA if case["lora"] else None
    session = SlowSession(config, architecture, Path(case["start"]), restore=False, trainable=trainable)
    results = {"first": session.train(0, 4 if case["lora"] else 2)}
    gathered = [None, None]
    torch.distributed.all_gather_object(gathered, histories(session))
    assert all(gathered[0][name] == gathered[1][name] for name in gathered[0].keys() & gathered[1].keys())
    results["histories"] = gathered[0] | gathered[1]
    results["row"] = session.fp8[-1].row(layers=True)
    if case["one_process"]:
        session.save(directory / "2", step=2)
        results["continued"] = session.train(2, 4)
        results["resumed"] = SlowSession(config, architecture, directory / "2").train(2, 4)
        results["from_one_process"] = SlowSession(config, architecture, Path(case["one_process"])).train(2, 4)
    return results


def worker(rank: int, directory: Path, cases: dict) -> None:
    results: dict = {"models": {}, "linears": {}}
    for sequence_parallel in (False, True):
        process_groups.initialize(ParallelConfig(processes=2, tensor=2, sequence_parallel=sequence_parallel), 1)
        for name in RECIPES:
            for direction in ("column", "row"):
                key = f"{name} {direction}{' sequence' * sequence_parallel}"
                results["linears"][key] = linear(recipe(name), direction, sequence_parallel)
    for name in RECIPES:
        results["linears"][f"{name} tokens"] = halves_of_tokens(recipe(name))
    for name, case in cases.items():
        results["models"][name] = train(directory / name, case)
    if rank == 0:
        (directory / "results.json").write_text(json.dumps(results))


def main(directory: Path) -> None:
    cases = json.loads((directory / "cases.json").read_text())
    if not forked_world(2, worker, directory, cases):
        sys.exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
