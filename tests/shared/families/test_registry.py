"""Families against transformers: configurations, names and shapes of every tensor, at real sizes, without weights."""

from __future__ import annotations

import contextlib
import json
import math
import runpy
import tempfile
from pathlib import Path
from typing import Any

import pytest

from shared.architecture.architecture import Architecture
from shared.checkpoint.formats.safetensors_file import TensorInfo
from shared.errors import UserError
from shared.families import registry
from shared.families.common.decoder import attention_of, rotary_of
from shared.families.common.sliding_windows import windows_of
from shared.mapping.account import account_sources
from shared.model.support import check_supported
from shared.quantized.scheme import quantization_scheme
from shared.quantized.stored_weight import assemble_weights

REFERENCES = Path(__file__).parents[2] / "references"


class Tensor:
    place = "header"

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape


def transformers_tensors(config: dict[str, Any]) -> dict[str, Tensor]:
    """Name and shape of every weight of the model, as transformers saves it: built without storage.

    Where transformers lacks the class, that of our reference is built.
    """
    import torch
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    family = registry.family_of(config)
    with torch.device("meta"):
        if family.remote:
            code = runpy.run_path(str(REFERENCES / f"{family.name}.py"))
            model = code["LanguageModel"](code["Config"](**config))
        else:
            kind = transformers.CONFIG_MAPPING[family.model_types[0]]  # which may be published under another
            theirs = kind.from_dict({**family.without_legacy_names(config), "model_type": kind.model_type})
            model = transformers.AutoModelForCausalLM.from_config(theirs)
    weights = revert_weight_conversion(model, model.state_dict())  # under the names that files have
    tied = ("lm_head.weight", "language_model.lm_head.weight") if model.config.tie_word_embeddings else ()
    return {name: Tensor(tuple(tensor.shape)) for name, tensor in weights.items() if name not in tied}


# Configurations as published, in the spelling they were published in, and the published number of parameters
# where there is an exact one; and other files that the family reads something of.
PUBLISHED: dict[str, dict[str, Any]] = {
    path.stem: json.loads(path.read_text()) for path in sorted(Path(__file__).with_name("published").glob("*.json"))
}
for entry in PUBLISHED.values():
    with tempfile.TemporaryDirectory() as folder:
        for name, content in entry.pop("files", {}).items():
            Path(folder, name).write_text(json.dumps(content))
        entry["config"] = registry.with_auxiliary_fields(entry["config"], Path(folder))


def in_form(name: str) -> Architecture:
    """The model without what changes no tensor, so that twins are built once."""
    a = registry.from_config(PUBLISHED[name]["config"])
    return a.with_values(moe={"auxiliary_loss": 0.0})


DISTINCT = list({in_form(name): name for name in PUBLISHED}.values())


@pytest.mark.parametrize("name", sorted(PUBLISHED.keys() - set(DISTINCT)))
def test_published_twins(name: str, proof: Any) -> None:
    with proof("tensors", family=registry.family_of(PUBLISHED[name]["config"]).name, model=name):
        assert in_form(name) in {in_form(other) for other in DISTINCT}


@pytest.mark.parametrize("name", DISTINCT)
def test_every_tensor_of_a_published_model_is_accounted_for(name: str, proof: Any) -> None:
    config = PUBLISHED[name]["config"]
    with proof("tensors", family=registry.family_of(config).name, model=name) as figures:
        architecture = registry.from_config(config)
        found = transformers_tensors(config)
        without = registry.drop_missing_mtp(architecture, found)  # transformers ignores MTP layers
        account = account_sources(registry.table_of(without), found, name)
        beside = set(account.pass_through)  # of what sees images
        assert {source.name for entry in account.entries for source in entry.sources} == found.keys() - beside
        count = sum(math.prod(tensor.shape) for tensor in found.values())
        figures |= {"tensors": len(found), "parameters": count}
        assert count - sum(math.prod(found[name].shape) for name in beside) == architecture.parameter_count()
        assert bool(beside) == (architecture.vision is not None)
        assert PUBLISHED[name]["parameters"] in (count, None)
        if further := further_tensors(architecture, found):
            account_sources(registry.table_of(architecture), found | further, name)
            own = {n: t for n, t in further.items() if "embed_tokens" not in n and "shared_head.head" not in n}
            assert sum(math.prod(tensor.shape) for tensor in own.values()) == architecture.mtp_parameter_count()


