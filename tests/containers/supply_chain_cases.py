"""Records of a made-up image and what their check finds, as JSON: run in the environment of containers/ by test_supply_chain.py.

supply_chain_cases.py FOLDER
"""

from __future__ import annotations

import dataclasses
import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "containers"))

import supply_chain
from image_contents import Image, Package, content_hash, content_hashes

IMAGE = Image(
    name="convert:0.1.0",
    id="ab" * 32,
    created="2026-01-02T03:04:05.678901234Z",
    labels={
        "org.opencontainers.image.version": "0.1.0",
        "org.opencontainers.image.licenses": "Apache-2.0",
        "org.opencontainers.image.revision": f"{'c' * 40}-modified",
        "org.opencontainers.image.base.name": "localhost/python:slim",
        "org.opencontainers.image.base.digest": f"sha256:{'d' * 64}",
        "baton.lock.sha256": "e" * 64,
    },
    layers=(("sha256:1", "content-1"), ("sha256:2", "content-2")),
    packages=(
        Package(kind="pypi", name="Torch_Thing", version="2.1+cpu", license="MIT OR Apache-2.0"),
        Package(kind="pypi", name="odd", version="1", license="see the file"),
        Package(kind="deb", name="libc6", version="2.41-12+deb13u1", architecture="amd64"),
    ),
    lock="e" * 64,
)


def tampered(folder: Path) -> dict[str, list[str]]:
    """{change: differences} of an image that is not as recorded, and of records that were changed."""
    other = {
        "nothing": IMAGE,
        "id": dataclasses.replace(IMAGE, id="00" * 32),
        "layer": dataclasses.replace(IMAGE, layers=(IMAGE.layers[0], ("sha256:2", "other"))),
        "package added": dataclasses.replace(
            IMAGE, packages=(*IMAGE.packages, Package(kind="pypi", name="evil", version="6"))
        ),
        "package changed": dataclasses.replace(
            IMAGE, packages=(*IMAGE.packages[:2], dataclasses.replace(IMAGE.packages[2], version="9"))
        ),
        "lock": dataclasses.replace(IMAGE, lock="f" * 64),
    }
    found = {name: supply_chain.differences(image, folder) for name, image in other.items()}
    bill, provenance = supply_chain.paths(IMAGE.name, folder)

    def edited(path: Path, change: Any) -> list[str]:
        kept = path.read_text()
        content = json.loads(kept)
        change(content)
        path.write_text(json.dumps(content))
        said = supply_chain.differences(IMAGE, folder)
        path.write_text(kept)
        return said

    found["SBOM changed"] = edited(bill, lambda content: content["packages"].pop())
    found["SBOM broken"] = edited(bill, lambda content: content.pop("spdxVersion"))
    found["statement broken"] = edited(provenance, lambda content: content.update(subject=[]))
    found["statement of another kind"] = edited(provenance, lambda content: content.update(predicateType="x"))
    found["predicate of another form"] = edited(
        provenance, lambda content: content["predicate"]["runDetails"].update(finished="now")
    )
    found["name"] = edited(provenance, lambda content: content["subject"][0].update(name="infer:0.1.0"))
    bill.unlink()
    found["absent"] = supply_chain.differences(IMAGE, folder)
    return found


def layer(files: dict[str, bytes], *, time: int, mode: int = 0o644, attributes: dict[str, str] | None = None) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime, member.mode = len(content), time, mode
            member.pax_headers = attributes or {}
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def hashes() -> dict[str, str]:
    """Content hashes of layers, and of one inside what `docker save` gives."""
    files = {"opt/a": b"one", "opt/b": b"two"}
    made = {
        "plain": layer(files, time=1),
        "later": layer(files, time=2),
        "other order": layer(dict(reversed(files.items())), time=1),
        "other content": layer(files | {"opt/b": b"twO"}, time=1),
        "other name": layer({"opt/a": b"one", "opt/c": b"two"}, time=1),
        "other mode": layer(files, time=1, mode=0o755),
        "other attribute": layer(files, time=1, attributes={"SCHILY.xattr.security.capability": "x"}),
        "other time of reading": layer(files, time=1, attributes={"atime": "17.5"}),
    }
    found = {}
    for name, packed in made.items():
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            found[name] = content_hash(archive)
    saved = layer({"blobs/sha256/11": made["plain"], "blobs/sha256/22": b"no layer"}, time=0)
    pieces = [saved[start : start + 700] for start in range(0, len(saved), 700)]
    for name, given in (("in pieces", pieces), ("at once", [saved])):
        found[f"saved, {name}"] = content_hashes(given, {"sha256:11"})["sha256:11"]
    try:
        content_hashes(pieces, {"sha256:33"})
    except ValueError as error:
        found["absent"] = str(error)
    return found


def main(folder: Path) -> None:
    supply_chain.record(IMAGE, folder, {"docker": "26.1"})
    bill, provenance = supply_chain.paths(IMAGE.name, folder)
    written = {"sbom": json.loads(bill.read_text()), "statement": json.loads(provenance.read_text())}
    again = bill.read_bytes(), provenance.read_bytes()
    supply_chain.record(IMAGE, folder, {"docker": "26.1"})
    same = again == (bill.read_bytes(), provenance.read_bytes())
    print(json.dumps({**written, "same": same, "differences": tampered(folder), "hashes": hashes()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
