"""`infer evaluate`: held-out bits per byte against a computation in float64, on both engines."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from shared.checkpoint.directory.open import open_checkpoint
from shared.cli import invoked
from shared.errors import UserError
from tests.tools.infer.engines.double import EngineDouble
from tools.infer import evaluate
from tools.infer.engines.engine import EngineSettings
from tools.infer.evaluate import table

HELD_OUT = """
task: held_out
dataset_path: json
dataset_kwargs: {data_files: held_out.jsonl}
output_type: loglikelihood_rolling
test_split: train
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""
LENGTH = """
task: length
dataset_path: json
dataset_kwargs: {data_files: held_out.jsonl}
output_type: generate_until
test_split: train
doc_to_text: "{{text[:20]}}"
doc_to_target: ""
process_results: !function metrics.length
generation_kwargs: {until: [], do_sample: false, max_gen_toks: 5}
metric_list: [{metric: length, aggregation: mean, higher_is_better: true}]
"""
METRICS = "def length(doc, results):\n    return {'length': float(len(results[0]) > 0)}\n"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("tasks")
    (directory / "held_out.yaml").write_text(HELD_OUT)
    (directory / "length.yaml").write_text(LENGTH)
    (directory / "metrics.py").write_text(METRICS)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "dogs"]
    draw = random.Random(0)
    texts = [" ".join(draw.choices(words, k=3 + 45 * n)) for n in range(5)]
    (directory / "held_out.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return directory


def bits_per_byte(source: Path, texts: list[str], window: int, change=lambda model: None) -> float:
    """Held-out bits per byte in float64, with the harness's windows.

    A text, after an end-of-text token, is predicted `window` tokens at a time, each window reading what it predicts and
    the one token before. What is left for the last window is fewer; it reads further back, to be as long.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64)
    change(model)
    nats = 0.0
    for text in texts:
        ids = [tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]
        for done in range(0, len(ids) - 1, window):
            end = min(done + window, len(ids) - 1)
            piece = torch.tensor([ids[max(0, end - window) : end + 1]])
            with torch.no_grad():
                logits = model(piece[:, :-1]).logits
            assert logits.dtype == torch.float64
            chosen = torch.log_softmax(logits, -1).gather(-1, piece[:, 1:, None])
            nats -= chosen[:, done - end :].sum().item()
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def test_bits_per_byte_equals_a_float64_computation_on_both_engines(launcher, models, tasks, tmp_path):
    source = models("llama")
    texts = [json.loads(line)["text"] for line in (tasks / "held_out.jsonl").read_text().splitlines()]
    # The context is 128, of which the harness keeps two positions free for vLLM. Long texts are cut into windows.
    wanted = {"vllm": bits_per_byte(source, texts, window=126), "hf": bits_per_byte(source, texts, window=128)}
    assert wanted["hf"] != pytest.approx(wanted["vllm"], rel=1e-4)  # other windows give another value
    found = {}
    whole, one = ("--tasks", tasks), ("--tasks", tasks / "held_out.yaml")
    fp32 = ("--precision", "fp32")  # as the checkpoint: the default is tested too
    for name, flags in {"vllm": whole, "hf": one, "vllm-fp32": (*one, *fp32), "hf-fp32": (*one, *fp32)}.items():
        target, engine = tmp_path / name, name.partition("-")[0]
        words = ("evaluate", "--source", source, "--target", target, "--engine", engine)
        done = launcher(*words, *flags, "--keep-samples")
        assert done.code == 0, done.stderr
        assert "held_out" in done.stdout
        results = json.loads((target / "results.json").read_text())
        found[name] = results["results"]["held_out"]["bits_per_byte,none"]
        facts = open_checkpoint(target, kinds=("result",), flag="--source").facts
        assert facts["metrics"]["held_out"]["bits_per_byte"] == found[name]
        assert len((target / "samples_held_out.jsonl").read_text().splitlines()) == len(texts)
    # fp32 log-probabilities carry a relative error of about 1e-6; sums over hundreds of tokens average it.
    assert found == {name: pytest.approx(wanted[name.partition("-")[0]], rel=2e-5) for name in found}
    assert wanted["hf"] > 1  # a random model

    results = json.loads((tmp_path / "vllm/results.json").read_text())
    assert results["results"]["length"]["length,none"] == 1.0
    again = launcher("evaluate", "--source", source, "--tasks", tasks / "held_out.yaml", "--target", tmp_path / "hf")
    assert again.code == 2  # other options: refused, not silently redone
    assert "--overwrite" in again.stderr


def test_mpt_has_the_alibi_slopes_of_its_configuration(launcher, models, tasks, tmp_path):
    """transformers' class ignores alibi_bias_max."""
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    (source := tmp_path / "model").mkdir()
    for file in models("mpt").iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text())
    config["attn_config"]["alibi_bias_max"] = 2
    (source / "config.json").write_text(json.dumps(config))
    texts = [json.loads(line)["text"] for line in (tasks / "held_out.jsonl").read_text().splitlines()]

    def with_slopes(model):
        model.transformer.build_mpt_alibi_tensor = lambda *given, **where: build_mpt_alibi_tensor(*given, 2, **where)

    wanted = bits_per_byte(source, texts, window=128, change=with_slopes)
    assert wanted != pytest.approx(bits_per_byte(source, texts, window=128), rel=1e-3)
    words = ("--tasks", tasks / "held_out.yaml", "--max-model-len", 128, "--target", tmp_path / "out")
    done = launcher("evaluate", "--source", source, *words, "--engine", "hf", "--precision", "fp32")
    assert done.code == 0, done.stderr
    found = json.loads((tmp_path / "out/results.json").read_text())["results"]["held_out"]["bits_per_byte,none"]
    assert found == pytest.approx(wanted, rel=2e-5)


