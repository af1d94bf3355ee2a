"""Which modules of TransformerEngine an architecture's layers are, and with which arguments they are made.

Read from transformer_engine 2.20 (`pytorch/transformer.py`, `attention/multi_head_attention.py`, `module/*.py`); the
arguments are those of 2.9 and later. A layer is one `TransformerLayer` where that computes the same, else a set of
TransformerEngine's smaller modules, which the user's own forward joins. Pure data: neither torch nor TransformerEngine
is imported.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from math import isclose
from typing import Any

from shared.architecture.architecture import Activation, Architecture

TE = "transformer_engine.pytorch."
Shape = tuple[int, ...]
Module = dict[str, Any]  # "class" and "arguments", or "parameters" where no class has them

# TransformerEngine's GELU is the tanh form; it has no exact one.
ACTIVATIONS: dict[Activation, str] = {"swiglu": "swiglu", "geglu_tanh": "geglu", "gelu_tanh": "gelu", "relu": "relu"}

# Fields of an Architecture that TransformerLayer has an argument or a call for, or that `limits` looks into.
_EXPRESSED = {
    *(
        "norm",
        "norm_bias",
        "norm_affine",
        "norm_epsilon",
        "norm_placement",
        "residual",
        "residual_multiplier",
        "hidden_dropout",
    ),
    *("activation", "mlp_bias", "experts", "positions", "rope_theta", "rope_scaling", "window_rope_theta"),
    *("rotary_dim", "rotary_interleaved", "layers_without_rope", "latent", "qkv_bias", "attention_output_bias"),
    *("alibi_bias_max", "qkv_clip", "attention_scale_by_layer"),
    *("qk_norm", "qk_norm_scope", "attention_scale", "attention_softcap", "attention_dropout"),
    *("sliding_window", "full_attention_layers"),
}
# Fields of what is before the first layer and behind the last, and of training.
_NOT_OF_LAYERS = {
    *("family", "initializer_range", "tied_embeddings", "embedding_norm", "prediction_layers", "embedding_multiplier"),
    *("learned_position_offset", "logit_multiplier", "logit_softcap", "output_bias", "embedding_dropout"),
    *("normalized_head", "final_norm", "embedding_size"),
}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Why TransformerEngine's large modules do not compute what the architecture says; empty where they do."""

    attention: tuple[str, ...]  # of MultiheadAttention
    mlp: tuple[str, ...]  # of LayerNormMLP
    layer: tuple[str, ...]  # of TransformerLayer, besides

    @property
    def all(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.attention, *self.mlp, *self.layer)))


def limits(a: Architecture) -> Limits:
    """What TransformerEngine lacks; a field that nobody has looked into counts as lacking wherever it is set."""
    unknown = [
        f"{field.name} {value!r}"
        for field in fields(a.flat)
        if field.default is not MISSING and field.name not in _EXPRESSED | _NOT_OF_LAYERS
        for value in [getattr(a, field.name)]
        if value != field.default
    ]
    attention = {
        "latent attention": a.latent is not None,
        f"scores times {a.attention_scale}": a.attention_scale is not None
        and not isclose(a.attention_scale, a.head_dim**-0.5, rel_tol=1e-6),
        f"queries, keys and values clipped at {a.qkv_clip}": a.qkv_clip is not None,
        f"ALiBi slopes down to 2^-{a.alibi_bias_max}, not 2^-8": a.alibi_bias_max != 8,
        "scores divided by the layer's number": a.attention_scale_by_layer,
        f"scores capped at {a.attention_softcap}": a.attention_softcap is not None,
        f"norms of queries and keys by {a.qk_norm_scope}": a.qk_norm and a.qk_norm_scope != "head",
        "norms of queries and keys with weights less one": a.qk_norm and a.norm == "rmsnorm_1p",
        f"positions by {a.positions}": a.positions not in ("rope", "learned", "alibi"),
        "enlarged sines and cosines": a.rope_scaling is not None and a.rope_scaling.amplitude != 1.0,
    }
    mlp = {
        "exact GELU, not TransformerEngine's by tanh": a.activation in ("gelu", "geglu"),
        f"activation {a.activation}": a.activation not in ("gelu", "geglu", *ACTIVATIONS),
        "no norm in front of the MLP": not a.norms_in_front,
        "one norm for attention and MLP": a.residual == "parallel_shared",
    }
    layer = {
        f"norms behind attention and MLP ({a.norm_placement})": a.norm_placement != "pre",
        f"{a.residual} residual": a.residual not in ("sequential", "parallel", "parallel_shared"),
        f"what is added times {a.residual_multiplier}": a.residual_multiplier != 1.0,
        "dropout of attention and MLP apart": a.residual == "parallel" and a.hidden_dropout > 0.0,
    }
    found = [(*(reason for reason, lacking in part.items() if lacking), *unknown) for part in (attention, mlp, layer)]
    return Limits(attention=found[0], mlp=found[1], layer=found[2])


