"""Directories of other programs: what they are taken for, what is ignored, what is refused."""

from __future__ import annotations

import json
from itertools import chain, combinations
from pathlib import Path

import pytest

from shared.checkpoint.directory.manifest import Kind, Manifest
from shared.checkpoint.directory.open import open_checkpoint
from shared.checkpoint.directory.recognition import TRACKER, recognize
from shared.checkpoint.formats.hugging_face import choose_weights
from shared.errors import UserError
from shared.foreign_formats import FORMATS

ALL: tuple[Kind, ...] = ("hf", "megatron", "te")
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def put(folder: Path, *names: str) -> Path:
    """A directory with files of these names; a name that ends in a slash is a folder."""
    for name in names:
        path = folder / name
        if name.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        weights = dict(zip("ab", SHARDS, strict=True)) if "safetensors" in name else {"a": "pytorch_model-1.bin"}
        path.write_text(json.dumps({"metadata": {}, "weight_map": weights}) if name.endswith(".index.json") else "{}")
    return folder


def reason(path: Path, kinds: tuple[Kind, ...] = ALL) -> str:
    with pytest.raises(UserError) as error:
        open_checkpoint(path, kinds=kinds, flag="--source")
    assert "\n" not in str(error.value)
    return str(error.value)


WEIGHTS = ("model.safetensors", "model.safetensors.index.json", *SHARDS, "pytorch_model.bin")


@pytest.mark.parametrize(
    "there",
    [set(names) for names in chain.from_iterable(combinations(WEIGHTS, size) for size in range(1, len(WEIGHTS) + 1))],
    ids=lambda there: " ".join(sorted(there)),
)
def test_the_weights_that_transformers_would_load(tmp_path: Path, there: set[str]) -> None:
    """The reference is transformers' own choice of files, over every combination of them."""
    modeling_utils = pytest.importorskip("transformers.modeling_utils")
    folder = put(tmp_path / "m", "config.json", *there)
    try:
        files, _ = modeling_utils._get_resolved_checkpoint_files(
            str(folder), None, None, None, None, False, download_kwargs={"local_files_only": True}
        )
        theirs = tuple(sorted(Path(file).name for file in files))
        broken = next((name for name in theirs if name not in there), None)
    except OSError:  # no file that it knows, or a shard is missing
        theirs, broken = (), "no weights"
    if not broken and (set(SHARDS) & there) and "model.safetensors" not in there and set(theirs).isdisjoint(SHARDS):
        broken = "shards without an index"  # stricter: it would read pytorch_model.bin beside them
    if broken:
        assert reason(folder)
        return
    chosen = choose_weights(folder, "--source")
    assert chosen.files == theirs
    found = recognize(folder, kinds=ALL, flag="--source", per_rank=None)
    assert {*found.ignored} == there - {*theirs, chosen.index}


def test_shards_of_another_save_are_ignored_and_those_of_this_one_must_be_in_the_index(tmp_path: Path) -> None:
    folder = put(
        tmp_path / "m", "config.json", "model.safetensors.index.json", *SHARDS, "model-00003-of-00003.safetensors"
    )
    found = recognize(folder, kinds=ALL, flag="--source", per_rank=None)
    assert (found.weights, found.ignored) == (SHARDS, ("model-00003-of-00003.safetensors",))
    put(folder, "model-00003-of-00002.safetensors")
    assert "its tensors would be lost" in reason(folder)


def test_a_stale_index_names_the_whole_file_that_could_be_read(tmp_path: Path) -> None:
    folder = put(tmp_path / "m", "config.json", "model.safetensors.index.json", "pytorch_model.bin")
    assert "or remove model.safetensors.index.json to read pytorch_model.bin" in reason(folder)


TRAINERS = {
    "iter_0000100/": {TRACKER: "100", "iter_0000100/.metadata": "x", "iter_0000100/__0_0.distcp": "x"},
    "global_step9/": {"latest": "global_step9", "global_step9/mp_rank_00_model_states.pt": "x", "zero_to_fp32.py": "x"},
    "300/": {"latest": "300", "300/mp_rank_00_model_states.pt": "x"},
    "checkpoint-5/": {"checkpoint-5/config.json": "{}", "checkpoint-5/model.safetensors": "x"},
    "pytorch_model_fsdp_0/": {"pytorch_model_fsdp_0/.metadata": "x", "pytorch_model_fsdp_0/__0_0.distcp": "x"},
    "original/": {"original/consolidated.00.pth": "x", "original/params.json": "{}"},
    "model.gguf": {"model.gguf": "x"},
    "tf_model.h5": {"tf_model.h5": "x"},
    "flax_model.msgpack": {"flax_model.msgpack": "x"},
    "onnx/": {"onnx/model.onnx": "x"},
    "consolidated.safetensors": {"consolidated.safetensors": "x", "params.json": "{}"},
    "adapter/": {"adapter/adapter_model.safetensors": "x"},
    "model.fp16.safetensors": {"model.fp16.safetensors": "x"},
    "training_args.bin": {"training_args.bin": "x"},
}


