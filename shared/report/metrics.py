"""Metrics of a run: metrics.jsonl, one row per update and per validation, and the same values for trackers."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from shared.architecture.architecture import Architecture, GatedDeltaNet
from shared.report.track import DEFAULT, Track, Trackers

METRICS = "metrics.jsonl"
REPLIES = "replies.jsonl"  # of the model to prompts, in a training run

# Dense bf16 peak of matrix units in FLOP/s, without sparsity, from the vendors' data sheets. By words of the device's name.
_PEAK_FLOPS = {
    "A10": 125e12,
    "A30": 165e12,
    "A40": 150e12,
    "A100": 312e12,
    "A800": 312e12,
    "L4": 121e12,
    "L40": 181e12,
    "L40S": 362e12,
    "H20": 148e12,
    "H100": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H800": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "GB200": 2500e12,
    "MI300X": 1307e12,
    "MI325X": 1307e12,
}


def flops_per_token(architecture: Architecture, sequence_length: int, *, mtp: bool = False) -> float:
    """Training FLOPs per token, forward and backward: `6 N + 12 L s q`.

    N: weights of matrices. L: attention layers. s: sequence_length. q: heads x head_dim. The accounting of PaLM
    (arXiv:2204.02311, appendix B): no input embedding, no recomputation, attention not halved for causality.

    MoE: active experts only. Gated delta net: 3 x state size multiply-adds (read for the key, read for the query, update).
    `mtp`: MTP layers are run; each adds a layer, a projection and the output head.
    """
    embedding = architecture.vocab_size * architecture.table_size
    matrices = architecture.parameter_count(active=True) - (0 if architecture.head.tied else embedding)
    layers = list(architecture.layers)
    if mtp and architecture.mtp:
        matrices += architecture.mtp_parameter_count(active=True) + architecture.mtp.depth * embedding
        layers += [architecture.mtp.layer] * architecture.mtp.depth
    attention = states = 0
    for mixer in (layer.mixer for layer in layers):
        if isinstance(mixer, GatedDeltaNet):
            states += 3 * mixer.key_head_dim * mixer.value_size
        else:  # Q K^T and scores x V: 2 q if value heads are as large as query heads
            attention += (mixer.q_size + mixer.output_size) * sequence_length
    return 6.0 * (matrices + attention + states)


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """`loss / ln 2 / bytes_per_token`, from nats per token. Comparable between tokenizers."""
    return loss / math.log(2.0) / bytes_per_token


def device_name() -> str:
    """The name of this rank's GPU, or CPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def peak_flops(device: str) -> float | None:
    """Peak of a device in FLOP/s; None if unknown: no MFU is reported.

    `device`: from `device_name`, such as NVIDIA H100 80GB HBM3 or NVIDIA A100-SXM4-80GB.
    """
    words = set(re.split(r"[^0-9A-Za-z]+", device))
    fitting = [name for name in _PEAK_FLOPS if words.issuperset(name.split())]
    return _PEAK_FLOPS[max(fitting, key=len)] if fitting else None


def peak_memory() -> int:
    """Peak memory so far in bytes: of the GPU, or without one the RSS of this process."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_resident()


def peak_resident() -> int:
    """Peak RSS of this process in bytes, on Linux.

    `getrusage` would also count the parent's pages: its `ru_maxrss` survives the exec that starts a program (`exec_mmap`).
    """
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    [kibibytes] = re.findall(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return int(kibibytes) * 1024


class Rows:
    """An append-only file of JSON lines in a run directory, each with a `step`."""

    def __init__(self, path: Path, *, resumed_step: int | None) -> None:
        """Open it; a resume drops rows after `resumed_step`, None drops all."""
        self.path = path
        self.rows = [row for row in read(path) if resumed_step is not None and row["step"] <= resumed_step]
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
        os.replace(partial, path)
        self._file = path.open("a", encoding="utf-8")

    def append(self, **row: Any) -> None:
        """Record one row. It must have a `step`."""
        self.rows.append(row)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """fsync all rows; called before a checkpoint is published."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class Metrics(Rows):
    """Append-only metrics of a run."""

    def __init__(
        self,
        directory: Path,
        *,
        resumed_step: int | None,
        track: Sequence[Track] = DEFAULT,
        name: str | None = None,
    ) -> None:
        """Open the metrics in `directory`.

        `track`: trackers that get the same values, for a run called `name` (by default as its directory).
        """
        super().__init__(directory / METRICS, resumed_step=resumed_step)
        self._trackers = Trackers(track, directory, name=name or directory.name, resumed_step=resumed_step)

    def append(self, **row: Any) -> None:
        """Record one row. It must have a `step`."""
        super().append(**row)
        self._trackers.log(row["step"], {name: value for name, value in row.items() if name != "step"})

    def sync(self) -> None:
        """fsync all rows; called before a checkpoint is published."""
        super().sync()
        self._trackers.flush()

    def close(self) -> None:
        super().close()
        self._trackers.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; none without the file. An incomplete last line (a kill) is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n"):
            print(f"{path}: the last line is incomplete and ignored", file=sys.stderr)
            break
        rows.append(json.loads(line))
    return rows
