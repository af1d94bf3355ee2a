"""Each unsupported combination is named; every registered size is supported."""

import subprocess
import sys
from dataclasses import replace

import pytest

from shared.architecture.architecture import (
    MLP,
    MTP,
    Alibi,
    Architecture,
    Attention,
    GatedDeltaNet,
    Head,
    LatentAttention,
    Layer,
    LearnedPositions,
    MoE,
    Norm,
    PrefixLM,
    RopeScaling,
    Rotary,
)
from shared.errors import UserError
from shared.families import registry
from shared.model.support import check_supported, unsupported

NORM = Norm(epsilon=1e-5)
LAYER_NORM = Norm(kind="layernorm", epsilon=1e-5)
ATTENTION = Attention(heads=4, groups=2, head_dim=16, rotary=Rotary())
MLA = LatentAttention(
    heads=4, q_lora_rank=20, kv_lora_rank=24, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12, rotary=Rotary()
)
DELTA = GatedDeltaNet(key_heads=2, value_heads=4, key_head_dim=16, value_head_dim=12, conv_kernel=4)
DENSE = MLP(ffn_hidden_size=160)
EXPERT = MLP(ffn_hidden_size=32)
MOE = MoE(experts=8, top_k=2, expert=EXPERT)
LAYER = Layer(mixer=ATTENTION, mlp=DENSE, norm=NORM)
OF_MLA = replace(LAYER, mixer=MLA)
OF_MOE = replace(LAYER, mlp=MOE)
PREFIX = PrefixLM(start_token=1, blank_tokens=(2,))
LEARNED = {"attention": {"rotary": None}, "embedding": {"positions": LearnedPositions()}}


def model(*layers: Layer, **fields: object) -> Architecture:
    head = {"head": Head(tied=False, norm=NORM)}
    layers = layers or (LAYER, LAYER)
    return Architecture(
        family="llama", hidden_size=64, vocab_size=512, max_position_embeddings=512, layers=layers, **(head | fields)
    )


def attention(**changes: object) -> Architecture:
    return model().with_values(attention=changes)


def mla(**changes: object) -> Architecture:
    return model(replace(OF_MLA, **changes))


def moe(**changes: object) -> Architecture:
    return model(replace(LAYER, mlp=replace(MOE, **changes)))


def prefix(*layers: Layer, **fields: object) -> Architecture:
    return model(*layers, prefix=PREFIX, **fields)


def mtp(**changes: object) -> Architecture:
    return model(mtp=MTP(depth=1, layer=replace(LAYER, **changes)))


def two(**changes: object) -> Architecture:
    """Two layers; the second differs."""
    return model(LAYER, replace(LAYER, **changes))


