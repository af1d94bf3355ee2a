"""AdamW's moments in host memory: `--offload-optimizer`.

Between updates the two moments, 8 bytes a parameter, are in the host's memory, pinned. An update takes a part of them to the GPU,
updates its weights there, and takes them back, part after part. Its numbers are those of an update without the flag, to the bit,
so that a run may change the flag where it is resumed.

ZeRO-Offload (arXiv:2101.06840) and Megatron-Core's `HybridDeviceOptimizer` update on the CPU: half of the traffic to the GPU, but
all GPUs of a node share the bandwidth of its host memory, and sums are rounded in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

PART_BYTES = 1 << 28  # of moments on the GPU at a time, unless one weight has more


def offload(optimizer: torch.optim.Optimizer) -> None:
    """Keep the moments of AdamW (torch's or TransformerEngine's) in host memory, from its next update on."""
    optimizer.step = partial(_step, optimizer, optimizer.step)


def moment_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of moments in host memory, of parameters on a GPU."""
    return sum(
        moment.nbytes
        for parameter, state in optimizer.state.items()
        for moment in _moments(parameter, state).values()
        if moment.device != parameter.device
    )


def _step(optimizer: torch.optim.Optimizer, step: Callable[[], Any], closure: None = None) -> None:
    """An update, part by part."""
    groups = optimizer.param_groups
    try:
        for group in groups:
            parameters, counter = group["params"], group.get("step")
            optimizer.param_groups = [group]
            for part in _parts(parameters):
                group["params"] = part
                _set_counter(group, counter)
                hosts = _bring(optimizer, part)
                step()
                _take_back(optimizer, part, hosts)
            group["params"] = parameters
    finally:
        optimizer.param_groups = groups
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()  # a save reads the host's memory


def _set_counter(group: dict[str, Any], counter: int | None) -> None:
    """What TransformerEngine's FusedAdam adds one to in every call: updates before this one; none before the first."""
    if counter is None:
        group.pop("step", None)
    else:
        group["step"] = counter


def _parts(parameters: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Runs of parameters with moments of at most `PART_BYTES`; at least one parameter, at least one run."""
    part: list[torch.Tensor] = []
    size = 0
    for parameter in parameters:
        needed = 8 * parameter.numel()
        if part and size + needed > PART_BYTES:
            yield part
            part, size = [], 0
        part.append(parameter)
        size += needed
    yield part


def _moments(parameter: torch.Tensor, state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The entries of a parameter's state that are as large as the parameter."""
    return {
        name: each
        for name, each in state.items()
        if name != "step" and isinstance(each, torch.Tensor) and each.shape == parameter.shape
    }


def _bring(optimizer: torch.optim.Optimizer, part: list[torch.Tensor]) -> dict[tuple[torch.Tensor, str], torch.Tensor]:
    """Copy moments to their parameters' device; returns the host's tensors."""
    hosts = {}
    for parameter in part:
        state = optimizer.state.get(parameter, {})
        for name, host in _moments(parameter, state).items():
            if (
                host.device.type == "cpu"
            ):  # not yet so in the first update, and after a load of a state that was on a GPU
                hosts[parameter, name] = host
                state[name] = torch.empty_like(host, device=parameter.device).copy_(host, non_blocking=True)
    return hosts


def _take_back(
    optimizer: torch.optim.Optimizer,
    part: list[torch.Tensor],
    hosts: dict[tuple[torch.Tensor, str], torch.Tensor],
) -> None:
    """Copy moments to the host, and let the device's go."""
    for parameter in part:
        state = optimizer.state[parameter]
        for name, moment in _moments(parameter, state).items():
            host = hosts.get((parameter, name))
            if host is None:
                host = torch.empty_like(moment, device="cpu", pin_memory=moment.is_cuda)
            state[name] = host.copy_(moment, non_blocking=True)
