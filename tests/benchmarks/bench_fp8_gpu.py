"""FP8 on a GPU beside bf16 and TransformerEngine: `make bench-fp8-gpu`.

    python tests/benchmarks/bench_fp8_gpu.py --work DIR [--updates 300]

Prints, with the goals:
- kernels: bytes read and written per second, beside a copy of the same bytes;
- SwiGLU and RMSNorm quantised as they are computed, beside the same in passes of their own: codes both ways, and gradients;
- a linear layer, forward and backward pass with all casts, 4096 tokens x 4096 x 14336;
- experts, forward and backward pass: one product of all groups beside one product each;
- whole updates of a model of hidden 4096 through `pretrain train`: tokens per second, mean loss of the last tenth, and the
  time in which a recipe reaches the loss that bf16 ends with.

Without a GPU of compute capability 8.9 or higher it says so, and ends with 2.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from tests.benchmarks import bench_fp8  # noqa: E402
from tests.benchmarks.bench_fp8 import Cell, Size  # noqa: E402

RECIPES = ("tensorwise", "delayed", "rowwise", "blockwise")
TOKENS, INPUTS, OUTPUTS = 4096, 4096, 14336
SIZE = Size(layers=4, hidden=4096, ffn=14336, heads=32, groups=8, vocab=4096, sequence=4096, batch=4, modules=100_000)
GOALS = {"copy": 0.85, "linear": 1.6, "update": 1.25, "loss": 0.005}


def milliseconds(work: Callable[[], Any], repeats: int = 30) -> float:
    """Median time of one call on the GPU."""
    for _ in range(5):
        work()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def kernels() -> Iterator[list[str]]:
    """Each kernel's bandwidth beside that of a copy of as many bytes."""
    from shared.kernels.fp8 import triton_coder as coder
    from shared.kernels.fp8.codes import E4M3
    from shared.kernels.fp8.torch_coder import Blocks

    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    one, read, code = torch.ones((), device="cuda"), x.nbytes, x.numel()
    both = {"transposed": True, "record": True}
    rows, squares = (Blocks(rows=each, power_of_two=True) for each in (1, 128))
    cases: dict[str, tuple[int, Callable[[], Any]]] = {
        "amax of rows": (read, lambda: coder.row_amax(x)),
        "codes": (read + code, lambda: coder.encode_matrix(x, one, E4M3, record=True)),
        "codes and transpose": (read + 2 * code, lambda: coder.encode_matrix(x, one, E4M3, **both)),
        "1 x 128, both ways": (read + 2 * code, lambda: coder.encode_blocks(x, rows, E4M3, **both)),
        "128 x 128, both ways": (read + 2 * code, lambda: coder.encode_blocks(x, squares, E4M3, **both)),
    }
    other = torch.empty_like(x)
    copied = 2 * read / milliseconds(lambda: other.copy_(x))
    yield ["copy", f"{copied / 1e9:.2f}", ""]
    for name, (moved, work) in cases.items():
        rate = moved / milliseconds(work)
        yield [name, f"{rate / 1e9:.2f}", f"{rate / copied:.0%} of a copy, goal {GOALS['copy']:.0%}"]


def state_of(name: str, *, fp8_format: str | None = None) -> Any:
    """The state of a layer with a history."""
    from shared.kernels.fp8.recipes import Fp8Recipe
    from shared.kernels.fp8.tensor_state import LinearState

    blocks = name == "blockwise"
    fields = {"format": fp8_format or ("e4m3" if blocks else "hybrid"), "amax_history": 16, "bf16_layers": (0, 0)}
    state = LinearState(Fp8Recipe(name=name, power_of_two_scales=blocks, **fields))
    for tensor in state.tensors.values():
        tensor.history.restore([4.0] * 16)
    return state


