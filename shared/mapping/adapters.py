"""Which matrices of a model have LoRA adapters, under the names of Hugging Face and of Megatron-Core.

One adapter `A [rank, in]`, `B [out, rank]` per Hugging Face matrix, as PEFT has it: three for q, k and v apart, one for a fused
`query_key_value`. A Megatron-Core linear layer made of several matrices holds their adapters as two tensors:

    lora_A [matrices * rank, in]   the matrices' A, one after another
    lora_B [rows, rank]            the matrices' B, row by row where the layer's weight has their rows

So B has the weight's layout and its tensor-parallel cut, and rows of one matrix never see another matrix's A.

transformers holds the experts of a layer as one parameter `[experts, ..]`. PEFT (`target_parameters`) adapts it with
`A [experts * rank, in]` and `B [out, rank * experts]`; here each expert has its own `A [rank, in]` and `B [out, rank]`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from shared.errors import UserError
from shared.mapping.key_form import KeyForm
from shared.mapping.layout import Segment, Shape
from shared.mapping.rule import Entry, Rule, Table

ALL_LINEAR = "all-linear"
PEFT_PREFIX = "base_model.model."
_LINEAR = re.compile(r"(?P<module>decoder\..+\.(linear_\w+|in_proj|out_proj))\.weight(?P<part>\.\w+)?")
# Files of a multimodal model and transformers' class name the language model differently.
_CLASS_PREFIXES = {"language_model.model.": "model.language_model."}
# In MoE models PEFT takes these names in target_modules for the experts of transformers 4, and renames them to the fused
# parameters of transformers 5 (peft/utils/transformers_weight_conversion.py). As target_parameters it leaves them alone.
_RENAMED = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """A LoRA adapter (arXiv:2106.09685): `W + scale * B @ A`, only A and B are trained."""

    rank: int
    alpha: float
    rslora: bool = False  # scale alpha / sqrt(rank) (arXiv:2312.03732) instead of alpha / rank
    dropout: float = 0.0  # of the adapter's input
    targets: tuple[str, ...] = (ALL_LINEAR,)  # Hugging Face names, or suffixes of them: q_proj

    @property
    def scale(self) -> float:
        """Factor of `B @ A`."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True, kw_only=True)
