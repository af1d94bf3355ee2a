"""The commands of docs/fine-tune.md, run on the rows of that page with a small tokenizer in place of the model's."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tests.tools.sft.test_every_template import TEMPLATES, TOKENIZER
from tools.sft.cli import tool

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "fine-tune.md").read_text(encoding="utf-8")
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
    lines = re.findall(r"^(sft (?:prepare|preview) .*)$", PAGE, re.MULTILINE)
    assert len(lines) > 12
    for line in lines:
        with pytest.raises(SystemExit) as ended:
            tool.run(shlex.split(line)[1:])
        assert ended.value.code == 0, line
    trained = {path.parent.name: json.loads(path.read_text())["facts"] for path in Path("work").glob("*/manifest.json")}
    assert {name: facts["splits"]["train"]["conversations"] for name, facts in trained.items()} == {
        "chats": 2,
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
