"""`adapter_config.json` of PEFT: targeted modules, ranks and scales."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from shared.checkpoint.directory.adapter_directory import CONFIG
from shared.checkpoint.directory.auxiliary_files import read_config
from shared.errors import UserError

_READ = {
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "target_parameters", "use_dora"),
    *("init_lora_weights", "base_model_name_or_path", "bias", "trainable_token_indices", "peft_version"),
}
# Training-only fields. fan_in_fan_out: PEFT overrides it by the module's class.
_WITHOUT_EFFECT = {
    *("task_type", "auto_mapping", "revision", "inference_mode", "lora_dropout", "fan_in_fan_out"),
    *("megatron_core", "eva_config", "qalora_group_size", "runtime_config"),
}
# Unsupported fields and the reason, for error messages.
_WHY = {
    "alora_invocation_tokens": "it applies from an invocation token on, and merged weights apply everywhere",
    "arrow_config": "it routes tokens between adapters, and merged weights cannot",
    "layer_replication": "it repeats layers of the base; merge it with peft",
    "lora_bias": "a bias of B is not merged here; merge it with peft",
    "ensure_weight_tying": "adapters shared by tied layers are not merged here; merge it with peft",
}
# Initialisations that leave the base unchanged. PiSSA, OLoRA, CorDA and LoftQ change its weights.
_PLAIN_INITS = (True, False, "true", "gaussian", "eva", "orthogonal")


def _regex(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"invalid regular expression: {error}") from None
    return text


_Regex = Annotated[str, AfterValidator(_regex)]
_Number = Annotated[float, Field(allow_inf_nan=False)]


class _Fields(BaseModel):
    """Types of the fields and PEFT's defaults."""

    model_config = ConfigDict(strict=True)
    r: PositiveInt = 8
    lora_alpha: _Number = 8
    use_rslora: bool | None = False
    use_dora: bool | None = False
    rank_pattern: dict[_Regex, PositiveInt] | None = None
    alpha_pattern: dict[_Regex, _Number] | None = None
    target_modules: _Regex | list[str] | None = None
    exclude_modules: _Regex | list[str] | None = None
    target_parameters: _Regex | list[str] | None = None
    modules_to_save: list[_Regex] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: _Regex | list[_Regex] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    peft_version: str | None = None


