"""Selects the lines of a requirements.lock that an image must install: those not provided by the base image.

`requirements.py LOCK` runs under the base image's Python. It leaves out PyTorch and packages built against it if the base has
them: NVIDIA's and vLLM's images have their own matching builds, which are not on an index.
`requirements.py LOCK PATTERN ...` keeps only distributions that match a pattern, such as `nvidia-*`; `!triton` excludes one.
Standard library only.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path

# Left out if the base has torch: provided by the base, or not needed. CUDA comes with the base's torch.
WITH_TORCH = ("torch", "torchvision", "torchaudio", "torchcodec", "triton", "pytorch-triton", "nvidia-*", "cuda-*")
# Compiled against one exact torch version; left out only if the base has the distribution.
BUILT_AGAINST_TORCH = (
    *(
        "vllm",
        "transformer-engine*",
        "flash-attn*",
        "flashinfer*",
        "xformers",
        "xgrammar",
        "apex",
        "deep-*",
        "tilelang",
    ),
    *("apache-tvm-ffi", "quack-kernels", "torch-c-dlpack-ext", "humming-kernels*", "fastsafetensors", "tokenspeed*"),
)


def entries(lock: str) -> Iterator[tuple[str, str]]:
    """(normalised name, text with its hashes) of every requirement."""
    for text in re.split(r"^(?=[A-Za-z0-9])", lock, flags=re.MULTILINE):
        name = re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", text)
        if name:
            yield re.sub(r"[-_.]+", "-", name[0]).lower(), text


def matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def left_to_base(names: Sequence[str], present: dict[str, str]) -> set[str]:
    """The subset of `names` that is left to a base image with the distributions `present`."""
    if "torch" not in present:
        return set()
    return {
        name for name in names if matches(name, WITH_TORCH) or (name in present and matches(name, BUILT_AGAINST_TORCH))
    }


def installed() -> dict[str, str]:
    """Distributions of this interpreter: normalised name -> version."""
    found = {}
    for distribution in metadata.distributions():
        if distribution.metadata["Name"]:
            found[re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower()] = distribution.version
    return found


def main(lock: str, *patterns: str) -> None:
    """Print the requirements to install; report on stderr what is left out and why."""
    requirements = dict(entries(Path(lock).read_text(encoding="utf-8")))
    if patterns:
        out = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
        wanted = {n for n in requirements if matches(n, patterns) and not matches(n, out)}
    else:
        present = installed()
        kept = left_to_base(list(requirements), present)
        for name in sorted(kept):
            print(f"left to the base image: {name} {present.get(name, '(not needed)')}", file=sys.stderr)
        wanted = requirements.keys() - kept
    print("".join(text for name, text in requirements.items() if name in wanted), end="")


if __name__ == "__main__":
    main(*sys.argv[1:])
