"""Tensor table of a decoder: Hugging Face names of a family to Megatron keys."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from shared.architecture.architecture import MLP, Architecture, Attention, GatedDeltaNet, LatentAttention, MoE, Norm
from shared.errors import UserError
from shared.families.common.gated_delta_net import gated_delta_net_rules
from shared.families.common.mla import mla_norms, mla_projections
from shared.families.common.mtp import DEEPSEEK_MTP, MTPNames, mtp_layer_rules, mtp_rules, mtp_tied_tensors
from shared.mapping.layout import (
    CONCAT,
    COPY,
    Constant,
    Deinterleave,
    Interleave,
    InterleaveFused,
    InterleaveGatedQKV,
    PadRows,
    RowLayout,
    SwapHalves,
    Transposed,
)
from shared.mapping.rule import Axis, PassThroughTensor, Rule, Source, Table, TiedTensor


@dataclass(frozen=True, kw_only=True)
class Names:
    """Hugging Face module names (tensors: `.weight`, `.bias`); defaults: LLaMA's.

    Names inside a layer are appended to `layer`. A tuple of several names: linear layers that Megatron-Core fuses.
    """

    prefix: str = ""  # base model prefix, absent in files saved without the head
    embedding: str = "model.embed_tokens"
    embedding_norm: str = ""
    embedding_projection: str = ""
    output_projection: str = ""
    positions: str = ""
    block_positions: str = ""  # block position table of 2-D positions
    layer: str = "model.layers.{layer}."
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    post_attention_norm: str = ""
    post_mlp_norm: str = ""
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    # Row order of a fused QKV. blocks: `[q ; k ; v]`. groups: Megatron-Core's `[q1..qn k1 v1 | q.. k2 v2 | ...]`.
    fused: Literal["blocks", "groups"] = "blocks"
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    gated_delta_net: str = "linear_attn."
    proj: str = "self_attn.o_proj"
    fc1: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    gate_last: bool = False  # fused fc1 is [up ; gate], not [gate ; up]
    fc2: str = "mlp.down_proj"
    router: str = "mlp.gate"
    correction_bias: str = "mlp.gate.e_score_correction_bias"  # tensor name, no suffix
    # One tensor for all experts, `[experts, in, out]`, columns of fc1 `[gate1 up1 gate2 up2 ..]` (gpt-oss).
    stacked_experts: bool = False
    sinks: str = "self_attn.sinks"  # tensor name, no suffix
    expert_fc1: tuple[str, ...] = ("mlp.experts.{expert}.gate_proj", "mlp.experts.{expert}.up_proj")
    expert_fc2: str = "mlp.experts.{expert}.down_proj"
    # One tensor for all experts, `[experts, out, in]`, rows of fc1 `[gate ; up]`: in the state dict of transformers 5's classes.
    fused_expert_fc1: str = "mlp.experts.gate_up_proj"  # tensor name, no suffix
    fused_expert_fc2: str = "mlp.experts.down_proj"  # tensor name, no suffix
    # Other names in that state dict; empty: the same.
    class_router: str = ""
    class_head: str = ""
    shared_fc1: tuple[str, ...] = ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj")
    shared_fc2: str = "mlp.shared_expert.down_proj"
    shared_gate: str = "mlp.shared_expert_gate"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    mtp: MTPNames | None = None
    transposed: bool = False  # weights of linear layers are `[in, out]` (GPT-2)
    # Buffers stored by old transformers versions; every implementation recomputes them.
    pass_through: tuple[str, ...] = ("self_attn.rotary_emb.inv_freq",)


DEEPSEEK_NAMES = Names(
    shared_fc1=("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
    shared_fc2="mlp.shared_experts.down_proj",
    mtp=DEEPSEEK_MTP,
)


def decoder_table(a: Architecture, names: Names, further_pass_through: Iterable[PassThroughTensor] = ()) -> Table:
    """Tensor table of an architecture."""
    decoder = _Decoder(a, names)
    rules, alternatives = list(decoder.rules()), list(decoder.alternatives())
    tied = [TiedTensor(name=f"{names.head}.weight", tied_to=f"{names.embedding}.weight")] if a.head.tied else []
    if names.mtp and a.mtp:
        head = names.embedding if a.head.tied else names.head
        for index in range(a.mtp.depth):
            own = names.mtp.at(a, index)
            decoder = _Decoder(a.mtp_decoder, replace(names, layer=own.layer))
            rules += mtp_rules(a, index, own, decoder.rules())
            alternatives += mtp_layer_rules(index, decoder.alternatives())
            tied += mtp_tied_tensors(own, names.embedding, head)
    prefix_variants: dict[str, tuple[str, ...]] = {names.prefix: ("",)} if names.prefix else {}
    if names.class_head:
        prefix_variants[f"{names.head}."] = (f"{names.class_head}.",)
    return Table(
        rules=tuple(rules),
        alternatives=tuple(alternatives),
        tied_tensors=tuple(tied),
        pass_through=(
            *(PassThroughTensor(name=names.layer + name) for name in names.pass_through),
            *further_pass_through,
        ),
        prefix_variants=prefix_variants,
        sizes={
            "layer": a.num_layers,
            "expert": a.moe.experts if a.moe else 0,
            "query_head": a.attention.heads,
            "key_head": a.attention.groups,
        },
    )


Layers = tuple[int, ...] | None  # indices from 0; None: all


class _Decoder:
    """Rules of a decoder, in Megatron-Core's order."""

    def __init__(self, a: Architecture, names: Names) -> None:
        self.a, self.names, self.hidden = a, names, a.hidden_size
        self.layers = "decoder.layers" if a.homogeneous else "decoder.layers.{layer}"
        self.attention, self.mlp = f"{self.layers}.self_attention", f"{self.layers}.mlp"

    def rules(self) -> Iterator[Rule]:
        yield from self.embedding_rules()
        yield from self.mixer_rules()
        yield from self.mlp_rules()
        yield from self.head_rules()

    def alternatives(self) -> Iterator[Rule]:
        """Rules of tensors that transformers' class holds in another form than the files."""
        names, moe = self.names, self.a.moe
        if moe is None or names.stacked_experts:
            return
        layers, sparse = names.layer, self.a.layers_of(MoE)
        if names.class_router:
            assert not moe.router_bias
            router = Source(name=f"{layers}{names.class_router}.weight", shape=(moe.experts, self.hidden))
            yield Rule(megatron=f"{self.mlp}.router.weight", axes=("layer",), layers=sparse, sources=(router,))
        size = moe.expert.ffn_hidden_size
        for fc, name, shape in (
            ("linear_fc1", names.fused_expert_fc1, (2 * size, self.hidden)),
            ("linear_fc2", names.fused_expert_fc2, (self.hidden, size)),
        ):
            source = Source(name=layers + name, shape=shape, stacked_axes=("expert",))
            key = f"{self.mlp}.experts.experts.{fc}.weight"
            yield Rule(megatron=key, axes=("layer", "expert"), layers=sparse, sources=(source,))

    def named(self, key: str, *names: str) -> None:
        """UserError if the family has no name for a tensor of the architecture."""
        if not names or not all(names):
            raise UserError(f"{key}: family {self.a.family} has no tensor names for it")

    def tensor(self, key: str, name: str, *shape: int, kind: str = "weight", layout: RowLayout = CONCAT) -> Rule:
        """A tensor outside the layers."""
        self.named(key, name)
        return Rule(megatron=key, sources=(Source(name=f"{name}.{kind}", shape=shape),), layout=layout)

    def in_layers(self, key: str, *shape: int, name: str, layers: Layers, fp32: bool = False) -> Rule:
        """A tensor of each layer, by its name in the layer."""
        source = Source(name=self.names.layer + name, shape=shape, fp32=fp32)
        return Rule(megatron=key, axes=("layer",), layers=layers, sources=(source,))

    def linear(
        self,
        key: str,
        parts: tuple[str, ...],
        rows: tuple[int, ...],
        columns: int,
        bias: bool = False,
        *,
        layout: RowLayout = CONCAT,
        axes: tuple[Axis, ...] = ("layer",),
        layers: Layers = None,
    ) -> Iterator[Rule]:
        """A linear layer, fused from `parts` with `rows` each, in `layers`."""
        stored = (sum(rows),) if len(parts) == 1 else rows
        self.named(key, *parts if len(parts) == len(stored) else ())
        for kind in ("weight", "bias") if bias else ("weight",):
            shapes = [(part, columns) if kind == "weight" else (part,) for part in stored]
            transposed = kind == "weight" and self.names.transposed
            sources = tuple(
                Source(name=f"{self.names.layer}{name}.{kind}", shape=shape[::-1] if transposed else shape)
                for name, shape in zip(parts, shapes, strict=True)
            )
            of_rows = Transposed(layout=layout) if transposed else layout
            yield Rule(megatron=f"{key}.{kind}", axes=axes, layers=layers, sources=sources, layout=of_rows)

    def norm(
        self, key: str, name: str, size: int = 0, *, norm: Norm | None = None, layers: Layers = None
    ) -> Iterator[Rule]:
        """A norm of each layer. Non-affine norms become constants: Megatron-Core's norms always have weights."""
        norm, size = norm or self.a.layers[0].norm, size or self.hidden
        for kind in ("weight", "bias") if norm.bias else ("weight",):
            if norm.affine:
                self.named(key, name)
                source = Source(name=f"{self.names.layer}{name}.{kind}", shape=(size,))
                yield Rule(megatron=f"{key}{kind}", axes=("layer",), layers=layers, sources=(source,), layout=COPY)
            else:
                yield Rule(
                    megatron=f"{key}{kind}", axes=("layer",), layers=layers, sources=(), layout=_fixed(kind, size)
                )

    def outer_norm(self, key: str, name: str, norm: Norm) -> Iterator[Rule]:
        """A norm outside the layers."""
        for kind in ("weight", "bias") if norm.bias else ("weight",):
            rule = self.tensor(f"{key}.{kind}", name, self.hidden, kind=kind)
            yield rule if norm.affine else replace(rule, sources=(), layout=_fixed(kind, self.hidden))

    def embedding_rules(self) -> Iterator[Rule]:
        a, names, embedding = self.a, self.names, self.a.embedding
        vocabulary = PadRows(rows=a.padded_vocab_size())
        key = "embedding.word_embeddings"
        yield self.tensor(f"{key}.weight", names.embedding, a.vocab_size, a.table_size, layout=vocabulary)
        if size := embedding.factorised_size:
            yield self.tensor("embedding.projection.weight", names.embedding_projection, self.hidden, size)
            yield self.tensor("output_projection.weight", names.output_projection, size, self.hidden)
        if embedding.norm:
            yield from self.outer_norm(f"{key}_layernorm", names.embedding_norm, embedding.norm)
        if embedding.positions:
            two = a.prefix is not None and a.prefix.position_streams > 1
            tables = {"": names.positions} | ({"filling.": names.block_positions} if two else {})
            for part, name in tables.items():
                key = f"embedding.position_embeddings.{part}weight"
                yield self.tensor(key, name, a.position_rows, self.hidden)

    def mixer_rules(self) -> Iterator[Rule]:
        a, names, key, common = self.a, self.names, self.attention, self.a.layers[0]
        mixer, net, of_net = a.attention, a.delta_net, a.layers_of(GatedDeltaNet)
        layers = tuple(index for index in range(a.num_layers) if index not in of_net) if net else None
        if common.pre_norms:
            apart = f"{self.layers}.input_layernorm." if a.mla else f"{key}.linear_qkv.layer_norm_"
            yield from self.norm(apart, names.attention_norm, layers=layers)
        if isinstance(mixer, LatentAttention):
            for part, name, size in mla_norms(mixer):
                yield from self.norm(f"{key}.{part}", name, size, layers=layers)
            for part, name, (rows, columns) in mla_projections(self.hidden, mixer):
                yield from self.linear(f"{key}.{part}", (name,), (rows,), columns, layers=layers)
        else:
            yield from self.qkv_rules(mixer, layers)
        bias = isinstance(mixer, Attention) and mixer.output_bias
        output = (f"{key}.linear_proj", (names.proj,), (self.hidden,), mixer.output_size, bias)
        yield from self.linear(*output, layers=layers)
        if isinstance(mixer, Attention) and mixer.sinks:
            offset = f"{key}.core_attention.softmax_offset"
            yield self.in_layers(offset, mixer.heads, name=names.sinks, layers=layers)
        if net:
            yield from self.norm(f"{key}.in_proj.layer_norm_", names.attention_norm, layers=of_net)
            inner, zero_centered = names.layer + names.gated_delta_net, common.norm.zero_centered_gamma
            yield from gated_delta_net_rules(net, self.hidden, of_net, key, inner, zero_centered_gamma=zero_centered)
        if common.norm_placement != "pre":
            yield from self.norm(f"{self.layers}.post_self_attn_layernorm.", names.post_attention_norm)

    def qkv_rules(self, mixer: Attention, layers: Layers) -> Iterator[Rule]:
        names, key, q, kv = self.names, self.attention, mixer.q_size, mixer.kv_size
        layout: RowLayout = Interleave(groups=mixer.groups)  # [q1..qn k1 v1 | q.. k2 v2 | ...]
        if mixer.gate:
            layout = InterleaveGatedQKV(groups=mixer.groups, head_dim=mixer.head_dim)
        elif len(names.qkv) == 1:
            blocks = InterleaveFused(parts=(q, kv, kv), groups=mixer.groups)
            layout = CONCAT if names.fused == "groups" else blocks
        rows = (q * (1 + mixer.gate), kv, kv)
        yield from self.linear(
            f"{key}.linear_qkv", names.qkv, rows, self.hidden, mixer.bias, layout=layout, layers=layers
        )
        if mixer.qk_norm:
            yield from self.qk_norm(f"{key}.q_layernorm.", names.q_norm, "query_head", mixer.heads, mixer, layers)
            yield from self.qk_norm(f"{key}.k_layernorm.", names.k_norm, "key_head", mixer.groups, mixer, layers)

    def qk_norm(self, key: str, name: str, axis: Axis, heads: int, mixer: Attention, layers: Layers) -> Iterator[Rule]:
        """QK norm: weight `[head_dim]`, `[heads * head_dim]`, or `[heads, head_dim]`."""
        if mixer.qk_norm != "each_head":
            size = mixer.head_dim if mixer.qk_norm == "head" else heads * mixer.head_dim
            yield from self.norm(key, name, size, layers=layers)
            return
        apart = f"{{{axis}}}" in name  # one source tensor per head
        shape = (mixer.head_dim,) if apart else (heads, mixer.head_dim)
        rule = self.in_layers(f"{key}weight", *shape, name=f"{name}.weight", layers=layers)
        yield replace(rule, axes=("layer", axis)) if apart else rule

    def mlp_rules(self) -> Iterator[Rule]:
        a, names, common = self.a, self.names, self.a.layers[0]
        own_norm = common.pre_norms and common.residual.kind != "parallel_shared"
        sparse = a.layers_of(MoE)
        if mlp := a.mlp:
            dense = a.layers_of(MLP) if sparse else None
            if own_norm:
                yield from self.norm(f"{self.mlp}.linear_fc1.layer_norm_", names.mlp_norm, layers=dense)
            swapped: RowLayout = SwapHalves() if names.gate_last else CONCAT
            yield from self.gated_mlp(self.mlp, mlp, names.fc1, names.fc2, dense, layout=swapped)
        if moe := a.moe:
            if own_norm:
                yield from self.norm(f"{self.layers}.pre_mlp_layernorm.", names.mlp_norm, layers=sparse)
            yield from self.moe_rules(moe, sparse)
        if common.norm_placement != "pre":
            yield from self.norm(f"{self.layers}.post_mlp_layernorm.", names.post_mlp_norm)

    def gated_mlp(
        self,
        key: str,
        mlp: MLP,
        fc1: tuple[str, ...],
        fc2: str,
        layers: Layers,
        *,
        layout: RowLayout = CONCAT,
        axes: tuple[Axis, ...] = ("layer",),
    ) -> Iterator[Rule]:
        """fc1 (`[gate ; up]`, or up without a gate) and fc2."""
        size = mlp.ffn_hidden_size
        rows = (size, size) if mlp.gated else (size,)
        yield from self.linear(
            f"{key}.linear_fc1", fc1, rows, self.hidden, mlp.bias, layout=layout, axes=axes, layers=layers
        )
        yield from self.linear(f"{key}.linear_fc2", (fc2,), (self.hidden,), size, mlp.bias, axes=axes, layers=layers)

    def moe_rules(self, moe: MoE, layers: tuple[int, ...]) -> Iterator[Rule]:
        names, key = self.names, self.mlp
        router = self.linear(
            f"{key}.router", (names.router,), (moe.experts,), self.hidden, moe.router_bias, layers=layers
        )
        for rule in router:
            yield replace(rule, sources=tuple(replace(source, init="normal") for source in rule.sources))
        if moe.correction_bias:
            bias = f"{key}.router.expert_bias"
            yield self.in_layers(bias, moe.experts, name=names.correction_bias, layers=layers, fp32=True)
        experts = f"{key}.experts.experts"
        if names.stacked_experts:
            yield from self.stacked_experts(experts, moe.expert, layers)
        else:
            axes: tuple[Axis, ...] = ("layer", "expert")
            yield from self.gated_mlp(experts, moe.expert, names.expert_fc1, names.expert_fc2, layers, axes=axes)
        if moe.shared:
            yield from self.gated_mlp(f"{key}.shared_experts", moe.shared, names.shared_fc1, names.shared_fc2, layers)
        if moe.shared_gate:
            gate = f"{key}.shared_experts.gate_weight"
            yield self.in_layers(gate, 1, self.hidden, name=f"{names.shared_gate}.weight", layers=layers)

    def stacked_experts(self, key: str, expert: MLP, layers: tuple[int, ...]) -> Iterator[Rule]:
        """Experts stacked in one tensor: weight `<name>`, bias `<name>_bias`."""
        names, size, hidden = self.names, expert.ffn_hidden_size, self.hidden
        self.named(key, *names.expert_fc1 if expert.gated and len(names.expert_fc1) == 1 else ())
        in_turn: RowLayout = Deinterleave(parts=2)
        for fc, name, rows, columns, layout in (
            ("linear_fc1", names.expert_fc1[0], 2 * size, hidden, in_turn),
            ("linear_fc2", names.expert_fc2, hidden, size, CONCAT),
        ):
            sources = {"weight": Source(name=names.layer + name, shape=(columns, rows), stacked_axes=("expert",))}
            if expert.bias:
                sources["bias"] = Source(name=f"{names.layer}{name}_bias", shape=(rows,), stacked_axes=("expert",))
            for kind, source in sources.items():
                yield Rule(
                    megatron=f"{key}.{fc}.{kind}",
                    axes=("layer", "expert"),
                    layers=layers,
                    sources=(source,),
                    layout=Transposed(layout=layout) if kind == "weight" else layout,
                )

    def head_rules(self) -> Iterator[Rule]:
        a, names, head = self.a, self.names, self.a.head
        vocabulary = PadRows(rows=a.padded_vocab_size())
        if head.norm:
            yield from self.outer_norm("decoder.final_layernorm", names.final_norm, head.norm)
        if not head.tied:
            yield self.tensor("output_layer.weight", names.head, a.vocab_size, a.table_size, layout=vocabulary)
        if head.bias:
            yield self.tensor("output_layer.bias", names.head, a.vocab_size, kind="bias", layout=vocabulary)


def _fixed(kind: str, size: int) -> Constant:
    """Weight 1 or bias 0 of a non-affine norm."""
    return Constant(shape=(size,), value=1 if kind == "weight" else 0)
