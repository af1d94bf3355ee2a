"""Every family against transformers, on tiny models of every size that is named so: nothing here names a family.

A size's checkpoint goes to Megatron form and back bit for bit; both implementations' logits agree over hundreds of
positions, alone, at TP=2 with sequence parallelism and at PP=2; a step of training gives the same loss and gradients;
and a table or an architecture that is wrong in one place is found out.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.checkpoint.hf import HfReader
from shared.families import registry
from shared.families.family import Family
from shared.mapping.layout import Segment, Shape, Transposed
from shared.mapping.rule import Rule
from shared.model.architecture import Architecture, DeltaNet, LatentAttention
from shared.model.prefix import with_blank

CHOSEN = os.environ.get("FAMILIES", "").split()  # while one family is worked on; empty: all of them
SIZES = [n for n, size in registry.sizes().items() if "tiny" in n and (not CHOSEN or size.family in CHOSEN)]
POSITIONS, CONTINUED = 256, 32
# fp32 sums in another order, as `convert verify` explains: 1e-4 of the logits' spread.
TOLERANCE = 1e-4
# The same for gradients, which are sums over 256 positions of products of such numbers: relative to the largest of the
# model, since some are zero but for rounding (a bias of keys shifts all scores alike).
GRADIENT_TOLERANCE = 1e-4


def tiny(size: str) -> Architecture:
    return replace(registry.sizes()[size], vocab_size=509)  # padded, on every layout


def code_of(architecture: Architecture) -> list[str]:
    """`verify`'s flag for families that transformers lacks."""
    return ["--trust-remote-code"] if registry.FAMILIES[architecture.family].remote else []


