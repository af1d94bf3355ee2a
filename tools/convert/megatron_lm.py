"""Read Megatron-LM's per-rank checkpoints as torch_dist: TP shards joined, layers stacked.

No bytes are copied. A joined tensor is a list of extents in the rank files, like a torch_dist tensor is a list of chunks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path

from shared.architecture.architecture import Architecture, Attention
from shared.checkpoint.copy.blocks import OpenFiles
from shared.checkpoint.copy.byte_view import Extent, ExtentView, view_of
from shared.checkpoint.copy.worker_pool import Task
from shared.checkpoint.dtypes import Dtype, weight_dtype
from shared.checkpoint.formats.megatron_lm_ranks import Ranks, read_ranks
from shared.checkpoint.formats.safetensors_file import TensorInfo
from shared.errors import UserError
from shared.families.common.gated_delta_net import IN_PROJ_PARTS
from shared.mapping.layout import Shape
from shared.mapping.rule import Entry, Table
from tools.convert.megatron_lm_names import HEAD, Place, place_of, torch_dist_key

_EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True, kw_only=True)
class StackedTensor:
    """A tensor over all layers and ranks."""

    dtype: Dtype
    shape: Shape
    place: str


class MegatronLmReader:
    """Tensors of one iteration under torch_dist's keys.

    UserError if the rank files do not fit the architecture.
    """

    splits_columns = True  # at TP > 1

    def __init__(self, directory: Path, architecture: Architecture, table: Table) -> None:
        self.directory = directory
        self._files = OpenFiles()
        self._ranks = read_ranks(directory)
        self._architecture = architecture
        _check_arguments(self._ranks, architecture, directory)
        self._entries = {(entry.key, entry.index): entry for entry in table.entries()}
        self._known = {key for key, _ in self._entries}
        self._parts: dict[tuple[str, Shape], list[TensorInfo]] = {}  # (key, index) -> one tensor per TP rank
        self._tied_copy: list[TensorInfo] = []
        self.tensors: dict[str, StackedTensor] = {}
        self._sort()
        self._account()

    def _sort(self) -> None:
        """Collect the TP shards of each slice."""
        ranks = self._ranks
        parts: dict[Place, dict[int, TensorInfo]] = defaultdict(dict)
        for tensor in range(ranks.tensor):
            for expert in range(ranks.expert):
                for place, info in self._of_ranks(tensor, expert):
                    parts[place].setdefault(tensor, info)
        for place, shards in parts.items():
            listed = [shards[rank] for rank in sorted(shards)]
            if place.key == HEAD and self._architecture.head.tied:
                self._tied_copy = listed
                continue
            key, index = torch_dist_key(place, self._known)
            if len({(info.dtype, info.shape) for info in listed}) > 1 or len(listed) != ranks.tensor:
                raise UserError(f"{listed[0].place}: {listed[0].name} differs between ranks in dtype or shape")
            self._parts[key, index] = listed

    def _of_ranks(self, tensor: int, expert: int) -> Iterator[tuple[Place, TensorInfo]]:
        """Tensors of a TP and EP rank, over all pipeline stages, with global layer and expert indices."""
        stages = [self._ranks.at[tensor, stage, expert].chunks for stage in range(self._ranks.pipeline)]
        before, experts = 0, self._architecture.moe.experts // self._ranks.expert if self._architecture.moe else 0
        for virtual in range(max(map(len, stages))):
            for chunks in (chunks for chunks in stages if virtual < len(chunks)):
                layers = 0
                for name, info in chunks[virtual].items():
                    place = place_of(name)
                    if place.layer is not None:
                        layers = max(layers, place.layer + 1)
                    for part, piece in self._pieces(place, info):
                        yield part.shifted(before, expert * experts), piece
                before += layers

    def _pieces(self, place: Place, info: TensorInfo) -> Iterator[tuple[Place, TensorInfo]]:
        """The tensor; a gated delta net's projection or convolution is split as in torch_dist."""
        delta = self._architecture.delta_net
        if delta is None or not place.key.endswith((".in_proj.weight", ".conv1d.weight")):
            yield place, info
            return
        k, v, heads = (size // self._ranks.tensor for size in (delta.key_size, delta.value_size, delta.value_heads))
        sizes = (k, k, v) if ".conv1d." in place.key else (k, k, v, v, heads, heads)
        if info.shape[:1] != (sum(sizes),):
            raise UserError(f"{info.place}: {info.name} is {list(info.shape)}, config.json asks for {sum(sizes)} rows")
        start = info.start
        for part, rows in zip(IN_PROJ_PARTS, sizes, strict=False):
            piece = replace(info, shape=(rows, *info.shape[1:]), start=start, size=rows * info.row_bytes)
            yield replace(place, key=f"{place.key}.{part}"), piece
            start += piece.size

    def _account(self) -> None:
        """Stack the slices of each tensor."""
        slices: dict[str, list[tuple[Shape, Shape, str]]] = defaultdict(list)  # key -> (index, shape, dtype)
        for (key, index), parts in self._parts.items():
            slices[key].append((index, self._shape(key, index), parts[0].dtype))
        for key, found in slices.items():
            first = self._parts[key, found[0][0]][0]
            dtype = weight_dtype(first.dtype, first.name, first.place)
            if key not in self._known:  # reported by account_targets
                self.tensors[key] = StackedTensor(dtype=dtype, shape=first.shape, place=str(self.directory))
                continue
            shapes, types = {shape for _, shape, _ in found}, {dtype for *_, dtype in found}
            if len(shapes) > 1 or len(types) > 1:
                raise UserError(f"{first.place}: {key} differs between layers in dtype or shape")
            stack = tuple(max(places) + 1 for places in zip(*(index for index, *_ in found), strict=True))
            if prod(stack) != len(found):
                raise UserError(
                    f"{self.directory}: {key} is in {len(found)} of {prod(stack)} layers; fetch the ranks again"
                )
            self.tensors[key] = StackedTensor(dtype=dtype, shape=(*stack, *shapes.pop()), place=str(self.directory))

    def _shape(self, key: str, index: Shape) -> Shape:
        parts = self._parts[key, index]
        own = parts[0].shape
        entry = self._entries.get((key, index))
        if entry is None or len(parts) == 1:
            return own
        wanted, count = entry.shape, len(parts)
        if entry.padded:
            return (own[0] * count, *own[1:])
        if own == wanted or (own[0] * count, *own[1:]) == wanted or (own[0], *(n * count for n in own[1:])) == wanted:
            return wanted
        raise UserError(
            f"{parts[0].place}: {parts[0].name} is {list(own)} on each of {count} ranks, config.json asks for "
            f"{list(wanted)} in all"
        )

    def view(self, key: str, index: Shape) -> ExtentView:
        """The byte view of `tensor[index]`."""
        parts, entry = self._parts[key, index], self._entries[key, index]
        shape, own = self._shape(key, index), parts[0].shape
        width = prod(shape[1:]) * self.tensors[key].dtype.size
        extents = tuple(self._extents(key, entry, parts, shape, own))
        return ExtentView(name=key, rows=shape[0], width=width, extents=extents)

    def _extents(self, key: str, entry: Entry, parts: list[TensorInfo], shape: Shape, own: Shape) -> Iterator[Extent]:
        if own == shape:  # replicated
            parts = parts[:1]
        row_parallel = own[:1] == shape[:1]  # sharded along the input: columns
        for rank, part in enumerate(parts):
            place = part.start
            for row, rows in self._runs(key, rank, own[0], 1 if row_parallel else len(parts)):
                left = rank * part.row_bytes if row_parallel else 0
                yield Extent(file=part.file, start=place, row=row, rows=rows, left=left, width=part.row_bytes)
                place += rows * part.row_bytes

    def _runs(self, key: str, rank: int, rows: int, ranks: int) -> Iterator[tuple[int, int]]:
        """Contiguous runs of a rank's rows, in order: first row in the joined tensor, number of rows."""
        first = rank * rows if ranks > 1 else 0
        if self._architecture.feed_forward.gated and ".linear_fc1." in key and ".layer_norm_" not in key:
            half = rows // 2  # a rank: [gate ; up]
            yield rank * half if ranks > 1 else 0, half
            yield half * ranks + (rank * half if ranks > 1 else 0), half
        elif ".linear_qkv." in key and ".layer_norm_" not in key and self._ranks.version < 2:
            size = self._architecture.attention.head_dim
            heads = rows // (3 * size)
            if self._ranks.version < 1:  # [3, heads, head_dim]
                for part in range(3):
                    for head in range(heads):
                        yield first + (3 * head + part) * size, size
            else:  # [heads, head_dim, 3]
                for head in range(heads):
                    for element in range(size):
                        for part in range(3):
                            yield first + (3 * head + part) * size + element, 1
        else:
            yield first, rows

    def files_of(self, key: str, index: Shape) -> frozenset[Path]:
        """Files with shards of `tensor[index]`."""
        return frozenset(part.file for part in self._parts[key, index])

    def rows(self, key: str, index: Shape, first: int, count: int) -> Iterator[memoryview]:
        """Bytes of rows of `tensor[index]`, in blocks of whole rows; a block is valid until the next is requested."""
        yield from self.view(key, index).blocks(self._files, first, count)

    def checks(self) -> list[Task]:
        """Compare the tied head on the last pipeline stage with the embedding; UserError if they differ."""
        pairs = zip(self._tied_copy, self._parts.get((_EMBEDDING, ()), ()), strict=False)
        return [partial(_check_copy, copy, embedding) for copy, embedding in pairs]


def _check_copy(copy: TensorInfo, embedding: TensorInfo) -> None:
    with OpenFiles() as files:
        ours, theirs = (view_of(t).blocks(files, 0, t.shape[0]) for t in (copy, embedding))
        same = copy.shape == embedding.shape and all(a == b for a, b in zip(ours, theirs, strict=True))
    if not same:
        raise UserError(
            f"{copy.place}: {copy.name} differs from {embedding.name}, but config.json ties them; set tie_word_embeddings "
            "to false in the directory of --hf-files"
        )


def _check_arguments(ranks: Ranks, a: Architecture, directory: Path) -> None:
    """UserError if the run's arguments contradict config.json. Shapes do not determine everything, e.g. the head count."""
    arguments = ranks.arguments
    attention = a.attention
    if isinstance(attention, Attention) and attention.qk_norm == "each_head":
        raise UserError(
            f"{directory}: QK norms with a weight per head are not Megatron-LM's, and their sharding in rank files is unknown; "
            "save as torch_dist"
        )
    names = (name for rank in ranks.at.values() for chunk in rank.chunks for name in chunk)
    if any(name.startswith("mtp.") for name in names):
        raise UserError(f"{directory}: MTP layers in rank files are not supported; save as torch_dist")
    if ranks.version not in (0, 1, 2, 3):
        raise UserError(f"{directory}: checkpoint_version is {ranks.version}; versions 0 to 3 are supported")
    if ranks.version < 2 and attention.groups != attention.heads:
        raise UserError(f"{directory}: checkpoint_version {ranks.version} has no grouped-query attention")
    if (arguments.get("expert_tensor_parallel_size") or ranks.tensor) != ranks.tensor:
        raise UserError(
            f"{directory}: expert_tensor_parallel_size other than tensor_model_parallel_size is not supported in rank "
            "files; save as torch_dist"
        )
    grouped = arguments.get("group_query_attention", "num_query_groups" in arguments)
    rotary = arguments.get("position_embedding_type") == "rope"
    wanted: Mapping[str, object] = {
        "num_layers": a.num_layers,
        "hidden_size": a.hidden_size,
        "num_attention_heads": attention.heads,
        **({} if a.mla else {"kv_channels": attention.head_dim}),
        **({"num_query_groups": attention.groups} if grouped and not a.mla else {}),
        **({"rotary_base": attention.rotary.theta} if rotary and attention.rotary else {}),
        "norm_epsilon": a.layers[0].norm.epsilon,
        "layernorm_epsilon": a.layers[0].norm.epsilon,
        "swiglu": a.feed_forward.activation == "swiglu",
        "untie_embeddings_and_output_weights": not a.head.tied,
    }
    for name, value in wanted.items():
        if arguments.get(name) is not None and arguments[name] != value:
            raise UserError(
                f"{directory}: {name} of the run is {arguments[name]}, config.json says {value}; give --hf-files of this model"
            )
