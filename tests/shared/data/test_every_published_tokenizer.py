"""Tokenizer files as they were published: ids of sentencepiece and of tiktoken themselves, with the publisher's pattern.

Qwen 1's table is in Alibaba's package dashscope (published_tokenizers.lock), which uv fetches once into its cache. Mistral's
sentencepiece model is in infer's environment. Those of Baichuan 2, InternLM2 and ChatGLM3 are in no package:
test_tokenizer_conversion.py trains models with their settings.
"""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shared.data.tokenizer import open_tokenizer
from shared.data.tokenizer_conversion import _ADDED, _QWEN_PATTERN
from tests.shared.data.test_tokenizer_conversion import LINES, ODD, REFERENCE
from tests.workers import ROOT

LOCK = Path(__file__).with_name("published_tokenizers.lock")
MISTRAL = next((REFERENCE.parents[1] / "lib").glob("*/site-packages/mistral_common/data"))
MODELS = {"mistral": "tokenizer.model.v1"}
HELD = [
    *(path.read_text(encoding="utf-8") for path in sorted((ROOT / "shared/data").glob("*.py"))[:8]),
    "\u5b66\u800c\u65f6\u4e60\u4e4b\uff0c\u4e0d\u4ea6\u8bf4\u4e4e\uff1f 2024\u5e7412\u670831\u65e5\r\n\r\n",  # Chinese
    "\u0412\u0441\u0435 \u2014 \u0660\u0661\u0662 \u00bd\u2167",  # Russian
    "\u3042\u308a\u304c\u3068\u3046 \U0001f468\u200d\U0001f469\u200d\U0001f467",  # Japanese, an emoji of three
]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published files, and the ids of the libraries for the same texts."""
    folder = tmp_path_factory.mktemp("published")
    uv = shutil.which("uv") or str(ROOT / ".uv/bin/uv")
    fetch = [uv, "pip", "install", "--quiet", "--python", sys.executable, "--no-deps", "--target", folder / "package"]
    fetched = subprocess.run([*fetch, "--require-hashes", "-r", LOCK], capture_output=True, text=True, check=False)
    assert fetched.returncode == 0, f"{LOCK.name}: the package index did not give it: {fetched.stderr}"
    package = folder / "package/dashscope"
    source = ast.parse((package / "tokenizers/qwen_tokenizer.py").read_text(encoding="utf-8"))
    (pattern,) = [
        node.value.value
        for node in source.body
        if isinstance(node, ast.Assign)
        and ast.unparse(node.targets[0]) == "PAT_STR"
        and isinstance(node.value, ast.Constant)
    ]
    special = {token: 151643 + place for place, token in enumerate(_ADDED["QWenTokenizer"])}
    cases: dict[str, dict[str, Any]] = {"qwen": {"pattern": pattern, "special": special}}
    (folder / "qwen").mkdir()
    shutil.copyfile(package / "resources/qwen.tiktoken", folder / "qwen/qwen.tiktoken")
    (folder / "qwen/tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "QWenTokenizer"}))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
    for name, file in MODELS.items():
        (folder / name).mkdir()
        shutil.copyfile(MISTRAL / file, folder / name / "tokenizer.model")
        (folder / name / "tokenizer_config.json").write_text(json.dumps(names))
        cases[name] = {"special": {"<unk>": 0, "<s>": 1, "</s>": 2}}
    for case in cases.values():
        named = [f"{token}user\n hello{token} {token}" for token in list(case["special"])[:4]]
        case["texts"] = [*ODD, *LINES[:300], *HELD, *named]
    (folder / "cases.json").write_text(json.dumps(cases))
    script = Path(__file__).with_name("tokenizer_reference.py")
    done = subprocess.run([REFERENCE, script, folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize("name", ["qwen", *MODELS])
def test_ids_of_published_files_are_those_of_the_library(directories: Path, name: str) -> None:
    tokenizer = open_tokenizer(directories / name)
    case = json.loads((directories / "cases.json").read_text())[name]
    wanted = json.loads((directories / "results.json").read_text())[name]
    assert sum(map(len, wanted)) > 10_000
    for text, ids in zip(case["texts"], wanted, strict=True):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids, text
    if name == "qwen":
        assert case["pattern"] == _QWEN_PATTERN
        assert len(tokenizer) == 151_851  # 151,643 ranks and 208 special tokens
        assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|extra_204|>"]) == [151_643, 151_850]
