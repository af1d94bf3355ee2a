"""A fake engine: repeats the prompt's last token, scores every byte with one bit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from lm_eval.api.model import LM

from tools.infer.engines.engine import Completion, EngineSettings, Request
from tools.infer.engines.sampling import Sampling


class EngineDouble:
    """Stands for a back end; remembers how it was used."""

    name = "double"
    context_length = 64

    def __init__(self) -> None:
        self.settings: EngineSettings | None = None
        self.requests: list[Request] = []
        self.calls: list[str] = []

    def open(self, source: Any, settings: EngineSettings) -> EngineDouble:
        """Called in place of `open_engine`."""
        self.settings = settings
        return self

    def check(self, sampling: Sampling, place: str) -> None:
        """It takes everything."""

    def load(self) -> None:
        self.calls.append("load")

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, list[Completion]]]:
        self.requests += requests
        for index, request in reversed(list(enumerate(requests))):  # the last request finishes first
            yield index, [self._completed(request, sample) for sample in range(request.sampling.samples)]

    def stream(self, request: Request) -> Iterator[str]:
        self.requests.append(request)
        yield from ("an", "swer ", str(len(self.requests)))

    def harness_model(self) -> LM:
        self.calls.append("load")
        return _Scores()

    def close(self) -> None:
        self.calls.append("close")

    def _completed(self, request: Request, sample: int) -> Completion:
        tokens = request.prompt[-1:] * (sample + 1)
        return Completion(text=f"{request.sampling.seed + sample}", tokens=tokens, finish_reason="length")


class _Scores(LM):
    """A bit for every byte."""

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        return [-math.log(2) * len(request.args[0].encode()) for request in requests]

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        return [(-math.log(2) * len(request.args[1].encode()), False) for request in requests]

    def generate_until(self, requests: list[Any]) -> list[str]:
        return ["" for _ in requests]
