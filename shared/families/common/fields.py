"""Strict reader of config.json: every field is read, known to have no effect, or refused by name."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from shared.architecture.architecture import RopeScaling
from shared.errors import UserError
from shared.families.common.harmless_fields import harmless, is_rate

# Fields that must be positive.
_POSITIVE = """
    d_model decoder_sparse_step expansion_ratio ffn_dim ffn_hidden_size full_attention_interval head_dim hidden_size
    inner_hidden_size intermediate_size kv_channels kv_lora_rank linear_conv_kernel_dim linear_key_head_dim
    linear_num_key_heads linear_num_value_heads linear_value_head_dim max_position_embeddings max_seq_len
    max_sequence_length moe_intermediate_size multi_query_group_num n_embd n_head n_heads n_inner n_layer n_layers
    n_positions no_rope_layer_interval num_attention_heads num_hidden_layers num_key_value_heads num_kv_heads
    num_layers padded_vocab_size seq_length sliding_window_pattern v_head_dim vocab_size word_embed_proj_dim
"""
POSITIVE = frozenset(_POSITIVE.split())


def renamed(config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """config.json with renamed fields `{old: new}`; UserError if both exist and differ."""
    result = dict(config)
    for old, new in names.items():
        value = result.pop(old, None)
        if value is not None and result.setdefault(new, value) != value:
            raise UserError(f"config.json: {old} {value!r} contradicts {new} {result[new]!r}; keep the right one")
    return result


def _check_finite(config: Mapping[str, Any], within: str) -> None:
    for name, value in config.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"config.json: {within}{name} is {value}; a finite number is required")
        if isinstance(value, dict):
            _check_finite(value, f"{within}{name}.")


class Fields:
    """A config.json whose every field must be read or ignored explicitly; `finish` refuses the rest.

    Args:
        config: its fields.
        ignored: fields to pass over though the family does not read them (`--ignore-config-field`).
        within: the part of config.json, for messages and for names in `ignored`: "text_config.".
    """

    def __init__(self, config: Mapping[str, Any], ignored: Collection[str] = (), within: str = "") -> None:
        _check_finite(config, "")
        self._config = dict(config)
        self._read: set[str] = set()
        self._within = within
        self.ignored = ignored

    def get(self, name: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """The field's value; the default if absent or null; UserError for another type."""
        self._read.add(name)
        value = self._config.get(name)
        if value is None:
            if default is None:
                raise UserError(f"config.json: {name} is missing")
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise UserError(f"config.json: {name} is {value!r}, which is not of type {_name(kind)}")
        if name in POSITIVE and isinstance(value, int) and value < 1:
            raise UserError(f"config.json: {name} is {value}; a positive number is required")
        return value

    def has(self, name: str) -> bool:
        """Whether the field exists, null included."""
        return name in self._config

    def optional(self, name: str, kind: type) -> Any:
        """The field's value; None if absent or null."""
        self._read.add(name)
        return None if self._config.get(name) is None else self.get(name, kind)

    def nullable(self, name: str, kind: type, default: Any) -> Any:
        """The field's value; None if null; the default if absent."""
        return self.optional(name, kind) if self.has(name) else default

    def expect(self, name: str, *allowed: Any, why: str) -> None:
        """Refuse other values; absent or null is accepted."""
        self._read.add(name)
        value = self._config.get(name)
        if value is not None and value not in allowed:
            raise UserError(f"config.json: {name} = {value!r} is not supported: {why}")

    def ignore(self, *names: str) -> None:
        """Mark fields as read that have no effect."""
        self._read.update(names)

    def finish(self, family: str) -> None:
        """UserError for a field that was neither read nor ignored, and for one that was read and is to be ignored."""
        for name, value in self._config.items():
            full = self._within + name
            if full in self.ignored and name in self._read:
                raise UserError(
                    f"--ignore-config-field {full}: family {family} reads it (config.json: {value!r}), so it may change "
                    "the result; leave it out"
                )
            if name in self._read or full in self.ignored or harmless(name, value):
                continue
            raise UserError(
                f"config.json: {name} = {value!r} is not a field of family {family} and would be ignored; "
                f"if it changes nothing, give --ignore-config-field {full}, or remove it"
            )

    def unread_rates(self) -> dict[str, float]:
        """Dropout rates above 0 that the family does not read."""
        unread = {name: value for name, value in self._config.items() if name not in self._read}
        return {self._within + name: value for name, value in unread.items() if value and is_rate(name, value)}

    def rope(
        self, default_theta: float, max_position_embeddings: int, *, partial: bool = False
    ) -> tuple[float, RopeScaling | None]:
        """RoPE base and scaling from `rope_theta` and `rope_scaling` (transformers 4) or `rope_parameters` (5).

        `partial`: the family reads `rotary_fraction`, too; otherwise partial_rotary_factor must be 1.
        """
        new = self.optional("rope_parameters", dict) or {}
        return self._rope(new, default_theta, max_position_embeddings, partial)

    def rope_by_kind(
        self, default_theta: float, max_position_embeddings: int
    ) -> tuple[float, RopeScaling | None, float | None]:
        """RoPE base and scaling of full-attention layers, and the base of sliding-window layers (None if not given).

        `rope_parameters` then has the keys `full_attention` and `sliding_attention`.
        """
        both = self.optional("rope_parameters", dict) or {}
        if unknown := sorted(both.keys() - {"full_attention", "sliding_attention"}):
            raise UserError(f"config.json: rope_parameters.{unknown[0]} is not a layer type of this family")
        kinds = Fields(both)
        full, windowed = (kinds.optional(kind, dict) or {} for kind in ("full_attention", "sliding_attention"))
        for name, value in windowed.items():
            if name != "rope_theta" and (name, value) != ("rope_type", "default"):
                raise UserError(f"config.json: rope_parameters.sliding_attention.{name} = {value!r} is not supported")
        if "partial_rotary_factor" in full:
            raise UserError("config.json: partial_rotary_factor is not supported by this family")
        theta, scaling = self._rope(full, default_theta, max_position_embeddings, partial=False)
        return theta, scaling, Fields(windowed).optional("rope_theta", float)

    def _rope(
        self, new: Mapping[str, Any], default_theta: float, max_position_embeddings: int, partial: bool
    ) -> tuple[float, RopeScaling | None]:
        old = self.optional("rope_scaling", dict) or {}
        theta, old_theta = Fields(new).optional("rope_theta", float), self.optional("rope_theta", float)
        if theta is not None and old_theta is not None and theta != old_theta:
            raise UserError(f"config.json: rope_theta {old_theta} contradicts rope_parameters.rope_theta {theta}")
        longrope = "longrope" in (_kind(old, "rope_scaling"), _kind(new, "rope_parameters"))
        length = self.optional("original_max_position_embeddings", int) if longrope else None
        scaling, new_scaling = (
            _scaling(given, field, max_position_embeddings, length)
            for given, field in ((old, "rope_scaling"), (new, "rope_parameters"))
        )
        if old and new and scaling != new_scaling:
            raise UserError("config.json: rope_scaling contradicts rope_parameters; keep the right one")
        if not partial and self.rotary_fraction(1.0) != 1.0:
            raise UserError("config.json: partial_rotary_factor other than 1 is not supported by this family")
        base = theta if theta is not None else old_theta if old_theta is not None else default_theta
        return base, new_scaling or scaling

    def rotary_fraction(self, default: float, name: str = "partial_rotary_factor") -> float:
        """partial_rotary_factor from its three places; UserError if they differ."""
        old, new = (self.optional(field, dict) or {} for field in ("rope_scaling", "rope_parameters"))
        given = [
            self.optional(name, float),
            *(Fields(place).optional("partial_rotary_factor", float) for place in (old, new)),
        ]
        found = {value for value in given if value is not None}
        if len(found) > 1:
            raise UserError(
                f"config.json: {name} is given as {' and as '.join(map(str, sorted(found)))}; keep the right one"
            )
        return found.pop() if found else default


