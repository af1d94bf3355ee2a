"""compose.yaml: the demo's stages, in order, each sandboxed; a server of roll-outs with its trainer. Needs no Docker engine."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "containers"))

from jobs import COMPUTE, Job, jobs, settings, slug  # noqa: E402
from stages import precision  # noqa: E402

SERVER = "serve"  # no stage
ROLLOUTS, TRAINER = "rollouts", "rlhf-grpo"  # no stages either, and of a profile of their own
BESIDE = [SERVER, ROLLOUTS, TRAINER]
COMPLETED = {"condition": "service_completed_successfully"}
GPU_FILES = ("--file", "compose.yaml", "--file", "compose.gpu.yaml")

environment = {
    **{name: value for name, value in os.environ.items() if not name.endswith("_VERSION") and name != "DATA"},
    "UID": str(os.getuid()),
    "GID": str(os.getgid()),
    "OMP_NUM_THREADS": "2",
    "PRECISION": precision(),
}


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides take the number of threads from here."""
    monkeypatch.setenv("OMP_NUM_THREADS", environment["OMP_NUM_THREADS"])


def read(name: str = "compose.yaml", **changed: str) -> dict[str, Any]:
    """A compose file with variables filled in as compose does: `:-default`, `:?reason`, `:+where there is one`."""
    values = environment | changed

    def fill(found: re.Match[str]) -> str:
        given, rule, rest = values.get(found[1]), found[2], found[3]
        if rule == "+":
            return rest if given else ""
        assert given or rule == "-", f"{found[1]} is required: {rest}"
        return given or rest

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!override", lambda loader, node: loader.construct_sequence(node))
    text = (ROOT / name).read_text(encoding="utf-8")
    while "${" in text:  # the innermost first
        text, count = re.subn(r"\$\{(\w+):([-?+])([^${}]*)\}", fill, text)
        assert count
    return yaml.load(text, Loader)  # a safe loader, with one more tag


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    return read()["services"]


@pytest.fixture(scope="module")
def stages() -> list[Job]:
    return jobs(ROOT / "demo-work")


def test_the_services_are_the_demos_stages_in_order(services: dict[str, Any], stages: list[Job]) -> None:
    assert list(services) == [*(slug(job.name) for job in stages), *BESIDE]
    assert [name for name, service in services.items() if "profiles" in service] == [ROLLOUTS, TRAINER]


def test_every_command_is_the_demos(services: dict[str, Any], stages: list[Job]) -> None:
    for job in stages:
        service = services[slug(job.name)]
        assert tuple(shlex.split(service["command"])) == job.words
        assert service.get("entrypoint") == ([job.entrypoint] if job.entrypoint else None)
        assert service["image"] == job.image


def test_each_service_starts_when_the_one_before_has_completed(services: dict[str, Any]) -> None:
    names = [name for name in services if name not in (ROLLOUTS, TRAINER)]
    assert "depends_on" not in services[names[0]]
    for before, name in itertools.pairwise(names):
        assert services[name]["depends_on"] == {before: COMPLETED}


def locked_up(service: dict[str, Any]) -> dict[str, Any]:
    """What keeps a service in, in the form of jobs.settings."""
    kept = ("user", "init", "read_only", "cap_drop", "security_opt", "working_dir", "environment")
    networked = {"network_mode": service["network_mode"]} if "network_mode" in service else {}
    mounts = [(mount["source"], mount["target"], mount.get("read_only", False)) for mount in service["volumes"]]
    assert all(mount["type"] == "bind" and mount["bind"] == {"create_host_path": False} for mount in service["volumes"])
    return {
        **{name: service[name] for name in kept},
        **networked,
        "tmpfs": dict.fromkeys(service["tmpfs"], ""),
        "shm_size": service["shm_size"].removesuffix("b"),
        "volumes": [f"{ROOT / source}:{target}{':ro' if sealed else ''}" for source, target, sealed in mounts],
    }


def test_every_stage_is_locked_up_as_the_pipeline_does_it(services: dict[str, Any], stages: list[Job]) -> None:
    for job in stages:
        expected = settings(job)
        expected.pop("entrypoint", None)
        assert locked_up(services[slug(job.name)]) == expected, job.name
        assert expected["network_mode"] == "none"
        assert expected["cap_drop"] == ["ALL"]


def test_the_server_differs_by_its_network_alone(services: dict[str, Any]) -> None:
    server, stage = services[SERVER], services["serve-and-ask"]
    assert locked_up(server) == locked_up(stage) | {"network_mode": "bridge"}
    assert server["ports"] == ["127.0.0.1:8000:8000"]
    assert read(PORT="9000")["services"][SERVER]["ports"] == ["127.0.0.1:9000:8000"]
    assert "healthcheck" in server
    assert not [name for name, service in services.items() if "ports" in service and name != SERVER]


def test_roll_outs_have_one_volume_and_one_network_between_them(services: dict[str, Any]) -> None:
    server, trainer, stage = services[ROLLOUTS], services[TRAINER], services["rlhf-ppo"]
    alike = locked_up(stage) | {"network_mode": None}
    for each in (server, trainer):
        assert locked_up(each) | {"network_mode": None} == alike
        assert each["networks"] == [ROLLOUTS]
        assert each["profiles"] == [ROLLOUTS]
        assert "ports" not in each
    assert read()["networks"] == {ROLLOUTS: {"internal": True}}
    assert server["depends_on"] == {"convert-to-hf-sft": COMPLETED}
    assert trainer["depends_on"] == {ROLLOUTS: {"condition": "service_healthy"}}
    assert server["healthcheck"] == services[SERVER]["healthcheck"]
    asked, given = (flags_of(each) for each in (server, trainer))
    assert given["--rollouts"] == f"http://{ROLLOUTS}:{asked['--port']}/v1"
    assert asked["--host"] == "0.0.0.0"
    (volume,) = [mount["target"] for mount in server["volumes"] if not mount.get("read_only")]
    assert asked["--policies"] == given["--policies"] == f"{volume}/policies"
    for name in ("--source", "--precision"):
        assert asked[name] == given[name]
    assert given["--reward"] in flags_of(stage)["--reward"]


