"""`infer evaluate` against lm-evaluation-harness's own command line, `lm_eval run`: every number to the last digit."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from lm_eval.utils import sanitize_list

from tests.tools.infer.http_server import Server

WORKER = Path(__file__).with_name("harness_worker.py")
ROLLING = """
task: held_out
dataset_path: json
dataset_kwargs: {data_files: held_out.jsonl}
output_type: loglikelihood_rolling
test_split: train
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}, {metric: word_perplexity}, {metric: byte_perplexity}]
metadata: {version: 1.0}
"""
GROUP = """
group: questions
task:
  - next_word
  - task: word_after_two
    dataset_path: json
    dataset_kwargs: {data_files: {test: choices.jsonl, train: choices.jsonl}}
    output_type: multiple_choice
    fewshot_split: train
    test_split: test
    num_fewshot: 2
    doc_to_text: "{{q}}"
    doc_to_choice: "{{choices}}"
    doc_to_target: "{{gold}}"
    metric_list: [{metric: acc}, {metric: acc_norm}]
aggregate_metric_list: [{metric: acc, weight_by_size: true}, {metric: acc_norm, weight_by_size: false}]
"""
NEXT_WORD = """
task: next_word
dataset_path: json
dataset_kwargs: {data_files: {test: choices.jsonl, train: choices.jsonl}}
output_type: loglikelihood
training_split: train
test_split: test
doc_to_text: "{{q}}"
doc_to_target: "{{choices[gold]}}"
metric_list: [{metric: perplexity}, {metric: acc}]
"""
WRITES = """
task: writes
dataset_path: json
dataset_kwargs: {data_files: {test: choices.jsonl, train: choices.jsonl}}
output_type: generate_until
training_split: train
test_split: test
doc_to_text: "{{q}}"
doc_to_target: "{{choices[gold]}}"
generation_kwargs: {until: ["q"], do_sample: false, max_gen_toks: 6}
filter_list:
  - {name: words, filter: [{function: regex, regex_pattern: "([a-z]+)"}, {function: take_first}]}
