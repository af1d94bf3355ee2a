"""Last step of an image build: checks that all modules of the tool import and that its command reports the version.

`check.py TOOL VERSION [MODULE[=REQUIREMENT] ...]`: MODULE is imported too, unless REQUIREMENT is not installed. Standard
library only.
"""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
import traceback
from pathlib import Path


def main(tool: str, version: str, *modules: str) -> int:
    """0 if the image is usable; else prints the problem."""
    if not (3, 12) <= sys.version_info[:2] <= (3, 13):
        print(f"the base image has Python {sys.version.split()[0]}; 3.12 or 3.13 is needed", file=sys.stderr)
        return 1
    package = importlib.import_module(f"tools.{tool}")
    root = Path(package.__path__[0])
    files = (path.relative_to(root).with_suffix("").parts for path in sorted(root.rglob("[!_]*.py")))
    needs = {".".join(("tools", tool, *parts)): "" for parts in files if not parts[0].startswith(".")}
    for word in modules:
        module, _, requirement = word.partition("=")
        needs[module] = requirement
    for name, requirement in needs.items():
        if requirement and importlib.util.find_spec(requirement) is None:
            print(f"{tool}: without {requirement}, and so without {name}")
            continue
        try:
            importlib.import_module(name)
        except Exception:  # noqa: BLE001 -- any exception: the image is not usable
            traceback.print_exc()
            print(f"{name} cannot be imported: the base image does not fit the tool", file=sys.stderr)
            return 1
    answer = subprocess.run([tool, "--version"], check=True, capture_output=True, text=True).stdout.strip()
    if answer != version:
        print(f"{tool} --version says {answer}, the image is to be {version}", file=sys.stderr)
        return 1
    subprocess.run([tool, "--help"], check=True, stdout=subprocess.DEVNULL)
    print(f"{tool} {version}: {len(needs)} modules")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