def flags_of(service: dict[str, Any]) -> dict[str, str]:
    """The words of a command whose flags all have a value."""
    _, *words = shlex.split(service["command"])
    return dict(zip(words[::2], words[1::2], strict=True))


@pytest.mark.parametrize("name", [ROLLOUTS, TRAINER])
def test_the_tools_accept_the_commands_of_roll_outs(services: dict[str, Any], name: str, tmp_path: Path) -> None:
    (tmp_path / "file.jsonl").write_text("{}\n")
    tool = services[name]["image"].partition(":")[0]
    words = [ROOT / "tools" / tool / ".venv/bin/python", ROOT / "tests" / "readme_commands.py", tool, tmp_path]
    line = f"{tool} {services[name]['command']}"
    answer = subprocess.run(words, input=line, capture_output=True, text=True, check=True, cwd=ROOT)
    assert json.loads(answer.stdout) == [[0, ""]]


def test_no_image_is_ever_fetched(services: dict[str, Any]) -> None:
    assert {service["pull_policy"] for service in services.values()} == {"never"}


def test_every_image_has_its_target(stages: list[Job]) -> None:
    for job in stages:
        words = ["make", "--no-print-directory", "--dry-run", job.target]  # the tests may run under make themselves
        build = subprocess.check_output(words, cwd=ROOT, text=True).splitlines()[-1]
        assert build == " ".join(filter(None, ["containers/build.sh", job.tool, job.variant]))


@pytest.mark.parametrize("tool", ["convert", "pretrain", "sft", "rlhf", "infer"])
def test_one_variable_swaps_one_tool(services: dict[str, Any], tool: str) -> None:
    swapped = read(**{f"{tool.upper()}_VERSION": "9.8.7"})["services"]
    for name, service in services.items():
        image = {f"{tool}:latest": f"{tool}:9.8.7", f"{tool}:logits": f"{tool}:9.8.7-logits"}.get(service["image"])
        assert swapped[name] == (service | {"image": image} if image else service)
    assert swapped != services


def test_gpus_go_to_the_stages_that_compute(stages: list[Job]) -> None:
    given = read("compose.gpu.yaml")["services"]
    assert set(given) == {slug(job.name) for job in stages if COMPUTE.fullmatch(job.name)} | set(BESIDE)
    assert {slug(job.name) for job in jobs(ROOT / "demo-work", gpus=True) if job.gpus} == set(given) - set(BESIDE)
    own: dict[str, dict[str, Any]] = {ROLLOUTS: {"device_ids": ["0"]}, TRAINER: {"device_ids": ["1"]}}
    for name, service in given.items():
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device == {"driver": "nvidia", "capabilities": ["gpu"]} | own.get(name, {"count": "all"})
        assert service["ulimits"]["memlock"] == -1


@pytest.fixture(scope="module")
def compose() -> None:
    try:
        subprocess.run(["docker", "compose", "version"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"docker has no compose plugin: {error}")


def config(*words: str, **changed: str) -> subprocess.CompletedProcess[str]:
    command = ["docker", "compose", "--profile", ROLLOUTS, *words]
    return subprocess.run(command, cwd=ROOT, env=environment | changed, capture_output=True, text=True, check=False)


@pytest.mark.usefixtures("compose")
@pytest.mark.parametrize("files", [(), GPU_FILES], ids=["plain", "gpu"])
def test_compose_accepts_the_files(files: tuple[str, ...]) -> None:
    done = config(*files, "config", "--quiet")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.usefixtures("compose")
def test_compose_reads_what_we_read(services: dict[str, Any]) -> None:
    seen = json.loads(config("config", "--format", "json").stdout)["services"]
    assert set(seen) == set(services)
    for name, service in services.items():
        assert seen[name]["command"] == shlex.split(service["command"])
        assert seen[name]["image"] == service["image"]
        assert seen[name]["read_only"]
        assert seen[name]["user"] == f"{os.getuid()}:{os.getgid()}"


@pytest.mark.usefixtures("compose")
def test_the_gpu_file_changes_what_it_says_and_nothing_else() -> None:
    plain, given = (json.loads(config(*f, "config", "--format", "json").stdout)["services"] for f in ((), GPU_FILES))
    changed = {"deploy", "shm_size", "ulimits", "tmpfs"}
    for name, service in plain.items():
        differs = {key for key in given[name] if given[name][key] != service.get(key)}
        assert differs == (changed if name in read("compose.gpu.yaml")["services"] else set()), name
        assert given[name]["tmpfs"] == (["/tmp:exec"] if differs else ["/tmp"])


@pytest.mark.usefixtures("compose")
@pytest.mark.parametrize("name", ["UID", "GID"])
def test_who_runs_the_stages_has_to_be_said(name: str) -> None:
    done = config("config", "--quiet", **{name: ""})
    assert done.returncode != 0
    assert f"variable {name}" in done.stderr
    assert "see the head of compose.yaml" in done.stderr
