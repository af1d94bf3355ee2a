"""`infer generate` on the transformers engine, in a process that a test kills: SOURCE PROMPTS TARGET."""

import sys
from pathlib import Path

from shared.cli import invoked
from tools.infer import generate
from tools.infer.engines.engine import EngineSettings
from tools.infer.engines.sampling import Sampling

if __name__ == "__main__":
    source, prompts, target = map(Path, sys.argv[1:])
    sampling = Sampling(max_tokens=24, temperature=1.0, top_p=1.0, seed=5)
    settings = EngineSettings(engine="hf", precision="fp32", seed=5)
    with invoked("infer", "generate", {}):
        generate.run(source, prompts, target, sampling=sampling, settings=settings, overwrite=False)
