"""ChatGLM-6B (Zeng et al., 2022; Du et al., 2022): reference for the converted model.

Written from the published description; shares no code with the code under test.
"""

import torch
from torch.nn import Embedding, LayerNorm, Linear, Module, ModuleList
from torch.nn.functional import gelu
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class Config(PretrainedConfig):
    model_type = "chatglm"

    def __init__(self, tie_word_embeddings=True, **kwargs):
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


def places(row, c):
    """Of one row: the place of each token in the text and in what fills its blank, and how long the text is."""
    row = row.tolist()
    length = row.index(c.bos_token_id)
    blank = row.index(c.gmask_token_id if c.gmask_token_id in row else c.mask_token_id)
    filling = len(row) - length
    return [*range(length), *[blank] * filling], [*[0] * length, *range(1, filling + 1)], length


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

    def forward(self, x, text, filling, length):
        # each head: its query, its key, its value
        q, k, v = self.query_key_value(x).view(-1, self.heads, 3, self.size).unbind(2)
        q, k = (
            torch.cat([rotated(part[..., : self.size // 2], text), rotated(part[..., self.size // 2 :], filling)], -1)
            for part in (q, k)
        )
        scores = torch.einsum("ihd,jhd->hij", q, k) / self.size**0.5
        hidden = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        hidden[:, :length] = False
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return self.dense(torch.einsum("hij,jhd->ihd", weights, v).flatten(1))


class MLP(Module):
    def __init__(self, c):
        super().__init__()
        self.dense_h_to_4h = Linear(c.hidden_size, c.inner_hidden_size)
        self.dense_4h_to_h = Linear(c.inner_hidden_size, c.hidden_size)

    def forward(self, x):
        return self.dense_4h_to_h(gelu(self.dense_h_to_4h(x), approximate="tanh"))


class Block(Module):
    def __init__(self, c):
        super().__init__()
        self.attention, self.mlp = Attention(c), MLP(c)
        self.input_layernorm, self.post_attention_layernorm = (
            LayerNorm(c.hidden_size, eps=c.layernorm_epsilon) for _ in range(2)
        )

    def forward(self, x, *where):
        alpha = (2 * 28) ** 0.5  # the published class never hears how many layers there are
        x = self.input_layernorm(x)
        x = self.post_attention_layernorm(alpha * x + self.attention(x, *where))
        return alpha * x + self.mlp(x)


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
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids):
        head = self.transformer.word_embeddings if self.config.tie_word_embeddings else self.lm_head
        rows = []
        for row in input_ids:
            x, where = self.transformer.word_embeddings(row), places(row, self.config)
            for block in self.transformer.layers:
                x = block(x, *where)
            rows.append(self.transformer.final_layernorm(x) @ head.weight.T)
        return CausalLMOutput(logits=torch.stack(rows))
