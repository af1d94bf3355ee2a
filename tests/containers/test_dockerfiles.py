"""Dockerfiles and build scripts; needs no Docker engine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path, PurePath

import check
import healthy
import pytest
import requirements

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("convert", "pretrain", "sft", "rlhf", "infer")


def recipe(tool: str) -> list[str]:
    """The instructions of a Dockerfile, continued lines joined, comments left out."""
    text = (ROOT / "containers" / tool / "Dockerfile").read_text()
    assert not re.search(r"^#\s*syntax", text, re.MULTILINE), "it would fetch a frontend from a registry"
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("tool", TOOLS)
def test_the_base_is_an_argument_with_a_pinned_default(tool: str) -> None:
    lines = recipe(tool)
    assert lines[0].startswith("ARG BASE_IMAGE=")
    default = lines[0].partition("=")[2]
    # vLLM's digest is not known to us; its tag carries the version that the lock pins
    locked = re.search(r"^vllm==(\S+)", (ROOT / "tools/infer/requirements.gpu.lock").read_text(), re.MULTILINE)
    assert locked
    assert re.search(r"@sha256:[0-9a-f]{64}$", default) or default == f"vllm/vllm-openai:v{locked[1]}"
    given = ["FROM scratch AS wheels", *(["FROM scratch AS trlx"] if tool == "rlhf" else [])]
    assert [line for line in lines if line.startswith("FROM")] == [*given, "FROM ${BASE_IMAGE}"]


def test_the_rlhf_image_takes_trlx_where_it_is_given() -> None:
    lines = recipe("rlhf")
    (step,) = [line for line in lines if "from=trlx,target=/trlx" in line]
    assert (
        "if [ -f /trlx/trlx/__init__.py ]; then mkdir /opt/baton/trlx && cp -r /trlx/trlx /trlx/LICENSE /opt/baton/trlx/"
        in step
    )
    assert lines.index("ARG BATON_TRLX=") + 1 == lines.index(
        "ENV BATON_TRLX=$BATON_TRLX"
    )  # empty: rlhf says how to get it
    script = (ROOT / "containers/build.sh").read_text()
    assert '--build-context "trlx=$BATON_TRLX"' in script
    assert "--build-arg BATON_TRLX=/opt/baton/trlx" in script


@pytest.mark.parametrize("tool", TOOLS)
def test_dependencies_come_before_sources(tool: str) -> None:
    steps = [line for line in recipe(tool) if line.startswith("RUN")]
    dependencies, source, checked = steps
    assert "run.sh dependencies /opt/baton/requirements.lock" in dependencies
    assert "source=shared" not in dependencies
    assert re.findall(r"source=(shared|tools\S*?),", source) == ["shared", f"tools/{tool}"]
    assert f'check.py {tool} "$VERSION"' in checked
    assert all("--mount=type=secret" not in line or "required" not in line for line in steps), "secrets are optional"


@pytest.mark.parametrize("tool", TOOLS)
def test_the_end_of_every_recipe(tool: str) -> None:
    lines = recipe(tool)
    user = [line.split()[1] for line in lines if line.startswith("USER")][-1]
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", user)
    assert f'ENTRYPOINT ["{tool}"]' in lines
    labels = next(line for line in lines if line.startswith("LABEL"))
    for name in ("title", "source", "revision", "version", "licenses", "base.name", "base.digest"):
        assert f"org.opencontainers.image.{name}=" in labels
    commands = [json.loads(line.partition(" ")[2]) for line in lines if line.startswith(("ENTRYPOINT", "CMD"))]
    assert commands == [[tool], ["--help"]]
    assert any(line.startswith("HEALTHCHECK") for line in lines) == (tool == "infer")
    assert any(f"BATON_IMAGE={tool}:$VERSION BATON_REVISION=$REVISION" in line for line in lines)


LOCK = """torch==2.13.0 ; sys_platform == 'linux' \\
    --hash=sha256:aa
nvidia-cublas==13.1 \\
    --hash=sha256:bb
triton==3.7.1 \\
    --hash=sha256:cc \\
    --hash=sha256:dd
numpy==2.5.5 \\
    --hash=sha256:ee
Flash_Attn==2.8
vllm==0.32.0 \\
    --hash=sha256:ff