@pytest.fixture(params=SIZES)
def size(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_round_trip_and_logits(size: str, write_architecture: Any, convert: Any, tmp_path: Path, proof: Any) -> None:
    source, target, back = (tmp_path / name for name in ("hf", "megatron", "back"))
    write_architecture(source, tiny(size))
    with proof("round trip", size=size):
        assert convert("to-megatron", "--source", source, "--target", target).code == 0
        assert convert("to-hf", "--source", target, "--target", back).code == 0
        for file in (file for file in source.rglob("*") if file.is_file()):
            assert (back / file.relative_to(source)).read_bytes() == file.read_bytes(), file
    with proof("logits", size=size) as figures:
        answer = convert("verify", "--source", source, "--target", target, "--positions", "288", *code_of(tiny(size)))
        assert answer.code == 0, answer.err
        found = json.loads(target.with_name("megatron.certificate.json").read_text())["logits"]
        figures["difference"] = found["max_difference"] / found["spread"]
        assert found["positions"] == 288
        assert figures["difference"] < TOLERANCE
        assert found["spread"] > 0.1  # logits that a misplaced row would change


@pytest.fixture(scope="module")
def worker() -> Any:
    import importlib.util

    path = Path(__file__).with_name("family_worker.py")
    specification = importlib.util.spec_from_file_location("family_worker", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def reference(source: Path, ids: torch.Tensor, worker: Any, architecture: Architecture) -> dict[str, Any]:
    """transformers' continuation of the ids, the logits of both, and the loss and gradients of one step."""
    from transformers import AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    from tools.convert.verify_logits import attention_of

    remote = bool(code_of(architecture))
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, attn_implementation=attention_of(architecture), trust_remote_code=remote
    ).eval()
    with torch.no_grad():
        everything = {"attention_mask": torch.ones_like(ids), "eos_token_id": -1, "pad_token_id": 0}
        if not remote:
            ids = model.generate(ids, max_new_tokens=CONTINUED, do_sample=False, **everything)
        while ids.shape[1] < POSITIONS + CONTINUED:  # our references have no cache
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        logits = model(ids).logits
    rows = worker.rows_of(ids, architecture)
    scores = model(rows[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), rows[:, 1:].flatten())
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    gradients = revert_weight_conversion(model, gradients)  # under the names that files have, one for every expert
    return {"ids": ids, "logits": logits, "loss": loss.item(), "gradients": gradients}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, write_architecture: Any, worker: Any) -> tuple[Path, dict[str, Any]]:
    """What two processes made of each model, at each layout, and what transformers makes of it."""
    from tools.convert.cli import tool

    folder = tmp_path_factory.mktemp("families")
    known = {}
    for size in SIZES:
        source = write_architecture(folder / f"{size}.hf", tiny(size), dtype="fp32")
        with pytest.raises(SystemExit) as ended:
            tool.run(["to-megatron", "--source", str(source), "--target", str(folder / f"{size}.megatron")])
        assert not ended.value.code
        ids = with_blank(torch.randint(509, (1, POSITIONS), generator=torch.Generator().manual_seed(1)), tiny(size))
        known[size] = reference(source, ids, worker, tiny(size))
        torch.save(known[size]["ids"], folder / f"{size}.ids.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, Path(__file__).with_name("family_worker.py"), folder]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), port],
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        texts = [process.communicate(timeout=400)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for process, text in zip(ranks, texts, strict=True):
        assert process.returncode == 0, text[-4000:]
    return folder, known


def test_two_processes_run_and_train_as_transformers_does(
    work: tuple[Path, dict[str, Any]], worker: Any, convert: Any, tmp_path: Path, subtests: pytest.Subtests, proof: Any
) -> None:
    """One test, so that the processes are started once, however the tests are dealt over workers."""
    folder, known = work
    for size, layout in ((name, at) for name in SIZES for at in worker.layouts_of(tiny(name))):
        made, theirs = torch.load(folder / f"{size}.{layout}.pt"), known[size]
        at = {"size": size, "layout": layout}
        with subtests.test("logits and greedy continuation", **at), proof(f"logits {layout}", size=size) as figures:
            assert made["logits"].shape == (1, POSITIONS + CONTINUED, 509)
            difference = (made["logits"] - theirs["logits"]).abs().max() / theirs["logits"].std()
            figures |= {"difference": difference.item(), "tokens": CONTINUED}
            assert difference < TOLERANCE
            # Each next token given the same tokens before it: the continuations are equal, by induction.
            assert torch.equal(made["logits"][:, POSITIONS - 1 : -1].argmax(-1), theirs["ids"][:, POSITIONS:])
        with subtests.test("loss and gradients of a step", **at), proof(f"training {layout}", size=size) as figures:
            figures["loss"] = abs(made["loss"] / theirs["loss"] - 1)
            assert figures["loss"] < 1e-5
            target = tmp_path / f"{size}.{layout}"
            words = ("--source", folder / f"{size}.{layout}.gradients", "--hf-files", folder / f"{size}.hf")
            answer = convert("to-hf", *words, "--dtype", "fp32", "--target", target)
            assert answer.code == 0, answer.err
            figures["difference"] = check_gradients(tiny(size), HfReader(target), theirs["gradients"])
        with subtests.test("a file for each rank, from before torch_dist", size=size, layout=layout):
            target = tmp_path / f"{size}.{layout}.of-ranks"
            words = ("--source", folder / f"{size}.{layout}.ranks", "--hf-files", folder / f"{size}.hf")
            answer = convert("to-hf", *words, "--target", target)
            if answer.code == 2:
                assert "gated delta nets or norms of each head are not read; save as torch_dist" in answer.err
                continue
            assert answer.code == 0, answer.err
            before, after = HfReader(folder / f"{size}.hf"), HfReader(target)
            kept = registry.table_of(tiny(size)).aside_names() if tiny(size).prediction_layers else set()
            assert after.tensors.keys() == before.tensors.keys() - kept
            for name in after.tensors:
                assert b"".join(map(bytes, before.rows(name))) == b"".join(map(bytes, after.rows(name))), name


def check_gradients(a: Architecture, reader: HfReader, theirs: dict[str, torch.Tensor]) -> float:
    """The largest difference, relative to the largest gradient."""
    differences = []
    # Gradients are brought back as if they were weights: those held less one come with one added.
    plus_one = {s.name for entry in registry.table_of(a).entries() if entry.less_one for s in entry.sources}
    largest = max(gradient.abs().max() for gradient in theirs.values())
    # Not trained by gradients, though kept with the weights.
    assert {name for name in reader.tensors if not name.endswith("e_score_correction_bias")} == theirs.keys()
    for name, expected in theirs.items():
        data = bytearray(b"".join(map(bytes, reader.rows(name))))
        ours = torch.frombuffer(data, dtype=torch.float32).view(reader.tensors[name].shape)
        differences.append(((ours - int(name in plus_one) - expected).abs().max() / largest).item())
        assert differences[-1] < GRADIENT_TOLERANCE, name
        assert expected.abs().max() > 0, name
    return max(differences)


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
                return replace(rule, layout=Transposed(rows=Swapped(rule.layout.rows, *runs)))
            return replace(rule, layout=Swapped(rule.layout, *runs))

        return wrong

    if a.gated and len(a.moe_layers) < a.num_layers:
        yield "gate and up", swap("mlp.linear_fc1.weight", (0, a.ffn_hidden_size, a.ffn_hidden_size))
    if experts := a.experts:
        size = experts.ffn_hidden_size
        yield "gate and up of experts", swap("experts.experts.linear_fc1.weight", (0, size, size))
        yield "rows of the router", swap("router.weight", (0, 1, 1))
        if any("{expert}" in source.name for rule in registry.table_of(a).rules for source in rule.sources):
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
        half = 1 if a.rotary_interleaved else a.rotated // (2 * a.rotary_streams)
        pairs = [(h, h + step, 1) for h in heads] + [(h + half, h + half + step, 1) for h in heads]
        yield "pairs of the rotation", swap("linear_qkv.weight", *pairs)
    if a.qk_norm_scope == "each_head":
        yield "norms of another head", another_head
    if a.positions == "learned":
        yield "positions", swap("position_embeddings.weight", (0, 100, 100))


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
    yield "the norm held as it is stored", lambda rule: replace(rule, less_one=False)


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


def another_expert(rule: Rule) -> Rule:
    """Down projections, each of them the next expert's."""
    if not rule.megatron.endswith("experts.experts.linear_fc2.weight"):
        return rule

    return exchanged(rule, "expert")


def exchanged(rule: Rule, axis: str) -> Rule:
    """The rule with the sources of every two neighbours on the axis exchanged."""

    class Next(str):
        __slots__ = ()

        def format(self, *args: object, **index: Any) -> str:
            return str.format(self, **index | {axis: index[axis] ^ 1})

    return replace(rule, sources=tuple(replace(source, name=Next(source.name)) for source in rule.sources))


# Architecture's fields that change no tensor, and what a careless reader of the configuration takes them for.
CARELESS: dict[str, Any] = {
    "norm": {"rmsnorm_1p": "rmsnorm"},
    "residual": {"parallel": "sequential", "normed": "sequential"},
    "activation": {
        **{"swiglu": "geglu", "geglu_tanh": "swiglu", "quick_geglu": "swiglu"},
        **{"gelu": "relu", "gelu_tanh": "relu"},
    },
    "glu_offset": 0.0,
    "alibi": {"rounded": "exact"},
    "rope_theta": 500.0,
    "rotary_interleaved": False,
    "rotary_streams": 1,
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
    assert CARELESS.keys() <= {field.name for field in fields(a)}
    for name, wrong in CARELESS.items():
        value = getattr(a, name)
        other = wrong.get(value, value) if isinstance(wrong, dict) else wrong
        if name == "rope_theta" and a.positions != "rope":
            continue
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
    from shared.model import alibi, gpt

    slopes, inputs = alibi.slopes, gpt.prefix_inputs
    if a.positions == "alibi":
        yield "slopes of other heads", alibi, "slopes", lambda heads: slopes(heads).roll(1)
    if a.prefix:
        yield "a text that does not see itself", gpt, "prefix_inputs", lambda *given: (inputs(*given)[0], None)


def test_wrong_modules_are_found_out(
    write_architecture: Any, convert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subtests: pytest.Subtests
) -> None:
    for size, mistakes in ((size, list(mistakes_of_modules(tiny(size)))) for size in SIZES):
        source, target = tmp_path / f"{size}.hf", tmp_path / f"{size}.megatron"
        if mistakes:
            convert("to-megatron", "--source", write_architecture(source, tiny(size)), "--target", target)
        for name, module, function, wrong in mistakes:
            with subtests.test(name, size=size), monkeypatch.context() as patch:
                patch.setattr(module, function, wrong)
                words = ("--source", source, "--target", target, *code_of(tiny(size)))
                assert "logits differ by" in convert("verify", *words).err


def mistaken(
    family: Family, a: Architecture, change: Callable[[Rule], Rule] = lambda rule: rule, **wrong: Any
) -> Family:
    right = family.table(a)
    table = replace(right, rules=tuple(change(rule) for rule in right.rules))
    return replace(family, table=lambda _: table, read=lambda given: replace(family.read(given), **wrong))


def test_one_mistake_is_found_out(
    size: str,
    write_architecture: Any,
    convert: Any,
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
    architecture = tiny(size)
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
                words = ("--source", source, "--target", target, "--positions", "256", *code_of(architecture))
                answer = convert("verify", *words)
                assert answer.code == 1
                assert "logits differ by" in answer.err
                figures["caught"] += 1
        assert figures["caught"] == figures["of"]
