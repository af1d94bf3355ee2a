"""Matches the tensors of a PEFT adapter with those of its base: none unused, missing or misshapen."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from shared.checkpoint.directory.peft_config import AdapterConfig
from shared.checkpoint.formats.pytorch_bin import read_pytorch_bin
from shared.checkpoint.formats.safetensors_file import Header, TensorInfo, read_header
from shared.checkpoint.lora.merge_adapter import Delta
from shared.console import abbreviated
from shared.errors import UserError
from shared.mapping.layout import COPY, Shape
from shared.mapping.rule import Entry, PrefixVariants, Source, Table, name_variants

_PREFIX = "base_model.model."
# model.state_dict() keeps the adapter name (`default`); PEFT's save_pretrained removes it.
_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector"
    r"|token_adapter\.trainable_tokens_delta)(\.(?P<adapter>(?!weight$)[^.]+))?(\.weight)?"
)
_SAVED = re.compile(r"(?P<module>.+)\.modules_to_save(\.(?P<adapter>[^.]+))?\.(?P<rest>.+)")
# The wrapped module's own tensor, before the adapter: saved with adapted embeddings and with a resized vocabulary.
_WRAPPED = re.compile(r"(?P<module>.+?)\.(token_adapter\.)?(base_layer|original_module)\.(?P<rest>.+)")
_ROWS = "token_adapter.trainable_tokens_delta"
_EXPERTS = re.compile(r"(?:.*\.)?(\d+)\.(?:[^.\d]+\.)*experts((?:\.base_layer)*)")


@dataclass(frozen=True, kw_only=True)
class Changes:
    """An adapter's changes, by name of the base tensor."""

    deltas: Mapping[str, tuple[Delta, ...]]  # one; of experts stored as one tensor, one per expert
    replaced: Mapping[str, TensorInfo]  # replaced by an adapter tensor: modules_to_save, biases
    wrapped: Mapping[str, TensorInfo]  # the base's tensors that the adapter holds, without its changes
    rows: Mapping[str, tuple[Mapping[int, int], TensorInfo]]  # base row -> adapter row

    @property
    def names(self) -> set[str]:
        return {*self.deltas, *self.replaced, *self.wrapped, *self.rows}


def read_adapter(directory: Path) -> Header:
    """The header of the adapter's weights."""
    for name, read in (("adapter_model.safetensors", read_header), ("adapter_model.bin", read_pytorch_bin)):
        if (directory / name).is_file():
            return read(directory / name)
    raise UserError(f"--adapter {directory} holds no adapter_model.safetensors and no adapter_model.bin")


def match(config: AdapterConfig, stored: Header, table: Table, prefix_variants: PrefixVariants) -> Changes:
    """Match every adapter tensor with a base tensor.

    Args:
        config: the adapter's adapter_config.json.
        stored: the header of the adapter's weights.
        table: the base's tensor table, with the names used in its files.
        prefix_variants: name prefixes of the base's files and of its model class.

    Raises:
        UserError: an adapter tensor is unknown, missing or misshapen; the message names it.
    """
    return _Match(config, table, prefix_variants).changes(stored.tensors)


def vocabulary_rows(config: AdapterConfig, stored: Header, table: Table, prefix_variants: PrefixVariants) -> int | None:
    """Rows of the embedding and head that the adapter holds whole; None if it holds neither.

    PEFT saves both where the vocabulary was resized.

    Raises:
        UserError: they differ, or have other rows than an embedding or head that only the base has.
    """
    found = _Match(config, table, prefix_variants).vocabulary(stored.tensors)
    if not found:
        return None
    name, first = next(iter(found.items()))
    for other, tensor in found.items():
        if tensor.shape[:1] != first.shape[:1]:
            raise UserError(
                f"{tensor.place}: {other} has {tensor.shape[0]} rows and {name} {first.shape[0]}; resize both, and save the "
                "adapter again"
            )
    for entry in table.entries():
        lacking = entry.sources[0].name
        if entry.padded and lacking not in found and entry.sources[0].shape[0] != first.shape[0]:
            raise UserError(
                f"{first.place}: {name} was resized to {first.shape[0]} rows, {lacking} of the base has "
                f"{entry.sources[0].shape[0]} and is not in the adapter; resize the base's embeddings, save the base, and merge "
                "into that"
            )
    return first.shape[0]


