"""InternLM 1 (InternLM Team, 2023; the arithmetic of LLaMA): reference for the converted model.

Written from the published description; shares no code with the code under test.
"""

import torch
from torch.nn import Embedding, Linear, Module, ModuleList, Parameter
from torch.nn.functional import silu
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class Config(PretrainedConfig):
    model_type = "internlm"


class Norm(Module):
    def __init__(self, size, epsilon):
        super().__init__()
        self.weight, self.epsilon = Parameter(torch.ones(size)), epsilon

    def forward(self, x):
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True) + self.epsilon).sqrt()


def rotated(x, theta):
    """`[batch, heads, positions, head_dim]`: element i and i + head_dim / 2 turn by position * theta^(-2 i / head_dim)."""
    half, positions = x.shape[-1] // 2, torch.arange(x.shape[-2])
    angles = positions[:, None] * theta ** (-torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


class Attention(Module):
    def __init__(self, c):
        super().__init__()
        self.heads = c.num_attention_heads
        self.size, self.theta = c.hidden_size // self.heads, c.rotary["base"]
        self.q_proj = Linear(c.hidden_size, self.heads * self.size, bias=c.bias)
        self.k_proj = Linear(c.hidden_size, self.heads * self.size, bias=c.bias)
        self.v_proj = Linear(c.hidden_size, self.heads * self.size, bias=c.bias)
        self.o_proj = Linear(self.heads * self.size, c.hidden_size, bias=c.bias)

    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = (
            made.view(batch, length, -1, self.size).transpose(1, 2)
            for made in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        scores = rotated(q, self.theta) @ rotated(k, self.theta).transpose(-1, -2) / self.size**0.5
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        context = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
        return self.o_proj(context.transpose(1, 2).reshape(batch, length, -1))


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
        self.post_init()

    def forward(self, input_ids):
        x = self.model.embed_tokens(input_ids)
        for layer in self.model.layers:
            x = layer(x)
        return CausalLMOutput(logits=self.lm_head(self.model.norm(x)))