_LONGROPE = {"short_factor", "long_factor"}
_PLAIN = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
_LLAMA3 = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
_YARN = {"factor", "original_max_position_embeddings"}
_YARN_IGNORED = {"finetuned"}  # read by the first models' remote code, for dynamic scaling only
_YARN_OPTIONS = {"beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim"}


_KINDS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": _LLAMA3,
    "yarn": _YARN,
    "longrope": _LONGROPE,
    "dynamic": {"factor"},
}


def _kind(given: Mapping[str, Any], field: str) -> Any:
    kind = given.get("rope_type", given.get("type", "default"))
    if given.get("type", kind) != kind:
        raise UserError(f"config.json: {field} has type {given['type']!r} and rope_type {kind!r}; keep the right one")
    return kind


def _scaling(
    given: Mapping[str, Any], field: str, max_position_embeddings: int, original_length: int | None
) -> RopeScaling | None:
    """`original_length`: original_max_position_embeddings at the top level of config.json (Phi-3)."""
    kind = _kind(given, field)
    needed = _KINDS.get(kind) if isinstance(kind, str) else None
    if needed is None:
        known = ", ".join(name for name in _KINDS if name != "default")
        raise UserError(f"config.json: {field} of type {kind!r} is not supported; supported: {known}")
    allowed = needed | {"original_max_position_embeddings"}  # without effect for default, linear and dynamic
    if kind == "yarn":
        allowed = allowed | _YARN_OPTIONS | _YARN_IGNORED
    if kind == "longrope":
        allowed = allowed | {"factor", "attention_factor"}
    if missing := needed - {name for name in given if given[name] is not None}:
        raise UserError(f"config.json: {field} of type {kind} lacks {', '.join(sorted(missing))}")
    if unknown := sorted(k for k in given.keys() - allowed - _PLAIN if given[k] is not None):
        raise UserError(f"config.json: {field}.{unknown[0]} = {given[unknown[0]]!r} is not supported for type {kind}")
    if kind == "default":
        return None
    try:
        if kind in ("linear", "dynamic"):
            return RopeScaling(kind=kind, factor=float(given["factor"]))
        if kind == "yarn":
            return _yarn(given)
        if kind == "longrope":
            return _longrope(given, field, max_position_embeddings, original_length)
        return RopeScaling(
            kind="llama3",
            factor=float(given["factor"]),
            low_frequency_factor=float(given["low_freq_factor"]),
            high_frequency_factor=float(given["high_freq_factor"]),
            original_length=int(given["original_max_position_embeddings"]),
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"config.json: {field}: {error}") from None


