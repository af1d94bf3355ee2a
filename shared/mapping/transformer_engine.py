"""A family's table under TransformerEngine's names: Megatron-Core's keys renamed, layers not stacked.

    embedding.weight                                     final_norm.{weight,bias}
    position_embedding.weight  embedding_norm.*          output_layer.{weight,bias}  {input,output}_projection.weight
    layers.{i}.self_attention.layernorm_qkv.{layer_norm_weight,layer_norm_bias,weight,bias}   (qkv.* without a norm)
    layers.{i}.self_attention.{proj,q_norm,k_norm}.{weight,bias}
    layers.{i}.layernorm_mlp.{layer_norm_weight,layer_norm_bias,fc1_weight,fc1_bias,fc2_weight,fc2_bias}
    layers.{i}.mlp.experts.linear_fc{1,2}.weight{expert}

Modules that TransformerEngine lacks keep Megatron-Core's names. MTP layers are pass-through tensors under Hugging Face's
names. Row order is Megatron-Core's, which TransformerEngine reads: fused `[q1..qn k1 v1 | q.. k2 v2 | ...]` and
`[gate ; up]`. The vocabulary is not padded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from shared.architecture.architecture import Architecture
from shared.mapping.layout import COPY, Constant, PadRows, Shape
from shared.mapping.rule import PassThroughTensor, Rule, Table
from shared.mapping.transformer_engine_modules import describe, extra_states, limits, parameters

_ENDS = {
    "embedding.word_embeddings.": "embedding.",
    "embedding.word_embeddings_layernorm.": "embedding_norm.",
    "embedding.position_embeddings.": "position_embedding.",
    "embedding.projection.": "input_projection.",
    "decoder.final_layernorm.": "final_norm.",
}
_ATTENTION = {
    "self_attention.linear_proj.": "self_attention.proj.",
    "self_attention.q_layernorm.": "self_attention.q_norm.",
    "self_attention.k_layernorm.": "self_attention.k_norm.",
    "mlp.experts.experts.": "mlp.experts.",
}
_MLP = {
    "mlp.linear_fc1.layer_norm_": "layernorm_mlp.layer_norm_",
    "mlp.linear_fc1.": "layernorm_mlp.fc1_",
    "mlp.linear_fc2.": "layernorm_mlp.fc2_",
}
_FURTHER = "mtp."
_LAYERS = ("decoder.layers.{layer}.", "decoder.layers.")


@dataclass(frozen=True, kw_only=True)
class Form:
    """Tensors and modules of a model in TransformerEngine form."""

    table: Table
    modules: Mapping[str, Any]  # the content of layers.json
    extra_states: tuple[str, ...]  # names of `_extra_state` that strict loading requires


def te_form(table: Table, a: Architecture) -> Form:
    """A family's table in TransformerEngine form.

    One `bias` argument covers several linear layers. A bias that the module has and the model lacks is stored as zeros: a
    rule without sources.
    """
    own = _own_names(a)
    further = [rule for rule in table.rules if rule.megatron.startswith(_FURTHER)]
    pass_through = [
        PassThroughTensor(name=s.name, axes=rule.axes, all_or_none=True) for rule in further for s in rule.sources
    ]
    renamed = [_renamed(rule, own) for rule in table.rules if rule not in further]
    entries = list(replace(table, rules=tuple(renamed)).entries())
    shapes = {entry.key: entry.global_shape for entry in entries}
    # zero_centered_gamma is global in Megatron-Core; here each norm's weight is stored as in Hugging Face.
    plain = frozenset(entry.key.rpartition(".")[0] for entry in entries if entry.zero_centered_gamma)
    modules = describe(a, shapes, plain)
    wanted: dict[str, Shape] = {}
    states: list[str] = []
    for path, module in _modules(modules):
        wanted |= {f"{path}.{name}": shape for name, shape in parameters(module).items()}
        states += [f"{path}.{name}" for name in extra_states(module)]
    for name in wanted.keys() & shapes.keys():
        assert wanted[name] == shapes[name], f"{name}: {shapes[name]} of the table, {wanted[name]} of the module"
    assert shapes.keys() <= wanted.keys(), f"no module has {sorted(shapes.keys() - wanted.keys())[:3]}"
    absent = [name for name in wanted if name not in shapes]
    assert all(name.endswith("bias") for name in absent), f"weights that the model lacks: {absent[:3]}"
    rules = [replace(rule, zero_centered_gamma=False) for rule in renamed]
    rules += [Rule(megatron=name, sources=(), layout=Constant(shape=wanted[name])) for name in absent]
    alternatives = [rule for rule in table.alternatives if not rule.megatron.startswith(_FURTHER)]
    table = replace(
        table,
        rules=tuple(rules),
        alternatives=tuple(_renamed(rule, own) for rule in alternatives),
        pass_through=(*table.pass_through, *pass_through),
    )
    return Form(table=table, modules=modules, extra_states=tuple(states))


def _modules(described: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Every module with its path."""
    found = [(path, module) for path, module in described["ends"].items() if "tied_to" not in module]
    for index, layer in enumerate(described["layers"]):
        if "class" in layer:
            found.append((f"layers.{index}", layer))
        else:
            found += [(f"layers.{index}.{path}", module) for path, module in layer["modules"].items()]
    return found


def _own_names(a: Architecture) -> dict[str, str]:
    qkv = "self_attention.layernorm_qkv." if a.layers[0].pre_norms else "self_attention.qkv."
    return {**_ATTENTION, "self_attention.linear_qkv.": qkv, **({} if limits(a).mlp else _MLP)}


def _renamed(rule: Rule, names: Mapping[str, str]) -> Rule:
    key = rule.megatron
    layers = next((prefix for prefix in _LAYERS if key.startswith(prefix)), None)
    if layers is None:
        old = next((old for old in _ENDS if key.startswith(old)), "")
        key = _ENDS.get(old, "") + key.removeprefix(old)
    else:
        rest = key.removeprefix(layers)
        old = next((old for old in names if rest.startswith(old)), "")
        key = "layers.{layer}." + names.get(old, "") + rest.removeprefix(old)
    if "expert" in rule.axes and "{expert}" not in key:
        key += "{expert}"
    layout = COPY if isinstance(rule.layout, PadRows) else rule.layout
    return replace(rule, megatron=key, layout=layout)
