"""Megatron-Bridge, called as its users call it: `bridge_worker.py import HF TARGET`, `bridge_worker.py export MG HF TARGET`.

Bridge imports TransformerEngine and other programs for GPUs wherever it goes. Here it runs on the CPU, with
Megatron-Core's own layers, whose names in a checkpoint are the same less the `_extra_state` objects; modules that hold
nothing answer its imports. What is done with weights and files is all Bridge's and Megatron-Core's.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import os
import socket
import sys
import types
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).parents[3]))
ABSENT = ("transformer_engine", "transformer_engine_torch", "mamba_ssm", "causal_conv1d", "fla", "mlflow", "modelopt")


class _Empty(types.ModuleType):
    """A module in which every capitalised name is a class, and every other one a module again, that does nothing."""

    __version__ = "2.12.0"  # of TransformerEngine; what Bridge asks for
    __path__: ClassVar[list[str]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        return None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name[0].islower() and len(name) > 1:
            return importlib.import_module(f"{self.__name__}.{name}")
        import torch

        setattr(self, name, type(name, (torch.nn.Module,), {}))
        return self.__dict__[name]


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname.split(".")[0] not in ABSENT:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def prepare() -> None:
    """Megatron-Core as it is without TransformerEngine, then Bridge's imports made possible, and a group of one."""
    os.environ.update(CUDA_VISIBLE_DEVICES="", TORCHDYNAMO_DISABLE="1")
    import torch.distributed

    import shared.device

    shared.device.prepare()
    sys.modules.update(dict.fromkeys(ABSENT))  # type: ignore[arg-type]  # None: cannot be imported
    for name in ("dist_checkpointing", "distributed", "extensions.transformer_engine", "models.backends", "optimizer"):
        importlib.import_module(f"megatron.core.{name}")
    for name in ("models.gpt.gpt_layer_specs", "transformer.moe.moe_layer"):
        importlib.import_module(f"megatron.core.{name}")
    for name in ABSENT:
        del sys.modules[name]
    sys.meta_path.insert(0, _Finder())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]), LOCAL_RANK="0")
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)


def bridge_of(hf: Path, dtype: str, load: bool) -> tuple[Any, Any]:
    """Bridge's AutoBridge of a Hugging Face directory, and its provider of a model on the CPU, with `load` of its weights."""
    import torch
    from megatron.bridge import AutoBridge
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    kind = getattr(torch, dtype)
    bridge = AutoBridge.from_hf_pretrained(hf, torch_dtype=kind)
    provider = bridge.to_megatron_provider(load_weights=load)
    layer = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=provider.qk_layernorm)
    provider.transformer_layer_spec = layer
    provider.params_dtype, provider.bf16, provider.use_cpu_initialization = kind, dtype == "bfloat16", True
    fusions = ("gradient_accumulation_fusion", "bias_activation_fusion", "bias_dropout_fusion", "masked_softmax_fusion")
    for name in (*fusions, "persist_layer_norm", "apply_rope_fusion"):
        setattr(provider, name, False)
    provider.finalize()
    provider.initialize_model_parallel(seed=0)
    return bridge, provider


def import_(hf: Path, target: Path) -> None:
    """What `AutoBridge.import_ckpt` does."""
    bridge, provider = bridge_of(hf, "bfloat16", load=True)
    model = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
    bridge.save_megatron_model(model, target)


def export(megatron: Path, hf: Path, target: Path) -> None:
    """A directory of `to-megatron`, loaded in fp32: its logits beside transformers', and its weights as Hugging Face's."""
    import torch
    from megatron.bridge.training.model_load_save import build_and_load_model
    from transformers import AutoModelForCausalLM

    bridge, provider = bridge_of(hf, "float32", load=False)
    model = build_and_load_model(str(megatron / "release"), provider, use_cpu_init=True)
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
    {"import": import_, "export": export}[sys.argv[1]](*map(Path, sys.argv[2:]))
