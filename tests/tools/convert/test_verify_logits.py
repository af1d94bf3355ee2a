"""Logits detect what a round trip cannot: a table with the same error in both directions."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shared.architecture.architecture import Alibi
from shared.families import llama, registry
from shared.mapping.layout import CONCAT
from shared.mapping.rule import Rule, Table

Make = Callable[..., Path]


def mistaken(change: Callable[[Rule], Rule]) -> Any:
    def table(architecture: Any) -> Table:
        right = llama.FAMILY.table(architecture)
        return replace(right, rules=tuple(change(rule) for rule in right.rules))

    return replace(llama.FAMILY, own_table=table)


def gate_after_up(rule: Rule) -> Rule:
    return replace(rule, sources=rule.sources[::-1]) if rule.megatron.endswith("linear_fc1.weight") else rule


def ungrouped_qkv(rule: Rule) -> Rule:
    return replace(rule, layout=CONCAT) if rule.megatron.endswith("linear_qkv.weight") else rule


def value_before_key(rule: Rule) -> Rule:
    q_k_v = rule.megatron.endswith("linear_qkv.weight")
    return replace(rule, sources=(rule.sources[0], *rule.sources[:0:-1])) if q_k_v else rule


def swapped_norms(rule: Rule) -> Rule:
    other = {"input_layernorm": "post_attention_layernorm", "post_attention_layernorm": "input_layernorm"}
    if not rule.megatron.endswith("layer_norm_weight"):
        return rule
    (source,) = rule.sources
    part = source.name.split(".")[-2]
    return replace(rule, sources=(replace(source, name=source.name.replace(part, other[part])),))


@pytest.mark.parametrize("variant", ["llama-rope-llama3-sharded", "llama-rope-linear", "llama-biases", "qwen3"])
def test_logits_of_both_implementations_agree(make_hf: Make, convert: Any, tmp_path: Path, variant: str) -> None:
    source, target = make_hf(variant), tmp_path / "megatron"
    convert("to-megatron", "--source", source, "--target", target)
    answer = convert("verify", "--source", source, "--target", target, "--positions", "256")
    assert answer.code == 0, answer.err
    assert "logits over 256 positions" in answer.out


def test_published_under_another_model_type(write_architecture: Any, convert: Any, tmp_path: Path) -> None:
    """Kimi K2 is DeepSeek V3 by another name, which transformers does not know, and which must come back."""
    source, target, back = (tmp_path / name for name in ("hf", "megatron", "back"))
    write_architecture(source, registry.sizes()["deepseek-v3-tiny"])
    config = json.loads((source / "config.json").read_text()) | {"model_type": "kimi_k2"}
    (source / "config.json").write_text(json.dumps(config))
    assert convert("to-megatron", "--source", source, "--target", target).code == 0
    answer = convert("verify", "--source", source, "--target", target, "--positions", "256")
    assert answer.code == 0, answer.err
    assert "logits over 256 positions" in answer.out
    assert convert("to-hf", "--source", target, "--target", back).code == 0
    assert (back / "config.json").read_bytes() == (source / "config.json").read_bytes()


@pytest.mark.parametrize("change", [gate_after_up, ungrouped_qkv, value_before_key, swapped_norms])
def test_mistaken_table_is_caught(
    make_hf: Make, convert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any
) -> None:
    monkeypatch.setitem(registry.FAMILIES, "llama", mistaken(change))
    source, target = make_hf(), tmp_path / "megatron"
    convert("to-megatron", "--source", source, "--target", target)
    words = ("verify", "--source", source, "--target", target, "--positions", "256")
    assert convert(*words, "--no-logits").code == 0  # the mistake undoes itself on the way back
    answer = convert(*words)
    assert answer.code == 1
    assert "logits differ by" in answer.err


def test_a_model_whose_logits_are_not_supported_is_verified_without(
    make_hf: Make, convert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = llama.FAMILY.read
    with_alibi = replace(llama.FAMILY, read=lambda fields: read(fields).with_values(attention={"alibi": Alibi()}))
    monkeypatch.setitem(registry.FAMILIES, "llama", with_alibi)
    source, target = make_hf(), tmp_path / "megatron"
    assert convert("to-megatron", "--source", source, "--target", target).code == 0
    words = ("verify", "--source", source, "--target", target, "--positions", "256")
    answer = convert(*words)
    assert answer.code == 2
    assert "ALiBi with rotary embedding: supported in conversion, not in training and logits" in answer.err
    assert "give --no-logits" in answer.err
    assert convert(*words, "--no-logits").code == 0


def test_fewer_positions_than_show_a_wrong_rotation_are_refused(make_hf: Make, convert: Any, tmp_path: Path) -> None:
    source = make_hf()
    answer = convert("verify", "--source", source, "--target", source, "--positions", "16")
    assert answer.code == 2
    assert "--positions" in answer.err


def test_modelling_code_runs_only_where_the_user_says_so(
    write_architecture: Any, convert: Any, make_hf: Make, tmp_path: Path
) -> None:
    source, target, ran = tmp_path / "hf", tmp_path / "megatron", tmp_path / "ran"
    write_architecture(source, registry.sizes()["internlm2-tiny"])
    code = source / "modeling.py"
    code.write_text(f"open({str(ran)!r}, 'w').close()\n" + code.read_text())
    assert convert("to-megatron", "--source", source, "--target", target).code == 0
    words = ("verify", "--source", source, "--target", target)
    refused = convert(*words)
    assert refused.code == 2
    assert "transformers has no InternLM2ForCausalLM to compare logits with: give --no-logits" in refused.err
    assert convert(*words, "--no-logits").code == 0
    assert not ran.exists()
    assert convert(*words, "--trust-remote-code").code == 0
    assert ran.exists()
    code.write_text(code.read_text() + "\n\nraise AttributeError('all_tied_weights_keys\\nand more')\n")
    (target / "hf" / "modeling.py").write_text(code.read_text())
    (target / "manifest.json").unlink()
    failed = convert(*words, "--trust-remote-code")
    assert failed.code == 1
    assert f"the modelling code in {source} failed with transformers" in failed.err
    assert "AttributeError: all_tied_weights_keys; give --no-logits" in failed.err
    plain, plain_target = make_hf(name="plain"), tmp_path / "plain-megatron"
    convert("to-megatron", "--source", plain, "--target", plain_target)
    answer = convert("verify", "--source", plain, "--target", plain_target, "--trust-remote-code")
    assert answer.code == 2
    assert "has no auto_map, so no modelling code" in answer.err


def test_classes_whose_tokenizer_places_tokens_are_handed_the_places(
    write_architecture: Any, convert: Any, tmp_path: Path
) -> None:
    """GLM-10B's: without them it takes a row for plain text. Our reference finds them itself, and compares."""
    source, target = write_architecture(tmp_path / "hf", registry.sizes()["glm-10b-tiny"]), tmp_path / "megatron"
    with (source / "modeling.py").open("a") as code:
        code.write(
            "\n\nclass Handed(LanguageModel):\n"
            "    def forward(self, input_ids, position_ids, attention_mask):\n"
            "        assert position_ids.shape == (1, 2, input_ids.shape[1])\n"
            "        return super().forward(input_ids, position_ids, attention_mask)\n"
        )
    config = json.loads((source / "config.json").read_text())
    config["auto_map"]["AutoModelForCausalLM"] = "modeling.Handed"
    (source / "config.json").write_text(json.dumps(config))
    assert convert("to-megatron", "--source", source, "--target", target).code == 0
    answer = convert("verify", "--source", source, "--target", target, "--trust-remote-code")
    assert answer.code == 0, answer.err
