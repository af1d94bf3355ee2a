"""TransformerEngine's TransformerLayer in plain torch: the reference for converted layers without a GPU.

Written from the documented arithmetic of transformer_engine 2.9 to 2.20 (docstrings of TransformerLayer,
MultiheadAttention, LayerNormMLP and DotProductAttention); it shares no code with the code under test. Parameters
and the extra states required by a strict load have TransformerEngine's names. Activations are `[positions, batch, hidden]`.
"""

import math

import torch
from torch import nn
from torch.nn import functional

ACTIVATIONS = {
    "gelu": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x * torch.sigmoid(x),
    "relu": torch.relu,
}
GATED = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"}


class Stateful(nn.Module):
    """Keeps an `_extra_state`, empty outside FP8."""

    def get_extra_state(self):
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state):
        assert state.dtype == torch.uint8
        assert state.numel() == 0

    def hold(self, **shapes):
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.full(shape, torch.nan)))


def normalized(x, weight, bias, kind, eps, zero_centered_gamma):
    scale = weight + 1 if zero_centered_gamma else weight
    if kind == "RMSNorm":
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * scale
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt() * scale + bias


class Norm(Stateful):
    def __init__(self, kind, size, eps, zero_centered_gamma=False):
        super().__init__()
        self.kind, self.eps, self.zero_centered_gamma = kind, eps, zero_centered_gamma
        self.hold(weight=(size,), **({"bias": (size,)} if kind == "LayerNorm" else {}))

    def forward(self, x):
        bias = getattr(self, "bias", None)
        return normalized(x, self.weight, bias, self.kind, self.eps, self.zero_centered_gamma)


class Linear(Stateful):
    def __init__(self, columns, rows, bias):
        super().__init__()
        self.hold(weight=(rows, columns), **({"bias": (rows,)} if bias else {}))

    def forward(self, x):
        return functional.linear(x, self.weight, getattr(self, "bias", None))


class LayerNormLinear(Linear):
    def __init__(self, columns, rows, bias, kind, eps, zero_centered_gamma):
        super().__init__(columns, rows, bias)
        self.norm = kind, eps, zero_centered_gamma
        self.hold(layer_norm_weight=(columns,), **({"layer_norm_bias": (columns,)} if kind == "LayerNorm" else {}))

    def forward(self, x):
        return super().forward(
            normalized(x, self.layer_norm_weight, getattr(self, "layer_norm_bias", None), *self.norm)
        )


class LayerNormMLP(Stateful):
    def __init__(self, hidden_size, ffn_hidden_size, eps, bias, normalization, zero_centered_gamma, activation):
        super().__init__()
        self.norm, self.activation = (normalization, eps, zero_centered_gamma), activation
        rows = ffn_hidden_size * (2 if activation in GATED else 1)
        self.hold(layer_norm_weight=(hidden_size,), fc1_weight=(rows, hidden_size))
        self.hold(fc2_weight=(hidden_size, ffn_hidden_size))
        if normalization == "LayerNorm":
            self.hold(layer_norm_bias=(hidden_size,))
        if bias:
            self.hold(fc1_bias=(rows,), fc2_bias=(hidden_size,))

    def forward(self, x):
        x = normalized(x, self.layer_norm_weight, getattr(self, "layer_norm_bias", None), *self.norm)
        x = functional.linear(x, self.fc1_weight, getattr(self, "fc1_bias", None))
        if self.activation in GATED:
            first, second = x.chunk(2, -1)
            x = ACTIVATIONS[GATED[self.activation]](first) * second
        else:
            x = ACTIVATIONS[self.activation](x)
        return functional.linear(x, self.fc2_weight, getattr(self, "fc2_bias", None))