CASES = {
    "a model without attention": model(replace(LAYER, mixer=DELTA)),
    # between layers
    "MLA beside other attention": model(LAYER, OF_MLA),
    "MLA beside gated delta nets": model(OF_MLA, replace(LAYER, mixer=DELTA)),
    "attention with different heads, groups in different layers": two(mixer=replace(ATTENTION, heads=8, groups=4)),
    "attention with different bias in different layers": two(mixer=replace(ATTENTION, bias=True)),
    "attention with different softcap in different layers": two(mixer=replace(ATTENTION, softcap=3.0)),
    "MLA with different kv_lora_rank in different layers": model(
        OF_MLA, replace(OF_MLA, mixer=replace(MLA, kv_lora_rank=8))
    ),
    "gated delta nets with different conv_kernel in different layers": model(
        LAYER, replace(LAYER, mixer=DELTA), replace(LAYER, mixer=replace(DELTA, conv_kernel=2))
    ),
    "MLPs with different ffn_hidden_size in different layers": two(mlp=MLP(ffn_hidden_size=80)),
    "MoE with different experts in different layers": model(OF_MOE, replace(LAYER, mlp=replace(MOE, experts=4))),
    "norms with different epsilon in different layers": two(norm=Norm(epsilon=1e-6)),
    "residuals with different multiplier in different layers": two(residual=replace(LAYER.residual, multiplier=0.5)),
    "layers with different norm placements": two(norm_placement="sandwich"),
    "layers with rotary pairs interleaved and half a head apart": two(
        mixer=replace(ATTENTION, rotary=Rotary(interleaved=True))
    ),
    "MoE with an activation other than the dense layers'": model(
        OF_MOE, replace(LAYER, mlp=replace(DENSE, activation="geglu"))
    ),
    "MoE beside dense layers with MLP biases": model(OF_MOE, replace(LAYER, mlp=replace(DENSE, bias=True))),
    # positions
    "learned positions with rotary embedding": model().with_values(embedding={"positions": LearnedPositions()}),
    "learned positions with ALiBi": attention(rotary=None, alibi=Alibi()).with_values(
        embedding={"positions": LearnedPositions()}
    ),
    "ALiBi with rotary embedding": attention(alibi=Alibi()),
    "ALiBi with a sliding window": attention(rotary=None, alibi=Alibi(), window=8),
    "ALiBi with a soft cap": attention(rotary=None, alibi=Alibi(), softcap=3.0),
    "ALiBi with attention sinks": attention(rotary=None, alibi=Alibi(), sinks=True),
    "ALiBi rounded to bf16 with a bias_max other than 8": attention(rotary=None, alibi=Alibi(rounded=True, bias_max=4)),
    # embedding and head
    "a factorised embedding with a norm or a multiplier": model().with_values(
        embedding={"factorised_size": 32, "multiplier": 2.0}
    ),
    "an output layer with a bias and tied embeddings": model().with_values(head={"tied": True, "bias": True}),
    "NormHead with tied embeddings": model().with_values(head={"tied": True, "normalized": True}),
    # norms
    "RMSNorm with a bias": model().with_values(norm={"bias": True}),
    "LayerNorm with zero-centred gamma": model().with_values(norm={"kind": "layernorm", "zero_centered_gamma": True}),
    "norms without weights, other than LayerNorm with a bias": model().with_values(norm={"affine": False}),
    "QK norm without weights": attention(qk_norm="head").with_values(
        norm={"kind": "layernorm", "bias": True, "affine": False}
    ),
    "QK norm with a weight for each head, other than LayerNorm": attention(qk_norm="each_head"),
    "QK norm over the whole projection, other than RMSNorm": attention(qk_norm="projection").with_values(
        norm={"kind": "layernorm"}
    ),
    # residuals
    "an input multiplier of a parallel residual": model().with_values(
        residual={"kind": "parallel", "input_multiplier": 2.0}
    ),
    "a parallel residual with norm placement post": model().with_values(
        residual={"kind": "parallel"}, layer={"norm_placement": "post"}
    ),
    "gated delta nets with a residual other than sequential or norms other than pre": model(
        LAYER, replace(LAYER, mixer=DELTA)
    ).with_values(residual={"kind": "parallel"}),
    "MoE with a parallel_shared residual": moe().with_values(residual={"kind": "parallel_shared"}),
    # attention
    "clipped queries, keys and values with an output gate": attention(clip=8.0, gate=True),
    "softmax scale / layer number with MTP": mtp().with_values(attention={"scale_by_layer": True}),
    "softmax scale / layer number with ALiBi rounded to bf16": attention(
        rotary=None, alibi=Alibi(rounded=True), scale_by_layer=True
    ),
    # MLA
    "MLA with a residual other than sequential or norms other than pre": mla(norm_placement="sandwich"),
    "MLA with norms other than RMSNorm": mla(norm=LAYER_NORM),
    "MLA with a softmax scale of its own": mla(mixer=replace(MLA, scale=0.1)),
    "MLA with interleaved rotary pairs in the checkpoint": mla(mixer=replace(MLA, rotary=Rotary(interleaved=True))),
    # MoE
    "MoE without gated experts": moe(expert=replace(EXPERT, activation="gelu")),
    "MoE with a bias in the experts but not in the other": moe(expert=replace(EXPERT, bias=True)),
    "MoE with a bias in the router but not in the other": moe(router_bias=True),
    "MoE with expert biases and expert groups": moe(expert=replace(EXPERT, bias=True), router_bias=True, groups=2),
    "MoE with expert biases and shared experts": moe(
        expert=replace(EXPERT, bias=True), router_bias=True, shared=EXPERT
    ),
    "MoE with biases in the shared experts": moe(shared=replace(EXPERT, bias=True)),
    "MoE with an activation of the shared experts other than the experts'": moe(
        shared=replace(EXPERT, activation="geglu")
    ),
    "MoE with sigmoid scores that are not normalised": moe(score="sigmoid", normalized=False),
    "MoE with softmax scores and a correction bias": moe(correction_bias=True),
    # prefix LM
    "prefix LM with MLA": prefix(OF_MLA),
    "prefix LM with gated delta nets": prefix(LAYER, replace(LAYER, mixer=DELTA)),
    "prefix LM with MTP": prefix(mtp=MTP(depth=1, layer=LAYER)),
    "prefix LM with ALiBi": prefix().with_values(attention={"rotary": None, "alibi": Alibi()}),
    "prefix LM with a sliding window": prefix().with_values(attention={"window": 8}),
    "prefix LM with one table of learned positions": prefix().with_values(**LEARNED),
    "prefix LM with an offset of learned positions": replace(
        model().with_values(**LEARNED).with_values(embedding={"positions": LearnedPositions(offset=2)}),
        prefix=replace(PREFIX, position_streams=2),
    ),
    "prefix LM with rotary embedding that differs between layers": prefix(
        LAYER, replace(LAYER, mixer=replace(ATTENTION, rotary=None))
    ),
    "prefix LM with rotary scaling": prefix().with_values(rotary={"scaling": RopeScaling(kind="linear", factor=2.0)}),
    "prefix LM with partial or interleaved rotary embedding": prefix().with_values(rotary={"dim": 8}),
    "prefix LM with 2 rotations of an odd part of a head": replace(
        prefix().with_values(attention={"head_dim": 18}), prefix=replace(PREFIX, position_streams=2)
    ),
    # MTP
    "MTP with a gated delta net": mtp(mixer=DELTA),
    "MTP with attention unlike the model's": mtp(mixer=replace(ATTENTION, bias=True)),
    "MTP with an MLP or MoE unlike the model's": mtp(mlp=MOE),
    "MTP with norms or a residual unlike the model's": mtp(norm=Norm(epsilon=1e-6)),
}