def _yarn(given: Mapping[str, Any]) -> RopeScaling:
    def optional(name: str) -> float | None:
        return None if given.get(name) is None else float(given[name])

    return RopeScaling(
        kind="yarn",
        factor=float(given["factor"]),
        original_length=int(given["original_max_position_embeddings"]),
        beta_fast=optional("beta_fast") or 32.0,  # 0 means absent, as in transformers
        beta_slow=optional("beta_slow") or 1.0,
        truncate=given.get("truncate") is not False,
        attention_factor=optional("attention_factor"),
        mscale=optional("mscale"),
        mscale_all_dim=optional("mscale_all_dim"),
    )


def _longrope(
    given: Mapping[str, Any], field: str, max_position_embeddings: int, original_length: int | None
) -> RopeScaling:
    """`factor` defaults to max_position_embeddings / original_max_position_embeddings."""
    own = given.get("original_max_position_embeddings")
    if own is not None and original_length is not None and own != original_length:
        raise UserError(
            f"config.json: original_max_position_embeddings {original_length} contradicts {field}'s {own}; "
            "keep the right one"
        )
    length = original_length or own
    if length is None:
        raise UserError(f"config.json: {field} of type longrope lacks original_max_position_embeddings")
    factor, attention_factor = given.get("factor"), given.get("attention_factor")
    return RopeScaling(
        kind="longrope",
        factor=float(max_position_embeddings / length if factor is None else factor),
        original_length=int(length),
        attention_factor=None if attention_factor is None else float(attention_factor),
        short_factors=tuple(map(float, given["short_factor"])),
        long_factors=tuple(map(float, given["long_factor"])),
    )


def rope_fields(theta: float, scaling: RopeScaling | None, fraction: float | None = None) -> dict[str, Any]:
    """RoPE fields of a new config.json, for transformers 4 and 5; `fraction`: partial_rotary_factor, if it has one."""
    parameters = _written_scaling(scaling)
    part = {} if fraction is None else {"partial_rotary_factor": fraction}
    return {
        **part,
        "rope_theta": theta,
        "rope_scaling": parameters if scaling is not None else None,
        "rope_parameters": {"rope_theta": theta, **parameters, **part},
    }


def rope_fields_by_kind(theta: float, scaling: RopeScaling | None, local_theta: float) -> dict[str, Any]:
    """`rope_parameters` by layer type, for families whose sliding-window layers have their own RoPE."""
    windowed = {"rope_theta": local_theta, "rope_type": "default"}
    full = {"rope_theta": theta, **_written_scaling(scaling)}
    return {"rope_parameters": {"full_attention": full, "sliding_attention": windowed}}


def _written_scaling(scaling: RopeScaling | None) -> dict[str, Any]:
    if scaling is None:
        return {"rope_type": "default"}
    parameters: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind not in ("linear", "dynamic"):
        parameters["original_max_position_embeddings"] = scaling.original_length
    if scaling.kind == "llama3":
        parameters |= {
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
        }
    if scaling.kind == "yarn":
        options = {name: getattr(scaling, name) for name in sorted(_YARN_OPTIONS)}
        parameters |= {name: value for name, value in options.items() if value is not None}
    if scaling.kind == "longrope":
        parameters |= {"short_factor": list(scaling.short_factors), "long_factor": list(scaling.long_factors)}
        parameters |= {} if scaling.attention_factor is None else {"attention_factor": scaling.attention_factor}
    return parameters


def _name(kind: type | tuple[type, ...]) -> str:
    return kind.__name__ if isinstance(kind, type) else " or ".join(k.__name__ for k in kind)