def describe(a: Architecture, shapes: Mapping[str, Shape], plain: Collection[str] = ()) -> dict[str, Any]:
    """The content of `layers.json`, for tensors of these names and shapes (`shared.mapping.transformer_engine`).

    `plain` are norms whose weights are not held less one, though the others' are.
    """
    layers: list[dict[str, Shape]] = [{} for _ in range(a.num_layers)]
    ends: dict[str, Shape] = {}
    for name, shape in shapes.items():
        if name.startswith("layers."):
            number, own = name.removeprefix("layers.").split(".", 1)
            layers[int(number)][own] = shape
        else:
            ends[name] = shape
    return {
        "transformer_engine": ">=2.9",
        "architecture": a.to_dict(),
        "ends": _parts(a, ends, plain)
        | ({"output_layer": {"tied_to": "embedding.weight"}} if a.tied_embeddings else {}),
        "layers": [_layer(a, index, own, plain) for index, own in enumerate(layers)],
    }


def parameters(module: Module) -> dict[str, Shape]:
    """Names and shapes of the parameters that TransformerEngine registers for a module with these arguments."""
    arguments = module.get("arguments", {})
    match module.get("class", "").removeprefix(TE):
        case "TransformerLayer":
            attention, mlp = _of_layer(arguments)
            return _under("self_attention", parameters(attention)) | _under("layernorm_mlp", parameters(mlp))
        case "MultiheadAttention":
            return _attention_parameters(arguments)
        case "LayerNormMLP":
            hidden, ffn = arguments["hidden_size"], arguments["ffn_hidden_size"]
            rows = ffn * (2 if arguments["activation"].endswith("glu") else 1)
            found: dict[str, Shape] = _norm("layer_norm_", hidden, arguments["normalization"])
            found |= {"fc1_weight": (rows, hidden), "fc2_weight": (hidden, ffn)}
            return found | ({"fc1_bias": (rows,), "fc2_bias": (hidden,)} if arguments["bias"] else {})
        case "LayerNormLinear":
            rows, columns = arguments["out_features"], arguments["in_features"]
            return _norm("layer_norm_", columns, arguments["normalization"]) | _linear(rows, columns, arguments["bias"])
        case "Linear" | "torch.nn.Linear":
            return _linear(arguments["out_features"], arguments["in_features"], arguments["bias"])
        case "GroupedLinear":
            of_each = _linear(arguments["out_features"], arguments["in_features"], arguments["bias"])
            return {f"{kind}{i}": shape for i in range(arguments["num_gemms"]) for kind, shape in of_each.items()}
        case "RMSNorm" | "LayerNorm" as kind:
            return _norm("", arguments["normalized_shape"], kind)
        case "torch.nn.Embedding":
            return {"weight": (arguments["num_embeddings"], arguments["embedding_dim"])}
    return {name: tuple(shape) for name, shape in module["parameters"].items()}


def extra_states(module: Module) -> tuple[str, ...]:
    """Names of the states that TransformerEngine's modules keep beside their parameters, empty outside FP8."""
    kind, arguments = module.get("class", ""), module.get("arguments", {})
    if not kind.startswith(TE):
        return ()
    match kind.removeprefix(TE):
        case "TransformerLayer":
            attention, _ = _of_layer(arguments)
            names = (*(f"self_attention.{name}" for name in extra_states(attention)), "layernorm_mlp._extra_state")
            return names
        case "MultiheadAttention":
            parts = ["layernorm_qkv" if arguments["input_layernorm"] else "qkv", "core_attention", "proj"]
            parts += ["q_norm", "k_norm"] if arguments["qk_norm_type"] else []
            return tuple(f"{part}._extra_state" for part in parts)
    return ("_extra_state",)


