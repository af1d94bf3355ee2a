"""SBOM and provenance of an image, and their check, which needs no network.

    containers/.venv/bin/python containers/supply_chain.py record IMAGE
    containers/.venv/bin/python containers/supply_chain.py check IMAGE

`record` writes image-records/IMAGE.spdx.json (SPDX 2.3) and IMAGE.provenance.json (in-toto Statement v1, SLSA provenance v1).
`check` compares the image that the engine has with both: exit code 1 and a line for each difference. Nothing is signed: a
signature needs a key of yours, as by `cosign attest --predicate`.
From the environment: RECORDS, the folder, by default image-records.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from google.protobuf import json_format
from image_contents import ENGINE_TIMEOUT, Image, Package, look
from in_toto_attestation.predicates.provenance.v1.provenance_pb2 import Provenance
from in_toto_attestation.v1.resource_descriptor import ResourceDescriptor
from in_toto_attestation.v1.statement import Statement
from spdx_tools.common.spdx_licensing import spdx_licensing
from spdx_tools.spdx.model import (
    Actor,
    ActorType,
    Checksum,
    ChecksumAlgorithm,
    CreationInfo,
    Document,
    ExternalPackageRef,
    ExternalPackageRefCategory,
    PackagePurpose,
    Relationship,
    RelationshipType,
    SpdxNoAssertion,
)
from spdx_tools.spdx.model import Package as SpdxPackage
from spdx_tools.spdx.parser.parse_anything import parse_file
from spdx_tools.spdx.validation.document_validator import validate_full_spdx_document
from spdx_tools.spdx.writer.json.json_writer import write_document_to_file

ROOT = Path(__file__).resolve().parents[1]
SLSA = "https://slsa.dev/provenance/v1"
LABEL = "baton.lock.sha256"
_OCI = "org.opencontainers.image."


def paths(image: str, folder: Path) -> tuple[Path, Path]:
    """SBOM and provenance of an image: convert:0.1.0 -> convert-0.1.0.spdx.json ..."""
    stem = image.replace("/", "-").replace(":", "-")
    return folder / f"{stem}.spdx.json", folder / f"{stem}.provenance.json"


def sbom(image: Image) -> Document:
    """The packages of an image. A function of the image alone: its time is that of the build."""
    whole = SpdxPackage(
        spdx_id="SPDXRef-image",
        name=image.name,
        version=image.labels.get(f"{_OCI}version"),
        download_location=SpdxNoAssertion(),
        files_analyzed=False,
        checksums=[Checksum(ChecksumAlgorithm.SHA256, image.id)],
        license_declared=_terms(image.labels.get(f"{_OCI}licenses")),
        primary_package_purpose=PackagePurpose.CONTAINER,
    )
    packages = [_spdx(each, number) for number, each in enumerate(image.packages)]
    creation = CreationInfo(
        spdx_version="SPDX-2.3",
        spdx_id="SPDXRef-DOCUMENT",
        name=image.name,
        document_namespace=f"https://baton.invalid/sbom/{image.id}",  # the specification wants a URI, not a place
        creators=[Actor(ActorType.TOOL, "baton-containers-supply_chain")],
        created=_time(image.created),
    )
    contained = [Relationship(whole.spdx_id, RelationshipType.CONTAINS, each.spdx_id) for each in packages]
    described = Relationship("SPDXRef-DOCUMENT", RelationshipType.DESCRIBES, whole.spdx_id)
    return Document(creation, packages=[whole, *packages], relationships=[described, *contained])


def _spdx(package: Package, number: int) -> SpdxPackage:
    reference = ExternalPackageRef(ExternalPackageRefCategory.PACKAGE_MANAGER, "purl", package.purl)
    return SpdxPackage(
        spdx_id=f"SPDXRef-{package.kind}-{number}",
        name=package.name,
        version=package.version,
        download_location=SpdxNoAssertion(),
        files_analyzed=False,
        license_declared=_terms(package.license),
        external_references=[reference],
    )


def _terms(expression: str | None) -> Any:
    if not expression or spdx_licensing.validate(expression).errors:
        return SpdxNoAssertion()
    return spdx_licensing.parse(expression)


def _time(text: str) -> datetime:
    """Docker's RFC 3339 in whole seconds of UTC, as SPDX has them."""
    return datetime.fromisoformat(text[:19])


