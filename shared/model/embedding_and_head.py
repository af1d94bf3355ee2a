"""Embedding and head variants that Megatron-Core's GPT lacks.

GPTModel builds both itself, without a spec; forward hooks change their outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from shared.architecture.architecture import Architecture, Head
from shared.model.backend import Backend


class LearnedPositions2D(torch.nn.Embedding):
    """Learned 2-D positions (GLM): the sum of a position table and a block position table, `filling`."""

    def __init__(self, rows: int, hidden_size: int) -> None:
        super().__init__(rows, hidden_size)
        self.filling = torch.nn.Embedding(rows, hidden_size)

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        """`[2, batch, sequence]` -> `[batch, sequence, hidden]`."""
        position, block_position = positions
        result: torch.Tensor = super().forward(position) + self.filling(block_position)
        return result


def adapt_embedding(embedding: LanguageModelEmbedding, architecture: Architecture, backend: Backend) -> None:
    """Apply dropout, learned positions, norm and multiplier of `architecture.embedding`."""
    value = architecture.embedding
    embedding.embedding_dropout.p = value.dropout
    if value.positions and architecture.prefix and architecture.prefix.position_streams > 1:
        config = embedding.config
        embedding.position_embeddings = LearnedPositions2D(architecture.position_rows, config.hidden_size)
        if config.perform_initialization:
            for table in embedding.position_embeddings.parameters():
                config.embedding_init_method(table)
    if value.positions:  # Megatron-Core builds this table in fp32 whatever params_dtype
        embedding.position_embeddings.to(embedding.config.params_dtype)
    if value.norm:
        config = embedding.config
        embedding.word_embeddings_layernorm = backend.norm(value.norm, extra_state=False)(
            config=config, hidden_size=config.hidden_size
        )
        embedding.word_embeddings.register_forward_hook(
            lambda module, inputs, output: embedding.word_embeddings_layernorm(output)
        )
    if value.multiplier != 1.0:

        def multiply(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            # The multiplier is rounded to the activation dtype, as in transformers.
            return output * torch.tensor(value.multiplier, dtype=output.dtype, device=output.device)

        embedding.word_embeddings.register_forward_hook(multiply)


class ReplicatedLinear(torch.nn.Module):
    """A linear layer without bias, replicated on every tensor-parallel rank."""

    def __init__(self, columns: int, rows: int, config: TransformerConfig, *, sequence_parallel: bool) -> None:
        """`sequence_parallel`: ranks see different tokens, so Megatron-Core all-reduces the gradient."""
        super().__init__()
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.empty(rows, columns, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = sequence_parallel
        if config.perform_initialization:
            config.init_method(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., columns]` -> `[..., rows]`."""
        return torch.nn.functional.linear(x, self.weight)


def factorise_embedding(embedding: LanguageModelEmbedding, columns: int, backend: Backend) -> None:
    """Replace the embedding by a table of `columns` columns and a projection to the hidden size."""
    config, scattered = embedding.config, embedding.reduce_scatter_embeddings
    embedding.word_embeddings = backend.embedding()(
        num_embeddings=embedding.vocab_size,
        embedding_dim=columns,
        init_method=config.embedding_init_method,
        reduce_scatter_embeddings=scattered,
        config=config,
        tp_group=embedding.tp_group,
    )
    embedding.projection = ReplicatedLinear(columns, config.hidden_size, config, sequence_parallel=scattered)
    embedding.word_embeddings.register_forward_hook(lambda module, inputs, output: embedding.projection(output))


def factorise_output(model: GPTModel) -> None:
    """Project hidden states to the columns of the output layer."""
    config = model.config
    model.output_projection = ReplicatedLinear(
        config.hidden_size, model.output_layer.input_size, config, sequence_parallel=config.sequence_parallel
    )
    model.output_layer.register_forward_pre_hook(lambda module, inputs: (model.output_projection(inputs[0]),))


def output_layer(model: GPTModel, architecture: Architecture, backend: Backend) -> Any:
    """Megatron-Core's output layer with `table_size` columns and a bias if the architecture has one."""
    layer = backend.output_layer()(
        architecture.table_size,
        model.vocab_size,
        config=model.config,
        init_method=model.config.init_method,
        bias=architecture.head.bias,
        skip_bias_add=False,
        gather_output=not model.parallel_output,
        skip_weight_param_allocation=model.pre_process and architecture.head.tied,
        tp_group=model.pg_collection.tp,
    )
    if layer.weight is not None:
        layer.weight.is_embedding_or_output_parameter = True
    return layer


def adapt_output(layer: torch.nn.Module, head: Head) -> None:
    """Apply NormHead, logit multiplier and logit soft cap."""
    if head.normalized:

        def normalize(layer: torch.nn.Module, inputs: Any, others: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            # In every forward pass, so the gradient goes through the norm. A row lies on one tensor-parallel rank.
            return inputs, others | {"weight": torch.nn.functional.normalize(layer.weight)}

        layer.register_forward_pre_hook(normalize, with_kwargs=True)
    multiplier, cap = head.multiplier, head.softcap
    if multiplier == 1.0 and cap is None:
        return

    def scale(module: torch.nn.Module, inputs: Any, output: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
        logits, bias = output
        if multiplier != 1.0:
            logits = logits * multiplier
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        return logits, bias

    layer.register_forward_hook(scale)