def _layer(a: Architecture, index: int, shapes: Mapping[str, Shape], plain: Collection[str]) -> dict[str, Any]:
    lacking = limits(a)
    experts = ("experts",) if index in a.moe_layers else ()
    because = (*lacking.all, *experts)
    call = _call(a, index)
    if not because:
        return {"class": f"{TE}TransformerLayer", "arguments": _layer_arguments(a, index), "call": call}
    modules: dict[str, Module] = {}
    if not lacking.attention:
        modules["self_attention"] = {"class": f"{TE}MultiheadAttention", "arguments": _attention(a, index)}
    if not lacking.mlp and not experts:
        modules["layernorm_mlp"] = {"class": f"{TE}LayerNormMLP", "arguments": _mlp(a)}
    rest = {name: shape for name, shape in shapes.items() if not name.startswith(tuple(f"{m}." for m in modules))}
    own = {path.removeprefix(f"layers.{index}.") for path in plain}
    return {"modules": modules | _parts(a, rest, own), "because": list(because), "call": call}


def _call(a: Architecture, index: int) -> dict[str, Any]:
    """Arguments of the layer's call: angles of its positions by these frequencies, or biases by distance."""
    if a.positions == "alibi":
        return {"core_attention_bias_type": "alibi"}
    if a.positions != "rope" or index in a.layers_without_rope:
        return {}
    theta, scaling = a.rope_theta, a.rope_scaling
    if a.window_rope_theta is not None and a.window(index) is not None:
        theta, scaling = a.window_rope_theta, None
    interleaved = a.rotary_interleaved or a.latent is not None
    return {
        "rotary_pos_emb": {
            "dim": a.rotated,
            "theta": theta,
            "interleaved": interleaved,
            "scaling": None if scaling is None else asdict(scaling),
        }
    }


def _normalization(a: Architecture) -> dict[str, Any]:
    kind = "LayerNorm" if a.norm == "layernorm" else "RMSNorm"
    return {"normalization": kind, "zero_centered_gamma": a.norm == "rmsnorm_1p"}


def _window(a: Architecture, index: int) -> list[int] | None:
    window = a.window(index)
    return None if window is None else [window - 1, 0]  # tokens to the left, itself not counted


def _common_attention(a: Architecture, index: int) -> dict[str, Any]:
    return {
        "hidden_size": a.hidden_size,
        "num_attention_heads": a.num_attention_heads,
        "num_gqa_groups": a.num_query_groups,
        "kv_channels": a.head_dim,
        "layernorm_epsilon": a.norm_epsilon,
        "attention_dropout": a.attention_dropout,
        "layer_number": index + 1,
        "window_size": _window(a, index),
        "fuse_qkv_params": True,
        "qkv_weight_interleaved": True,  # [q1..qn k1 v1 | q.. k2 v2 | ...], as Megatron-Core's
        "rotary_pos_interleaved": a.rotary_interleaved,
        **_normalization(a),
        "qk_norm_type": ("LayerNorm" if a.norm == "layernorm" else "RMSNorm") if a.qk_norm else None,
        "qk_norm_eps": a.norm_epsilon,
        "qk_norm_before_rope": a.qk_norm,
    }


def _layer_arguments(a: Architecture, index: int) -> dict[str, Any]:
    return {
        **_common_attention(a, index),
        "ffn_hidden_size": a.ffn_hidden_size,
        "hidden_dropout": a.hidden_dropout,
        "self_attn_mask_type": "causal",
        "parallel_attention_mlp": a.residual == "parallel",
        # One for all: those that the model does not have are zero in the files.
        "bias": a.qkv_bias or a.attention_output_bias or a.mlp_bias,
        "activation": ACTIVATIONS[a.activation],
    }


def _attention(a: Architecture, index: int) -> dict[str, Any]:
    return {
        **_common_attention(a, index),
        "attn_mask_type": "causal",
        "input_layernorm": a.norms_in_front,
        "return_layernorm_output": a.residual == "parallel_shared",
        "bias": a.qkv_bias or a.attention_output_bias,
    }


def _mlp(a: Architecture) -> dict[str, Any]:
    return {
        "hidden_size": a.hidden_size,
        "ffn_hidden_size": a.ffn_hidden_size,
        "eps": a.norm_epsilon,
        "bias": a.mlp_bias,
        **_normalization(a),
        "activation": ACTIVATIONS[a.activation],
    }


