"""How --tasks is resolved: files, directories, names, and paths relative to the task's file."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.errors import UserError
from tools.infer.tasks import choose

TASK = """
task: held_out
dataset_path: json
dataset_kwargs: {data_files: DATA}
output_type: loglikelihood_rolling
test_split: train
doc_to_text: ""
doc_to_target: "{{text}}"
process_results: !function metrics.nothing
include: _base.yaml
"""


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "data/b.jsonl").write_text('{"text": "b"}\n')
    (tmp_path / "_base.yaml").write_text("metric_list: [{metric: bits_per_byte}]\n")
    (tmp_path / "metrics.py").write_text("def nothing(doc, results):\n    return {}\n")
    return tmp_path


def task(directory: Path, data: str, name: str = "task.yaml") -> Path:
    path = directory / name
    path.write_text(TASK.replace("DATA", data))
    return path


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        ("data/a.jsonl", "{0}/data/a.jsonl"),
        ("[data/a.jsonl, data/b.jsonl]", ["{0}/data/a.jsonl", "{0}/data/b.jsonl"]),
        ("{test: data/*.jsonl}", {"test": "{0}/data/*.jsonl"}),
    ],
)
def test_paths_are_relative_to_the_task(directory, tmp_path, monkeypatch, data, wanted):
    path = task(directory, data)
    monkeypatch.chdir("/")
    chosen = choose([str(path)], tmp_path / "cache")

    def placed(value):
        if isinstance(value, dict):
            return {key: placed(item) for key, item in value.items()}
        return [placed(item) for item in value] if isinstance(value, list) else value.format(directory.resolve())

    assert chosen.specs[0]["dataset_kwargs"]["data_files"] == placed(wanted)
    assert chosen.specs[0]["metric_list"] == [{"metric": "bits_per_byte"}]


def test_every_file_that_determines_the_result_is_listed(directory, tmp_path):
    chosen = choose([str(task(directory, "data/*.jsonl"))], tmp_path / "cache")
    names = {file.resolve().relative_to(directory.resolve()).as_posix() for file in chosen.files}
    assert names == {"task.yaml", "_base.yaml", "metrics.py", "data/a.jsonl", "data/b.jsonl"}


def test_a_directory_gives_its_tasks_and_not_their_parts(directory, tmp_path):
    task(directory, "data/a.jsonl")
    chosen = choose([str(directory)], tmp_path / "cache")
    assert [spec["task"] for spec in chosen.specs] == ["held_out"]


@pytest.mark.parametrize(
    ("data", "message"),
    [("data/none.jsonl", "data/none.jsonl does not exist"), ("[", "task.yaml: ")],
)
def test_a_missing_data_file_and_broken_yaml_are_named(directory, tmp_path, data, message):
    with pytest.raises(UserError, match="--tasks .*task.yaml") as caught:
        choose([str(task(directory, data))], tmp_path / "cache")
    assert message in str(caught.value)


def test_an_absent_function_and_an_absent_file_are_named(directory, tmp_path):
    path = task(directory, "data/a.jsonl")
    path.write_text(path.read_text().replace("metrics.nothing", "metrics.something"))
    with pytest.raises(UserError, match="something"):
        choose([str(path)], tmp_path / "cache")
    with pytest.raises(UserError, match="none.yaml does not exist"):
        choose([str(directory / "none.yaml")], tmp_path / "cache")
    (directory / "empty").mkdir()
    with pytest.raises(UserError, match="holds no task"):
        choose([str(directory / "empty")], tmp_path / "cache")


def test_the_nearest_name_is_offered(tmp_path, monkeypatch):
    # The harness's index takes twenty seconds to read; a short one is enough for the message.
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(TaskManager, "task_index", {}, raising=True)
    monkeypatch.setattr(TaskManager, "all_tasks", ["hellaswag", "mmlu"], raising=True)
    monkeypatch.setattr("lm_eval.tasks.manager.TaskIndex.build", lambda self, paths: {})
    with pytest.raises(UserError, match="--tasks hellaswga .* did you mean hellaswag"):
        choose(["hellaswga"], tmp_path)


def test_a_group_names_files_beside_it_and_tags(directory, tmp_path):
    for name, tag in (("one", "ours"), ("two", "ours"), ("three", "none")):
        path = task(directory, "data/a.jsonl", f"{name}.yaml")
        path.write_text(path.read_text().replace("task: held_out", f"task: {name}\ntag: {tag}"))
    (directory / "group.yaml").write_text("group: mine\ntask: [ours, {group: inner, task: [three]}]\n")
    chosen = choose([str(directory / "group.yaml")], tmp_path / "cache")
    assert chosen.specs == ["mine"]
    assert chosen.manager.task_index["ours"].tags == {"one", "two"}
    assert chosen.manager.task_index["three"].cfg["dataset_kwargs"]["data_files"].endswith("data/a.jsonl")
    assert {"group.yaml", "one.yaml", "two.yaml", "three.yaml", "metrics.py", "a.jsonl"} <= {
        f.name for f in chosen.files
    }
    whole = choose([str(directory)], tmp_path / "cache")
    assert "mine" in whole.specs
    assert all(spec == "mine" or spec["task"] not in ("three",) for spec in whole.specs)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("group: g\n", "a group has a name and, under"),
        ("group: g\ntask: [{alias: x}]\n", "each member of a group is a name"),
        ("task: [one]\n", "no .task. with a name; a list of tasks also needs"),
        ("group: g\ntask: [hellaswagg]\n", "hellaswagg is neither a file, a directory nor a task of the harness"),
    ],
)
def test_a_group_that_names_no_tasks_is_refused(directory, tmp_path, text, says):
    (directory / "group.yaml").write_text(text)
    with pytest.raises(UserError, match=f"--tasks .*group.yaml: {says}"):
        choose([str(directory / "group.yaml")], tmp_path / "cache")
