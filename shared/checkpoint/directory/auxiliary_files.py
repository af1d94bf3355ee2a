"""Auxiliary files: everything in a model directory but its weights (config.json, tokenizer, chat template, ...)."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from shared.checkpoint.directory.manifest import CARD, MANIFEST
from shared.checkpoint.files import check_not_stand_in, files_below
from shared.console import log
from shared.errors import UserError

# Weight files of any format, and their indexes: never auxiliary.
WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".distcp", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".npz"),
    *(".onnx_data", ".ot", ".mlmodel", ".nemo"),
)
_INDEX_SUFFIXES = (".index.json",)
_BATON_FILES = {MANIFEST, "weights.json", "asides.safetensors"}  # valid for one directory only: never copied
_TRACKER_FOLDERS = ("tensorboard/", "wandb/", "mlruns/", "trackio/")
_RUN_FILES = (
    "metrics.jsonl",
    "replies.jsonl",
    "report.html",
    "run.json",
    "state/",
    "runs/",
    *_TRACKER_FOLDERS,
)  # of a training run
_DOWNLOAD_FOLDERS = {".git", ".cache"}  # of git and huggingface_hub
# Checkpoints of a trainer beside the weights: Trainer's, DeepSpeed's and Megatron-LM's.
_TRAINER_FOLDER = re.compile(r"checkpoint-\d+|global_step\d+|iter_\d{7}")
_POINTERS = {"latest", "latest_checkpointed_iteration.txt"}  # name one of these folders


def auxiliary_files(directory: Path) -> Iterator[Path]:
    """Relative paths of the auxiliary files, sorted. In a published directory files of its manifest, and its model card."""
    if (directory / MANIFEST).is_file():
        names = [n for n in read_config(directory / MANIFEST)["files"] if not n.startswith(_RUN_FILES) and n != CARD]
        names += [CARD] * (directory / CARD).is_file()  # people add, edit and remove it
    else:
        names = [n for n in _relative_names(directory) if not _TRAINER_FOLDER.fullmatch(n.partition("/")[0])]
    for name in sorted(names):
        if (
            not name.endswith((*WEIGHT_SUFFIXES, *_INDEX_SUFFIXES))
            and name not in _BATON_FILES
            and not _is_latest_pointer(directory / name)
        ):
            yield Path(name)


def _is_latest_pointer(path: Path) -> bool:
    """Whether the file names a folder of weights: `latest` of DeepSpeed and SwissArmyTransformer, Megatron-LM's tracker."""
    if path.name not in _POINTERS:
        return False
    named = path.read_bytes()[:256].decode(errors="replace").strip()
    folder = f"iter_{named:0>7}" if named.isdigit() and path.name != "latest" else named
    return folder.isprintable() and bool(folder) and (path.parent / folder).is_dir()


def _relative_names(directory: Path) -> list[str]:
    return [path.relative_to(directory).as_posix() for path in files_below(directory, _DOWNLOAD_FOLDERS)]


def unread_weights(directory: Path, used: Collection[str]) -> list[str]:
    """What of a directory's weights is not read: files and indexes at its top, and folders, with a slash at the end.

    They are the same weights in another format, another model's, or a trainer's.
    """
    unread = set()
    for name in {*_relative_names(directory)} - {*used} - _BATON_FILES:
        folder, slash, _ = name.partition("/")
        if name.endswith((*WEIGHT_SUFFIXES, *_INDEX_SUFFIXES)) or (slash and _TRAINER_FOLDER.fullmatch(folder)):
            unread.add(f"{folder}{slash}")
    return sorted(unread)


def check_auxiliary_files(directory: Path, flag: str) -> None:
    """UserError if a file that would be copied is a git-lfs pointer or a server's error page."""
    for relative in auxiliary_files(directory):
        check_not_stand_in(directory / relative, flag)


def copy_auxiliary_files(source: Path, target: Path) -> None:
    """Copy the auxiliary files that are missing in the target; links are followed. UserError as `check_auxiliary_files`."""
    for relative in auxiliary_files(source):
        place = target / relative
        if not place.exists():
            check_not_stand_in(source / relative)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / relative, place)


def read_config(path: Path) -> dict[str, Any]:
    """A config.json as a dict; UserError if the file is missing or no JSON object."""
    if path.is_file():
        check_not_stand_in(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object; fetch it again")
    return content


def finish_hf_directory(directory: Path, source_files: Path) -> None:
    """Complete a directory of saved weights for transformers 4, transformers 5 and vLLM.

    Copies the source's auxiliary files where missing. config.json gets the fields of both transformers versions,
    tokenizer_config.json a tokenizer class known to both.

    Args:
        directory: the saved weights, and a config.json if it differs from the source's.
        source_files: the directory of the source's auxiliary files (`Checkpoint.hf_files`).
    """
    copy_auxiliary_files(source_files, directory)
    path = directory / "config.json"
    config = read_config(path)
    both = for_transformers_4_and_5(config)
    if both != config:
        path.write_text(json.dumps(both, indent=2) + "\n", encoding="utf-8")
    tokenizer = directory / "tokenizer_config.json"
    if tokenizer.is_file():
        settings = read_config(tokenizer)
        if settings.get("tokenizer_class") == "TokenizersBackend":  # transformers 5's name, unknown to 4
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
            tokenizer.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            log(f"{tokenizer.name}: tokenizer_class set to PreTrainedTokenizerFast for transformers 4 and 5")


def for_transformers_4_and_5(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json with the RoPE and dtype fields of both transformers 4 and 5. A null field counts as absent."""
    result = dict(config)
    new = result.get("rope_parameters")
    if isinstance(new, dict) and new.get("rope_theta") is not None:
        _fill(result, "rope_theta", new["rope_theta"])
        scaling = {name: value for name, value in new.items() if name != "rope_theta"}
        _fill(result, "rope_scaling", None if scaling.get("rope_type", "default") == "default" else scaling)
    elif not new and result.get("rope_theta") is not None:
        scaling = dict(result.setdefault("rope_scaling", None) or {})
        kind = scaling.pop("type", "default")
        result["rope_parameters"] = {"rope_theta": result["rope_theta"], "rope_type": kind, **scaling}
    if result.get("dtype") is not None:
        _fill(result, "torch_dtype", result["dtype"])
    elif "dtype" in result and result.get("torch_dtype") is not None:
        result["dtype"] = result["torch_dtype"]
    return result


def _fill(config: dict[str, Any], name: str, value: Any) -> None:
    if config.get(name) is None:
        config[name] = value