@pytest.mark.parametrize("phrase", CASES)
def test_each_unsupported_combination_is_named(phrase):
    assert phrase in unsupported(CASES[phrase])


@pytest.mark.parametrize("phrase", ["MLA with norms other than RMSNorm", "RMSNorm with a bias", "prefix LM with MLA"])
def test_nothing_else_is_named(phrase):
    assert unsupported(CASES[phrase]) == [phrase]


@pytest.mark.parametrize("plain", [model(), mla(), moe(), mtp(), attention(rotary=None), model(LAYER, OF_MOE)])
def test_the_models_that_the_cases_change_are_supported(plain):
    assert unsupported(plain) == []


def test_windows_and_rotary_embedding_may_differ_between_layers():
    full = replace(ATTENTION, rotary=Rotary(theta=1e6, scaling=RopeScaling(kind="linear", factor=8.0)))
    bare = replace(ATTENTION, rotary=None, window=16)
    layers = [replace(LAYER, mixer=mixer) for mixer in (ATTENTION, full, bare)]
    assert unsupported(model(*layers)) == []


def test_every_registered_size_is_supported():
    assert {name: found for name, size in registry.sizes().items() if (found := unsupported(size))} == {}


def test_the_message_is_one_line():
    message = r"llama: ALiBi with a soft cap: supported in conversion, not in training and logits; give --no-logits"
    with pytest.raises(UserError, match=message) as error:
        check_supported(CASES["ALiBi with a soft cap"], fix="give --no-logits")
    assert "\n" not in str(error.value)
    check_supported(model())


def test_neither_torch_nor_megatron_is_imported():
    code = "import sys, shared.model.support; print(sorted({'torch', 'megatron', 'numpy'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
