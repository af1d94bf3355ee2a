"""Open a directory and start vLLM on it, in this process."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.checkpoint.directory.open import open_checkpoint
from shared.cli import log
from shared.errors import UserError
from shared.families import registry
from tools.infer.settings import on_gpu, read_config

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput, SamplingParams


# Fields of config.json that change the model and that vLLM's code for the architecture does not look at, or asserts without a
# word, and the value that it computes.
_IGNORED = {
    "ChatGLMForConditionalGeneration": ("position_encoding_2d", False),  # the first ChatGLM; it has those after
    "GPT2LMHeadModel": ("scale_attn_by_inverse_layer_idx", False),
    "GptOssForCausalLM": ("swiglu_limit", 7.0),
    "InternLM2ForCausalLM": ("bias", False),
    "Qwen3NextForCausalLM": ("attention_bias", False),
    "StableLmForCausalLM": ("use_parallel_residual", False),
}


def open_source(source: Path) -> Path:
    """The directory, checked to be whole. UserError names the file that is not."""
    return open_checkpoint(source, kinds=("hf",), flag="--source").hf_files


def check_supported(source: Path) -> None:
    """UserError if vLLM has no code for the architecture that config.json names."""
    from vllm import ModelRegistry

    config = read_config(source)
    names = config.get("architectures") or []
    supported = ModelRegistry.get_supported_archs()
    known = [name for name in names if name in supported]
    if not known:
        raise UserError(
            f"--source {source}: vLLM does not carry the architecture {', '.join(names) or '(none named)'} "
            f"(model_type {config.get('model_type')}); {_way_out(source, supported)}"
        )
    for name in (name for name in known if name in _IGNORED):
        field, computed = _IGNORED[name]
        if config.get(field, computed) != computed:
            raise UserError(
                f"--source {source}: vLLM's {name} does not compute {field} = {config[field]} of config.json, which changes the "
                "model; `infer evaluate --engine hf` may run it"
            )
    if not on_gpu():
        # vLLM looks at a model's class in a second process, so as not to touch CUDA in this one; that costs half a
        # minute of imports. Without a GPU there is nothing to protect, and the class is needed here anyway.
        for name in known:
            ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())


def _way_out(source: Path, supported: Collection[str]) -> str:
    """What a person may do with a model whose class vLLM lacks."""
    try:
        architecture = registry.from_files(source)
    except UserError:
        return "`infer evaluate --engine hf` may still run it"
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
    return "`infer evaluate --engine hf` runs it"


def model_config(arguments: Mapping[str, Any]) -> Any:
    """vLLM's view of the model, without loading it. UserError for what it refuses."""
    from vllm import EngineArgs

    try:
        config = EngineArgs(**arguments).create_model_config()
    except ValueError as error:
        raise UserError(f"--source {arguments['model']}: {reason(error)}") from None
    if not on_gpu():
        _check_kernels(arguments["model"], config)
    return config


def _check_kernels(source: str, config: Any) -> None:
    """vLLM's attention on the CPU is compiled for some sizes and types, and finds out in the first step."""
    import torch
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
    from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend

    size, compiled = config.get_head_size(), CPUAttentionBackend.get_supported_head_sizes()
    if config.use_mla:  # one vector for all heads
        compiled = CPUMLABackend.get_supported_head_sizes()
    if size not in compiled:
        raise UserError(
            f"--source {source}: vLLM on CPU has no attention for {'latent vectors' if config.use_mla else 'heads'} of "
            f"{size}, only {', '.join(map(str, compiled))}; use a GPU, or `infer evaluate --engine hf`"
        )
    if "linear_key_head_dim" in read_config(Path(source)) and config.dtype != torch.bfloat16:
        raise UserError(
            f"--source {source}: vLLM on CPU has gated delta nets in bf16 only; give --precision bf16, or use a GPU"
        )


def start(arguments: Mapping[str, Any]) -> LLM:
    """The engine with the model loaded. UserError for what vLLM refuses."""
    from vllm import LLM

    log(f"loading {arguments['model']} with vLLM on {'GPU' if on_gpu() else 'CPU'}")
    try:
        return LLM(**arguments)
    except (ValueError, AssertionError) as error:  # it refuses by both
        if isinstance(error, AssertionError) and not str(error):
            raise  # but what it says nothing about is a defect
        raise UserError(f"--source {arguments['model']}: {reason(error)}") from None


def reason(error: Exception) -> str:
    """The message of an error in one line, without pydantic's preamble."""
    errors = getattr(error, "errors", None)
    text = errors()[0]["msg"].removeprefix("Value error, ") if callable(errors) else str(error)
    return text.strip().splitlines()[0] if text.strip() else type(error).__name__


def complete(llm: LLM, requests: Mapping[str, tuple[list[int], SamplingParams]]) -> Iterator[RequestOutput]:
    """Run requests (id -> token ids, sampling) and yield each output as it grows; `finished` marks the last of each."""
    from vllm import TokensPrompt

    engine = llm.llm_engine
    for name, (ids, sampling) in requests.items():
        engine.add_request(name, TokensPrompt(prompt_token_ids=ids), sampling)
    while engine.has_unfinished_requests():
        yield from engine.step()
