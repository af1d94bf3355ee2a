"""One rank of a world of one or two: trains a tiny model in several layouts.

Run as `python layouts_worker.py DIRECTORY`: loads `DIRECTORY/weights`, writes `DIRECTORY/results.json` from rank 0.
"""

import json
import sys
import warnings
from pathlib import Path

from shared.runtime.launch import launch

STEPS, ROWS, SEQUENCE, VOCAB = 3, 4, 24, 300
LAYOUTS = {
    "dp2": {},
    "tp2": {"tensor": 2},
    "tp2sp": {"tensor": 2, "sequence_parallel": True},
    "pp2": {"pipeline": 2},
    "pp2vp2": {"pipeline": 2, "virtual_pipeline": 2},
}


def architecture(**changes):
    """A tiny Qwen3 with every bias; `changes` as `Architecture.with_values` takes them."""
    from shared.architecture.architecture import MLP, Architecture, Attention, Head, Layer, Norm, Rotary

    norm = Norm(epsilon=1e-5)
    mixer = Attention(heads=4, groups=2, head_dim=32, rotary=Rotary(), bias=True, output_bias=True, qk_norm="head")
    layer = Layer(mixer=mixer, mlp=MLP(ffn_hidden_size=96, bias=True), norm=norm)
    tiny = Architecture(
        family="qwen3",
        hidden_size=64,
        vocab_size=VOCAB,
        max_position_embeddings=512,
        layers=(layer,) * 4,
        head=Head(tied=True, norm=norm),
        initializer_range=0.1,
    )
    return tiny.with_values(**changes)


def delta_net():
    """Gated delta nets and attention with dense MLPs: MoE has layout rules of its own."""
    from dataclasses import replace

    from shared.architecture.architecture import MLP
    from shared.families import registry

    size = replace(registry.sizes()["qwen3-next-tiny"], mtp=None, vocab_size=VOCAB)
    return size.with_layers(lambda layer: replace(layer, mlp=MLP(ffn_hidden_size=96)))


def against_megatrons_mla(model, hidden):
    """q, k, v, and the gradients of hidden states and weights, of an MLA layer of ours and of Megatron-Core's method in it.

    Megatron-Core's is given our angles and factor as its YarnRotaryEmbedding returns them. Returns two lists of tensors.
    """
    import torch
    from megatron.core.transformer.multi_latent_attention import MLASelfAttention

    from shared.model.rope import concentration_factor

    layer = model.decoder.layers[-1].self_attention
    angles, found = layer.rotary_pos_emb, []

    class Theirs(torch.nn.Module):
        get_rotary_seq_len = staticmethod(angles.get_rotary_seq_len)

        def forward(self, length, packed_seq):
            return angles(length, packed_seq=packed_seq), concentration_factor(angles.rotary)

    for method, rotary in ((type(layer), angles), (MLASelfAttention, Theirs())):
        layer.rotary_pos_emb = rotary
        leaf = hidden.clone().requires_grad_()
        layer.zero_grad()
        made = method.get_query_key_value_tensors(layer, leaf)[:3]
        outputs = [x.permute(1, 2, 0, 3) for x in made]  # as CoreAttention reads them: gradients are not contiguous
        generator = torch.Generator().manual_seed(3)
        torch.autograd.backward(outputs, [torch.randn(x.shape, generator=generator).to(x.dtype) for x in outputs])
        weights = [parameter.grad for parameter in layer.parameters() if parameter.grad is not None]
        found.append([*(x.detach() for x in made), leaf.grad, *weights])
    layer.rotary_pos_emb = angles
    return found


