"""Fields of the decoders that are spelt as GPT-2's: `n_embd`, `n_head`, `n_layer`, `attn_pdrop`..."""

from __future__ import annotations

from typing import Any

from shared.architecture.architecture import Architecture
from shared.families.common.decoder import GELU, activation, gelu_name
from shared.families.common.fields import Fields


def gpt_fields(fields: Fields, *, dropout: float, default_activation: str, tied: bool) -> dict[str, Any]:
    """The fields of an Architecture; `dropout` is the transformers class's default of all three kinds."""
    fields.expect("scale_attn_weights", True, why="scores are scaled by 1 / sqrt(head_dim)")
    # Of heads that are no language models, and of programs that ran the models.
    fields.ignore("summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type")
    fields.ignore("summary_use_proj", "gradient_checkpointing", "n_ctx")
    hidden, heads = fields.get("n_embd", int), fields.get("n_head", int)
    return {
        "num_layers": fields.get("n_layer", int),
        "hidden_size": hidden,
        "ffn_hidden_size": fields.get("n_inner", int, 4 * hidden),
        "num_attention_heads": heads,
        "head_dim": hidden // heads,
        "vocab_size": fields.get("vocab_size", int),
        "max_position_embeddings": fields.get("n_positions", int),
        "norm": "layernorm",
        "norm_bias": True,
        "norm_epsilon": fields.get("layer_norm_epsilon", float, 1e-5),
        "activation": activation(fields, "activation_function", GELU, default_activation),
        "mlp_bias": True,
        "attention_dropout": fields.get("attn_pdrop", float, dropout),
        "hidden_dropout": fields.get("resid_pdrop", float, dropout),
        "embedding_dropout": fields.get("embd_pdrop", float, dropout),
        "tied_embeddings": fields.get("tie_word_embeddings", bool, tied),
        "initializer_range": fields.get("initializer_range", float, 0.02),
    }


def written_gpt_fields(a: Architecture) -> dict[str, Any]:
    """`gpt_fields` backwards."""
    return {
        "n_layer": a.num_layers,
        "n_embd": a.hidden_size,
        "n_inner": a.ffn_hidden_size,
        "n_head": a.num_attention_heads,
        "vocab_size": a.vocab_size,
        "n_positions": a.max_position_embeddings,
        "layer_norm_epsilon": a.norm_epsilon,
        "activation_function": gelu_name(a),
        "attn_pdrop": a.attention_dropout,
        "resid_pdrop": a.hidden_dropout,
        "embd_pdrop": a.embedding_dropout,
        "tie_word_embeddings": a.tied_embeddings,
        "initializer_range": a.initializer_range,
    }
