"""What is in an image: its packages, and the content of its layers. Asks the Docker engine; uses no network."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import docker
from packageurl import PackageURL

LOCK = "/opt/baton/requirements.lock"  # in every image of ours

ENGINE_TIMEOUT = 1800  # seconds for an answer of the engine: it writes a large image out before it sends the first byte
_ATTRIBUTE = "SCHILY.xattr."  # in the PAX headers of a layer, as Docker writes them

# Runs inside the image, on its own Python.
_LIST = f"""
import hashlib, importlib.metadata, json, pathlib
python = {{}}
for found in importlib.metadata.distributions():
    name = found.metadata["Name"]
    if name and name.lower() not in python:  # the first on the path is the one that is imported
        python[name.lower()] = [name, found.version, found.metadata.get("License-Expression")]
debian, status = [], pathlib.Path("/var/lib/dpkg/status")
for block in status.read_text(encoding="utf-8").split("\\n\\n") if status.exists() else ():
    fields = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line and line[0] != " ")
    if fields.get("Status", "").endswith(" installed"):
        debian.append([fields["Package"], fields["Version"], fields["Architecture"]])
lock = pathlib.Path("{LOCK}")
print(json.dumps([sorted(python.values()), sorted(debian), hashlib.sha256(lock.read_bytes()).hexdigest()]))
"""


@dataclass(frozen=True, kw_only=True)
class Package:
    """An installed package. `kind`: pypi or deb; `license`: an SPDX expression if its metadata have one."""

    kind: str
    name: str
    version: str
    license: str | None = None
    architecture: str | None = None

    @property
    def purl(self) -> str:
        """Its package URL (github.com/package-url/purl-spec)."""
        if self.kind == "deb":
            return PackageURL("deb", "debian", self.name, self.version, {"arch": self.architecture}).to_string()
        return PackageURL("pypi", None, self.name, self.version).to_string()


@dataclass(frozen=True, kw_only=True)
class Image:
    """An image as the engine has it.

    Attributes:
        name: with its tag.
        id: SHA-256 of its configuration, which names its layers.
        created: time of its build, RFC 3339.
        labels: of the configuration.
        layers: digest and content hash of each layer above the base, the lowest first.
        packages: what is installed.
        lock: SHA-256 of the lock file in it.
    """

    name: str
    id: str
    created: str
    labels: dict[str, str]
    layers: tuple[tuple[str, str], ...]
    packages: tuple[Package, ...]
    lock: str


def look(name: str) -> Image:
    """Read an image. docker.errors.DockerException if it or the engine is not there."""
    client = docker.from_env(timeout=ENGINE_TIMEOUT)
    found = client.images.get(name)
    labels = found.attrs["Config"].get("Labels") or {}
    layers = found.attrs["RootFS"]["Layers"]
    try:
        below = client.images.get(labels["org.opencontainers.image.base.name"]).attrs["RootFS"]["Layers"]
    except (KeyError, docker.errors.ImageNotFound):
        below = []  # a base that the engine has not kept: its layers count as ours
    own = layers[len(below) :] if layers[: len(below)] == below else layers
    hashes = content_hashes(found.save(chunk_size=1 << 20), set(own))
    said = client.containers.run(
        found.id, ["-I", "-c", _LIST], entrypoint="python3", remove=True, network_disabled=True, read_only=True
    )
    python, debian, lock = json.loads(said)
    packages = [Package(kind="pypi", name=name, version=version, license=terms) for name, version, terms in python]
    packages += [Package(kind="deb", name=n, version=version, architecture=arch) for n, version, arch in debian]
    return Image(
        name=name,
        id=found.id.removeprefix("sha256:"),
        created=found.attrs["Created"],
        labels=labels,
        layers=tuple((each, hashes[each]) for each in own),
        packages=tuple(packages),
        lock=lock,
    )


def content_hashes(saved: Iterable[bytes], wanted: set[str]) -> dict[str, str]:
    """Digest -> content hash of the wanted layers of `docker save`, read as a stream."""
    hashes = {}
    with tarfile.open(fileobj=_Stream(iter(saved)), mode="r|") as archive:
        for member in archive:
            digest = f"sha256:{member.name.rpartition('/')[2]}"
            if digest in wanted and (file := archive.extractfile(member)):
                with tarfile.open(fileobj=file, mode="r|*") as layer:
                    hashes[digest] = content_hash(layer)
    if missing := wanted - hashes.keys():
        raise ValueError(f"docker save gives no layer {min(missing)}; a Docker engine of version 25 or later does")
    return hashes


def content_hash(layer: tarfile.TarFile) -> str:
    """SHA-256 over names, kinds, modes, owners, links, contents and extended attributes of a layer's files, by name.

    Extended attributes are file capabilities among others: rights, as modes are. Times of modification are left out: they
    are those of the build.
    """
    rows = []
    for member in layer:
        file = layer.extractfile(member) if member.isreg() else None
        content = hashlib.sha256()
        while file and (piece := file.read(1 << 20)):
            content.update(piece)
        kind = member.type.decode("ascii")
        row: list[Any] = [member.name, kind, member.mode, member.uid, member.gid, member.linkname, content.hexdigest()]
        rows.append([*row, sorted(each for each in member.pax_headers.items() if each[0].startswith(_ATTRIBUTE))])
    rows.sort()
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


class _Stream(io.RawIOBase):
    """A file to be read once, of pieces of bytes."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._left = pieces, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._left:
            self._left = next(self._pieces, b"")
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size
