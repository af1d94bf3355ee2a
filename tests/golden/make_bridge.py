"""Makes tests/golden/megatron-bridge: `tools/convert/.venv/bin/python tests/golden/make_bridge.py`.

`make peers` installs Megatron-Bridge. The files were written by megatron-bridge 0.3.1 with megatron-core 0.16.1,
transformers 4.57.6 and torch 2.13.0, on a CPU without TransformerEngine, by tests/peers/by_bridge.py. `hf` is the source,
`megatron` the result.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from shared.families import registry  # noqa: E402
from tests.tools.convert.conftest import write_hf  # noqa: E402

PEERS = ROOT / "tests" / "peers"
KEPT = ("config.json", "model.safetensors")
SMALL = {
    "hidden_size": 16,
    "mlp": {"ffn_hidden_size": 24},
    "attention": {"heads": 4, "groups": 2, "head_dim": 4},
    "head": {"tied": False},
}


def main() -> None:
    """Write both directories of each family; what is there already stops it."""
    for family in ("llama", "qwen3"):
        place = ROOT / "tests" / "golden" / "megatron-bridge" / family
        place.mkdir(parents=True)
        size = registry.sizes()["tiny" if family == "llama" else f"{family}-tiny"]
        write_hf(place / "hf", size.with_values(**SMALL, num_layers=2, vocab_size=259))
        for path in (place / "hf").iterdir():
            if path.name not in KEPT:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        bridge = [PEERS / ".venv/bin/python", PEERS / "by_bridge.py"]
        # Bridge writes the name of its source down: a name that is true on any machine.
        subprocess.run([*bridge, "to-megatron", "hf", "megatron"], cwd=place, check=True)


if __name__ == "__main__":
    main()
