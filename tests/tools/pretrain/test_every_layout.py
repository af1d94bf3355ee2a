"""`pretrain train` refuses an unsupported layout at once and writes nothing, for every family."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shared.checkpoint.directory.publish import publish
from shared.cli import invoked
from shared.errors import UserError
from shared.families import registry
from shared.parallel import ParallelConfig, ranks_needed
from shared.training import stage
from tools.pretrain.cli import tool

SIZES = {name: replace(size, mtp=None) for name, size in registry.sizes().items() if name.endswith("-tiny")}
LAYOUTS = [
    {"tensor": 2},
    {"tensor": 2, "sequence_parallel": True},
    {"tensor": 3},
    {"tensor": 8},
    {"pipeline": 2},
    {"pipeline": 3},
    {"pipeline": 2, "virtual_pipeline": 2},
    {"pipeline": 2, "pipeline_layers": (1, 1)},
    {"pipeline": 2, "pipeline_layers": (1, 2)},
    {"expert": 2},
    {"expert": 3},
    {"context": 2},
    {"context": 2, "context_exchange": "heads"},
    {"context": 4, "context_exchange": "heads"},
    {"tensor": 2, "sequence_parallel": True, "expert": 2, "expert_tensor": 1},
]
FLAGS = {"tensor": "--tensor-parallel", "pipeline": "--pipeline-parallel", "virtual_pipeline": "--virtual-pipeline"}
FLAGS |= {"pipeline_layers": "--pipeline-layers"}
FLAGS |= {"expert": "--expert-parallel", "expert_tensor": "--expert-tensor-parallel"}
FLAGS |= {"context": "--context-parallel", "context_exchange": "--context-parallel-exchange"}
SECONDS = 1.0
REPOSITORY = Path(__file__).parents[3]


SCRIPT = """
import sys
from tools.pretrain.cli import tool
try:
    tool.run(sys.argv[1:])
