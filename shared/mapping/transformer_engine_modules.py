"""TransformerEngine modules of an architecture and their constructor arguments (the content of `layers.json`).

Source: transformer_engine 2.20 (`pytorch/transformer.py`, `attention/multi_head_attention.py`, `module/*.py`); the
arguments exist since 2.9. A layer is one `TransformerLayer` if that computes the same, else smaller modules for a
forward of the user's own. Pure data: imports neither torch nor TransformerEngine.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from math import isclose
from typing import Any

from shared.architecture.architecture import (
    MLP,
    Activation,
    Alibi,
    Architecture,
    Attention,
    GatedDeltaNet,
    LatentAttention,
    Layer,
    MoE,
    Norm,
    Residual,
    RopeScaling,
    Rotary,
)

TE = "transformer_engine.pytorch."
Shape = tuple[int, ...]
Module = dict[str, Any]  # "class" and "arguments", or "parameters" if TransformerEngine has no such class

# TransformerEngine's GELU is the tanh approximation; it has no exact GELU.
_KINDS = {"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}
ACTIVATIONS: dict[Activation, str] = {"swiglu": "swiglu", "geglu_tanh": "geglu", "gelu_tanh": "gelu", "relu": "relu"}

# Fields that TransformerEngine has an argument for, or that `limits` checks. Any other field that is not at its default
# counts as unsupported.
_EXPRESSED: dict[type, frozenset[str]] = {
    Norm: frozenset(("kind", "bias", "affine", "zero_centered_gamma")),
    Rotary: frozenset(("theta", "scaling", "dim", "interleaved")),
    Alibi: frozenset(("bias_max",)),
    Attention: frozenset(
        (
            "rotary",
            "alibi",
            "window",
            "bias",
            "output_bias",
            "qk_norm",
            "clip",
            "scale",
            "scale_by_layer",
            "softcap",
            "dropout",
        )
    ),
    LatentAttention: frozenset(("norm_epsilon", "scale", "dropout")),
    MLP: frozenset(("activation", "bias")),
    Residual: frozenset(("kind", "multiplier", "dropout")),
    Layer: frozenset(("norm_placement", "residual")),
}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Reasons why TransformerEngine's fused modules cannot compute the architecture; empty if they can."""

    attention: tuple[str, ...]  # of MultiheadAttention
    mlp: tuple[str, ...]  # of LayerNormMLP
    layer: tuple[str, ...]  # of TransformerLayer, in addition

    @property
    def all(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.attention, *self.mlp, *self.layer)))


def limits(a: Architecture) -> Limits:
    """Limits over all layers: tensor names are the same in every layer."""
    found: tuple[list[str], list[str], list[str]] = ([], [], [])
    unknown = [what for what, there in {"prefix LM": a.prefix, "vision tower": a.vision}.items() if there]
    for kind in a.kinds:
        unknown += _unknown(kind)
        for part, reasons in zip(found, (_attention_limits(kind), _mlp_limits(kind), _layer_limits(kind)), strict=True):
            part += [reason for reason, lacking in reasons.items() if lacking]
    attention, mlp, layer = (tuple(dict.fromkeys((*part, *unknown))) for part in found)
    return Limits(attention=attention, mlp=mlp, layer=layer)


def _unknown(value: Any) -> list[str]:
    """Unsupported fields that are not at their default, as `Class.field value`."""
    if isinstance(value, GatedDeltaNet):
        return ["gated delta net"]
    found, known = [], _EXPRESSED.get(type(value), frozenset())
    for field in fields(value):
        own = getattr(value, field.name)
        if field.default is not MISSING and field.name not in known and own != field.default:
            found.append(f"{type(value).__name__}.{field.name} {own!r}")
        elif is_dataclass(own) and not isinstance(own, RopeScaling):
            found += _unknown(own.expert if isinstance(own, MoE) else own)
    return found


def _attention_limits(layer: Layer) -> dict[str, bool]:
    mixer = layer.mixer
    if isinstance(mixer, GatedDeltaNet):
        return {}
    rotary = mixer.rotary
    common = {
        "MLA": isinstance(mixer, LatentAttention),
        f"softmax scale {mixer.scale}": mixer.scale is not None
        and not isclose(mixer.scale, mixer.head_dim**-0.5, rel_tol=1e-6),
        "concentration factor of cos and sin": rotary is not None
        and rotary.scaling is not None
        and rotary.scaling.concentration_factor != 1.0,
    }
    if isinstance(mixer, LatentAttention):
        return common
    bias_max = mixer.alibi.bias_max if mixer.alibi else 8
    return common | {
        f"clip of q, k, v at {mixer.clip}": mixer.clip is not None,
        f"ALiBi slopes down to 2^-{bias_max}, not 2^-8": bias_max != 8,
        "softmax scale / layer number": mixer.scale_by_layer,
        f"softcap of scores {mixer.softcap}": mixer.softcap is not None,
        f"qk_norm by {mixer.qk_norm}": mixer.qk_norm not in (None, "head"),
        "qk_norm with zero-centred gamma": mixer.qk_norm is not None and layer.norm.zero_centered_gamma,
    }


