"""Models of transformers from a directory: their classes, context and inputs; an account of every tensor."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.checkpoint.formats.hugging_face import HfReader, check_not_left_over
from shared.errors import UserError
from shared.families.common.transformers_workarounds import with_workarounds

# The maximum of input and output tokens, as the families call it.
_CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length")


def load_config(path: Path, *, place: str) -> Any:
    """The transformers configuration of a directory.

    Raises:
        UserError: transformers does not have the family; weights are quantised, or config.json says so of plain ones.
    """
    from transformers import AutoConfig

    check_not_left_over(path, place)
    if scheme := HfReader(path, place).scheme:
        raise UserError(
            f"{place}: the weights are quantised ({scheme.title}) and rlhf takes plain ones; "
            "`convert to-megatron`, then `convert to-hf`, makes a directory in bf16"
        )
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        line = str(error).strip().splitlines()[0]
        if "trust_remote_code" in str(error) or "model type" in str(error):
            line = (
                "transformers has no class for it and code of the directory is not run; give a family of transformers: "
                "`convert to-megatron`, then `convert to-hf --family llama`"
            )
        raise UserError(f"{place}: {line}") from None


def causal_class(config: Any, *, place: str) -> Any:
    """The causal language model that transformers makes of a configuration; UserError if its classes are others."""
    from transformers.models.auto import modeling_auto

    names = config.architectures or []
    known = set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if not any(name in known or name.endswith("ForCausalLM") for name in names):
        raise UserError(f"{place} is no causal language model: its architectures are {config.architectures}")
    return _class_of(config, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING, "causal language model", place)


def classifier_class(config: Any, *, place: str) -> Any:
    """The sequence classifier that transformers makes of a configuration; UserError for a family without one."""
    from transformers.models.auto import modeling_auto

    return _class_of(config, modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, "sequence classifier", place)


def _class_of(config: Any, mapping: Any, what: str, place: str) -> Any:
    if type(config) not in mapping:
        raise UserError(f"{place}: transformers has no {what} of model type {config.model_type}; give another model")
    return mapping[type(config)]


def context_length(config: Any, tokenizer: Any) -> int:
    """Context length in tokens: a field of config.json, else the tokenizer's. ALiBi models may have neither."""
    language = config.get_text_config()
    found = (getattr(language, name, None) for name in _CONTEXT_FIELDS)
    return next((value for value in found if isinstance(value, int)), int(tokenizer.model_max_length))


def accepted(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs that a model's forward pass takes: ALiBi models take no `position_ids`.

    Args:
        model: a transformers model, or an engine of one.
        inputs: keyword arguments of the forward pass.
    """
    parameters = inspect.signature(base_of(model).forward).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return dict(inputs)
    return {name: value for name, value in inputs.items() if name in parameters}


def base_of(model: Any) -> Any:
    """The model of transformers: of an engine, of PEFT's model around it, or itself."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def load_transformers_model(kind: Any, path: Path, *, place: str, other_head: bool = False, **arguments: Any) -> Any:
    """The model, in evaluation mode. transformers initialises missing tensors randomly; here they are an error.

    Args:
        kind: a class of transformers.
        path: a Hugging Face directory that `account_for_weights` has accepted.
        place: flag and path, for errors.
        other_head: the class has a new head, whose tensors are missing.
        arguments: of `from_pretrained`.

    Raises:
        UserError: a tensor is missing or misshapen; the message names it.
    """
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of several lines, and a warning of the new head
    try:
        model, info = kind.from_pretrained(
            path, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True, **arguments
        )
    finally:
        logging.set_verbosity(verbosity)
    body = f"{model.base_model_prefix}."
    found = [
        *(f"{name} is missing" for name in sorted(info["missing_keys"]) if name.startswith(body) or not other_head),
        *(
            f"{name} has the shape {list(stored)} and {type(model).__name__} wants {list(wanted)}"
            for name, stored, wanted in sorted(info["mismatched_keys"])
        ),
    ]
    if found:
        others = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise UserError(f"{place}: {found[0]}{others}; give a directory whose weights are those of its config.json")
    return with_workarounds(model).eval()
