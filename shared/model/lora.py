"""LoRA adapters on the linear layers of a built model, whatever backend built them.

A layer gets the class that adds the adapters' product to its own output, ahead of the class it has: its own arithmetic
(weight in FP8, TransformerEngine's GEMM) stays its own. The product is added after the layer's reduction, so bias and
`skip_bias_add` stay Megatron-Core's.

Cuts over tensor-parallel ranks, and what is communicated (S sequence, B batch, R rank times matrices):

    layer       A                 B                 SP                                    TP without SP
    column      whole             cut by rows       gather [S, B, R] along the sequence   all-reduce of its gradient
    row         cut by columns    whole             reduce-scatter [S, B, R]              all-reduce [S, B, R]
    expert      whole             whole             -                                     -   (ETP 1)

A whole tensor under SP sees a part of the sequence on each rank: its attribute `sequence_parallel` makes Megatron-Core sum its
gradient. Not so an expert's: its ranks hold different experts.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from megatron.core import parallel_state
from megatron.core.ssm.utils import _split_tensor_factory
from megatron.core.tensor_parallel import get_cuda_rng_tracker, set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import get_expert_parallel_rng_tracker_name
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch.nn import functional

from shared.families import registry
from shared.mapping.adapters import AdaptedLinear, LoraSettings, adapted_linears, adapter_copies, peft_names
from shared.model.experts import GroupedExperts
from shared.model.gpt import LanguageModel

NAMES = ("lora_A", "lora_B")  # of the parameters
_KEY = re.compile(r".*\.lora_[AB](\.\w+)?")


class _Adapted:
    """Comes before a parallel linear layer's class, and adds the adapters' product to its output."""

    linear: AdaptedLinear
    settings: LoraSettings
    column: bool
    is_expert: bool

    def attach(self, linear: AdaptedLinear, settings: LoraSettings, seed: int) -> None:
        """Make the parameters: A uniform in `+- 1 / sqrt(in)` as PEFT's, the same numbers at every layout, and B zero."""
        layer = cast(Any, self)
        weight, group = layer.weight, layer.tp_group
        self.linear, self.settings = linear, settings
        self.column = weight.partition_dim == 0
        cut = {"lora_A": None if self.column else 1, "lora_B": 0 if self.column else None}
        rows = [_local(owners, group) for owners in self._owners()] if self.column else self._owners()
        self.sections = [int((part >= 0).sum()) for part in rows]  # rows of B in each block of the weight
        owners = torch.cat(rows)
        fan_in, r = linear.columns, settings.rank
        values = {
            "lora_A": _uniform(f"{seed} {linear.module}", len(linear.matrices) * r, fan_in),
            "lora_B": torch.zeros(int((owners >= 0).sum()), r),
        }
        if not self.column:
            values["lora_A"] = values["lora_A"].chunk(group.size(), 1)[group.rank()]
        for name, value in values.items():
            parameter = torch.nn.Parameter(value.to(weight.device, weight.dtype, copy=True).contiguous())
            axis = cut[name]
            if axis is not None:
                set_tensor_model_parallel_attributes(parameter, True, axis, 1)
            parameter.sequence_parallel = axis is None and layer.sequence_parallel and not self.is_expert
            parameter.allreduce = getattr(weight, "allreduce", True)
            layer.register_parameter(name, parameter)
        mask, place = _mixing(owners, len(linear.matrices))
        for name, buffer in (("lora_mask", mask), ("lora_place", place)):
            layer.register_buffer(name, None if buffer is None else buffer.to(weight.device), persistent=False)

    def set_adapter(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Set this rank's parts of A `[matrices * rank, in]` and of B `[rows of the whole layer, rank]`."""
        layer = cast(Any, self)
        group = layer.tp_group
        if self.column:
            sizes = [int((owners >= 0).sum()) for owners in self._owners()]
            b = torch.cat([_local(block, group) for block in b.split(sizes)])
        else:
            a = a.chunk(group.size(), 1)[group.rank()]
        layer.lora_A.copy_(a)
        layer.lora_B.copy_(b)

    def _owners(self) -> list[torch.Tensor]:
        """Per block of the weight's rows that is cut over ranks by itself: the matrix of each row, -1 without an adapter."""
        layer = cast(Any, self)
        blocks: list[torch.Tensor] = []
        for piece in self.linear.pieces:
            owners = torch.full((piece.rows,), -1)
            for segment in piece.segments:
                owners[segment.target_row : segment.target_row + segment.rows] = segment.source
            gated = layer.config.gated_linear_unit and self.linear.module.endswith("linear_fc1")
            blocks += owners.chunk(2) if gated else [owners]
        return blocks

    def forward(self, input_: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As the layer's own."""
        output, bias = super().forward(input_, *args, **kwargs)  # type: ignore[misc]
        return output + self._product(input_), bias

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        layer = cast(Any, self)
        low = functional.linear(self.dropped(x), layer.lora_A)
        group = layer.tp_group
        if group.size() > 1:
            if self.column:
                low = (
                    gather_from_sequence_parallel_region(low, tensor_parallel_output_grad=True, group=group)
                    if layer.sequence_parallel
                    else copy_to_tensor_model_parallel_region(low, group=group)
                )
            else:
                reduce = (
                    reduce_scatter_to_sequence_parallel_region
                    if layer.sequence_parallel
                    else reduce_from_tensor_model_parallel_region
                )
                low = reduce(low, group=group)
        return functional.linear(low * self.settings.scale, self._mixed())

    def _mixed(self) -> torch.Tensor:
        """B `[rows of the weight, rank * matrices]`: a row has numbers at its matrix's columns only.

        One GEMM with zeros in it instead of one for each matrix and a permutation of activations.
        """
        layer = cast(Any, self)
        mixed: torch.Tensor = layer.lora_B
        if layer.lora_mask is not None:
            mixed = (mixed[:, None] * layer.lora_mask[..., None].to(mixed.dtype)).flatten(1)
        if layer.lora_place is not None:
            mixed = functional.pad(mixed, (0, 0, 0, 1))[layer.lora_place]  # a row of zeros for rows without an adapter
        return mixed

    def dropped(self, x: torch.Tensor) -> torch.Tensor:
        """The adapter's input with dropout. Ranks with the same input draw the same numbers."""
        layer = cast(Any, self)
        if not (self.settings.dropout and layer.training):
            return x
        if self.is_expert:
            fork = get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name())
        elif self.column and not layer.sequence_parallel:
            fork = contextlib.nullcontext()
        else:
            fork = get_cuda_rng_tracker().fork()
        with fork:
            return functional.dropout(x, self.settings.dropout)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The layer's, with the cuts of A and B."""
        assert metadata is not None
        layer = cast(Any, self)
        made: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        groups = {"tp_group": layer.tp_group, "dp_cp_group": metadata["dp_cp_group"]}
        axes = {"lora_B": 0} if self.column else {"lora_A": 1}
        made |= make_sharded_tensors_for_checkpoint(
            dict(zip(NAMES, (layer.lora_A, layer.lora_B), strict=True)), prefix, axes, sharded_offsets, **groups
        )
        key = f"{prefix}lora_B"
        parts = [piece.part.removeprefix(".") for piece in self.linear.pieces]
        if len(parts) > 1:
            kept = [(size, part) for size, part in zip(self.sections, parts, strict=True) if size]
            sizes, names = ([each[place] for each in kept] for place in (0, 1))
            made[key] = _split_tensor_factory(made[key], sizes, names, 0)
        elif len(self.sections) == 2 and all(self.sections):  # gate and up, each cut over ranks
            single = metadata.get("singleton_local_shards", False)
            made[key] = apply_swiglu_sharded_factory(
                made[key], sharded_offsets, single, tp_group=layer.tp_group, dp_group=metadata["dp_cp_group"]
            )
        return made


_classes: dict[type, type] = {}


def _adapted_class(linear: type) -> type:
    """The class of `linear` with adapters, one for each."""
    return _classes.setdefault(linear, type(f"Lora{linear.__name__}", (_Adapted, linear), {}))


def attach(chunks: Sequence[LanguageModel], settings: LoraSettings, seed: int) -> None:
    """Give the linear layers of this rank's chunks their adapters. Every rank calls this.

    Raises:
        UserError: a target names no linear layer; experts are cut by expert tensor parallelism.
    """
    architecture = chunks[0].architecture
    expert_tensor = parallel_state.get_expert_tensor_parallel_world_size()
    linears = adapted_linears(registry.table_of(architecture), settings.targets, expert_tensor=expert_tensor)
    for chunk in chunks:
        for name, module in list(_linears(chunk)):
            if name in linears:
                module.__class__ = _adapted_class(type(module))
                module.is_expert = ".experts.experts." in name
                module.attach(linears[name], settings, seed)
        for module in chunk.modules():
            if isinstance(module, GroupedExperts):
                module.place_evenly(NAMES)


@torch.no_grad()
def fill(chunks: Sequence[LanguageModel], tensors: Mapping[str, torch.Tensor]) -> None:
    """Set this rank's adapters from the tensors of adapter_model.safetensors, of the shapes of `peft_shapes`."""
    names: dict[str, str] = {}
    for module in adapted_modules(chunks):
        linear, rank = module.linear, module.settings.rank
        names = names or peft_names(adapted_linears(registry.table_of(chunks[0].architecture), module.settings.targets))
        whole = {"lora_A": torch.empty(len(linear.matrices) * rank, linear.columns)}
        whole |= {f"lora_B{piece.part}": torch.empty(piece.adapted_rows, rank) for piece in linear.pieces}
        for copy in adapter_copies(linear, names, rank):
            whole[copy.tensor][copy.rows] = tensors[copy.peft][copy.block].float()
        module.set_adapter(whole.pop("lora_A"), torch.cat(list(whole.values())))


def is_adapter(name: str) -> bool:
    """Whether a parameter's name or a checkpoint key is an adapter's."""
    return _KEY.fullmatch(name) is not None


def has_adapters(chunks: Sequence[torch.nn.Module]) -> bool:
    """Whether a model has adapters: on some rank. Every rank calls this."""
    own = any(isinstance(module, _Adapted) for chunk in chunks for module in chunk.modules())
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, own)
    return any(gathered)


