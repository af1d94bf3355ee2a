"""The record of a run: metrics.jsonl, one line per update and per validation, and the same numbers for TensorBoard."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from shared.architecture.architecture import Architecture, GatedDeltaNet

METRICS = "metrics.jsonl"
EVENTS = "tensorboard"

# Dense bf16 tensor-core peak in FLOP/s, without sparsity, from the vendor's data sheets.
_PEAK_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
}


def flops_per_token(architecture: Architecture, sequence_length: int, *, mtp: bool = False) -> float:
    """Training FLOPs per token, forward and backward: 6 per weight of a matrix and 12 L s q for attention.

    The accounting of PaLM (arXiv:2204.02311, appendix B): no input embedding, no recomputation, attention not halved
    for causality. MoE: the experts that a token goes through. A gated delta net reads its state for the key and for the
    query, and adds to it: three products of the state's size. `mtp`: MTP layers are run; each is a layer, a projection,
    and the head once more.
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
        else:  # scores and values: 2 q where value heads are as large
            attention += (mixer.q_size + mixer.output_size) * sequence_length
    return 6.0 * (matrices + attention + states)


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """A loss in nats per token as bits per UTF-8 byte of text, which tokenizers of any vocabulary can be compared by."""
    return loss / math.log(2.0) / bytes_per_token


def peak_flops() -> float | None:
    """Peak of this rank's device in FLOP/s; None where it is not known, so that no MFU is reported."""
    if not torch.cuda.is_available():
        return None
    device = torch.cuda.get_device_name()
    return next((peak for name, peak in _PEAK_FLOPS.items() if name in device), None)


def peak_memory() -> int:
    """Bytes at most in use so far: of the device where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kibibytes * 1024


class Metrics:
    """Append-only record of a run, of which a resumed run forgets the updates it is about to repeat."""

    def __init__(self, directory: Path, *, resumed_step: int | None) -> None:
        """Open the record in `directory` and cut it back to `resumed_step` (None: start it anew)."""
        self.path = directory / METRICS
        kept = [row for row in read(self.path) if resumed_step is not None and row["step"] <= resumed_step]
        self.rows = kept
        partial = self.path.with_name(f"{METRICS}.partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(partial, self.path)
        self._file = self.path.open("a", encoding="utf-8")
        # purge_step makes TensorBoard drop what an interrupted run wrote past the resumed step.
        self._events = SummaryWriter(str(directory / EVENTS), purge_step=(resumed_step or 0) + 1)

    def append(self, **row: Any) -> None:
        """Record one row. It must have a `step`."""
        self.rows.append(row)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                self._events.add_scalar(name, value, row["step"])

    def sync(self) -> None:
        """Bring every row to the disk: before a checkpoint that will be resumed from is published."""
        os.fsync(self._file.fileno())
        self._events.flush()

    def close(self) -> None:
        self._file.close()
        self._events.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; none if it is not there. A last line cut short by a kill is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n"):
            print(f"{path}: the last line was cut short and is left out", file=sys.stderr)
            break
        rows.append(json.loads(line))
    return rows