def test_a_changed_data_file_is_another_evaluation(launcher, models, tasks, tmp_path):
    for file in tasks.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    words = ("evaluate", "--source", models("llama"), "--tasks", tmp_path / "held_out.yaml", "--engine", "hf")
    words += ("--target", tmp_path / "out", "--limit", 2)
    assert launcher(*words).code == 0
    assert "already done" in launcher(*words).stderr
    (tmp_path / "held_out.jsonl").write_text('{"text": "another text"}\n')
    assert launcher(*words).code == 2


def test_a_missing_chat_template_is_refused(launcher, models, tasks, tmp_path):
    words = ("evaluate", "--source", models("qwen3"), "--tasks", tasks, "--target", tmp_path / "out")
    done = launcher(*words, "--apply-chat-template")
    assert done.code == 2
    assert "has no chat template" in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_table_lines_up():
    lines = table({"a": {"bits_per_byte": 1.25}, "longer": {"acc": 0.5}}, {"a": 10, "longer": 3}).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split() == ["a", "10", "bits_per_byte", "1.2500"]


# Of `evaluate.run`, as the command line gives them.
OPTIONS: dict = {
    "limit": None,
    "num_fewshot": None,
    "apply_chat_template": False,
    "keep_samples": True,
    "generation_argument": (),
    "bootstrap": 100,
    "seed": None,
    "overwrite": False,
}
QUESTION = """
task: NAME
dataset_path: json
dataset_kwargs: {data_files: {test: data.jsonl, train: data.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{q}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{metric: acc}]
"""


def question(directory: Path, name: str, *lines: str) -> Path:
    """A task of four questions with `lines` added to its file."""
    rows = [{"q": f"fox {n}", "choices": [" jumps", " dog"]} for n in range(4)]
    (directory / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "user.py").write_text("def raises(*given):\n    raise KeyError('gold label')\n")
    (path := directory / f"{name}.yaml").write_text(QUESTION.replace("NAME", name) + "\n".join(lines) + "\n")
    return path


