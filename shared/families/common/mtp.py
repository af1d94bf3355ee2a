"""MTP (multi-token prediction) tensors of DeepSeek V3, GLM-4.5, Qwen3-Next.

MTP layer: `head(norm(decoder_layer(eh_proj [enorm(embedding) ; hnorm(hidden)])))` with the model's head (DeepSeek V3,
section 2.2). Columns of eh_proj are `[embedding | hidden]` in Megatron-Core's `MultiTokenPredictionLayer` and in vLLM's
`deepseek_mtp`, `glm4_moe_mtp`, `qwen3_next_mtp`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from shared.architecture.architecture import Architecture
from shared.mapping.rule import Rule, Source, Table, TiedTensor

_KEY = "mtp."  # prefix of Megatron keys
_LAYERS = "decoder.layers."


@dataclass(frozen=True, kw_only=True)
class MTPNames:
    """Hugging Face names; `{index}`: MTP layer from 0; `{layer}`: num_layers + index."""

    layer: str
    embedding_norm: str
    hidden_norm: str
    projection: str
    final_norm: str
    # Tied copies of the model's embedding and head, in some files.
    embedding: str = ""
    head: str = ""

    def at(self, a: Architecture, index: int) -> MTPNames:
        """Names of MTP layer `index`."""
        given = {name: value.format(layer=a.num_layers + index, index=index) for name, value in vars(self).items()}
        return MTPNames(**given)


DEEPSEEK_MTP = MTPNames(
    layer="model.layers.{layer}.",
    embedding_norm="model.layers.{layer}.enorm",
    hidden_norm="model.layers.{layer}.hnorm",
    projection="model.layers.{layer}.eh_proj",
    final_norm="model.layers.{layer}.shared_head.norm",
    embedding="model.layers.{layer}.embed_tokens",
    head="model.layers.{layer}.shared_head.head",
)
QWEN3_NEXT_MTP = MTPNames(
    layer="mtp.layers.{index}.",
    embedding_norm="mtp.pre_fc_norm_embedding",
    hidden_norm="mtp.pre_fc_norm_hidden",
    projection="mtp.fc",
    final_norm="mtp.norm",
)


def mtp_rules(a: Architecture, index: int, names: MTPNames, layer: Iterable[Rule]) -> Iterator[Rule]:
    """Rules of MTP layer `index`, from 0.

    Args:
        a: the model.
        index: the MTP layer.
        names: its names.
        layer: rules of `a.mtp_decoder` under the names of this MTP layer.
    """
    key, hidden = f"{_KEY}layers.{index}", a.hidden_size
    for part, name, shape in (
        ("enorm", names.embedding_norm, (hidden,)),
        ("hnorm", names.hidden_norm, (hidden,)),
        ("eh_proj", names.projection, (hidden, 2 * hidden)),  # [embedding | hidden]
    ):
        yield Rule(megatron=f"{key}.{part}.weight", sources=(Source(name=f"{name}.weight", shape=shape),))
    yield from mtp_layer_rules(index, layer)
    norm = Source(name=f"{names.final_norm}.weight", shape=(hidden,))
    yield Rule(megatron=f"{key}.final_layernorm.weight", sources=(norm,))


def mtp_layer_rules(index: int, layer: Iterable[Rule]) -> Iterator[Rule]:
    """Rules of the decoder layer of MTP layer `index`, from those of `a.mtp_decoder`."""
    for rule in layer:
        if rule.megatron.startswith(_LAYERS):
            own = f"{_KEY}layers.{index}.transformer_layer.{rule.megatron.removeprefix(_LAYERS)}"
            axes = tuple(axis for axis in rule.axes if axis != "layer")
            yield replace(rule, megatron=own, axes=axes, layers=None)


def mtp_tied_tensors(names: MTPNames, embedding: str, head: str) -> Iterator[TiedTensor]:
    """Copies of the model's `embedding` and `head` that an MTP layer may store."""
    for name, of in ((names.embedding, embedding), (names.head, head)):
        if name:
            yield TiedTensor(name=f"{name}.weight", tied_to=f"{of}.weight", always=True)


def mtp_part(table: Table) -> Table:
    """The MTP rules of a table."""
    return replace(table, rules=tuple(rule for rule in table.rules if rule.megatron.startswith(_KEY)), pass_through=())