@pytest.mark.parametrize("ignored", TRAINERS)
@pytest.mark.parametrize(
    "weights", [("model.safetensors",), ("model.safetensors.index.json", *SHARDS), ("pytorch_model.bin",)]
)
def test_what_stands_beside_the_weights_changes_nothing_and_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ignored: str, weights: tuple[str, ...]
) -> None:
    folder = put(tmp_path / "m", "config.json", *weights)
    for name, text in TRAINERS[ignored].items():
        put(folder, name)
        (folder / name).write_text(text)
    checkpoint = open_checkpoint(folder, kinds=ALL, flag="--source", per_rank="hf")
    assert (checkpoint.kind, checkpoint.ignored, checkpoint.rank_files) == ("hf", (ignored,), ())
    assert capsys.readouterr().err.endswith(f"; ignored: {ignored}\n")


def test_a_megatron_checkpoint_beside_them_is_read_where_only_that_is_wanted(tmp_path: Path) -> None:
    folder = put(tmp_path / "m", "config.json", "model.safetensors", "iter_0000100/.metadata")
    (folder / TRACKER).write_text("100")
    assert open_checkpoint(folder, kinds=("megatron",), flag="--source").iteration_path == folder / "iter_0000100"


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.title)
@pytest.mark.parametrize("beside", [(), ("config.json",), ("config.json", "tokenizer.json"), ("tokenizer.json",)])
def test_every_format_that_is_not_read_is_named_with_the_fix(
    tmp_path: Path, kind: object, beside: tuple[str, ...]
) -> None:
    for number, pattern in enumerate(kind.names):  # type: ignore[attr-defined]
        name = pattern.replace("*", "1")
        said = reason(put(tmp_path / str(number), name, *beside))
        assert f"holds {name}: {kind.title}, which is not read; {kind.fix}" in said  # type: ignore[attr-defined]
        if "tokenizer.json" in beside:  # its tokenizer can be used
            assert open_checkpoint(tmp_path / str(number), kinds=("tokenizer", "hf", "megatron"), flag="--tokenizer")


def test_the_cache_of_the_hub(tmp_path: Path) -> None:
    model = put(tmp_path / "hub", "models--a--b/snapshots/123/config.json", "models--a--b/blobs/") / "models--a--b"
    put(model, "snapshots/456/", "refs/main")
    (model / "refs/main").write_text("123")
    assert reason(model).endswith(
        f"is a model's folder in the Hugging Face cache; give its snapshot, {model}/snapshots/123"
    )
    assert reason(tmp_path / "hub").endswith(f"give the snapshot of one model, as {model}/snapshots/123")
    assert reason(model / "snapshots").endswith(f"holds no checkpoint itself; give {model}/snapshots/123")


@pytest.mark.parametrize("content", [(".metadata", "common.pt", "__0_0.distcp"), ("mp_rank_00/model_optim_rng.pt",)])
def test_an_iteration_instead_of_its_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: tuple[str, ...]
) -> None:
    run = put(tmp_path / "run", *(f"iter_0000200/{name}" for name in content))
    fix = "is one iteration of a Megatron checkpoint; give the directory above it, "
    assert reason(run / "iter_0000200").endswith(f"{fix}{run}, with 200 in {run / TRACKER}")
    (run / TRACKER).write_text("200")
    assert reason(run / "iter_0000200").endswith(f"{fix}{run}")
    monkeypatch.chdir(run)  # paths are printed as they were typed
    assert reason(Path("iter_0000200")) == f"--source iter_0000200 {fix}."


def test_a_published_iteration_instead_of_its_run(tmp_path: Path) -> None:
    """Each iteration of a run has a manifest of its own, whose files are named from the run's directory."""
    folder = put(tmp_path / "run", "iter_0000200/") / "iter_0000200"
    manifest = Manifest(
        kind="megatron", iteration=200, tool="sft", version="0", command="train", options={}, identity="x", revision=None,
        image=None, parents=[], created="x", facts={}, bytes=0, files={},
    )  # fmt: skip
    (folder / "manifest.json").write_text(manifest.encode())
    assert f"give the directory above it, {tmp_path / 'run'} (with --iteration 200 for `convert to-hf`" in reason(
        folder
    )


def test_checkpoints_one_level_below(tmp_path: Path) -> None:
    put(tmp_path, "checkpoint-90/config.json", "checkpoint-100/config.json", "runs/")
    assert reason(tmp_path).endswith(f"holds no checkpoint itself; give {tmp_path}/checkpoint-100 (or another of 2)")


def test_an_empty_directory_and_one_of_nothing_known(tmp_path: Path) -> None:
    assert reason(tmp_path).endswith("is empty; fetch the checkpoint again")
    put(tmp_path, "notes.txt")
    assert "holds no checkpoint: neither" in reason(tmp_path)


def test_a_kind_that_is_not_wanted_names_the_command_that_makes_the_other(tmp_path: Path) -> None:
    folder = put(tmp_path / "m", "config.json", "model.safetensors")
    assert reason(folder, ("megatron",)).endswith(
        f"is a hf directory; wanted: megatron; `convert to-megatron --source {folder} --target DIR` makes one of it"
    )
