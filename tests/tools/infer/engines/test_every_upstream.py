"""Internals of vLLM and lm-evaluation-harness that the engines rely on: docs/upstream.md."""

from __future__ import annotations

import inspect

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.vllm_causallms import VLLM
from vllm import LLM, ModelRegistry
from vllm.config import ModelConfig, ParallelConfig, VllmConfig
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.lora.punica_wrapper.punica_selector import get_punica_wrapper
from vllm.model_executor.layers.attention.mla_attention import MLAAttention
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload import layerwise
from vllm.model_executor.models import supports_lora
from vllm.model_executor.models.registry import _PREVIOUSLY_SUPPORTED_MODELS, _LazyRegisteredModel
from vllm.platforms.cpu import CpuPlatform
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.mla.amx_mla import AMXMLABackend
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.worker_base import WorkerWrapperBase

from tests.upstream import attributes_set, binds, calls, relies_on, says_nothing_of
from tools.infer.engines import vllm_support
from tools.infer.engines.lora_on_cpu import Wrapper
from tools.infer.engines.weight_swap import RELOAD_LOGGER, WeightSwap

ENGINE = "tools/infer/engines/vllm.py"
LORA_ON_CPU = "tools/infer/engines/lora_on_cpu.py"
SUPPORT = "tools/infer/engines/vllm_support.py"
SWAP = "tools/infer/engines/weight_swap.py"


def test_a_registered_model_loads_its_class() -> None:
    entry = ModelRegistry.models["LlamaForCausalLM"]
    assert isinstance(entry, _LazyRegisteredModel), SUPPORT
    binds(SUPPORT, entry.load_model_cls)
    relies_on(SUPPORT, _LazyRegisteredModel.load_model_cls, "return getattr(mod, self.class_name)")
    binds(SUPPORT, ModelRegistry.register_model, "name", object)


def test_models_of_earlier_versions_are_named() -> None:
    assert all(
        isinstance(name, str) and version[:1].isdigit() for name, version in _PREVIOUSLY_SUPPORTED_MODELS.items()
    )
    assert _PREVIOUSLY_SUPPORTED_MODELS, SUPPORT


def test_head_sizes_of_the_cpu_kernels() -> None:
    assert 64 in CPUAttentionBackend.get_supported_head_sizes(), SUPPORT
    # vLLM takes the second where the processor has AMX, ours asks the first
    assert CPUMLABackend.get_supported_head_sizes() == AMXMLABackend.get_supported_head_sizes() == [576], SUPPORT


@pytest.mark.parametrize("name", sorted(vllm_support._NOT_READ))
def test_fields_that_a_models_class_does_not_compute(name: str) -> None:
    field, _ = vllm_support._NOT_READ[name]
    module = inspect.getmodule(ModelRegistry.models[name].load_model_cls())
    if name == "GPT2LMHeadModel":  # asserted without a message
        relies_on(SUPPORT, module, "assert not config.scale_attn_by_inverse_layer_idx")
    else:
        says_nothing_of(SUPPORT, module, f"config.{field}", f'"{field}"')


def test_an_engine_is_stepped() -> None:
    assert "llm_engine" in attributes_set(LLM.__init__), ENGINE
    binds(ENGINE, LLMEngine.add_request, None, "0", None, None)
    binds(ENGINE, LLMEngine.step, None)
    binds(ENGINE, LLMEngine.has_unfinished_requests, None)
    assert "engine_core" in attributes_set(LLMEngine.__init__), ENGINE
    binds(ENGINE, EngineCoreClient.shutdown, None)


def test_a_worker_has_the_methods_of_its_extension() -> None:
    relies_on(
        SWAP,
        WorkerWrapperBase.init_worker,
        "worker_extension_cls = resolve_obj_by_qualname(parallel_config.worker_extension_cls)",
        "worker_class.__bases__ = worker_class.__bases__ + (worker_extension_cls,)",
    )
    assert resolve_obj_by_qualname(WeightSwap.path) is WeightSwap
    taken = {name for name in dir(WeightSwap) if not name.startswith("__")} & {*dir(CPUWorker)}
    assert not taken, SWAP
    binds(SWAP, AsyncLLM.collective_rpc, None, "method", args=())