def further_tensors(a: Architecture, found: dict[str, Any]) -> dict[str, Any]:
    """Those of MTP layers, as the makers' READMEs and vLLM's loaders have them.

    Each is a layer like the model's last one, a projection of two vectors, and norms.
    """
    if not a.mtp:
        return {}
    assert a.mtp.depth == 1
    hidden = a.hidden_size
    last, layer = f"model.layers.{a.num_layers - 1}.", f"model.layers.{a.num_layers}."
    own = {"enorm": (hidden,), "hnorm": (hidden,), "eh_proj": (hidden, 2 * hidden), "shared_head.norm": (hidden,)}
    shapes = {f"{layer}{name}": shape for name, shape in own.items()}
    shapes |= dict.fromkeys((f"{layer}embed_tokens", f"{layer}shared_head.head"), (a.vocab_size, hidden))
    if a.family == "qwen3_next":
        layer = "mtp.layers.0."
        shapes = {"mtp.fc": (hidden, 2 * hidden)}
        shapes |= dict.fromkeys(("mtp.norm", "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden"), (hidden,))
    inner = {layer + name.removeprefix(last): tensor for name, tensor in found.items() if name.startswith(last)}
    return inner | {
        f"{name}.weight": TensorInfo(name=name, dtype="BF16", shape=shape, file=Path("header"), start=0, size=0)
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("size", ["tiny", "qwen2-tiny", "qwen3-tiny"])
@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "mlp_bias": True}], ids=["plain", "biases"])
def test_biases_are_where_transformers_has_them(size: str, changes: dict[str, Any]) -> None:
    config = registry.to_config(registry.sizes()[size])
    config |= {name: value for name, value in changes.items() if name in config}
    table = registry.table_of(registry.from_config(config))
    account_sources(table, transformers_tensors(config), size)


def published(name: str) -> Architecture:
    return registry.from_config(PUBLISHED[name]["config"])


def test_every_family_has_a_published_model() -> None:
    assert {registry.family_of(entry["config"]).name for entry in PUBLISHED.values()} == set(registry.names())


def test_named_sizes_are_the_published_ones() -> None:
    found = [published(name) for name in PUBLISHED]
    for family in registry.FAMILIES.values():
        assert any(size in found for size in family.sizes.values()), family.name


def test_facts_of_published_models() -> None:
    assert published("Llama-3.1-8B") == registry.sizes()["llama-3.1-8b"]
    assert published("Qwen3-8B") == registry.sizes()["qwen3-8b"]
    assert published("Qwen2.5-0.5B") == registry.sizes()["qwen2.5-0.5b"]
    old = published("LLaMA-7B")
    assert (old.attention.groups, old.attention.head_dim, rotary_of(old).theta) == (32, 128, 10_000.0)
    assert rotary_of(published("CodeLlama-34B")).theta == 1_000_000.0
    assert set(windows_of(published("Mistral-7B-v0.1"))) == {4096}
    assert set(windows_of(published("Mistral-7B-Instruct-v0.3"))) == {None}
    capped = published("gemma-2-27b")
    assert (attention_of(capped).softcap, capped.head.softcap) == (50.0, 30.0)
    assert capped.attention.scale == pytest.approx(1 / 12)
    assert windows_of(capped)[:2] == (4096, None)
    smol = published("SmolLM3-3B")
    assert [i for i, layer in enumerate(smol.layers) if not layer.mixer.rotary] == list(range(3, 36, 4))
    assert [published(name).attention.rotary_dim for name in ("GLM-4-9B-0414", "stablelm-2-1_6b")] == [64, 16]


