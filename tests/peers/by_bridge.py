"""Megatron-Bridge, called as its users call it: `by_bridge.py to-megatron HF TARGET`, `by_bridge.py to-hf MEGATRON HF TARGET`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.peers.core import FUSIONS, layer, prepare


def bridge_of(hf: Path, dtype: str, load: bool) -> tuple[Any, Any]:
    """Bridge's AutoBridge of a Hugging Face directory, and its provider of a model on the CPU, with `load` of its weights."""
    import torch
    from megatron.bridge import AutoBridge

    kind = getattr(torch, dtype)
    bridge = AutoBridge.from_hf_pretrained(hf, torch_dtype=kind)
    provider = bridge.to_megatron_provider(load_weights=load)
    provider.transformer_layer_spec = layer(provider.num_moe_experts, provider.qk_layernorm)
    provider.params_dtype, provider.bf16, provider.use_cpu_initialization = kind, dtype == "bfloat16", True
    for name in FUSIONS:
        setattr(provider, name, False)
    provider.finalize()
    provider.initialize_model_parallel(seed=0)
    return bridge, provider


def to_megatron(hf: Path, target: Path) -> None:
    """What `AutoBridge.import_ckpt` does."""
    bridge, provider = bridge_of(hf, "bfloat16", load=True)
    model = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
    bridge.save_megatron_model(model, target, low_memory_save=True)


def load(megatron: Path, hf: Path, dtype: str) -> tuple[Any, Any, Any]:
    """A directory of `convert to-megatron`: Bridge's bridge and provider, and the model with its weights."""
    from megatron.bridge.training.model_load_save import build_and_load_model

    bridge, provider = bridge_of(hf, dtype, load=False)
    provider.perform_initialization = False
    return bridge, provider, build_and_load_model(str(megatron / "release"), provider, use_cpu_init=True)


def to_hf(megatron: Path, hf: Path, target: Path) -> None:
    """What `AutoBridge.export_ckpt` does, less the tokenizer that a generated directory does not have."""
    bridge, _, model = load(megatron, hf, "bfloat16")
    bridge.hf_pretrained.config.save_pretrained(target)
    bridge.save_hf_weights(model, target, show_progress=False)


def compare(megatron: Path, hf: Path, target: Path) -> None:
    """The same in fp32, where it prints its logits' largest difference from transformers'."""
    import torch
    from transformers import AutoModelForCausalLM

    bridge, provider, model = load(megatron, hf, "float32")
    tokens = torch.randint(0, provider.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(32).expand(2, -1)
    mask = torch.ones(32, 32, dtype=torch.bool).triu(1)[None, None]  # True: not to be seen
    reference = AutoModelForCausalLM.from_pretrained(hf, torch_dtype=torch.float32).eval()
    with torch.no_grad():
        found = model[0].eval()(tokens, positions, mask)
        wanted = reference(tokens).logits
    difference = (found - wanted).abs().max().item() / wanted.abs().max().item()
    target.mkdir()
    bridge.save_hf_weights(model, target, show_progress=False)
    print(f"largest difference of logits, over the largest logit: {difference}")


if __name__ == "__main__":  # torch_dist's writer starts a process that imports this file
    prepare()
    {"to-megatron": to_megatron, "to-hf": to_hf, "compare": compare}[sys.argv[1]](*map(Path, sys.argv[2:]))
