"""vLLM in this process."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.console import log
from shared.errors import UserError
from tools.infer.engines.engine import Completion, EngineSettings, Request, pieces
from tools.infer.engines.sampling import Sampling
from tools.infer.engines.scoring import CheckedRequests
from tools.infer.engines.vllm_arguments import REQUIRED, engine_arguments
from tools.infer.engines.vllm_directory import directory_for_vllm, shown
from tools.infer.engines.vllm_support import check_supported, model_config, reason, refusals
from tools.infer.environment import on_gpu
from tools.infer.source import check_weights

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from vllm import LLM, RequestOutput, SamplingParams

_UNLIMITED = 1_000_000_000  # sequences


class VllmEngine:
    """A model in vLLM: continuous batching, CUDA graphs on GPU."""

    name = "vllm"

    def __init__(self, source: Path, settings: EngineSettings) -> None:
        self._arguments, self._context_length = checked_arguments(source, settings)
        self._llm: LLM | None = None

    @property
    def context_length(self) -> int:
        return self._context_length

    def check(self, sampling: Sampling, place: str) -> None:
        try:
            sampling_params(sampling)
        except ValueError as error:
            raise UserError(f"{place}: vLLM refuses the sampling: {reason(error)}") from None

    def load(self) -> None:
        if self._llm is None:
            self._llm = load(self._arguments)

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, list[Completion]]]:
        from vllm.sampling_params import RequestOutputKind

        # with any other kind, each output has one sample only
        final = RequestOutputKind.FINAL_ONLY
        sampled = (
            (request.prompt, sampling_params(request.sampling, output_kind=final, n=request.sampling.samples))
            for request in requests
        )

        def request_of(output: RequestOutput) -> Request:
            return requests[int(output.request_id)]

        for output in self._run(sampled):
            if output.finished:
                ordered = sorted(output.outputs, key=lambda completion: completion.index)
                yield (
                    int(output.request_id),
                    [
                        Completion(
                            text=c.text,
                            tokens=list(c.token_ids),
                            finish_reason=str(c.finish_reason),
                            logprobs=_logprobs(c, request_of(output).sampling.logprobs),
                        )
                        for c in ordered
                    ],
                )

    def stream(self, request: Request) -> Iterator[str]:
        outputs = self._run([(request.prompt, sampling_params(request.sampling))])
        return pieces((output.outputs[0].text, output.finished) for output in outputs)

    def harness_model(self) -> LM:
        from lm_eval.models.vllm_causallms import VLLM

        class Model(CheckedRequests, VLLM):
            longest_continuation = self._context_length - 2

        assert self._llm is None, "the harness's class loads the model itself"
        announce(self._arguments)
        arguments = dict(self._arguments)
        source = arguments.pop("model")
        # vLLM does its own batching. "auto" passes all requests at once too, and shows a progress bar.
        size = "auto" if sys.stderr.isatty() else _UNLIMITED
        with refusals(source):
            model = Model(pretrained=source, batch_size=size, **arguments)
        self._llm = model.model
        return model

    def close(self) -> None:
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None

    def _run(self, prompts: Iterable[tuple[list[int], SamplingParams]]) -> Iterator[RequestOutput]:
        """Outputs of all prompts, numbered from 0, as they are generated; `finished` marks a prompt's last output."""
        from vllm import TokensPrompt

        self.load()
        assert self._llm is not None
        engine = self._llm.llm_engine
        names = []
        for index, (ids, sampling) in enumerate(prompts):
            names.append(str(index))
            engine.add_request(names[-1], TokensPrompt(prompt_token_ids=ids), sampling)
        try:
            while engine.has_unfinished_requests():
                yield from engine.step()
        finally:
            if engine.has_unfinished_requests():  # the caller wants no more
                engine.abort_request(names)


def checked_arguments(
    source: Path, settings: EngineSettings, further: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], int]:
    """vLLM's keyword arguments and the context length. UserError if vLLM does not support the model on this machine.

    `further`: arguments that the user gives in vLLM's own words; they replace ours.
    """
    check_supported(source)
    arguments = engine_arguments(source, settings) | {"model": str(directory_for_vllm(source))}
    if fixed := REQUIRED.intersection(arguments).intersection(further or ()):
        raise UserError(f"--{fixed.pop().replace('_', '-')}: this model needs infer's own on a CPU; leave it out")
    arguments |= further or {}
    context_length = model_config(arguments).max_model_len
    check_weights(source)
    return arguments, context_length


def sampling_params(sampling: Sampling, **further: Any) -> SamplingParams:
    """vLLM's `SamplingParams`; vLLM seeds sample i of a request with `seed + i`."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    same = (
        *("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "logprobs"),
        *("repetition_penalty", "presence_penalty", "frequency_penalty"),
    )
    schema = sampling.json_schema
    return SamplingParams(
        **{name: getattr(sampling, name) for name in same},
        stop=list(sampling.stop),
        structured_outputs=None if schema is None else StructuredOutputsParams(json=schema),
        **further,
    )


def _logprobs(completion: Any, alternatives: int | None) -> list[list[tuple[int, float]]] | None:
    """vLLM's `{id: Logprob}` of each token, the token's own first; ranks count from 1."""
    if alternatives is None:
        return None
    found = []
    for token, known in zip(completion.token_ids, completion.logprobs, strict=True):
        likely = sorted((each.rank, number, each.logprob) for number, each in known.items())
        own = (token, known[token].logprob)
        found.append([own, *((number, value) for rank, number, value in likely if rank <= alternatives)])
    return found


def announce(arguments: Mapping[str, Any]) -> None:
    """Log model and device."""
    log(f"loading {shown(arguments['model'])} with vLLM on {'GPU' if on_gpu() else 'CPU'}")


def load(arguments: Mapping[str, Any]) -> LLM:
    """Load the model into vLLM. UserError if vLLM rejects it."""
    from vllm import LLM

    announce(arguments)
    with refusals(arguments["model"]):
        return LLM(**arguments)
