"""A table, a configuration or a module that is wrong in one place is found out by `verify`'s logits, in every family.

The mistakes are those that undo themselves on the way back, which the round trip can't see: nothing here names a family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.architecture.architecture import Architecture
from shared.architecture.flat_view import changed as replace
from shared.architecture.version_1 import Delta as DeltaNet
from shared.architecture.version_1 import Latent as LatentAttention
from shared.families import registry
from shared.families.family import Family
from shared.mapping.layout import Segment, Shape, Transposed
from shared.mapping.rule import Axis, Rule, Source


class Swapped:
    """A layout with runs of rows of the target exchanged: wrong the same way in both directions."""

    def __init__(self, layout: Any, *runs: tuple[int, int, int]) -> None:
        """`runs` are (first row, other row, rows)."""
        self.layout, self.runs = layout, runs

    def target_shape(self, shapes: list[Shape]) -> Shape:
        return tuple(self.layout.target_shape(shapes))

    def segments(self, shapes: list[Shape]) -> tuple[Segment, ...]:
        origin = [
            (segment.source, segment.source_row + row * segment.step)
            for segment in self.layout.segments(shapes)
            for row in range(segment.rows)
        ]
        for first, other, rows in self.runs:
            a, b = slice(first, first + rows), slice(other, other + rows)
            origin[a], origin[b] = origin[b], origin[a]
        return tuple(
            Segment(source=source, source_row=row, target_row=index, rows=1)
            for index, (source, row) in enumerate(origin)
        )


def mistakes_of_tables(a: Architecture) -> Iterator[tuple[str, Callable[[Rule], Rule]]]:
    """Mistakes in a table that undo themselves on the way back."""
    group = (a.num_attention_heads // a.num_query_groups + 2) * a.head_dim
    per_group = a.num_attention_heads // a.num_query_groups
    starts = [index * group for index in range(a.num_query_groups)]

    def swap(ending: str, *runs: tuple[int, int, int]) -> Callable[[Rule], Rule]:
        def wrong(rule: Rule) -> Rule:
            if not rule.megatron.endswith(ending):
                return rule
            if isinstance(rule.layout, Transposed):
                return replace(rule, layout=Transposed(layout=Swapped(rule.layout.layout, *runs)))
            return replace(rule, layout=Swapped(rule.layout, *runs))

        return wrong

    if a.gated and len(a.moe_layers) < a.num_layers:
        yield "gate and up", swap("mlp.linear_fc1.weight", (0, a.ffn_hidden_size, a.ffn_hidden_size))
    if experts := a.experts:
        size = experts.ffn_hidden_size
        yield "gate and up of experts", swap("experts.experts.linear_fc1.weight", (0, size, size))
        yield "rows of the router", swap("router.weight", (0, 1, 1))
        yield "experts", another_expert
        if size := experts.shared_ffn_hidden_size or 0:
            yield "gate and up of the shared experts", swap("shared_experts.linear_fc1.weight", (0, size, size))
    if latent := a.latent:
        yield from mistakes_of_latent_attention(a, latent, swap)
        return
    if a.delta:
        yield from mistakes_of_delta_nets(a.delta, swap)
        per_group *= 2  # each query head with its gate
        group = (per_group + 2) * a.head_dim
        starts = [index * group for index in range(a.num_query_groups)]
        gates = per_group // 2 * a.head_dim
        yield "queries and their gates", swap("linear_qkv.weight", *((s, s + gates, gates) for s in starts))
        yield "gate of another head", swap("linear_qkv.weight", (gates, gates + a.head_dim, a.head_dim))
    k, v = per_group * a.head_dim, (per_group + 1) * a.head_dim
    yield "key and value", swap("linear_qkv.weight", *((s + k, s + v, a.head_dim) for s in starts))
    if a.num_query_groups > 1:
        yield "key of another group", swap("linear_qkv.weight", (starts[0] + k, starts[1] + k, a.head_dim))
        yield "query of another group", swap("linear_qkv.weight", (starts[0], starts[1], a.head_dim))
    if a.positions == "rope":
        step = 2 if a.rotary_interleaved else 1
        queries = range(a.num_attention_heads // a.num_query_groups)
        heads = [s + head * a.head_dim for s in starts for head in (*queries, per_group)]
        half = 1 if a.rotary_interleaved else a.rotated // (2 * a.position_streams)
        pairs = [(h, h + step, 1) for h in heads] + [(h + half, h + half + step, 1) for h in heads]
        yield "pairs of the rotation", swap("linear_qkv.weight", *pairs)
    if a.qk_norm_scope == "each_head":
        yield "norms of another head", another_head
    if a.positions == "learned":
        yield "positions", swap("position_embeddings.weight", (0, 100, 100))
        if a.position_streams > 1:
            yield "places in what fills a blank", swap("position_embeddings.filling.weight", (0, 100, 100))
            yield "tables of positions", exchanged_tables


def mistakes_of_delta_nets(
    delta: DeltaNet, swap: Callable[..., Callable[[Rule], Rule]]
) -> Iterator[tuple[str, Callable[[Rule], Rule]]]:
    def exchanged(one: str, other: str) -> Callable[[Rule], Rule]:
        """Two parts of a source, taken for each other: they must be as large."""

        def wrong(rule: Rule) -> Rule:
            parts = {one: other, other: one}
            head, _, part = rule.megatron.rpartition(".")
            return replace(rule, megatron=f"{head}.{parts[part]}") if part in parts else rule

        return wrong

    key, value = delta.key_head_dim, delta.value_head_dim
    yield "queries and keys of delta nets", exchanged("query", "key")
    yield "beta and alpha", exchanged("beta", "alpha")
    if delta.value_heads == delta.key_heads:  # the rest once is enough
        return
    for part, rows in (("query", key), ("key", key), ("value", value), ("z", value)):
        yield f"{part} of another head", swap(f"in_proj.weight.{part}", (0, rows, rows))
        if part != "z":
            yield f"channels of {part}", swap(f"conv1d.weight.{part}", (0, 1, 1))
    for part in ("in_proj.weight.beta", "in_proj.weight.alpha", "A_log", "dt_bias"):
        yield f"rows of {part}", swap(part, (0, 1, 1))
    yield "rows of the output projection", swap("out_proj.weight", (0, 1, 1))
    yield "the norm held as it is stored", lambda rule: replace(rule, zero_centered_gamma=False)


def mistakes_of_latent_attention(
    a: Architecture, latent: LatentAttention, swap: Callable[..., Callable[[Rule], Rule]]
) -> Iterator[tuple[str, Callable[[Rule], Rule]]]:
    nope, rope = latent.qk_nope_head_dim, latent.qk_rope_head_dim
    queries = "linear_q_up_proj.weight" if latent.q_lora_rank else "linear_q_proj.weight"
    starts = [head * a.head_dim for head in range(a.num_attention_heads)]
    both = [head * (nope + latent.v_head_dim) for head in range(a.num_attention_heads)]
    least = min(nope, latent.v_head_dim)
    yield "query of another head", swap(queries, (0, a.head_dim, a.head_dim))
    yield "rotated part of queries first", swap(queries, *((s, s + nope, rope) for s in starts))
    yield "values before keys", swap("linear_kv_up_proj.weight", *((s, s + nope, least) for s in both))
    yield "rotated key before the latent", swap("linear_kv_down_proj.weight", (0, latent.kv_lora_rank, rope))
    pairs = swap(queries, *((s + nope + 2 * i, s + nope + 2 * i + 1, 1) for s in starts for i in range(rope // 2)))
    yield "elements of the rotated pairs of queries", pairs
    # Of queries and the key alike: scores stay the same but for which frequency turns which pair.
    order = swap(queries, *((s + nope, s + nope + 2, 2) for s in starts))
    of_key = swap("linear_kv_down_proj.weight", (latent.kv_lora_rank, latent.kv_lora_rank + 2, 2))
    yield "order of the rotated pairs", lambda rule: of_key(order(rule))
    if latent.q_lora_rank:
        yield "rows of the queries' low rank", swap("linear_q_down_proj.weight", (0, 1, 1))


def another_head(rule: Rule) -> Rule:
    """Norms of queries, each of them the next head's."""
    if not rule.megatron.endswith("q_layernorm.weight"):
        return rule
    if "query_head" not in rule.axes:
        return replace(rule, layout=Swapped(rule.layout, (0, 1, 1)))
    return exchanged(rule, "query_head")


