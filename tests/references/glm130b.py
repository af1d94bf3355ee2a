"""GLM-130B (Zeng et al., 2022): reference for the converted model.

Written from the published description; shares no code with the code under test.
"""

import torch
from torch.nn import Embedding, LayerNorm, Linear, Module, ModuleList
from torch.nn.functional import gelu
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class Config(PretrainedConfig):
    model_type = "glm130b"

    def __init__(self, tie_word_embeddings=True, **kwargs):
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


def places(row, c):
    """Of one row: the place of each token, and how long the text in front of what fills its blank is."""
    row = row.tolist()
    length = row.index(c.sop_token_id)
    short = next((token for token in (c.mask_token_id, c.smask_token_id) if token in row), None)
    if short is None:
        row.index(c.gmask_token_id)  # there is one
        return list(range(len(row))), length
    blank = row.index(short)
    return [*range(length), *[blank] * (len(row) - length)], length


def rotated(x, positions):
    """`[positions, heads, size]`: element i and i + size / 2 turn by position * 10000^(-2 i / size), in fp16's steps."""
    half = x.shape[-1] // 2
    frequencies = (10_000.0 ** (-torch.arange(half) / half)).to(torch.float16).to(torch.float32)
    angles = torch.tensor(positions)[:, None, None] * frequencies
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


class Attention(Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.size = c.num_attention_heads, c.hidden_size // c.num_attention_heads
        self.query_key_value = Linear(c.hidden_size, 3 * c.hidden_size)
        self.dense = Linear(c.hidden_size, c.hidden_size)

    def forward(self, x, positions, length):
        # each head: its query, its key, its value
        q, k, v = self.query_key_value(x).view(-1, self.heads, 3, self.size).unbind(2)
        scores = torch.einsum("ihd,jhd->hij", rotated(q, positions), rotated(k, positions)) / self.size**0.5
        hidden = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        hidden[:, :length] = False
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return self.dense(torch.einsum("hij,jhd->ihd", weights, v).flatten(1))


class MLP(Module):
    def __init__(self, c):
        super().__init__()
        self.dense_h_to_4h = Linear(c.hidden_size, 2 * c.inner_hidden_size)
        self.dense_4h_to_h = Linear(c.inner_hidden_size, c.hidden_size)

    def forward(self, x):
        up, gate = self.dense_h_to_4h(x).chunk(2, -1)
        return self.dense_4h_to_h(up * gelu(gate))


class Block(Module):
    def __init__(self, c):
        super().__init__()
        self.attention, self.mlp, self.alpha = Attention(c), MLP(c), (2 * c.num_layers) ** 0.5
        self.input_layernorm, self.post_attention_layernorm = (
            LayerNorm(c.hidden_size, eps=c.layernorm_epsilon) for _ in range(2)
        )

    def forward(self, x, *where):
        x = self.input_layernorm(x)
        x = self.post_attention_layernorm(self.alpha * x + self.attention(x, *where))
        return self.alpha * x + self.mlp(x)


class Transformer(Module):
    def __init__(self, c):
        super().__init__()
        self.word_embeddings = Embedding(c.vocab_size, c.hidden_size)
        self.layers = ModuleList(Block(c) for _ in range(c.num_layers))
        self.final_layernorm = LayerNorm(c.hidden_size, eps=c.layernorm_epsilon)


class LanguageModel(PreTrainedModel):
    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.transformer = Transformer(config)
        self.post_init()

    def forward(self, input_ids):
        rows = []
        for row in input_ids:
            x, where = self.transformer.word_embeddings(row), places(row, self.config)
            for block in self.transformer.layers:
                x = block(x, *where)
            rows.append(self.transformer.final_layernorm(x) @ self.transformer.word_embeddings.weight.T)
        return CausalLMOutput(logits=torch.stack(rows))
