"""Compare logits of the Megatron-Core and the transformers model: same weights, same tokens, fp32."""

from __future__ import annotations

import contextlib
import gc
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import shared.runtime.device
from shared.architecture.architecture import Alibi, Architecture, Attention
from shared.checkpoint.directory.auxiliary_files import read_config
from shared.checkpoint.formats.hugging_face import HfReader
from shared.cli import log
from shared.console import quantity
from shared.errors import StageError
from shared.families import registry
from shared.families.common.transformers_workarounds import with_workarounds
from shared.kernels.attention import masks
from shared.mapping.adapters import LoraSettings
from shared.model.prefix_lm import prefix_inputs, with_blank
from tools.convert.remote import remote_class

# Both models compute in fp32 from the same bits; only the order of sums differs. A layer has about a dozen roundings of
# 2^-24, relative to the activation. They accumulate like a random walk: in practice a few 1e-6 of the logits' standard
# deviation. A misplaced row or a wrong rotary frequency gives 1e-2 or more. 1e-4 suffices for hundreds of layers.
RELATIVE_TOLERANCE = 1e-4


def compare_logits(
    architecture: Architecture,
    source: Path,
    iteration: Path,
    positions: int,
    seed: int,
    trust_remote_code: bool = False,
    adapters: tuple[LoraSettings, Path] | None = None,
) -> dict[str, Any]:
    """Build one model after the other in fp32 and compare all logits of one random sequence.

    `adapters`: settings and iteration of LoRA adapters, which the source has in its weights.

    Returns:
        Certificate fields: positions, largest difference, tolerance with its reason, passed.
    """
    positions = min(positions, architecture.max_position_embeddings)
    log(
        f"logits: both models in fp32, one after the other, {positions} positions; "
        f"about {quantity(architecture.parameter_count() * 4 * 1.2, 'bytes')} of memory plus the libraries"
    )
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(architecture.vocab_size, (1, positions), generator=generator)
    ids = with_blank(ids, architecture)
    with _quiet():
        ours = _megatron(architecture, iteration, ids, adapters)
        theirs = _transformers(source, architecture, ids, trust_remote_code)
    spread = theirs.std().item()
    difference = (ours - theirs).abs().max().item()
    tolerance = RELATIVE_TOLERANCE * spread
    return {
        "passed": bool(difference <= tolerance),  # NaN: False
        "positions": positions,
        "precision": "fp32",
        "max_difference": difference,
        "tolerance": tolerance,
        "spread": spread,
        "same_next_token": (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item(),
        "reason": f"fp32 sums in another order: {RELATIVE_TOLERANCE:g} of the logits' standard deviation",
        "seed": seed,
        "reference": _reference(architecture, trust_remote_code),
    }


def _reference(architecture: Architecture, trust_remote_code: bool) -> str:
    if trust_remote_code:
        return "the directory's own code"
    alibi = _alibi(architecture)
    if alibi is None or alibi.bias_max == 8:
        return "transformers"
    return f"transformers, given alibi_bias_max {alibi.bias_max}, which its class leaves at 8"


def _alibi(architecture: Architecture) -> Alibi | None:
    attention = architecture.attention
    return attention.alibi if isinstance(attention, Attention) else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence deprecation and optional-dependency warnings of the libraries."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _megatron(
    architecture: Architecture, iteration: Path, ids: torch.Tensor, adapters: tuple[LoraSettings, Path] | None
) -> torch.Tensor:
    shared.runtime.device.select_device()  # before any import of Megatron-Core
    from shared.model import gpt, logits, lora, weights
    from shared.parallel import ParallelConfig
    from shared.runtime.process_groups import initialize

    layout = ParallelConfig()
    initialize(layout, seed=0)
    try:
        chunks = gpt.build(architecture, layout, dtype=torch.float32)
        weights.load(chunks, iteration)
        if adapters is not None:
            lora.attach(chunks, adapters[0], seed=0)
            weights.load_adapters(chunks, adapters[1])
        result = logits.logits(chunks, ids).cpu()
        del chunks
        return result
    finally:
        _tear_down()