class AdaptedMatrix:
    """A Hugging Face matrix with an adapter; of experts, one expert's."""

    name: str  # transformers' module, or parameter of experts: model.layers.0.self_attn.q_proj
    shape: Shape  # [out, in]
    expert: int | None = None  # its index
    experts: int = 1  # that share the parameter

    @property
    def suffix(self) -> str:
        """The name without layer: `q_proj`, `mlp.experts.down_proj`."""
        return ".".join(self.name.split(".")[-3:]) if self.expert is not None else self.name.rpartition(".")[2]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A checkpoint tensor of a linear layer's weight: the whole, or a part of a gated delta net's in_proj."""

    part: str  # suffix of its key: "", ".query"
    rows: int  # of the weight
    segments: tuple[Segment, ...]  # their sources: indices into `AdaptedLinear.matrices`, -1 without an adapter

    @property
    def adapted_rows(self) -> int:
        """Rows of B."""
        return sum(segment.rows for segment in self.segments if segment.source >= 0)

    def placed(self) -> Iterator[tuple[int, Segment]]:
        """The adapted segments, each with its first row in B."""
        row = 0
        for segment in self.segments:
            if segment.source >= 0:
                yield row, segment
                row += segment.rows


@dataclass(frozen=True, kw_only=True)
class AdaptedLinear:
    """A linear layer of Megatron-Core with the adapters of its matrices."""

    module: str  # its global name: decoder.layers.0.self_attention.linear_qkv, ..experts.experts.3.linear_fc1
    key: str  # the name in checkpoint keys, which may stack layers and experts
    stack: Shape  # sizes of the stacked axes
    index: Shape  # this layer's index on them
    matrices: tuple[AdaptedMatrix, ...]
    pieces: tuple[Piece, ...]

    @property
    def columns(self) -> int:
        """Input features."""
        return self.matrices[0].shape[1]

    def parameters(self, rank: int) -> int:
        """Numbers in A and B."""
        return rank * (len(self.matrices) * self.columns + sum(piece.adapted_rows for piece in self.pieces))

    def tensors(self, rank: int) -> dict[str, Shape]:
        """Keys and shapes in a checkpoint, stacked axes included."""
        shapes = {f"{self.key}.lora_A": (*self.stack, len(self.matrices) * rank, self.columns)}
        for piece in self.pieces:
            if piece.adapted_rows:
                shapes[f"{self.key}.lora_B{piece.part}"] = (*self.stack, piece.adapted_rows, rank)
        return shapes


@dataclass(frozen=True, kw_only=True)
class AdapterCopy:
    """Rows of a tensor here that are a block of a tensor of PEFT."""

    tensor: str  # lora_A, or lora_B with the piece's part
    rows: slice
    peft: str  # name in adapter_model.safetensors
    block: tuple[slice, slice]  # rows and columns


def adapter_copies(linear: AdaptedLinear, names: Mapping[str, str], rank: int) -> Iterator[AdapterCopy]:
    """How a layer's adapters relate to PEFT's tensors: every number of both exactly once.

    `names`: of `peft_names`.
    """
    for number, matrix in enumerate(linear.matrices):
        place = (matrix.expert or 0) * rank
        yield AdapterCopy(
            tensor="lora_A",
            rows=slice(number * rank, (number + 1) * rank),
            peft=f"{names[matrix.name]}.lora_A.weight",
            block=(slice(place, place + rank), slice(None)),
        )
    for piece in linear.pieces:
        for row, segment in piece.placed():
            matrix = linear.matrices[segment.source]
            last = segment.source_row + (segment.rows - 1) * segment.step + 1
            yield AdapterCopy(
                tensor=f"lora_B{piece.part}",
                rows=slice(row, row + segment.rows),
                peft=f"{names[matrix.name]}.lora_B.weight",
                block=(
                    slice(segment.source_row, last, segment.step),
                    slice(matrix.expert or 0, None, matrix.experts),
                ),
            )


def peft_shapes(linears: Mapping[str, AdaptedLinear], rank: int) -> dict[str, Shape]:
    """Names and shapes in adapter_model.safetensors."""
    names = peft_names(linears)
    shapes: dict[str, Shape] = {}
    for linear in linears.values():
        for matrix in linear.matrices:
            rows, columns = matrix.shape
            shapes[f"{names[matrix.name]}.lora_A.weight"] = (matrix.experts * rank, columns)
            shapes[f"{names[matrix.name]}.lora_B.weight"] = (rows, rank * matrix.experts)
    return dict(sorted(shapes.items()))


def peft_names(linears: Mapping[str, AdaptedLinear]) -> dict[str, str]:
    """Matrix -> PEFT's module. Of two adapted parameters of one module, PEFT wraps the second around the first."""
    matrices = {matrix.name: matrix for linear in linears.values() for matrix in linear.matrices}
    names = {}
    for name, matrix in matrices.items():
        if matrix.expert is None:
            names[name] = PEFT_PREFIX + name
            continue
        module, _, parameter = name.rpartition(".")
        inner = parameter == "gate_up_proj" and f"{module}.down_proj" in matrices
        names[name] = PEFT_PREFIX + module + ".base_layer" * inner
    return names


def peft_targets(linears: Mapping[str, AdaptedLinear], table: Table) -> dict[str, str | list[str]]:
    """`target_modules` and `target_parameters` of adapter_config.json.

    Suffixes of names as a user would write them, or a regular expression where the suffixes fit modules without an adapter:
    the projections of a vision tower.
    """
    matrices = [matrix for linear in linears.values() for matrix in linear.matrices]
    parameters = {matrix.suffix for matrix in matrices if matrix.expert is not None}
    modules = {matrix.name for matrix in matrices if matrix.expert is None}
    if any("expert" in rule.axes for rule in table.rules):
        renamed = {name for name in modules if name.rpartition(".")[2] in _RENAMED}
        parameters |= {".".join(name.split(".")[-2:]) + ".weight" for name in renamed}
        modules -= renamed
    suffixes = sorted({name.rpartition(".")[2] for name in modules})
    # transformers' class has neither MTP layers nor modules of single experts.
    kept = tuple(rule for rule in table.rules if "expert" not in rule.axes and not rule.megatron.startswith("mtp."))
    names = replace(table, rules=kept, alternatives=()).names() | table.pass_through_names()
    others = {_matrix_name(_class_name(name)) for name in names} - modules
    found: dict[str, str | list[str]] = {"target_modules": suffixes}
    if any(_is_target(name, suffixes) for name in others):
        patterns = sorted({re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(name)) for name in modules})
        found["target_modules"] = "|".join(patterns)
    if parameters:
        found["target_parameters"] = sorted(parameters)
    return found


