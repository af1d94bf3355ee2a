"""Load weights of a torch_dist checkpoint into a model, resharding between parallel layouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory

from shared.architecture.architecture import Architecture
from shared.checkpoint.formats.torch_dist_reader import NON_WEIGHT_PREFIXES
from shared.checkpoint.formats.torch_pickle import read_pickle
from shared.errors import UserError
from shared.mapping.key_form import STACKED, KeyForm, key_of_norm
from shared.model import lora
from shared.model.gpt import LanguageModel


def sharded_state_dict(chunks: Sequence[LanguageModel], form: KeyForm = STACKED) -> dict[str, dict[str, Any]]:
    """Sharded state dict for `dist_checkpointing`, keyed as in Megatron-LM: `model`, or `model0`, `model1`...

    `form`: the form of the tensors' keys.
    """
    metadata = form.metadata | {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    names = ["model"] if len(chunks) == 1 else [f"model{index}" for index in range(len(chunks))]
    return {name: chunk.sharded_state_dict(metadata=dict(metadata)) for name, chunk in zip(names, chunks, strict=True)}


def load(chunks: Sequence[LanguageModel], iteration_path: Path) -> None:
    """Fill every weight of `chunks` from the torch_dist directory `iteration_path`, cast to the model's dtype.

    The directory may have its layers and experts stacked, or under keys of their own, and norms under either key.

    Collective over all ranks. Optimizer state is not read. Vocabulary padding may differ; padding rows are set to zero.

    `.metadata` is a pickle: it is read without running code before Megatron-Core unpickles it.

    Raises:
        UserError: a tensor is missing, unknown to the model, or of another shape; `.metadata` is no checkpoint's. Nothing is
            filled then.
    """
    saved = saved_shapes(iteration_path)
    wanted = _wanted(chunks, saved)
    check_shapes(_everywhere(_shapes(wanted)), saved, chunks[0].architecture, iteration_path)
    loaded = dist_checkpointing.load(wanted, str(iteration_path))
    for name, chunk in zip(wanted, chunks, strict=True):
        chunk.load_state_dict(loaded[name], strict=False)  # extra states are missing; `check_shapes` is strict
        _clear_padding(chunk)


def saved_shapes(iteration_path: Path) -> dict[str, tuple[int, ...]]:
    """Global shapes of the weights in a torch_dist directory, by key. UserError: `.metadata` is no checkpoint's."""
    read_pickle((iteration_path / ".metadata").read_bytes(), iteration_path / ".metadata")
    return {
        key: tuple(entry.global_shape)
        for key, entry in dist_checkpointing.load_tensors_metadata(str(iteration_path)).items()
        if not key.startswith(NON_WEIGHT_PREFIXES)
    }


