"""The table of a decoder: which tensors an architecture has, under the names that a family gives them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from shared.architecture.architecture import Architecture
from shared.architecture.flat_view import changed as replace
from shared.architecture.version_1 import Experts
from shared.families.common.gated_delta_net import delta_rules
from shared.families.common.mla import latent_norms, latent_projections
from shared.families.common.mtp import OF_DEEPSEEK, PredictionNames, mtp_tied_tensors, prediction_rules
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
    """Hugging Face's names of modules, whose tensors are `.weight` and `.bias`; the defaults are LLaMA's.

    Names of parts of a layer follow `layer`. Several names are projections that Megatron-Core holds as one.
    """

    prefix: str = ""  # which files that were saved without the head lack
    embedding: str = "model.embed_tokens"
    embedding_norm: str = ""
    embedding_projection: str = ""
    output_projection: str = ""
    positions: str = ""
    filling_positions: str = ""  # of places in what fills a blank
    layer: str = "model.layers.{layer}."
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    post_attention_norm: str = ""
    post_mlp_norm: str = ""
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    # How one fused projection is ordered: `[q ; k ; v]`, or as Megatron-Core's, group by group.
    fused: Literal["blocks", "groups"] = "blocks"
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    delta: str = "linear_attn."
    proj: str = "self_attn.o_proj"
    fc1: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    gate_last: bool = False  # one fused projection is [up ; gate], not [gate ; up]
    fc2: str = "mlp.down_proj"
    router: str = "mlp.gate"
    correction_bias: str = "mlp.gate.e_score_correction_bias"  # the tensor itself
    # Whether one tensor holds all experts', each as `[in, out]`, columns of gate and up in turn, as gpt-oss's.
    experts_together: bool = False
    sinks: str = "self_attn.sinks"  # the tensor itself
    expert_fc1: tuple[str, ...] = ("mlp.experts.{expert}.gate_proj", "mlp.experts.{expert}.up_proj")
    expert_fc2: str = "mlp.experts.{expert}.down_proj"
    shared_fc1: tuple[str, ...] = ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj")
    shared_fc2: str = "mlp.shared_expert.down_proj"
    shared_gate: str = "mlp.shared_expert_gate"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    prediction: PredictionNames | None = None  # of layers for tokens further ahead
    inputs_first: bool = False  # weights of linear layers are `[in, out]`, as GPT-2's
    # Constants that files of old transformers versions hold; every implementation recomputes them.
    pass_through: tuple[str, ...] = ("self_attn.rotary_emb.inv_freq",)


DEEPSEEK = Names(
    shared_fc1=("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
    shared_fc2="mlp.shared_experts.down_proj",
    prediction=OF_DEEPSEEK,
)


def decoder_table(a: Architecture, names: Names, further_pass_through: Iterable[PassThroughTensor] = ()) -> Table:
    """Tensors of the decoder, as the architecture has them."""
    rules = list(_rules(a, names))
    tied_tensors = (
        [TiedTensor(name=f"{names.head}.weight", tied_to=f"{names.embedding}.weight")] if a.tied_embeddings else []
    )
    if names.prediction:
        head = names.embedding if a.tied_embeddings else names.head
        for index in range(a.prediction_layers):
            own = names.prediction.at(a, index)
            layer = _rules(a.prediction_layer, replace(names, layer=own.layer))
            rules += prediction_rules(a, index, own, layer)
            tied_tensors += mtp_tied_tensors(own, names.embedding, head)
    return Table(
        rules=tuple(rules),
        tied_tensors=tuple(tied_tensors),
        pass_through=(
            *(PassThroughTensor(name=names.layer + name) for name in names.pass_through),
            *further_pass_through,
        ),
        prefix_variants={names.prefix: ("",)} if names.prefix else {},
        sizes={
            "layer": a.num_layers,
            "expert": a.experts.count if a.experts else 0,
            "query_head": a.num_attention_heads,
            "key_head": a.num_query_groups,
        },
    )


def _rules(a: Architecture, names: Names) -> Iterator[Rule]:
    hidden, ffn, q, kv = a.hidden_size, a.ffn_hidden_size, a.q_size, a.kv_size
    vocabulary, table = PadRows(rows=a.padded_vocab_size()), a.table_size
    layers = "decoder.layers" if a.homogeneous else "decoder.layers.{layer}"
    attention, mlp = f"{layers}.self_attention", f"{layers}.mlp"
    attending = a.attention_layers if a.delta else None

    def whole(
        key: str, name: str, *rows: int, columns: int = 0, kind: str = "weight", layout: RowLayout = CONCAT
    ) -> Rule:
        shape = (*rows, columns) if columns else rows
        return Rule(megatron=key, sources=(Source(name=f"{name}.{kind}", shape=shape),), layout=layout)

    def layer(
        key: str,
        parts: tuple[str, ...],
        rows: tuple[int, ...],
        columns: int,
        bias: bool,
        layout: RowLayout = CONCAT,
        axes: tuple[Axis, ...] = ("layer",),
        of: tuple[int, ...] | None = None,
    ) -> Iterator[Rule]:
        """A linear layer: rows of each part, columns, whether it has a bias, and which layers have it."""
        fused = (sum(rows),) if len(parts) == 1 else rows
        for kind in ("weight", "bias") if bias else ("weight",):
            shapes = [(part, columns) if kind == "weight" else (part,) for part in fused]
            across = kind == "weight" and names.inputs_first
            sources = [
                Source(name=f"{names.layer}{name}.{kind}", shape=shape[::-1] if across else shape)
                for name, shape in zip(parts, shapes, strict=True)
            ]
            rows_of = Transposed(layout=layout) if across else layout
            yield Rule(megatron=f"{key}.{kind}", axes=axes, layers=of, sources=tuple(sources), layout=rows_of)

    def fixed(kind: str, size: int) -> Constant:
        """What a norm has that has no weights: Megatron-Core's have them in any case."""
        return Constant(shape=(size,), value=1 if kind == "weight" else 0)

    def norm(key: str, name: str, size: int = hidden, of: tuple[int, ...] | None = None) -> Iterator[Rule]:
        for kind in ("weight", "bias") if a.norm_bias else ("weight",):
            rule = Rule(megatron=f"{key}{kind}", axes=("layer",), layers=of, sources=(), layout=fixed(kind, size))
            source = Source(name=f"{names.layer}{name}.{kind}", shape=(size,))
            yield replace(rule, sources=(source,), layout=COPY) if a.norm_affine else rule

    def whole_norm(key: str, name: str) -> Iterator[Rule]:
        for kind in ("weight", "bias") if a.norm_bias else ("weight",):
            rule = whole(f"{key}.{kind}", name, hidden, kind=kind)
            yield rule if a.norm_affine else replace(rule, sources=(), layout=fixed(kind, hidden))

    def head_norm(key: str, name: str, axis: Axis, heads: int) -> Iterator[Rule]:
        """The norm of queries or of keys, whose weights are one for all heads, or `[heads, head_dim]` for each head."""
        if a.qk_norm_scope != "each_head":
            size = a.head_dim if a.qk_norm_scope == "head" else heads * a.head_dim
            yield from norm(f"{attention}.{key}.", name, size, of=attending)
            return
        apart = f"{{{axis}}}" in name  # a tensor for every head, or one for all of them
        source = Source(name=f"{names.layer}{name}.weight", shape=(a.head_dim,) if apart else (heads, a.head_dim))
        axes: tuple[Axis, ...] = ("layer", axis) if apart else ("layer",)
        yield Rule(megatron=f"{attention}.{key}.weight", axes=axes, layers=attending, sources=(source,))

    def attention_rules() -> Iterator[Rule]:
        groups: RowLayout = Interleave(groups=a.num_query_groups)  # [q1..qn k1 v1 | q.. k2 v2 | ...]
        queries = 2 * q if a.attention_gate else q
        if a.attention_gate:
            groups = InterleaveGatedQKV(groups=a.num_query_groups, head_dim=a.head_dim)
        elif len(names.qkv) == 1:
            groups = (
                CONCAT if names.fused == "groups" else InterleaveFused(parts=(q, kv, kv), groups=a.num_query_groups)
            )
        rows = (queries, kv, kv)
        yield from layer(f"{attention}.linear_qkv", names.qkv, rows, hidden, a.qkv_bias, groups, of=attending)
        if a.qk_norm:
            yield from head_norm("q_layernorm", names.q_norm, "query_head", a.num_attention_heads)
            yield from head_norm("k_layernorm", names.k_norm, "key_head", a.num_query_groups)

    yield whole("embedding.word_embeddings.weight", names.embedding, a.vocab_size, columns=table, layout=vocabulary)
    if a.embedding_size is not None:
        yield whole("embedding.projection.weight", names.embedding_projection, hidden, columns=table)
        yield whole("output_projection.weight", names.output_projection, table, columns=hidden)
    if a.embedding_norm:
        yield from whole_norm("embedding.word_embeddings_layernorm", names.embedding_norm)
    if a.positions == "learned":
        tables = {"": names.positions} | ({"filling.": names.filling_positions} if a.position_streams > 1 else {})
        for part, name in tables.items():
            key = f"embedding.position_embeddings.{part}weight"
            yield whole(key, name, a.learned_positions, columns=hidden)

    if a.norms_in_front:
        of_attention = f"{layers}.input_layernorm." if a.latent else f"{attention}.linear_qkv.layer_norm_"
        yield from norm(of_attention, names.attention_norm, of=attending)
    if latent := a.latent:
        for key, name, size in latent_norms(latent):
            yield from norm(f"{attention}.{key}", name, size)
        for key, name, shape in latent_projections(a, latent):
            yield from layer(f"{attention}.{key}", (name,), shape[:1], shape[1], bias=False)
    else:
        yield from attention_rules()
    output = (f"{attention}.linear_proj", (names.proj,), (hidden,), a.attended_size, a.attention_output_bias)
    yield from layer(*output, of=attending)
    if a.attention_sinks:
        source = Source(name=names.layer + names.sinks, shape=(a.num_attention_heads,))
        key = f"{attention}.core_attention.softmax_offset"
        yield Rule(megatron=key, axes=("layer",), layers=attending, sources=(source,))
    if delta := a.delta:
        yield from norm(f"{attention}.in_proj.layer_norm_", names.attention_norm, of=delta.layers)
        yield from delta_rules(a, delta, attention, names.layer + names.delta)
    if a.norm_placement != "pre":
        yield from norm(f"{layers}.post_self_attn_layernorm.", names.post_attention_norm)

    own_norm = a.norms_in_front and a.residual != "parallel_shared"
    sparse = a.moe_layers
    dense = tuple(index for index in range(a.num_layers) if index not in sparse) if sparse else None
    if dense != ():
        if own_norm:
            yield from norm(f"{mlp}.linear_fc1.layer_norm_", names.mlp_norm, of=dense)
        rows = (ffn, ffn) if a.gated else (ffn,)
        gated: RowLayout = SwapHalves() if names.gate_last else CONCAT
        yield from layer(f"{mlp}.linear_fc1", names.fc1, rows, hidden, a.mlp_bias, gated, of=dense)
        yield from layer(f"{mlp}.linear_fc2", (names.fc2,), (hidden,), ffn, a.mlp_bias, of=dense)
    if experts := a.experts:
        if own_norm:
            yield from norm(f"{layers}.pre_mlp_layernorm.", names.mlp_norm, of=sparse)
        for rule in layer(f"{mlp}.router", (names.router,), (experts.count,), hidden, experts.bias, of=sparse):
            yield replace(rule, sources=tuple(replace(source, init="normal") for source in rule.sources))
        if experts.correction_bias:
            source = Source(name=names.layer + names.correction_bias, shape=(experts.count,), fp32=True)
            yield Rule(megatron=f"{mlp}.router.expert_bias", axes=("layer",), layers=sparse, sources=(source,))
        size, each = experts.ffn_hidden_size, f"{mlp}.experts.experts"
        both: tuple[Axis, ...] = ("layer", "expert")
        if names.experts_together:
            yield from together_rules(names, each, experts, hidden, sparse)
        else:
            yield from layer(f"{each}.linear_fc1", names.expert_fc1, (size, size), hidden, False, axes=both, of=sparse)
            yield from layer(f"{each}.linear_fc2", (names.expert_fc2,), (hidden,), size, False, axes=both, of=sparse)
        if together := experts.shared_ffn_hidden_size:
            shared = f"{mlp}.shared_experts"
            yield from layer(f"{shared}.linear_fc1", names.shared_fc1, (together, together), hidden, False, of=sparse)
            yield from layer(f"{shared}.linear_fc2", (names.shared_fc2,), (hidden,), together, False, of=sparse)
        if experts.shared_gate:
            source = Source(name=f"{names.layer}{names.shared_gate}.weight", shape=(1, hidden))
            yield Rule(megatron=f"{mlp}.shared_experts.gate_weight", axes=("layer",), layers=sparse, sources=(source,))
    if a.norm_placement != "pre":
        yield from norm(f"{layers}.post_mlp_layernorm.", names.post_mlp_norm)

    if a.final_norm:
        yield from whole_norm("decoder.final_layernorm", names.final_norm)
    if not a.tied_embeddings:
        yield whole("output_layer.weight", names.head, a.vocab_size, columns=table, layout=vocabulary)
    if a.output_bias:
        yield whole("output_layer.bias", names.head, a.vocab_size, kind="bias", layout=vocabulary)


def together_rules(names: Names, each: str, experts: Experts, hidden: int, layers: tuple[int, ...]) -> Iterator[Rule]:
    """Experts of one tensor; a bias is named after its weight, whose name has no ending."""
    size, (fc1,) = experts.ffn_hidden_size, names.expert_fc1
    turns: RowLayout = Deinterleave(parts=2)
    for key, name, rows, columns, layout in (
        ("linear_fc1", fc1, 2 * size, hidden, turns),
        ("linear_fc2", names.expert_fc2, hidden, size, CONCAT),
    ):
        sources = {"weight": Source(name=names.layer + name, shape=(columns, rows), stacked_axes=("expert",))}
        if experts.bias:
            sources["bias"] = Source(name=f"{names.layer}{name}_bias", shape=(rows,), stacked_axes=("expert",))
        for kind, source in sources.items():
            yield Rule(
                megatron=f"{each}.{key}.{kind}",
                axes=("layer", "expert"),
                layers=layers,
                sources=(source,),
                layout=Transposed(layout=layout) if kind == "weight" else layout,
            )
