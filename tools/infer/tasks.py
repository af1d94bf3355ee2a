"""Evaluation tasks: YAML files, directories of YAML files, names of lm-evaluation-harness tasks."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind
from lm_eval.tasks._yaml_loader import load_yaml

from shared.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The tasks of --tasks."""

    specs: list[str | dict[str, Any]]  # for `TaskManager.load`: a name, or a configuration
    files: list[Path]  # inputs of the published directory
    manager: TaskManager


def choose(tasks: Sequence[str], cache: Path) -> Chosen:
    """Resolve --tasks.

    Args:
        tasks: YAML files, directories, or names of the harness's tasks.
        cache: temporary cache directory of `datasets` for local data files.

    Raises:
        UserError: a task is unknown; the message suggests the nearest known name.
    """
    local = _Local(cache)
    specs: list[str | dict[str, Any]] = []
    names = []
    for given in tasks:
        path = Path(given)
        if path.is_file():
            specs.append(local.spec(local.read(path)))
        elif path.is_dir():
            found = [p for p in sorted(path.glob("*.yaml")) if not p.name.startswith("_")]
            if not found:
                raise UserError(f"--tasks {given} holds no task: no .yaml file whose name does not begin with _")
            specs += map(local.spec, _outermost([local.read(file) for file in found]))
        elif "/" in given or path.suffix in (".yaml", ".yml"):
            raise UserError(f"--tasks {given} does not exist")
        else:
            names.append(given)
            specs.append(given)
    # The harness's index has 14,000 files; it is read only for tasks given by name.
    manager = TaskManager(include_defaults=bool(names or local.foreign))
    files = local.files
    for name, place in [*((name, f"--tasks {name}") for name in names), *local.foreign.items()]:
        entry = manager.task_index.get(name)
        if entry is None:
            close = get_close_matches(name, [*manager.all_tasks, *local.known], n=1, cutoff=0.4)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UserError(f"{place} is neither a file, a directory nor a task of the harness{hint}")
        files += [entry.yaml_path] if entry.yaml_path else []
    for name, config in local.known.items():
        kind = Kind.GROUP if "group" in config else Kind.TASK
        manager.task_index[name] = Entry(name=name, kind=kind, yaml_path=None, cfg=config)
    for tag, members in local.tags.items():
        manager.task_index[tag] = Entry(name=tag, kind=Kind.TAG, yaml_path=None, tags=members)
    return Chosen(specs=specs, files=list(dict.fromkeys(files)), manager=manager)


def _outermost(specs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A directory's top-level groups, and its tasks outside any group."""
    inside = {name for spec in specs for name in _members(spec)}
    return [spec for spec in specs if (spec.get("group") or spec["task"]) not in inside]


def _members(spec: dict[str, Any]) -> set[str]:
    """Names of a group's members, at any depth."""
    found: set[str] = set()
    for member in spec["task"] if "group" in spec else []:
        if isinstance(member, str):
            found.add(member)
        elif "group" in member:
            found |= {member["group"], *(_members(member) if "task" in member else ())}
        else:
            found.add(member["task"])
    return found


class _Local:
    """The user's task files, with absolute paths, and the group members in the same directory."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self.files: list[Path] = []  # all files read
        self.known: dict[str, dict[str, Any]] = {}  # group members by name
        self.tags: dict[str, set[str]] = {}
        self.foreign: dict[str, str] = {}  # names of the harness's tasks -> where they are used

    def read(self, path: Path) -> dict[str, Any]:
        """Read a task or a group with its members. UserError for an invalid file."""
        try:
            config = load_yaml(path)
            self.files += _parts(path)
        except (yaml.YAMLError, ValueError, ImportError, AttributeError, OSError, SyntaxError) as error:
            raise UserError(f"--tasks {path}: {' '.join(str(error).split())}") from None
        if "group" in config:
            return self._group(config, path)
        if not isinstance(config.get("task"), str):
            raise UserError(f'--tasks {path}: no "task" with a name; a list of tasks also needs "group" with a name')
        return self._with_data(config, path)

    def spec(self, config: dict[str, Any]) -> str | dict[str, Any]:
        """Argument for `TaskManager.load`. A group is passed by name: its configuration would override its tasks'."""
        if "group" not in config:
            return config
        self.known[config["group"]] = config
        return str(config["group"])

    def _group(self, config: dict[str, Any], path: Path) -> dict[str, Any]:
        members = config.get("task")
        members = [members] if isinstance(members, (str, dict)) else members
        if not isinstance(config["group"], str) or not isinstance(members, list) or not members:
            raise UserError(f'--tasks {path}: a group has a name and, under "task", the list of its tasks')
        return self._with_data(config, path) | {"task": [self._member(member, path) for member in members]}

    def _member(self, member: Any, path: Path) -> Any:
        if isinstance(member, str):
            self._resolve(member, path)
            return member
        if isinstance(member, dict) and isinstance(member.get("group"), str):
            if "task" in member:
                return self._group(member, path)
            self._resolve(member["group"], path)
            return member
        if not isinstance(member, dict) or not isinstance(member.get("task"), str):
            raise UserError(f'--tasks {path}: each member of a group is a name, or has "task" or "group" with a name')
        if "dataset_path" not in member and "class" not in member:  # an existing task with overridden fields
            self._resolve(member["task"], path)
        return self._with_data(member, path)

    def _resolve(self, name: str, path: Path) -> None:
        """Read a task, group or tag from the directory of `path`; a name not found there is the harness's."""
        if name in self.known or name in self.tags or name in self.foreign:
            return
        for file in sorted(path.resolve().parent.glob("**/*.yaml")):
            try:
                config = load_yaml(file, resolve_func=False)
            except Exception:  # noqa: BLE001 -- an unrelated file
                continue
            tags = config.get("tag") or []
            if name in ([tags] if isinstance(tags, str) else tags) and isinstance(config.get("task"), str):
                self.tags.setdefault(name, set()).add(config["task"])
                self.known.setdefault(config["task"], self.read(file))
            elif (config.get("group") or config.get("task")) == name:
                self.known[name] = {}  # ends the recursion of a group that contains itself
                self.known[name] = self.read(file)
                return
        if name not in self.tags:
            self.foreign[name] = f"--tasks {path}: {name}"

    def _with_data(self, config: dict[str, Any], path: Path) -> dict[str, Any]:
        """The configuration with absolute paths of its data files."""
        arguments = config.get("dataset_kwargs")
        if not isinstance(arguments, dict) or "data_files" not in arguments:
            return config
        data, found = _absolute(arguments["data_files"], path)
        self.files += found
        return config | {"dataset_kwargs": arguments | {"data_files": data, "cache_dir": str(self._cache)}}


def _absolute(data: Any, task: Path) -> tuple[Any, list[Path]]:
    """`data_files` (path, list or mapping) with absolute paths, resolved against the task's file."""
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
    """The task's file, its included files and the Python files of its `!function` tags."""
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
