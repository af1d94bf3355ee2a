"""Megatron-Core without TransformerEngine, for programs that import TransformerEngine unconditionally.

Empty stub modules satisfy the imports. Models consist of Megatron-Core's local layers under TransformerEngine's parameter
names. Weights and files are handled by Megatron-Core and the program, unchanged.
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

sys.path.insert(0, str(Path(__file__).parents[2]))
ABSENT = (
    "transformer_engine",
    "transformer_engine_torch",
    "mamba_ssm",
    "causal_conv1d",
    "fla",
    "mlflow",
    "modelopt",
    "nvidia_resiliency_ext",
)
FUSIONS = (
    "gradient_accumulation_fusion",
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "masked_softmax_fusion",
    "persist_layer_norm",
    "apply_rope_fusion",
    "moe_permute_fusion",
    "moe_grouped_gemm",
)  # of a GPU


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
    """Megatron-Core as it is without TransformerEngine, then imports of that made possible, and a group of one; no network."""
    os.environ.update(CUDA_VISIBLE_DEVICES="", TORCHDYNAMO_DISABLE="1", HF_HUB_OFFLINE="1")
    import torch.distributed

    import shared.runtime.device

    shared.runtime.device.select_device()
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


def layer(experts: int | None, qk_layernorm: bool) -> Any:
    """A layer's spec: Megatron-Core's own modules, and a norm within the linear layer behind it as TransformerEngine has it."""
    import torch
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

    class NormedLinear(ColumnParallelLinear):  # type: ignore[misc]
        def __init__(self, input_size: int, *args: Any, config: Any, **kwargs: Any) -> None:
            super().__init__(input_size, *args, config=config, **kwargs)
            self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))

        def forward(self, values: Any, *args: Any, **kwargs: Any) -> Any:
            epsilon = self.config.layernorm_epsilon
            normed = torch.nn.functional.rms_norm(values, (values.shape[-1],), self.layer_norm_weight, epsilon)
            return super().forward(normed, *args, **kwargs)

        def sharded_state_dict(
            self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
        ) -> Any:
            state = self.state_dict(prefix="", keep_vars=True)
            return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0, "bias": 0}, sharded_offsets)

    spec = get_gpt_layer_local_spec(
        num_experts=experts, moe_grouped_gemm=False, normalization="RMSNorm", qk_layernorm=qk_layernorm
    )
    spec.submodules.sharded_state_dict_keys_map = {}
    spec.submodules.input_layernorm = IdentityOp
    spec.submodules.self_attention.submodules.linear_qkv = NormedLinear
    if not experts:
        spec.submodules.pre_mlp_layernorm = IdentityOp
        spec.submodules.mlp.keywords["submodules"].linear_fc1 = NormedLinear
    return spec


def save(model: Any, target: Path) -> None:
    """Megatron-Core writes a model's weights, as `release`."""
    from megatron.core import dist_checkpointing

    (target / "release").mkdir(parents=True)
    dist_checkpointing.save(model.sharded_state_dict(), str(target / "release"))
    (target / "latest_checkpointed_iteration.txt").write_text("release", encoding="utf-8")


def load(model: Any, megatron: Path) -> None:
    """Megatron-Core fills a model from a directory of `convert to-megatron`."""
    from megatron.core import dist_checkpointing

    wanted = model.sharded_state_dict()
    found = dist_checkpointing.load(wanted, str(megatron / "release"))
    model.load_state_dict({name: found[name] for name in wanted})
