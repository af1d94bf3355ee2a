"""Architecture: impossible values are refused, derived values are right, parameter counts equal counts by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from shared.architecture.architecture import (
    MLP,
    MTP,
    Architecture,
    Attention,
    GatedDeltaNet,
    Head,
    LatentAttention,
    Layer,
    MoE,
    Norm,
    PrefixLM,
    RopeScaling,
    Rotary,
)

NORM = Norm(epsilon=1e-5)
ATTENTION = Attention(heads=4, groups=2, head_dim=16, rotary=Rotary())
MLA = LatentAttention(
    heads=4, q_lora_rank=20, kv_lora_rank=24, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12, rotary=Rotary()
)
DELTA = GatedDeltaNet(key_heads=2, value_heads=4, key_head_dim=16, value_head_dim=12, conv_kernel=4)
MOE = MoE(experts=8, top_k=2, expert=MLP(ffn_hidden_size=32))
LAYER = Layer(mixer=ATTENTION, mlp=MLP(ffn_hidden_size=160), norm=NORM)
PLAIN = Architecture(
    family="llama",
    hidden_size=64,
    vocab_size=512,
    max_position_embeddings=512,
    layers=(LAYER, LAYER),
    head=Head(tied=False, norm=NORM),
)
SPARSE = replace(LAYER, mlp=MOE)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replace(ATTENTION, groups=3), "4 attention heads are not divisible by 3"),
        (lambda: replace(ATTENTION, head_dim=15), "even head_dim"),
        (lambda: replace(ATTENTION, rotary=Rotary(dim=18)), "rotary dim 18 must be even and in 2..head_dim 16"),
        (lambda: replace(ATTENTION, window=0), "sliding window 0 must be at least 1"),
        (lambda: replace(ATTENTION, softcap=0.0), "softcap 0.0 must be positive"),
        (lambda: replace(ATTENTION, clip=0.0), "clip 0.0 must be positive"),
        (lambda: replace(MLA, qk_rope_head_dim=7), "qk_rope_head_dim 7"),
        (lambda: replace(MLA, rotary=Rotary(dim=4)), "qk_rope_head_dim 8"),
        (lambda: replace(DELTA, value_heads=3), "3 value heads are not divisible by 2"),
        (lambda: MLP(ffn_hidden_size=8, activation="gelu", clamp=7.0), "need a gated activation, not gelu"),
        (lambda: replace(MOE, top_k=9), "top_k 9 must be in 1..8"),
        (lambda: replace(MOE, groups=3), "3 expert groups must divide 8 experts"),
        (lambda: replace(MOE, groups=8, top_groups=2), "group_score_top 2 must be in 1..1"),
        (lambda: replace(MOE, shared_gate=True), "shared_gate is set without shared experts"),
        (lambda: replace(NORM, epsilon=-1.0), "norm epsilon -1.0"),
        (lambda: MTP(depth=0, layer=LAYER), "MTP with 0 layers"),
        (lambda: replace(PLAIN, layers=()), "has no layers"),
        (lambda: replace(PLAIN, prefix=PrefixLM(start_token=512, blank_tokens=(3,))), "token id 512 is out of range"),
        (lambda: RopeScaling(kind="linear", factor=0.5), "at least 1"),
        (
            lambda: replace(
                ATTENTION,
                rotary=Rotary(
                    scaling=RopeScaling(kind="longrope", factor=2.0, short_factors=(1.0,), long_factors=(2.0,))
                ),
            ),
            "longrope has 1 factors; rotary dim 16 needs 8",
        ),
    ],
)
def test_what_is_impossible_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_layers_are_shared_values() -> None:
    assert PLAIN.kinds == (LAYER,)
    mixed = replace(PLAIN, layers=(LAYER, SPARSE, SPARSE))
    assert mixed.kinds == (LAYER, SPARSE)
    assert (mixed.mlp, mixed.moe) == (LAYER.mlp, MOE)
    assert (mixed.layers_of(MLP), mixed.layers_of(MoE), mixed.layers_of(Attention)) == ((0,), (1, 2), (0, 1, 2))
    assert PLAIN.homogeneous
    assert not mixed.homogeneous
    windowed = replace(LAYER, mixer=replace(ATTENTION, window=8))
    assert replace(PLAIN, layers=(LAYER, windowed)).homogeneous  # the same tensors, stacked under one key
    assert not replace(PLAIN, layers=(LAYER, replace(LAYER, mixer=DELTA))).homogeneous


def test_values_of_every_layer_are_replaced() -> None:
    predicting = replace(PLAIN, layers=(LAYER, SPARSE), mtp=MTP(depth=2, layer=SPARSE))
    changed = predicting.with_values(
        attention={"bias": True}, rotary={"theta": 5.0}, mlp={"bias": True}, moe={"top_k": 3}, norm={"epsilon": 0.5}
    )
    assert changed.mtp is not None
    for layer in (*changed.layers, changed.mtp.layer):
        assert isinstance(layer.mixer, Attention)
        assert (layer.mixer.bias, layer.mixer.rotary, layer.norm) == (True, Rotary(theta=5.0), Norm(epsilon=0.5))
    assert changed.mlp == MLP(ffn_hidden_size=160, bias=True)
    assert changed.moe == replace(MOE, top_k=3)
    assert changed.head.norm == Norm(epsilon=0.5)
    assert PLAIN.with_values(num_layers=5, attention={"bias": True}).num_layers == 5
    with pytest.raises(ValueError, match="of 2 different layers"):
        predicting.with_values(num_layers=5)


def test_counts_by_hand() -> None:
    attention = 64 * (64 + 32 + 32) + 64 * 64
    layer = attention + 3 * 64 * 160 + 2 * 64
    assert PLAIN.parameter_count() == 2 * layer + 2 * 512 * 64 + 64
    experts = 64 * 8 + 8 * 3 * 64 * 32
    sparse = replace(PLAIN, layers=(SPARSE,), head=Head(tied=True, norm=NORM))
    assert sparse.parameter_count() == attention + experts + 2 * 64 + 512 * 64 + 64
    assert sparse.parameter_count() - sparse.parameter_count(active=True) == 6 * 3 * 64 * 32
    mla = 64 * 20 + 20 + 20 * 4 * 24 + 64 * (24 + 8) + 24 + 24 * 4 * (16 + 12) + 4 * 12 * 64
    assert MLA.parameter_count(64) == mla
    delta = 64 * (2 * 32 + 2 * 48 + 2 * 4) + (2 * 32 + 48) * 4 + 2 * 4 + 12 + 48 * 64
    assert DELTA.parameter_count(64) == delta
    predicting = replace(PLAIN, mtp=MTP(depth=2, layer=LAYER))
    assert predicting.parameter_count() == PLAIN.parameter_count()
    assert predicting.mtp_parameter_count() == 2 * (layer + 3 * 64 + 2 * 64 * 64)


def test_the_padded_vocabulary() -> None:
    assert replace(PLAIN, vocab_size=509).padded_vocab_size() == 512
    assert PLAIN.padded_vocab_size(tensor_parallel=8) == 1024