class MultiheadAttention(nn.Module):
    def __init__(
        self,
        hidden_size,
        num_attention_heads,
        num_gqa_groups,
        kv_channels,
        layernorm_epsilon,
        window_size,
        bias,
        normalization,
        zero_centered_gamma,
        qkv_weight_interleaved,
        rotary_pos_interleaved,
        qk_norm_type,
        qk_norm_eps,
        qk_norm_before_rope,
    ):
        super().__init__()
        self.heads, self.groups, self.size = num_attention_heads, num_gqa_groups, kv_channels
        self.window_size, self.grouped, self.interleaved = window_size, qkv_weight_interleaved, rotary_pos_interleaved
        self.norm_first = qk_norm_before_rope
        rows = (num_attention_heads + 2 * num_gqa_groups) * kv_channels
        self.layernorm_qkv = LayerNormLinear(
            hidden_size, rows, bias, normalization, layernorm_epsilon, zero_centered_gamma
        )
        self.core_attention = Stateful()
        self.proj = Linear(num_attention_heads * kv_channels, hidden_size, bias)
        self.q_norm = self.k_norm = None
        if qk_norm_type:
            self.q_norm = Norm(qk_norm_type, kv_channels, qk_norm_eps)
            self.k_norm = Norm(qk_norm_type, kv_channels, qk_norm_eps)

    def split(self, mixed):
        """Queries `[.., heads, size]`, keys and values `[.., groups, size]`."""
        each, outer = self.heads // self.groups, mixed.shape[:-1]
        if self.grouped:
            parts = mixed.view(*outer, self.groups, each + 2, self.size).split([each, 1, 1], -2)
        else:
            parts = mixed.view(*outer, each + 2, self.groups, self.size).split([each, 1, 1], -3)
        return [part.reshape(*outer, -1, self.size) for part in parts]

    def rotated(self, x, angles):
        """Pairs are neighbours, or elements half of the rotated part apart; what follows it stays."""
        part, rest = x[..., : angles.shape[-1]], x[..., angles.shape[-1] :]
        if self.interleaved:
            other = torch.stack([-part[..., 1::2], part[..., 0::2]], -1).flatten(-2)
        else:
            a, b = part.chunk(2, -1)
            other = torch.cat([-b, a], -1)
        return torch.cat([part * angles.cos() + other * angles.sin(), rest], -1)

    def forward(self, x, rotary_pos_emb=None, core_attention_bias_type="no_bias"):
        q, k, v = self.split(self.layernorm_qkv(x))
        if self.q_norm and self.norm_first:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary_pos_emb is not None:
            q, k = self.rotated(q, rotary_pos_emb), self.rotated(k, rotary_pos_emb)
        if self.q_norm and not self.norm_first:
            q, k = self.q_norm(q), self.k_norm(k)
        k, v = (part.repeat_interleave(self.heads // self.groups, -2) for part in (k, v))
        scores = torch.einsum("sbhd,tbhd->bhst", q, k) / math.sqrt(self.size)
        positions = torch.arange(len(x))
        distance = positions[:, None] - positions[None, :]
        if core_attention_bias_type == "alibi":
            scores = scores - slopes(self.heads)[:, None, None] * distance
        seen = distance >= 0
        if self.window_size is not None:
            seen &= distance <= self.window_size[0]
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return self.proj(torch.einsum("bhst,tbhd->sbhd", weights, v).flatten(-2))


def slopes(heads):
    """ALiBi's, of TransformerEngine's default: a power of two heads, then every other one of twice as many."""
    power = 2 ** math.floor(math.log2(heads))
    first = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    return torch.tensor(first + [2 ** (-4 * i / power) for i in range(1, 2 * (heads - power), 2)])


class TransformerLayer(nn.Module):
    def __init__(
        self,
        *,
        hidden_size,
        ffn_hidden_size,
        layernorm_epsilon,
        bias,
        normalization,
        zero_centered_gamma,
        activation,
        parallel_attention_mlp,
        self_attn_mask_type,
        fuse_qkv_params,
        layer_number,
        attention_dropout,
        hidden_dropout,
        **attention,
    ):
        super().__init__()
        assert self_attn_mask_type == "causal"
        assert fuse_qkv_params
        assert layer_number > 0
        assert 0 <= attention_dropout < 1
        assert 0 <= hidden_dropout < 1
        self.parallel = parallel_attention_mlp
        self.self_attention = MultiheadAttention(
            hidden_size=hidden_size,
            layernorm_epsilon=layernorm_epsilon,
            bias=bias,
            normalization=normalization,
            zero_centered_gamma=zero_centered_gamma,
            **attention,
        )
        self.layernorm_mlp = LayerNormMLP(
            hidden_size, ffn_hidden_size, layernorm_epsilon, bias, normalization, zero_centered_gamma, activation
        )

    def forward(self, x, **call):
        attended = self.self_attention(x, **call)
        if self.parallel:
            return x + attended + self.layernorm_mlp(x)
        x = x + attended
        return x + self.layernorm_mlp(x)