def save(chunks, directory, *form):
    """The weights as a torch_dist iteration, by Megatron-Core; `form`: a KeyForm, stacked by default."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from shared.model import weights

    filesystem_async._process_memory = lambda: 0  # asks psutil, no dependency of anything here, for a debugging line
    state = weights.sharded_state_dict(chunks, *form)["model"] if isinstance(chunks, list) else chunks
    dist_checkpointing.save(state, str(directory))


def make_ids():
    import torch

    return torch.randint(0, VOCAB, (ROWS, SEQUENCE + 1), generator=torch.Generator().manual_seed(5))


def cross_entropy_case(vocab):
    """Logits `[4, 2, 48]`, of which `vocab` columns count, labels with one to ignore, and weights of the losses."""
    import torch

    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(4, 2, 48, generator=generator) * 4
    labels = torch.randint(0, vocab, (4, 2), generator=generator)
    labels[0, 0] = -1
    return logits, labels, torch.rand(4, 2, generator=generator)


def cross_entropy(vocab):
    """Of every rank: the losses, and the gradient of its half of the columns."""
    import torch

    from shared.model.cross_entropy import vocab_parallel_cross_entropy

    logits, labels, weights = cross_entropy_case(vocab)
    part = logits.chunk(2, dim=-1)[torch.distributed.get_rank()].clone().requires_grad_()
    loss = vocab_parallel_cross_entropy(part, labels, vocab_size=vocab, group=torch.distributed.group.WORLD)
    (loss * weights).sum().backward()
    gathered = [None, None]
    torch.distributed.all_gather_object(gathered, (loss.tolist(), part.grad.tolist()))
    return gathered


def train(description, layout, weights_path, dtype, recompute="none"):
    """Losses of a few steps of Adam on the same rows; the distributed optimizer and the pipeline schedules."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from shared.model import weights
    from shared.model.gpt import build
    from shared.runtime.process_groups import data_parallel_size, initialize

    initialize(layout, 1)
    chunks = build(description, layout, dtype=dtype, recompute=recompute, calculate_per_token_loss=True)
    weights.load(chunks, weights_path)
    config = chunks[0].config
    config.finalize_model_grads_func = finalize_model_grads
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True)
    model = [
        DistributedDataParallel(config, ddp, chunk, disable_bucketing=index > 0) for index, chunk in enumerate(chunks)
    ]
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            lr=1e-3,
            weight_decay=0.1,
            clip_grad=1.0,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=True,
        ),
        model,
    )
    ids = make_ids()[parallel_state.get_data_parallel_rank() :: data_parallel_size()]
    positions = torch.arange(SEQUENCE)[None]

    def forward(iterator, chunk):
        row = next(iterator)
        return chunk(row[:, :-1], positions, None, labels=row[:, 1:]), total

    def total(loss):
        return loss.sum(), torch.tensor(loss.numel(), dtype=torch.int), loss.detach().sum()

    losses = []
    for _ in range(STEPS):
        for chunk in model:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        iterators = [iter(ids.split(1)) for _ in model]
        summed = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iterators if len(model) > 1 else iterators[0],
            model=model if len(model) > 1 else model[0],
            num_microbatches=len(ids),
            seq_length=SEQUENCE,
            micro_batch_size=1,
        )
        loss = torch.stack(summed).sum() if summed else torch.zeros(())
        torch.distributed.all_reduce(loss, group=parallel_state.get_data_parallel_group())
        torch.distributed.broadcast(
            loss,
            parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
        losses.append(loss.item() / (ROWS * SEQUENCE))
        successful, _, _ = optimizer.step()
        assert successful
    return losses, chunks


def main(directory):
    import torch

    from shared.families import registry
    from shared.model import weights
    from shared.model.gpt import build
    from shared.model.logits import logits
    from shared.parallel import ParallelConfig
    from shared.runtime.process_groups import initialize

    results = {}
    ids = make_ids()[:3, :SEQUENCE]
    for name, fields in LAYOUTS.items():
        losses, chunks = train(
            architecture(), ParallelConfig(processes=2, **fields), directory / "weights", torch.float32
        )
        results[name] = losses
        if name == "tp2":
            trained = logits(chunks, ids)
            if torch.distributed.get_rank() == 0:
                (directory / "trained").mkdir()
            torch.distributed.barrier()
            save(chunks, directory / "trained")
    results["bf16"], _ = train(
        architecture(),
        ParallelConfig(processes=2, tensor=2, sequence_parallel=True),
        directory / "weights",
        torch.bfloat16,
        "full",
    )

    layout = ParallelConfig(processes=2, pipeline=2)
    initialize(layout, 1)
    chunks = build(architecture(), layout, dtype=torch.float32)
    weights.load(chunks, directory / "trained")
    results["tp2 loaded at pp2"] = (logits(chunks, ids) - trained).abs().max().item()

    # One key/value head over two processes: Megatron-Core cuts inside the head.
    for name, layout in {"one": ParallelConfig(processes=2), "cut": ParallelConfig(processes=2, tensor=2)}.items():
        initialize(layout, 1)
        chunks = build(architecture(attention={"groups": 1}), layout, dtype=torch.float32)
        weights.load(chunks, directory / "one_group")
        results[f"one group {name}"] = logits(chunks, ids)[0, -1, :8].tolist()

    # Megatron-Core sums the gradient of a gated delta net's norm over TP ranks under sequence parallelism only.
    for sequence_parallel in (True, False):
        if not sequence_parallel:
            ParallelConfig.check_model = lambda self, architecture: None
        layout = ParallelConfig(processes=2, tensor=2, sequence_parallel=sequence_parallel)
        losses, chunks = train(delta_net(), layout, directory / "delta_net", torch.float32)
        (shared_norm,) = (
            value for name, value in chunks[0].named_parameters() if name.endswith("0.self_attention.out_norm.weight")
        )
        of_ranks = [torch.empty_like(shared_norm) for _ in range(2)]
        torch.distributed.all_gather(of_ranks, shared_norm.detach())
        apart = (of_ranks[0] - of_ranks[1]).abs().max().item()
        results[f"delta net {'with' if sequence_parallel else 'without'}"] = {"losses": losses, "ranks apart": apart}
    for name, fields in {"CP 2": {"context": 2}, "TP 2 SP": {"tensor": 2, "sequence_parallel": True}}.items():
        layout = ParallelConfig(processes=2, **fields)
        initialize(layout, 1)
        size = registry.sizes()["deepseek-v3-tiny"]
        (model,) = build(size, layout, dtype=torch.float32, perform_initialization=True)
        ours, theirs = against_megatrons_mla(model, torch.randn(SEQUENCE // 2, 2, size.hidden_size))
        results[f"MLA {name}"] = [len(ours), all(map(torch.equal, ours, theirs)), len(ours[0])]
    for vocab in (37, 21):
        results[f"cross entropy {vocab}"] = cross_entropy(vocab)
    if torch.distributed.get_rank() == 0:
        (directory / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    if (code := launch(2)) is not None:
        sys.exit(code)
    main(Path(sys.argv[1]))