def _of_layer(arguments: Mapping[str, Any]) -> tuple[Module, Module]:
    """The two modules that a TransformerLayer makes."""
    attention = {"class": f"{TE}MultiheadAttention", "arguments": {**arguments, "input_layernorm": True}}
    return attention, {"class": f"{TE}LayerNormMLP", "arguments": dict(arguments)}


def _parts(a: Architecture, shapes: Mapping[str, Shape], plain: Collection[str]) -> dict[str, Module]:
    """Modules of these tensors, each by the names and shapes that it has."""
    grouped: dict[str, dict[str, Shape]] = {}
    for name, shape in shapes.items():
        path, _, leaf = name.rpartition(".")
        grouped.setdefault(path, {})[leaf] = shape
    return {path: _part(a, path, leaves, path in plain) for path, leaves in grouped.items()}


def _part(a: Architecture, path: str, leaves: Mapping[str, Shape], plain: bool) -> Module:
    norm = _normalization(a) | ({"zero_centered_gamma": False} if plain else {})
    first = leaves.get("weight", leaves.get("weight0", ()))
    is_matrix = len(first) == 2 and not path.endswith("norm")  # a norm of heads apart has rows, too
    matrix = {"in_features": first[-1], "out_features": first[0]} if is_matrix else {}
    others = leaves.keys() - {"weight", "bias"}
    bias = "bias" in leaves or "bias0" in leaves
    if "weight0" in leaves:
        count = sum(name.startswith("weight") for name in leaves)
        return {"class": f"{TE}GroupedLinear", "arguments": {"num_gemms": count, **matrix, "bias": bias}}
    if matrix and others in ({"layer_norm_weight"}, {"layer_norm_weight", "layer_norm_bias"}):
        low = a.latent is not None and path.endswith("_up_proj")
        epsilon = a.latent.norm_epsilon if low and a.latent else a.norm_epsilon
        returned = {"return_layernorm_output": True} if a.residual == "parallel_shared" else {}
        return {
            "class": f"{TE}LayerNormLinear",
            "arguments": {**matrix, "eps": epsilon, "bias": bias, **norm, **returned},
        }
    if matrix and not others:
        if "embedding" in path:
            return {
                "class": "torch.nn.Embedding",
                "arguments": {"num_embeddings": first[0], "embedding_dim": first[1]},
            }
        plain = path.endswith("router") or path == "output_layer"  # which nobody computes in FP8
        return {"class": "torch.nn.Linear" if plain else f"{TE}Linear", "arguments": {**matrix, "bias": bias}}
    if len(first) == 1 and not others and path.endswith("norm"):
        kind = norm.pop("normalization")
        return {
            "class": f"{TE}{kind}",
            "arguments": {"normalized_shape": first[0], "eps": a.norm_epsilon, **norm},
        }
    return {"parameters": {name: list(shape) for name, shape in leaves.items()}}


def _norm(prefix: str, size: int, kind: str) -> dict[str, Shape]:
    return dict.fromkeys((f"{prefix}weight", f"{prefix}bias") if kind == "LayerNorm" else (f"{prefix}weight",), (size,))


def _linear(rows: int, columns: int, bias: bool) -> dict[str, Shape]:
    return {"weight": (rows, columns)} | ({"bias": (rows,)} if bias else {})


def _under(path: str, found: Mapping[str, Shape]) -> dict[str, Shape]:
    return {f"{path}.{name}": shape for name, shape in found.items()}


def _attention_parameters(arguments: Mapping[str, Any]) -> dict[str, Shape]:
    hidden, head, heads = (arguments[name] for name in ("hidden_size", "kv_channels", "num_attention_heads"))
    rows, bias, norm = (heads + 2 * arguments["num_gqa_groups"]) * head, arguments["bias"], arguments["normalization"]
    found = _under("proj", _linear(hidden, heads * head, bias))
    if arguments["input_layernorm"]:
        found |= _under("layernorm_qkv", _norm("layer_norm_", hidden, norm) | _linear(rows, hidden, bias))
    else:
        found |= _under("qkv", _linear(rows, hidden, bias))
    for name in ("q_norm", "k_norm") if arguments["qk_norm_type"] else ():
        found |= _under(name, _norm("", head, arguments["qk_norm_type"]))
    return found