@pytest.mark.parametrize("size", registry.sizes())
def test_configuration_both_ways(size: str) -> None:
    architecture = registry.sizes()[size]
    assert registry.from_config(json.loads(json.dumps(registry.to_config(architecture)))) == architecture


OF_TRANSFORMERS = [name for name, size in registry.sizes().items() if not registry.FAMILIES[size.family].remote]


@pytest.mark.parametrize("size", OF_TRANSFORMERS)
def test_configuration_as_transformers_5_rewrites_it(size: str) -> None:
    from transformers import CONFIG_MAPPING

    architecture: Architecture = registry.sizes()[size]
    config = registry.to_config(architecture)
    rewritten = CONFIG_MAPPING[config["model_type"]].from_dict(config).to_dict()
    assert registry.from_config(rewritten) == architecture


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"head_dim": 17}, "even head_dim"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
    ],
)
def test_what_cannot_be_represented_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    config = registry.to_config(registry.sizes()["qwen3-tiny"])
    with pytest.raises(UserError, match=message):
        registry.from_config(config | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_window_layers": 1},
        {"max_window_layers": 3, "sliding_window": 32},
        {"max_window_layers": 28},
        {"sliding_window": None},
        {"use_sliding_window": False},
        {"layer_types": ["sliding_attention", "full_attention"] * 2},
    ],
)
@pytest.mark.parametrize("size", ["qwen2-tiny", "qwen3-tiny", "qwen2-moe-tiny"])
def test_windows_of_qwen_are_where_transformers_has_them(size: str, changes: dict[str, Any]) -> None:
    from transformers import CONFIG_MAPPING

    config = registry.to_config(registry.sizes()[size].with_values(num_layers=4))
    config |= {"use_sliding_window": True, **changes}
    if not config["use_sliding_window"]:
        config |= {"sliding_window": 32}
    theirs = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    kinds = [theirs.sliding_window if kind == "sliding_attention" else None for kind in theirs.layer_types]
    architecture = registry.from_config(config)
    assert list(windows_of(architecture)) == kinds


@pytest.mark.parametrize("size", ["deepseek-v3-tiny", "glm4-moe-tiny"])
def test_scores_that_are_not_normalised_are_described_and_not_trained(size: str) -> None:
    """The same tensors: such a model is converted both ways, and refused where it would be computed."""
    usual = registry.sizes()[size]
    architecture = registry.from_config(registry.to_config(usual) | {"norm_topk_prob": False})
    assert architecture == usual.with_values(moe={"normalized": False})
    assert registry.from_config(registry.to_config(architecture)) == architecture
    assert registry.table_of(architecture) == registry.table_of(usual)
    with pytest.raises(UserError, match="sigmoid scores that are not normalised"):
        check_supported(architecture)


def test_windows_of_all_layers_of_qwen3_moe() -> None:
    config = registry.to_config(registry.sizes()["qwen3-moe-tiny"]) | {"use_sliding_window": True, "sliding_window": 32}
    architecture = registry.from_config(config)
    assert windows_of(architecture) == (32, 32)
    assert registry.from_config(registry.to_config(architecture)) == architecture
    with pytest.raises(UserError, match="transformers applies the sliding window to all layers of this family"):
        registry.from_config(config | {"layer_types": ["full_attention", "sliding_attention"]})


