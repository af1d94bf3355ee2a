"""Multi-token prediction (MTP): weights present or absent, and the MTP modules.

`test_every_family` has MTP logits and gradients at TP=2, PP=2 and EP=2, and the round trip.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import shared.runtime.device
from shared.architecture.architecture import Architecture, Attention, MoE
from shared.families import registry
from shared.mapping.rule import Rule
from tests.references.prediction import Predicting
from tests.tools.convert.conftest import SIZES
from tests.tools.convert.mistakes import Mistake, table_mistakes
from tools.convert.verify_logits import RELATIVE_TOLERANCE

POSITIONS = 288
PREDICTING = [name for name, size in SIZES.items() if size.mtp]
IDS = torch.randint(509, (1, POSITIONS), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=PREDICTING)
def predicting(request: pytest.FixtureRequest) -> Architecture:
    return SIZES[request.param]


def of_them(name: str, a: Architecture) -> bool:
    """Whether a file's tensor is one of such a layer's."""
    return name.startswith(("mtp.", f"model.layers.{a.num_layers}."))


def change(source: Path, function: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(source / "model.safetensors")
    function(tensors)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})


def same(one: Path, other: Path) -> bool:
    return (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def converted(convert: Any, source: Path, target: Path, *words: str, command: str = "to-megatron") -> str:
    answer = convert(command, "--source", source, "--target", target, *words)
    assert answer.code == 0, answer.err
    return str(answer.err)


def ahead(target: Path, a: Architecture) -> torch.Tensor:
    """Logits of the tokens after the next, `[1, POSITIONS - 1, vocabulary]`, from a Megatron directory."""
    shared.runtime.device.select_device()
    from shared.model import gpt, weights
    from shared.parallel import ParallelConfig
    from shared.runtime.process_groups import initialize

    initialize(ParallelConfig(), seed=0)
    chunks = gpt.build(a, ParallelConfig(), dtype=torch.float32)
    weights.load(chunks, target / "release")
    return run(chunks[0].eval(), torch.stack([IDS, IDS]), 1, a)


@torch.no_grad()
def run(model: Any, labels: torch.Tensor, call: int, a: Architecture) -> torch.Tensor:
    """What the output layer gives in one of its calls."""
    found: list[torch.Tensor] = []
    hook = model.output_layer.register_forward_hook(lambda layer, given, made: found.append(made[0].clone()))
    model(IDS, torch.arange(POSITIONS)[None], None, labels=labels)
    hook.remove()
    return found[call].transpose(0, 1)[:, :-1, : a.vocab_size]


def test_logits_and_mistakes_that_they_find(
    predicting: Architecture,
    write_architecture: Any,
    convert: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    subtests: pytest.Subtests,
) -> None:
    source = write_architecture(tmp_path / "hf", predicting, dtype="fp32")
    with torch.no_grad():
        _, theirs = Predicting(source, tmp_path / "predicting").logits(IDS)
    assert theirs.std() > 0.1
    tolerance = RELATIVE_TOLERANCE * theirs.std()
    converted(convert, source, tmp_path / "megatron")
    assert (ahead(tmp_path / "megatron", predicting) - theirs).abs().max() < tolerance

    for index, (name, wrong) in enumerate(mistakes(predicting)):
        target = tmp_path / f"megatron{index}"
        with monkeypatch.context() as patch:
            mistake = Mistake(name=name, held_by="mtp", rule=wrong)
            family = mistake.family(registry.FAMILIES[predicting.family], predicting)
            patch.setitem(registry.FAMILIES, predicting.family, family)
            converted(convert, source, target)
            back = tmp_path / f"back{index}"
            converted(convert, target, back, command="to-hf")
            assert same(source, back)  # which the way back can't see
        with subtests.test(name):
            assert (ahead(target, predicting) - theirs).abs().max() > 100 * tolerance
    halves = tmp_path / "halves"
    shutil.copytree(source, halves)
    (projection,) = [s.name for r in of_prediction(predicting) if "eh_proj" in r.megatron for s in r.sources]
    hidden = predicting.hidden_size
    change(halves, lambda tensors: tensors.update({projection: tensors[projection].roll(hidden, 1).contiguous()}))
    converted(convert, halves, tmp_path / "of-halves")
    with subtests.test("halves of the projection"):
        assert (ahead(tmp_path / "of-halves", predicting) - theirs).abs().max() > 100 * tolerance


def of_prediction(a: Architecture) -> list[Rule]:
    return [rule for rule in registry.table_of(a).rules if rule.megatron.startswith("mtp.")]


def mistakes(a: Architecture) -> Iterator[tuple[str, Callable[[Rule], Rule]]]:
    """Mistakes in rules of such layers alone: around the layer within, and two of its own."""

    def exchanged(rule: Rule) -> Rule:
        parts = {"enorm": "hnorm", "hnorm": "enorm"}
        for one, other in parts.items():
            if rule.megatron.endswith(f".{one}.weight"):
                return replace(rule, megatron=rule.megatron.replace(one, other))
        return rule

    yield "norms of embedding and hidden state", exchanged
    of_model = dict(table_mistakes(a))
    for name in ("gate and up of experts", "query of another head" if a.mla else "key and value"):
        wrong = of_model[name]
        yield name, lambda rule, wrong=wrong: wrong(rule) if rule.megatron.startswith("mtp.") else rule


def test_all_of_it_or_none(predicting: Architecture, write_architecture: Any, convert: Any, tmp_path: Path) -> None:
    source, target, back = (tmp_path / name for name in ("hf", "megatron", "back"))
    write_architecture(source, predicting)
    names = sorted(name for name in load_file(source / "model.safetensors") if of_them(name, predicting))
    change(source, lambda tensors: tensors.pop(names[-1]))
    answer = convert("to-megatron", "--source", source, "--target", target)
    assert (answer.code, f"{names[-1]} is missing, though config.json asks for it" in answer.err) == (2, True)
    change(source, lambda tensors: [tensors.pop(name) for name in names[:-1]])
    for place, said in (
        (source, converted(convert, source, target)),
        (target, converted(convert, target, back, command="to-hf")),
    ):
        assert f"mtp: off (config.json declares MTP layers, {place} has none)" in said
    assert same(source, back)
    assert convert("verify", "--source", source, "--target", target).code == 0
    assert convert("inspect", target).code == 0


def test_what_older_directories_hold_beside_the_weights_comes_back(
    predicting: Architecture, write_architecture: Any, convert: Any, tmp_path: Path
) -> None:
    """Such layers' tensors in hf/asides.safetensors and none of them in Megatron form."""
    source, without, target, old, back = (tmp_path / n for n in ("hf", "without", "megatron", "old", "back"))
    write_architecture(source, predicting)
    tensors = load_file(source / "model.safetensors")
    shutil.copytree(source, without)
    beside = {name for name in tensors if of_them(name, predicting)}
    change(without, lambda tensors: [tensors.pop(name) for name in beside])
    converted(convert, without, old)
    converted(convert, source, target)
    shutil.copy(target / "hf" / "weights.json", old / "hf" / "weights.json")
    save_file({name: tensors[name] for name in beside}, old / "hf" / "asides.safetensors", {"format": "pt"})
    (old / "manifest.json").unlink()
    said = converted(convert, old, back, command="to-hf")
    assert "pass-through tensors, as in the original checkpoint" in said
    assert "mtp: off" not in said
    assert same(source, back)


