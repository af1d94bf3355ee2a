"""Peaks of GPUs: those that MFU is reported by, and an assumption for each number that a time is made of."""

from shared.rehearsal.machine import GPUS
from shared.rehearsal.speed import SPEEDS
from shared.report.metrics import peak_flops


def test_peaks_are_those_of_mfu() -> None:
    names = {"a100-40": "NVIDIA A100-SXM4-40GB", "a100-80": "NVIDIA A100-SXM4-80GB", "l40s": "NVIDIA L40S"}
    names |= {"h100-80": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200", "b200": "NVIDIA B200"}
    assert SPEEDS.keys() == GPUS.keys() == names.keys()
    for name, speed in SPEEDS.items():
        assert speed.matrix == peak_flops(names[name]), name
        assert speed.matrix <= speed.matrix_fp8 <= 2.1 * speed.matrix
        assert speed.network < speed.link < speed.memory


def test_every_number_is_said() -> None:
    text = "\n".join(SPEEDS["h200"].lines(4))
    for said in (
        "989 TFLOP/s",
        "1,979 in FP8",
        "4,800 GB/s",
        "450 GB/s within a node of 4 GPUs",
        "50 GB/s",
        "70%",
        "75%",
        "80%",
        "3 us",
    ):
        assert said in text
    assert "8 x 400 Gb/s" in text
