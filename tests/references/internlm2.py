"""InternLM2 (Cai et al., 2024; the arithmetic of LLaMA): reference for the converted model.

Written from the published description; shares no code with the code under test.
"""

import torch
from torch.nn import Embedding, Linear, Module, ModuleList, Parameter
from torch.nn.functional import silu
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class Config(PretrainedConfig):
    model_type = "internlm2"

    def __init__(self, rope_theta=10_000.0, rope_scaling=None, **others):  # dynamic: of longer sequences alone
        super().__init__(**others)
        self.rope_theta = rope_theta


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
        self.heads, self.groups = c.num_attention_heads, c.num_key_value_heads
        self.size, self.theta = c.hidden_size // self.heads, c.rope_theta
        self.wqkv = Linear(c.hidden_size, (self.heads + 2 * self.groups) * self.size, bias=c.bias)
        self.wo = Linear(self.heads * self.size, c.hidden_size, bias=c.bias)

    def forward(self, x):
        batch, length, _ = x.shape
        # each group: its queries, its key, its value
        grouped = self.wqkv(x).view(batch, length, self.groups, self.heads // self.groups + 2, self.size)
        q = grouped[..., :-2, :].reshape(batch, length, self.heads, self.size).transpose(1, 2)
        k, v = (grouped[..., i, :].transpose(1, 2).repeat_interleave(self.heads // self.groups, 1) for i in (-2, -1))
        scores = rotated(q, self.theta) @ rotated(k, self.theta).transpose(-1, -2) / self.size**0.5
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        context = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
        return self.wo(context.transpose(1, 2).reshape(batch, length, -1))


class FeedForward(Module):
    def __init__(self, c):
        super().__init__()
        self.w1 = Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.w3 = Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.w2 = Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        return self.w2(silu(self.w1(x)) * self.w3(x))


class Layer(Module):
    def __init__(self, c):
        super().__init__()
        self.attention, self.feed_forward = Attention(c), FeedForward(c)
        self.attention_norm, self.ffn_norm = (Norm(c.hidden_size, c.rms_norm_eps) for _ in range(2))

    def forward(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class Decoder(Module):
    def __init__(self, c):
        super().__init__()
        self.tok_embeddings = Embedding(c.vocab_size, c.hidden_size)
        self.layers = ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        self.norm = Norm(c.hidden_size, c.rms_norm_eps)


class LanguageModel(PreTrainedModel):
    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.model = Decoder(config)
        self.output = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids):
        x = self.model.tok_embeddings(input_ids)
        for layer in self.model.layers:
            x = layer(x)
        return CausalLMOutput(logits=self.output(self.model.norm(x)))