def statement(image: Image, bill: bytes, builder: dict[str, str]) -> dict[str, Any]:
    """The in-toto statement of an image.

    Args:
        image: the subject.
        bill: its SBOM's file.
        builder: program -> version, of what built it.
    """
    revision, _, modified = image.labels.get(f"{_OCI}revision", "").partition("-")
    base = image.labels.get(f"{_OCI}base.digest", "").removeprefix("sha256:")
    sources = [{"name": "requirements.lock", "digest": {"sha256": image.labels.get(LABEL, "")}}]
    if revision:
        source: dict[str, Any] = {"name": "source", "digest": {"gitCommit": revision}}
        if uri := image.labels.get(f"{_OCI}source"):
            source["uri"] = uri
        sources.append(source | ({"annotations": {"modified": True}} if modified else {}))
    if base:
        sources.append({"name": image.labels.get(f"{_OCI}base.name", ""), "digest": {"sha256": base}})
    predicate = {
        "buildDefinition": {
            "buildType": "https://baton.invalid/containers/build.sh/v1",
            "externalParameters": {"image": image.name},
            "internalParameters": {
                "layers": [{"digest": digest, "content": content} for digest, content in image.layers]
            },
            "resolvedDependencies": sources,
        },
        "runDetails": {
            "builder": {"id": "https://baton.invalid/containers/build.sh", "version": builder},
            "metadata": {"finishedOn": f"{_time(image.created).isoformat()}Z"},
            "byproducts": [{"name": "sbom", "digest": {"sha256": hashlib.sha256(bill).hexdigest()}}],
        },
    }
    subject = ResourceDescriptor(name=image.name, digest={"sha256": image.id}).pb
    json_format.ParseDict(predicate, Provenance())  # its fields are those of SLSA's schema
    made = Statement([subject], SLSA, predicate)
    made.validate()
    return dict(json_format.MessageToDict(made.pb))


def record(image: Image, folder: Path, builder: dict[str, str]) -> None:
    """Write both files. ValueError if the SBOM breaks SPDX's rules."""
    folder.mkdir(parents=True, exist_ok=True)
    bill, provenance = paths(image.name, folder)
    document = sbom(image)
    if broken := validate_full_spdx_document(document):
        raise ValueError(f"the SBOM is not SPDX: {broken[0].validation_message}")
    write_document_to_file(document, str(bill), validate=False)
    made = statement(image, bill.read_bytes(), builder)
    provenance.write_text(json.dumps(made, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def differences(image: Image, folder: Path) -> list[str]:
    """What the records say otherwise than the image; what breaks their formats."""
    bill, provenance = paths(image.name, folder)
    if absent := [str(path) for path in (bill, provenance) if not path.is_file()]:
        return [f"{path} is not there: `record {image.name}` writes it" for path in absent]
    try:
        document = parse_file(str(bill))
        found = [f"{bill}: not SPDX: {each.validation_message}" for each in validate_full_spdx_document(document)]
    except Exception as error:  # noqa: BLE001 -- the parser raises whatever its file makes it
        return [f"{bill}: not SPDX: {' '.join(str(error).split())[:300]}"]
    try:
        content = json.loads(provenance.read_text(encoding="utf-8"))
        read = Statement([], "", {})
        json_format.ParseDict(content, read.pb)
        read.validate()
        json_format.ParseDict(content["predicate"], Provenance())
        if content["predicateType"] != SLSA:
            found.append(f"{provenance}: predicateType is {content['predicateType']}, not {SLSA}")
        definition = content["predicate"]["buildDefinition"]
        layers = [(each["digest"], each["content"]) for each in definition["internalParameters"]["layers"]]
        lock = next(each for each in definition["resolvedDependencies"] if each["name"] == "requirements.lock")
        said = {
            "image": (content["subject"][0]["digest"]["sha256"], image.id),
            "name": (content["subject"][0]["name"], image.name),
            "SBOM": (content["predicate"]["runDetails"]["byproducts"][0]["digest"]["sha256"], _sha256(bill)),
            "lock": (lock["digest"]["sha256"], image.lock),
        }
    except (json_format.ParseError, ValueError, KeyError, IndexError, StopIteration, TypeError) as error:
        return [*found, f"{provenance}: not a statement of provenance: {' '.join(str(error).split())}"]
    found += [f"{provenance}: {name} {says}, it is {true}" for name, (says, true) in said.items() if says != true]
    if layers != list(image.layers):
        found.append(f"{provenance}: the layers above the base are not those of the image, or their content is not")
    if image.labels.get(LABEL) != image.lock:
        found.append(f"label {LABEL} is {image.labels.get(LABEL)}, the lock file in the image has {image.lock}")
    listed = {ref.locator for each in document.packages for ref in each.external_references}
    there = {each.purl for each in image.packages}
    found += [f"{bill}: {each} is not in the image" for each in sorted(listed - there)]
    found += [f"{bill}: {each} of the image is not listed" for each in sorted(there - listed)]
    if not any(Checksum(ChecksumAlgorithm.SHA256, image.id) in each.checksums for each in document.packages):
        found.append(f"{bill}: is of another image than {image.id}")
    return found


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("record", "check"))
    parser.add_argument("image", help="as convert:0.1.0")
    given = parser.parse_args(words)
    folder = Path(os.environ.get("RECORDS") or ROOT / "image-records")
    import docker

    try:
        image = look(given.image)
        server = docker.from_env(timeout=ENGINE_TIMEOUT).version()
    except docker.errors.DockerException as error:
        print(f"containers/supply_chain.py: {given.image}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    bill, provenance = paths(image.name, folder)
    if given.command == "record":
        record(image, folder, {"docker": server["Version"]})
        print(f"{bill.name} ({len(image.packages)} packages) and {provenance.name} in {folder}")
        return 0
    found = differences(image, folder)
    for each in found:
        print(each, file=sys.stderr)
    if not found:
        print(f"{image.name}: sha256:{image.id} is what {bill} and {provenance} say; neither is signed")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
