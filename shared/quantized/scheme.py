"""Quantisation schemes of published weights, from `quantization_config` in config.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from shared.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Fp8Blocks:
    """FP8 in blocks (DeepSeek V3): E4M3 codes `<name>` `[rows, columns]`, one scale per block in `<name>_scale_inv`.

    value = value(code) * scale. Blocks at the lower and right edge may be smaller.
    """

    block: tuple[int, int] = (128, 128)  # rows, columns
    powers_of_two: bool = False  # new scales are powers of two (`scale_fmt` ue8m0)

    title = "FP8 (E4M3 in blocks)"


@dataclass(frozen=True, kw_only=True)
class Mxfp4:
    """MXFP4 (gpt-oss): E2M1 codes `<name>_blocks` `[experts, out, groups, 16]`, scales `<name>_scales` `[experts, out, groups]`.

    The unquantised weight `<name>` is transposed: `[experts, in, out]`.
    """

    title = "MXFP4"


@dataclass(frozen=True, kw_only=True)
class Int4Groups:
    """Int4 groups (compressed-tensors `pack-quantized`; Kimi K2 Thinking): `<name>_packed` `[out, in / 8]` int32,
    `<name>_scale` `[out, in / 32]` bf16, and `<name>_shape`, the weight's shape.
    """

    title = "int4 in groups (compressed-tensors)"


QuantizationScheme = Fp8Blocks | Mxfp4 | Int4Groups

# Fields that select modules. Ignored: the stored dtypes say which weights are quantised.
_IGNORED = {"modules_to_not_convert", "modules_to_convert", "ignored_layers", "ignore", "targets"}
_FP8: dict[str, tuple[Any, ...]] = {
    "quant_method": ("fp8",),
    "fmt": ("e4m3",),
    "activation_scheme": ("dynamic",),
    "scale_fmt": ("float", "ue8m0"),
    "expert_dtype": ("fp8",),
    "dequantize": (False,),
}


_MXFP4: dict[str, tuple[Any, ...]] = {"quant_method": ("mxfp4",), "dequantize": (False,)}


_PACK_QUANTIZED: dict[str, tuple[Any, ...]] = {
    "quant_method": ("compressed-tensors",),
    "format": ("pack-quantized",),
    "quantization_status": ("compressed",),
    "sparsity_config": ({},),
    "transform_config": ({},),
}
_GROUP: dict[str, tuple[Any, ...]] = {"format": ("pack-quantized",)}  # activations are not quantised: null
_WEIGHTS: dict[str, tuple[Any, ...]] = {
    "num_bits": (4,),
    "type": ("int",),
    "symmetric": (True,),
    "strategy": ("group",),
    "group_size": (32,),
    "dynamic": (False,),
}
_CALIBRATION = {
    "observer",
    "observer_kwargs",
    "version",
    "global_compression_ratio",
}  # settings of the quantiser, without effect on dequantisation
_FIX = "fetch the unquantised model, or save one with the program that quantised it"


def quantization_scheme(config: Mapping[str, Any]) -> QuantizationScheme | None:
    """The quantisation scheme of a config.json; None without `quantization_config`.

    Raises:
        UserError: the scheme, or a field of it, is not supported.
    """
    given = config.get("quantization_config")
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise UserError(f"config.json: quantization_config is {given!r}, not a JSON object; fetch config.json again")
    method = given.get("quant_method")
    if method == "mxfp4":
        _check(given, _MXFP4, set())
        return Mxfp4()
    if method == "compressed-tensors":
        _check_pack_quantized(given)
        return Int4Groups()
    if method != "fp8":
        raise UserError(
            f"config.json: quantization_config.quant_method {method!r} is not supported (supported: fp8 in blocks, mxfp4, "
            f"compressed-tensors of int4 in groups); {_FIX}"
        )
    _check(given, _FP8, {"weight_block_size"})
    block = given.get("weight_block_size", [128, 128])
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        raise UserError(
            f"config.json: quantization_config.weight_block_size is {block!r}; [rows, columns] is required "
            "(per-tensor scales are not supported)"
        )
    return Fp8Blocks(block=(block[0], block[1]), powers_of_two=given.get("scale_fmt") == "ue8m0")


def _check_pack_quantized(given: Mapping[str, Any]) -> None:
    """Check that every config group is the supported scheme, so module names need not be matched."""
    _check(given, _PACK_QUANTIZED, {"config_groups", *_CALIBRATION})
    _require(given, ("format",))
    groups = given.get("config_groups")
    if not isinstance(groups, Mapping) or not groups or not all(isinstance(g, Mapping) for g in groups.values()):
        raise UserError(
            f"config.json: quantization_config.config_groups is {groups!r}, not groups of modules; fetch config.json again"
        )
    for name, group in groups.items():
        place = f"config_groups.{name}."
        _check(group, _GROUP, {"weights"}, place)
        weights = group.get("weights")
        if not isinstance(weights, Mapping):
            raise UserError(
                f"config.json: quantization_config.{place}weights is {weights!r}, not a JSON object; fetch config.json again"
            )
        _check(weights, _WEIGHTS, _CALIBRATION, f"{place}weights.")
        _require(weights, ("num_bits", "group_size"), f"{place}weights.")


def _require(given: Mapping[str, Any], names: Iterable[str], place: str = "") -> None:
    for name in names:
        if given.get(name) is None:
            raise UserError(f"config.json: quantization_config.{place}{name} is missing; fetch config.json again")


def _check(given: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]], read: set[str], place: str = "") -> None:
    for name, value in given.items():
        if name in read or name in _IGNORED or value is None:
            continue
        if name not in allowed:
            raise UserError(
                f"config.json: quantization_config.{place}{name} = {value!r} is unknown and may change the weights; {_FIX}"
            )
        if value not in allowed[name]:
            known = ", ".join(map(str, allowed[name]))
            raise UserError(
                f"config.json: quantization_config.{place}{name} = {value!r} is not supported (supported: {known}); {_FIX}"
            )
