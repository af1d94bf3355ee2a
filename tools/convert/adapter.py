"""Matches the tensors of a PEFT adapter with those of its base: none unused, missing or misshapen."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from shared.checkpoint.formats.pytorch_bin import read_pytorch_bin
from shared.checkpoint.formats.safetensors_file import Header, TensorInfo, read_header
from shared.errors import UserError
from shared.mapping.layout import CONCAT, COPY, Shape
from shared.mapping.rule import Entry, PrefixVariants, Source, Table, name_variants
from tools.convert.adapter_config import AdapterConfig
from tools.convert.conversion_report import abbreviated
from tools.convert.lora import Delta

_PREFIX = "base_model.model."
_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.weight)?"
)
_EXPERTS = re.compile(r"(?:.*\.)?(\d+)\.(?:[^.\d]+\.)*experts((?:\.base_layer)*)")


@dataclass(frozen=True, kw_only=True)
class Changes:
    """Changes of an adapter, by tensor of the base."""

    deltas: Mapping[str, Delta]
    replaced: Mapping[str, TensorInfo]  # by the adapter's own: modules_to_save, biases

    @property
    def names(self) -> set[str]:
        return {*self.deltas, *self.replaced}


def read_adapter(directory: Path) -> Header:
    """The header of the adapter's weights."""
    for name, read in (("adapter_model.safetensors", read_header), ("adapter_model.bin", read_pytorch_bin)):
        if (directory / name).is_file():
            return read(directory / name)
    raise UserError(f"--adapter {directory} holds no adapter_model.safetensors and no adapter_model.bin")


def match(config: AdapterConfig, stored: Header, table: Table, prefix_variants: PrefixVariants) -> Changes:
    """The tensors of the base that change.

    Args:
        config: of the adapter.
        stored: its tensors.
        table: of the base, under the names of its files.
        prefix_variants: prefixes of those names, and of the model class's.

    Raises:
        UserError: naming a tensor that is unknown, missing or misshapen.
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

    def changes(self, tensors: Iterable[TensorInfo]) -> Changes:
        parts: dict[str, dict[str, TensorInfo]] = {}
        replaced: dict[str, TensorInfo] = {}
        for tensor in tensors:
            if not tensor.name.startswith(_PREFIX):
                raise UserError(f"{tensor.place}: {tensor.name} is no tensor name of PEFT ({_PREFIX}...)")
            name = tensor.name.removeprefix(_PREFIX)
            if found := _PART.fullmatch(name):
                parts.setdefault(found["module"], {})[found["part"]] = tensor
            else:
                replaced[self._replacement(name, tensor)] = tensor
        deltas: dict[str, Delta] = {}
        for module, own in sorted(parts.items()):
            deltas |= self._experts(module, own) if _EXPERTS.fullmatch(module) else self._module(module, own)
        self._check_complete(deltas, replaced)
        return Changes(deltas=deltas, replaced=replaced)

    def _resolve(self, name: str) -> str | None:
        """The name in the base's files; None if the base lacks it."""
        return next((found for found in name_variants(name, self.prefix_variants) if found in self.places), None)

    def _shape(self, name: str) -> Shape:
        entry, place = self.places[name]
        return entry.sources[place].shape

    def _replacement(self, name: str, tensor: TensorInfo) -> str:
        plain = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
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
        return found

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
        """The adapter of a linear layer or an embedding."""
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
        downcast_first = embedded or self.config.parameter(f"{module}.weight")
        return {
            name: Delta(
                a=a,
                b=b,
                rank=rank,
                scale=self.config.scale(module),
                transposed=transposed,
                downcast_first=downcast_first and magnitude is None,
                magnitude=magnitude,
            )
        }

    def _experts(self, module: str, own: Mapping[str, TensorInfo]) -> dict[str, Delta]:
        """The adapter of a layer's experts: of gate_up_proj or of down_proj, as its shapes tell."""
        a, b = self._pair(module, own, ("lora_A", "lora_B"))
        found = _EXPERTS.fullmatch(module)
        assert found is not None
        module = module.removesuffix(found[2])
        for part, parameter in (("linear_fc1", "gate_up_proj"), ("linear_fc2", "down_proj")):
            entries = sorted(self._of_experts(int(found[1]), part), key=lambda entry: entry.index)
            if not entries or not self.config.parameter(f"{module}.{parameter}"):
                continue
            (rows, columns), count = entries[0].shape, len(entries)
            rank = self.config.rank(f"{module}.{parameter}")
            if (a.shape, b.shape) != ((count * rank, columns), (rows, count * rank)):
                continue
            return self._each_expert(entries, a, b, rank, self.config.scale(f"{module}.{parameter}"))
        raise UserError(
            f"{a.place}: {a.name} is {list(a.shape)} and its B {list(b.shape)}: they fit no experts in target_parameters "
            f"of {self.config.path.name}"
        )

    def _of_experts(self, layer: int, part: str) -> Iterator[Entry]:
        for entry in {id(entry): entry for entry, _ in self.places.values()}.values():
            if entry.key.endswith(f".mlp.experts.experts.{part}.weight") and entry.layout == CONCAT:
                named = re.search(r"\.layers\.(\d+)\.", entry.key)
                if (int(named[1]) if named else entry.index[0]) == layer:
                    yield entry

    def _each_expert(
        self, entries: Iterable[Entry], a: TensorInfo, b: TensorInfo, rank: int, scale: float
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
                    transposed=False,
                    downcast_first=True,
                    expert=number,
                    experts=len(listed),
                    first_output=first,
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
        """UserError if the configuration targets a module without adapter tensors: no adapter is merged in part."""
        missing = []
        for name in self.places:
            module = name.removesuffix(".weight")
            targeted = any(map(self.config.targets, name_variants(module, self.prefix_variants)))
            if name.endswith(".weight") and targeted and len(self._shape(name)) == 2 and name not in deltas:
                missing.append(name)
        # transformers 5 holds experts as stacked parameters, out of reach of target_modules
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