finally:
    print("torch" in sys.modules)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A dataset of which only the description is ever read."""
    target = tmp_path_factory.mktemp("data") / "data"
    with invoked("pretrain", "prepare", {}), publish(target, kind="dataset", inputs={}) as out:
        np.zeros(6000, np.uint16).tofile(out.path / "train.bin")
        (out.path / "tokenizer").mkdir()
        out.describe(format="indexed", splits={"train": {"tokens": 6000, "documents": 1}}, vocab_size=1)
    return target


@pytest.fixture
def source(tmp_path):
    """A function from a size to a Megatron directory without weights: a refusal reads none."""

    def make(size: str) -> Path:
        directory = tmp_path / size
        (directory / "release").mkdir(parents=True)
        (directory / "release" / ".metadata").touch()
        (directory / "hf").mkdir()
        (directory / "hf" / "config.json").write_text(json.dumps(registry.to_config(SIZES[size])))
        (directory / "latest_checkpointed_iteration.txt").write_text("release")
        return directory

    return make


def words(source: Path, data: Path, target: Path, layout: dict, **changes: int) -> list[str]:
    """The command line."""
    sizes = {"--sequence-length": 16, "--global-batch-size": 24, "--micro-batch-size": 1}
    sizes |= {f"--{name.replace('_', '-')}": size for name, size in changes.items()}
    sizes |= {FLAGS[name]: size for name, size in layout.items() if name in FLAGS}
    if layers := layout.get("pipeline_layers"):
        sizes["--pipeline-layers"] = ",".join(map(str, layers))
    sequence = ["--sequence-parallel"] if layout.get("sequence_parallel") else []
    paths = [f"--source={source}", f"--data={data}", f"--target={target}"]
    return ["train", *paths, *(f"{flag}={size}" for flag, size in sizes.items()), *sequence]


@pytest.mark.parametrize("size", SIZES)
def test_each_layout_is_trained_or_refused_with_nothing_written(size, source, data, tmp_path, capsys, monkeypatch):
    started = []
    monkeypatch.setattr(stage, "launch", lambda processes: started.append(processes) or 0)
    directory, target = source(size), tmp_path / "run"
    for layout in LAYOUTS:
        sizes = {"tensor": 1, "pipeline": 1, "context": 1, "expert": 1, "expert_tensor": None}
        sizes |= {name: size for name, size in layout.items() if name in sizes}
        parallel = ParallelConfig(processes=ranks_needed(**sizes), **layout)
        try:
            parallel.check_model(SIZES[size])
            expected = 0
        except UserError as error:
            expected, text = 2, str(error)
        with pytest.raises(SystemExit) as ended:
            tool.run(words(directory, data, target, layout))
        assert (ended.value.code or 0) == expected
        message = capsys.readouterr().err
        assert started == ([] if expected else [parallel.processes])
        assert expected == 0 or message == f"pretrain train: error: {text}\n"
        assert not target.exists()
        started.clear()


@pytest.mark.parametrize(
    ("size", "layout", "changes", "answer"),
    [
        ("qwen3-moe-tiny", {"tensor": 2}, {}, "give --sequence-parallel"),
        ("deepseek-v2-tiny", {"tensor": 2}, {}, "give --sequence-parallel"),
        ("qwen3-next-tiny", {"tensor": 2}, {}, "give --sequence-parallel"),
        ("yi-tiny", {"tensor": 8}, {}, "give --tensor-parallel 4"),
        ("yi-tiny", {"pipeline": 3}, {}, "give --pipeline-parallel 2"),
        ("yi-tiny", {"pipeline": 2, "pipeline_layers": (1, 2)}, {}, "give --pipeline-layers 1,1"),
        ("yi-tiny", {"pipeline": 2, "pipeline_layers": (1, 0)}, {}, "--pipeline-layers"),
        ("yi-tiny", {"expert": 2}, {}, "give --expert-parallel 1"),
        ("qwen3-moe-tiny", {"expert": 3}, {}, "give --expert-parallel 2"),
        ("yi-tiny", {"tensor": 2, "sequence_parallel": True}, {"sequence_length": 15}, "--sequence-length 16"),
        ("qwen3-next-tiny", {"context": 2}, {}, "give --context-parallel 1"),
        ("glm-10b-tiny", {"context": 2}, {}, "give --context-parallel 1"),
        ("yi-tiny", {"context_exchange": "heads"}, {}, "needs --context-parallel 2 or more"),
        ("yi-tiny", {"context": 4, "context_exchange": "heads"}, {}, "give --context-parallel-exchange gather"),
        ("yi-tiny", {"context": 2}, {"sequence_length": 18}, "--sequence-length 20"),
        ("yi-tiny", {}, {"processes": 2, "micro_batch_size": 9}, "give --global-batch-size 36"),
    ],
)
def test_the_answer_comes_before_torch(size, layout, changes, answer, source, data, tmp_path):
    """In a second of a processor's time, or in that of two and a half `--version` where the machine is slow or busy."""
    given = words(source(size), data, tmp_path / "run", layout, **changes)
    for _ in range(3):  # others may share the machine
        seconds, code, output, errors = measured(*given)
        assert (code, output) == (2, "False\n"), errors
        assert answer in errors
        assert errors.count("\n") == 1
        if seconds < SECONDS or seconds < 2.5 * measured("--version")[0]:
            break
    else:
        pytest.fail(f"{seconds:.2f} s")
    assert not (tmp_path / "run").exists()


def measured(*given: str) -> tuple[float, int, str, str]:
    """Processor seconds of `pretrain` from the start of Python, exit code, standard output and error."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "PYTHONDONTWRITEBYTECODE")}
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, *given], env=kept, cwd=REPOSITORY, stdout=output, stderr=errors
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        texts = [file.seek(0) or file.read() for file in (output, errors)]
    return usage.ru_utime + usage.ru_stime, process.returncode, *texts
