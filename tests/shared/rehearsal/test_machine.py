"""Kinds of GPU, and sizes as they are given."""

import pytest

from shared.errors import UserError
from shared.rehearsal.machine import GPUS, RESERVE, GiB, parse_memory
from shared.report.metrics import peak_flops


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("80GiB", 80 * GiB),
        ("81559MiB", 81559 * 2**20),
        ("80GB", 80 * 10**9),
        ("4.5GiB", int(4.5 * GiB)),
        ("40000 MB", 4 * 10**10),
    ],
)
def test_sizes_have_units(text, size) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["80", "80 gib", "GiB", "-80GiB", "4GiB", "0.5GiB", "1e3GiB", ""])
def test_other_sizes_are_refused(text) -> None:
    with pytest.raises(UserError, match="--gpu-memory"):
        parse_memory(text)


def test_a_kind_has_less_memory_than_its_name_says() -> None:
    """The driver lists a few percent less than decimal gigabytes of the data sheet; and what is kept free is not usable."""
    sheet = {"a100-40": 40, "a100-80": 80, "l40s": 48, "h100-80": 80, "h200": 141, "b200": 192}
    assert GPUS.keys() == sheet.keys()
    for name, gpu in GPUS.items():
        assert 0.93 < gpu.memory / (sheet[name] * GiB) <= 1.0
        assert gpu.usable == gpu.memory - RESERVE
        assert peak_flops(f"NVIDIA {gpu.title}") is not None, "a GPU that the training's MFU knows"
