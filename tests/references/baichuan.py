"""Baichuan 1 and 2 (Yang et al., 2023; modelling code of Baichuan-7B and Baichuan2-13B): reference for the converted model.

Written from the published description; shares no code with the code under test.
"""

import math

import torch
from torch.nn import Embedding, Linear, Module, ModuleList, Parameter
from torch.nn.functional import silu
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class Config(PretrainedConfig):
    model_type = "baichuan"


class Norm(Module):
    def __init__(self, size, epsilon):
        super().__init__()
        self.weight, self.epsilon = Parameter(torch.ones(size)), epsilon

    def forward(self, x):
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True) + self.epsilon).sqrt()


def rotated(x):
    """`[batch, heads, positions, size]`: elements i and i + size / 2 turn by position * 10000^(-2 i / size)."""
    half, positions = x.shape[-1] // 2, torch.arange(x.shape[-2])
    angles = positions[:, None] * 10_000.0 ** (-torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


def slopes(heads):
    """Half to the power of 8/n, 16/n, .. for a power of two; else that of the lower one, and every other of twice it."""
    if heads & (heads - 1) == 0:
        return [0.5 ** (8 * (head + 1) / heads) for head in range(heads)]
    lower = 1 << int(math.log2(heads))
    return slopes(lower) + slopes(2 * lower)[::2][: heads - lower]


class Attention(Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.size = c.num_attention_heads, c.hidden_size // c.num_attention_heads
        self.rotary = hasattr(c, "max_position_embeddings")
        self.W_pack = Linear(c.hidden_size, 3 * c.hidden_size, bias=False)
        self.o_proj = Linear(c.hidden_size, c.hidden_size, bias=False)

    def forward(self, x):
        batch, length, hidden = x.shape
        q, k, v = (part.view(batch, length, self.heads, -1).transpose(1, 2) for part in self.W_pack(x).chunk(3, -1))
        if self.rotary:
            q, k = rotated(q), rotated(k)
        scores = q @ k.transpose(-1, -2) / self.size**0.5
        if not self.rotary:  # a constant for each key; the same for all that a query sees, but for the distance
            scores = scores + torch.tensor(slopes(self.heads))[:, None, None] * torch.arange(length)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        context = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
        return self.o_proj(context.transpose(1, 2).reshape(batch, length, hidden))


class FeedForward(Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(Module):
    def __init__(self, c):
        super().__init__()
        self.self_attn, self.mlp = Attention(c), FeedForward(c)
        self.input_layernorm, self.post_attention_layernorm = (Norm(c.hidden_size, c.rms_norm_eps) for _ in range(2))

    def forward(self, x):
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(Module):
    def __init__(self, c):
        super().__init__()
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size)
        self.layers = ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        self.norm = Norm(c.hidden_size, c.rms_norm_eps)


class LanguageModel(PreTrainedModel):
    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.normalized = hasattr(config, "z_loss_weight") or config.vocab_size >= 125_696
        self.post_init()

    def forward(self, input_ids):
        x = self.model.embed_tokens(input_ids)
        for layer in self.model.layers:
            x = layer(x)
        head = self.lm_head.weight
        if self.normalized:
            head = head / head.pow(2).sum(-1, keepdim=True).sqrt()
        return CausalLMOutput(logits=self.model.norm(x) @ head.T)