def _mlp_limits(layer: Layer) -> dict[str, bool]:
    activation = (layer.mlp.expert if isinstance(layer.mlp, MoE) else layer.mlp).activation
    return {
        "exact GELU (TransformerEngine: tanh approximation)": activation in ("gelu", "geglu"),
        f"activation {activation}": activation not in ("gelu", "geglu", *ACTIVATIONS),
        "no norm before the MLP": not layer.pre_norms,
        "one norm for attention and MLP": layer.residual.kind == "parallel_shared",
    }


def _layer_limits(layer: Layer) -> dict[str, bool]:
    residual = layer.residual
    return {
        f"norm placement {layer.norm_placement}": layer.norm_placement != "pre",
        f"{residual.kind} residual": residual.kind not in ("sequential", "parallel", "parallel_shared"),
        f"residual multiplier {residual.multiplier}": residual.multiplier != 1.0,
        "parallel residual with dropout": residual.kind == "parallel" and residual.dropout > 0.0,
    }


def describe(a: Architecture, shapes: Mapping[str, Shape], plain: Collection[str] = ()) -> dict[str, Any]:
    """The content of `layers.json` for these tensors (names of `shared.mapping.transformer_engine`).

    `plain`: norms without zero-centred gamma in a model that has it.
    """
    layers: list[dict[str, Shape]] = [{} for _ in a.layers]
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
        "ends": _parts(a, ends, plain) | ({"output_layer": {"tied_to": "embedding.weight"}} if a.head.tied else {}),
        "layers": [_layer(a, index, own, plain, limits(a)) for index, own in enumerate(layers)],
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
    """Names of a module's `_extra_state` entries, which are empty without FP8."""
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


def _layer(
    a: Architecture, index: int, shapes: Mapping[str, Shape], plain: Collection[str], lacking: Limits
) -> dict[str, Any]:
    layer = a.layers[index]
    experts = ("MoE",) if isinstance(layer.mlp, MoE) else ()
    because = (*lacking.all, *experts)
    call = _call(layer)
    if not because:
        arguments = _layer_arguments(layer, a.hidden_size, index)
        return {"class": f"{TE}TransformerLayer", "arguments": arguments, "call": call}
    modules: dict[str, Module] = {}
    if not lacking.attention:
        attention = _attention_arguments(layer, a.hidden_size, index)
        modules["self_attention"] = {"class": f"{TE}MultiheadAttention", "arguments": attention}
    if not lacking.mlp and not experts:
        modules["layernorm_mlp"] = {"class": f"{TE}LayerNormMLP", "arguments": _mlp_arguments(layer, a.hidden_size)}
    rest = {name: shape for name, shape in shapes.items() if not name.startswith(tuple(f"{m}." for m in modules))}
    own = {path.removeprefix(f"layers.{index}.") for path in plain}
    return {"modules": modules | _parts(a, rest, own, layer), "because": list(because), "call": call}


def _call(layer: Layer) -> dict[str, Any]:
    """Arguments of the layer's call: rotary frequencies, or ALiBi."""
    mixer = layer.mixer
    if isinstance(mixer, GatedDeltaNet):
        return {}
    if isinstance(mixer, Attention) and mixer.alibi:
        return {"core_attention_bias_type": "alibi"}
    rotary = mixer.rotary
    if rotary is None:
        return {}
    return {
        "rotary_pos_emb": {
            "dim": mixer.rotary_dim,
            "theta": rotary.theta,
            "interleaved": rotary.interleaved or isinstance(mixer, LatentAttention),
            "scaling": None if rotary.scaling is None else asdict(rotary.scaling),
        }
    }


def _normalization(norm: Norm) -> dict[str, Any]:
    return {"normalization": _KINDS[norm.kind], "zero_centered_gamma": norm.zero_centered_gamma}


def _common_attention(layer: Layer, hidden: int, index: int) -> dict[str, Any]:
    mixer, norm = layer.mixer, layer.norm
    assert isinstance(mixer, Attention)
    return {
        "hidden_size": hidden,
        "num_attention_heads": mixer.heads,
        "num_gqa_groups": mixer.groups,
        "kv_channels": mixer.head_dim,
        "layernorm_epsilon": norm.epsilon,
        "attention_dropout": mixer.dropout,
        "layer_number": index + 1,
        # (left, right) tokens, the query's own not counted
        "window_size": None if mixer.window is None else [mixer.window - 1, 0],
        "fuse_qkv_params": True,
        "qkv_weight_interleaved": True,  # [q1..qn k1 v1 | q.. k2 v2 | ...], as Megatron-Core's
        "rotary_pos_interleaved": mixer.rotary is not None and mixer.rotary.interleaved,
        **_normalization(norm),
        "qk_norm_type": _KINDS[norm.kind] if mixer.qk_norm else None,
        "qk_norm_eps": norm.epsilon,
        "qk_norm_before_rope": mixer.qk_norm is not None,
    }


