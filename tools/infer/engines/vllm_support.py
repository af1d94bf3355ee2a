"""Checks, before weights are loaded, that vLLM supports a model."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from shared.checkpoint.directory.auxiliary_files import read_config
from shared.errors import UserError
from shared.families import registry
from tools.infer.engines.vllm_directory import shown
from tools.infer.environment import on_gpu

# architecture -> (field of config.json, its only supported value): vLLM's class ignores the field or asserts it without a
# message.
_NOT_READ = {
    "ChatGLMForConditionalGeneration": (
        "position_encoding_2d",
        False,
    ),  # the first ChatGLM; vLLM has ChatGLM2 and later
    "GPT2LMHeadModel": ("scale_attn_by_inverse_layer_idx", False),
    "GptOssForCausalLM": ("swiglu_limit", 7.0),
    "InternLM2ForCausalLM": ("bias", False),
    "Qwen3NextForCausalLM": ("attention_bias", False),
    "StableLmForCausalLM": ("use_parallel_residual", False),
}
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")  # fields of config.json


_WITH_TRANSFORMERS = "`infer generate`, `chat` and `evaluate`"  # `--engine hf`


class NotCarriedError(UserError):
    """vLLM cannot run the model, on this machine or at all."""


def check_supported(source: Path) -> None:
    """NotCarriedError if vLLM lacks the architecture of config.json, or ignores a field that changes the result."""
    from vllm import ModelRegistry

    config = read_config(source / "config.json")
    names = config.get("architectures") or []
    supported = ModelRegistry.get_supported_archs()
    known = [name for name in names if name in supported]
    if not known:
        raise NotCarriedError(
            f"--source {source}: vLLM does not carry the architecture {', '.join(names) or '(none named)'} "
            f"(model_type {config.get('model_type')}); {_alternative(source, supported)}"
        )
    for name in (name for name in known if name in _NOT_READ):
        field, computed = _NOT_READ[name]
        if config.get(field, computed) != computed:
            raise NotCarriedError(
                f"--source {source}: vLLM's {name} does not compute {field} = {config[field]} of config.json, which changes the "
                f"model; {_WITH_TRANSFORMERS} may run it with `--engine hf`"
            )
    if not on_gpu():
        # vLLM inspects a model's class in a subprocess, to avoid initialising CUDA here; its imports take half a minute.
        # Without a GPU that is unnecessary, and this process needs the class anyway.
        for name in known:
            ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())


def _alternative(source: Path, supported: Collection[str]) -> str:
    """Hint for a model whose class vLLM lacks."""
    try:
        architecture = registry.from_files(source)
    except UserError:
        return f"{_WITH_TRANSFORMERS} may still run it with `--engine hf`"
    for name in (name for name, family in registry.FAMILIES.items() if family.hf_class in supported):
        with contextlib.suppress(UserError):
            registry.as_family(architecture, name)
            written = registry.FAMILIES[name].hf_class
            return f"`convert to-megatron`, then `convert to-hf --family {name}`, write it as {written}, which vLLM has"
    family = registry.FAMILIES[architecture.family]
    if family.remote:
        from vllm.model_executor.models.registry import _PREVIOUSLY_SUPPORTED_MODELS

        last = _PREVIOUSLY_SUPPORTED_MODELS.get(family.hf_class)
        older = f"; the last vLLM that carries it is {last}" if last else ""
        return f"nor does transformers, and no family that they have computes the same{older}"
    return f"{_WITH_TRANSFORMERS} run it with `--engine hf`"


def model_config(arguments: Mapping[str, Any]) -> Any:
    """vLLM's `ModelConfig`, without loading the model. UserError if vLLM rejects the model."""
    from vllm import EngineArgs

    with refusals(arguments["model"]):
        config = EngineArgs(**arguments).create_model_config()
    if not on_gpu():
        _check_cpu_kernels(shown(arguments["model"]), config)
    return config


