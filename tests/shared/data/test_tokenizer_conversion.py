"""Tokenizers without tokenizer.json: the ids of sentencepiece and of tiktoken themselves, which infer's environment has."""

from __future__ import annotations

import base64
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from shared.data.document_tokens import DocumentTokens
from shared.data.tokenizer import open_tokenizer
from shared.data.tokenizer_conversion import _ADDED, _QWEN_PATTERN, convertible
from shared.errors import UserError
from tests.workers import ROOT

REFERENCE = ROOT / "tools" / "infer" / ".venv" / "bin" / "python"
LINES = [
    line for name in ("README.md", "docs/contract.md", "AGENTS.md") for line in (ROOT / name).read_text().splitlines()
]
ODD = [
    *(
        "",
        " ",
        "  two  spaces\n\n\ttab",
        " lead",
        "trail ",
        "12345 x=  3",
        "I'm they'll DON'T",
        "a\r\nb\n\n\n  c",
        "<0x41><s>",
    ),
    *("e\u0301 \u00e9 \ufb01 \u212b", "\u4eca\u5929 \U0001f642\u200d", "x" * 50),
]
SPM = {"vocab_size": 900, "normalization_rule_name": "identity"}
NAMES = {"bos_token": {"content": "<s>"}, "eos_token": {"content": "</s>"}, "unk_token": {"content": "<unk>"}}
CASES: dict[str, dict[str, Any]] = {
    "internlm2": {  # a space before each text; an unused piece is named anew
        "train": {**SPM, "add_dummy_prefix": True, "control_symbols": ["[UNUSED_TOKEN_145]"]},
        "config": {**NAMES, "tokenizer_class": "InternLM2Tokenizer"}
        | {"added_tokens_decoder": {"3": {"content": "<|im_end|>", "special": True}}},
        "special": {"<|im_end|>": 3},
        "bos": "<s>",
    },
    "baichuan2": {  # no such space, symbols of its own
        "train": {**SPM, "add_dummy_prefix": False, "user_defined_symbols": ["<reserved_106>", "<reserved_107>"]},
        "config": {**NAMES, "tokenizer_class": "BaichuanTokenizer", "add_bos_token": False},
        "special": {},
        "bos": None,
    },
    "chatglm3": {  # its class adds tokens
        "train": {**SPM, "add_dummy_prefix": True, "split_digits": True},
        "config": {"tokenizer_class": "ChatGLMTokenizer"},
        "special": {token: 900 + place for place, token in enumerate(_ADDED["ChatGLMTokenizer"])},
        "bos": None,
    },
    "qwen": {
        "pattern": _QWEN_PATTERN,
        "config": {"tokenizer_class": "QWenTokenizer"},
        "special": {token: 600 + place for place, token in enumerate(_ADDED["QWenTokenizer"])},
        "bos": None,
    },
}


def write_ranks(folder: Path) -> None:
    """tiktoken's table of 600 tokens, trained on the corpus."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_QWEN_PATTERN), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False))
    made.decoder = decoders.ByteLevel()
    vocabulary = sorted(made.get_vocab().items(), key=lambda item: item[1])
    of_letters = {letter: number for number, letter in enumerate(_bytes())}
    tokens = [bytes(of_letters[letter] for letter in token) for token, _ in vocabulary]
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    (folder / "qwen.tiktoken").write_bytes(b"".join(lines))


def _bytes() -> list[str]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()
    return [letters[number] for number in range(256)]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for each case, and the ids of its texts."""
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "corpus.txt").write_text("\n".join(line for line in LINES if line.strip()))
    given = {}
    for name, case in CASES.items():
        (folder / name).mkdir()
        (folder / name / "tokenizer_config.json").write_text(json.dumps(case["config"]))
        symbols = [*case["special"], *case.get("train", {}).get("user_defined_symbols", [])][:9]
        texts = [*ODD, *LINES[:150], *(f"{token}user\n hello{token} {token}" for token in symbols)]
        given[name] = {key: case[key] for key in ("train", "pattern") if key in case} | {"texts": texts}
        given[name]["special"] = case["special"] | ({"<unk>": 0, "<s>": 1, "</s>": 2} if "train" in case else {})
    write_ranks(folder / "qwen")
    (folder / "cases.json").write_text(json.dumps(given))
    words = [REFERENCE, Path(__file__).with_name("tokenizer_reference.py"), folder]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize("name", CASES)
