"""LoRA adapters in PEFT's form, beside the model of a server: checked whole before vLLM reads them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.checkpoint.directory.adapter_directory import CONFIG
from shared.checkpoint.directory.auxiliary_files import read_config
from shared.checkpoint.directory.target import PARTIAL
from shared.checkpoint.formats.safetensors_file import TensorInfo, read_header
from shared.errors import UserError
from tools.infer.environment import on_gpu
from tools.infer.weight_check import check_finite

WEIGHTS = "adapter_model.safetensors"
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's values of max_lora_rank, but for 1
TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
# Of MLA: vLLM multiplies it into other weights when it loads the model, and decodes by those.
_WITHOUT_ADAPTER = "kv_b_proj"
# Of adapters that are loaded later, where vLLM is told beforehand which modules may have one.
_USUAL = {
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    *("c_fc", "c_proj", "fc1", "fc2", "out_proj", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    *("qkv_proj", "gate_up_proj", "query_key_value"),
}
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A directory that has been checked.

    Attributes:
        rank: the largest of its modules'.
        modules: last parts of their names, as q_proj.
    """

    name: str
    path: Path
    rank: int
    modules: frozenset[str]


def parse_adapters(words: Iterable[str], shapes: Shapes, served_model_name: str) -> tuple[Adapter, ...]:
    """The adapters of `--adapter NAME=DIR,...`. UserError names the first that does not fit the model.

    `shapes`: of the model's tensors, by name.
    """
    adapters: dict[str, Adapter] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not (name and equals and path):
            raise UserError(f"--adapter {word}: NAME=DIR is wanted, several separated by commas")
        if name in adapters or name == served_model_name:
            raise UserError(f"--adapter {word}: the name is taken; every adapter and the model have one of their own")
        adapters[name] = check_adapter(name, Path(path).resolve(), shapes, f"--adapter {name}:")
    return tuple(adapters.values())


def check_adapter(
    name: str,
    path: Path,
    shapes: Shapes,
    place: str,
    *,
    rank: int = _RANKS[-1],
    modules: Collection[str] | None = None,
) -> Adapter:
    """An adapter of the model with these shapes. UserError, with `place` in front, if it is none, or vLLM has no such.

    Args:
        name: for requests.
        path: PEFT's directory.
        shapes: of the model's tensors, by name.
        place: for messages.
        rank: the largest that the server has room for.
        modules: last parts of names that may be adapted; None: all.
    """
    from vllm.config.lora import LoRAConfig
    from vllm.lora.peft_helper import PEFTHelper

    if PARTIAL in path.name or not (path / CONFIG).is_file() or not (path / WEIGHTS).is_file():
        raise UserError(f"{place} {path} is no adapter of PEFT: {CONFIG} and {WEIGHTS} are wanted")
    try:
        fields, header = read_config(path / CONFIG), read_header(path / WEIGHTS)
    except UserError as error:
        raise UserError(f"{place} {error}") from None
    if fields.get("peft_type") != "LORA":
        raise UserError(f"{place} {path} is a {fields.get('peft_type')} adapter; vLLM computes LORA alone")
    try:
        helper = PEFTHelper.from_dict(fields)
        helper.validate_legal(LoRAConfig(max_lora_rank=rank))
    except (TypeError, ValueError) as error:
        raise UserError(f"{place} {path}: {error}; merge it with `convert merge-lora`") from None
    tensors = {tensor.name: tensor for tensor in header.tensors}
    found: dict[str, dict[str, TensorInfo]] = {}
    for tensor in tensors.values():
        match = TENSOR.fullmatch(tensor.name)
        if match is None:
            raise UserError(f"{place} {path}: vLLM has no place for {tensor.name}; merge it with `convert merge-lora`")
        found.setdefault(match["module"], {})[match["side"]] = tensor
    if not found:
        raise UserError(f"{place} {path / WEIGHTS} has no tensors")
    for module, sides in sorted(found.items()):
        suffix = module.rpartition(".")[2]
        if (modules is not None and suffix not in modules) or (suffix == "lm_head" and not on_gpu()):
            raise UserError(f"{place} {path} adapts {module}, for which this server has no room; merge it instead")
        if suffix == _WITHOUT_ADAPTER:
            raise UserError(
                f"{place} {path} adapts {module} of MLA, which vLLM computes without adapters; merge it instead"
            )
        wanted = shapes.get(f"{module}.weight")
        if wanted is None or len(wanted) != 2:
            raise UserError(f"{place} {path} adapts {module}, which the model has not; it belongs to another base")
        r, _ = helper.get_rank_and_scaling(module)
        for side, shape in (("A", (r, wanted[1])), ("B", (wanted[0], r))):
            if side not in sides:
                raise UserError(f"{place} {path}: {module} has no lora_{side}")
            if tuple(sides[side].shape) != shape:
                raise UserError(
                    f"{place} {path}: lora_{side} of {module} is {list(sides[side].shape)}, the model asks for {list(shape)}; "
                    "it belongs to another base"
                )
    check_finite(tensors, place)
    ranks = [helper.get_rank_and_scaling(module)[0] for module in found]
    return Adapter(
        name=name, path=path, rank=max(ranks), modules=frozenset(module.rpartition(".")[2] for module in found)
    )


def lora_arguments(adapters: Iterable[Adapter], lora_rank: int | None, shapes: Shapes, *, later: int) -> dict[str, Any]:
    """vLLM's arguments for these adapters, and for so many in a batch that are loaded `later`."""
    adapters = tuple(adapters)
    largest = max([lora_rank or 0, *(adapter.rank for adapter in adapters)])
    arguments: dict[str, Any] = {
        "enable_lora": True,
        "max_lora_rank": next(rank for rank in _RANKS if rank >= largest),
        "max_loras": len(adapters) + later,
    }
    if not on_gpu():
        # With a LoRA of the head, log-probabilities of prompts end vLLM's engine on a CPU.
        modules = {module for adapter in adapters for module in adapter.modules}
        if later:
            modules |= _USUAL & {name.removesuffix(".weight").rpartition(".")[2] for name in shapes}
        arguments["lora_target_modules"] = sorted(modules)
    return arguments
