"""The engine interface on vLLM and transformers, against float64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

CONTRACT = Path(__file__).with_name("contract.py")
PROMPTS = ["The quick", "def f(x): return", "lazy dog. " * 9]
PAIRS = [("The quick", " brown fox"), ("The quick", " lazy dog"), ("", "def f(x)")]
# A text cut at every letter: where a cut is inside a token, the first letters of the rest join the context's last token.
PAIRS += [("The quick fox"[:cut], "The quick fox"[cut:]) for cut in range(1, 13)]
TOKENS, CONTEXT, EOS = 12, 128, 0
PENALISED = 40  # tokens: some come more than once
PENALTIES = {"presence_penalty": 1.5, "frequency_penalty": 1.5}


@pytest.fixture(scope="module")
def reference(models):
    """What transformers' model computes in float64, without a cache, one sequence at a time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = models("llama")
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64)

    def log_probabilities(ids: list[int]):
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0].log_softmax(-1)

    def continued(
        ids: list[int],
        tokens: int,
        penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
    ) -> list[int]:
        new: list[int] = []
        while len(new) < tokens and new[-1:] != [EOS]:
            with torch.no_grad():
                logits = model(torch.tensor([[*ids, *new]])).logits[0, -1]
            times = torch.bincount(torch.tensor(new, dtype=torch.long), minlength=len(logits))  # of the reply alone
            # https://developers.openai.com/api/docs/guides/advanced-usage#frequency-and-presence-penalties
            logits -= frequency_penalty * times + presence_penalty * (times > 0)
            seen = sorted({*ids, *new})  # arXiv:1909.05858, section 4.1
            logits[seen] = torch.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
            new.append(int(logits.argmax()))
        return new

    merged: list[bool] = []

    def scored(context: str, text: str) -> float:
        before = tokenizer(context)["input_ids"] or [EOS]
        whole = tokenizer(context + text)["input_ids"]
        joined = whole[: len(before)] != before or len(whole) == len(before)
        if context.endswith(" "):  # the harness gives it to the word after it
            before, joined = whole[: len(tokenizer(context.rstrip())["input_ids"])], False
        own = tokenizer(text)["input_ids"] if joined or not context else whole[len(before) :]
        merged.append(joined and len(whole) <= len(before))
        ids = [*before, *own]
        known = log_probabilities(ids)[:-1].gather(-1, torch.tensor(ids)[1:, None])
        return float(known[len(before) - 1 :].sum())

    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    log_likelihoods = [scored(*pair) for pair in PAIRS]
    assert any(merged)  # the harness would count such a rest as certain
    greedy = continued(prompts[0], TOKENS)
    text = tokenizer.decode(greedy, skip_special_tokens=True)
    known = log_probabilities([*prompts[0], *greedy])[len(prompts[0]) - 1 : -1]
    return {
        "text": text,
        "stop": text[len(text) // 2 :][:3],
        "penalty": continued(prompts[0], TOKENS, penalty=1.5),
        "unpenalised": continued(prompts[0], PENALISED),
        **{name: continued(prompts[0], PENALISED, **{name: value}) for name, value in PENALTIES.items()},
        "logprobs": [
            [(token, float(row[token])), *((int(each), float(row[each])) for each in row.topk(2).indices)]
            for token, row in zip(greedy, known, strict=True)
        ],
        "prompts": prompts,
        "greedy": [continued(ids, TOKENS) for ids in prompts],
        "full": continued(prompts[0], CONTEXT - len(prompts[0])),
        "log_likelihoods": log_likelihoods,
        "decode": lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
    }


# The checkpoint is fp32, and without --precision every engine computes in it.
@pytest.fixture(scope="module", params=["vllm", "hf", "vllm fp32", "hf fp32"])
def answer(request, launcher, models, reference, tmp_path_factory):
    path = tmp_path_factory.mktemp("contract") / request.param.replace(" ", "-")
    engine, *precision = request.param.split()
    given = {"prompts": reference["prompts"], "pairs": PAIRS, "tokens": TOKENS, "stop": reference["stop"]}
    given |= {"penalties": PENALTIES, "penalised": PENALISED}
    path.with_suffix(".json").write_text(json.dumps(given))
    done = launcher(CONTRACT, engine, models("llama"), path, *precision)
    assert done.code == 0, done.stderr
    return json.loads(path.with_suffix(".out.json").read_text())


def ends_as_it_says(sample: dict) -> bool:
    """Whether the end-of-sequence token is the last one of a "stop", and nowhere else."""
    return (EOS in sample["tokens"]) == (sample["finish_reason"] == "stop") and EOS not in sample["tokens"][:-1]


def test_greedy_tokens_are_the_most_likely_ones(answer, reference):
    for (sample,), wanted in zip(answer["greedy"], reference["greedy"], strict=True):
        assert sample["tokens"] == wanted
        assert sample["text"] == reference["decode"](wanted)
        assert ends_as_it_says(sample)


def test_the_context_is_the_models_and_ends_a_completion(answer, reference):
    assert answer["context_length"] == CONTEXT
    assert answer["full"]["tokens"] == reference["full"]
    assert ends_as_it_says(answer["full"])


def test_streamed_pieces_are_the_same_text(answer):
    for pieces, (sample,) in zip(answer["streamed"], answer["greedy"], strict=True):
        assert "".join(pieces) == sample["text"]
        assert len(pieces) > TOKENS / 2  # as it is generated, not at the end


def test_samples_depend_on_their_seed_and_not_on_the_batch(answer):
    tokens = [sample["tokens"] for sample in answer["sampled"]]
    assert answer["beside"][1] == answer["sampled"]
    assert len({tuple(ids) for samples in answer["beside"] for ids in [s["tokens"] for s in samples]}) == 3 * len(
        tokens
    )
    assert all(ends_as_it_says(sample) for sample in answer["sampled"])
    assert {"stop", "length"} == {s["finish_reason"] for samples in answer["beside"] for s in samples}


def test_the_smallest_nucleus_is_the_most_likely_token(answer, reference):
    for sample in answer["nucleus"]:
        assert sample["tokens"][:TOKENS] == reference["greedy"][0][: len(sample["tokens"])]


@pytest.mark.parametrize("name", ["top_k", "min_p"])
def test_the_narrowest_choice_is_the_most_likely_token(name, answer, reference):
    for sample in answer[name]:
        assert sample["tokens"][:TOKENS] == reference["greedy"][0][: len(sample["tokens"])]


def test_a_stop_text_ends_a_completion_and_is_no_part_of_it(answer, reference):
    found, text = answer["stop"], reference["text"]
    assert found["finish_reason"] == "stop"
    assert found["text"] == text[: text.index(reference["stop"])]
    assert found["tokens"] == reference["greedy"][0][: len(found["tokens"])]
    assert reference["stop"] in reference["decode"](found["tokens"])


def test_a_repetition_penalty_is_of_prompt_and_completion(answer, reference):
    assert answer["penalty"]["tokens"] == reference["penalty"] != reference["greedy"][0]


@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_of_the_reply_alone_are_vllms(name, answer, reference):
    if answer["engine"] == "hf":
        assert answer[name] == f"here: {name} is vLLM's; transformers has none, leave it out"
        return
    others = [reference["unpenalised"], *(reference[other] for other in PENALTIES if other != name)]
    assert reference[name] not in others
    assert answer[name] == reference[name]


def test_log_probabilities_equal_a_float64_computation(answer, reference):
    found, wanted = answer["logprobs"]["logprobs"], reference["logprobs"]
    assert [[number for number, _ in known] for known in found] == [[number for number, _ in known] for known in wanted]
    values = [value for known in found for _, value in known]
    assert values == pytest.approx([value for known in wanted for _, value in known], rel=1e-5)
    assert answer["greedy"][0][0]["logprobs"] is None


def test_log_likelihoods_equal_a_float64_computation(answer, reference):
    found = [value for value, _ in answer["log_likelihoods"]]
    assert found == pytest.approx(reference["log_likelihoods"], rel=1e-5)  # fp32 log-probabilities: about 1e-6 each
