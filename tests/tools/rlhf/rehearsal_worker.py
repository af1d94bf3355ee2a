"""An update of a DeepSpeed engine at each ZeRO stage, on a GPU that is not there: rank 0 of two, in a CUDA runtime of stubs.

Run as `python rehearsal_worker.py POLICY FILE` in an environment of `with_stubs`. Writes to `FILE`, as JSON, by stage: the device
and dtypes of what was computed, and where parameters are.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from shared.rehearsal import fake_world

fake_world.before_forking()

import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

COMPUTED = ("mm", "addmm", "bmm", "embedding", "_fused_adamw_")
STAGES = (0, 1, 2, 3)


class Computed(TorchDispatchMode):
    """Devices and dtypes of what takes time."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[str, str, str]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._opname
        if name in COMPUTED or "attention" in name:
            for each in tree_leaves(args):
                if isinstance(each, torch.Tensor) and each.is_floating_point() and each.dim():
                    self.found.add((name, each.device.type, str(each.dtype).removeprefix("torch.")))
        return func(*args, **(kwargs or {}))


def main(policy: Path, file: Path) -> None:
    fake_world.join(0, 2)
    os.environ["LOCAL_WORLD_SIZE"] = "1"
    from transformers import AutoModelForCausalLM

    from tools.rlhf.engines.deepspeed import DeepSpeedEngine, EngineOptions, initialize_distributed

    distributed = initialize_distributed()
    found = {}
    for zero in STAGES:
        model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.bfloat16)
        options = EngineOptions(zero=zero, precision="bf16", micro_batch_size=2, accumulation=2, max_gradient_norm=1.0)
        with Computed() as computed:
            engine = DeepSpeedEngine(model, options, distributed)
            engine.set_learning_rate(1e-3)
            for _ in range(options.accumulation):
                ids = torch.ones(2, 16, dtype=torch.long, device=distributed.device)
                logits = engine(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
                engine.backward(logits.float().log_softmax(-1).mean())
            engine.step()
        found[zero] = {
            "computed": sorted(computed.found),
            "parameters": sorted({(each.device.type, str(each.dtype)) for each in engine.module.parameters()}),
            "device": str(distributed.device),
        }
    file.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
