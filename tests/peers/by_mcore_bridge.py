"""mcore-bridge, called as its users call it: `by_mcore_bridge.py to-megatron HF TARGET`, `... to-hf MEGATRON HF TARGET`."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.peers.core import FUSIONS, layer, load, prepare, save


def name_absent_classes() -> None:
    """Empty classes for those of TransformerEngine that are None or a mock in Megatron-Core: mcore-bridge asks for instances."""
    import torch
    from megatron.core.extensions import transformer_engine

    for name, value in list(vars(transformer_engine).items()):
        if name.startswith("TE") and not isinstance(value, type):
            setattr(transformer_engine, name, type(name, (torch.nn.Module,), {}))


def bridge_of(hf: Path) -> tuple[Any, Any]:
    """mcore-bridge's bridge of a Hugging Face directory, and a model without weights on the CPU."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from transformers import AutoConfig

    name_absent_classes()
    from mcore_bridge import ModelConfig, get_mcore_model, hf_to_mcore_config

    parallel_state.initialize_model_parallel()
    off = dict.fromkeys(FUSIONS, False)
    config = ModelConfig(
        params_dtype=torch.bfloat16,
        bf16=True,
        use_cpu_initialization=True,
        **off,
        **hf_to_mcore_config(AutoConfig.from_pretrained(hf)),
    )

    class Loader(config.model_meta.loader):  # type: ignore[misc]
        def get_transformer_layer_spec(self, vp_stage: int | None = None) -> Any:
            layers = [layer(config.num_moe_experts, config.qk_layernorm) for _ in range(config.num_layers)]
            return TransformerBlockSubmodules(layer_specs=layers, layer_norm=WrappedTorchNorm)

    config.model_meta.loader = Loader
    model = get_mcore_model(config)[0].bfloat16()  # local norms are in fp32
    if config.num_moe_experts:
        for block in model.decoder.layers:
            group_experts(block.mlp.experts)
    return config.bridge, model


def group_experts(experts: Any) -> None:
    """Experts as mcore-bridge knows them, all in one module: the same parameters under those names."""
    for name in ("linear_fc1", "linear_fc2"):
        weights = {f"weight{i}": getattr(expert, name).weight for i, expert in enumerate(experts.local_experts)}
        object.__setattr__(experts, name, SimpleNamespace(**weights))


def on_the_cpu() -> Any:
    """A context in which a tensor that is asked for on the GPU is on the CPU: mcore-bridge names "cuda" where it exports."""
    import torch

    class OnTheCPU(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            here = {"cuda": "cpu"}
            args = tuple(here.get(arg, arg) if isinstance(arg, str) else arg for arg in args)
            kwargs = {key: here.get(arg, arg) if isinstance(arg, str) else arg for key, arg in (kwargs or {}).items()}
            return func(*args, **kwargs)

    return OnTheCPU()


def to_megatron(hf: Path, target: Path) -> None:
    """mcore-bridge fills a model; Megatron-Core saves it."""
    bridge, model = bridge_of(hf)
    bridge.load_weights([model], str(hf))
    save(model, target)


def to_hf(megatron: Path, hf: Path, target: Path) -> None:
    """Megatron-Core fills a model from a directory of `convert to-megatron`; mcore-bridge writes it out."""
    bridge, model = bridge_of(hf)
    load(model, megatron)
    with on_the_cpu():
        bridge.save_weights([model], str(target))


if __name__ == "__main__":  # torch_dist's writer starts a process that imports this file
    prepare()
    {"to-megatron": to_megatron, "to-hf": to_hf}[sys.argv[1]](*map(Path, sys.argv[2:]))
