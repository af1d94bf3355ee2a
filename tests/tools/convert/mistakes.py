"""Deliberate mistakes in a family: in its tensor table, in parsing config.json, in its modules.

Every mistake is its own inverse in the other direction: a round trip does not detect it, logits do. No family is named here.

A mistake's kind is the exchanged pair and its structure (layout classes of the changed rules, mixer and value of a field).
`spread` tries a kind on the first size that has it; a mistake with one kind only also on a second family, if there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from shared.architecture.architecture import Architecture, Attention, GatedDeltaNet, LatentAttention, Layer, MoE, Rotary
from shared.families import registry
from shared.families.family import Family
from shared.mapping.layout import Segment, Shape, Transposed
from shared.mapping.rule import Axis, Rule, Source

Change = Callable[[Rule], Rule]
Reading = Callable[[Architecture], Architecture]


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """One mistake in a family's table or reading."""

    name: str
    held_by: str  # the structure that it changes
    rule: Change = lambda rule: rule
    reading: Reading = lambda a: a

    @property
    def kind(self) -> tuple[str, str]:
        return self.name, self.held_by

    def family(self, right: Family, a: Architecture) -> Family:
        """The architecture's family with this mistake and no other."""
        table = right.table(a)
        wrong = replace(table, rules=tuple(map(self.rule, table.rules)))
        return replace(right, own_table=lambda _: wrong, read=lambda config: self.reading(right.read(config)))


def mistakes_of(a: Architecture) -> list[Mistake]:
    """Every mistake that can be made in an architecture's table and reading."""
    table = registry.table_of(a)
    found = []
    for name, change in table_mistakes(a):
        structures = {_structure(rule) for rule in table.rules if change(rule) is not rule}
        found.append(Mistake(name=name, held_by=", ".join(sorted(structures)), rule=change))
    mixers = ", ".join(sorted({type(kind.mixer).__name__ for kind in a.kinds}))
    for name, value, reading in reading_mistakes(a):
        held_by = f"{value!r} in {mixers}" if isinstance(value, str | bool) else mixers
        found.append(Mistake(name=name, held_by=held_by, reading=reading))
    return found


def _structure(rule: Rule) -> str:
    """Layout classes, number of sources, and whether a source holds several slices."""

    def classes(layout: Any) -> str:
        parts = [getattr(layout, field.name) for field in fields(layout)] if is_dataclass(layout) else []
        within = "".join(f"({classes(part)})" for part in parts if hasattr(part, "segments"))
        return type(layout).__name__ + within + " grouped" * (getattr(layout, "groups", 1) > 1)

    stacked = " of stacked tensors" * any(source.stacked_axes for source in rule.sources)
    return f"{classes(rule.layout)} of {len(rule.sources)}{stacked}"


def spread(sizes: Mapping[str, Architecture]) -> dict[str, list[Mistake]]:
    """By size, the mistakes to try: each kind once, each name on two families where there are two."""
    chosen: dict[str, list[Mistake]] = {size: [] for size in sizes}
    kinds: set[tuple[str, str]] = set()
    families: dict[str, set[str]] = {}
    everything = [(size, a.family, mistake) for size, a in sizes.items() for mistake in mistakes_of(a)]
    for size, family, mistake in everything:
        if mistake.kind not in kinds:
            kinds.add(mistake.kind)
            families.setdefault(mistake.name, set()).add(family)
            chosen[size].append(mistake)
    for size, family, mistake in everything:
        if len(families[mistake.name]) == 1 and family not in families[mistake.name]:
            families[mistake.name].add(family)
            chosen[size].append(mistake)
    return {size: mistakes for size, mistakes in chosen.items() if mistakes}


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


def swap(ending: str, *runs: tuple[int, int, int]) -> Change:
    """Exchange runs of rows in the tensors whose Megatron key ends so."""

    def wrong(rule: Rule) -> Rule:
        if not rule.megatron.endswith(ending):
            return rule
        if isinstance(rule.layout, Transposed):
            return replace(rule, layout=Transposed(layout=Swapped(rule.layout.layout, *runs)))
        return replace(rule, layout=Swapped(rule.layout, *runs))

    return wrong


