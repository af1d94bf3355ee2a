"""Evaluation tasks: YAML files, directories of them, and names of the harness's own tasks."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from shared.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The tasks of --tasks."""

    specs: list[str | dict[str, Any]]  # for `TaskManager.load`: a name, or a configuration
    files: list[Path]  # all files that determine the result: inputs of the published directory
    manager: TaskManager


def choose(tasks: Sequence[str], cache: Path) -> Chosen:
    """Resolve --tasks.

    Args:
        tasks: YAML files, directories, or names of the harness's own tasks.
        cache: where `datasets` keeps its copies of local data files, for this run only.

    Raises:
        UserError: names the unknown task and the nearest known one.
    """
    specs: list[str | dict[str, Any]] = []
    files: list[Path] = []
    names = []
    for given in tasks:
        path = Path(given)
        if path.is_file():
            found = [path]
        elif path.is_dir():
            found = [p for p in sorted(path.glob("*.yaml")) if not p.name.startswith("_")]
            if not found:
                raise UserError(f"--tasks {given} holds no task: no .yaml file whose name does not begin with _")
        elif "/" in given or path.suffix in (".yaml", ".yml"):
            raise UserError(f"--tasks {given} does not exist")
        else:
            names.append(given)
            specs.append(given)
            continue
        for file in found:
            spec, parts = _local(file, cache)
            specs.append(spec)
            files += parts
    # The harness's index has 14,000 files; it is read only if a task is given by name.
    manager = TaskManager(include_defaults=bool(names))
    for name in names:
        entry = manager.task_index.get(name)
        if entry is None:
            close = get_close_matches(name, manager.all_tasks, n=1, cutoff=0.4)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UserError(f"--tasks {name} is neither a file, a directory nor a task of the harness{hint}")
        files += [entry.yaml_path] if entry.yaml_path else []
    return Chosen(specs=specs, files=files, manager=manager)


def _local(path: Path, cache: Path) -> tuple[dict[str, Any], list[Path]]:
    """The configuration of a task file with absolute paths, and the files that it consists of."""
    try:
        config = load_yaml(path)
        parts = _parts(path)
    except (yaml.YAMLError, ValueError, ImportError, AttributeError, OSError, SyntaxError) as error:
        raise UserError(f"--tasks {path}: {' '.join(str(error).split())}") from None
    if not isinstance(config.get("task"), str):
        raise UserError(f'--tasks {path}: no "task" with a name; groups and lists of tasks: give their files instead')
    arguments = config.get("dataset_kwargs")
    if isinstance(arguments, dict) and "data_files" in arguments:
        data, found = _absolute(arguments["data_files"], path)
        config["dataset_kwargs"] = arguments | {"data_files": data, "cache_dir": str(cache)}
        parts += found
    return config, parts


def _absolute(data: Any, task: Path) -> tuple[Any, list[Path]]:
    """`data_files` (a path, a list or a mapping of them) with every path resolved against the task's file."""
    if isinstance(data, dict):
        pairs = {split: _absolute(value, task) for split, value in data.items()}
        return {s: value for s, (value, _) in pairs.items()}, [f for _, found in pairs.values() for f in found]
    if isinstance(data, list):
        both = [_absolute(value, task) for value in data]
        return [value for value, _ in both], [f for _, found in both for f in found]
    if "://" in str(data):
        return data, []
    pattern = str(task.resolve().parent / str(data))
    found = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
    if not found:
        raise UserError(f"--tasks {task}: its data file {pattern} does not exist")
    return pattern, found


def _parts(path: Path) -> list[Path]:
    """The task's file, the files that it includes and the Python files of its `!function` tags."""
    path = path.resolve()
    functions: list[Path] = []

    class Loader(yaml.SafeLoader):
        """Records the file of each `!function module.name` without importing it."""

    def note(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str:
        module = loader.construct_scalar(node).rpartition(".")[0]
        file = path.parent / f"{module.replace('.', '/')}.py"
        functions.extend([file] if file.is_file() and file not in functions else [])
        return module

    Loader.add_constructor("!function", note)
    config = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)  # a SafeLoader
    includes = config.get("include", [])
    below = [_parts(path.parent / name) for name in ([includes] if isinstance(includes, str) else includes)]
    return [path, *functions, *(part for parts in below for part in parts)]