def exchanged_tables(rule: Rule) -> Rule:
    """Places in a text and in what fills its blank, taken for each other."""
    head, text, filling = "embedding.position_embeddings.", "weight", "filling.weight"
    parts = {head + text: head + filling, head + filling: head + text}
    return replace(rule, megatron=parts.get(rule.megatron, rule.megatron))


def another_expert(rule: Rule) -> Rule:
    """Down projections, each of them the next expert's."""
    if not rule.megatron.endswith("experts.experts.linear_fc2.weight"):
        return rule

    return exchanged(rule, "expert")


def exchanged(rule: Rule, axis: Axis) -> Rule:
    """The rule with the sources of every two neighbours on the axis exchanged, be each a tensor or a slice of one."""

    class Next(str):
        __slots__ = ()

        def format(self, *args: object, **index: Any) -> str:
            return str.format(self, **index | {axis: index[axis] ^ 1})

    @dataclass(frozen=True, kw_only=True)
    class NextSlice(Source):
        def __post_init__(self) -> None:
            index = (place ^ (of == axis) for of, place in zip(self.stacked_axes, self.index, strict=False))
            object.__setattr__(self, "index", tuple(index))

    def of(source: Source) -> Source:
        if axis in source.stacked_axes:
            return NextSlice(**{field.name: getattr(source, field.name) for field in fields(source)})
        return replace(source, name=Next(source.name))

    return replace(rule, sources=tuple(of(source) for source in rule.sources))


