"""`convert verify` of a run with LoRA: its adapters beside the PEFT directory that `to-hf --base` made of them."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.checkpoint.directory.adapter_directory import CONFIG, FACT, WEIGHTS, base_state, is_base
from shared.checkpoint.directory.auxiliary_files import read_config
from shared.checkpoint.directory.manifest import input_fingerprint, misfit, read_manifest
from shared.checkpoint.directory.open import Checkpoint, open_checkpoint, verify_content
from shared.checkpoint.formats.safetensors_file import read_header
from shared.checkpoint.lora.peft_files import TOKENIZER_FILES, adapter_config
from shared.cli import log
from shared.errors import UserError
from shared.families import registry
from shared.invocation import invocation, invoked
from tools.convert.to_peft import adapter_tensors, settings_of, table_of

if TYPE_CHECKING:
    from tools.convert.verify import Findings

_NOT_COMPARED = ("peft_version",)
_UNORDERED = ("target_modules", "target_parameters")


def holds_adapters(target: Path) -> bool:
    """Whether a directory is a run with LoRA."""
    manifest = read_manifest(target, flag="--target")
    return manifest is not None and manifest.kind == "megatron" and FACT in manifest.facts


def compare_adapter(
    source: Path, target: Path, findings: Findings, *, logits: bool, positions: int, seed: int, remote: bool
) -> None:
    """Compare a PEFT directory with the iteration of the run that it was published from, else with the newest.

    Logits are of the Megatron-Core base with adapters, and of transformers with `W + scale * B @ A`, in fp32.

    Args:
        source: the PEFT directory.
        target: the run.
        findings: filled in.
        logits: compare them, too.
        positions: tokens of the sequence.
        seed: of its tokens.
        remote: run the base's own modelling code.

    Raises:
        UserError: the source is no such directory, or a base is missing or has changed.
    """
    for name in (CONFIG, WEIGHTS):
        if not (source / name).is_file():
            raise UserError(
                f"--source {source} has no {name}; --target {target} holds LoRA adapters: give what `convert to-hf --base` made "
                "of it"
            )
    manifest = read_manifest(source, flag="--source")
    if manifest and (found := misfit(source, manifest.files)):
        raise UserError(f"--source {found}, though its manifest lists it; publish the adapter again")
    verify_content(Checkpoint(path=source, kind="adapter", manifest=manifest), flag="--source")
    published = (manifest.facts.get("iteration") if manifest else None) or ""
    number = int(published.removeprefix("iter_")) if published.startswith("iter_") else None
    run = open_checkpoint(target, kinds=("megatron",), flag="--target", iteration=number, adapters=True)
    stored = read_config(source / CONFIG)
    _compare_config(run, stored, findings)
    _compare_tensors(run, source, findings)
    for name in TOKENIZER_FILES:
        ours, theirs = run.hf_files / name, source / name
        findings.files += ours.is_file() or theirs.is_file()
        if ours.is_file() != theirs.is_file() or (ours.is_file() and ours.read_bytes() != theirs.read_bytes()):
            findings.differences.append(f"{name} differs")
    base = (source / stored["base_model_name_or_path"]).resolve()
    if not is_base_of(run, base):
        log(f"base        {base}: that it is the run's base, no manifest says")
    if logits and not findings.differences:
        findings.logits = _logits(run, source, positions, seed, remote=remote)
        if not findings.logits["passed"]:
            findings.differences.append(
                f"logits differ by {findings.logits['max_difference']:.3g}, more than {findings.logits['tolerance']:.3g}"
            )


def is_base_of(run: Checkpoint, base: Path) -> bool:
    """Whether a Hugging Face directory is there and has the weights of the run's base."""
    return base.is_dir() and is_base(base, run.facts[FACT]["base"])


def _compare_config(run: Checkpoint, stored: dict[str, Any], findings: Findings) -> None:
    wanted = adapter_config(settings_of(run), table_of(run), stored["base_model_name_or_path"])
    for name in (name for name in wanted if name not in _NOT_COMPARED):
        findings.config_fields += 1
        ours, theirs = wanted[name], stored.get(name)
        if name in _UNORDERED and isinstance(ours, list) and isinstance(theirs, list):
            ours, theirs = sorted(ours), sorted(theirs)
        if ours != theirs:
            findings.differences.append(f"{CONFIG}: {name} is {theirs!r} instead of {ours!r}")


def _compare_tensors(run: Checkpoint, source: Path, findings: Findings) -> None:
    wanted, dtype = adapter_tensors(run, settings_of(run), table_of(run))
    held = {tensor.name: tensor for tensor in read_header(source / WEIGHTS).tensors}
    for name in sorted(wanted.keys() | held.keys()):
        if name not in held or name not in wanted:
            findings.differences.append(f"{name} is {'lost' if name in wanted else 'added'}")
            continue
        tensor = held[name]
        findings.tensors += 1
        findings.bytes += tensor.size
        if (tensor.dtype, tensor.shape) != (dtype.safetensors, wanted[name].shape):
            findings.differences.append(f"{name} comes back as {tensor.dtype}{list(tensor.shape)}")
            continue
        with tensor.file.open("rb") as file:
            file.seek(tensor.start)
            if file.read(tensor.size) != wanted[name].tobytes():
                findings.differences.append(f"{name} differs")


def _logits(run: Checkpoint, source: Path, positions: int, seed: int, *, remote: bool) -> dict[str, Any]:
    """The base in fp32 by `to-hf`, merged by `merge-lora`, in transformers; beside the base and the adapters here."""
    from tools.convert import merge_lora, to_hf
    from tools.convert.verify_logits import compare_logits

    said = run.facts[FACT]["base"]
    place = Path(os.path.normpath(run.path.resolve() / said["path"]))
    if not place.is_dir() or input_fingerprint(place) != said["fingerprint"]:
        raise UserError(
            f"--target {run.path}: its base is {base_state(run.path, said)}; restore it, or give --no-logits"
        )
    base = open_checkpoint(place, kinds=("megatron",), flag="--target", verify="sizes", iteration=said["iteration"])
    version = invocation().version
    with tempfile.TemporaryDirectory(prefix="verify-") as folder:
        whole, merged = Path(folder) / "base", Path(folder) / "merged"
        with contextlib.redirect_stderr(io.StringIO()):
            with invoked("convert", "to-hf", {}, version=version):
                to_hf.run(place, whole, "fp32", None, None, (), False, None, None, iteration=said["iteration"])
            with invoked("convert", "merge-lora", {}, version=version):
                merge_lora.run(whole, source, merged, (), False, None)
        architecture = registry.from_files(merged)
        adapters = settings_of(run), run.iteration_path
        return compare_logits(architecture, merged, base.iteration_path, positions, seed, remote, adapters=adapters)
