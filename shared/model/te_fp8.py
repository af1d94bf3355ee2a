"""FP8 by TransformerEngine: recipes it has, fields of Megatron-Core's configuration, sizes, and states of checkpoints.

Megatron-Core enters TransformerEngine's `fp8_autocast` around layers, with a recipe object made from the configuration
(megatron/core/fp8_utils.py). Only delayed scaling has a state: scales and amax histories, as a pickle in a byte tensor.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from megatron.core.enums import Fp8Recipe as MegatronRecipe
from megatron.core.safe_globals import SafeUnpickler

from shared.console import log
from shared.errors import UserError
from shared.kernels.fp8.recipes import Fp8Recipe
from shared.model.gpt import LanguageModel

_ALLOWED = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"  # TransformerEngine refuses pickles without it


def obstacle(
    recipe: Fp8Recipe, *, num_layers: int, pipeline: int, capability: tuple[int, int], cuda: tuple[int, int]
) -> str | None:
    """Why TransformerEngine does not compute a recipe, as a clause with the flag; None if it does.

    Args:
        recipe: of the run.
        num_layers: decoder layers of the model.
        pipeline: pipeline-parallel size.
        capability: compute capability of the GPU.
        cuda: version that torch was built for.
    """
    first, last = recipe.bf16_layers
    if recipe.name == "rowwise":
        return "TransformerEngine has no --fp8-recipe rowwise"
    if recipe.name == "delayed" and (first or last):
        return (
            f"--fp8-recipe delayed of TransformerEngine is for all layers (--fp8-bf16-layers 0,0, not {first},{last})"
        )
    if max(first, last) > num_layers // pipeline:
        return f"--fp8-bf16-layers {first},{last} is more than the {num_layers // pipeline} layers of a pipeline stage"
    if recipe.name == "mxfp8" and not (10, 0) <= capability < (12, 0):
        return "--fp8-recipe mxfp8 needs a GPU of compute capability 10.x"
    if recipe.name == "blockwise" and (capability < (9, 0) or cuda < (12, 9)):
        return "--fp8-recipe blockwise needs a GPU of compute capability 9.0 or higher and CUDA 12.9 or later"
    if capability < (8, 9):
        return "--precision fp8 needs a GPU of compute capability 8.9 or higher"
    return None


def config_fields(recipe: Fp8Recipe) -> dict[str, Any]:
    """Fields of Megatron-Core's TransformerConfig. Weights stay in bf16; attention is not in FP8."""
    first, last = recipe.bf16_layers
    return {
        "fp8": recipe.format,
        "fp8_recipe": MegatronRecipe(recipe.name),
        "fp8_amax_history_len": recipe.amax_history,
        "fp8_amax_compute_algo": "max",
        "first_last_layers_bf16": bool(first or last),
        "num_layers_at_start_in_bf16": first,
        "num_layers_at_end_in_bf16": last,
    }


def check_sizes(chunks: Sequence[LanguageModel], recipe: Fp8Recipe, *, tokens: int) -> None:
    """UserError if a matrix does not fit FP8 products: sides are multiples of 16, of 32 in MXFP8.

    `tokens`: of a micro batch that a linear layer reads, on one rank.
    """
    side = 32 if recipe.name == "mxfp8" else 16
    given = f"--precision fp8 of TransformerEngine multiplies matrices whose sides are multiples of {side}"
    if tokens % side:
        raise UserError(
            f"{given}, and a rank has {tokens} tokens of a micro batch; change --sequence-length or --micro-batch-size, "
            "or give --backend local"
        )
    for chunk in chunks:
        in_bf16 = tuple(
            f"decoder.layers.{index}."
            for index, layer in enumerate(chunk.decoder.layers)
            if not recipe.in_fp8(layer.layer_number - 1, chunk.architecture.num_layers)
        )
        for name, module in chunk.named_modules():
            weights = [each for key, each in module.named_parameters(recurse=False) if key.startswith("weight")]
            if not hasattr(module, "fp8_meta") or name.startswith(in_bf16):
                continue
            for weight in weights:
                if any(size % side for size in weight.shape):
                    raise UserError(f"{given}, and {name} is {list(weight.shape)}; give --backend local")


def restore(chunk: torch.nn.Module, states: Mapping[str, torch.Tensor | None]) -> None:
    """Give TransformerEngine's modules their states of a checkpoint, by key of the chunk's sharded state dict.

    Raises:
        UserError: a state is none of TransformerEngine's. Files are shared, and a pickle could run code: it is not trusted.
    """
    modules = {name for name, module in chunk.named_modules() if hasattr(module, "fp8_meta")}
    known: dict[str, torch.Tensor] = {}
    for key, state in states.items():
        if state is None or not state.numel() or key.rpartition("._extra_state")[0] not in modules:
            continue
        if state.dtype != torch.uint8:
            _announce_foreign()
            continue
        try:
            SafeUnpickler(io.BytesIO(state.cpu().numpy().tobytes())).load()
        except Exception as error:  # whatever a broken pickle raises
            raise UserError(
                f"{key} of the checkpoint is no FP8 state of TransformerEngine ({error}); --precision bf16 --extend goes on "
                "without it"
            ) from error
        known[key] = state
    with _states_allowed():
        chunk.load_state_dict(known, strict=False)


@cache
def _announce_foreign() -> None:
    log("fp8         amax histories of the local backend are not read: TransformerEngine's scales start at 1")


@contextlib.contextmanager
def _states_allowed() -> Iterator[None]:
    """Context manager in which TransformerEngine reads states; `restore` has seen them."""
    before = os.environ.get(_ALLOWED)
    os.environ[_ALLOWED] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_ALLOWED]
        else:
            os.environ[_ALLOWED] = before