# Architecture's fields that change no tensor, and what a careless reader of the configuration takes them for.
CARELESS: dict[str, Any] = {
    "norm": {"rmsnorm_1p": "rmsnorm"},
    "residual": {"parallel": "sequential", "normed": "sequential"},
    "activation": {
        **{"swiglu": "geglu", "geglu_tanh": "swiglu", "quick_geglu": "swiglu"},
        **{"gelu": "relu", "gelu_tanh": "relu"},
    },
    "glu_offset": 0.0,
    "alibi_bias_max": 8,
    "qkv_clip": None,
    "attention_scale_by_layer": False,
    "alibi": {"rounded": "exact"},
    "rope_theta": 500.0,
    "rotary_interleaved": False,
    "position_streams": 1,
    "rotary_fp16": False,
    "layers_without_rope": (),
    "full_attention_layers": (),
    "normalized_head": False,
    **dict.fromkeys(("rope_scaling", "window_rope_theta", "rotary_dim", "attention_scale", "attention_softcap"), None),
    **dict.fromkeys(("glu_limit", "sliding_window", "logit_softcap"), None),
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "input_multiplier", "logit_multiplier"), 1.0),
}


def careless_readings(a: Architecture) -> Iterator[tuple[str, dict[str, Any]]]:
    """Fields that are read as something else."""
    assert CARELESS.keys() <= {field.name for field in fields(a.flat)}
    for name, wrong in CARELESS.items():
        value = getattr(a, name)
        other = wrong.get(value, value) if isinstance(wrong, dict) else wrong
        if name in ("rope_theta", "position_streams") and a.positions != "rope":
            continue  # which says nothing then, or has a table of its own
        if value == other:
            continue
        with_it: dict[str, Any] = {}
        if name == "sliding_window":
            with_it = {"full_attention_layers": (), "window_rope_theta": None}
        if name == "rotary_dim" and a.rope_scaling and a.rope_scaling.kind == "longrope":
            with_it = {"rope_scaling": None}  # which has a factor for each pair
        yield name, {name: other, **with_it}
    if a.prefix:
        staying = {*a.prefix.blank_tokens} - {*a.prefix.counted_tokens}
        yield "places behind the blank", {"prefix": replace(a.prefix, counted_tokens=tuple(staying))}
        yield "which of several blanks", {"prefix": replace(a.prefix, earliest=not a.prefix.earliest)}
    if a.latent and a.latent.norm_epsilon != a.norm_epsilon:
        yield "norms within attention", {"latent": replace(a.latent, norm_epsilon=a.norm_epsilon)}
    if a.rope_scaling and a.rope_scaling.kind == "longrope":
        short = replace(a.rope_scaling, long_factors=a.rope_scaling.short_factors)
        yield "short factors for long sequences", {"rope_scaling": short}
    if a.rope_scaling and a.rope_scaling.kind in ("yarn", "longrope"):
        if a.latent:
            by_length = replace(a.rope_scaling, attention_factor=a.rope_scaling.amplitude, mscale_all_dim=None)
            yield "scale of the scores", {"rope_scaling": by_length}
        if a.rope_scaling.amplitude != 1.0:
            yield "amplitude of the rotation", {"rope_scaling": replace(a.rope_scaling, attention_factor=1.0)}
    if experts := a.experts:
        if experts.score == "softmax":
            yield "experts' scores", {"experts": replace(experts, normalized=not experts.normalized)}
        if experts.groups > 1:
            yield "groups of experts", {"experts": replace(experts, groups=1, top_groups=1)}
            other = 3 - experts.group_score_of
            yield "scores of a group", {"experts": replace(experts, group_score_of=other)}
        yield "experts a token", {"experts": replace(experts, top_k=experts.top_k + 1)}
        yield "experts' scaling", {"experts": replace(experts, scaling=experts.scaling * 2)}


