"""Model cards; huggingface_hub reads what is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from shared.checkpoint.directory.model_card import (
    BEGIN,
    CARD,
    END,
    Stage,
    card_fields,
    set_fields,
    write_adapter_card,
    write_card,
)

SFT = Stage(
    command="sft train",
    version="0.1.0",
    inputs=[("source", "llama-1b"), ("data", "chats")],
    figures={"step": 800, "loss": 1.23456},
)
PPO = Stage(command="rlhf ppo", version="0.2.0", inputs=[("source", "tuned"), ("data", "prompts")], figures={})
# CRLF, a comment and bytes that are no UTF-8: the text is somebody's own
THEIRS = (
    b"---\nlicense: llama3.2\nlicense_link: LICENSE\nlanguage: [en, de]\ndatasets: web\ntags:\n- chat\nbase_model: other\n"
    b"model-index:\n- name: llama-1b\n  results: []\n---\n\n# Llama 1B\r\n\n<!-- by hand -->\nScores 63 on \xe4.\n"
)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    return tmp_path


def test_a_card_says_where_the_weights_come_from(directory: Path) -> None:
    write_card(directory, SFT, name="tuned")
    card = ModelCard.load(directory / CARD)
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "base_model": "llama-1b",
        "base_model_relation": "finetune",
        "pipeline_tag": "text-generation",
        "datasets": ["chats"],
        "metrics": ["loss"],
    }
    assert card.text.startswith(f"\n{BEGIN}\n# tuned\n")
    assert "1. `sft train` 0.1.0: `--source llama-1b`, `--data chats`; step 800, loss 1.235\n" in card.text
    assert 'AutoModelForCausalLM.from_pretrained("tuned", dtype="auto")' in card.text


def test_the_base_s_text_and_licence_stay(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (directory / CARD).write_bytes(THEIRS)
    write_card(directory, SFT, name="tuned")
    written = (directory / CARD).read_bytes()
    assert written.endswith(THEIRS.partition(b"---\n\n")[2])
    assert b"What follows is the text of `llama-1b`" in written
    (directory / CARD).write_bytes(written.decode(errors="replace").encode())
    fields = ModelCard.load(directory / CARD).data.to_dict()
    assert fields["license"] == "llama3.2"
    assert fields["license_link"] == "LICENSE"
    assert fields["language"] == ["en", "de"]
    assert fields["tags"] == ["chat"]
    assert fields["base_model"] == "llama-1b"
    assert fields["datasets"] == ["web", "chats"]
    assert "model-index" not in fields
    assert "model-index left out, they are of --source" in capsys.readouterr().err


def test_the_next_stage_goes_on_with_the_lineage(directory: Path) -> None:
    write_card(directory, SFT, name="tuned")
    mine = (directory / CARD).read_text().replace(BEGIN, f"My words before.\n{BEGIN}") + "\nMy words after.\n"
    (directory / CARD).write_text(mine)
    (directory / "config.json").write_text(
        json.dumps({"architectures": ["LlamaForSequenceClassification"], "auto_map": {}})
    )
    write_card(directory, PPO, name="better")
    card = ModelCard.load(directory / CARD)
    assert card.data.base_model == "tuned"
    assert card.data.datasets == ["chats", "prompts"]
    assert card.data.pipeline_tag == "text-classification"
    assert card.text.startswith("\nMy words before.\n")
    assert card.text.endswith("\nMy words after.\n")
    assert "# better\n" in card.text
    assert "# tuned\n" not in card.text
    assert card.text.count(BEGIN) == card.text.count(END) == 1
    stages = [line for line in card.text.splitlines() if line.startswith("1. ")]
    assert [stage.split("`")[1] for stage in stages] == ["sft train", "rlhf ppo"]
    assert 'from_pretrained("better", dtype="auto", trust_remote_code=True)' in card.text
    again = (directory / CARD).read_text()
    assert "What follows" not in again


@pytest.mark.parametrize("front", ["---\n[a: b\n---\n", "---\n- a list\n---\n", "---\nno end\n"])
def test_front_matter_that_cannot_be_read_becomes_text(directory: Path, front: str) -> None:
    (directory / CARD).write_text(f"{front}# Base\n")
    write_card(directory, SFT, name="tuned")
    card = ModelCard.load(directory / CARD)
    assert card.data.base_model == "llama-1b"
    assert card.text.endswith(f"{front}# Base\n")


def test_a_class_of_another_task_gets_no_loader(directory: Path) -> None:
    (directory / "config.json").write_text(json.dumps({"architectures": ["LlavaForConditionalGeneration"]}))
    write_card(directory, SFT, name="tuned")
    text = (directory / CARD).read_text()
    assert "pipeline_tag" not in text
    assert "from transformers" not in text


def test_an_adapter_has_the_licence_and_the_lineage_of_its_base(directory: Path) -> None:
    (directory / CARD).write_bytes(THEIRS)
    write_card(directory, SFT, name=directory.name)
    adapter = directory / "adapter"
    adapter.mkdir()
    lora = Stage(
        command="sft train", version="0.3.0", inputs=[("source", "mg"), ("data", "more")], figures={"loss": 1.0}
    )
    write_adapter_card(adapter, lora, name="adapter", base=directory, link="..")
    card = ModelCard.load(adapter / CARD)
    assert card.data.to_dict() == {
        "license": "llama3.2",
        "license_link": "LICENSE",
        "language": ["en", "de"],
        "library_name": "peft",
        "base_model": directory.name,
        "base_model_relation": "adapter",
        "tags": ["lora"],
        "pipeline_tag": "text-generation",
        "datasets": ["more"],
        "metrics": ["loss"],
    }
    stages = [line for line in card.text.splitlines() if line.startswith("1. ")]
    assert [stage.split(":")[0] for stage in stages] == ["1. `sft train` 0.1.0", "1. `sft train` 0.3.0"]
    assert "Scores 63" not in card.text
    assert 'base = AutoModelForCausalLM.from_pretrained("..", dtype="auto")' in card.text
    assert 'model = PeftModel.from_pretrained(base, "adapter")' in card.text


def test_an_adapter_of_an_unknown_training_has_a_card(directory: Path) -> None:
    adapter = directory / "adapter"
    adapter.mkdir()
    write_adapter_card(adapter, None, name="adapter", base=directory, link="..")
    assert "datasets" not in ModelCard.load(adapter / CARD).data.to_dict()


@pytest.mark.parametrize("with_card", [True, False])
def test_a_merged_adapter_gives_its_training_and_its_data(directory: Path, with_card: bool) -> None:
    write_card(directory, SFT, name="tuned")
    adapter = directory / "adapter"
    adapter.mkdir()
    if with_card:
        lora = Stage(command="pretrain train", version="0.3.0", inputs=[("data", "more")], figures={})
        write_adapter_card(adapter, lora, name="adapter", base=directory, link="..")
    merge = Stage(command="convert merge-lora", version="0.3.0", inputs=[("source", "tuned")], figures={})
    write_card(directory, merge, name="merged", adapter=adapter)
    card = ModelCard.load(directory / CARD)
    stages = [line.split("`")[1] for line in card.text.splitlines() if line.startswith("1. ")]
    assert stages == ["sft train", *["pretrain train"] * with_card, "convert merge-lora"]
    assert card.data.datasets == ["chats", *["more"] * with_card]
    assert card.data.base_model == "tuned"


def test_no_data_is_no_field(directory: Path) -> None:
    write_card(directory, Stage(command="convert merge-lora", version="0.3.0", inputs=[], figures={}), name="merged")
    assert "datasets" not in ModelCard.load(directory / CARD).data.to_dict()


def test_fields_are_set_and_the_text_is_kept_to_the_byte(tmp_path: Path) -> None:
    path = tmp_path / CARD
    assert card_fields(path) == {}
    set_fields(path, {"license": "mit"})
    assert card_fields(path) == {"license": "mit"}
    path.write_bytes(THEIRS)
    set_fields(path, {"model-index": [{"name": "a", "results": [1]}], "tags": ["é"]})
    assert path.read_bytes().partition(b"\n---\n")[2] == THEIRS.partition(b"\n---\n")[2]
    fields = card_fields(path)
    assert fields["model-index"] == [{"name": "a", "results": [1]}]
    assert (fields["license"], fields["tags"]) == ("llama3.2", ["é"])
    path.write_text("no front matter\n")
    set_fields(path, {"license": "mit"})
    assert path.read_text() == "---\nlicense: mit\n---\nno front matter\n"