metric_list: [{metric: exact_match}, {metric: bleu}]
"""
TASKS = ("held_out", "questions", "writes")
NUMBERS = ("results", "groups", "group_subtasks", "versions", "n-shot", "higher_is_better", "n-samples")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("harness")
    files = {"held_out": ROLLING, "questions": GROUP, "next_word": NEXT_WORD, "writes": WRITES}
    for name, text in files.items():
        (directory / f"{name}.yaml").write_text(text)
    draw = random.Random(3)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "dogs", "lazy"]
    texts = [" ".join(draw.choices(words, k=count)) for count in (3, 60, 150)]  # the context has 128 tokens
    (directory / "held_out.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    rows = []
    for count in (2, 5, 3, 9, 4, 200):  # the last prompt is cut
        choices = draw.sample(words, 3)
        rows.append({"q": " ".join(draw.choices(words, k=count)), "choices": choices, "gold": draw.randrange(3)})
    (directory / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


# The harness's own command, and ours. Batches are equal: their sums differ in the last digit.
CASES = {
    "vllm": (
        ["--model", "vllm", "--batch_size", "64", "--num_fewshot", "1", "--gen_kwargs", "max_gen_toks=9"],
        ["--num-fewshot", 1, "--generation-argument", "max_gen_toks=9"],
    ),
    "hf": (
        ["--model", "hf", "--batch_size", "4", "--seed", "7", "--gen_kwargs", "do_sample=True,temperature=0.8"],
        ["--batch-size", 4, "--seed", 7, "--generation-argument", "do_sample=true,temperature=0.8"],
    ),
    "hf, chat template": (
        ["--model", "hf", "--batch_size", "4", "--num_fewshot", "1", "--apply_chat_template"],
        ["--batch-size", 4, "--num-fewshot", 1, "--apply-chat-template"],
    ),
}


@pytest.fixture(scope="module")
def ours(launcher, models, tasks, tmp_path_factory):
    """A function from a case to the result that infer publishes; made once."""
    made: dict[str, Path] = {}

    def evaluated(case: str) -> Path:
        if case not in made:
            engine, target = case.partition(",")[0], tmp_path_factory.mktemp("ours") / "result"
            words = ("--source", models("llama"), "--target", target, "--engine", engine, "--precision", "fp32")
            named = ",".join(str(tasks / f"{name}.yaml") for name in TASKS)
            done = launcher("evaluate", *words, "--tasks", named, *CASES[case][1], "--keep-samples")
            assert done.code == 0, done.stderr
            made[case] = target
        return made[case]

    return evaluated


@pytest.mark.parametrize("case", CASES)
def test_results_are_those_of_the_harness_command_line(case, ours, launcher, models, tasks, tmp_path):
    theirs, _ = CASES[case]
    engine = case.partition(",")[0]
    source = models("llama")
    # The same KV cache as infer's; the default takes most of the memory. The harness's cache of logits is off: it is wrong.
    further = {
        "vllm": ",enforce_eager=True,kv_cache_memory_bytes=50000000,max_num_seqs=32",
        "hf": ",logits_cache=False",
    }
    arguments = f"pretrained={source},dtype=float32{further[engine]}"
    command = ["--model_args", arguments, "--tasks", "held_out,questions,writes", "--include_path", tasks]
    command += ["--output_path", tmp_path / "harness", "--log_samples", *(["--device", "cpu"] * (engine == "hf"))]
    done = launcher(WORKER, tasks, *theirs, *command)
    assert done.code == 0, done.stderr
    (written,) = (tmp_path / "harness").glob("*/results_*.json")
    wanted = json.loads(written.read_text())

    out = ours(case)
    found = json.loads((out / "results.json").read_text())

    assert {name: found[name] for name in NUMBERS} == {name: wanted[name] for name in NUMBERS}
    assert found["results"]["next_word"]["perplexity_stderr,none"] > 0  # of the bootstrap
    assert found["results"]["questions"]["acc,none"] > 0
    assert found["task_hashes"] == wanted["task_hashes"]
    assert set(found) >= set(wanted)
    assert set(found["config"]) >= set(wanted["config"]) - {
        *("model_num_parameters", "model_dtype", "model_revision", "model_sha")
    }
    for name in ("config", "max_length", "eot_token_id"):
        assert (found[name]["fewshot_seed"] if name == "config" else found[name]) == (
            wanted[name]["fewshot_seed"] if name == "config" else wanted[name]
        )
    for task in wanted["task_hashes"]:
        (theirs_of,) = written.parent.glob(f"samples_{task}_*.jsonl")
        rows = [json.loads(line) for line in (out / f"samples_{task}.jsonl").read_text().splitlines()]
        other = [json.loads(line) for line in theirs_of.read_text().splitlines()]
        # The harness writes numbers as texts there.
        assert [sanitize_list(row["filtered_resps"]) for row in rows] == [row["filtered_resps"] for row in other]
    if "chat template" in case:
        (row,) = [json.loads(line) for line in (out / "samples_next_word.jsonl").read_text().splitlines()][:1]
        assert row["arguments"][0][0].startswith("<user>"), "the template was not used"
    page = (out / "report.html").read_text()
    assert page.count("<table>") == 5  # the results, and the examples of four tasks
    assert f"{found['results']['held_out']['bits_per_byte,none']:.4f}" in page


def test_results_of_a_server_are_those_of_its_engine(ours, launcher, models, tasks, tmp_path):
    source = models("llama")
    (tmp_path / "keys").write_text("secret\n")
    key = ("--api-key-file", tmp_path / "keys", "--served-model-name", "mine")
    server = Server(launcher, "serve", "--source", source, "--port", 0, "--precision", "fp32", *key)
    named = ",".join(str(tasks / f"{name}.yaml") for name in TASKS)
    words = ("evaluate", "--source", source, "--tasks", named, *CASES["vllm"][1], "--keep-samples")
    done = launcher(*words, "--target", tmp_path / "out", "--url", server.url, *key)
    assert done.code == 0, done.stderr
    assert server.stop().code == 0

    here, there = (json.loads((path / "results.json").read_text()) for path in (ours("vllm"), tmp_path / "out"))
    assert there["engine"] == "server"
    assert there["config"]["model_args"]["base_url"] == server.url
    for task, values in here["results"].items():
        for name, value in values.items():
            # Other batches: the last digits of sums differ.
            wanted = pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
            assert there["results"][task][name] == wanted, (task, name)
    assert there["n-samples"] == here["n-samples"]
    files = [path / "samples_writes.jsonl" for path in (ours("vllm"), tmp_path / "out")]
    one, other = ([json.loads(line)["resps"] for line in file.read_text().splitlines()] for file in files)
    assert one == other
