"""Options that several commands of `infer` have, and their ranges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from shared.cli import ExistingFile, NonNegative, Positive
from shared.precision import Precision
from tools.infer.engines.engine import EngineName, EngineSettings

Fraction = Annotated[float, Field(gt=0, le=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
RepetitionPenalty = Annotated[float, Field(gt=0, le=10)]
Logprobs = Annotated[int, Field(ge=0, le=20)]  # vLLM's default limit
Share = Annotated[float, Field(gt=0, lt=1)]  # of a GPU's memory
Temperature = Annotated[float, Field(ge=0, le=2)]  # vLLM's range
LoraRank = Literal[8, 16, 32, 64, 128, 256]
Port = Annotated[int, Field(ge=0, le=65535)]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How a model is loaded, in every command.

    Attributes:
        max_model_len: context length in tokens; by default the model's own.
        precision: by default the checkpoint's.
        tensor_parallel: GPUs that share the model.
    """

    max_model_len: Positive | None = None
    precision: Precision | None = None
    tensor_parallel: Positive = 1

    def settings(
        self, *, engine: EngineName | None = None, batch_size: int | None = None, seed: int = 0
    ) -> EngineSettings:
        """These options with those that not every command has."""
        return EngineSettings(
            engine=engine,
            precision=self.precision,
            max_model_len=self.max_model_len,
            batch_size=batch_size,
            tensor_parallel=self.tensor_parallel,
            seed=seed,
        )


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """The server around a model.

    Attributes:
        host: address to listen on; 0.0.0.0 for all interfaces, which opens the server to other machines.
        port: port to listen on; 0 takes a free one.
        api_key_file: file of the keys, one a line, of which requests to /v1 must bear one. Other paths, /health and
            /metrics among them, need none.
        gpu_memory: share of each GPU's memory for weights, activations and KV cache; by default vLLM's.
        drain: seconds after SIGTERM in which requests in flight may finish.
    """

    host: str = "127.0.0.1"
    port: Port = 8000
    api_key_file: ExistingFile | None = None
    gpu_memory: Share | None = None
    drain: NonNegative = 60
