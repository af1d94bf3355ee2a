import pytest
import torch
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.stablelm.modeling_stablelm import StableLmLayerNormPerHead


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_is_that_of_transformers_to_the_bit(dtype, model_of, worker):
    norm = model_of(worker.architecture(), dtype).decoder.final_layernorm
    theirs = LlamaRMSNorm(64, eps=1e-5).to(dtype)
    with torch.no_grad():
        norm.weight.normal_()
        theirs.weight.copy_(norm.weight)
    x = (torch.randn(7, 3, 64) * 5).to(dtype)
    assert torch.equal(norm(x), theirs(x))


def test_gradients_are_right(model_of, worker):
    norm = model_of(worker.architecture()).decoder.final_layernorm
    x = torch.randn(3, 64, requires_grad=True)
    y, weight = x.detach().clone().requires_grad_(), norm.weight.detach().clone().requires_grad_()
    gradient = torch.randn(3, 64)
    norm(x).backward(gradient)
    exact = y.double()
    (weight * exact / (exact.square().mean(-1, keepdim=True) + 1e-5).sqrt()).backward(gradient.double())
    torch.testing.assert_close(x.grad, y.grad, atol=1e-5, rtol=0)  # fp32, numbers of size 1
    torch.testing.assert_close(norm.weight.grad, weight.grad, atol=1e-5, rtol=0)


def test_weights_are_marked_for_sequence_parallel_sums(worker):
    from shared.model.gpt import transformer_config
    from shared.model.norm import RMSNorm
    from shared.parallel import ParallelConfig

    for sequence_parallel in (False, True):
        layout = ParallelConfig(processes=2, tensor=2, sequence_parallel=sequence_parallel)
        config = transformer_config(worker.architecture(), layout, torch.float32)
        norm = RMSNorm(config=config, hidden_size=64, eps=1e-5)
        assert norm.weight.sequence_parallel is sequence_parallel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_of_gemma_is_that_of_transformers_to_the_bit(dtype, model_of, worker):
    norm = model_of(worker.architecture(norm={"zero_centered_gamma": True}), dtype).decoder.final_layernorm
    theirs = GemmaRMSNorm(64, eps=1e-5).to(dtype)
    assert not norm.weight.any()
    with torch.no_grad():
        norm.weight.normal_()
        theirs.weight.copy_(norm.weight)
    x = (torch.randn(7, 3, 64) * 5).to(dtype)
    assert torch.equal(norm(x), theirs(x))


def test_layer_norms_are_those_of_torch_and_transformers(model_of, worker):
    x = torch.randn(7, 3, 64) * 5 + 2
    plain = model_of(worker.architecture(norm={"kind": "layernorm"})).decoder.final_layernorm
    biased = model_of(worker.architecture(norm={"kind": "layernorm", "bias": True})).decoder.final_layernorm
    theirs, torchs = CohereLayerNorm(64, eps=1e-5), torch.nn.LayerNorm(64, eps=1e-5)
    with torch.no_grad():
        for ours, reference in ((plain, theirs), (biased, torchs)):
            for parameter, other in zip(ours.parameters(), reference.parameters(), strict=True):
                parameter.normal_()
                other.copy_(parameter)
    torch.testing.assert_close(plain(x), theirs(x), atol=1e-5, rtol=0)  # fp32, numbers of size 1
    assert torch.equal(biased(x), torchs(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_of_each_head_are_those_of_both_families(dtype, model_of, worker):
    changes = {"norm": {"kind": "layernorm"}, "attention": {"qk_norm": "each_head"}}
    norm = model_of(worker.architecture(**changes), dtype).decoder.layers[0].self_attention.q_layernorm
    heads, size = norm.weight.shape
    cohere, stablelm = (
        CohereLayerNorm((heads, size), eps=1e-5).to(dtype),
        StableLmLayerNormPerHead(size, heads).to(dtype),
    )
    with torch.no_grad():
        norm.weight.normal_()
        cohere.weight.copy_(norm.weight)
        for each, weight in zip(stablelm.norms, norm.weight, strict=True):
            each.weight.copy_(weight)
    x = (torch.randn(7, 3, heads, size) * 5).to(dtype)
    # fp32 numbers of size 1; bf16 keeps 8 bits, and is rounded in another order by one of the two.
    torch.testing.assert_close(norm(x), cohere(x), atol=1e-5 if dtype == torch.float32 else 0.03, rtol=0)
    theirs = stablelm(x.permute(1, 2, 0, 3)).permute(2, 0, 1, 3)
    torch.testing.assert_close(norm(x), theirs, atol=1e-5 if dtype == torch.float32 else 0.03, rtol=0)