class _Match:
    def __init__(self, config: AdapterConfig, table: Table, prefix_variants: PrefixVariants) -> None:
        self.config, self.prefix_variants = config, prefix_variants
        entries = list(table.entries())
        self.experts = [entry for entry in entries if ".mlp.experts.experts." in entry.key]
        self.places: dict[str, tuple[Entry, int]] = {
            source.name: (entry, place) for entry in entries for place, source in enumerate(entry.sources)
        }
        for name, shape in table.required_pass_through().items():
            source = Source(name=name, shape=shape)
            self.places[name] = (Entry(key=name, stack=(), index=(), sources=(source,), layout=COPY), 0)
        self.embeddings = {
            name
            for name, (entry, _) in self.places.items()
            if entry.key.startswith("embedding.") and entry.key.endswith("_embeddings.weight")
        }
        for tied in table.tied_tensors:
            self.places[tied.name] = self.places[tied.tied_to]
        self.tied = {tied.name: tied.tied_to for tied in table.tied_tensors}

    def vocabulary(self, tensors: Iterable[TensorInfo]) -> dict[str, TensorInfo]:
        """Whole tensors of embedding and head by base name, a tied head under the embedding's."""
        found: dict[str, TensorInfo] = {}
        for tensor in tensors:
            name = tensor.name.removeprefix(_PREFIX)
            if tensor.shape and not _PART.fullmatch(name):
                plain = self._resolve(self._plain(name)[0])
                if plain and self.places[plain][0].padded:
                    found[self.tied.get(plain, plain)] = tensor
        return found

    def changes(self, tensors: Iterable[TensorInfo]) -> Changes:
        parts: dict[str, dict[str, TensorInfo]] = {}
        replaced: dict[str, TensorInfo] = {}
        wrapped: dict[str, TensorInfo] = {}
        adapters: dict[str, TensorInfo] = {}
        for tensor in tensors:
            if not tensor.name.startswith(_PREFIX):
                raise UserError(
                    f"{tensor.place}: {tensor.name} is no tensor name of PEFT ({_PREFIX}...); save the adapter again with "
                    "peft's save_pretrained"
                )
            if not prod(tensor.shape):
                raise UserError(
                    f"{tensor.place}: {tensor.name} is empty, as DeepSpeed ZeRO-3 leaves a tensor that was not gathered; "
                    "save the adapter again from gathered weights"
                )
            name = tensor.name.removeprefix(_PREFIX)
            found = _PART.fullmatch(name)
            if found is None:
                found_name, named = self._whole(name, tensor)
                places = wrapped if self._untrained(name, found_name) else replaced
                other = places.get(found_name)
                # A resized vocabulary is saved twice: `embed_tokens.weight` and `embed_tokens.modules_to_save.weight`.
                again = other and (".modules_to_save.weight" in tensor.name) != (
                    ".modules_to_save.weight" in other.name
                )
                if other and not again:
                    self._twice(tensor, other)
                places[found_name] = tensor
            else:
                named = found["adapter"]
                if other := parts.setdefault(found["module"], {}).get(found["part"]):
                    self._twice(tensor, other)
                parts[found["module"]][found["part"]] = tensor
            if named:
                adapters.setdefault(named, tensor)
        if len(adapters) > 1:
            one, two, *_ = sorted(adapters)
            raise UserError(
                f"{adapters[two].place} holds several adapters ({one}, {two}); save one of them with peft's save_pretrained"
            )
        rows = dict(self._rows(module, own.pop(_ROWS)) for module, own in sorted(parts.items()) if _ROWS in own)
        deltas: dict[str, tuple[Delta, ...]] = {}
        for module, own in sorted(parts.items()):
            if own:
                deltas |= self._experts(module, own) if _EXPERTS.fullmatch(module) else self._module(module, own)
        self._check_complete(deltas, replaced)
        self._check_rows(rows, {**{name: each[0].a for name, each in deltas.items()}, **replaced})
        return Changes(deltas=deltas, replaced=replaced, wrapped=wrapped, rows=rows)

    @staticmethod
    def _twice(tensor: TensorInfo, other: TensorInfo) -> None:
        raise UserError(
            f"{tensor.place}: {tensor.name} and {other.name} are one tensor of several adapters; save one of them with "
            "peft's save_pretrained"
        )

    def _rows(self, module: str, tensor: TensorInfo) -> tuple[str, tuple[Mapping[int, int], TensorInfo]]:
        """Rows of `trainable_token_indices`. The adapter's values replace them, in a tied head too."""
        name = self._resolve(f"{module}.weight")
        indices = self.config.trained_tokens(module)
        if name is None or not indices:
            raise UserError(
                f"{tensor.place}: {tensor.name} is for tokens of {module}.weight, "
                + (f"which {self.config.path.name} does not list" if name else "which the base lacks")
            )
        name = self.tied.get(name, name)
        count, *rest = self._shape(name)
        if tensor.shape != (len(indices), *rest):
            raise UserError(
                f"{tensor.place}: {tensor.name} is {list(tensor.shape)}; {name} of the base and trainable_token_indices in "
                f"{self.config.path.name} ask for {[len(indices), *rest]}"
            )
        if beyond := [index for index in indices if not 0 <= index < count]:
            raise UserError(
                f"{self.config.path}: trainable_token_indices names token {beyond[0]}, {name} of the base has {count} rows; "
                "merge into the base that it was trained on"
            )
        return name, ({index: place for place, index in enumerate(indices)}, tensor)

    def _check_rows(self, rows: Iterable[str], others: Mapping[str, TensorInfo]) -> None:
        for module in self.config.trained_token_modules:
            if not any(self._ends(name, module) for name in rows):
                raise UserError(
                    f"{self.config.path}: trainable_token_indices names {module or 'the embedding'}, without tensors in the "
                    "adapter; save or fetch it again"
                )
        for name in rows:
            changed = [
                *[name] * (name in others),
                *(head for head, of in self.tied.items() if of == name and head in others),
            ]
            if changed:
                raise UserError(
                    f"{others[changed[0]].place}: {changed[0]} is adapted beside trained rows of {name}, which is not merged "
                    "here; merge it with peft"
                )

    def _ends(self, name: str, module: str) -> bool:
        """Whether a base tensor, or one tied to it, is the module's weight. Module "" is the embedding."""
        names = [name, *(head for head, of in self.tied.items() if of == name)]
        forms = {form for each in names for form in name_variants(each, self.prefix_variants)}
        if not module:
            return name in self.embeddings
        return any(f".{form}".endswith(f".{module}.weight") for form in forms)

    def _resolve(self, name: str) -> str | None:
        """The name used in the base's files; None if the base lacks the tensor."""
        return next((found for found in name_variants(name, self.prefix_variants) if found in self.places), None)

    def _shape(self, name: str) -> Shape:
        entry, place = self.places[name]
        return entry.sources[place].shape

    def _plain(self, name: str) -> tuple[str, str | None]:
        """Name without the wrapper of PEFT, and the adapter name if the tensor name contains it."""
        if wrapped := _WRAPPED.fullmatch(name):
            return f"{wrapped['module']}.{wrapped['rest']}", None
        saved = _SAVED.fullmatch(name)
        if saved is None:
            return name, None
        plain = f"{saved['module']}.{saved['rest']}"
        if saved["adapter"]:
            inner = f"{saved['module']}.{saved['adapter']}.{saved['rest']}"  # a submodule, not an adapter name
            return (inner, None) if self._resolve(inner) else (plain, saved["adapter"])
        return plain, None

    def _whole(self, name: str, tensor: TensorInfo) -> tuple[str, str | None]:
        """The base tensor of a whole adapter tensor, and the adapter name if the tensor name contains it."""
        plain, named = self._plain(name)
        found = self._resolve(plain)
        if found is None:
            raise UserError(f"{tensor.place}: {tensor.name} is for {plain}, which the base lacks")
        if tensor.shape != self._shape(found):
            raise UserError(
                f"{tensor.place}: {tensor.name} is {list(tensor.shape)}, {found} of the base is "
                f"{list(self._shape(found))}; merge into the base that it was trained on"
            )
        return found, named

    def _untrained(self, name: str, found: str) -> bool:
        """Whether a whole adapter tensor is the base's: of a wrapped module, or of an embedding that is saved along."""
        if found.endswith(".bias") and self.config.bias != "none":
            return False
        if _WRAPPED.fullmatch(name):
            return True
        if _SAVED.fullmatch(name) or not self.places[found][0].padded:
            return False
        forms = name_variants(found, self.prefix_variants)
        saved = [re.compile(rf"(^|.*\.){re.escape(module)}\.") for module in self.config.modules_to_save]
        return not any(module.match(form) for module in saved for form in forms)

    def _pair(
        self, module: str, own: Mapping[str, TensorInfo], names: tuple[str, str]
    ) -> tuple[TensorInfo, TensorInfo]:
        place = next(iter(own.values())).place
        for name in names:
            if name not in own:
                raise UserError(f"{place}: {module}.{name} is missing; save or fetch the adapter again")
        if ("lora_magnitude_vector" in own) != self.config.dora:
            raise UserError(
                f"{place}: use_dora is {self.config.dora}, but {module} has "
                f"{'a' if 'lora_magnitude_vector' in own else 'no'} lora_magnitude_vector; save or fetch the adapter again"
            )
        return own[names[0]], own[names[1]]

    def _module(self, module: str, own: Mapping[str, TensorInfo]) -> dict[str, tuple[Delta, ...]]:
        """LoRA of a linear layer or an embedding."""
        embedded = any(name.startswith("lora_embedding") for name in own)
        a, b = self._pair(module, own, ("lora_embedding_A", "lora_embedding_B") if embedded else ("lora_A", "lora_B"))
        name = self._resolve(f"{module}.weight")
        if name is None or len(self._shape(name)) != 2:
            raise UserError(f"{a.place}: {a.name} is for {module}.weight, no matrix of the base")
        if embedded != (name in self.embeddings):
            raise UserError(
                f"{a.place}: {a.name} does not fit {name}: an embedding on one side, a linear layer on the other"
            )
        transposed = embedded or self.places[name][0].transposed
        rows, columns = self._shape(name)[::-1] if transposed else self._shape(name)
        magnitude = own.get("lora_magnitude_vector")
        rank = self.config.rank(module)
        wanted = [(a, (rank, columns)), (b, (rows, rank))] + ([(magnitude, (rows,))] if magnitude else [])
        self._check_shapes(name, wanted)
        scale = self.config.scale(module)
        return {name: (Delta(a=a, b=b, rank=rank, scale=scale, transposed=transposed, magnitude=magnitude),)}

    def _experts(self, module: str, own: Mapping[str, TensorInfo]) -> dict[str, tuple[Delta, ...]]:
        """LoRA of a layer's experts. The shapes of A and B decide between gate_up_proj and down_proj.

        PEFT before 0.19 reads the class's `[experts, out, in]` as `[experts, in, out]`: A is `[experts * rank, out]`, B is
        `[in, rank * experts]`. Shapes decide between the two; for a square matrix peft_version does. gpt-oss's class has
        `[experts, in, out]`.
        """
        a, b = self._pair(module, own, ("lora_A", "lora_B"))
        found = _EXPERTS.fullmatch(module)
        assert found is not None
        module = module.removesuffix(found[2])
        fits: list[tuple[str, bool, list[Entry]]] = []
        for part, parameter in (("linear_fc1", "gate_up_proj"), ("linear_fc2", "down_proj")):
            entries = sorted(self._of_experts(int(found[1]), part), key=lambda entry: entry.index)
            if not entries or not self.config.parameter(f"{module}.{parameter}"):
                continue
            (rows, columns), count = entries[0].shape, len(entries)
            rank = self.config.rank(f"{module}.{parameter}")
            sides = [(False, (rows, columns))] + ([] if entries[0].transposed else [(True, (columns, rows))])
            for swapped, (outputs, inputs) in sides:
                if (a.shape, b.shape) == ((count * rank, inputs), (outputs, count * rank)):
                    fits.append((parameter, swapped, entries))
        if len(fits) > 1:
            swapped = self.config.experts_swapped(f"{a.name} is square")
            fits = [fit for fit in fits if fit[1] == swapped]
        if len(fits) != 1:
            raise UserError(
                f"{a.place}: {a.name} is {list(a.shape)} and its B {list(b.shape)}: they fit no experts in "
                f"target_parameters of {self.config.path.name}"
            )
        ((parameter, swapped, entries),) = fits
        rank, scale = self.config.rank(f"{module}.{parameter}"), self.config.scale(f"{module}.{parameter}")
        return self._each_expert(entries, a, b, rank, scale, swapped)

    def _of_experts(self, layer: int, part: str) -> Iterator[Entry]:
        for entry in self.experts:
            if entry.key.endswith(f".mlp.experts.experts.{part}.weight"):
                named = re.search(r"\.layers\.(\d+)\.", entry.key)
                if (int(named[1]) if named else entry.index[0]) == layer:
                    yield entry

    def _each_expert(
        self, entries: Sequence[Entry], a: TensorInfo, b: TensorInfo, rank: int, scale: float, swapped: bool
    ) -> dict[str, tuple[Delta, ...]]:
        deltas: dict[str, tuple[Delta, ...]] = {}
        for number, entry in enumerate(entries):
            first = 0
            for source in entry.sources:
                delta = Delta(
                    a=a,
                    b=b,
                    rank=rank,
                    scale=scale,
                    transposed=swapped or entry.transposed,
                    expert=number,
                    experts=len(entries),
                    first_row=first,
                )
                deltas[source.name] = (*deltas.get(source.name, ()), delta)
                first += source.shape[0]
        return deltas

    def _check_shapes(self, name: str, wanted: Iterable[tuple[TensorInfo, Shape]]) -> None:
        for tensor, shape in wanted:
            if tensor.shape != shape:
                raise UserError(
                    f"{tensor.place}: {tensor.name} is {list(tensor.shape)}; {name} of the base and the rank in "
                    f"{self.config.path.name} ask for {list(shape)}"
                )

    def _check_complete(self, deltas: Collection[str], replaced: Mapping[str, TensorInfo]) -> None:
        """UserError if a targeted module has no adapter tensors: a partial adapter is not merged."""
        missing = []
        for name in self.places:
            module = name.removesuffix(".weight")
            targeted = any(map(self.config.targets, name_variants(module, self.prefix_variants)))
            if name.endswith(".weight") and targeted and len(self._shape(name)) == 2 and name not in deltas:
                missing.append(name)
        # transformers 5 holds experts as stacked parameters; target_modules cannot target them.
        experts = {
            source.name for entry, _ in self.places.values() if ".experts." in entry.key for source in entry.sources
        }
        if not experts & set(deltas):
            missing = [name for name in missing if name not in experts]
        for name in self.places:
            changed = self.config.bias == "all" or name.removesuffix("bias") + "weight" in deltas
            if name.endswith(".bias") and self.config.bias != "none" and changed and name not in replaced:
                missing.append(name)
        for module in self.config.modules_to_save:
            if not any(re.match(rf"(^|.*\.){re.escape(module)}\.", name) for name in replaced):
                missing.append(module)
        if missing:
            raise UserError(
                f"{self.config.path} targets {abbreviated(missing)}, without tensors in the adapter; save or fetch it again"
            )
