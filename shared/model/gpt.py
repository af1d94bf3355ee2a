"""Megatron-Core models from an `Architecture`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.activations import quick_gelu
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch.nn import functional

from shared.architecture.architecture import Activation, Architecture, Attention, LatentAttention
from shared.kernels.attention.masks import segment_positions
from shared.model.backend import LOCAL, Backend
from shared.model.context_parallel import COMMUNICATION, local_part
from shared.model.cross_entropy import vocab_parallel_cross_entropy
from shared.model.embedding_and_head import (
    adapt_embedding,
    adapt_output,
    factorise_embedding,
    factorise_output,
    output_layer,
)
from shared.model.gated_delta_net import delta_net_config
from shared.model.mla import mla_config
from shared.model.moe import moe_config
from shared.model.prefix_lm import prefix_inputs
from shared.model.recompute import Recompute, recompute_fields
from shared.model.rope import PrefixRotaryAngles, RotaryAngles
from shared.model.spec import block_spec, model_rotary, mtp_spec
from shared.model.support import check_supported
from shared.parallel import ParallelConfig
from shared.runtime.device import select_device

_ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "swiglu": functional.silu,
    "geglu": functional.gelu,
    "geglu_tanh": partial(functional.gelu, approximate="tanh"),
    "quick_geglu": quick_gelu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
}


def _position_embedding_type(architecture: Architecture) -> str:
    """Megatron-Core's `position_embedding_type`."""
    if architecture.embedding.positions:
        return "learned_absolute"
    if model_rotary(architecture) is None:
        return "none"
    # M-RoPE is the only RoPE of Megatron-Core that reads position ids.
    return "mrope" if architecture.prefix else "rope"