def test_experts_are_packed_for_the_cpu_when_their_kernel_is_made() -> None:
    relies_on(SWAP, FusedMoEMethodBase.__init__, "self.moe_kernel: mk.FusedMoEKernel | None = None")
    relies_on(SWAP, UnquantizedFusedMoEMethod._setup_kernel, "is_weight_update = self.moe_kernel is not None")
    relies_on(SWAP, CPUUnquantizedExperts.process_weights_after_loading, "self._pad_moe_intermediate(layer)")


def test_a_tied_head_is_packed_by_itself() -> None:
    relies_on(SWAP, UnquantizedEmbeddingMethod.tie_weights, "layer.weight = embed_tokens.weight")
    method = UnquantizedEmbeddingMethod.process_weights_after_loading
    calls(SWAP, method, "dispatch_cpu_unquantized_gemm", "layer", remove_weight="False")
    says_nothing_of(SWAP, layerwise, "cpu_linear", "tie_weights")


def test_a_layer_without_new_weights_is_a_warning() -> None:
    calls(
        SWAP,
        layerwise.finalize_layerwise_processing,
        "logger.warning",
        "'%s: Failed to load weights'",
        "layer.__class__.__name__",
    )
    assert layerwise.logger.name == RELOAD_LOGGER


def test_a_class_says_whether_it_computes_adapters() -> None:
    computes = {"LlamaForCausalLM": True, "Phi3ForCausalLM": True, "FalconForCausalLM": False, "GPT2LMHeadModel": False}
    assert {n: bool(supports_lora(ModelRegistry.models[n].load_model_cls())) for n in computes} == computes, SUPPORT
    ours = "tools/infer/served_adapters.py"
    calls(ours, MLAAttention.process_weights_after_loading, "split_kv_b_proj")
    packed = {
        n: ModelRegistry.models[n].load_model_cls().packed_modules_mapping
        for n in ("Glm4ForCausalLM", "Phi3ForCausalLM")
    }
    assert packed["Glm4ForCausalLM"]["gate_up_proj"] == ["gate_proj", "up_proj"], SUPPORT
    assert packed["Phi3ForCausalLM"]["gate_up_proj"] == ["gate_up_proj"], SUPPORT


def test_a_request_without_an_adapter_has_its_neighbours_on_a_cpu() -> None:
    """Three tokens, the second without one: vLLM's own class, which the platform names, and ours."""
    for kind, second in ((PunicaWrapperCPU, 16), (Wrapper, 0)):
        wrapper, y, weights = kind(8, 4, "cpu"), torch.zeros(3, 4), torch.ones(1, 1, 4, 4)
        wrapper.update_metadata(LoRAMapping((1, 0, 1), (1, 0, 1), is_prefill=True), [1], 1, 32)
        wrapper.add_lora_linear(y, torch.ones(3, 4), (weights,), (weights,), 1.0, (4,))
        assert y[:, 0].tolist() == [16, second, 16], LORA_ON_CPU
    assert CpuPlatform.get_punica_wrapper().rpartition(".")[2] == PunicaWrapperCPU.__name__, LORA_ON_CPU
    relies_on(LORA_ON_CPU, get_punica_wrapper, "current_platform.get_punica_wrapper()")


def test_a_configuration_says_what_a_reload_would_spoil() -> None:
    assert isinstance(ModelConfig.is_hybrid, property), SUPPORT
    assert isinstance(ModelConfig.has_inner_state, property), SUPPORT
    assert "quantization" in ModelConfig.__dataclass_fields__, SUPPORT
    assert "data_parallel_size" in ParallelConfig.__dataclass_fields__, SUPPORT
    assert {"model_config", "parallel_config", "speculative_config"} <= {*VllmConfig.__dataclass_fields__}, SUPPORT


def test_a_model_of_the_harness_holds_the_engines() -> None:
    ours = "tools/infer/engines/transformers.py"
    relies_on(ENGINE, VLLM.__init__, "self.model = LLM(**self.model_args)")
    assert isinstance(HFLM.model, property), ours
    assert "tokenizer" in attributes_set(HFLM.__init__, HFLM._create_tokenizer), ours