def mistakes_of_modules(a: Architecture) -> Iterator[tuple[str, Any, str, Callable[..., Any]]]:
    """Functions of `shared.model` that compute what no field says: the module, its function's name, and a wrong one."""
    from shared.kernels.attention import alibi
    from shared.model import gpt

    slopes, inputs = alibi.slopes, gpt.prefix_inputs
    if a.positions == "alibi":
        yield "slopes of other heads", alibi, "slopes", lambda *given: slopes(*given).roll(1)
    if a.prefix:
        yield "a text that does not see itself", gpt, "prefix_inputs", lambda *given: (inputs(*given)[0], None)


def test_wrong_modules_are_found_out(
    tiny_sizes: dict[str, Architecture],
    write_architecture: Any,
    convert: Any,
    remote_code: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    subtests: pytest.Subtests,
) -> None:
    for size, architecture in tiny_sizes.items():
        mistakes = list(mistakes_of_modules(architecture))
        source, target = tmp_path / f"{size}.hf", tmp_path / f"{size}.megatron"
        if mistakes:
            convert("to-megatron", "--source", write_architecture(source, architecture), "--target", target)
        for name, module, function, wrong in mistakes:
            with subtests.test(name, size=size), monkeypatch.context() as patch:
                patch.setattr(module, function, wrong)
                words = ("--source", source, "--target", target, *remote_code(architecture))
                assert "logits differ by" in convert("verify", *words).err


def mistaken(
    family: Family, a: Architecture, change: Callable[[Rule], Rule] = lambda rule: rule, **wrong: Any
) -> Family:
    right = family.table(a)
    table = replace(right, rules=tuple(change(rule) for rule in right.rules))
    return replace(family, table=lambda _: table, read=lambda given: replace(family.read(given), **wrong))


def test_one_mistake_is_found_out(
    size: str,
    tiny_sizes: dict[str, Architecture],
    write_architecture: Any,
    convert: Any,
    remote_code: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    subtests: pytest.Subtests,
    proof: Any,
) -> None:
    from tools.convert import verify_logits

    right = verify_logits._transformers
    known: list[torch.Tensor] = []

    def once(source: Path, ids: torch.Tensor, remote: bool) -> torch.Tensor:  # the same ids each time: one seed
        if not known:
            known.append(right(source, ids, remote))
        return known[0]

    monkeypatch.setattr(verify_logits, "_transformers", once)
    architecture = tiny_sizes[size]
    family = registry.FAMILIES[architecture.family]
    source = write_architecture(tmp_path / "hf", architecture)
    wrong = {name: mistaken(family, architecture, change) for name, change in mistakes_of_tables(architecture)}
    wrong |= {name: mistaken(family, architecture, **changes) for name, changes in careless_readings(architecture)}
    with proof("mistakes", size=size) as figures:
        figures |= {"caught": 0, "of": len(wrong)}
        for index, (name, mistake) in enumerate(wrong.items()):
            monkeypatch.setitem(registry.FAMILIES, family.name, mistake)
            target = tmp_path / f"megatron{index}"
            assert convert("to-megatron", "--source", source, "--target", target).code == 0
            with subtests.test(name):
                words = ("--source", source, "--target", target, "--positions", "256", *remote_code(architecture))
                answer = convert("verify", *words)
                assert answer.code == 1
                assert "logits differ by" in answer.err
                figures["caught"] += 1
        assert figures["caught"] == figures["of"]
