"""The commands of docs/fine-tune.md, run on the rows of that page with a small tokenizer in place of the model's."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from shared.families import registry
from tests.tools.sft.test_every_template import TEMPLATES, TOKENIZER
from tests.training_runs import random_model
from tools.sft.cli import tool

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "fine-tune.md").read_text(encoding="utf-8")
MODEL = {
    "model_type": "qwen3",
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 4096,
}
TEMPLATE = TEMPLATES / "reasoning_last.jinja"


def _write_rows(folder: Path) -> None:
    """The page's rows in their files, and the pairs as a table and as `datasets` saves them."""
    for name, rows in re.findall(r"^`([\w.]+)`: .*?^```json\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE):
        (folder / name).write_text(rows)
    table = pyarrow.Table.from_pylist([{"prompt": "Hello", "completion": "Hi."}, {"prompt": "a", "completion": "b"}])
    pyarrow.parquet.write_table(table, folder / "table.parquet")
    split = folder / "saved" / "train"
    split.mkdir(parents=True)
    (folder / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    (split / "state.json").write_text('{"_split": "train", "_data_files": [{"filename": "data-0.arrow"}]}')
    (split / "dataset_info.json").write_text("{}")
    with pyarrow.ipc.new_stream(str(split / "data-0.arrow"), table.schema) as file:
        file.write_table(table)


def test_every_command_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write_rows(tmp_path)
    TOKENIZER.chat_template = TEMPLATE.read_text()
    TOKENIZER.save_pretrained(tmp_path / "models/Qwen3-8B")
    shutil.copy(TEMPLATE, tmp_path / "chat.jinja")
    monkeypatch.chdir(tmp_path)
    random_model(tmp_path / "work/qwen3-mg", registry.from_config(MODEL | {"vocab_size": len(TOKENIZER)}))
    lines = re.findall(r"^(sft (?:prepare|preview) .*|sft train .*(?:watched|lora).*)$", PAGE, re.MULTILINE)
    assert len(lines) > 14
    for line in lines:
        with pytest.raises(SystemExit) as ended:
            tool.run(shlex.split(line)[1:])
        assert ended.value.code == 0, line
    trained = {path.parent.name: json.loads(path.read_text())["facts"] for path in Path("work").glob("*/manifest.json")}
    assert trained.pop("lora-mg")["adapter"]["rank"] == 16
    watched = trained.pop("watched-mg")
    assert (watched["step"], watched["best_validation"]["targets"] > 0) == (1, True)  # one row
    assert len(Path("work/watched-mg/replies.jsonl").read_text().splitlines()) == 2 * 2
    assert {name: facts["splits"]["train"]["conversations"] for name, facts in trained.items()} == {
        "chats": 2,
        "split": 1,
        "from-messages": 2,
        "from-sharegpt": 1,
        "from-alpaca": 1,
        "from-pairs": 2,
        "from-column": 1,
        "from-table": 2,
        "from-saved": 2,
        "from-most": 4,
        "own-template": 2,
        "no-thinking": 2,
    }
    assert "<b>" in Path("preview.html").read_text()