def test_copies_of_the_models_own_are_copies(write_architecture: Any, convert: Any, tmp_path: Path) -> None:
    architecture = SIZES.get("deepseek-v3-tiny")
    if architecture is None:
        pytest.skip("another family is worked on")
    source = write_architecture(tmp_path / "hf", architecture)
    copies = ["model.layers.2.embed_tokens.weight", "model.layers.2.shared_head.head.weight"]
    change(source, lambda tensors: tensors[copies[1]][3].neg_())
    answer = convert("to-megatron", "--source", source, "--target", tmp_path / "megatron")
    assert answer.code == 2
    assert f"{copies[1]} differs from lm_head.weight, but the family ties them" in answer.err
    change(source, lambda tensors: [tensors.pop(name) for name in copies])
    converted(convert, source, tmp_path / "megatron")
    converted(convert, tmp_path / "megatron", tmp_path / "back", command="to-hf")
    assert same(source, tmp_path / "back")


def test_beside_the_weights_of_transformer_engine(
    predicting: Architecture, write_architecture: Any, convert: Any, tmp_path: Path
) -> None:
    source = write_architecture(tmp_path / "hf", predicting)
    assert "pass-through tensors, kept in hf/" in converted(convert, source, tmp_path / "te", command="to-te")
    converted(convert, tmp_path / "te", tmp_path / "back", command="to-hf")
    assert same(source, tmp_path / "back")
    answer = convert("verify", "--source", source, "--target", tmp_path / "te", "--no-logits")
    assert answer.code == 0, answer.err


