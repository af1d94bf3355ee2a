"""SBOM and provenance of a made-up image: their form, and what their check finds. test_images.py has those of a built one."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / "containers/.venv/bin/python"


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    script = Path(__file__).with_name("supply_chain_cases.py")
    words = [PYTHON, script, tmp_path_factory.mktemp("records")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_the_sbom_lists_each_package_with_its_purl(cases: dict[str, Any]) -> None:
    bill = cases["sbom"]
    assert bill["spdxVersion"] == "SPDX-2.3"
    assert bill["creationInfo"]["created"] == "2026-01-02T03:04:05Z"
    image, *packages = bill["packages"]
    assert image["checksums"] == [{"algorithm": "SHA256", "checksumValue": "ab" * 32}]
    assert image["primaryPackagePurpose"] == "CONTAINER"
    purls = {each["name"]: each["externalRefs"][0]["referenceLocator"] for each in packages}
    assert purls == {
        "Torch_Thing": "pkg:pypi/torch-thing@2.1%2Bcpu",
        "odd": "pkg:pypi/odd@1",
        "libc6": "pkg:deb/debian/libc6@2.41-12%2Bdeb13u1?arch=amd64",
    }
    terms = {each["name"]: each["licenseDeclared"] for each in packages}
    assert terms == {"Torch_Thing": "MIT OR Apache-2.0", "odd": "NOASSERTION", "libc6": "NOASSERTION"}
    contained = [each for each in bill["relationships"] if each["relationshipType"] == "CONTAINS"]
    assert len(contained) == 3


def test_the_statement_is_in_totos_with_slsas_provenance(cases: dict[str, Any]) -> None:
    """Fields as in-toto.io/Statement/v1 and slsa.dev/provenance/v1 name them."""
    made = cases["statement"]
    assert made["_type"] == "https://in-toto.io/Statement/v1"
    assert made["predicateType"] == "https://slsa.dev/provenance/v1"
    assert made["subject"] == [{"name": "convert:0.1.0", "digest": {"sha256": "ab" * 32}}]
    definition, run = made["predicate"]["buildDefinition"], made["predicate"]["runDetails"]
    assert {"buildType", "externalParameters", "resolvedDependencies"} <= definition.keys()
    dependencies = {each["name"]: each for each in definition["resolvedDependencies"]}
    assert dependencies["source"]["digest"] == {"gitCommit": "c" * 40}
    assert dependencies["source"]["annotations"] == {"modified": True}
    assert dependencies["requirements.lock"]["digest"] == {"sha256": "e" * 64}
    assert dependencies["localhost/python:slim"]["digest"] == {"sha256": "d" * 64}
    assert run["builder"]["version"] == {"docker": "26.1"}
    assert run["metadata"]["finishedOn"] == "2026-01-02T03:04:05Z"
    assert cases["same"], "two records of one image differ"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("id", "image abab"),
        ("layer", "the layers above the base are not those of the image"),
        ("package added", "pkg:pypi/evil@6 of the image is not listed"),
        ("package changed", "libc6@2.41-12%2Bdeb13u1?arch=amd64 is not in the image"),
        ("lock", "label baton.lock.sha256 is eeee"),
        ("lock", "provenance.json: lock eeee"),
        ("SBOM changed", "provenance.json: SBOM "),
        ("SBOM broken", "not SPDX"),
        ("statement broken", "not a statement of provenance"),
        ("statement of another kind", "predicateType is x"),
        ("predicate of another form", "not a statement of provenance"),
        ("name", "name infer:0.1.0, it is convert:0.1.0"),
        ("absent", "spdx.json is not there: `record convert:0.1.0` writes it"),
    ],
)
def test_what_is_not_as_recorded_is_found(cases: dict[str, Any], change: str, said: str) -> None:
    assert cases["differences"]["nothing"] == []
    found = cases["differences"][change]
    assert any(said in each for each in found), found
    assert all("\n" not in each for each in found)


def test_a_content_hash_leaves_times_out_and_nothing_else(cases: dict[str, Any]) -> None:
    found = cases["hashes"]
    plain = found["plain"]
    same = ("later", "other order", "other time of reading", "saved, in pieces", "saved, at once")
    assert {found[name] for name in same} == {plain}
    other = ("other content", "other name", "other mode", "other attribute")
    assert len({plain, *(found[name] for name in other)}) == 5
    assert "docker save gives no layer sha256:33" in found["absent"]
    rows = [
        [name, "0", 0o644, 0, 0, "", hashlib.sha256(content).hexdigest(), []]
        for name, content in (("opt/a", b"one"), ("opt/b", b"two"))
    ]
    assert plain == hashlib.sha256(json.dumps(rows).encode()).hexdigest()
