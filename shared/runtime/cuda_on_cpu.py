"""CPU replacements of torch's CUDA functions: unmodified Megatron-Core runs without a GPU.

Megatron-Core names CUDA in some five hundred places and has no option for another device. They reduce to
`torch.cuda.current_device()` as a device, the literal "cuda" as a device, `Tensor.cuda()`, streams and events, the CUDA
random generator, and `Tensor.type()`, by which its optimizers sort parameters. This module replaces exactly those. All else,
arithmetic, communication (gloo) and checkpointing, is the code of a GPU run.

Why not a `TorchFunctionMode`: a mode is per thread, so autograd and data-loader threads would be without it, and it adds
Python overhead to every torch call. A replacement costs only the calls it changes.

`torch.cuda.is_available()` and `Tensor.is_cuda` stay False: torch's own code reads them. Never installed with CUDA present.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils import _device as torch_device_context

CPU = torch.device("cpu")

# Functions with `device=` and `pin_memory=`; includes those that Megatron-Core calls with a CUDA device.
FACTORIES = (
    "arange", "as_tensor", "empty", "empty_like", "empty_strided", "eye", "full", "full_like", "linspace", "normal",
    "ones", "ones_like", "rand", "rand_like", "randint", "randint_like", "randn", "randn_like", "randperm", "tensor",
    "tril_indices", "triu_indices", "zeros", "zeros_like",
)  # fmt: skip
TENSOR_FACTORIES = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")

_installed = False


def install() -> None:
    """Install the replacements for the rest of this process; idempotent. RuntimeError if CUDA is present."""
    global _installed
    if torch.cuda.is_available():
        raise RuntimeError("the CPU host layer must not be installed where CUDA is present")
    if _installed:
        return
    # `with torch.device("meta")` recognises functions by identity, in a table cached on first use. Fill it now, with the
    # originals: the wrappers call them.
    torch_device_context._device_constructors()
    # No torch.compile on the CPU: Megatron-Core's router and activations run eagerly.
    torch.compiler.set_stance("force_eager")
    for name in FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    for name in TENSOR_FACTORIES:
        setattr(torch.Tensor, name, _on_cpu(getattr(torch.Tensor, name)))
    _replace_tensor_methods()
    _replace_cuda_module()
    _replace_all_to_all()
    _replace_collectives_of_parts()
    _installed = True


def _is_cuda(device: Any) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """`factory` with CUDA devices replaced by the CPU, and without `pin_memory`, which needs a GPU."""

    @functools.wraps(factory)
    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        if kwargs:
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = CPU
            kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return on_cpu


def _replace_tensor_methods() -> None:
    """Override `cuda`, `to`, `type`, `pin_memory`, `record_stream` on the Python class, ahead of its C++ base."""
    original_to, original_type = torch.Tensor.to, torch.Tensor.type

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _is_cuda(args[0]):
            args = (CPU, *args[1:])
        if kwargs and _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return original_to(self, *args, **kwargs)

    def type_(self: torch.Tensor, dtype: Any = None, **kwargs: Any) -> Any:
        if dtype is not None:
            return original_type(self, dtype, **kwargs)
        # Megatron-Core's optimizers accept `torch.cuda.*Tensor` types only.
        return original_type(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.to = to
    torch.Tensor.type = type_
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self
    torch.Tensor.record_stream = lambda self, stream: None


class Stream:
    """A stream of a synchronous device: waiting is a no-op."""

    cuda_stream = 0
    device = CPU

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """The least and the greatest priority."""
        return 0, 0

    def record_event(self, event: Event | None = None) -> Event:
        """Record `event`, or a new one."""
        event = event or Event()
        event.record()
        return event

    def query(self) -> bool:
        """Whether all work is done."""
        return True

    def _nothing(self, *args: Any) -> None:
        pass

    synchronize = wait_event = wait_stream = _nothing


class Event:
    """An event, timed by the host's clock."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._seconds = 0.0

    def record(self, stream: Stream | None = None) -> None:
        """Record the current time."""
        self._seconds = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds from this event to `end`."""
        return (end._seconds - self._seconds) * 1000.0

    def query(self) -> bool:
        """Whether the event has happened."""
        return True

    def _nothing(self, *args: Any) -> None:
        pass

    synchronize = wait = _nothing


class _Generators:
    """`torch.cuda.default_generators`: the CPU generator at every index."""

    def __getitem__(self, index: Any) -> torch.Generator:
        return torch.default_generator


@contextlib.contextmanager
def _context(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield


def _replace_all_to_all() -> None:
    """Accept tensors as split sizes: Megatron-Core's MoE token dispatcher converts them only when copying from a GPU."""
    original = torch.distributed.all_to_all_single

    @functools.wraps(original)
    def all_to_all_single(output: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
        args = tuple(size.tolist() if isinstance(size, torch.Tensor) else size for size in args)
        kwargs = {name: v.tolist() if isinstance(v, torch.Tensor) else v for name, v in kwargs.items()}
        return original(output, input, *args, **kwargs)

    torch.distributed.all_to_all_single = all_to_all_single


def _replace_collectives_of_parts() -> None:
    """Parts of different lengths in `all_gather` and `reduce_scatter`, which NCCL takes and gloo refuses: one broadcast, or one
    reduction, for each part. Expert tensor parallelism gathers the tokens of its ranks by them.
    """
    original_gather, original_scatter = torch.distributed.all_gather, torch.distributed.reduce_scatter

    def equal(parts: list[torch.Tensor]) -> bool:  # every rank has the same lengths, and comes to the same answer
        return len({part.shape for part in parts}) == 1

    @functools.wraps(original_gather)
    def all_gather(tensor_list: Any, tensor: torch.Tensor, group: Any = None, async_op: bool = False) -> Any:
        if async_op or equal(tensor_list):
            return original_gather(tensor_list, tensor, group=group, async_op=async_op)
        tensor_list[torch.distributed.get_rank(group)].copy_(tensor)
        for rank, part in enumerate(tensor_list):
            if part.numel():
                torch.distributed.broadcast(part, group=group, group_src=rank)
        return None

    @functools.wraps(original_scatter)
    def reduce_scatter(
        output: torch.Tensor,
        input_list: Any,
        op: Any = torch.distributed.ReduceOp.SUM,
        group: Any = None,
        **kwargs: Any,
    ) -> Any:
        if kwargs.get("async_op") or equal(input_list):
            return original_scatter(output, input_list, op=op, group=group, **kwargs)
        for rank, part in enumerate(input_list):
            if part.numel():
                reduced = part.clone()  # gloo uses the tensor of every rank for partial sums
                torch.distributed.reduce(reduced, op=op, group=group, group_dst=rank)
                if rank == torch.distributed.get_rank(group):
                    output.copy_(reduced)
        return None

    torch.distributed.all_gather, torch.distributed.reduce_scatter = all_gather, reduce_scatter


def _replace_cuda_module() -> None:
    def nothing() -> Callable[..., None]:
        """A new no-op for each name: torch.compile's tables refuse one function under two names."""
        return lambda *args, **kwargs: None

    stream = Stream()
    replacements: dict[str, Any] = {
        # A device object: Megatron-Core passes it on as `device=`.
        "current_device": lambda: CPU,
        "device": _context,
        "stream": _context,
        "Stream": Stream,
        "Event": Event,
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "set_stream": nothing(),
        "set_device": nothing(),
        "synchronize": nothing(),
        "empty_cache": nothing(),
        "is_current_stream_capturing": lambda: False,
        # torch's `_lazy_call` and `_lazy_init`, which Megatron-Core imports by name, then act immediately.
        "is_initialized": lambda: True,
        "default_generators": _Generators(),
        "memory_stats": lambda device=None: {},
        "reset_peak_memory_stats": nothing(),
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
    # `memory_allocated` and the like read `torch.cuda.memory.memory_stats`: an empty dict gives 0.
    torch.cuda.memory.memory_stats = replacements["memory_stats"]
    torch.cuda.memory.reset_peak_memory_stats = replacements["reset_peak_memory_stats"]
    for module in (torch.cuda, torch.cuda.random):
        for name, replacement in {
            "get_rng_state": lambda device=None: torch.get_rng_state(),
            "set_rng_state": lambda new_state, device=None: torch.set_rng_state(new_state),
            "manual_seed": lambda seed: torch.default_generator.manual_seed(seed) and None,
            "manual_seed_all": nothing(),  # torch.manual_seed, its caller, has seeded the CPU's generator already
            "initial_seed": torch.initial_seed,
        }.items():
            setattr(module, name, replacement)
    for name in ("range_push", "range_pop", "range_start", "range_end", "mark"):
        setattr(torch.cuda.nvtx, name, nothing())
    torch.cuda.nvtx.range = _context