def _tear_down() -> None:
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    gc.collect()  # modules are in reference cycles; the second model needs the memory


def attention_of(architecture: Architecture) -> str:
    """transformers' attention implementation: eager, unless it is wrong for the model."""
    # Eager attention of Falcon RW adds ALiBi twice: in the scores, and in the mask made for sdpa.
    alibi = _alibi(architecture)
    return "sdpa" if alibi and alibi.rounded else "eager"


@torch.no_grad()
def _transformers(source: Path, architecture: Architecture, ids: torch.Tensor, trust_remote_code: bool) -> torch.Tensor:
    import transformers
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    config = read_config(source / "config.json")
    options = {"dtype": torch.float32, "attn_implementation": attention_of(architecture)}
    if config.get("quantization_config") is not None:  # also one that is left over: transformers would follow it
        model = _dequantized_model(source, **options)
    elif trust_remote_code and (name := remote_class(config)):
        with _modelling_code(source):
            model = getattr(transformers, name).from_pretrained(
                source, **options, local_files_only=True, trust_remote_code=True
            )
            return _logits(model, ids, **_prefix_inputs(architecture, ids))
    else:
        kind, known = _class_and_config(config)
        model = kind.from_pretrained(source, config=known, **options, local_files_only=True)
    return _logits(with_workarounds(model), ids)


def _logits(model: Any, ids: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
    model.eval().to(shared.runtime.device.select_device())
    placed = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    result: torch.Tensor = model(ids.to(model.device), **placed).logits.float().cpu()
    return result


def _prefix_inputs(architecture: Architecture, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """position_ids `[batch, 2, sequence]` and attention_mask (1: attended), normally made by the tokenizer."""
    if architecture.prefix is None or not registry.FAMILIES[architecture.family].explicit_positions:
        return {}
    streams, segments = prefix_inputs(architecture.prefix, ids, None, None)
    return {"position_ids": streams.transpose(0, 1), "attention_mask": masks.dense(segments).long()}


@contextlib.contextmanager
def _modelling_code(source: Path) -> Iterator[None]:
    """StageError if modelling code fails; most was written for an older transformers."""
    import transformers

    try:
        yield
    except Exception as error:  # foreign code, any exception
        said = (str(error).splitlines() or [""])[0]
        raise StageError(
            f"the modelling code in {source} failed with transformers {transformers.__version__}: "
            f"{type(error).__name__}: {said}; give --no-logits if it is for another version"
        ) from error


def _dequantized_model(source: Path, **options: Any) -> Any:
    """The model with dequantised weights: quantised kernels are not part of the comparison.

    Weights are dequantised to bf16, like in to-megatron; transformers dequantises to fp32.
    """
    reader = HfReader(source)
    kind, known = _class_and_config(
        {name: value for name, value in reader.config.items() if name != "quantization_config"}
    )
    types = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    state: dict[str, torch.Tensor] = {}
    for name, weight in reader.weights.items():
        data = bytearray(b"".join(reader.values(name)))
        numbers = torch.frombuffer(data, dtype=types[weight.dtype])
        if weight.transposed:
            *outer, columns, rows = weight.shape
            state[name] = numbers.view(*outer, rows, columns).transpose(-1, -2).contiguous()
        else:
            state[name] = numbers.view(weight.shape)
    return kind.from_pretrained(None, config=known, state_dict=state, **options)


def _class_and_config(config: dict[str, Any]) -> tuple[Any, Any]:
    """transformers' class and configuration, with legacy field names of config.json translated."""
    import transformers

    family = registry.family_of(config)
    kind = getattr(transformers, family.hf_class)
    return kind, kind.config_class.from_dict(
        {**family.without_legacy_names(config), "model_type": kind.config_class.model_type}
    )
