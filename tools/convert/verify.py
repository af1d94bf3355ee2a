"""`convert verify`: compare a Megatron or TransformerEngine directory with its Hugging Face source: bits and logits."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from shared.architecture import dictionary
from shared.checkpoint.directory.auxiliary_files import auxiliary_files, read_config
from shared.checkpoint.directory.manifest import input_fingerprint
from shared.checkpoint.directory.open import open_checkpoint
from shared.checkpoint.dtypes import count_not_finite, weight_dtype
from shared.checkpoint.files import write_atomically
from shared.checkpoint.formats.hugging_face import LAYOUT, HfReader
from shared.checkpoint.formats.transformer_engine_reader import LAYERS
from shared.cli import invocation, log, progress
from shared.errors import StageError, UserError
from shared.families import registry
from shared.mapping.transformer_engine import te_form
from shared.model.support import check_supported
from tools.convert.hf_source import open_hf_source
from tools.convert.plan_export import ExportPlan, changed_constant, exported_rows, rows_to_quantize
from tools.convert.planning import MegatronReader
from tools.convert.remote import remote_class
from tools.convert.to_hf import open_export
from tools.convert.verify_adapter import compare_adapter, holds_adapters

MAX_DIFFERENCES = 20  # logged at most
LOGITS_NEED = {"torch": "torch", "transformers": "transformers", "megatron.core": "megatron-core"}


@dataclass(kw_only=True)
class Findings:
    """Counts of the comparison, and the differences."""

    tensors: int = 0
    bytes: int = 0
    not_finite: dict[str, str] = field(default_factory=dict)  # tensor -> counts of NaN and infinity
    config_fields: int = 0
    files: int = 0
    logits: dict[str, Any] | None = None
    differences: list[str] = field(default_factory=list)


def run(
    source: Path,
    target: Path,
    certificate: Path | None,
    logits: bool,
    positions: int,
    seed: int,
    trust_remote_code: bool,
    hf_files: Path | None = None,
) -> None:
    """Compare and write the certificate. StageError if anything differs."""
    if logits and (target / LAYERS).is_file():
        log("logits: not compared, TransformerEngine's modules need a GPU; bits, config.json and files are compared")
        logits = False
    if logits:
        _require_models()
    started = time.monotonic()
    certificate = certificate or target.with_name(f"{target.name}.certificate.json")
    for name, directory in (("--source", source), ("--target", target)):
        if certificate.resolve().is_relative_to(directory.resolve()):
            raise UserError(
                f"--certificate {certificate} is inside {name} {directory}, a published directory; choose a path outside"
            )
    if certificate.is_dir():
        raise UserError(f"--certificate {certificate} is a directory; name a file")
    findings = Findings()
    if holds_adapters(target):
        if hf_files is not None:
            raise UserError(f"--hf-files belongs to models, and --target {target} holds LoRA adapters; leave it out")
        compare_adapter(
            source, target, findings, logits=logits, positions=positions, seed=seed, remote=trust_remote_code
        )
    else:
        _compare_model(
            source,
            target,
            findings,
            logits=logits,
            positions=positions,
            seed=seed,
            trust_remote_code=trust_remote_code,
            hf_files=hf_files,
        )
    seconds = time.monotonic() - started
    content = {
        "passed": not findings.differences,
        "tool": f"{invocation().tool} {invocation().version}",
        "source": {"name": source.resolve().name, "fingerprint": input_fingerprint(source)},
        "target": {"name": target.resolve().name, "fingerprint": input_fingerprint(target)},
        **asdict(findings),
        "seconds": round(seconds, 1),
    }
    certificate.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(certificate, (json.dumps(content, indent=1) + "\n").encode())
    for difference in findings.differences[:MAX_DIFFERENCES]:
        log(f"different: {difference}")
    if findings.not_finite:
        log(f"not finite on both sides: {', '.join(findings.not_finite)}")
    if findings.differences:
        raise StageError(
            f"{target} differs from {source}: {findings.differences[0]} ({len(findings.differences)} in all; {certificate})"
        )
    print(_summary(findings, certificate))


def _compare_model(
    source: Path,
    target: Path,
    findings: Findings,
    *,
    logits: bool,
    positions: int,
    seed: int,
    trust_remote_code: bool,
    hf_files: Path | None,
) -> None:
    """Compare a model with its Hugging Face source."""
    made = open_checkpoint(target, kinds=("megatron", "te"), flag="--target")
    prefix = made.facts.get("stripped_prefix")
    _, reader = open_hf_source(source, hf_files, verify="content", strip_prefix=prefix)
    if logits:
        _require_class(reader, source, trust_remote_code)
    _compare_config(reader.config, read_config(made.hf_files / "config.json"), findings)
    if not findings.differences:  # a different config.json may imply other shapes
        quantized = any(weight.quantized for weight in reader.weights.values())
        held, plan = open_export(made, made.hf_files, None, quantized=quantized)
        if logits:
            check_supported(plan.architecture, fix="give --no-logits to compare the tensors alone")
        _compare_layout(reader, plan, made.hf_files / LAYOUT, findings)
        with progress(reader.bytes, "bytes", "comparing") as advance:
            exported = plan.layout.tensors()
            for name in (name for name in reader.tensors if name in exported):
                _compare_tensor(name, reader, held, plan, findings)
                advance(reader.tensors[name].size)
            if quantized:
                _compare_numbers(reader, held, plan, findings)
        _check_added(held, plan, findings)
        if made.kind == "te":
            _check_layers(made.path / LAYERS, plan, findings)
        _compare_files(reader, made.hf_files, findings)
        if logits and not findings.differences:
            from tools.convert.verify_logits import compare_logits

            found = compare_logits(plan.architecture, source, made.iteration_path, positions, seed, trust_remote_code)
            findings.logits = found
            if not found["passed"]:
                findings.differences.append(
                    f"logits differ by {found['max_difference']:.3g}, more than {found['tolerance']:.3g}"
                )


def _require_models() -> None:
    """UserError if torch, transformers or megatron-core is not installed."""
    absent = [name for module, name in LOGITS_NEED.items() if not _importable(module)]
    if absent:
        raise UserError(
            f"logits need {', '.join(absent)}, not installed here: give --no-logits, or install the extra `logits` "
            "(pip install 'baton-convert[logits]', image convert:logits)"
        )


def _require_class(reader: HfReader, source: Path, trust_remote_code: bool) -> None:
    """UserError if no class can compute the logits: neither transformers nor modelling code with --trust-remote-code."""
    config, family = reader.config, registry.family_of(reader.config)
    if (trust_remote_code or family.remote) and config.get("quantization_config") is not None:
        raise UserError("logits of quantised models need a class of transformers: give --no-logits")
    if trust_remote_code:
        if not remote_class(config):
            raise UserError(f"--trust-remote-code: {source / 'config.json'} has no auto_map, so no modelling code")
    elif family.remote:
        raise UserError(
            f"transformers has no {family.hf_class} to compare logits with: give --no-logits, or --trust-remote-code to run "
            f"the modelling code in {source}"
        )


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is absent
        return False


def _summary(findings: Findings, certificate: Path) -> str:
    parts = [
        f"{findings.tensors} tensors ({findings.bytes} bytes), {findings.config_fields} config fields and "
        f"{findings.files} files come back bit for bit"
    ]
    if findings.logits:
        parts.append(
            f"logits over {findings.logits['positions']} positions differ by at most "
            f"{findings.logits['max_difference']:.2g} (allowed {findings.logits['tolerance']:.2g})"
        )
    return f"verified: {'; '.join(parts)}; {certificate}"


def _compare_config(source: dict[str, Any], kept: dict[str, Any], findings: Findings) -> None:
    for name in sorted(source.keys() | kept.keys()):
        findings.config_fields += 1
        if name not in kept:
            findings.differences.append(f"config.json: {name} is lost")
        elif name not in source:
            findings.differences.append(f"config.json: {name} is added")
        elif source[name] != kept[name]:
            findings.differences.append(f"config.json: {name} is {kept[name]!r} instead of {source[name]!r}")


def _compare_layout(reader: HfReader, plan: ExportPlan, path: Path, findings: Findings) -> None:
    """Compare the shards: tensors, dtypes, files and order."""
    wanted, found = reader.tensors, plan.layout.tensors()
    for name in sorted(wanted.keys() - found.keys()):
        findings.differences.append(f"{name} is lost")
    for name in sorted(found.keys() - wanted.keys()):
        findings.differences.append(f"{name} is added")
    if findings.differences:
        return
    if not path.is_file():
        log(f"{path} is missing: tensors are compared, shards are not")
        return
    if [(shard.file, shard.header.text) for shard in reader.layout.shards] != [
        (shard.file, shard.header.text) for shard in plan.layout.shards
    ] or reader.layout.index != plan.layout.index:
        findings.differences.append(f"{path}: the shards differ from the source's")


def _compare_tensor(name: str, reader: HfReader, held: MegatronReader, plan: ExportPlan, findings: Findings) -> None:
    tensor, exported = reader.tensors[name], plan.layout.tensors()[name]
    findings.tensors += 1
    findings.bytes += tensor.size
    if (tensor.dtype, tensor.shape) != (exported.dtype, exported.shape):
        findings.differences.append(f"{name} comes back as {exported.dtype}{list(exported.shape)}")
        return
    weight = name in plan.origin and name not in plan.components
    dtype = weight_dtype(tensor.dtype, name, tensor.place) if weight else None
    position, nan, infinite, different = 0, 0, 0, False
    for ours, theirs in _aligned(reader.rows(name), exported_rows(plan, held, exported)):
        if dtype is not None:
            counts = count_not_finite(ours, dtype)
            nan, infinite = nan + counts[0], infinite + counts[1]
        if not different and ours != theirs:
            first = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
            findings.differences.append(f"{name} differs from byte {position + first} on")
            different = True
        position += len(ours)
    if nan or infinite:
        findings.not_finite[name] = f"{nan} NaN, {infinite} infinite"


def _compare_numbers(reader: HfReader, held: MegatronReader, plan: ExportPlan, findings: Findings) -> None:
    """Compare the source's dequantised weights with the target's, bit for bit."""
    for name in (name for name, weight in reader.weights.items() if weight.quantized and name in plan.origin):
        dtype, nan, infinite, same = (
            weight_dtype(reader.weights[name].dtype, name, reader.weights[name].place),
            0,
            0,
            True,
        )
        for ours, theirs in _aligned(reader.values(name), rows_to_quantize(plan, held, name)):
            counts = count_not_finite(ours, dtype)
            nan, infinite, same = nan + counts[0], infinite + counts[1], same and ours == theirs
        if not same:
            findings.differences.append(f"{name}: the dequantised values differ")
        if nan or infinite:
            findings.not_finite[name] = f"{nan} NaN, {infinite} infinite"


def _aligned(left: Iterator[memoryview], right: Iterator[memoryview]) -> Iterator[tuple[memoryview, memoryview]]:
    """Split two byte streams into pieces of equal size."""
    a = b = memoryview(b"")
    while True:
        a = a if len(a) else next(left, memoryview(b""))
        b = b if len(b) else next(right, memoryview(b""))
        size = min(len(a), len(b))
        if size == 0:
            assert len(a) == len(b) == 0, "streams of different sizes"
            return
        yield a[:size], b[:size]
        a, b = a[size:], b[size:]


def _check_added(held: MegatronReader, plan: ExportPlan, findings: Findings) -> None:
    """Check the additions of to-megatron: vocabulary padding, and constants for absent biases and norms."""
    for entry in plan.constants:
        if what := changed_constant(held, entry):
            findings.differences.append(f"{what}, but the model has no such parameter")
    for entry in {entry.key: entry for parts in plan.origin.values() for entry, _ in parts if entry.padded}.values():
        kept = entry.sources[0].shape[0]
        rows = held.tensors[entry.key].shape[0] - kept
        if rows and any(any(block) for block in held.rows(entry.key, entry.index, kept, rows)):
            findings.differences.append(f"{entry.key}: vocabulary padding is not zero")


def _check_layers(path: Path, plan: ExportPlan, findings: Findings) -> None:
    """Compare layers.json with the model: the architecture in any dictionary version, the layers without their reasons."""

    def comparable(described: dict[str, Any]) -> dict[str, Any]:
        layers = [{name: value for name, value in layer.items() if name != "because"} for layer in described["layers"]]
        return described | {"architecture": dictionary.read(described["architecture"]), "layers": layers}

    form = te_form(registry.table_of(plan.architecture), plan.architecture)
    try:
        same = comparable(read_config(path)) == comparable(json.loads(json.dumps(form.modules)))
    except (AttributeError, KeyError, UserError):
        same = False
    if not same:
        findings.differences.append(f"{path.name} does not describe this model")


def _compare_files(reader: HfReader, kept: Path, findings: Findings) -> None:
    ours = {
        relative: place / relative
        for place in reversed(reader.auxiliary_directories)
        for relative in auxiliary_files(place)
    }
    theirs = set(auxiliary_files(kept))
    if not (reader.path / "config.json").is_file():
        theirs.discard(Path("config.json"))  # derived from the source; its fields were compared
        ours.pop(Path("config.json"), None)
    for relative in sorted(ours.keys() | theirs):
        findings.files += 1
        if relative not in theirs:
            findings.differences.append(f"{relative} is lost")
        elif relative not in ours:
            findings.differences.append(f"{relative} is added")
        elif not _same(ours[relative], kept / relative):
            findings.differences.append(f"{relative} differs")


def _same(left: Path, right: Path) -> bool:
    if left.stat().st_size != right.stat().st_size:
        return False
    with left.open("rb") as a, right.open("rb") as b:
        pieces = zip_longest(iter(lambda: a.read(1 << 20), b""), iter(lambda: b.read(1 << 20), b""))
        return all(x == y for x, y in pieces)
