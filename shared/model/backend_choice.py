"""The backend of a training run: `te` or `local`. Imports neither torch nor Megatron-Core before a model is built."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Literal

from shared.architecture.architecture import Architecture
from shared.errors import UserError
from shared.kernels.attention.names import AttentionBackend
from shared.kernels.fp8.recipes import Fp8Recipe

if TYPE_CHECKING:
    from shared.model.backend import Backend

BackendName = Literal["te", "local"]
_OLDEST = "2.9"  # of TransformerEngine, as for `convert to-te`


def check_backend(name: BackendName | None, *, gpus: int) -> None:
    """Refuse `te` where it cannot be, before processes start and torch is imported.

    `gpus`: that this process may use.

    Raises:
        UserError: no GPU, or no such package.
    """
    if name == "te":
        _refuse("there is no GPU" if not gpus else None)
        _refuse(None if importlib.util.find_spec("transformer_engine") else "transformer_engine is not installed")


def choose_backend(
    name: BackendName | None,
    architecture: Architecture,
    *,
    device_type: str,
    attention_backend: AttentionBackend | None,
    fp8: Fp8Recipe | None,
    pipeline: int,
    adapters: bool = False,
) -> tuple[Backend, str]:
    """The backend, and a line that says which and why.

    Args:
        name: None: te where TransformerEngine can be used, else local.
        architecture: of the model.
        device_type: cuda or cpu.
        attention_backend: of `Backend`.
        fp8: recipe of the linear layers.
        pipeline: pipeline-parallel size.
        adapters: linear layers get adapters, which read the output of norms, too.

    Raises:
        UserError: `te` is asked for and cannot be used.
    """
    import torch

    from shared.kernels.fp8.fused import fuses
    from shared.model.backend import LocalBackend
    from shared.model.fp8_backend import Fp8Backend

    obstacle = None if name == "local" else _obstacle(device_type)
    if fp8 and name != "local" and obstacle is None:
        from shared.model import te_fp8

        obstacle = te_fp8.obstacle(fp8, num_layers=architecture.num_layers, pipeline=pipeline, **_gpu())
    if name == "te":
        _refuse(obstacle)
    if name == "local" or obstacle:
        local = LocalBackend(attention_backend)
        line = "local (--backend local)" if name == "local" else f"local: {obstacle}"
        if fp8 is None:
            return local, line
        joins = not adapters and fuses(torch.device(device_type), torch.bfloat16)
        return Fp8Backend(local, fp8, architecture.num_layers, joins_norms=joins), line

    from megatron.core.utils import get_te_version

    from shared.model.te_backend import TEBackend, left_out

    others = left_out(architecture)
    without = f"; local in it: {', '.join(others)}" if others else ""
    in_fp8 = "; FP8 has no guard and no counts in it" if fp8 else ""
    return TEBackend(attention_backend, fp8=fp8), f"te (TransformerEngine {get_te_version()}){without}{in_fp8}"


def _gpu() -> dict[str, tuple[int, int]]:
    """The GPU's compute capability, and the version of CUDA that torch was built for."""
    import torch

    major, minor = (int(number) for number in (torch.version.cuda or "0.0").split(".")[:2])
    return {"capability": torch.cuda.get_device_capability(), "cuda": (major, minor)}


def _obstacle(device_type: str) -> str | None:
    """Why TransformerEngine cannot be used; None if it can."""
    if device_type != "cuda":
        return "there is no GPU"

    from megatron.core.utils import get_te_version, is_te_min_version

    from shared.kernels.attention.needs import cannot_import

    if reason := cannot_import("transformer_engine.pytorch"):
        return reason
    if not is_te_min_version(_OLDEST):
        return f"transformer_engine {get_te_version()} is older than {_OLDEST}"
    return None


def _refuse(obstacle: str | None) -> None:
    if obstacle is None:
        return
    install = f"install transformer-engine[pytorch] {_OLDEST} or later, built for this torch, or "
    fix = install if "transformer_engine" in obstacle else ""
    raise UserError(f"--backend te: {obstacle}; {fix}leave --backend out for Megatron-Core's own modules")