"""


def test_what_a_base_brings_of_torch_stays_as_it_is() -> None:
    names = [name for name, _ in requirements.entries(LOCK)]
    assert names == ["torch", "nvidia-cublas", "triton", "numpy", "flash-attn", "vllm"]
    assert requirements.left_to_base(names, {"pip": "25", "numpy": "2.0"}) == set()
    nvidia = {"torch": "2.13.0a0+nv26.06", "numpy": "1.26", "flash-attn": "2.7"}
    assert requirements.left_to_base(names, nvidia) == {"torch", "nvidia-cublas", "triton", "flash-attn"}
    vllm = {"torch": "2.13.0", "vllm": "0.32.0"}
    assert requirements.left_to_base(names, vllm) == {"torch", "nvidia-cublas", "triton", "vllm"}


def test_what_is_installed_keeps_its_hashes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = tmp_path / "requirements.lock"
    lock.write_text(LOCK)
    requirements.main(str(lock), "torch", "triton", "nvidia-*", "!nvidia-cublas")
    assert capsys.readouterr().out == (
        "torch==2.13.0 ; sys_platform == 'linux' \\\n    --hash=sha256:aa\n"
        "triton==3.7.1 \\\n    --hash=sha256:cc \\\n    --hash=sha256:dd\n"
    )


def test_every_lock_is_read_whole() -> None:
    for lock in sorted((ROOT / "tools").glob("*/requirements*.lock")):
        text = lock.read_text()
        found = list(requirements.entries(text))
        assert "".join(part for _, part in found) == text, lock
        assert len(found) == len(re.findall(r"^\S+==", text, re.MULTILINE)), lock
        assert all("--hash=sha256:" in part for _, part in found), lock


def test_the_slim_lock_is_a_part_of_the_whole_one() -> None:
    whole = dict(requirements.entries((ROOT / "tools/convert/requirements.lock").read_text()))
    slim = dict(requirements.entries((ROOT / "tools/convert/requirements.slim.lock").read_text()))
    assert {name: text.split(" ")[0] for name, text in slim.items()} == {
        name: whole[name].split(" ")[0] for name in slim
    }
    assert not {"torch", "transformers", "megatron-core"} & slim.keys()
    assert {"torch", "transformers", "megatron-core"} <= whole.keys()


@pytest.mark.parametrize(
    ("words", "where"),
    [
        ("/opt/baton/bin/python /opt/baton/bin/infer serve --source /data/hf", "127.0.0.1:8000"),
        ("infer serve --source /data/hf --host 0.0.0.0 --port 9000", "127.0.0.1:9000"),
        ("infer serve --port=9000 --host=10.0.0.7", "10.0.0.7:9000"),
        ("infer serve --host ::1", "[::1]:8000"),
        ("infer serve --host ::", "127.0.0.1:8000"),
        ("infer rollouts --source hf --policies p --host 0.0.0.0", "127.0.0.1:8000"),
        ("infer generate --source serve", None),
        ("/sbin/docker-init -- infer serve", "127.0.0.1:8000"),
        ("python /opt/baton/healthy.py", None),
        ("infer", None),
    ],
)
def test_where_a_server_is_asked_for_its_health(words: str, where: str | None) -> None:
    assert healthy.address(words.split()) == where


def test_the_check_names_the_module_that_does_not_import(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    assert check.main("convert", "0.1.0", "shared.no_such_module") == 1
    assert "shared.no_such_module cannot be imported" in capsys.readouterr().err
    assert check.main("convert", "9.9.9", "shared.no_such_module=no_such_requirement") == 1
    said = capsys.readouterr()
    assert "without no_such_requirement" in said.out
    assert "the image is to be 9.9.9" in said.err


@pytest.mark.parametrize("tool", TOOLS)
def test_the_check_of_a_build_passes_in_the_tools_environment(tool: str) -> None:
    """Every module of the tool imports where only its lock's packages are: a build's last step, without the build."""
    step = next(line for line in recipe(tool) if "check.py" in line)
    modules = re.search(r'check\.py \S+ "\$VERSION"([^&]*)', step)
    assert modules
    bin_ = ROOT / "tools" / tool / ".venv" / "bin"
    version = tomllib.loads((ROOT / "tools" / tool / "pyproject.toml").read_text())["project"]["version"]
    done = subprocess.run(
        [bin_ / "python", ROOT / "containers/check.py", tool, version, *modules[1].split()],
        env=os.environ | {"PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"{tool} {version}: " in done.stdout


def in_context(path: str) -> bool:
    """Whether .dockerignore leaves a file in the context: the last pattern decides that matches it or a folder above it."""
    places = ["/".join(path.split("/")[:length]) for length in range(1, path.count("/") + 2)]
    seen = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = (
                re.escape(line.removeprefix("!"))
                .replace(r"\*\*/", "(?:.*/)?")
                .replace(r"\*\*", ".*")
                .replace(r"\*", "[^/]*")
            )
            if any(re.fullmatch(pattern, place) for place in places):
                seen = line.startswith("!")
    return seen


def test_a_build_sees_all_that_a_tool_is_made_of() -> None:
    """Modules in any folder, and the data files that setuptools packs."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    needed = {path for path in tracked if path.endswith(".py") and path.startswith(("shared/", "tools/"))}
    assert "tools/infer/engines/vllm.py" in needed
    for tool in TOOLS:
        project = tomllib.loads((ROOT / "tools" / tool / "pyproject.toml").read_text())
        needed.add(f"tools/{tool}/pyproject.toml")
        for package, patterns in project["tool"]["setuptools"].get("package-data", {}).items():
            place = package.replace(".", "/")
            data = {path for path in tracked for pattern in patterns if PurePath(path).match(f"{place}/{pattern}")}
            assert data, f"{package}: {patterns}"
            needed |= data
    assert sorted(path for path in needed if not in_context(path)) == []
    for path in (
        "tests/command_line.py",
        "README.md",
        "tools/infer/.venv/bin/x.py",
        "shared/__pycache__/a.py",
        ".git/config",
    ):
        assert not in_context(path)
