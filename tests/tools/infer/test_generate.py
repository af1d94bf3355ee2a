"""`infer generate` against transformers, on the fake engine, and its errors."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from shared.checkpoint.directory.open import open_checkpoint
from shared.checkpoint.directory.publish import publish
from shared.cli import invoked
from shared.errors import StageError, UserError
from shared.families import registry
from tests.tools.infer.engines.double import EngineDouble
from tests.tools.infer.test_prompts import KNOWS_TOOLS, TOOLS
from tools.infer import generate
from tools.infer.engines.engine import EngineSettings
from tools.infer.engines.sampling import Sampling

PROMPTS = ["The quick", "def f(x): return", "lazy dog. " * 9, "x", "brown fox jumps over the"]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(directory: Path) -> list[dict]:
    text = (directory / "generations.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize(
    ("family", "flags"), [("llama", ("--precision", "fp32")), ("llama", ()), ("qwen2", ()), ("qwen3", ())]
)
def test_greedy_tokens_equal_those_of_transformers(family, flags, launcher, models, greedy, tmp_path):
    source = models(family)
    rows = [{"id": index, "prompt": prompt} for index, prompt in enumerate(PROMPTS)]
    if family == "llama":
        rows.append({"id": len(rows), "messages": [{"role": "user", "content": "fox?"}], "tags": ["kept"]})
    prompts = write(tmp_path / "prompts.jsonl", rows)
    command = ("generate", "--source", source, "--prompts", prompts, "--target", tmp_path / "out")
    command += (*flags, "--max-tokens", 24)

    done = launcher(*command)
    assert done.code == 0, done.stderr
    answers = read(tmp_path / "out")
    assert [{k: row[k] for k in given} for row, given in zip(answers, rows, strict=True)] == rows
    wanted = [greedy(source, row.get("prompt") or row["messages"], 24) for row in rows]
    assert [row["completion"] for row in answers] == wanted
    assert len(set(wanted)) == len(wanted)  # a degenerate model would agree on anything
    for row in answers:
        assert row["completion_tokens"] == 24 if row["finish_reason"] == "length" else row["finish_reason"] == "stop"

    facts = open_checkpoint(tmp_path / "out", kinds=("result",), flag="--source").facts
    assert facts["rows"] == len(rows)
    assert facts["completion_tokens"] == sum(row["completion_tokens"] for row in answers)
    again = launcher(*command)
    assert again.code == 0
    assert "already done" in again.stderr
    other = launcher(*command, "--temperature", "0.5")
    assert other.code == 2
    assert "--overwrite" in other.stderr


def test_samples_depend_on_the_seed_and_not_on_the_batch(launcher, models, tmp_path):
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "The quick"}, {"prompt": "The quick"}])

    def sample(name: str, *flags: object) -> list[dict]:
        target = tmp_path / name
        words = ("--source", models("llama"), "--prompts", prompts, "--target", target, "--precision", "fp32")
        done = launcher("generate", *words, "--temperature", 2, "--samples", 2, "--max-tokens", 12, *flags)
        assert done.code == 0, done.stderr
        rows = read(target)
        assert all(len(row["completions"]) == len(row["completion_tokens"]) == 2 for row in rows)
        return [row["completions"] for row in rows]

    # Temperature 2 is almost uniform: equal texts are no chance.
    together, apart, other = sample("a"), sample("b", "--batch-size", 1), sample("c", "--seed", 7)
    assert together == apart
    assert together != other
    assert (
        len({text for texts in together for text in texts}) == 4
    )  # each sample of each row has a random stream of its own


def test_a_damaged_directory_is_refused(launcher, models, tmp_path):
    source = tmp_path / "model"
    with invoked("convert", "init", {}), publish(source, kind="hf", inputs={}) as out:
        for file in models("llama").iterdir():
            (out.path / file.name).write_bytes(file.read_bytes())
    weights = source / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "x"}])
    done = launcher("generate", "--source", source, "--prompts", prompts, "--target", tmp_path / "out")
    assert done.code == 2
    assert "model.safetensors" in done.stderr
    assert "damaged" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_prompt_that_does_not_fit_is_named(launcher, models, tmp_path):
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "x"}, {"prompt": "The fox " * 80}])
    done = launcher("generate", "--source", models("llama"), "--prompts", prompts, "--target", tmp_path / "out")
    assert done.code == 2
    assert "prompts.jsonl:2: the prompt has" in done.stderr
    assert "--max-model-len" in done.stderr


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"architectures": ["WaterwheelForCausalLM"]}, "WaterwheelForCausalLM"),
        ({"architectures": ["YiForCausalLM"], "model_type": "Yi"}, "then `convert to-hf --family llama`"),
        ({"architectures": ["InternLM2ForCausalLM"], "bias": True}, "does not compute bias = True of config.json"),
    ],
)
def test_models_that_vllm_does_not_support_are_refused(launcher, models, tmp_path, change, says):
    source = tmp_path / "model"
    source.mkdir()
    for file in models("llama").iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text()) | change
    (source / "config.json").write_text(json.dumps(config))
    refused(launcher, source, tmp_path, says)


def test_transformers_runs_what_vllm_lacks_and_vllm_named_is_a_refusal(launcher, models, greedy, tmp_path):
    """Heads of 16: vLLM has no kernel for them on a CPU."""
    source = models("llama", head_dim=16)
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": PROMPTS[0]}])
    words = ("generate", "--source", source, "--prompts", prompts, "--target", tmp_path / "out", "--max-tokens", 12)
    named = launcher(*words, "--engine", "vllm")
    assert named.code == 2
    assert "no attention for heads of 16, only 32" in named.stderr
    done = launcher(*words)
    assert done.code == 0, done.stderr
    assert (
        "engine: transformers, which generates one sequence at a time, since vLLM does not run this model: --source"
        in done.stderr
    )
    assert [row["completion"] for row in read(tmp_path / "out")] == [greedy(source, PROMPTS[0], 12)]
    assert open_checkpoint(tmp_path / "out", kinds=("result",), flag="--source").facts["engine"] == "hf"


def test_a_row_s_own_sampling(launcher, models, greedy, tmp_path):
    """Beside a row without one. The model is random: only the schema makes it write JSON."""
    schema = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 9}}, "required": ["a"]}
    schema |= {"additionalProperties": False}
    text = greedy(models("llama"), PROMPTS[0], 24)
    rows = [
        {"prompt": PROMPTS[0]},
        {"prompt": PROMPTS[0], "sampling": {"stop": text[5:8], "logprobs": 1}},
        {"prompt": PROMPTS[0], "sampling": {"max_tokens": 3, "samples": 2, "temperature": 1}},
        {"prompt": PROMPTS[0], "sampling": {"json_schema": schema, "max_tokens": 100}},
        # Temperature 2 is almost uniform: what repeats is no chance.
        *({"prompt": PROMPTS[0], "sampling": {"temperature": 2, "seed": seed}} for seed in (7, 7, 8)),
        *({"prompt": PROMPTS[0], "sampling": {"temperature": 2} | narrow} for narrow in ({"top_k": 1}, {"min_p": 1.0})),
        {"prompt": PROMPTS[0], "sampling": {"repetition_penalty": 1.5}},
    ]
    prompts = write(tmp_path / "prompts.jsonl", rows)
    words = ("--source", models("llama"), "--prompts", prompts, "--target", tmp_path / "out", "--max-tokens", 24)
    done = launcher("generate", *words)
    assert done.code == 0, done.stderr
    plain, stopped, sampled, schemed, *seeded, by_count, by_share, penalised = read(tmp_path / "out")
    assert plain["completion"] == text
    assert stopped["completion"] == text[: text.index(text[5:8])]
    assert stopped["finish_reason"] == "stop"
    assert "".join(known[0]["token"] for known in stopped["logprobs"]).startswith(stopped["completion"])
    assert sampled["completion_tokens"] == [3, 3]
    assert len(sampled["completions"]) == 2
    assert isinstance(json.loads(schemed["completion"])["a"], int)
    assert schemed["sampling"] == rows[3]["sampling"]
    first, same, other = (row["completion"] for row in seeded)
    assert first == same != other
    assert by_count["completion"] == by_share["completion"] == text
    assert penalised["completion"] == greedy(models("llama"), PROMPTS[0], 24, repetition_penalty=1.5) != text


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"sampling": {"temprature": 1}}, '"sampling" has no "temprature"; it has frequency_penalty, json_schema'),
        ({"sampling": {"temperature": 3}}, '"sampling": temperature: Input should be less than or equal to 2'),
        ({"sampling": {"max_tokens": "9"}}, '"sampling": max_tokens: Input should be a valid integer'),
        ({"sampling": {"stop": [""]}}, '"sampling": stop.0: String should have at least 1 character'),
        ({"sampling": {"json_schema": {"type": "objekt"}}}, "json_schema is no JSON Schema: 'objekt' is not valid"),
        ({"sampling": [1]}, '"sampling" is an object, such as {"temperature": 0.7}'),
        ({"chat_template_kwargs": "x"}, '"chat_template_kwargs" is an object, such as {"enable_thinking": false}'),
        ({"logprobs": 1}, 'the output adds a field "logprobs"'),
    ],
)
def test_a_mistake_in_a_row_is_named(row, says, double, models, tmp_path):
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "x"}, {"prompt": "x"} | row])
    with pytest.raises(UserError, match="prompts.jsonl:2: ") as refused:
        generate_with_double(models("llama"), prompts, tmp_path / "out", 1)
    assert says in str(refused.value)
    assert double.calls == []


def test_transformers_refuses_what_it_lacks_before_it_loads(launcher, models, tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "x"}])
    words = ("generate", "--source", models("llama"), "--prompts", prompts, "--target", tmp_path / "out")
    done = launcher(*words, "--engine", "hf", "--json-schema", schema)
    assert done.code == 2
    assert "prompts.jsonl:1: json_schema is vLLM's; transformers has none" in done.stderr
    done = launcher(*words, "--engine", "hf", "--batch-size", 2)
    assert (done.code, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "--batch-size 2: transformers generates one sequence at a time; leave it out" in done.stderr
    schema.write_text("[]")
    assert "is not a JSON object" in launcher(*words, "--json-schema", schema).stderr


def test_a_template_argument_of_the_command_and_of_a_row(double, models, tmp_path):
    source = tmp_path / "model"
    source.mkdir()
    for file in models("llama").iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}{% if shout %}!{% endif %}{{ shout }}")
    talk = {"messages": [{"role": "user", "content": "fox"}]}
    prompts = write(tmp_path / "prompts.jsonl", [talk, talk | {"chat_template_kwargs": {"shout": "dog"}}])
    sampling, settings = Sampling(max_tokens=9), EngineSettings(max_model_len=64)
    with invoked("infer", "generate", {}):
        generate.run(
            *(source, prompts, tmp_path / "out"),
            sampling=sampling,
            settings=settings,
            overwrite=False,
            template_argument=("shout=1",),
        )
    tokenizer = AutoTokenizer.from_pretrained(source)
    assert [tokenizer.decode(request.prompt) for request in double.requests] == ["fox!1", "fox!dog"]


def test_the_tools_of_a_row_are_in_its_prompt_and_in_the_output(double, models, tmp_path):
    source = shutil.copytree(models("llama"), tmp_path / "model")
    (source / "chat_template.jinja").write_text(KNOWS_TOOLS.replace("in tools", "in tools or []"))
    talk = {"messages": [{"role": "user", "content": "fox"}]}
    prompts = write(tmp_path / "prompts.jsonl", [talk, talk | {"tools": TOOLS}])
    generate_with_double(source, prompts, tmp_path / "out", 1)
    tokenizer = AutoTokenizer.from_pretrained(source)
    assert [tokenizer.decode(request.prompt) for request in double.requests] == ["fox", "[weather]fox"]
    assert [row.get("tools") for row in read(tmp_path / "out")] == [None, TOOLS]
    prompts = write(tmp_path / "prompts.jsonl", [talk, {"prompt": "fox", "tools": TOOLS}])
    with pytest.raises(UserError, match='prompts.jsonl:2: "tools" are rendered by the chat template'):
        generate_with_double(source, prompts, tmp_path / "refused", 1)


def test_a_model_of_an_older_vllm_is_refused_with_its_version(launcher, models, tmp_path):
    source = tmp_path / "model"
    source.mkdir()
    (source / "model.safetensors").write_bytes((models("llama") / "model.safetensors").read_bytes())
    config = registry.to_config(registry.sizes()["baichuan2-13b"])
    (source / "config.json").write_text(json.dumps(config))
    refused(launcher, source, tmp_path, "computes the same; the last vLLM that carries it is 0.23.0")


def refused(launcher, source, tmp_path, says):
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "x"}])
    done = launcher("generate", "--source", source, "--prompts", prompts, "--target", tmp_path / "out")
    assert done.code == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_gated_delta_nets_are_bf16_only_without_a_gpu(launcher, models, tmp_path):
    source = tmp_path / "model"
    source.mkdir()
    for file in models("llama").iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text())
    config |= {f"linear_{name}": 32 for name in ("key_head_dim", "value_head_dim", "num_value_heads")}
    (source / "config.json").write_text(json.dumps(config))
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "x"}])
    words = ("generate", "--source", source, "--prompts", prompts, "--target", tmp_path / "out", "--precision", "fp32")
    done = launcher(*words, "--engine", "vllm")
    assert done.code == 2
    assert "gated delta nets in bf16 only; give --precision bf16" in done.stderr


@pytest.fixture
def double(monkeypatch):
    """The engine that `generate` opens, without a model."""
    double = EngineDouble()
    monkeypatch.setattr(generate, "open_engine", double.open)
    return double


def generate_with_double(source: Path, prompts: Path, target: Path, samples: int) -> None:
    sampling = Sampling(max_tokens=9, temperature=1.0, top_p=0.5, samples=samples, seed=100)
    settings = EngineSettings(max_model_len=64, seed=100)
    with invoked("infer", "generate", {}):
        generate.run(source, prompts, target, sampling=sampling, settings=settings, overwrite=False)


@pytest.mark.parametrize("samples", [1, 2])
def test_rows_are_completed_by_any_engine(samples, double, models, tmp_path):
    rows = [{"prompt": text, "id": text} for text in ("fox", "dog", "lazy")]
    prompts = write(tmp_path / "prompts.jsonl", rows)
    generate_with_double(models("llama"), prompts, tmp_path / "out", samples)
    assert double.calls == ["load", "close"]
    seeds = [request.sampling.seed for request in double.requests]
    assert seeds == [100 + index * samples for index in range(3)]
    answers = read(tmp_path / "out")
    assert [row["id"] for row in answers] == ["fox", "dog", "lazy"]  # though the last one finishes first
    texts = [[str(seed + sample) for sample in range(samples)] for seed in seeds]
    if samples == 1:
        assert [row["completion"] for row in answers] == [text for (text,) in texts]
        assert {row["finish_reason"] for row in answers} == {"length"}
    else:
        assert [row["completions"] for row in answers] == texts
        assert [row["completion_tokens"] for row in answers] == [[1, 2]] * 3
    facts = open_checkpoint(tmp_path / "out", kinds=("result",), flag="--source").facts
    assert facts["engine"] == "double"
    assert facts["completion_tokens"] == 3 * sum(range(1, samples + 1))
    assert facts["prompt_tokens"] == sum(row["prompt_tokens"] for row in answers)


def test_what_is_finished_is_kept_and_the_rest_is_done_after_a_stop(models, monkeypatch, tmp_path):
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": text} for text in ("fox", "dog", "lazy", "quick")])
    whole = EngineDouble()
    monkeypatch.setattr(generate, "open_engine", whole.open)
    generate_with_double(models("llama"), prompts, tmp_path / "whole", 2)

    class Stopped(EngineDouble):
        """Told to stop after two prompts."""

        def generate(self, requests):
            for number, finished in enumerate(super().generate(requests)):
                if number == 2:
                    raise SystemExit(75)
                yield finished

    stopped, rest = Stopped(), EngineDouble()
    monkeypatch.setattr(generate, "open_engine", stopped.open)
    with pytest.raises(SystemExit):
        generate_with_double(models("llama"), prompts, tmp_path / "out", 2)
    (partial,) = tmp_path.glob("out.partial-*")
    with (partial / ".journal").open("a") as file:
        file.write('{"prompt": 1, "sam')  # as a kill in the middle of a line leaves it
    monkeypatch.setattr(generate, "open_engine", rest.open)
    generate_with_double(models("llama"), prompts, tmp_path / "out", 2)
    assert [request.prompt for request in rest.requests] == [request.prompt for request in whole.requests[:2]]
    assert read(tmp_path / "out") == read(tmp_path / "whole")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["generations.jsonl", "manifest.json"]


def test_what_is_finished_is_kept_when_the_engine_crashes(models, monkeypatch, tmp_path):
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": text} for text in ("fox", "dog", "lazy", "quick")])

    class Crashing(EngineDouble):
        """Dies after two prompts, in the middle of a batch."""

        def generate(self, requests):
            finished = super().generate(requests)
            yield next(finished)
            yield next(finished)
            raise RuntimeError("EngineCore died\nsee above")

    crashing, rest = Crashing(), EngineDouble()
    monkeypatch.setattr(generate, "open_engine", crashing.open)
    with pytest.raises(StageError, match=r"^stopped by RuntimeError \(EngineCore died\); 2 of 4 prompts are finished"):
        generate_with_double(models("llama"), prompts, tmp_path / "out", 2)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(generate, "open_engine", rest.open)
    generate_with_double(models("llama"), prompts, tmp_path / "out", 2)
    assert len(rest.requests) == 2
    assert len(read(tmp_path / "out")) == 4


def test_after_kill_9_the_same_command_gives_the_same_rows(models, tmp_path):
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": f"fox {n}"} for n in range(60)])
    worker = [sys.executable, "-m", "tests.tools.infer.generate_worker", models("llama"), prompts]
    killed = subprocess.Popen([*worker, tmp_path / "out"], stderr=subprocess.DEVNULL)
    finished: list[str] = []
    while len(finished) < 4:  # the journal's head and three prompts
        assert killed.poll() is None
        time.sleep(0.01)
        finished = [line for file in tmp_path.glob("out.partial-*/.journal") for line in file.read_text().splitlines()]
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    for target in ("out", "whole"):
        done = subprocess.run([*worker, tmp_path / target], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert ("resuming: " in done.stderr) == (target == "out")
    assert read(tmp_path / "out") == read(tmp_path / "whole")


def test_a_prompt_that_does_not_fit_is_found_before_the_model_is_loaded(double, models, tmp_path):
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "The fox " * 80}])
    with pytest.raises(UserError, match="prompts.jsonl:1: the prompt has"):
        generate_with_double(models("llama"), prompts, tmp_path / "out", 1)
    assert double.calls == ["close"]
