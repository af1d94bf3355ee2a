"""`infer rollouts`: a server that samples from the policy of a trainer.

What a trainer needs of it is HTTP alone: `POST /v1/completions` with token ids, `return_token_ids`, `logprobs: 0` and one seed
a reply; `POST` and `GET /v1/policy`. One request with one seed gives equal prompts equal replies.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from shared.errors import UserError
from tools.infer import serve
from tools.infer.engines.engine import EngineSettings

# By default vLLM gives log-probabilities before the temperature, and takes top_k, penalties and the like that a request does not
# set from generation_config.json: it would sample from another distribution than the trainer computes.
SAMPLING = {"logprobs_mode": "processed_logprobs", "generation_config": "vllm"}


def run(
    source: Path,
    policies: Path | None,
    *,
    broadcasts: bool,
    lora_rank: int | None,
    server: serve.ServerSettings,
    settings: EngineSettings,
) -> None:
    """Serve until a signal, as `tools.infer.serve.run`; directories below `policies` and `broadcasts` may become the policy.

    With `lora_rank`, LoRA adapters of `source` below `policies` become it, and nothing else.
    """
    if lora_rank is not None and (broadcasts or policies is None):
        raise UserError(
            f"--lora-rank {lora_rank}: adapters are taken from --policies; give it, and leave --broadcasts out"
        )
    if policies is None and not broadcasts:
        raise UserError("--policies: give the folder below which the trainer publishes, or --broadcasts, or both")
    flag = "--broadcasts" if policies is None else "--policies"
    server = replace(server, weights_below=policies, broadcasts=broadcasts, weights_flag=flag, engine=SAMPLING)
    server = replace(server, lora_rank=lora_rank, policy_adapters=lora_rank is not None)
    serve.run(source, server=server, settings=settings)
