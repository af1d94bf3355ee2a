"""Results of an engine as JSON: `contract.py ENGINE DIRECTORY REQUESTS [PRECISION]`. Run in a fork of the launcher.

REQUESTS.json holds token ids of prompts, pairs of texts to score and the number of tokens to generate. Writes REQUESTS.out.json.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance

from shared.errors import UserError
from tools.infer.engines.engine import Completion, Engine, EngineSettings, Request, open_engine
from tools.infer.engines.sampling import Sampling

SAMPLES = 8


def all_of(engine: Engine, requests: list[Request]) -> list[list[Completion]]:
    """The completions of each request, in the order of the requests."""
    finished = dict(engine.generate(requests))
    assert sorted(finished) == list(range(len(requests)))
    return [finished[index] for index in range(len(requests))]


def main(name: str, source: Path, given: dict[str, Any], precision: Any = None) -> dict[str, Any]:
    engine = open_engine(source, EngineSettings(engine=name, precision=precision, batch_size=4))
    assert isinstance(engine, Engine)
    assert engine.name == name
    answer: dict[str, Any] = {"engine": engine.name, "context_length": engine.context_length}
    lm = engine.harness_model()
    scored = [
        Instance(request_type="loglikelihood", doc={}, metadata=("pairs", index, 1), arguments=tuple(pair), idx=index)
        for index, pair in enumerate(given["pairs"])
    ]
    answer["log_likelihoods"] = lm.loglikelihood(scored)
    engine.load()  # the weights are there already

    greedy = Sampling(max_tokens=given["tokens"], temperature=0.0, top_p=1.0)
    requests = [Request(prompt=ids, sampling=greedy) for ids in given["prompts"]]
    answer["greedy"] = [[asdict(sample) for sample in samples] for samples in all_of(engine, requests)]
    left = engine.stream(Request(prompt=given["prompts"][0], sampling=greedy.model_copy(update={"max_tokens": 100})))
    next(left)
    left.close()  # type: ignore[attr-defined] -- a generator
    answer["streamed"] = [list(engine.stream(request)) for request in requests]
    full = Sampling(max_tokens=10_000, temperature=0.0, top_p=1.0)
    (answer["full"],) = all_of(engine, [Request(prompt=given["prompts"][0], sampling=full)])[0]
    answer["full"] = asdict(answer["full"])

    def sampled(seed: int, **changes: Any) -> Request:
        sampling = Sampling(max_tokens=60, temperature=2.0, samples=SAMPLES, seed=seed, **({"top_p": 1.0} | changes))
        return Request(prompt=given["prompts"][0], sampling=sampling)

    alone = all_of(engine, [sampled(5)])[0]
    beside = all_of(engine, [sampled(500), sampled(5), sampled(900)])
    answer["sampled"] = [asdict(sample) for sample in alone]
    answer["beside"] = [[asdict(sample) for sample in samples] for samples in beside]
    for name, changes in {"top_k": {"top_k": 1}, "min_p": {"min_p": 1.0}}.items():
        answer[name] = [asdict(sample) for sample in all_of(engine, [sampled(5, **changes)])[0]]
    own = {"stop": {"stop": (given["stop"],)}, "logprobs": {"logprobs": 2}, "penalty": {"repetition_penalty": 1.5}}
    requests = [
        Request(prompt=given["prompts"][0], sampling=greedy.model_copy(update=changes)) for changes in own.values()
    ]
    answer |= {name: asdict(samples[0]) for name, samples in zip(own, all_of(engine, requests), strict=True)}
    for name, value in given["penalties"].items():
        penalised = greedy.model_copy(update={"max_tokens": given["penalised"], name: value})
        try:
            engine.check(penalised, "here")
        except UserError as refused:
            answer[name] = str(refused)
        else:
            (samples,) = all_of(engine, [Request(prompt=given["prompts"][0], sampling=penalised)])
            answer[name] = samples[0].tokens
    answer["nucleus"] = [asdict(sample) for sample in all_of(engine, [sampled(5, top_p=1e-6)])[0]]
    engine.close()
    return answer


if __name__ == "__main__":
    path = Path(sys.argv[3])
    result = main(sys.argv[1], Path(sys.argv[2]), json.loads(path.with_suffix(".json").read_text()), *sys.argv[4:])
    path.with_suffix(".out.json").write_text(json.dumps(result))