def table_mistakes(a: Architecture) -> Iterator[tuple[str, Change]]:
    """Rows, heads, experts, norms and tables that are taken for others."""
    if a.mlp and a.mlp.gated:
        size = a.mlp.ffn_hidden_size
        yield "gate and up", swap("mlp.linear_fc1.weight", (0, size, size))
    if moe := a.moe:
        size = moe.expert.ffn_hidden_size
        yield "gate and up of experts", swap("experts.experts.linear_fc1.weight", (0, size, size))
        yield "rows of the router", swap("router.weight", (0, 1, 1))
        yield "experts", another_expert
        if moe.shared:
            size = moe.shared.ffn_hidden_size
            yield "gate and up of the shared experts", swap("shared_experts.linear_fc1.weight", (0, size, size))
    if a.delta_net:
        yield from delta_net_mistakes(a.delta_net)
    attention = a.attention
    if isinstance(attention, LatentAttention):
        yield from mla_mistakes(attention)
    else:
        yield from attention_mistakes(a, attention)
    if a.embedding.positions:
        yield "positions", swap("position_embeddings.weight", (0, 100, 100))
        if a.prefix and a.prefix.position_streams > 1:
            yield "places in what fills a blank", swap("position_embeddings.filling.weight", (0, 100, 100))
            yield "tables of positions", exchanged_tables


def attention_mistakes(a: Architecture, attention: Attention) -> Iterator[tuple[str, Change]]:
    """Fused QKV `[q1..qn k v | ...]`; with gates `[q1 g1 .. qn gn k v | ...]` in Megatron-Core's order."""
    queries, size = attention.heads // attention.groups, attention.head_dim
    per_group = queries * (1 + attention.gate)
    starts = [index * (per_group + 2) * size for index in range(attention.groups)]
    if attention.gate:
        gates = queries * size
        yield "queries and their gates", swap("linear_qkv.weight", *((s, s + gates, gates) for s in starts))
        yield "gate of another head", swap("linear_qkv.weight", (gates, gates + size, size))
    k, v = per_group * size, (per_group + 1) * size
    yield "key and value", swap("linear_qkv.weight", *((s + k, s + v, size) for s in starts))
    if attention.groups > 1:
        yield "key of another group", swap("linear_qkv.weight", (starts[0] + k, starts[1] + k, size))
        yield "query of another group", swap("linear_qkv.weight", (starts[0], starts[1], size))
    if rotary := _rotary(a):
        step = 2 if rotary.interleaved else 1
        heads = [s + head * size for s in starts for head in (*range(queries), per_group)]
        streams = a.prefix.position_streams if a.prefix else 1
        half = 1 if rotary.interleaved else (rotary.dim or size) // (2 * streams)
        pairs = [(h, h + step, 1) for h in heads] + [(h + half, h + half + step, 1) for h in heads]
        yield "pairs of the rotation", swap("linear_qkv.weight", *pairs)
    if attention.qk_norm == "each_head":
        yield "norms of another head", another_head


def delta_net_mistakes(net: GatedDeltaNet) -> Iterator[tuple[str, Change]]:
    def exchanged_parts(one: str, other: str) -> Change:
        """Two parts of a source, taken for each other: they must be as large."""

        def wrong(rule: Rule) -> Rule:
            parts = {one: other, other: one}
            head, _, part = rule.megatron.rpartition(".")
            return replace(rule, megatron=f"{head}.{parts[part]}") if part in parts else rule

        return wrong

    def plain_gamma(rule: Rule) -> Rule:
        return replace(rule, zero_centered_gamma=False) if rule.zero_centered_gamma else rule

    key, value = net.key_head_dim, net.value_head_dim
    yield "queries and keys of delta nets", exchanged_parts("query", "key")
    yield "beta and alpha", exchanged_parts("beta", "alpha")
    if net.value_heads == net.key_heads:  # the rest once is enough
        return
    for part, rows in (("query", key), ("key", key), ("value", value), ("z", value)):
        yield f"{part} of another head", swap(f"in_proj.weight.{part}", (0, rows, rows))
        if part != "z":
            yield f"channels of {part}", swap(f"conv1d.weight.{part}", (0, 1, 1))
    for part in ("in_proj.weight.beta", "in_proj.weight.alpha", "A_log", "dt_bias"):
        yield f"rows of {part}", swap(part, (0, 1, 1))
    yield "rows of the output projection", swap("out_proj.weight", (0, 1, 1))
    yield "the norm held as it is stored", plain_gamma


