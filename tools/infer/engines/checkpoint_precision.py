"""The precision of inference, the same for every engine."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import get_args

from shared.checkpoint.directory.auxiliary_files import read_config
from shared.checkpoint.formats.hugging_face import stored_weights
from shared.errors import UserError
from shared.families import registry
from shared.precision import DTYPES, Precision

_STORED: dict[str, Precision] = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}  # safetensors' names


def chosen_precision(source: Path, given: Precision | None) -> Precision:
    """`given`, else the dtype of config.json, else the dtype of most weights.

    The engines' defaults are not used: vLLM's default runs an fp32 checkpoint in 16 bits.

    Raises:
        UserError: the checkpoint's dtype is not a value of --precision, or unknown.
    """
    if given is not None:
        return given
    config = read_config(source / "config.json")
    for part in (config, registry.language_config(config)):
        said = part.get("dtype") or part.get("torch_dtype")
        if said is None:
            continue
        name = str(said).removeprefix("torch.")
        found = next((precision for precision, dtype in DTYPES.items() if dtype == name), None)
        if found is None:
            raise UserError(
                f"--source {source}: config.json says dtype {name}; give --precision {', '.join(get_args(Precision))}"
            )
        return found  # type: ignore[return-value]
    sizes: Counter[Precision] = Counter()
    for tensor in stored_weights(source, "--source").tensors().values():
        if tensor.dtype in _STORED:
            sizes[_STORED[tensor.dtype]] += tensor.size
    if not sizes:
        raise UserError(f"--source {source}: neither config.json nor the weights say a dtype; give --precision")
    return sizes.most_common(1)[0][0]
