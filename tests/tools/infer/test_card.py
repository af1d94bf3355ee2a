"""`infer card`: huggingface_hub reads the results that the card has."""

from __future__ import annotations

import shutil

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from shared.checkpoint.directory.open import open_checkpoint
from shared.cli import invoked
from shared.errors import UserError
from tests.tools.infer.test_compare import evaluated, question
from tools.infer import card

THEIRS = b"---\nlicense: mit\ntags:\n- chat\n---\n\n# Mine\r\n\nBy hand: \xe4.\n"


def published(source, results, target, *, overwrite=False):
    with invoked("infer", "card", {}):
        card.run(source, results, target, overwrite=overwrite)


def test_results_go_into_the_front_matter_and_nothing_else(models, monkeypatch, tmp_path):
    source = tmp_path / "model"
    shutil.copytree(models("llama"), source)
    (source / "README.md").write_bytes(THEIRS)
    (tasks := tmp_path / "tasks").mkdir()
    question(tasks, "mine", "num_fewshot: 1")
    result = evaluated(source, tasks / "mine.yaml", tmp_path / "result", monkeypatch)
    published(source, (result,), tmp_path / "out")

    text = (tmp_path / "out/README.md").read_bytes()
    assert text.endswith(THEIRS.partition(b"---\n\n")[2])
    (tmp_path / "card.md").write_bytes(text.decode(errors="replace").encode())
    data = ModelCard.load(tmp_path / "card.md").data
    assert data.license == "mit"
    assert data.tags == ["chat"]
    (entry,) = data.eval_results
    assert (entry.dataset_name, entry.dataset_type, entry.metric_type) == ("mine", "mine", "acc")
    assert (entry.metric_value, entry.dataset_args, entry.dataset_split) == (0.0, {"num_few_shot": 1}, "test")
    opened = open_checkpoint(tmp_path / "out", kinds=("hf",), flag="--source")
    weights = next(name for name in opened.manifest.files if name.endswith(".safetensors"))
    assert (tmp_path / "out" / weights).samefile(source / weights)
    assert (source / "README.md").read_bytes() == THEIRS

    # Measured again with other examples before each question: both stand; the same again: replaced.
    more = evaluated(tmp_path / "out", tasks / "mine.yaml", tmp_path / "more", monkeypatch, num_fewshot=2)
    edited = (tmp_path / "out/README.md").read_bytes() + b"\nAnd a note.\n"
    (tmp_path / "out/README.md").write_bytes(edited)  # after it was published and measured
    published(tmp_path / "out", (more,), tmp_path / "both")
    assert (tmp_path / "both/README.md").read_bytes().endswith(b"By hand: \xe4.\n\nAnd a note.\n")
    again = evaluated(tmp_path / "both", tasks / "mine.yaml", tmp_path / "again", monkeypatch, num_fewshot=2)
    published(tmp_path / "both", (again,), tmp_path / "third")
    _, entries = model_index_to_eval_results(card.card_fields(tmp_path / "third/README.md")["model-index"])
    assert [each.dataset_args["num_few_shot"] for each in entries] == [1, 2]


def test_a_result_of_another_model_is_refused(models, monkeypatch, tmp_path):
    (tasks := tmp_path / "tasks").mkdir()
    result = evaluated(models("qwen3"), question(tasks, "mine"), tmp_path / "result", monkeypatch)
    with pytest.raises(UserError, match="was measured on qwen3, which is not --source"):
        published(models("llama"), (result,), tmp_path / "out")
    assert not (tmp_path / "out").exists()