def wanted_shapes(chunks: Sequence[LanguageModel], saved: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Global shapes of what this rank's model reads of a directory with the tensors `saved`, by key."""
    return _shapes(_wanted(chunks, saved))


def load_adapters(chunks: Sequence[LanguageModel], iteration_path: Path) -> None:
    """Fill the LoRA adapters of `chunks` from the torch_dist directory `iteration_path`, cast to the model's dtype.

    Collective over all ranks.

    Raises:
        UserError: an adapter is missing, unknown or of another shape. Nothing is filled then.
    """
    read_pickle((iteration_path / ".metadata").read_bytes(), iteration_path / ".metadata")
    metadata = dist_checkpointing.load_tensors_metadata(str(iteration_path))
    saved = {key: tuple(entry.global_shape) for key, entry in metadata.items() if lora.is_adapter(key)}
    saved = {key: shape for key, shape in saved.items() if not key.startswith(NON_WEIGHT_PREFIXES)}
    wanted = {name: lora.adapters_of(state) for name, state in sharded_state_dict(chunks, KeyForm.of(saved)).items()}
    check_shapes(_everywhere(_shapes(wanted)), saved, chunks[0].architecture, iteration_path)
    loaded = dist_checkpointing.load(wanted, str(iteration_path))
    for name, chunk in zip(wanted, chunks, strict=True):
        chunk.load_state_dict(loaded[name], strict=False)


def check_finite(chunks: Sequence[LanguageModel], path: Path) -> None:
    """UserError if a loaded weight has NaN or infinity. `path`: where the weights are from."""
    for chunk in chunks:
        for name, weight in chunk.named_parameters():
            if not bool(weight.isfinite().all()):
                raise UserError(
                    f"--source {path}: {name} has NaN or infinity; `convert inspect --scan` lists all such tensors"
                )


def _wanted(chunks: Sequence[LanguageModel], saved: Mapping[str, tuple[int, ...]]) -> dict[str, dict[str, Any]]:
    """The model's sharded state dict under the keys of a checkpoint. Tensors only: extra states are empty without FP8."""
    wanted = {
        name: {key: entry for key, entry in state.items() if not isinstance(entry, ShardedObject)}
        for name, state in sharded_state_dict(chunks, KeyForm.of(saved)).items()
    }
    for state in wanted.values():
        for entry in state.values():
            entry.key = key_of_norm(entry.key, saved)
    return wanted


def _shapes(wanted: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[int, ...]]:
    """Global shapes of this rank's tensors."""
    shapes: dict[str, tuple[int, ...]] = {}
    for state in wanted.values():
        for entry in state.values():
            built = entry.build() if isinstance(entry, ShardedTensorFactory) else entry
            for tensor in _tensors(built):
                shapes[tensor.key] = tuple(tensor.global_shape)
    return shapes


def _everywhere(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Those of all ranks, over all pipeline stages."""
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, shapes)
    return {key: shape for shapes in gathered for key, shape in shapes.items()}


def _tensors(entry: Any) -> list[ShardedTensor]:
    if isinstance(entry, ShardedTensor):
        return [entry]
    values = entry.values() if isinstance(entry, Mapping) else entry
    return [tensor for value in values for tensor in _tensors(value)]


def check_shapes(
    wanted: Mapping[str, tuple[int, ...]],
    saved: Mapping[str, tuple[int, ...]],
    architecture: Architecture,
    path: Path,
) -> None:
    """UserError for a tensor that is missing, unknown to the model, or of another shape.

    Args:
        wanted: of the model, by all ranks.
        saved: of the checkpoint.
        architecture: the model.
        path: of the checkpoint.
    """
    if missing := sorted(wanted.keys() - saved.keys()):
        raise UserError(f"{path}: {_some(missing)} missing, though the model has it; convert the checkpoint again")
    if unexpected := sorted(saved.keys() - wanted.keys()):
        raise UserError(
            f"{path}: {_some(unexpected)} unknown to the model of hf/config.json; put the right hf/config.json there"
        )
    for key, shape in wanted.items():
        found = saved[key]
        if key in ("embedding.word_embeddings.weight", "output_layer.weight", "output_layer.bias"):
            fits = found[1:] == shape[1:] and found[0] >= architecture.vocab_size
        else:
            fits = found == shape
        if not fits:
            raise UserError(
                f"{path}: {key} is {list(found)}, hf/config.json requires {list(shape)}; convert the checkpoint again"
            )


def _some(keys: Sequence[str]) -> str:
    return f"{keys[0]} is" if len(keys) == 1 else f"{keys[0]} and {len(keys) - 1} more are"


@torch.no_grad()
def _clear_padding(chunk: LanguageModel) -> None:
    """Set the padding rows of the vocabulary to zero."""
    tables = [chunk.embedding.word_embeddings.weight] if chunk.pre_process or chunk.mtp_process else []
    if chunk.post_process and chunk.output_layer.weight is not None:
        tables.append(chunk.output_layer.weight)
        if chunk.output_layer.bias is not None:
            tables.append(chunk.output_layer.bias)
    for table in tables:
        first = table.shape[0] * parallel_state.get_tensor_model_parallel_rank()
        table[max(chunk.architecture.vocab_size - first, 0) :] = 0.0