def adapted_linears(table: Table, targets: Sequence[str], *, expert_tensor: int = 1) -> dict[str, AdaptedLinear]:
    """The linear layers with adapters, by global name.

    Args:
        table: the family's tensor table of the model.
        targets: names of Hugging Face matrices or suffixes of them, or `all-linear`: the linear layers of attention and MLP,
            experts included, without router, embedding, head and MTP.
        expert_tensor: expert tensor parallel size.

    Raises:
        UserError: a target names no such matrix, or one layer's; experts with adapters are cut.
    """
    if target := next((each for each in targets if any(map(str.isdigit, each.split(".")))), None):
        raise UserError(
            f"--lora-targets: {target} names a layer or expert, and all have adapters; leave the number out"
        )
    table = _with_class_names(table)
    form = KeyForm(by_layer=True, by_expert=True)
    groups: dict[str, list[tuple[Entry, str, str]]] = {}  # module -> entries, their key and part
    for entry, apart in zip(table.entries(), form.table(table).entries(), strict=True):
        named, stored = _LINEAR.fullmatch(apart.key), _LINEAR.fullmatch(entry.key)
        if named and stored and entry.sources:
            part = stored["part"] or ""
            groups.setdefault(named["module"], []).append((entry, stored["module"], part))
    found = {module: linear for module, group in groups.items() if (linear := _adapted(module, group, targets))}
    known = {_matrix_name(source.name) for group in groups.values() for entry, *_ in group for source in entry.sources}
    for target in targets:
        if target != ALL_LINEAR and not any(_is_target(name, (target,)) for name in known):
            names = sorted({name.rpartition(".")[2] for name in known})
            raise UserError(f"--lora-targets: the model has no linear layer {target}; it has {', '.join(names)}")
    if expert_tensor > 1 and any(".experts.experts." in module for module in found):
        raise UserError(
            "LoRA on experts needs --expert-tensor-parallel 1: the adapters of an expert are not cut; or leave experts out of "
            "--lora-targets"
        )
    return found


def _with_class_names(table: Table) -> Table:
    """The table with the names of transformers' class, which holds the experts of a layer as one parameter."""
    fused = {rule.megatron: rule for rule in table.alternatives if "expert" in rule.axes}

    def kept(rule: Rule) -> bool:
        return rule.megatron.startswith("decoder.layers.") and bool(rule.sources)

    rules = tuple(fused.get(rule.megatron, rule) for rule in table.rules if kept(rule))
    return replace(table, rules=rules, alternatives=()).renamed(_class_name)


def _class_name(name: str) -> str:
    prefix = next((prefix for prefix in _CLASS_PREFIXES if name.startswith(prefix)), "")
    return _CLASS_PREFIXES.get(prefix, "") + name.removeprefix(prefix)


def _matrix_name(source: str) -> str:
    return source.removesuffix(".weight")


def _is_target(name: str, targets: Iterable[str]) -> bool:
    """As PEFT matches a list of targets."""
    return any(target == ALL_LINEAR or name == target or name.endswith(f".{target}") for target in targets)


def _adapted(module: str, group: Sequence[tuple[Entry, str, str]], targets: Sequence[str]) -> AdaptedLinear | None:
    matrices: dict[str, AdaptedMatrix] = {}
    for entry, *_ in group:
        for source in entry.sources:
            name = _matrix_name(source.name)
            shape = source.shape[::-1] if entry.transposed else source.shape
            if _is_target(name, targets):
                expert = source.index[0] if source.stacked_axes else None
                experts = source.stack[0] if source.stacked_axes else 1
                matrices.setdefault(name, AdaptedMatrix(name=name, shape=shape, expert=expert, experts=experts))
    if not matrices:
        return None
    numbers = {name: number for number, name in enumerate(matrices)}
    pieces = []
    for entry, _, part in group:
        own = [numbers.get(_matrix_name(source.name), -1) for source in entry.sources]
        segments = tuple(
            replace(segment, source=own[segment.source] if segment.source >= 0 else -1) for segment in entry.segments
        )
        pieces.append(Piece(part=part, rows=entry.shape[0], segments=segments))
    first, key, _ = group[0]
    return AdaptedLinear(
        module=module,
        key=key,
        stack=first.stack,
        index=first.index,
        matrices=tuple(matrices.values()),
        pieces=tuple(pieces),
    )
