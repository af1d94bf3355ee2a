"""The Megatron-Core models against transformers', on the same random weights."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from dataclasses import replace

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from shared.architecture.architecture import (
    MLP,
    Alibi,
    Architecture,
    Attention,
    Head,
    Layer,
    LearnedPositions,
    Norm,
    RopeScaling,
    Rotary,
)
from shared.model.gpt import build
from shared.model.logits import logits
from shared.parallel import ParallelConfig

VOCAB, POSITIONS = 300, 320

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CASES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}, {}),
    "llama multi-head": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 4}, {}),
    "llama tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}, {}),
    "llama head_dim": (LlamaConfig, LlamaForCausalLM, {"head_dim": 32}, {}),
    "llama biases": (
        LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True},
        {"attention": {"bias": True, "output_bias": True}, "mlp": {"bias": True}},
    ),
    "llama mlp bias": (LlamaConfig, LlamaForCausalLM, {"mlp_bias": True}, {"mlp": {"bias": True}}),
    "llama linear rope": (
        LlamaConfig, LlamaForCausalLM, {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
        {"rotary": {"scaling": RopeScaling(kind="linear", factor=4.0)}},
    ),
    "llama 3.1": (
        LlamaConfig, LlamaForCausalLM, {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
        {"rotary": {"theta": 5e5, "scaling": RopeScaling(kind="llama3", factor=8.0, original_length=64)}},
    ),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}, {"attention": {"bias": True}}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32}, {"attention": {"qk_norm": "head"}}),
}  # fmt: skip


def of_transformers(config_class, model_class, fields):
    """A small model of transformers with every weight random, biases and norms included."""
    config = config_class(
        **{
            "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
            "tie_word_embeddings": False, "attn_implementation": "eager", "initializer_range": 0.1, **fields,
        }
    )  # fmt: skip
    torch.manual_seed(7)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    return model


def architecture_of(config, changes):
    norm = Norm(epsilon=config.rms_norm_eps)
    head_dim = getattr(config, "head_dim", None) or 16
    mixer = Attention(heads=4, groups=config.num_key_value_heads, head_dim=head_dim, rotary=Rotary())
    return Architecture(
        family=config.model_type,
        hidden_size=64,
        vocab_size=VOCAB,
        max_position_embeddings=512,
        layers=(Layer(mixer=mixer, mlp=MLP(ffn_hidden_size=96), norm=norm),) * 2,
        head=Head(tied=config.tie_word_embeddings, norm=norm),
    ).with_values(**changes)


@torch.no_grad()
def copy(source, model):
    """The weights of transformers' `source` into our single-process `model`: a mapping of this test's own."""
    theirs, ours = dict(source.named_parameters()), dict(model.named_parameters())
    groups = model.config.num_query_groups

    def by_group(*names):  # [q1..qn k1 v1 | q.. k2 v2]
        return torch.cat([theirs[n].unflatten(0, (groups, -1)) for n in names], dim=1).flatten(0, 1)

    sources = {"embedding.word_embeddings.weight": theirs["model.embed_tokens.weight"]}
    sources["decoder.final_layernorm.weight"] = theirs["model.norm.weight"]
    if "lm_head.weight" in theirs:
        sources["output_layer.weight"] = theirs["lm_head.weight"]
    for index in range(model.config.num_layers):
        hf, mg = f"model.layers.{index}.", f"decoder.layers.{index}."
        sources[mg + "input_layernorm.weight"] = theirs[hf + "input_layernorm.weight"]
        sources[mg + "pre_mlp_layernorm.weight"] = theirs[hf + "post_attention_layernorm.weight"]
        for norm in "qk":
            if f"{hf}self_attn.{norm}_norm.weight" in theirs:
                sources[f"{mg}self_attention.{norm}_layernorm.weight"] = theirs[f"{hf}self_attn.{norm}_norm.weight"]
        for kind in ("weight", "bias"):
            if f"{hf}self_attn.q_proj.{kind}" in theirs:
                sources[f"{mg}self_attention.linear_qkv.{kind}"] = by_group(
                    *(f"{hf}self_attn.{part}_proj.{kind}" for part in "qkv")
                )
            if f"{hf}self_attn.o_proj.{kind}" in theirs:
                sources[f"{mg}self_attention.linear_proj.{kind}"] = theirs[f"{hf}self_attn.o_proj.{kind}"]
            if f"{hf}mlp.gate_proj.{kind}" in theirs:
                gate_up = [theirs[f"{hf}mlp.{part}_proj.{kind}"] for part in ("gate", "up")]
                sources[f"{mg}mlp.linear_fc1.{kind}"] = torch.cat(gate_up)
                sources[f"{mg}mlp.linear_fc2.{kind}"] = theirs[f"{hf}mlp.down_proj.{kind}"]
    assert sources.keys() == ours.keys()
    for name, tensor in sources.items():
        if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            # Garbage in the padding: whatever it holds must not matter.
            ours[name].fill_(100.0)[:VOCAB] = tensor
        else:
            assert ours[name].shape == tensor.shape, name
            ours[name].copy_(tensor)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_are_those_of_transformers(case, model_of):
    config_class, model_class, hf_fields, our_fields = CASES[case]
    theirs = of_transformers(config_class, model_class, hf_fields)
    model = model_of(architecture_of(theirs.config, our_fields))
    copy(theirs, model)
    ids = torch.randint(0, VOCAB, (2, POSITIONS + 1), generator=torch.Generator().manual_seed(1))

    found, expected = logits([model], ids[:, :-1]), theirs(ids[:, :-1]).logits
    assert found.shape == (2, POSITIONS, VOCAB)
    # fp32 with sums in another order, of logits of size 10: 1e-4 is 1e-5 of the size, under a hundred last bits.
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)

    their_loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), ids[:, 1:].flatten())
    their_loss.backward()
    positions = torch.arange(POSITIONS)[None]
    our_loss = model(ids[:, :-1], positions, None, labels=ids[:, 1:]).mean()
    our_loss.backward()
    torch.testing.assert_close(our_loss, their_loss, atol=1e-5, rtol=0)
    for ours, hf in (
        (model.decoder.layers[0].input_layernorm.weight, theirs.model.layers[0].input_layernorm.weight),
        (model.decoder.layers[0].self_attention.linear_proj.weight, theirs.model.layers[0].self_attn.o_proj.weight),
        (model.decoder.layers[1].mlp.linear_fc2.weight, theirs.model.layers[1].mlp.down_proj.weight),
    ):
        # Gradients of size 0.01 to 0.1, summed over 640 positions in fp32.
        torch.testing.assert_close(ours.grad, hf.grad, atol=1e-5, rtol=1e-3)


def test_vocabulary_padding_changes_neither_loss_nor_gradient(model_of, worker):
    model = model_of(worker.architecture(head={"tied": False}))
    ids = torch.randint(0, VOCAB, (2, 17))
    positions = torch.arange(16)[None]

    def loss():
        return model(ids[:, :-1], positions, None, labels=ids[:, 1:]).mean()

    with torch.no_grad():
        model.output_layer.weight[VOCAB:] = 0.0
    before = loss()
    with torch.no_grad():
        model.output_layer.weight[VOCAB:] = 50.0
    after = loss()
    assert torch.equal(before, after)
    after.backward()
    assert model.output_layer.weight.shape[0] == 384
    assert torch.count_nonzero(model.output_layer.weight.grad[VOCAB:]) == 0
    assert torch.count_nonzero(model.output_layer.weight.grad[:VOCAB]) > 0


def windows_in_every_second_layer(architecture):
    full = architecture.layers[0]
    windowed = replace(full, mixer=replace(full.mixer, window=4, rotary=Rotary(theta=500.0)))
    return replace(architecture, layers=(windowed, full, windowed, full))


LAYER_NORM = {"kind": "layernorm", "bias": True}
LEARNED = {"attention": {"rotary": None}, "embedding": {"positions": LearnedPositions(offset=2)}}
OTHER_FAMILIES = {
    "llama": {},
    "learned positions": LEARNED,
    "no positions": {"attention": {"rotary": None}},
    "alibi": {"attention": {"rotary": None, "alibi": Alibi()}, "embedding": {"norm": Norm(epsilon=1e-5)}},
    "window and caps": {"attention": {"softcap": 2.0}, "head": {"softcap": 3.0}},
    "norms behind": {
        "layer": {"norm_placement": "post"}, "residual": {"multiplier": 0.5}, "attention": {"qk_norm": "projection"},
    },
    "side by side": {"residual": {"kind": "parallel_shared"}, "norm": LAYER_NORM, "mlp": {"activation": "gelu"}},
    "multipliers": {
        "embedding": {"multiplier": 8.0}, "head": {"multiplier": 0.5}, "norm": {"zero_centered_gamma": True},
    },
}  # fmt: skip


def other_family(name, worker):
    architecture = worker.architecture(**OTHER_FAMILIES[name])
    return windows_in_every_second_layer(architecture) if name.startswith("window") else architecture


@pytest.mark.parametrize("name", OTHER_FAMILIES)
def test_packed_rows_equal_their_sequences_apart(name, model_of, worker):
    model = model_of(other_family(name, worker))
    first, second = torch.randint(0, VOCAB, (1, 9)), torch.randint(0, VOCAB, (1, 5))
    row = torch.cat([first, second, torch.zeros(1, 2, dtype=torch.long)], dim=1)
    segments = torch.tensor([[1] * 9 + [2] * 5 + [0] * 2])
    positions = torch.arange(16)[None]
    packed = model(row, positions, segments)
    # Relative positions may start anywhere, learned ones start anew with each segment; fp32, logits of size 1.
    torch.testing.assert_close(packed[:, :9], model(first, positions[:, :9], None), atol=1e-5, rtol=0)
    torch.testing.assert_close(packed[:, 9:14], model(second, positions[:, :5], None), atol=1e-5, rtol=0)
    assert torch.isfinite(packed).all()


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("name", ["llama", "window and caps", "side by side", "norms behind", "alibi"])
def test_recomputation_gives_the_same_gradients(name, recompute, model_of, worker):
    gradients = []
    ids = torch.randint(0, VOCAB, (2, 17), generator=torch.Generator().manual_seed(2))
    for how in ("none", recompute):
        model = model_of(other_family(name, worker), recompute=how).train()
        model(ids[:, :-1], torch.arange(16)[None], None, labels=ids[:, 1:]).mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for kept, recomputed in zip(*gradients, strict=True):
        # The same operations; autograd may add the gradients that meet in one tensor in another order.
        torch.testing.assert_close(kept, recomputed, atol=1e-7, rtol=1e-5)


def test_weights_that_were_never_loaded_cannot_pass_for_trained(worker, model_of):
    model_of(worker.architecture())  # makes the process groups
    (model,) = build(worker.architecture(), ParallelConfig(), dtype=torch.float32)
    ids = torch.randint(0, VOCAB, (1, 8))
    assert torch.isnan(model(ids, torch.arange(8)[None], None, labels=ids)).all()


def test_dropout_is_the_architectures(model_of, worker):
    ids, positions = torch.randint(0, VOCAB, (1, 16)), torch.arange(16)[None]
    for where in ("residual", "embedding", "attention"):
        for kind in ("sequential", "parallel"):
            architecture = worker.architecture(residual={"kind": kind})
            model = model_of(architecture.with_values(**{where: {"dropout": 0.5}}))
            assert torch.equal(model(ids, positions, None), model(ids, positions, None))
            model.train()
            assert not torch.equal(model(ids, positions, None), model(ids, positions, None)), where


@pytest.mark.parametrize("name", OTHER_FAMILIES)
def test_training_in_bf16_follows_fp32(name, model_of, worker):
    ids = torch.randint(0, VOCAB, (2, 17), generator=torch.Generator().manual_seed(4))
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        model = model_of(other_family(name, worker), dtype).train()
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        loss = model(ids[:, :-1], torch.arange(16)[None], None, labels=ids[:, 1:]).mean()
        loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        losses.append(loss.item())
    # bf16 carries 8 bits: errors of 2^-8 in every activation move a loss near 6 by well under 0.05.
    assert losses[1] == pytest.approx(losses[0], abs=0.05)
