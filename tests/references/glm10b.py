"""GLM of 2021 (Du et al., 2022): reference for the converted model.

Written from the published description; shares no code with the code under test.
"""

import torch
from torch.nn import Embedding, LayerNorm, Linear, Module, ModuleList
from torch.nn.functional import gelu
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class Config(PretrainedConfig):
    model_type = "glm"

    def __init__(self, tie_word_embeddings=True, **kwargs):
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


def places(row, c):
    """Of one row: the place of each token in the text and in what fills its blank, and which sees which."""
    row = row.tolist()
    length = row.index(c.sop_token_id)
    kinds = {getattr(c, f"{kind}mask_token_id", None) for kind in ("", "s", "g")}
    blank = next(place for place, token in enumerate(row[:length]) if token in kinds)
    filling = len(row) - length
    sees = torch.ones(len(row), len(row), dtype=torch.long).tril()
    sees[:, :length] = 1
    return torch.tensor([[*range(length), *[blank] * filling], [*[0] * length, *range(1, filling + 1)]]), sees


class Attention(Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.size = c.num_attention_heads, c.hidden_size // c.num_attention_heads
        self.query_key_value = Linear(c.hidden_size, 3 * c.hidden_size)
        self.dense = Linear(c.hidden_size, c.hidden_size)

    def forward(self, x, sees):
        # all heads' queries, all their keys, all their values
        q, k, v = self.query_key_value(x).view(-1, 3, self.heads, self.size).unbind(1)
        scores = torch.einsum("ihd,jhd->hij", q, k) / self.size**0.5
        weights = scores.masked_fill(sees == 0, -torch.inf).softmax(-1)
        return self.dense(torch.einsum("hij,jhd->ihd", weights, v).flatten(1))


class MLP(Module):
    def __init__(self, c):
        super().__init__()
        self.dense_h_to_4h = Linear(c.hidden_size, 4 * c.hidden_size)
        self.dense_4h_to_h = Linear(4 * c.hidden_size, c.hidden_size)

    def forward(self, x):
        return self.dense_4h_to_h(gelu(self.dense_h_to_4h(x)))


class Block(Module):
    def __init__(self, c):
        super().__init__()
        self.attention, self.mlp = Attention(c), MLP(c)
        self.input_layernorm, self.post_attention_layernorm = (LayerNorm(c.hidden_size, eps=1e-5) for _ in range(2))

    def forward(self, x, sees):
        x = x + self.attention(self.input_layernorm(x), sees)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(Module):
    def __init__(self, c):
        super().__init__()
        self.position_embeddings = Embedding(c.max_sequence_length + 1, c.hidden_size)
        self.block_position_embeddings = Embedding(c.max_sequence_length + 1, c.hidden_size)
        self.layers = ModuleList(Block(c) for _ in range(c.num_layers))
        self.final_layernorm = LayerNorm(c.hidden_size, eps=1e-5)


class Model(Module):
    def __init__(self, c):
        super().__init__()
        self.word_embeddings = Embedding(c.vocab_size, c.hidden_size)
        self.transformer = Transformer(c)


class LanguageModel(PreTrainedModel):
    config_class = Config
    base_model_prefix = "glm"

    def __init__(self, config):
        super().__init__(config)
        self.glm = Model(config)
        self.post_init()

    def forward(self, input_ids, position_ids=None, attention_mask=None):
        parts, rows = self.glm.transformer, []
        for index, row in enumerate(input_ids):
            positions, sees = places(row, self.config)
            if position_ids is not None:  # what the tokenizer would have made of the row
                assert torch.equal(position_ids[index], positions)
                assert torch.equal(attention_mask[index, 0], sees)
            x = self.glm.word_embeddings(row)
            x = x + parts.position_embeddings(positions[0]) + parts.block_position_embeddings(positions[1])
            for block in parts.layers:
                x = block(x, sees)
            rows.append(parts.final_layernorm(x) @ self.glm.word_embeddings.weight.T)
        return CausalLMOutput(logits=torch.stack(rows))
