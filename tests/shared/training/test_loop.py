"""An update keeps the device busy: the host waits for it once, for the loss."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shared.model import gpt, weights
from shared.parallel import ParallelConfig
from shared.runtime import process_groups
from shared.training.data import Batch
from shared.training.loop import forward_backward, model_overrides
from shared.training.optimizer import wrap

# Operations whose result the host waits for on a GPU: `item`, `bool`, masks as an index, comparisons of whole tensors.
WAITS = {"_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "unique_consecutive", "_unique2"}


class Waits(TorchDispatchMode):
    """Records operations that the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.__name__.partition(".")[0]
        indices = args[1] if name in ("index", "index_put_") else ()
        if name in WAITS or any(index is not None and index.dtype == torch.bool for index in indices):
            self.found.append(name)
        return operation(*args, **(kwargs or {}))


class Rows:
    """Rows of one word each."""

    sequence_length = 20

    def __len__(self) -> int:
        return 40

    def batch(self, positions) -> Batch:
        rows = torch.from_numpy(positions % 11)[:, None].expand(-1, 20).contiguous()
        return Batch(tokens=rows, labels=rows.clone())


def test_the_host_waits_for_the_loss_only(make_config, architecture, start):
    """Without recomputation: Megatron-Core's recomputed attention reads its mask type from a tensor on the host."""
    config = make_config(sequence_length=20)
    layout = ParallelConfig()
    device = process_groups.initialize(layout, 1)
    chunks = gpt.build(architecture, layout, dtype=torch.float32, recompute=config.recompute, **model_overrides(config))
    weights.load(chunks, start)
    model = wrap(chunks, overlap=True)
    with Waits() as waits:
        loss = forward_backward(config, model, Rows(), 0, device)
    assert waits.found == []
    assert loss.targets == 8 * 20
    with Waits() as control:
        loss_of_a_tensor = torch.ones(3)[torch.tensor([True, False, True])].sum().item()
    assert loss_of_a_tensor == 2
    assert control.found == ["index", "_local_scalar_dense"]
