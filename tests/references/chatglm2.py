"""ChatGLM2, ChatGLM3 and GLM-4-9B (Team GLM, 2024): reference for the converted model.

Written from the published description; shares no code with the code under test.
"""

import torch
from torch.nn import Embedding, Linear, Module, ModuleList, Parameter
from torch.nn.functional import silu
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class Config(PretrainedConfig):
    model_type = "chatglm"


class Norm(Module):
    def __init__(self, size, epsilon):
        super().__init__()
        self.weight, self.epsilon = Parameter(torch.ones(size)), epsilon

    def forward(self, x):
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True) + self.epsilon).sqrt()


def rotated(x, base):
    """`[batch, positions, heads, head_dim]`: of the first half of each head, elements 2i and 2i + 1 are a complex number."""
    size = x.shape[-1] // 2
    frequencies = base ** -(torch.arange(0, size, 2) / size)
    angles = torch.arange(x.shape[1])[:, None] * frequencies
    turned = torch.view_as_complex(x[..., :size].unflatten(-1, (-1, 2)).contiguous())
    turned = turned * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([torch.view_as_real(turned).flatten(-2), x[..., size:]], -1)


class SelfAttention(Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.groups, self.size = c.num_attention_heads, c.multi_query_group_num, c.kv_channels
        self.base = 10_000.0 * getattr(c, "rope_ratio", 1)
        rows = (self.heads + 2 * self.groups) * self.size
        self.query_key_value = Linear(c.hidden_size, rows, bias=c.add_bias_linear or c.add_qkv_bias)
        self.dense = Linear(self.heads * self.size, c.hidden_size, bias=c.add_bias_linear)

    def forward(self, x):
        q, k, v = (
            self.query_key_value(x).unflatten(-1, (-1, self.size)).split([self.heads, self.groups, self.groups], 2)
        )
        k, v = (part.repeat_interleave(self.heads // self.groups, 2) for part in (rotated(k, self.base), v))
        scores = torch.einsum("bihd,bjhd->bhij", rotated(q, self.base), k) / self.size**0.5
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        return self.dense(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2))


class MLP(Module):
    def __init__(self, c):
        super().__init__()
        self.dense_h_to_4h = Linear(c.hidden_size, 2 * c.ffn_hidden_size, bias=c.add_bias_linear)
        self.dense_4h_to_h = Linear(c.ffn_hidden_size, c.hidden_size, bias=c.add_bias_linear)

    def forward(self, x):
        gate, up = self.dense_h_to_4h(x).chunk(2, -1)
        return self.dense_4h_to_h(silu(gate) * up)


class Block(Module):
    def __init__(self, c):
        super().__init__()
        self.self_attention, self.mlp = SelfAttention(c), MLP(c)
        self.input_layernorm, self.post_attention_layernorm = (
            Norm(c.hidden_size, c.layernorm_epsilon) for _ in range(2)
        )

    def forward(self, x):
        x = x + self.self_attention(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Encoder(Module):
    def __init__(self, c):
        super().__init__()
        self.layers = ModuleList(Block(c) for _ in range(c.num_layers))
        self.final_layernorm = Norm(c.hidden_size, c.layernorm_epsilon)


class Embeddings(Module):
    def __init__(self, c):
        super().__init__()
        self.word_embeddings = Embedding(c.padded_vocab_size, c.hidden_size)


class Transformer(Module):
    def __init__(self, c):
        super().__init__()
        self.embedding, self.encoder = Embeddings(c), Encoder(c)
        self.output_layer = Linear(c.hidden_size, c.padded_vocab_size, bias=False)


class LanguageModel(PreTrainedModel):
    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.transformer = Transformer(config)
        self.post_init()

    def forward(self, input_ids):
        x = self.transformer.embedding.word_embeddings(input_ids)
        for block in self.transformer.encoder.layers:
            x = block(x)
        return CausalLMOutput(logits=self.transformer.output_layer(self.transformer.encoder.final_layernorm(x)))