def fusions(
    device: str = "cuda", tokens: int = TOKENS, hidden: int = INPUTS, ffn: int = OUTPUTS
) -> Iterator[list[str]]:
    """What a layer reads, quantised as it is computed and apart; and its gradient."""
    from torch.nn import functional

    from shared.kernels.fp8 import torch_coder
    from shared.kernels.fp8.fused_source import Gated, Normed, rms_norm
    from shared.kernels.fp8.quantize import coder, quantize
    from shared.kernels.glu import gated_linear_unit

    by = coder(torch.device(device))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    states, x, weight = normal(tokens, 2 * ffn), normal(tokens, hidden), normal(hidden)
    gate, up = states.chunk(2, 1)
    gated, options = Gated(gate=gate, up=up), {"epsilon": 1e-6, "zero_centered": False}

    def normed() -> Normed:
        return Normed(x=x, inverse=by.inverse_rms(x, 1e-6), weight=weight[None], **options)

    def row(name: str, apart: Callable[[], Any], together: Callable[[], Any]) -> list[str]:
        one, other = milliseconds(apart), milliseconds(together)
        return [name, f"{one:.3f}", f"{other:.3f}", f"{one / other:.2f} x as fast"]

    reads: dict[str, tuple[Callable[[], torch.Tensor], Callable[[], Any]]] = {
        f"SwiGLU of {ffn}": (lambda: gated_linear_unit(states, functional.silu), lambda: gated),
        f"RMSNorm of {hidden}": (lambda: rms_norm(x, weight, **options), normed),
    }
    for what, (matrix, source) in reads.items():
        for name in RECIPES:
            state = state_of(name)

            def codes(of: Callable[[], Any], state: Any = state) -> Any:
                state.tensors["activations"].take()
                return quantize(of(), state, "activations", ((), ()), record=True, transposed=True)

            yield row(f"{what}, {name}", lambda: codes(matrix), lambda: codes(source))  # noqa: B023
    of_gated, of_normed, norm = normal(tokens, ffn), normal(tokens, hidden), normed()
    yield row(
        "its gradient",
        lambda: torch_coder.gated_gradient(gated, of_gated),
        lambda: by.gated_gradient(gated, of_gated),
    )
    yield row(
        "the norm's, apart with its forward pass",
        lambda: torch_coder.normed_gradient(norm, of_normed),
        lambda: by.normed_gradient(norm, of_normed),
    )


def experts(
    device: str = "cuda", rows: Sequence[int] = (1024,) * 8, inputs: int = INPUTS, outputs: int = OUTPUTS // 2
) -> Iterator[list[str]]:
    """Forward and backward pass of a linear layer of experts; `rows`: of each expert."""
    from shared.kernels.fp8.grouped_matmul import grouped_fp8_linear
    from shared.kernels.fp8.matmul import Shards, fp8_linear
    from shared.kernels.grouped import grouped_linear

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    x, g, counts = normal(sum(rows), inputs).requires_grad_(), normal(sum(rows), outputs), torch.tensor(rows)
    weights = [each.requires_grad_() for each in normal(len(rows), outputs, inputs)]

    def timed(forward: Callable[[], torch.Tensor]) -> float:
        return milliseconds(lambda: torch.autograd.grad(forward(), (x, *weights), g))

    plain = timed(lambda: grouped_linear(x, weights, counts))
    yield ["bf16, grouped", f"{plain:.2f}", ""]
    for name in RECIPES:
        for fp8_format in ("hybrid", "e4m3"):
            states = [state_of(name, fp8_format=fp8_format) for _ in rows]

            def loop(states: Any = states) -> torch.Tensor:
                parts = zip(x.split(list(rows)), weights, states, strict=True)
                return torch.cat([fp8_linear(part, weight, state, Shards()) for part, weight, state in parts])

            def grouped(states: Any = states) -> torch.Tensor:
                return grouped_fp8_linear(x, weights, counts, states, Shards())

            for way, took in (("one by one", timed(loop)), ("grouped", timed(grouped))):
                yield [f"{name} {fp8_format}, {way}", f"{took:.2f}", f"{plain / took:.2f} x bf16"]


