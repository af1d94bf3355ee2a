"""Grouped experts against Megatron-Core's loop over the same experts."""

from __future__ import annotations

import pytest
import torch

from shared.families import registry
from shared.parallel import ParallelConfig
from shared.runtime.device import select_device

select_device()

from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear  # noqa: E402
from megatron.core.transformer.mlp import MLPSubmodules  # noqa: E402
from megatron.core.transformer.moe.experts import SequentialMLP  # noqa: E402

from shared.kernels.grouped import stacked  # noqa: E402
from shared.model import experts as module  # noqa: E402
from shared.model.experts import GroupedExperts  # noqa: E402
from shared.model.fp8_linear import Fp8Linear, fp8_class  # noqa: E402
from shared.model.gpt import transformer_config  # noqa: E402
from shared.model.moe import _with_bias, _with_bias_over_tp  # noqa: E402
from shared.runtime.process_groups import initialize  # noqa: E402
from tests.shared.kernels.fp8.examples import recipe  # noqa: E402

ARCHITECTURE = registry.sizes()["qwen3-moe-tiny"]
HIDDEN, COUNTS = ARCHITECTURE.hidden_size, [5, 0, 9, 1]


def experts_of(
    dtype: torch.dtype = torch.float32,
    *,
    number: int = 4,
    bias: bool = False,
    column: type = ColumnParallelLinear,
    row: type = RowParallelLinear,
    **fields,
) -> GroupedExperts:
    """Experts with random weights; `fields`: of TransformerConfig."""
    initialize(ParallelConfig(), 1)
    config = transformer_config(ARCHITECTURE, ParallelConfig(), dtype, perform_initialization=True, **fields)
    linears = (_with_bias(column), _with_bias_over_tp(row)) if bias else (column, row)
    made = GroupedExperts(
        number, config, MLPSubmodules(*linears), pg_collection=ProcessGroupCollection.use_mpu_process_groups()
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape).to(dtype) * 0.3)
    return made


def results(experts: GroupedExperts, forward, counts: list[int]) -> dict[str, torch.Tensor]:
    """The output and every gradient, with `forward` as the method that computes it."""
    torch.manual_seed(3)
    dtype = next(experts.parameters()).dtype
    x = torch.randn(sum(counts), HIDDEN).to(dtype).requires_grad_()
    probs = torch.rand(sum(counts), requires_grad=True)
    output, bias = forward(experts, x, torch.tensor(counts), probs)
    assert bias is None
    inputs = {"x": x, "probs": probs, **dict(experts.named_parameters())}
    gradients = torch.autograd.grad(output, list(inputs.values()), torch.randn(output.shape).to(dtype))
    return {"output": output, **dict(zip(inputs, gradients, strict=True))}


KINDS = {
    "gated": {},
    "not gated": {"gated_linear_unit": False},
    "clamp and offset": {"activation_func_clamp_value": 0.2, "glu_linear_offset": 1.0},
    "biases": {"bias": True},
    "biases, clamp and offset": {"bias": True, "activation_func_clamp_value": 0.2, "glu_linear_offset": 1.0},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_loops_numbers(kind, dtype, capfd):
    """To the bit, but for gradients of biases: the same numbers added in another order."""
    experts = experts_of(dtype, **kind)
    for counts in (COUNTS, [0, 0, 0, 0]):
        found = results(experts, GroupedExperts.forward, counts)
        for name, wanted in results(experts, SequentialMLP.forward, counts).items():
            if name.endswith("bias"):
                torch.testing.assert_close(
                    found[name], wanted, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-5
                )
            else:
                assert torch.equal(found[name], wanted), name
    assert "one by one" not in capfd.readouterr().err


@pytest.mark.parametrize("name", ["tensorwise", "delayed", "rowwise", "blockwise"])
def test_the_loops_numbers_in_fp8(name, capfd):
    """To the bit, with what every expert's layers recorded; a history of an earlier update makes the second differ."""
    column, row = (
        fp8_class(base, recipe(name, amax_history=1), 0, direction)
        for base, direction in ((ColumnParallelLinear, "column"), (RowParallelLinear, "row"))
    )
    experts = experts_of(torch.bfloat16, column=column, row=row)
    linears = [module for module in experts.modules() if isinstance(module, Fp8Linear)]
    assert len(linears) == 8
    for update in range(2):
        found, counts = {}, {}
        for kind in (GroupedExperts, SequentialMLP):
            found[kind] = results(experts, kind.forward, COUNTS)
            counts[kind] = [
                [part.tolist() for part in tensor.take()]
                for each in linears
                for tensor in each.fp8_state.tensors.values()
            ]
        assert all(torch.equal(each, found[SequentialMLP][key]) for key, each in found[GroupedExperts].items()), update
        assert counts[GroupedExperts] == counts[SequentialMLP]
        for each in linears:
            each.fp8_state.tensors["activations"].history.restore([0.5])
    assert "one by one" not in capfd.readouterr().err


def test_one_expert_is_an_mlp():
    experts = experts_of(number=1)
    found, wanted = (results(experts, kind.forward, [6]) for kind in (GroupedExperts, SequentialMLP))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


class OwnLinear(ColumnParallelLinear):
    """A linear layer that computes something else."""

    def _forward_impl(self, *args, **kwargs):
        return super()._forward_impl(*args, **kwargs) * 2


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ({"column": OwnLinear}, "OwnLinear computes one expert at a time"),
        ({"moe_ffn_hidden_size": 33}, "rows of 66 float32 numbers are no multiple of 16 bytes"),
    ],
    ids=["another linear layer", "odd sizes"],
)
def test_the_loop_is_announced_once(kind, reason, capfd):
    module._announce.cache_clear()
    experts = experts_of(**kind)
    found, wanted = (results(experts, kind.forward, COUNTS) for kind in (GroupedExperts, SequentialMLP))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    results(experts, GroupedExperts.forward, COUNTS)
    assert capfd.readouterr().err.count(f"experts     one by one, not with grouped GEMM: {reason}\n") == 1


def test_weights_are_placed_for_a_product_without_a_copy():
    """When they are built; `test_optimizer.py` has the same of a buffer."""
    experts = experts_of(bias=True)
    for linear in ("linear_fc1", "linear_fc2"):
        weights = experts._each(linear, "weight")
        assert weights[0] is getattr(experts.local_experts[3], linear).weight
        assert stacked(weights).data_ptr() == weights[0].data_ptr()


def test_parameters_and_checkpoint_are_those_of_the_loop():
    assert GroupedExperts.sharded_state_dict is SequentialMLP.sharded_state_dict
    assert [name for name, _ in experts_of().named_parameters()][:2] == [
        "local_experts.0.linear_fc1.weight",
        "local_experts.0.linear_fc2.weight",
    ]