def mla_mistakes(mla: LatentAttention) -> Iterator[tuple[str, Change]]:
    nope, rope = mla.qk_nope_head_dim, mla.qk_rope_head_dim
    queries = "linear_q_up_proj.weight" if mla.q_lora_rank else "linear_q_proj.weight"
    starts = [head * mla.head_dim for head in range(mla.heads)]
    both = [head * (nope + mla.v_head_dim) for head in range(mla.heads)]
    least = min(nope, mla.v_head_dim)
    yield "query of another head", swap(queries, (0, mla.head_dim, mla.head_dim))
    yield "rotated part of queries first", swap(queries, *((s, s + nope, rope) for s in starts))
    yield "values before keys", swap("linear_kv_up_proj.weight", *((s, s + nope, least) for s in both))
    yield "rotated key before the latent", swap("linear_kv_down_proj.weight", (0, mla.kv_lora_rank, rope))
    pairs = swap(queries, *((s + nope + 2 * i, s + nope + 2 * i + 1, 1) for s in starts for i in range(rope // 2)))
    yield "elements of the rotated pairs of queries", pairs
    # Of queries and the key alike: scores stay the same but for which frequency turns which pair.
    order = swap(queries, *((s + nope, s + nope + 2, 2) for s in starts))
    of_key = swap("linear_kv_down_proj.weight", (mla.kv_lora_rank, mla.kv_lora_rank + 2, 2))
    yield "order of the rotated pairs", lambda rule: of_key(order(rule))
    if mla.q_lora_rank:
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
    return replace(rule, megatron=parts[rule.megatron]) if rule.megatron in parts else rule


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


# Fields that change no tensor, by the value of an architecture that has them (as `Architecture.with_values` names it), and
# what a careless reader of config.json takes each for: of a mapping, by what it is.
CARELESS: dict[str, dict[str, Any]] = {
    "norm": {"zero_centered_gamma": False},
    "residual": {
        "kind": {"parallel": "sequential", "normed": "sequential"},
        "multiplier": 1.0,
        "input_multiplier": 1.0,
    },
    "mlp": {
        "activation": {
            **{"swiglu": "geglu", "geglu_tanh": "swiglu", "quick_geglu": "swiglu"},
            **{"gelu": "relu", "gelu_tanh": "relu"},
        },
        "up_offset": 0.0,
        "clamp": None,
    },
    "attention": {"clip": None, "scale_by_layer": False, "scale": None, "softcap": None},
    "alibi": {"bias_max": 8, "rounded": False},
    "rotary": {"theta": 500.0, "interleaved": False, "fp16_frequencies": False, "scaling": None, "dim": None},
    "embedding": {"multiplier": 1.0},
    "head": {"normalized": False, "multiplier": 1.0, "softcap": None},
    "prefix": {"position_streams": 1},
}


def reading_mistakes(a: Architecture) -> Iterator[tuple[str, Any, Reading]]:
    """Fields that are read as something else: name, right value, wrong reading."""
    for holder, wrong_values in CARELESS.items():
        value = _value(a, holder)
        for field, wrong in wrong_values.items():
            if value is None or not hasattr(value, field):
                continue
            right = getattr(value, field)
            other = wrong.get(right, right) if isinstance(wrong, dict) else wrong
            if right == other or (holder == "prefix" and not _rotary(a)):  # 2-D learned positions are another table
                continue
            changes = {field: other}
            if field == "dim" and value.scaling and value.scaling.kind == "longrope":
                changes["scaling"] = None  # which has a factor for each pair
            yield f"{holder}.{field}", right, _with(holder, changes)
    yield from window_mistakes(a)
    if a.prefix:
        staying = {*a.prefix.blank_tokens} - {*a.prefix.counted_tokens}
        yield "places behind the blank", None, _with("prefix", {"counted_tokens": tuple(staying)})
        yield "which of several blanks", None, _with("prefix", {"earliest": not a.prefix.earliest})
    if a.mla and a.mla.norm_epsilon != a.layers[0].norm.epsilon:
        yield "norms within MLA", None, _with("attention", {"norm_epsilon": a.layers[0].norm.epsilon})
    yield from rope_scaling_mistakes(a)
    if moe := a.moe:
        if moe.score == "softmax":
            yield "experts' scores", moe.normalized, _with("moe", {"normalized": not moe.normalized})
        if moe.groups > 1:
            yield "groups of experts", None, _with("moe", {"groups": 1, "top_groups": 1})
            yield "scores of a group", None, _with("moe", {"group_score_top": 3 - moe.group_score_top})
        yield "experts a token", None, _with("moe", {"top_k": moe.top_k + 1})
        yield "experts' scaling", None, _with("moe", {"scaling": moe.scaling * 2})


def window_mistakes(a: Architecture) -> Iterator[tuple[str, Any, Reading]]:
    """Sliding windows, and layers without rotation: read as on all layers or on none."""
    attentions = [layer.mixer for layer in a.layers if isinstance(layer.mixer, Attention)]
    windowed = next((mixer for mixer in attentions if mixer.window), None)
    full = next((mixer for mixer in attentions if not mixer.window), None)
    rotary = _rotary(a)
    if rotary and any(mixer.rotary is None for mixer in attentions):
        yield "layers without rotation", None, lambda a: a.with_values(attention={"rotary": rotary})
    if windowed is None:
        return
    of_full = (full.rotary if full else None) or windowed.rotary
    none = {"window": None} | ({"rotary": of_full} if windowed.rotary else {})
    yield "sliding window", None, lambda a: a.with_layers(lambda layer: _mixer(layer, none))
    if full:
        all_layers = {"window": windowed.window} | ({"rotary": windowed.rotary} if full.rotary else {})
        yield "layers with full attention", None, lambda a: a.with_values(attention=all_layers)
        if full.rotary and windowed.rotary and full.rotary != windowed.rotary:
            yield "rotation of windowed layers", None, lambda a: a.with_values(attention={"rotary": full.rotary})


def rope_scaling_mistakes(a: Architecture) -> Iterator[tuple[str, Any, Reading]]:
    scaling = (_rotary(a) or Rotary()).scaling
    if scaling is None or scaling.kind not in ("yarn", "longrope"):
        return
    if scaling.kind == "longrope":
        short = replace(scaling, long_factors=scaling.short_factors)
        yield "short factors for long sequences", None, _with("rotary", {"scaling": short})
    if a.mla:
        by_length = replace(scaling, attention_factor=scaling.concentration_factor, mscale_all_dim=None)
        yield "scale of the scores", None, _with("rotary", {"scaling": by_length})
    if scaling.concentration_factor != 1.0:
        plain = replace(scaling, attention_factor=1.0)
        yield "concentration factor of cos and sin", None, _with("rotary", {"scaling": plain})


def _rotary(a: Architecture) -> Rotary | None:
    """Of the layers that see everything, else of any."""
    mixers = [layer.mixer for layer in a.layers if not isinstance(layer.mixer, GatedDeltaNet)]
    unwindowed = [mixer.rotary for mixer in mixers if not getattr(mixer, "window", None)]
    return next((rotary for rotary in [*unwindowed, *(mixer.rotary for mixer in mixers)] if rotary), None)


def _value(a: Architecture, holder: str) -> Any:
    """The first value of that name."""
    if holder in ("norm", "residual"):
        return getattr(a.layers[0], holder)
    if holder == "alibi":
        return getattr(a.attention, "alibi", None)
    if holder == "mlp":
        return a.feed_forward
    return _rotary(a) if holder == "rotary" else getattr(a, holder)


def _with(holder: str, changes: Mapping[str, Any]) -> Reading:
    """Every value of that name with these fields."""
    if holder == "prefix":
        return lambda a: replace(a, prefix=replace(a.prefix, **changes))
    if holder == "alibi":
        return lambda a: a.with_values(attention={"alibi": replace(_value(a, "alibi"), **changes)})
    if holder == "rotary":
        return lambda a: a.with_layers(lambda layer: _rotated(layer, _rotary(a), changes))
    if holder == "mlp":  # experts' too
        return lambda a: a.with_layers(lambda layer: _feed_forward(layer, changes))
    return lambda a: a.with_values(**{holder: changes})


def _feed_forward(layer: Layer, changes: Mapping[str, Any]) -> Layer:
    if not isinstance(layer.mlp, MoE):
        return replace(layer, mlp=replace(layer.mlp, **changes))
    shared = {"shared": replace(layer.mlp.shared, **changes)} if layer.mlp.shared else {}
    return replace(layer, mlp=replace(layer.mlp, expert=replace(layer.mlp.expert, **changes), **shared))


def _rotated(layer: Layer, rotary: Rotary | None, changes: Mapping[str, Any]) -> Layer:
    """The layer with this rotary embedding changed; windowed layers may have another."""
    own = rotary and getattr(layer.mixer, "rotary", None) == rotary
    return replace(layer, mixer=replace(layer.mixer, rotary=replace(rotary, **changes))) if own else layer


def _mixer(layer: Layer, changes: Mapping[str, Any]) -> Layer:
    """The layer with its sliding window attention changed."""
    windowed = isinstance(layer.mixer, Attention) and layer.mixer.window
    return replace(layer, mixer=replace(layer.mixer, **changes)) if windowed else layer


def module_mistakes(a: Architecture) -> Iterator[tuple[str, Any, str, Callable[..., Any]]]:
    """Functions of the modules that compute what no field says: name, module, function, wrong function."""
    from shared.kernels.attention import alibi
    from shared.model import gpt

    slopes, inputs = alibi.slopes, gpt.prefix_inputs
    if getattr(a.attention, "alibi", None):
        yield "slopes of other heads", alibi, "slopes", lambda *given: slopes(*given).roll(1)
    if a.prefix:
        yield "a text that does not see itself", gpt, "prefix_inputs", lambda *given: (inputs(*given)[0], None)
