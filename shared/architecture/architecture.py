"""The one description of a model: what every family's configuration is read into and every builder reads from.

Pure data, importable without torch or Megatron-Core.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from shared.architecture.rope_scaling import RopeScaling as RopeScaling
from shared.architecture.vision import Vision

VOCAB_MULTIPLE = 128  # Megatron-LM's default make_vocab_size_divisible_by


@dataclass(frozen=True, kw_only=True)
class Experts:
    """A mixture of experts in place of the MLP: every token goes through the `top_k` that its router scores highest.

    The router's logits `[tokens, experts]` become scores by softmax over all experts or by a sigmoid each; the chosen
    ones' scores, divided by their sum if `normalized`, times `scaling`, weigh what those experts answer.
    """

    count: int
    top_k: int
    ffn_hidden_size: int  # of each
    bias: bool = False  # of the router and of both layers of each (gpt-oss)
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalized: bool = True
    scaling: float = 1.0
    correction_bias: bool = False  # fp32, added to the scores for choosing only (DeepSeek V3)
    groups: int = 1  # equal runs of experts, of which a token goes to the best `top_groups` only
    top_groups: int = 1
    group_score_of: int = 2  # how many of a group's best scores, summed, stand for it
    shared_ffn_hidden_size: int | None = None  # of the experts that every token goes through, taken together
    shared_gate: bool = False  # they are weighed by the sigmoid of a projection of the token (Qwen 1.5 and 2)
    auxiliary_loss: float = 0.0  # weight of the load-balancing loss
    auxiliary_loss_of: Literal["batch", "sequence"] = "batch"  # over whose tokens the load is to be balanced
    dense_layers: tuple[int, ...] = ()  # by index from 0; these have an MLP of `Architecture.ffn_hidden_size`

    def __post_init__(self) -> None:
        if not 0 < self.top_k <= self.count:
            raise ValueError(f"{self.top_k} experts a token of {self.count} are impossible")
        if self.count % self.groups or not 0 < self.top_groups <= self.groups:
            raise ValueError(f"{self.top_groups} of {self.groups} groups of {self.count} experts are impossible")
        if not 0 < self.group_score_of <= self.count // self.groups:
            raise ValueError(f"the {self.group_score_of} best scores of a group of {self.count // self.groups} experts")
        if self.score == "sigmoid" and not self.normalized:
            raise ValueError("sigmoid scores of experts that are not normalised are not computed")
        if self.score == "softmax" and self.correction_bias:
            raise ValueError("a correction bias of softmax scores of experts is not computed")
        if self.bias and (self.groups > 1 or self.shared_ffn_hidden_size):
            raise ValueError("experts with biases in groups or beside shared ones are not computed")
        if self.shared_gate and self.shared_ffn_hidden_size is None:
            raise ValueError("a gate of shared experts is set, but there are none")


@dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """Queries, and keys and values together, made of vectors of a low rank (DeepSeek V2, section 2.1).

    The last `qk_rope_head_dim` elements of each head's query and key are rotated, pairs being neighbours; that part of
    the key is one for all heads, and comes straight from the hidden state. `Architecture.head_dim` counts all elements
    of a query. Norms of the low-rank vectors have an epsilon of their own, whatever the model's.
    """

    q_lora_rank: int | None  # None: queries are projected directly
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    norm_epsilon: float = 1e-6


@dataclass(frozen=True, kw_only=True)
class DeltaNet:
    """Gated delta nets (Yang et al., 2024) in place of attention in `layers`.

    A head of a value has a state `[key_head_dim, value_head_dim]`, which forgets, takes back what it would answer to
    the token's key, and learns the token's value. Heads of values share those of queries and keys in equal runs.
    """

    layers: tuple[int, ...]  # by index from 0
    key_heads: int  # and of queries
    value_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_kernel: int  # tokens that a channel of queries, keys and values is mixed over, this one the last

    def __post_init__(self) -> None:
        if self.value_heads % self.key_heads:
            raise ValueError(f"{self.value_heads} heads of values cannot share {self.key_heads} heads of keys equally")
        if not self.layers:
            raise ValueError("gated delta nets are described, but no layer has one")

    @property
    def key_size(self) -> int:
        """Rows of the projection to keys, and of that to queries."""
        return self.key_heads * self.key_head_dim

    @property
    def value_size(self) -> int:
        """Rows of the projection to values, and of that to their gates."""
        return self.value_heads * self.value_head_dim


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """A row is a text with a blank, then what fills it (Du et al., 2022): tokens before the first `start_token` see
    each other, those from it on see them and the past.

    The blank is at the first of `blank_tokens` that the row has, or with `earliest` at the first place in the text of any
    of them. Tokens before the start are at their place in the text, those from it on at the blank's, and how far they are
    into what fills it, from 1, is their second position; that of the others is 0. Behind a blank of `counted_tokens`
    places count on.
    """

    start_token: int
    blank_tokens: tuple[int, ...]
    counted_tokens: tuple[int, ...] = ()
    earliest: bool = False


Activation = Literal["swiglu", "geglu", "geglu_tanh", "quick_geglu", "gelu", "gelu_tanh", "relu"]

Residual = Literal["sequential", "normed", "parallel", "parallel_shared"]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder-only transformer. Sizes are counts of elements; every projection is `[out, in]`.

    Whatever has a default is as LLaMA has it.
    """

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int  # key/value heads; equal to num_attention_heads for MHA
    head_dim: int  # given by the family, not always hidden_size / num_attention_heads
    vocab_size: int  # without padding
    max_position_embeddings: int  # tokens
    tied_embeddings: bool
    initializer_range: float = 0.02

    norm: Literal["rmsnorm", "rmsnorm_1p", "layernorm"] = "rmsnorm"  # 1p: the weight is stored less one (Gemma)
    norm_bias: bool = False
    norm_epsilon: float
    norm_affine: bool = True  # norms have weights; without, those are one and biases zero
    # pre: in front of attention and MLP. post: behind each, before the residual is added. sandwich: both. sum: behind
    # each, of the sum with the residual (OPT 350M).
    norm_placement: Literal["pre", "post", "sandwich", "sum"] = "pre"
    final_norm: bool = True  # behind the last layer
    embedding_norm: bool = False  # a norm on the embedded tokens (BLOOM)
    # Columns of the embedding and of the output layer, projected to and from the hidden size; None: they are as many.
    embedding_size: int | None = None
    # sequential: the MLP reads what attention left. parallel: both read the layer's input, through a norm each.
    # parallel_shared: through one norm. normed: as sequential, but what is added to is what the norm made of it.
    residual: Residual = "sequential"

    activation: Activation = "swiglu"  # quick_geglu: x * sigmoid(1.702 x)
    glu_limit: float | None = None  # what is activated is this at most, what it is multiplied with as much either way
    glu_offset: float = 0.0  # added to the latter
    mlp_bias: bool = False
    experts: Experts | None = None
    prediction_layers: int = 0  # behind the last, for tokens further ahead; without effect on the model's answer

    positions: Literal["rope", "learned", "alibi"] = "rope"
    # 2: by the place in the text, and by that in what fills its blank: half of each head is rotated by each, or there is
    # a table of each, and what both say of a token is added
    position_streams: Literal[1, 2] = 1
    # rounded: products of slopes and positions in bf16, times the scale of the scores (Falcon RW)
    alibi: Literal["exact", "rounded"] = "exact"
    alibi_bias_max: int = 8  # the last head's slope is 2^-this, where heads are a power of two
    learned_position_offset: int = 0  # rows of the table before position 0 (OPT)
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    window_rope_theta: float | None = None  # of layers with a sliding window, which are not stretched; None: as others
    rotary_dim: int | None = None  # leading elements of each head that are rotated; None: all of them
    rotary_fp16: bool = False  # the frequencies are rounded to fp16
    rotary_interleaved: bool = False  # pairs are neighbours (GPT-J, GLM), not elements half a head apart
    layers_without_rope: tuple[int, ...] = ()  # by index from 0
    prefix: Prefix | None = None  # which tokens see those behind them; None: none do

    latent: LatentAttention | None = None
    delta: DeltaNet | None = None
    attention_gate: bool = False  # heads' answers are weighed by the sigmoid of a projection of the token
    qkv_bias: bool = False
    qkv_clip: float | None = None  # projected queries, keys and values are cut off there, either way
    attention_output_bias: bool = False
    qk_norm: bool = False  # a norm on queries and keys, before rotation
    # over head_dim, with one weight for all heads or a weight for each; or over all heads of the projection
    qk_norm_scope: Literal["head", "each_head", "projection"] = "head"
    attention_scale: float | None = None  # of queries times keys; None: 1 / sqrt(head_dim)
    attention_scale_by_layer: bool = False  # scores are divided by the number of their layer, from 1, too
    attention_softcap: float | None = None  # scores s become cap * tanh(s / cap)
    attention_sinks: bool = False  # each head has one more score, learned, of which no value comes (gpt-oss)
    sliding_window: int | None = None  # tokens that a position sees, itself included
    full_attention_layers: tuple[int, ...] = ()  # by index from 0; only with a sliding window

    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0  # of what attention and MLP add
    input_multiplier: float = 1.0  # of what they are added to (DeepNorm)
    logit_multiplier: float = 1.0
    logit_softcap: float | None = None
    output_bias: bool = False
    normalized_head: bool = False  # each row of the output layer is divided by its length (Baichuan 2's NormHead)

    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0  # of what attention and MLP add
    embedding_dropout: float = 0.0

    vision: Vision | None = None  # what is beside the language model, kept as it is

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_query_groups "
                f"{self.num_query_groups}"
            )
        if self.positions == "rope":
            if self.head_dim % 2:
                raise ValueError(f"rotary embedding needs an even head_dim, not {self.head_dim}")
            if self.rotated % 2 or not 0 < self.rotated <= self.head_dim:
                raise ValueError(
                    f"rotary embedding of {self.rotated} of {self.head_dim} elements of a head is impossible"
                )
            if self.window_rope_theta is not None and (self.sliding_window is None or self.latent):
                raise ValueError("window_rope_theta is set, but no layer has a sliding window")
            factors = self.rope_scaling.short_factors if self.rope_scaling else ()
            if factors and 2 * len(factors) != self.rotated:
                raise ValueError(
                    f"{len(factors)} factors of longrope for {self.rotated} rotated elements are impossible"
                )
        elif self._rotates:
            raise ValueError(f"rotary embedding is set, but positions are {self.positions}")
        if self.norm_bias and self.norm != "layernorm":
            raise ValueError(f"{self.norm} has no bias")
        if not self.norm_affine and (not self.norm_bias or self.qk_norm):
            raise ValueError("norms without weights, other than layer norms of hidden states, are not computed")
        if self.embedding_size is not None and (self.embedding_norm or self.embedding_multiplier != 1.0):
            raise ValueError("a norm or a multiplier of projected embeddings is not computed")
        if self.prefix:
            self._check_prefix(self.prefix)
        elif self.position_streams != 1:
            raise ValueError("two streams of positions need a blank that is filled")
        if self.input_multiplier != 1.0 and self.residual not in ("sequential", "normed"):
            raise ValueError(f"a multiplied input of a {self.residual} residual is not computed")
        if self.residual != "sequential" and self.norm_placement != "pre":
            raise ValueError(f"a {self.residual} residual with {self.norm_placement} norms is not computed")
        if self.output_bias and self.tied_embeddings:
            raise ValueError("a bias of the output layer with tied embeddings is not computed")
        if self.normalized_head and self.tied_embeddings:
            raise ValueError("a normalised output layer with tied embeddings is not computed")
        if self.full_attention_layers and self.sliding_window is None:
            raise ValueError("full_attention_layers are set without a sliding window")
        if self.alibi != "exact" and self.positions != "alibi":
            raise ValueError(f"ALiBi is {self.alibi}, but positions are {self.positions}")
        if self.alibi_bias_max != 8 and (self.positions != "alibi" or self.alibi != "exact"):
            raise ValueError("alibi_bias_max other than 8 is computed for exact ALiBi only")
        if self.qkv_clip is not None and (self.qkv_clip <= 0.0 or self.latent or self.attention_gate):
            raise ValueError("clipping at other than a positive number, latent attention's or a gate's is not computed")
        if self.positions == "alibi" and (self.sliding_window or self.attention_softcap):
            raise ValueError("ALiBi with a sliding window or a soft cap is not computed")
        if self.attention_sinks and (self.latent or self.positions == "alibi"):
            raise ValueError("attention sinks with latent attention or ALiBi are not computed")
        if (self.glu_limit is not None or self.glu_offset) and not self.gated:
            raise ValueError("a limit or an offset of a gate is set, but the MLP has none")
        if self.attention_scale_by_layer and (self.latent or self.prediction_layers or self.alibi == "rounded"):
            raise ValueError("scores divided by their layer's number, of latent attention and such, are not computed")
        if self.latent:
            self._check_latent(self.latent)
        if self.delta and (self.norm_placement, self.residual) != ("pre", "sequential"):
            raise ValueError("gated delta nets in layers that are not LLaMA's are not computed")
        dense = self.experts.dense_layers if self.experts else ()
        if self.experts and (self.mlp_bias or not self.gated):
            raise ValueError("experts with biases or without a gate are not computed")
        if self.experts and self.residual == "parallel_shared":
            raise ValueError("experts that share a norm with attention are not computed")
        layers = self.layers_without_rope + self.full_attention_layers + dense
        layers += self.delta.layers if self.delta else ()
        if layers and not 0 <= min(layers) <= max(layers) < self.num_layers:
            raise ValueError(f"there is no layer {max(layers)}: the model has {self.num_layers}")

    @property
    def _rotates(self) -> bool:
        """Whether anything of rotary embedding is set."""
        own = self.rotary_dim or self.rotary_interleaved or self.layers_without_rope or self.rotary_fp16
        return bool(self.rope_scaling or own or self.window_rope_theta)

    def _check_prefix(self, prefix: Prefix) -> None:
        tokens = (prefix.start_token, *prefix.blank_tokens)
        if not 0 <= min(tokens) <= max(tokens) < self.vocab_size:
            raise ValueError(f"there is no token {max(tokens)}: the vocabulary has {self.vocab_size}")
        if self.positions == "alibi" or self.latent or self.sliding_window or self.rope_scaling:
            raise ValueError("a blank that is filled, with ALiBi, windows or stretched positions, is not computed")
        if self.positions == "learned":
            if self.position_streams == 1 or self.learned_position_offset:
                raise ValueError("a blank that is filled, with one table of learned positions, is not computed")
            return
        if self.rotary_dim or self.rotary_interleaved or self.layers_without_rope:
            raise ValueError("a blank that is filled, with heads rotated in part or by neighbours, is not computed")
        if self.head_dim % (2 * self.position_streams):
            raise ValueError(f"{self.position_streams} rotations of heads of {self.head_dim} elements are impossible")

    def _check_latent(self, latent: LatentAttention) -> None:
        if latent.qk_nope_head_dim + latent.qk_rope_head_dim != self.head_dim:
            raise ValueError(f"latent attention with queries of {self.head_dim} elements a head is impossible")
        if self.num_query_groups != self.num_attention_heads:
            raise ValueError("latent attention with groups of queries is not computed")
        if self.positions != "rope" or self.rotary_dim or self.rotary_interleaved or self.layers_without_rope:
            raise ValueError("latent attention with positions other than its own is not computed")
        if self.qkv_bias or self.attention_output_bias or self.qk_norm or self.sliding_window:
            raise ValueError("latent attention with biases, norms of heads or a window is not computed")
        if self.attention_gate or self.delta:
            raise ValueError("latent attention with gates or beside delta nets is not computed")
        if (self.norm, self.norm_placement, self.residual) != ("rmsnorm", "pre", "sequential"):
            raise ValueError("latent attention in layers that are not LLaMA's is not computed")

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies an activated projection with a second one."""
        return self.activation in ("swiglu", "geglu", "geglu_tanh", "quick_geglu")

    @property
    def norms_in_front(self) -> bool:
        """Whether attention and MLP each read what a norm made."""
        return self.norm_placement in ("pre", "sandwich")

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Layers that have experts."""
        if self.experts is None:
            return ()
        return tuple(layer for layer in range(self.num_layers) if layer not in self.experts.dense_layers)

    @property
    def homogeneous(self) -> bool:
        """Whether all layers have the same tensors, so that Megatron-Core stacks them."""
        return len(self.moe_layers) in (0, self.num_layers) and self.delta is None

    @property
    def prediction_layer(self) -> Architecture:
        """A model whose only layer is the decoder layer within each layer for tokens further ahead."""
        return replace(
            self,
            num_layers=1,
            prediction_layers=0,
            delta=None,
            experts=replace(self.experts, dense_layers=()) if self.experts else None,
            layers_without_rope=(),
            full_attention_layers=(),
        )

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Layers that have attention."""
        other = self.delta.layers if self.delta else ()
        return tuple(layer for layer in range(self.num_layers) if layer not in other)

    @property
    def rotated(self) -> int:
        """Elements of each head that are rotated."""
        if self.latent:
            return self.latent.qk_rope_head_dim
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    def window(self, layer: int) -> int | None:
        """Tokens that a position of this layer, counted from 0, sees; None for all."""
        return None if layer in self.full_attention_layers else self.sliding_window

    @property
    def q_size(self) -> int:
        """Rows of the query projection."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of the key projection, and of the value projection."""
        return self.num_query_groups * self.head_dim

    @property
    def attended_size(self) -> int:
        """Columns of attention's output projection."""
        return self.num_attention_heads * (self.latent.v_head_dim if self.latent else self.head_dim)

    @property
    def table_size(self) -> int:
        """Columns of the embedding and of the output layer."""
        return self.hidden_size if self.embedding_size is None else self.embedding_size

    @property
    def learned_positions(self) -> int:
        """Rows of the table of learned positions, and of the second where there is one, which counts from 1."""
        return self.max_position_embeddings + self.learned_position_offset + (self.position_streams > 1)

    def padded_vocab_size(self, tensor_parallel: int = 1) -> int:
        """Rows of the embedding in Megatron form: a multiple of 128 on every tensor-parallel rank."""
        multiple = VOCAB_MULTIPLE * tensor_parallel
        return -(-self.vocab_size // multiple) * multiple

    def parameter_count(self, *, active: bool = False) -> int:
        """Number of weights, without vocabulary padding, layers for tokens further ahead and what sees images.

        `active` counts the experts that one token goes through.
        """
        norm = self.hidden_size * (2 if self.norm_bias else 1) * self.norm_affine
        per_layer = {"parallel_shared": 1}.get(self.residual, 4 if self.norm_placement == "sandwich" else 2)
        qkv = self.q_size * (2 if self.attention_gate else 1) + 2 * self.kv_size
        attention = self.hidden_size * (qkv + self.q_size)
        if self.latent:
            attention = self._latent_count(self.latent)
        if self.qk_norm:
            attention += 2 * self.head_dim if self.qk_norm_scope == "head" else self.q_size + self.kv_size
        attention += self.qkv_bias * qkv + self.attention_output_bias * self.hidden_size
        attention += self.attention_sinks * self.num_attention_heads
        mixers = len(self.attention_layers) * attention
        if self.delta:
            mixers += len(self.delta.layers) * self._delta_count(self.delta)
        embeddings = self.vocab_size * self.table_size * (1 if self.tied_embeddings else 2)
        if self.embedding_size is not None:
            embeddings += 2 * self.embedding_size * self.hidden_size
        embeddings += self.vocab_size * self.output_bias + norm * self.embedding_norm
        if self.positions == "learned":
            embeddings += self.position_streams * self.learned_positions * self.hidden_size
        mlps = (self.num_layers - len(self.moe_layers)) * self._mlp_count(self.ffn_hidden_size)
        if experts := self.experts:
            used = experts.top_k if active else experts.count
            each = used * self._mlp_count(experts.ffn_hidden_size) + experts.count * self.hidden_size
            if experts.bias:
                fc1 = experts.ffn_hidden_size * (2 if self.gated else 1)
                each += used * (fc1 + self.hidden_size) + experts.count
            each += experts.correction_bias * experts.count + experts.shared_gate * self.hidden_size
            each += self._mlp_count(experts.shared_ffn_hidden_size or 0)
            mlps += len(self.moe_layers) * each
        return self.num_layers * per_layer * norm + mixers + mlps + embeddings + norm * self.final_norm

    def prediction_count(self, *, active: bool = False) -> int:
        """Number of weights of the layers for tokens further ahead, which share embedding and head with the model."""
        layer = self.prediction_layer.parameter_count(active=active)
        ends = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2) + self.hidden_size
        return self.prediction_layers * (layer - ends + (3 + 2 * self.hidden_size) * self.hidden_size)

    def _delta_count(self, delta: DeltaNet) -> int:
        projected = 2 * delta.key_size + 2 * delta.value_size + 2 * delta.value_heads
        convolution = (2 * delta.key_size + delta.value_size) * delta.conv_kernel
        rest = 2 * delta.value_heads + delta.value_head_dim + delta.value_size * self.hidden_size
        return self.hidden_size * projected + convolution + rest

    def _latent_count(self, latent: LatentAttention) -> int:
        rank, heads, queries = latent.kv_lora_rank, self.num_attention_heads, self.hidden_size * self.q_size
        if low := latent.q_lora_rank:
            queries = self.hidden_size * low + low + low * self.q_size
        keys = self.hidden_size * (rank + latent.qk_rope_head_dim) + rank
        values = rank * heads * (latent.qk_nope_head_dim + latent.v_head_dim)
        return queries + keys + values + self.attended_size * self.hidden_size

    def _mlp_count(self, ffn_hidden_size: int) -> int:
        fc1 = ffn_hidden_size * (2 if self.gated else 1)
        return self.hidden_size * (fc1 + ffn_hidden_size) + self.mlp_bias * (fc1 + self.hidden_size)

    def to_dict(self) -> dict[str, Any]:
        """As JSON data, for a manifest or a report."""
        return asdict(self)
