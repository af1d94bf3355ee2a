"""mbridge, called as its users call it: `by_mbridge.py to-megatron HF TARGET`, `by_mbridge.py to-hf MEGATRON HF TARGET`."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.peers.core import FUSIONS, layer, load, prepare, save

EXPERT = r"experts\.local_experts\.(\d+)\.(linear_fc[12]\.weight)$"


def bridge_of(hf: Path) -> tuple[Any, Any]:
    """mbridge's bridge of a Hugging Face directory, and a model without weights on the CPU."""
    from mbridge import AutoBridge
    from megatron.core import parallel_state
    from transformers import AutoConfig

    parallel_state.initialize_model_parallel()
    config = AutoConfig.from_pretrained(hf)
    config.rope_theta = config.rope_parameters["rope_theta"]  # mbridge 0.15.1 reads it where transformers 4 has it
    bridge = AutoBridge.from_config(config)
    off = dict.fromkeys(FUSIONS, False)
    bridge.set_extra_args(use_cpu_initialization=True, perform_initialization=False, **off)
    spec = layer(bridge.config.num_moe_experts, bridge.config.qk_layernorm)
    bridge._get_transformer_layer_spec = lambda stage=None: spec
    names = bridge._weight_name_mapping_mcore_local_to_global

    def grouped(*args: Any, **kwargs: Any) -> dict[str, str]:
        """Experts as mbridge knows them, all in one module."""
        return {name: re.sub(EXPERT, r"experts.\2\1", whole) for name, whole in names(*args, **kwargs).items()}

    bridge._weight_name_mapping_mcore_local_to_global = grouped
    model = bridge._model_provider([])(True, True)  # `get_model`, less the GPU that it moves the model to
    return bridge, model.bfloat16()


def to_megatron(hf: Path, target: Path) -> None:
    """mbridge fills a model; Megatron-Core saves it."""
    bridge, model = bridge_of(hf)
    bridge.load_weights([model], str(hf))
    save(model, target)


def to_hf(megatron: Path, hf: Path, target: Path) -> None:
    """Megatron-Core fills a model from a directory of `convert to-megatron`; mbridge writes it out."""
    bridge, model = bridge_of(hf)
    load(model, megatron)
    bridge.safetensor_io = bridge._get_safetensor_io(str(hf))
    bridge.save_weights([model], str(target))


if __name__ == "__main__":  # torch_dist's writer starts a process that imports this file
    prepare()
    {"to-megatron": to_megatron, "to-hf": to_hf}[sys.argv[1]](*map(Path, sys.argv[2:]))