def test_plain_megatron_core(write_architecture: Any, convert: Any, tmp_path: Path) -> None:
    """Its own GPTModel with its own local spec, whose latent attention can't be built: `DotProductAttention` takes no
    `k_channels`. Its experts' norm is spelt there as a dense layer's, which TransformerEngine's spec does not do."""
    a = SIZES.get("glm4-moe-tiny")
    if a is None:
        pytest.skip("another family is worked on")
    source = write_architecture(tmp_path / "hf", a, dtype="fp32")
    with torch.no_grad():
        _, theirs = Predicting(source, tmp_path / "predicting").logits(IDS)
    converted(convert, source, tmp_path / "megatron")
    model = plain(a)
    from megatron.core import dist_checkpointing

    loaded = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(tmp_path / "megatron" / "release"))
    model.load_state_dict(loaded["model"])
    # It computes tokens further ahead first.
    assert (run(model.eval(), IDS, 0, a) - theirs).abs().max() < RELATIVE_TOLERANCE * theirs.std()


def plain(a: Architecture) -> Any:
    shared.runtime.device.select_device()
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
    from megatron.core.transformer import TransformerConfig

    from shared.parallel import ParallelConfig
    from shared.runtime.process_groups import initialize

    initialize(ParallelConfig(), seed=0)
    attention, moe = a.attention, a.moe
    assert moe is not None
    assert moe.shared is not None
    assert isinstance(attention, Attention)
    assert attention.rotary is not None
    assert a.mtp is not None
    config = TransformerConfig(
        num_layers=a.num_layers,
        mtp_num_layers=a.mtp.depth,
        hidden_size=a.hidden_size,
        ffn_hidden_size=a.mlp.ffn_hidden_size if a.mlp else a.unused_ffn_hidden_size,
        num_attention_heads=attention.heads,
        num_query_groups=attention.groups,
        kv_channels=attention.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=a.layers[0].norm.epsilon,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=attention.bias,
        qk_layernorm=attention.qk_norm is not None,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        num_moe_experts=moe.experts,
        moe_layer_freq=[int(isinstance(layer.mlp, MoE)) for layer in a.layers],
        moe_ffn_hidden_size=moe.expert.ffn_hidden_size,
        moe_shared_expert_intermediate_size=moe.shared.ffn_hidden_size,
        moe_router_topk=moe.top_k,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_topk_scaling_factor=moe.scaling,
        moe_router_load_balancing_type="none",
        moe_router_dtype="fp32",
        moe_token_dispatcher_type="alltoall",
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    spec.layer_specs[-1].submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.")
    model = GPTModel(
        config,
        spec,
        vocab_size=a.padded_vocab_size(),
        max_sequence_length=a.max_position_embeddings,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_percent=attention.rotary_dim / attention.head_dim,
        rotary_base=attention.rotary.theta,
        mtp_block_spec=get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    return model