def linears() -> Iterator[list[str]]:
    """Forward and backward pass of a linear layer."""
    from shared.kernels.fp8.matmul import Shards, fp8_linear

    x, weight = (
        torch.randn(rows, INPUTS, device="cuda", dtype=torch.bfloat16).requires_grad_() for rows in (TOKENS, OUTPUTS)
    )
    g = torch.randn(TOKENS, OUTPUTS, device="cuda", dtype=torch.bfloat16)

    def timed(forward: Callable[[], torch.Tensor]) -> float:
        return milliseconds(lambda: torch.autograd.grad(forward(), (x, weight), g))

    plain = timed(lambda: torch.nn.functional.linear(x, weight))
    yield ["bf16", f"{plain:.2f}", ""]
    for name in RECIPES:
        state = state_of(name)
        took = timed(lambda: fp8_linear(x, weight, state, Shards()))  # noqa: B023
        yield [name, f"{took:.2f}", f"{plain / took:.2f} x bf16, goal {GOALS['linear']}"]
    try:
        import transformer_engine.pytorch as te
        from transformer_engine.common import recipe as recipes
    except ImportError:
        yield ["TransformerEngine", "not installed", ""]
        return
    layer = te.Linear(INPUTS, OUTPUTS, bias=False, params_dtype=torch.bfloat16, device="cuda")
    for made in (recipes.Float8CurrentScaling(), recipes.DelayedScaling(), recipes.Float8BlockScaling()):

        def update(made: Any = made) -> None:
            with te.fp8_autocast(enabled=True, fp8_recipe=made):
                y = layer(x)
            torch.autograd.grad(y, (x, layer.weight), g)

        took = milliseconds(update)
        yield [f"TransformerEngine {type(made).__name__}", f"{took:.2f}", f"{plain / took:.2f} x bf16"]


def seconds_to(rows: Sequence[dict[str, Any]], loss: float, width: int) -> float | None:
    """Seconds of training until the mean loss of `width` updates is at most `loss`; None if it never is."""
    total = 0.0
    for index, row in enumerate(rows):
        total += row["seconds"]
        if index + 1 >= width and statistics.mean(each["loss"] for each in rows[index + 1 - width : index + 1]) <= loss:
            return total
    return None


def updates(runs: dict[str, list[dict[str, Any]]], tokens: int) -> Iterator[list[str]]:
    """Rows of metrics of each way, that of bf16 among them, as a table. `tokens`: of an update."""
    width = max(len(runs["bf16"]) // 10, 1)

    def mean(rows: Sequence[dict[str, Any]]) -> float:
        return statistics.mean(row["loss"] for row in rows[-width:])

    def rate(rows: Sequence[dict[str, Any]]) -> float:
        return tokens / statistics.median(row["seconds"] for row in rows)

    plain = runs["bf16"]
    target = mean(plain)
    reference = seconds_to(plain, target, width)
    for name, rows in runs.items():
        took = seconds_to(rows, target, width)
        yield [
            name,
            f"{rate(rows):,.0f}",
            f"{rate(rows) / rate(plain):.2f} x, goal {GOALS['update']}" if name != "bf16" else "",
            f"{mean(rows):.4f}",
            f"{mean(rows) / target - 1:+.2%}, goal {GOALS['loss']:.1%}" if name != "bf16" else "",
            "not reached" if took is None else f"{took:.0f} s",
            f"{reference / took:.2f} x as fast" if name != "bf16" and took and reference else "",
        ]


def trained(work: Path, count: int) -> dict[str, list[dict[str, Any]]]:
    """Runs of bf16 and of every recipe, each once: metrics of their updates."""
    bench_fp8.prepare(work, SIZE, 1)
    runs = {}
    for way in ("bf16", *RECIPES):
        cell = Cell(way=way, seed=1, hard=False)
        bench_fp8.train(work, SIZE, cell, count)
        lines = (work / f"runs-{count}" / cell.name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        runs[way] = [row for row in map(json.loads, lines) if "loss" in row]
    return runs


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="tokens, model and runs; a later run goes on there")
    parser.add_argument("--updates", type=int, default=300)
    given = parser.parse_args(words)
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        print("bench-fp8-gpu: there is no GPU of compute capability 8.9 or higher here", file=sys.stderr)
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    work = given.work / "gpu"
    work.mkdir(parents=True, exist_ok=True)
    tables: list[tuple[list[str], Callable[[], Iterator[list[str]]]]] = [
        (["kernel, 8192 x 8192", "TB/s", ""], kernels),
        ([f"{TOKENS} tokens", "apart, ms", "together, ms", ""], fusions),
        ([f"linear, {TOKENS} x {INPUTS} x {OUTPUTS}", "ms", ""], linears),
        ([f"8 experts, {2 * TOKENS} x {INPUTS} x {OUTPUTS // 2}", "ms", ""], experts),
        (
            ["update", "tokens/s", "", "loss", "", "to bf16's loss", ""],
            lambda: updates(trained(work, given.updates), SIZE.batch * SIZE.sequence),
        ),
    ]
    for titles, rows in tables:
        for row in (titles, ["---"] * len(titles), *rows()):
            print(f"| {' | '.join(row)} |", flush=True)
        print()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