class AdapterConfig:
    """Fields of adapter_config.json. UserError for an unsupported field that changes the result."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / CONFIG
        fields = read_config(self.path)
        if fields.get("peft_type") != "LORA":
            raise UserError(f"{self.path}: peft_type is {fields.get('peft_type')!r}; only LORA adapters are read")
        for name in sorted(fields.keys() - _READ - _WITHOUT_EFFECT):
            if fields[name]:
                why = _WHY.get(name, "not supported; merge it with peft")
                raise UserError(f"{self.path}: {name} is {fields[name]!r}: {why}")
        first = fields.get("init_lora_weights", True)
        if (first.lower() if isinstance(first, str) else first) not in _PLAIN_INITS:
            raise UserError(
                f"{self.path}: init_lora_weights is {first!r}, which changed the base's weights; save the adapter again with "
                "peft's path_initial_model_for_weight_conversion"
            )
        self.base = fields.get("base_model_name_or_path")
        self.bias = fields.get("bias", "none")
        if self.bias not in ("none", "all", "lora_only"):
            raise UserError(f"{self.path}: bias is {self.bias!r}; none, all or lora_only is wanted")
        try:
            known = _Fields.model_validate(fields)
        except ValidationError as error:
            found = error.errors()[0]
            name = str(found["loc"][0])
            raise UserError(f"{self.path}: {name} is {fields[name]!r}: {found['msg']}") from None
        self.dora = bool(known.use_dora)
        self.modules_to_save: Sequence[str] = known.modules_to_save or ()
        self.target_parameters: str | Sequence[str] = known.target_parameters or ()
        self._targets: str | Sequence[str] = known.target_modules or ()
        self._excluded: str | Sequence[str] = known.exclude_modules or ()
        layers, pattern = known.layers_to_transform, known.layers_pattern or ()
        self._layers = [layers] if isinstance(layers, int) else layers
        self._layers_pattern = [pattern] if isinstance(pattern, str) else pattern
        self._rank, self._ranks = known.r, known.rank_pattern or {}
        self._alpha, self._alphas = known.lora_alpha, known.alpha_pattern or {}
        self._root = bool(known.use_rslora)
        tokens = known.trainable_token_indices or {}
        self._tokens: Mapping[str, Sequence[int]] = tokens if isinstance(tokens, dict) else {"": tokens}
        self._version = known.peft_version
        self.dropout = float(fields.get("lora_dropout") or 0.0)  # of A's input, in training

    @property
    def rank_and_alpha(self) -> tuple[int, float, bool]:
        """Rank and alpha of every module, and whether the scale is alpha / sqrt(rank).

        Raises:
            UserError: modules differ.
        """
        for name, pattern in (("rank_pattern", self._ranks), ("alpha_pattern", self._alphas)):
            if pattern:
                raise UserError(f"{self.path}: {name}: adapters of different ranks or scales are not trained here")
        return self._rank, self._alpha, self._root

    @property
    def trains_more(self) -> str | None:
        """The field by which the adapter trains more than A and B; None if none does."""
        fields = {
            "use_dora": self.dora,
            "bias": self.bias != "none",
            "modules_to_save": bool(self.modules_to_save),
            "trainable_token_indices": bool(self._tokens),
        }
        return next((name for name, given in fields.items() if given), None)

    def rank(self, module: str) -> int:
        """Rank of a module's A and B."""
        return _matching(self._ranks, module, self._rank)

    def scale(self, module: str) -> float:
        """Scale of `B @ A`: alpha / r, rank-stabilised (rslora) alpha / sqrt(r)."""
        rank = self.rank(module)
        return _matching(self._alphas, module, self._alpha) / (math.sqrt(rank) if self._root else rank)

    def targets(self, module: str) -> bool:
        """Whether PEFT adapts a module (`check_target_module_exists`)."""
        if _named(self._excluded, module):
            return False
        if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.modules_to_save):
            return False
        if not _named(self._targets, module):
            return False
        if isinstance(self._targets, str) or module in self._targets or not self._layers:
            return True
        patterns = [rf"(?:^|.*?\.){pattern}" for pattern in self._layers_pattern] or [r".*?\.[^.]*"]
        found = next((match for pattern in patterns if (match := re.match(rf"{pattern}\.(\d+)\.", module))), None)
        return found is not None and int(found[1]) in self._layers

    @property
    def trained_token_modules(self) -> Sequence[str]:
        """Modules of `trainable_token_indices`. A plain list is for the embedding: ""."""
        return tuple(self._tokens)

    def trained_tokens(self, module: str) -> Sequence[int]:
        """Token ids of a module's trained rows, in the order of the adapter's rows."""
        return next((ids for name, ids in self._tokens.items() if not name or _named([name], module)), ())

    def experts_swapped(self, why: str) -> bool:
        """Whether PEFT read experts stored `[experts, out, in]` as `[experts, in, out]`: before 0.19.

        Raises:
            UserError: peft_version is absent, malformed or a development version of 0.19; the message contains `why`.
        """
        found = re.match(r"(\d+)\.(\d+)(\.\d+)*(?P<rest>.*)", self._version or "")
        if found is None or (found["rest"].startswith(".dev") and (int(found[1]), int(found[2])) == (0, 19)):
            raise UserError(
                f"{self.path}: peft_version is {self._version!r}, and {why}: before 0.19 PEFT swapped the sides of experts; "
                "write the version that made the adapter there"
            )
        return (int(found[1]), int(found[2])) < (0, 19)

    def parameter(self, name: str) -> bool:
        """Whether `target_parameters` contains the parameter."""
        return _named(self.target_parameters, name)


def _matching[Number: (int, float)](patterns: Mapping[str, Number], module: str, default: Number) -> Number:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _named(names: str | Iterable[str], module: str) -> bool:
    """Whether a regular expression matches the full module name, or a list contains the name or a suffix of it."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)