@pytest.mark.parametrize(
    ("size", "changes", "message"),
    [
        ("phi3-tiny", {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None}, "longrope only"),
        (
            "phi3-tiny-longrope",
            {"original_max_position_embeddings": 64},
            "original_max_position_embeddings 64 contradicts",
        ),
        ("glm4-moe-tiny", {"num_mtp_layers": 3}, "num_nextn_predict_layers 1 contradicts num_mtp_layers 3"),
        ("cohere2-tiny", {"layer_switch": 3}, "layer_switch"),
        ("gemma3-tiny", {"rope_local_base_freq": 5.0}, "rope_local_base_freq 5.0 contradicts"),
        ("gemma3-tiny", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3-tiny", {"layer_types": ["full_attention"]}, "required for each of 2 layers"),
        (
            "olmo3-tiny",
            {"rope_parameters": None, "rope_scaling": None, "rope_theta": 1e4},
            "read rope_theta 10000.0 differently",
        ),
        (
            "olmo3-tiny",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "sliding_attention.rope_type = 'linear' is not supported",
        ),
    ],
)
def test_further_fields_that_are_not_computed_or_contradict(size: str, changes: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        registry.from_config(registry.to_config(registry.sizes()[size]) | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"text_config": {"model_type": "llama"}},
            "model_type = 'llama' is not supported: the language model must be gemma3",
        ),
        ({"text_config": {"final_logit_softcapping": 30.0}}, "transformers does not cap the logits of this class"),
        ({"text_config": {"num_experts": 4}}, "num_experts = 4 is not a field of family gemma3 .text_config"),
        (
            {"text_config": {"tie_word_embeddings": True}, "tie_word_embeddings": False},
            "tie_word_embeddings is false, but true in text_config",
        ),
        ({"vision_config": {"vision_use_head": True}}, "vision_use_head is true"),
        ({"vision_config": {"model_type": "clip_vision_model"}}, "the vision tower of this family must be SigLIP"),
        ({"vision_config": {"image_size": 8}}, "patches of 14 pixels in images of 8"),
        ({"audio_config": {"layers": 2}}, "audio_config = {'layers': 2} is not a field of family gemma3_images"),
    ],
)
def test_what_is_not_this_wrapper_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    config = registry.to_config(registry.sizes()["gemma3-images-tiny"])
    changed = {
        name: config[name] | value if name in config and isinstance(value, dict) else value
        for name, value in changes.items()
    }
    with pytest.raises(UserError, match=message):
        registry.from_config(config | changed)


def test_embeddings_are_tied_where_either_configuration_says_so() -> None:
    """transformers goes by the wrapper's field, vLLM by the language model's; the class ties where neither has one."""
    config = dict(registry.to_config(registry.sizes()["gemma3-images-tiny"]))
    text = {name: value for name, value in config["text_config"].items() if name != "tie_word_embeddings"}
    for outer, own, tied in ((None, None, True), (False, None, False), (True, None, True), (True, False, False)):
        inside = text if own is None else text | {"tie_word_embeddings": own}
        read = registry.from_config(config | {"tie_word_embeddings": outer, "text_config": inside})
        assert read.head.tied == tied


ODD = (0, -1, 3, "x", [], {}, None, True, math.inf, math.nan, [1], ["a", 5], {"a": 1}, 2.5)


@pytest.mark.parametrize("size", [name for name in registry.sizes() if "tiny" in name])
def test_any_field_of_any_kind_is_read_or_refused(size: str) -> None:
    config = registry.to_config(registry.sizes()[size])
    within = [(name, further) for name, value in config.items() if isinstance(value, dict) for further in value]
    for *outer, name in [(name,) for name in config] + within:
        for odd in ODD:
            changed = json.loads(json.dumps(config))
            (changed[outer[0]] if outer else changed)[name] = odd
            with contextlib.suppress(UserError):
                registry.from_config(changed)


def test_unknown_family_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"'qwen3_mo' is not a supported family; the nearest is qwen3_moe "):
        registry.family_of({"model_type": "qwen3_mo"})


