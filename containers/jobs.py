"""The stages of demo/stages.py as containers: image, command and sandbox settings. Standard library only."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "demo"))  # its files import each other by name, as scripts do

from stages import Stage, stages  # noqa: E402

TOOL = re.compile(r"tools/(\w+)/\.venv/bin/\1")  # a tool's command in the demo
SCRIPTS = "convert"  # image of the demo's scripts, which need only Python: the smallest
VARIANTS = {"convert verify": "logits"}  # has torch, for the logits
COMPUTE = re.compile(r"(pretrain|sft) train|(rlhf|infer) .*|serve and ask")  # stages that use a GPU
LIMITS = {"memlock": -1, "stack": 64 << 20}  # pinned memory
FLAGS = {"environment": "--env", "network_mode": "--network", "volumes": "--volume", "working_dir": "--workdir"}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One stage in a container."""

    name: str
    tool: str
    variant: str
    """Image variant: suffix of the tag."""
    entrypoint: str | None
    """Replaces the image's entrypoint, the tool."""
    words: tuple[str, ...]
    work: Path
    """Host directory mounted at /data."""
    gpus: bool
    says: Callable[[], str]
    """One-line summary of the result, read from the output."""

    @property
    def image(self) -> str:
        """Name and tag; the tag's environment variable is that of compose.yaml."""
        version = os.environ.get(f"{self.tool.upper()}_VERSION") or ("" if self.variant else "latest")
        return f"{self.tool}:{'-'.join(filter(None, (version, self.variant)))}"

    @property
    def target(self) -> str:
        """The image's make target."""
        return "-".join(filter(None, ("image", self.tool, self.variant)))


def jobs(work: Path, *, gpus: bool = False) -> list[Job]:
    """Every stage of the demo, with its paths under /data, the mount of `work`."""
    inside, outside = stages(Path("/data")), stages(work)
    return [_job(stage, work, gpus, seen.says) for stage, seen in zip(inside, outside, strict=True)]


def _job(stage: Stage, work: Path, gpus: bool, says: Callable[[], str]) -> Job:
    first, *words = stage.command
    if own := TOOL.fullmatch(first):
        tool, entrypoint = own[1], None
    else:  # a script, perhaps one that starts a tool
        named = [found[1] for word in words if (found := TOOL.fullmatch(word))]
        tool, entrypoint = (named or [SCRIPTS])[0], "python3"
    return Job(
        name=stage.name,
        tool=tool,
        variant=VARIANTS.get(stage.name, ""),
        entrypoint=entrypoint,
        words=tuple(TOOL.sub(r"\1", word) for word in words),
        work=work,
        gpus=gpus and COMPUTE.fullmatch(stage.name) is not None,
        says=says,
    )


def slug(name: str) -> str:
    """`convert to-hf (sft)` -> `convert-to-hf-sft`: a stage's service in compose.yaml."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def settings(job: Job) -> dict[str, Any]:
    """Container settings under the docker package's names; the same as in compose.yaml."""
    return {
        "user": f"{os.getuid()}:{os.getgid()}",
        "init": True,
        "read_only": True,
        "tmpfs": {"/tmp": "exec" if job.gpus else ""},  # GPU kernels compiled at run time are loaded from there
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges"],
        "network_mode": "none",
        "shm_size": "16g" if job.gpus else "1g",  # shared memory of loader and engine processes
        "working_dir": "/",  # parent of /demo, for the demo's relative paths
        "environment": {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(len(os.sched_getaffinity(0)))},
        "volumes": [f"{job.work}:/data", f"{ROOT / 'demo'}:/demo:ro"],
        **({"entrypoint": job.entrypoint} if job.entrypoint else {}),
    }


def keywords(job: Job) -> dict[str, Any]:
    """Arguments of the docker package's `containers.create`."""
    from docker.types import DeviceRequest, Ulimit

    wanted = {"image": job.image, "command": list(job.words), **settings(job)}
    if job.gpus:
        wanted["device_requests"] = [DeviceRequest(count=-1, capabilities=[["gpu"]])]
        wanted["ulimits"] = [Ulimit(name=name, soft=limit, hard=limit) for name, limit in LIMITS.items()]
    return wanted


def command_line(job: Job) -> str:
    """The same container as a `docker run` command line."""
    words = ["docker", "run", "--rm"]
    for name, value in settings(job).items():
        flag = FLAGS.get(name, f"--{name.replace('_', '-')}")
        if value is True:
            words.append(flag)
        elif name == "tmpfs":
            words += [flag, *(f"{path}:{options}".rstrip(":") for path, options in value.items())]
        else:
            several = [f"{key}={text}" for key, text in value.items()] if isinstance(value, dict) else value
            for one in [several] if isinstance(several, str) else several:
                words += [flag, one]
    if job.gpus:
        words += [
            "--gpus",
            "all",
            *(word for name, limit in LIMITS.items() for word in ("--ulimit", f"{name}={limit}")),
        ]
    return shlex.join([*words, job.image, *job.words])