def _check_cpu_kernels(source: str, config: Any) -> None:
    """NotCarriedError for a head size or dtype that vLLM's CPU kernels lack; vLLM would fail only in the first step."""
    import torch
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
    from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend

    size, compiled = config.get_head_size(), CPUAttentionBackend.get_supported_head_sizes()
    if config.use_mla:
        compiled = CPUMLABackend.get_supported_head_sizes()
    if size not in compiled:
        raise NotCarriedError(
            f"--source {source}: vLLM on CPU has no attention for {'MLA latents' if config.use_mla else 'heads'} of {size}, "
            f"only {', '.join(map(str, compiled))}; use a GPU; {_WITH_TRANSFORMERS} may run it with `--engine hf`"
        )
    if "linear_key_head_dim" in read_config(Path(source) / "config.json") and config.dtype != torch.bfloat16:
        raise NotCarriedError(
            f"--source {source}: vLLM on CPU has gated delta nets in bf16 only; give --precision bf16, or use a GPU"
        )


def check_lora(source: Path, flag: str) -> None:
    """NotCarriedError if vLLM computes no LoRA adapters of a supported model; it would fail after loading it, or in a request."""
    from vllm import ModelRegistry
    from vllm.model_executor.models import supports_lora

    config = read_config(source / "config.json")
    language = registry.language_config(config)
    if not on_gpu() and (experts := next((name for name in _EXPERTS if language.get(name)), None)):
        raise NotCarriedError(
            f"{flag}: vLLM on CPU has no adapters for a model with experts ({experts} of config.json); leave it out, and serve "
            "the model with its adapter merged, or use a GPU"
        )
    for name in config.get("architectures") or []:
        if name in ModelRegistry.models and not supports_lora(ModelRegistry.models[name].load_model_cls()):
            raise NotCarriedError(
                f"{flag}: vLLM's {name} computes no LoRA adapters; leave it out, and serve the model with its adapter merged"
            )


def fused_without_adapters(source: Path) -> dict[str, list[str]]:
    """Fused projections of which vLLM's class computes adapters of the parts alone, with the parts.

    Where the checkpoint has the fused one, as GLM-4's gate_up_proj, its adapters cannot be loaded.
    """
    from vllm import ModelRegistry

    names = read_config(source / "config.json").get("architectures") or []
    classes = [ModelRegistry.models[name].load_model_cls() for name in names if name in ModelRegistry.models]
    packed = [getattr(each, "packed_modules_mapping", {}).items() for each in classes]
    return {fused: list(parts) for mapping in packed for fused, parts in mapping if fused not in parts}


def check_exchange(config: Any, flag: str) -> None:
    """UserError if the weights of an engine (vLLM's `VllmConfig`) cannot be replaced in place."""
    model = config.model_config
    refused = {
        "vLLM repacks quantised weights": model.quantization is not None,
        "vLLM's reload changes the state of recurrent layers": model.is_hybrid or model.has_inner_state,
        "vLLM's gpt-oss writes its experts past the reload": model.hf_config.model_type == "gpt_oss",
        "a draft model would keep its weights": config.speculative_config is not None,
        "replicas of --data-parallel-size would get them one after the other": config.parallel_config.data_parallel_size
        > 1,
    }
    for why in (why for why, true in refused.items() if true):
        raise NotCarriedError(
            f"{flag}: the weights of this model or server cannot be replaced while it runs ({why}); leave it out"
        )


@contextlib.contextmanager
def refusals(source: object) -> Iterator[None]:
    """Convert vLLM's error about a model to a UserError. An AssertionError without a message is a bug and stays one."""
    try:
        yield
    except (ValueError, AssertionError) as error:
        if isinstance(error, AssertionError) and not str(error):
            raise
        raise UserError(f"--source {shown(source)}: {reason(error)}") from None


def reason(error: Exception) -> str:
    """An error message in one line, without pydantic's preamble."""
    errors = getattr(error, "errors", None)
    text = errors()[0]["msg"].removeprefix("Value error, ") if callable(errors) else str(error)
    return text.strip().splitlines()[0] if text.strip() else type(error).__name__