def evaluate_with_double(source: Path, task: Path, monkeypatch, num_fewshot: int | None = None, **changes) -> dict:
    """results.json of a task on the double, in a fresh directory beside the task."""
    monkeypatch.setattr(evaluate, "open_engine", EngineDouble().open)
    out = task.parent / f"out-{num_fewshot}"
    with invoked("infer", "evaluate", {}):
        evaluate.run(
            source, (str(task),), out, **OPTIONS | {"num_fewshot": num_fewshot} | changes, settings=EngineSettings()
        )
    return json.loads((out / "results.json").read_text())


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["process_results: !function user.raises"], r"KeyError: 'gold label' \(user.py:2\)"),
        (["doc_to_text: !function user.raises"], r"KeyError: 'gold label' \(user.py:2\)"),
        (["metric_list: [{metric: acc, aggregation: !function user.raises}]"], r"KeyError: 'gold label' \(user.py:2\)"),
        (["doc_to_text: '{{question}}'"], "'question' is undefined"),
        (["fewshot_split: train", "num_fewshot: 20"], "num_fewshot 20, and the split train has 4 examples"),
        (["num_fewshot: 4"], "the split test has 3 examples besides the one that is asked"),
        (["process_docs: !function user.raises"], "cannot be loaded: KeyError: 'gold label'"),
    ],
)
def test_what_is_wrong_with_a_task_is_one_line_with_its_name(lines, says, models, monkeypatch, tmp_path):
    task = question(tmp_path, "mine", *lines)
    with pytest.raises(UserError, match=f"^--tasks mine: .*{says}") as caught:
        evaluate_with_double(models("llama"), task, monkeypatch)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out-None").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("max_gen_toks",), "--generation-argument max_gen_toks: write NAME=VALUE"),
        (("a=1", "a=2"), "--generation-argument a is given twice"),
        (("max_gen_toks=3",), "--generation-argument max_gen_toks: no task of --tasks generates text; leave it out"),
    ],
)
def test_generation_arguments_that_do_nothing_are_refused(words, says, models, monkeypatch, tmp_path):
    with pytest.raises(UserError, match=says):
        evaluate_with_double(models("llama"), question(tmp_path, "mine"), monkeypatch, generation_argument=words)


@pytest.mark.parametrize(
    ("given", "flag"),
    [({"engine": "hf"}, "engine"), ({"precision": "fp32"}, "precision"), ({"max_model_len": 9}, "max-model-len")],
)
def test_what_a_server_decides_is_no_flag_beside_it(given, flag):
    server = evaluate.ServerOptions(url="http://127.0.0.1:9", name=None, api_key_file=None)
    with pytest.raises(UserError, match=f"--{flag} is the server's own with --url; leave it out"):
        server.engine(Path("."), EngineSettings(**given))


def test_num_fewshot_goes_before_the_tasks_own_number(models, monkeypatch, tmp_path):
    task = question(tmp_path, "mine", "num_fewshot: 1")
    for given, count in ((None, 1), (3, 3)):
        results = evaluate_with_double(models("llama"), task, monkeypatch, given)
        assert results["n-shot"]["mine"] == count
        sample = json.loads((tmp_path / f"out-{given}/samples_mine.jsonl").read_text().splitlines()[0])
        context = sample["arguments"][0][0]
        assert context.count("jumps") == count
        assert context.count("fox 0") == 1  # the question itself is none of its examples


def test_a_group_is_its_tasks_and_their_mean(models, monkeypatch, tmp_path):
    for name in ("one", "two"):
        question(tmp_path, name)
    inline = QUESTION.replace("NAME", "three").strip().replace("\n", "\n    ")
    members = f"task:\n  - one\n  - task: two\n    num_fewshot: 1\n  - {inline}\n"
    (tmp_path / "group.yaml").write_text(f"group: all\n{members}aggregate_metric_list: [{{metric: acc}}]\n")
    results = evaluate_with_double(models("llama"), tmp_path / "group.yaml", monkeypatch)
    assert set(results["results"]) == {"all", "one", "two", "all::three"}
    assert results["n-shot"]["two"] == 1
    assert results["results"]["all"]["acc,none"] == 0.0  # " dog" is shorter


def test_tasks_are_evaluated_by_any_engine(models, tasks, monkeypatch, tmp_path, capsys):
    double = EngineDouble()
    monkeypatch.setattr(evaluate, "open_engine", double.open)
    settings = EngineSettings(batch_size=3)
    with invoked("infer", "evaluate", {}):
        held_out = (str(tasks / "held_out.yaml"),)
        evaluate.run(
            models("llama"), held_out, tmp_path / "out", **OPTIONS | {"limit": 2, "seed": 3}, settings=settings
        )
    assert double.settings == EngineSettings(batch_size=3, seed=3)
    assert double.calls == ["load", "close"]
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["engine"] == "double"
    assert results["results"]["held_out"]["bits_per_byte,none"] == 1.0
    assert results["n-samples"]["held_out"]["effective"] == 2
    assert len((tmp_path / "out/samples_held_out.jsonl").read_text().splitlines()) == 2
    assert "held_out" in capsys.readouterr().out
