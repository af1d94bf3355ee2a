"""What `make rehearsals` plays: rows of the table of big models, and the largest published size of each family."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from shared.architecture.architecture import Architecture
from shared.errors import UserError
from shared.families import registry
from shared.model.recompute import Recompute
from shared.model.support import check_supported
from shared.parallel import ParallelConfig
from shared.rehearsal.machine import GpuName
from shared.training import stage
from shared.training.config import TrainingConfig
from shared.training.options import TrainingOptions

PUBLISHED = Path(__file__).resolve().parents[1] / "shared" / "families" / "published"
GPU: GpuName = "h100-80"
FAMILY_GPUS = 1024


@dataclass(frozen=True, kw_only=True)
class Row:
    """A rehearsal."""

    model: str  # of PUBLISHED, or Llama-3.1-405B
    gpus: int
    layout: dict[str, Any] = field(hash=False)
    sequence_length: int = 4096
    global_batch_size: int
    recompute: Recompute = "none"

    @property
    def name(self) -> str:
        """Tells rows apart."""
        words = [f"{_SHORT[name]}{size}" for name, size in self.layout.items() if name in _SHORT]
        if layers := self.layout.get("pipeline_layers"):
            words.append(f"({layers[0]}+{len(layers) - 2}x{layers[1]}+{layers[-1]} layers)")
        full = f", recompute {self.recompute}" if self.recompute != "none" else ""
        gpus = f"{self.gpus} GPU{'s' * (self.gpus > 1)}"
        return f"{self.model}, {gpus}: {' '.join(words) or 'one rank'}, {self.sequence_length} tokens{full}"


_SHORT = {"tensor": "TP", "pipeline": "PP", "expert": "EP", "expert_tensor": "ETP"}
_TP8 = {"tensor": 8, "sequence_parallel": True}
_TP2 = {"tensor": 2, "sequence_parallel": True}
_DEEPSEEK = {**_TP2, "pipeline": 16, "pipeline_layers": (3, *(4,) * 14, 2), "expert": 64, "expert_tensor": 1}
_KIMI = {**_TP8, "pipeline": 16, "pipeline_layers": (3, *(4,) * 14, 2), "expert": 64, "expert_tensor": 1}
_QWEN = {**_TP2, "pipeline": 8, "pipeline_layers": (11, *(12,) * 6, 11), "expert": 32, "expert_tensor": 1}
_LLAMA = {**_TP8, "pipeline": 16, "pipeline_layers": (7, *(8,) * 14, 7)}

# A global batch of a micro batch of one sequence for each stage and data-parallel rank: as many as a rehearsal plays.
ROWS = (
    Row(model="Llama-3.2-1B", gpus=1, layout={}, global_batch_size=2),
    Row(model="Meta-Llama-3-8B", gpus=8, layout=_TP2, global_batch_size=8),
    Row(model="Meta-Llama-3-8B", gpus=8, layout={**_TP2, "pipeline": 2}, global_batch_size=4),
    Row(model="Qwen3-235B-A22B", gpus=256, layout=_QWEN, global_batch_size=128),
    Row(model="DeepSeek-V3", gpus=1024, layout=_DEEPSEEK, global_batch_size=512, recompute="full"),
    Row(model="Llama-3.1-405B", gpus=1024, layout=_LLAMA, sequence_length=8192, global_batch_size=128),
    Row(model="DeepSeek-V3", gpus=1024, layout=_DEEPSEEK, global_batch_size=512),
    Row(model="Kimi-K2-Instruct", gpus=1024, layout=_KIMI, global_batch_size=128),
    Row(
        model="Llama-3.1-405B",
        gpus=1024,
        layout=_LLAMA,
        sequence_length=8192,
        global_batch_size=128,
        recompute="full",
    ),
)


def base(row: Row) -> TrainingConfig:
    """A run, but for its layout."""
    options = TrainingOptions(
        source=Path("."),
        data=(),
        target=Path("."),
        global_batch_size=row.global_batch_size,
        micro_batch_size=1,
        processes=1,
    )
    return stage.plan(options, steps=1000, sequence_length=row.sequence_length)


def config_of(row: Row) -> TrainingConfig:
    """The run that is rehearsed."""
    parallel = ParallelConfig(processes=row.gpus, **row.layout)
    return replace(base(row), parallel=parallel, recompute=(row.recompute,))


def architecture_of(model: str) -> Architecture:
    """Of a published config.json. Llama-3.1-405B has the sizes of its paper (arXiv:2407.21783, table 3)."""
    if model == "Llama-3.1-405B":
        config = _published("Llama-3.1-8B") | {
            "hidden_size": 16384,
            "intermediate_size": 53248,
            "num_hidden_layers": 126,
            "num_attention_heads": 128,
            "num_key_value_heads": 8,
            "head_dim": 128,
        }
        return registry.from_config(config)
    return registry.from_config(_published(model))


def largest_of_each_family() -> dict[str, str]:
    """Model by family, of those that can be trained."""
    found: dict[str, tuple[int, str]] = {}
    for path in sorted(PUBLISHED.glob("*.json")):
        try:
            architecture = registry.from_config(_published(path.stem))
            check_supported(architecture)
        except UserError:
            continue
        size = architecture.parameter_count()
        if size > found.get(architecture.family, (0, ""))[0]:
            found[architecture.family] = (size, path.stem)
    return {family: model for family, (_, model) in sorted(found.items())}


def _published(model: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((PUBLISHED / f"{model}.json").read_text())["config"]
    return config