def test_ids_are_those_of_the_library(directories: Path, name: str) -> None:
    tokenizer = open_tokenizer(directories / name, needs_eos=name != "chatglm3")
    texts = json.loads((directories / "cases.json").read_text())[name]["texts"]
    wanted = json.loads((directories / "results.json").read_text())[name]
    for text, ids in zip(texts, wanted, strict=True):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids, text
    assert tokenizer.decode(tokenizer(LINES[0])["input_ids"], skip_special_tokens=True) == LINES[0]
    found = DocumentTokens.of(tokenizer, None, None)
    assert (found.begin, found.end) == (CASES[name]["bos"], "<|endoftext|>" if name == "qwen" else "</s>")


def test_tokenizer_json_comes_first(directories: Path, tmp_path: Path) -> None:
    assert convertible(directories / "qwen") == directories / "qwen" / "qwen.tiktoken"
    (tmp_path / "tokenizer.json").touch()
    (tmp_path / "tokenizer.model").touch()
    assert convertible(tmp_path) is None


def copied(directories: Path, folder: Path, name: str, **config: Any) -> Path:
    for file in (directories / name).iterdir():
        if file.suffix != ".vocab":
            (folder / file.name).write_bytes(file.read_bytes())
    fields = json.loads((folder / "tokenizer_config.json").read_text()) | config
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize(
    ("name", "config", "text"),
    [
        (
            "qwen",
            {"tokenizer_class": "OtherTokenizer"},
            "how OtherTokenizer splits a text is in its code, which is not run",
        ),
        (
            "baichuan2",
            {"added_tokens_decoder": {"899": {"content": "<|new|>"}}},
            "and <|new|> in tokenizer_config.json",
        ),
        (
            "baichuan2",
            {"added_tokens_decoder": {"905": {"content": "<|new|>"}}},
            "<|new|> has id 905 and the vocabulary 900",
        ),
        ("baichuan2", {"added_tokens_decoder": {"900": {"content": "</s>"}}}, "</s> has id 2 in it and 900 in"),
    ],
)
def test_what_files_do_not_say_is_refused(
    directories: Path, tmp_path: Path, name: str, config: dict[str, Any], text: str
) -> None:
    with pytest.raises(UserError) as refused:
        open_tokenizer(copied(directories, tmp_path, name, **config))
    assert text in str(refused.value)


def test_models_of_other_kinds_are_refused(directories: Path, tmp_path: Path) -> None:
    from transformers.convert_slow_tokenizer import import_protobuf

    path = copied(directories, tmp_path, "internlm2") / "tokenizer.model"
    proto = import_protobuf().ModelProto()
    proto.ParseFromString(path.read_bytes())
    proto.normalizer_spec.remove_extra_whitespaces = True
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(UserError, match="another kind .it removes or moves white space"):
        open_tokenizer(tmp_path)
    proto.normalizer_spec.remove_extra_whitespaces = False
    proto.normalizer_spec.precompiled_charsmap = b"map"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(UserError, match="it normalises characters"):
        open_tokenizer(tmp_path)
    proto.normalizer_spec.precompiled_charsmap = b""
    proto.pieces[300].type = 4
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(UserError, match="a space before each text and symbols of its user"):
        open_tokenizer(tmp_path)
    path.write_bytes(b"no model")
    with pytest.raises(UserError, match="not a sentencepiece model"):
        open_tokenizer(tmp_path)
    path.unlink()
    (tmp_path / "qwen.tiktoken").write_text("aGk= 0\nbroken\n")
    with pytest.raises(UserError, match="qwen.tiktoken:2: not a token and its rank"):
        open_tokenizer(_as_qwen(tmp_path))


def _as_qwen(folder: Path) -> Path:
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "QWenTokenizer"}))
    return folder