def adapters_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """The adapters' entries of a chunk's sharded state dict."""
    return {key: entry for key, entry in state.items() if is_adapter(key)}


def trained_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """What a run with adapters saves of a chunk's sharded state dict: the adapters, and the extra states of all layers."""
    return {key: entry for key, entry in state.items() if is_adapter(key) or key.endswith("_extra_state")}


def adapted_modules(chunks: Sequence[torch.nn.Module]) -> Iterator[Any]:
    """The layers with adapters on this rank."""
    return (module for chunk in chunks for module in chunk.modules() if isinstance(module, _Adapted))


def _linears(chunk: LanguageModel) -> Iterator[tuple[str, Any]]:
    """The modules of a chunk's decoder with their names over all pipeline stages and expert-parallel ranks."""
    first = {
        name: parallel_state.get_expert_model_parallel_rank() * module.num_local_experts
        for name, module in chunk.named_modules()
        if isinstance(module, GroupedExperts)
    }
    for name, module in chunk.named_modules():
        found = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
        if found is None:
            continue
        rest = found[2]
        if expert := re.fullmatch(r"(?P<experts>.+)\.local_experts\.(?P<index>\d+)\.(?P<linear>\w+)", rest):
            index = first[f"decoder.layers.{found[1]}.{expert['experts']}"] + int(expert["index"])
            rest = f"{expert['experts']}.experts.{index}.{expert['linear']}"
        yield f"decoder.layers.{chunk.decoder.layers[int(found[1])].layer_number - 1}.{rest}", module


def _local(rows: torch.Tensor, group: Any) -> torch.Tensor:
    """This rank's part of rows that are cut evenly."""
    return rows.chunk(group.size())[group.rank()]


def _mixing(owners: torch.Tensor, matrices: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What turns the rows of B into those of the weight.

    Returns:
        mask: bool `[rows of B, matrices]`, the matrix of each row; None with one matrix.
        place: int64 `[rows of the weight]`, each one's row of B, one past its end without an adapter; None: the same rows.
    """
    adapted = owners >= 0
    mask = functional.one_hot(owners[adapted], matrices).bool() if matrices > 1 else None
    if bool(adapted.all()):
        return mask, None
    return mask, torch.where(adapted, adapted.cumsum(0) - 1, adapted.sum())


def _uniform(seed: str, rows: int, columns: int) -> torch.Tensor:
    """`[rows, columns]`, uniform in `+- 1 / sqrt(columns)` (Kaiming's with a = sqrt(5)), from a seed of any text."""
    digest = hashlib.sha256(seed.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return (2 * torch.rand(rows, columns, generator=generator) - 1) / columns**0.5