class LanguageModel(GPTModel):
    """Megatron-Core's GPT with the architecture's RoPE and a loss without vocabulary padding.

    `model(input_ids, position_ids, attention_mask, labels=labels)`:

    - input_ids, labels: `[batch, sequence]`. A prefix LM computes positions and mask from the ids, on every stage.
    - attention_mask: segments `[batch, sequence]` (`shared.kernels.attention.masks`); None: one segment per row.
    - With context parallelism all but the segments are this rank's part of the sequence (`context_parallel.local_part`).
    - Last pipeline stage with labels: loss per token `[batch, sequence]`, fp32, nats; 0 for negative labels.
    - Last stage without labels: this rank's logits `[batch, sequence, padded_vocab / tensor_parallel]`.
    - Other stages: hidden states.
    - padding_mask: bool `[batch, sequence]`, True for padding, on every stage; MoE leaves these tokens out of its balance.
    - Labels `[1 + mtp.depth, batch, sequence]`: losses of the next token and of each MTP layer. MTP layers do not run with
      other labels.
    """

    def __init__(
        self,
        architecture: Architecture,
        config: TransformerConfig,
        vp_stage: int | None,
        backend: Backend = LOCAL,
    ) -> None:
        num_layers = get_num_layers_to_build(config, vp_stage)
        super().__init__(
            config=config,
            transformer_layer_spec=block_spec(
                architecture, backend, get_transformer_layer_offset(config, vp_stage), num_layers
            ),
            vocab_size=architecture.padded_vocab_size(config.tensor_model_parallel_size),
            max_sequence_length=architecture.position_rows,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            share_embeddings_and_output_weights=architecture.head.tied,
            position_embedding_type=_position_embedding_type(architecture),
            mtp_block_spec=mtp_spec(architecture, backend),
            vp_stage=vp_stage,
        )
        self.architecture = architecture
        rotary, attention = model_rotary(architecture), architecture.attention
        if rotary and architecture.prefix:
            self.rotary_pos_emb = PrefixRotaryAngles(
                rotary, attention.rotary_dim // architecture.prefix.position_streams
            )
        elif rotary and isinstance(attention, Attention):
            dim = attention.rotary_dim if rotary.dim is None else rotary.dim
            self.rotary_pos_emb = RotaryAngles(rotary, dim, architecture.max_position_embeddings)
        factorised_size = architecture.embedding.factorised_size
        if self.pre_process or self.mtp_process:
            if factorised_size is not None:
                factorise_embedding(self.embedding, factorised_size, backend)
            adapt_embedding(self.embedding, architecture, backend)
        if self.post_process:
            if architecture.head.bias or factorised_size is not None:
                self.output_layer = output_layer(self, architecture, backend)
            if factorised_size is not None:
                factorise_output(self)
            adapt_output(self.output_layer, architecture.head)
        if factorised_size is not None and (self.pre_process or self.post_process):
            self.setup_embeddings_and_output_layer()  # again, for the replaced weights; tied stages must both call it

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **others: Any,
    ) -> torch.Tensor:
        """See the class; `others`: further arguments of GPTModel."""
        if self.architecture.prefix:
            labels = others.get("labels")
            streams, attention_mask = prefix_inputs(self.architecture.prefix, input_ids, attention_mask, labels)
            position_ids = streams[: self.architecture.prefix.position_streams]
        elif positions := self.architecture.embedding.positions:
            if attention_mask is not None:  # packed rows: positions start at 0 in every segment
                position_ids = local_part(segment_positions(attention_mask))
            position_ids = position_ids + positions.offset
        return super().forward(input_ids, position_ids, attention_mask, **others)

    def _preprocess(self, **given: Any) -> tuple[Any, ...]:
        """Splits the padding mask over sequence-parallel ranks on every stage; Megatron-Core does on the first only."""
        padding_mask = given.pop("padding_mask", None)
        made: tuple[Any, ...] = super()._preprocess(**given)
        if padding_mask is not None and self.config.sequence_parallel:
            group = self.pg_collection.tp
            padding_mask = padding_mask.chunk(group.size(), dim=1)[group.rank()]
        return (*made[:5], padding_mask, *made[6:])

    def _postprocess(self, **given: Any) -> torch.Tensor:
        """See the class. Replaces Megatron-Core's MTP loss, which has no argument for MTP labels."""
        if not (self.mtp_process and self.post_process):
            made: torch.Tensor = super()._postprocess(**given)
            return made
        states, labels = given["hidden_states"], given["labels"]
        depth = self.config.mtp_num_layers if labels is not None and labels.dim() == 3 else 0
        if depth:
            wanted = ("input_ids", "position_ids", "hidden_states", "attention_mask", "padding_mask", "rotary_pos_emb")
            states = self.mtp(**{name: given[name] for name in wanted}, embedding=self.embedding)
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        found = [self.output_layer(state, weight=weight)[0] for state in states.chunk(1 + depth)]
        if labels is None:
            return found[0].transpose(0, 1).contiguous()
        if not depth:
            return self.compute_language_model_loss(labels, found[0])
        return torch.stack([self.compute_language_model_loss(*each) for each in zip(labels, found, strict=True)])

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Labels `[batch, sequence]`, logits `[sequence, batch, columns]` -> losses `[batch, sequence]`."""
        loss = vocab_parallel_cross_entropy(
            logits, labels.transpose(0, 1), vocab_size=self.architecture.vocab_size, group=self.pg_collection.tp
        )
        return loss.transpose(0, 1)


def _pipeline_layout(architecture: Architecture, layout: ParallelConfig) -> list[list[str]] | None:
    """Megatron-Core's kinds of layers of each model chunk, in the order of the layers; None: equal shares."""
    if layout.pipeline_layers is None:
        return None
    chunks = [["decoder"] * layers for layers in layout.pipeline_layers]
    chunks[0].insert(0, "embedding")
    chunks[-1] += ["mtp"] * architecture.mtp_depth + ["loss"]
    return chunks


def uneven_layers(config: TransformerConfig) -> list[int] | None:
    """Decoder layers of each model chunk, in the order of the layers; None: equal shares."""
    layout = config.pipeline_model_parallel_layout
    if layout is None:
        return None
    layers = [kinds.count(LayerType.decoder) for of_ranks in zip(*layout.layout, strict=True) for kinds in of_ranks]
    return layers if len(set(layers)) > 1 else None


