"""Qwen 1 (Bai et al., 2023), up to the length it was trained at: reference for the converted model.

Written from the published description; shares no code with the code under test.
"""

import torch
from torch.nn import Embedding, Linear, Module, ModuleList, Parameter
from torch.nn.functional import silu
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class Config(PretrainedConfig):
    model_type = "qwen"


class Norm(Module):
    def __init__(self, size, epsilon):
        super().__init__()
        self.weight, self.epsilon = Parameter(torch.ones(size)), epsilon

    def forward(self, x):
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True) + self.epsilon).sqrt()


def rotated(x, base):
    """`[batch, heads, positions, size]`: elements i and i + size / 2 turn by position * base^(-2 i / size)."""
    half, positions = x.shape[-1] // 2, torch.arange(x.shape[-2])
    angles = positions[:, None] * base ** (-torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


class Attention(Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.size, self.base = c.num_attention_heads, c.kv_channels, c.rotary_emb_base
        self.c_attn = Linear(c.hidden_size, 3 * c.hidden_size)
        self.c_proj = Linear(c.hidden_size, c.hidden_size, bias=not c.no_bias)

    def forward(self, x):
        batch, length, hidden = x.shape
        q, k, v = (part.view(batch, length, self.heads, -1).transpose(1, 2) for part in self.c_attn(x).chunk(3, -1))
        scores = rotated(q, self.base) @ rotated(k, self.base).transpose(-1, -2) / self.size**0.5
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        context = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
        return self.c_proj(context.transpose(1, 2).reshape(batch, length, hidden))


class FeedForward(Module):
    def __init__(self, c):
        super().__init__()
        each = c.intermediate_size // 2
        self.w1 = Linear(c.hidden_size, each, bias=not c.no_bias)
        self.w2 = Linear(c.hidden_size, each, bias=not c.no_bias)
        self.c_proj = Linear(each, c.hidden_size, bias=not c.no_bias)

    def forward(self, x):
        return self.c_proj(self.w1(x) * silu(self.w2(x)))


class Layer(Module):
    def __init__(self, c):
        super().__init__()
        self.attn, self.mlp = Attention(c), FeedForward(c)
        self.ln_1, self.ln_2 = (Norm(c.hidden_size, c.layer_norm_epsilon) for _ in range(2))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Decoder(Module):
    def __init__(self, c):
        super().__init__()
        self.wte = Embedding(c.vocab_size, c.hidden_size)
        self.h = ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        self.ln_f = Norm(c.hidden_size, c.layer_norm_epsilon)


class LanguageModel(PreTrainedModel):
    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.transformer = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids):
        x = self.transformer.wte(input_ids)
        for layer in self.transformer.h:
            x = layer(x)
        return CausalLMOutput(logits=self.lm_head(self.transformer.ln_f(x)))
