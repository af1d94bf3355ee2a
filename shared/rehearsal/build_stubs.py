"""Builds the stubs of the CUDA runtime for the torch of this environment: `python -m shared.rehearsal.build_stubs`.

Two libraries, in the folder `stubs_folder()` of the environment. `make setup` and the images run
it; without g++ and nm it says so and ends with 0, since only `--rehearse` needs the stubs. Imports no torch.
Processes may build at once: each writes files of its own and moves them into place.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from shared.errors import UserError

RUNTIME, DRIVER = "libbaton-cudart.so", "libcuda.so.1"
UNCHECKED = "unchecked.txt"  # functions that this torch wants, and our lists do not have
MADE_FROM = "made-from.txt"
_SOURCES = Path(__file__).with_name("stubs")
_TORCH_LIBRARIES = ("libtorch_cuda.so", "libc10_cuda.so", "libtorch_python.so", "libtorch_cuda_linalg.so")
_OF_RUNTIME = ("cuda", "__cuda", "cublas")
_NVRTC = "libcaffe2_nvrtc.so"


def stubs_folder() -> Path:
    """Of this environment."""
    return Path(sys.prefix) / "lib" / "baton-stubs"


def ensure() -> list[str]:
    """Build the stubs unless this environment has them, as of these sources and this torch.

    Returns:
        Functions that this torch wants and our lists do not have. They answer 0.

    Raises:
        UserError: they cannot be built.
    """
    folder = stubs_folder()
    if not (folder / MADE_FROM).is_file() or (folder / MADE_FROM).read_text() != _made_from(torch_folder()):
        try:
            reason = build()
        except OSError as error:
            reason = f"{error.filename}: {error.strerror}"
        if reason:
            raise UserError(f"--rehearse needs the stubs of the CUDA runtime, which cannot be built here: {reason}")
    return (folder / UNCHECKED).read_text().split()


def _made_from(torch: Path | None) -> str:
    """Changes with our sources and with torch."""
    parts = [path.read_bytes() for path in sorted(_SOURCES.iterdir())]
    version = (torch / "version.py").read_bytes() if torch else b""
    return hashlib.sha256(b"\0".join([*parts, version])).hexdigest()


def wanted_of_runtime(torch: Path) -> set[str]:
    """Functions of the CUDA runtime and cuBLAS that torch's libraries take from elsewhere. `torch`: its folder."""
    names = set().union(*(undefined(torch / "lib" / library) for library in _TORCH_LIBRARIES))
    return {name for name in names if name.startswith(_OF_RUNTIME)}


def wanted_of_driver(torch: Path) -> set[str]:
    """The same of the driver."""
    return {name for name in undefined(torch / "lib" / _NVRTC) if name.startswith("cu") and name[2:3].isupper()}


def undefined(library: Path) -> set[str]:
    """Names that a library takes from elsewhere, without their version."""
    listed = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    return {line.split()[-1].partition("@")[0] for line in listed.stdout.splitlines()}


def written_out(part: str) -> set[str]:
    """Functions that `part`, "runtime" or "driver", computes an answer for."""
    lines = (_SOURCES / f"{part}.cpp").read_text().splitlines()
    return {line.partition("(")[0].split()[-1].lstrip("*") for line in lines if line.startswith("API ")}


def answering_zero(part: str) -> set[str]:
    """Functions that answer 0, "done", and do nothing: looked through by a person."""
    return set((_SOURCES / f"{part}.names").read_text().split())


def torch_folder() -> Path | None:
    """Of this environment's torch, if it was built for CUDA. Found without importing it."""
    found = importlib.util.find_spec("torch")
    folder = Path(found.origin).parent if found and found.origin else None
    return folder if folder and (folder / "lib" / "libtorch_cuda.so").exists() else None


def build() -> str | None:
    """Build; why it could not be, as one line; None if it was."""
    torch = torch_folder()
    if torch is None:
        return "this environment has no torch for CUDA"
    missing = [tool for tool in ("g++", "nm") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} not found; install g++ (Debian: apt-get install g++), then `make setup` again"
    more: list[str] = []
    folder = stubs_folder()
    folder.mkdir(parents=True, exist_ok=True)
    for part, library, wanted in (
        ("runtime", RUNTIME, wanted_of_runtime(torch)),
        ("driver", DRIVER, wanted_of_driver(torch)),
    ):
        known = answering_zero(part) | written_out(part)
        more += sorted(wanted - known)
        try:
            _compile(part, sorted((answering_zero(part) | wanted) - written_out(part)), folder / library)
        except subprocess.CalledProcessError as error:
            return f"g++ failed: {error.stderr.strip().splitlines()[0] if error.stderr.strip() else error}"
    _publish(folder / UNCHECKED, "\n".join(more).encode())
    _publish(folder / MADE_FROM, _made_from(torch).encode())
    return None


def _compile(part: str, zero: Sequence[str], library: Path) -> None:
    with tempfile.TemporaryDirectory() as directory:
        rest = Path(directory) / "zero.cpp"
        rest.write_text(
            "".join(
                f'extern "C" __attribute__((visibility("default"))) long {name}() {{ return 0; }}\n' for name in zero
            )
        )
        result = Path(directory) / library.name
        subprocess.run(
            [
                *("g++", "-O2", "-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden", f"-Wl,-soname,{library.name}"),
                *(str(_SOURCES / f"{part}.cpp"), str(rest), "-o", str(result)),
            ],
            capture_output=True,
            text=True,
            check=True,
        )
        _publish(library, result.read_bytes())


def _publish(path: Path, content: bytes) -> None:
    """In place of an old file, which a running rehearsal keeps mapped."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{path.name}.", delete=False) as fresh:
        fresh.write(content)
    Path(fresh.name).chmod(0o644)
    Path(fresh.name).replace(path)


def main() -> None:
    """Say what is built, or what is missing."""
    reason = build()
    if reason:
        print(f"no stubs of the CUDA runtime, so no --rehearse here: {reason}", file=sys.stderr)


if __name__ == "__main__":
    main()