def transformer_config(
    architecture: Architecture,
    layout: ParallelConfig,
    dtype: torch.dtype,
    *,
    recompute: Recompute | tuple[Recompute, ...] = "none",
    **overrides: Any,
) -> TransformerConfig:
    """`TransformerConfig` of `architecture`; `overrides` are further fields of it.

    Dropout comes from the architecture. Fusions that need Apex, TransformerEngine or a compiler are off.
    """
    on_cpu = select_device().type == "cpu"
    attention, mlp, moe = architecture.attention, architecture.feed_forward, architecture.moe
    plain = attention if isinstance(attention, Attention) else None
    norm, rotary = architecture.layers[0].norm, model_rotary(architecture)
    no_rope = [int(isinstance(layer.mixer, Attention) and layer.mixer.rotary is None) for layer in architecture.layers]
    fields: dict[str, Any] = {
        "num_layers": architecture.num_layers,
        "mtp_num_layers": architecture.mtp.depth if architecture.mtp else None,
        "hidden_size": architecture.hidden_size,
        "ffn_hidden_size": mlp.ffn_hidden_size,  # of dense layers
        "num_attention_heads": attention.heads,
        "num_query_groups": attention.groups,
        "kv_channels": attention.head_dim,
        "normalization": "LayerNorm" if norm.kind == "layernorm" else "RMSNorm",
        "layernorm_zero_centered_gamma": norm.zero_centered_gamma,
        "layernorm_epsilon": norm.epsilon,
        "gated_linear_unit": mlp.gated,
        "activation_func": _ACTIVATIONS[mlp.activation],
        "activation_func_clamp_value": mlp.clamp,
        "glu_linear_offset": mlp.up_offset,
        "add_bias_linear": False,  # each layer's bias is in the spec
        "add_qkv_bias": plain is not None and plain.bias,
        "qk_layernorm": plain is not None and plain.qk_norm is not None,
        "attention_output_gate": plain is not None and plain.gate,
        "rotary_interleaved": rotary is not None and rotary.interleaved,
        "mrope_section": [attention.rotary_dim] if rotary and architecture.prefix else None,
        "no_rope_freq": no_rope if rotary and any(no_rope) else None,
        "hidden_dropout": architecture.layers[0].residual.dropout,
        "attention_dropout": attention.dropout,
        "init_method_std": architecture.initializer_range,
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "virtual_pipeline_model_parallel_size": layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        "pipeline_model_parallel_layout": _pipeline_layout(architecture, layout),
        "context_parallel_size": layout.context,
        "cp_comm_type": COMMUNICATION[layout.context_exchange],
        "expert_model_parallel_size": layout.expert,
        "expert_tensor_parallel_size": layout.etp,
        "sequence_parallel": layout.sequence_parallel,
        # Interleaved schedule with PP=2: next and previous stage are the same rank. Batched p2p cannot tell forward from
        # backward tensors there and would swap them silently.
        "overlap_p2p_comm": layout.virtual_pipeline > 1,
        "batch_p2p_comm": layout.virtual_pipeline == 1,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "use_cpu_initialization": on_cpu,
        "perform_initialization": False,
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "apply_rope_fusion": False,
        **recompute_fields(recompute),
        **(moe_config(architecture, moe) if moe else {}),
        **(delta_net_config(architecture, architecture.delta_net) if architecture.delta_net else {}),
    }
    if isinstance(attention, LatentAttention):
        return MLATransformerConfig(**{**fields, **mla_config(attention), **overrides})
    return TransformerConfig(**{**fields, **overrides})


def build(
    architecture: Architecture,
    layout: ParallelConfig,
    *,
    dtype: torch.dtype,
    recompute: Recompute | tuple[Recompute, ...] = "none",
    backend: Backend = LOCAL,
    **overrides: Any,
) -> list[LanguageModel]:
    """This rank's model chunks on its device, one per virtual pipeline stage. Call `initialize(layout, seed)` first.

    Weights are NaN until `shared.model.weights.load` fills them, so a weight that was not loaded shows up;
    `perform_initialization=True` in `overrides` initialises them randomly instead.

    Raises:
        UserError: the architecture cannot be trained, or the layout does not fit it.
    """
    check_supported(architecture)
    layout.check_model(architecture)
    config = transformer_config(
        architecture, layout, dtype, recompute=recompute, **{**backend.config_fields(), **overrides}
    )
    stages: list[int | None] = list(range(layout.virtual_pipeline)) if layout.virtual_pipeline > 1 else [None]
    chunks = [LanguageModel(architecture, config, stage, backend).to(select_device()) for stage in stages]
    if not config.perform_initialization:
        with torch.no_grad():
            for chunk in chunks:
                for parameter in chunk.parameters():
                    parameter.fill_(float("nan"))
    return chunks
