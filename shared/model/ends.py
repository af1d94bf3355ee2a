"""The two ends of a model, where families differ from Megatron-Core's GPT: after the embedding, and at the logits.

Megatron-Core builds both ends itself and has no place for other ones; forward hooks add to their results.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear

from shared.model.architecture import Architecture
from shared.model.norm import norm_of


def adapt_embedding(embedding: LanguageModelEmbedding, architecture: Architecture) -> None:
    """The architecture's norm, multiplier and dropout of embedded tokens."""
    embedding.embedding_dropout.p = architecture.embedding_dropout
    if architecture.positions == "learned":  # Megatron-Core makes this table, alone, in fp32 whatever the type
        embedding.position_embeddings.to(embedding.config.params_dtype)
    if architecture.embedding_norm:
        config = embedding.config
        embedding.word_embeddings_layernorm = norm_of(architecture, checkpointed=False)(
            config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
        )
        embedding.word_embeddings.register_forward_hook(
            lambda module, inputs, output: embedding.word_embeddings_layernorm(output)
        )
    if architecture.embedding_multiplier != 1.0:

        def multiply(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            # Rounded to the activations' type, as transformers does.
            return output * torch.tensor(architecture.embedding_multiplier, dtype=output.dtype, device=output.device)

        embedding.word_embeddings.register_forward_hook(multiply)


def output_layer_with_bias(model: GPTModel) -> ColumnParallelLinear:
    """An output layer as Megatron-Core's GPT has it, and a bias of the logits."""
    layer = ColumnParallelLinear(
        model.config.hidden_size,
        model.vocab_size,
        config=model.config,
        init_method=model.config.init_method,
        bias=True,
        skip_bias_add=False,
        gather_output=not model.parallel_output,
        tp_group=model.pg_collection.tp,
    )
    layer.weight.is_embedding_or_output_parameter = True
    return layer


def adapt_output(layer: ColumnParallelLinear, architecture: Architecture) -> None:
    """The architecture's norm of the layer's rows, and its multiplier and soft cap of logits."""
    if architecture.normalized_head:

        def normalize(layer: torch.nn.Module, inputs: Any, others: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            # Of the weight as it is, at every step: the gradient goes through the norm. A row is a process's own.
            return inputs, others | {"weight": torch.nn.functional.normalize(layer.weight)}

        layer.register_forward_pre_hook(normalize, with_kwargs=True)
    multiplier, cap = architecture.logit_multiplier, architecture.logit_softcap
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
