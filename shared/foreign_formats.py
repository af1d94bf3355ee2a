"""Names of files and folders of other programs, and how to get a directory that Baton reads from them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_URL = re.compile(r"https?:/+(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)")
_URL = re.compile(r"\w{2,}:/+")  # pathlib joins the slashes of ://
_FETCH = "`hf download {} --local-dir DIR` fetches it, then give DIR"


@dataclass(frozen=True, kw_only=True)
class ForeignFormat:
    """A format that no tool reads."""

    title: str  # what it is, as in "is ..."
    names: tuple[str, ...]  # patterns: of a file, or of an entry of its directory
    fix: str


_HF = "fetch the same model in safetensors with a config.json"
FORMATS = (
    ForeignFormat(title="GGUF, of llama.cpp", names=("*.gguf", "*.ggml", "ggml-model*"), fix=_HF),
    ForeignFormat(
        title="Meta's own format",
        names=("consolidated.*.pth", "consolidated.pth"),
        fix=f"{_HF}, or convert it with transformers' convert_llama_weights_to_hf.py",
    ),
    ForeignFormat(
        title="Mistral's own format", names=("consolidated*.safetensors",), fix=f"{_HF} (model*.safetensors beside it)"
    ),
    ForeignFormat(
        title="DeepSpeed, one file per rank",
        names=("global_step*", "zero_to_fp32.py", "*zero_pp_rank_*", "*mp_rank_*_model_states.pt"),
        fix="join the ranks with the zero_to_fp32.py that DeepSpeed wrote there: "
        "`python zero_to_fp32.py . DIR --safe_serialization`, and give DIR with config.json and tokenizer",
    ),
    ForeignFormat(
        title="verl's FSDP, one file per rank",
        names=("model_world_size_*_rank_*.pt",),
        fix="join the ranks with `python -m verl.model_merger merge --backend fsdp`",
    ),
    ForeignFormat(
        title="PyTorch FSDP, one file per rank",
        names=("pytorch_model_fsdp*", "__*_*.distcp"),
        fix="join the ranks with `accelerate merge-weights`, and give its output with config.json and tokenizer",
    ),
    ForeignFormat(title="NeMo", names=("*.nemo",), fix="export it to Hugging Face with NeMo"),
    ForeignFormat(title="PyTorch Lightning", names=("*.ckpt",), fix="save the model in it with save_pretrained"),
    ForeignFormat(title="Orbax, of JAX", names=("_CHECKPOINT_METADATA", "_METADATA"), fix=_HF),
    ForeignFormat(title="Flax", names=("flax_model*.msgpack",), fix=_HF),
    ForeignFormat(title="TensorFlow", names=("tf_model*.h5", "*.ckpt.index"), fix=_HF),
    ForeignFormat(title="ONNX", names=("*.onnx", "*.onnx_data"), fix=_HF),
    ForeignFormat(title="OpenVINO", names=("openvino_model*",), fix=_HF),
    ForeignFormat(title="Core ML", names=("*.mlpackage", "*.mlmodel"), fix=_HF),
    ForeignFormat(title="rust-bert", names=("*.ot",), fix=_HF),
    ForeignFormat(title="TensorRT-LLM", names=("*.engine", "rank*.safetensors"), fix=_HF),
    ForeignFormat(title="MLX", names=("weights*.npz",), fix=_HF),
    ForeignFormat(title="a pipeline of diffusers", names=("model_index.json",), fix="give a language model"),
    ForeignFormat(title="an archive", names=("*.zip", "*.tar", "*.tar.*", "*.tgz"), fix="unpack it"),
)


def foreign_format(names: Iterable[str]) -> tuple[ForeignFormat, str] | None:
    """The format of a file or of a directory's entries, and the first name that shows it."""
    names = sorted(names)
    for kind in FORMATS:
        for name in names:
            if any(fnmatchcase(name, pattern) for pattern in kind.names):
                return kind, name
    return None


def absent(path: Path) -> str:
    """What is wrong with a path that does not exist, with the fix: a URL, a hub id, or a wrong path."""
    text = str(path)
    if found := _HUB_URL.match(text):
        return f"is a URL; {_FETCH.format(found[1])}"
    if _URL.match(text):
        return "is a URL; download it, and give its directory"
    if _HUB_ID.fullmatch(text) and not path.parent.exists():
        return f"does not exist; if it is a model on the Hugging Face hub, {_FETCH.format(text)}"
    return "does not exist"


def not_a_directory(path: Path) -> str:
    """What a file is that was given for a directory, with the fix."""
    if found := foreign_format([path.name]):
        return f"is a file in a format that is not read ({found[0].title}); {found[0].fix}"
    return f"is a file, a directory is required; give the one that holds it, {path.parent}"


def indexed_prefix(path: Path) -> Path | None:
    """The prefix of a Megatron pair `PREFIX.bin` and `PREFIX.idx`, named by the prefix or by either file; None without one."""
    for prefix in (path, path.with_suffix("")) if path.suffix in (".bin", ".idx") else (path,):
        if any(Path(f"{prefix}{suffix}").is_file() for suffix in (".bin", ".idx")):
            return prefix
    return None
