import pytest
import torch

from shared.model.cross_entropy import vocab_parallel_cross_entropy
from shared.parallel import ParallelConfig
from shared.runtime.process_groups import initialize

VOCAB, PADDED = 37, 48


@pytest.fixture(scope="module")
def group():
    initialize(ParallelConfig(), 1)
    return torch.distributed.group.WORLD


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradients_are_torchs_without_the_padding(dtype, group):
    logits = (torch.randn(5, 3, PADDED) * 4).to(dtype).requires_grad_()
    reference = logits.detach().clone().requires_grad_()
    labels = torch.randint(0, VOCAB, (5, 3))
    labels[1, 2] = -100
    weights = torch.rand(5, 3)

    loss = vocab_parallel_cross_entropy(logits, labels, vocab_size=VOCAB, group=group)
    expected = torch.nn.functional.cross_entropy(
        reference[..., :VOCAB].float().flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100
    ).view(5, 3)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)  # the same fp32 arithmetic, last bits
    assert loss[1, 2] == 0.0

    (loss * weights).sum().backward()
    (expected * weights).sum().backward()
    tolerance = 1e-6 if dtype == torch.float32 else 4e-3  # bf16 keeps 8 bits of gradients up to 1
    torch.testing.assert_close(logits.grad, reference.grad, atol=tolerance, rtol=0)
    assert torch.count_nonzero(logits.grad[..., VOCAB:]) == 0
    assert torch.count_nonzero(logits.grad[1, 2]) == 0


@pytest.mark.parametrize("vocab", [37, 21])  # the second leaves nothing but padding on rank 1
def test_two_processes_find_what_one_finds(vocab, group, worker, two_processes):
    logits, labels, weights = worker.cross_entropy_case(vocab)
    logits.requires_grad_()
    expected = vocab_parallel_cross_entropy(logits, labels, vocab_size=vocab, group=group)
    (expected * weights).sum().backward()
    found = two_processes[f"cross entropy {vocab}"]
    # Losses of size 10 and gradients up to 1, in fp32: some last bits.
    for loss, _ in found:
        torch.testing.assert_close(torch.tensor(loss), expected.detach(), atol=5e-6, rtol=0)
    gradient = torch.cat([torch.tensor(part) for _, part in found], dim=-1)
    torch.testing.assert_close(gradient, logits.grad, atol=1e-6, rtol=0)