def _layer_arguments(layer: Layer, hidden: int, index: int) -> dict[str, Any]:
    mixer, mlp = layer.mixer, layer.mlp
    assert isinstance(mixer, Attention)
    assert isinstance(mlp, MLP)
    return {
        **_common_attention(layer, hidden, index),
        "ffn_hidden_size": mlp.ffn_hidden_size,
        "hidden_dropout": layer.residual.dropout,
        "self_attn_mask_type": "causal",
        "parallel_attention_mlp": layer.residual.kind == "parallel",
        # One argument for all linear layers: biases that the model lacks are stored as zeros.
        "bias": mixer.bias or mixer.output_bias or mlp.bias,
        "activation": ACTIVATIONS[mlp.activation],
    }


def _attention_arguments(layer: Layer, hidden: int, index: int) -> dict[str, Any]:
    mixer = layer.mixer
    assert isinstance(mixer, Attention)
    return {
        **_common_attention(layer, hidden, index),
        "attn_mask_type": "causal",
        "input_layernorm": layer.pre_norms,
        "return_layernorm_output": layer.residual.kind == "parallel_shared",
        "bias": mixer.bias or mixer.output_bias,
    }


def _mlp_arguments(layer: Layer, hidden: int) -> dict[str, Any]:
    mlp = layer.mlp
    assert isinstance(mlp, MLP)
    return {
        "hidden_size": hidden,
        "ffn_hidden_size": mlp.ffn_hidden_size,
        "eps": layer.norm.epsilon,
        "bias": mlp.bias,
        **_normalization(layer.norm),
        "activation": ACTIVATIONS[mlp.activation],
    }


def _of_layer(arguments: Mapping[str, Any]) -> tuple[Module, Module]:
    """The two modules inside a TransformerLayer."""
    attention = {"class": f"{TE}MultiheadAttention", "arguments": {**arguments, "input_layernorm": True}}
    return attention, {"class": f"{TE}LayerNormMLP", "arguments": dict(arguments)}


def _parts(
    a: Architecture, shapes: Mapping[str, Shape], plain: Collection[str], layer: Layer | None = None
) -> dict[str, Module]:
    """Modules of these tensors, inferred from names and shapes; of a layer, or of embedding and head."""
    grouped: dict[str, dict[str, Shape]] = {}
    for name, shape in shapes.items():
        path, _, leaf = name.rpartition(".")
        grouped.setdefault(path, {})[leaf] = shape
    return {
        path: _part(a.layers[0] if layer is None else layer, path, own, path in plain) for path, own in grouped.items()
    }


def _part(layer: Layer, path: str, leaves: Mapping[str, Shape], plain: bool) -> Module:
    norm = _normalization(layer.norm) | ({"zero_centered_gamma": False} if plain else {})
    first = leaves.get("weight", leaves.get("weight0", ()))
    is_matrix = len(first) == 2 and not path.endswith("norm")  # a per-head QK norm is 2-D, too
    matrix = {"in_features": first[-1], "out_features": first[0]} if is_matrix else {}
    others = leaves.keys() - {"weight", "bias"}
    bias = "bias" in leaves or "bias0" in leaves
    if "weight0" in leaves:
        count = sum(name.startswith("weight") for name in leaves)
        return {"class": f"{TE}GroupedLinear", "arguments": {"num_gemms": count, **matrix, "bias": bias}}
    if matrix and others in ({"layer_norm_weight"}, {"layer_norm_weight", "layer_norm_bias"}):
        low_rank = isinstance(layer.mixer, LatentAttention) and path.endswith("_up_proj")
        epsilon = (
            layer.mixer.norm_epsilon if isinstance(layer.mixer, LatentAttention) and low_rank else layer.norm.epsilon
        )
        returned = {"return_layernorm_output": True} if layer.residual.kind == "parallel_shared" else {}
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
        high_precision = path.endswith("router") or path == "output_layer"  # never in FP8
        return {"class": "torch.nn.Linear" if high_precision else f"{TE}Linear", "arguments": {**matrix, "bias": bias}}
    if len(first) == 1 and not others and path.endswith("norm"):
        kind = norm.pop("normalization")
        return {
            "class": f"{TE}{kind}",
            "arguments": {"normalized_shape": first[0], "eps": layer.norm.epsilon, **norm},
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
