"""Matches the tensors of a PEFT adapter with those of its base: none unused, missing or misshapen."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from shared.checkpoint.formats.pytorch_bin import read_pytorch_bin
from shared.checkpoint.formats.safetensors_file import Header, TensorInfo, read_header
from shared.errors import UserError
from shared.mapping.layout import COPY, Shape
from shared.mapping.rule import Entry, PrefixVariants, Source, Table, name_variants
from tools.convert.adapter_config import AdapterConfig
from tools.convert.conversion_report import abbreviated
from tools.convert.lora import Delta

_PREFIX = "base_model.model."
# model.state_dict() keeps the adapter name (`default`); PEFT's save_pretrained removes it.
_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector"
    r"|token_adapter\.trainable_tokens_delta)(\.(?P<adapter>(?!weight$)[^.]+))?(\.weight)?"
)
_SAVED = re.compile(r"(?P<module>.+)\.modules_to_save(\.(?P<adapter>[^.]+))?\.(?P<rest>.+)")
_ROWS = "token_adapter.trainable_tokens_delta"
_EXPERTS = re.compile(r"(?:.*\.)?(\d+)\.(?:[^.\d]+\.)*experts((?:\.base_layer)*)")


@dataclass(frozen=True, kw_only=True)
class Changes:
    """An adapter's changes, by name of the base tensor."""

    deltas: Mapping[str, Delta]
    replaced: Mapping[str, TensorInfo]  # replaced by an adapter tensor: modules_to_save, biases
    rows: Mapping[str, tuple[Mapping[int, int], TensorInfo]]  # base row -> adapter row

    @property
    def names(self) -> set[str]:
        return {*self.deltas, *self.replaced, *self.rows}


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


class _Match:
    def __init__(self, config: AdapterConfig, table: Table, prefix_variants: PrefixVariants) -> None:
        self.config, self.prefix_variants = config, prefix_variants
        self.places: dict[str, tuple[Entry, int]] = {
            source.name: (entry, place) for entry in table.entries() for place, source in enumerate(entry.sources)
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

    def changes(self, tensors: Iterable[TensorInfo]) -> Changes:
        parts: dict[str, dict[str, TensorInfo]] = {}
        replaced: dict[str, TensorInfo] = {}
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
                saved = _SAVED.fullmatch(name)
                found_name, named = self._replacement(name, saved, tensor)
                if found_name in replaced:
                    self._twice(tensor, replaced[found_name])
                replaced[found_name] = tensor
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
        deltas: dict[str, Delta] = {}
        for module, own in sorted(parts.items()):
            if own:
                deltas |= self._experts(module, own) if _EXPERTS.fullmatch(module) else self._module(module, own)
        self._check_complete(deltas, replaced)
        self._check_rows(rows, {**{name: delta.a for name, delta in deltas.items()}, **replaced})
        return Changes(deltas=deltas, replaced=replaced, rows=rows)

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

    def _replacement(self, name: str, saved: re.Match[str] | None, tensor: TensorInfo) -> tuple[str, str | None]:
        """The replaced base tensor, and the adapter name if the tensor name contains it."""
        plain, named = name.replace(".base_layer.", "."), None
        if saved:
            plain = f"{saved['module']}.{saved['rest']}"
            if saved["adapter"]:
                inner = f"{saved['module']}.{saved['adapter']}.{saved['rest']}"  # a submodule, not an adapter name
                plain, named = (inner, None) if self._resolve(inner) else (plain, saved["adapter"])
        found = self._resolve(plain)
        if found is None:
            raise UserError(f"{tensor.place}: {tensor.name} is for {plain}, which the base lacks")
        if tensor.shape != self._shape(found):
            fix = "merge into the base that it was trained on"
            if self.places[found][0].padded:
                fix = "the vocabulary was resized: resize the base's embeddings too, save the base, and merge into that"
            raise UserError(
                f"{tensor.place}: {tensor.name} is {list(tensor.shape)}, {found} of the base is "
                f"{list(self._shape(found))}; {fix}"
            )
        return found, named

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

    def _module(self, module: str, own: Mapping[str, TensorInfo]) -> dict[str, Delta]:
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
        return {
            name: Delta(
                a=a,
                b=b,
                rank=rank,
                scale=self.config.scale(module),
                transposed=transposed,
                magnitude=magnitude,
            )
        }

    def _experts(self, module: str, own: Mapping[str, TensorInfo]) -> dict[str, Delta]:
        """LoRA of a layer's experts. The shapes of A and B decide between gate_up_proj and down_proj.

        PEFT before 0.19 reads the stored `[experts, out, in]` as `[experts, in, out]`: A is `[experts * rank, out]`, B is
        `[in, rank * experts]`. Shapes decide between the two; for a square matrix peft_version does.
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
            if whole := [source.name for source in entries[0].sources if source.stacked_axes]:
                raise UserError(
                    f"{a.place}: {a.name} is for experts that the base stores as one tensor ({whole[0]}), which is not merged "
                    "here; merge it with peft"
                )
            (rows, columns), count = entries[0].shape, len(entries)
            rank = self.config.rank(f"{module}.{parameter}")
            for swapped, (outputs, inputs) in ((False, (rows, columns)), (True, (columns, rows))):
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
        for entry in {id(entry): entry for entry, _ in self.places.values()}.values():
            if entry.key.endswith(f".mlp.experts.experts.{part}.weight"):
                named = re.search(r"\.layers\.(\d+)\.", entry.key)
                if (int(named[1]) if named else entry.index[0]) == layer:
                    yield entry

    def _each_expert(
        self, entries: Iterable[Entry], a: TensorInfo, b: TensorInfo, rank: int, scale: float, swapped: bool
    ) -> dict[str, Delta]:
        deltas, listed = {}, list(entries)
        for number, entry in enumerate(listed):
            first = 0
            for source in entry.sources:
                deltas[source.name] = Delta(
                    a=a,
                    b=b,
                    rank=rank,
                    scale=scale,
                    transposed=swapped,
                    expert=number,
                    experts=len(listed),
                    first_row=first,
                )
                first += source.shape[0]
        return deltas

    def _check_shapes(self, name: str, wanted: Iterable[tuple[TensorInfo, Shape]]) -> None:
        for tensor, shape in wanted:
            if tensor.shape != shape:
                raise UserError(
                    f"{tensor.place}: {tensor.name} is {list(tensor.shape)}; {name} of the base and the rank in "
                    f"{self.config.path.name} ask for {list(shape)}"
                )

    def _check_complete(self, deltas: Mapping[str, Delta], replaced: Mapping[str, TensorInfo]) -> None:
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
        if not experts & deltas.keys():
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