def test_as_another_family_or_refused_by_name() -> None:
    """A model is said by another family exactly, or what that family lacks is named."""
    said = set()
    for size, architecture in registry.sizes().items():
        for name in (name for name in registry.names() if name != architecture.family):
            try:
                same = registry.as_family(architecture, name)
            except UserError as error:
                assert f"--family {name} cannot represent this {architecture.family} model" in str(error)  # noqa: PT017
                continue
            said.add((size, name))
            assert registry.from_config(registry.to_config(same)) == same
            assert same.parameter_count() == architecture.parameter_count()
            keys = [
                {entry.key: entry.global_shape for entry in registry.table_of(a).entries()}
                for a in (architecture, same)
            ]
            assert keys[0] == keys[1]
    as_llama = {"baichuan-7b", "baichuan2-7b", "internlm-7b", "internlm-20b", "internlm2-7b", "internlm2.5-7b", "yi-6b"}
    assert {(size, "llama") for size in as_llama} <= said
    assert ("qwen-7b", "qwen2") in said
    assert not {("qwen-7b", "llama"), ("baichuan-13b", "llama"), ("baichuan2-13b", "llama")} & said


def test_another_family_that_is_not_known() -> None:
    with pytest.raises(UserError, match="--family bert is unknown; known: llama, "):
        registry.as_family(registry.sizes()["tiny"], "bert")


@pytest.mark.parametrize(("name", "experts", "layers"), [("gpt-oss-20b", 32, 24), ("gpt-oss-120b", 128, 36)])
def test_every_tensor_of_a_model_published_in_mxfp4_is_accounted_for(name: str, experts: int, layers: int) -> None:
    """Its experts are stored as codes and scales, `[experts, out, groups of 32, bytes]`."""
    config = PUBLISHED[name]["config"]
    stored: dict[str, tuple[str, tuple[int, ...]]] = {
        tensor: ("BF16", found.shape)
        for tensor, found in transformers_tensors(config).items()
        if not tensor.endswith(("gate_up_proj", "down_proj"))
    }
    for layer in range(layers):
        for part, rows in (("gate_up_proj", 2 * 2880), ("down_proj", 2880)):
            path = f"model.layers.{layer}.mlp.experts.{part}"
            stored[f"{path}_blocks"] = ("U8", (experts, rows, 90, 16))
            stored[f"{path}_scales"] = ("U8", (experts, rows, 90))
    infos = {
        tensor: TensorInfo(name=tensor, dtype=dtype, shape=shape, file=Path("header"), start=0, size=0)
        for tensor, (dtype, shape) in stored.items()
    }
    architecture = registry.from_config(config)
    weights = assemble_weights(quantization_scheme(config), infos)
    account_sources(registry.table_of(architecture), weights, name)
    assert sum(math.prod(weight.shape) for weight in weights.values()) == architecture.parameter_count()


def test_every_tensor_of_a_model_published_in_int4_is_accounted_for() -> None:
    """Its experts are stored as codes, eight to an int32, scales of 32 numbers, and their shapes."""
    config = PUBLISHED["Kimi-K2-Thinking"]["config"]
    infos: dict[str, TensorInfo] = {}
    for entry in registry.table_of(architecture := registry.from_config(config)).entries():
        for source in entry.sources:
            path, (rows, *columns) = source.name.removesuffix(".weight"), source.stored_shape
            stored: dict[str, tuple[str, tuple[int, ...]]] = {source.name: ("BF16", source.stored_shape)}
            if ".experts." in path:
                stored = {
                    f"{path}.weight_packed": ("I32", (rows, columns[0] // 8)),
                    f"{path}.weight_scale": ("BF16", (rows, columns[0] // 32)),
                    f"{path}.weight_shape": ("I64", (2,)),
                }
            for name, (dtype, shape) in stored.items():
                infos[name] = TensorInfo(name=name, dtype=dtype, shape=shape, file=Path("header"), start=0, size=0)
    assert sum(name.endswith("_packed") for name in infos) == 60 * 384 * 3
    weights = assemble_weights(quantization_scheme(config), infos)
    account_sources(registry.table_of(architecture), weights, "Kimi-K2-Thinking")
    assert sum(math.prod(weight.shape) for weight in weights.values()) == architecture.parameter_count()
