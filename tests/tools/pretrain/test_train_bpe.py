"""The trained tokenizer: lossless, deterministic, opened by transformers, with a template that marks the assistant."""

import gzip
import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from shared.checkpoint.directory.open import open_checkpoint
from shared.cli import invoked
from shared.errors import AlreadyDone, UserError
from tools.pretrain.train_bpe import MINIMUM_VOCAB_SIZE, run

TEXT = "def add(left, right):\n    return left + right\n\n\nclass Adder:\n    value = 1234\n" * 20


def _train(source: Path, target: Path, vocab_size: int = 400, **options: object) -> None:
    arguments = {"text_key": "text", "overwrite": False, "vocab_size": vocab_size, **options}
    with invoked("pretrain", "tokenizer", {"source": [source], "target": target, **arguments}):
        run(source=(source,), target=target, **arguments)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "a.py").write_text(TEXT)
    _train(folder / "a.py", folder / "out")
    return folder / "out"


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  two spaces\t\ttabs\r\nand \n\n\n ends   \n",
        "\u00e9\u0065\u0301 \ufb01 \u00a0 \u200b \u202e \ufeff",
        "\U0001f600\U0001f468\u200d\U0001f469 \U000e0001",
        "".join(map(chr, range(32))) + "\x7f\x80\x9f",
        "".join(chr(c) for c in range(0x20, 0x3000, 7)),
        "don't I'LL 1234567890 ++--==>>> <|user|> <|endoftext|>",
    ],
)
def test_any_text_survives(trained: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_special_tokens_and_size(trained: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained)
    facts = open_checkpoint(trained, kinds=("tokenizer",), flag="--tokenizer").facts
    assert tokenizer.eos_token == tokenizer.bos_token == "<|endoftext|>"
    assert tokenizer.eos_token_id == facts["eos_token_id"]
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert len(tokenizer) == facts["vocab_size"] <= 400
    assert tokenizer.encode("hi") == tokenizer.encode("hi", add_special_tokens=False), "nothing is added to a text"


def test_the_template_marks_what_the_assistant_says(trained: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained)
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "hi\n"},
        {"role": "assistant", "content": "  yes"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "no\n"},
    ]
    out = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    said = [i for i, mask in zip(out["input_ids"], out["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(said) == "  yes<|endoftext|>no\n<|endoftext|>"
    prompt = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|system|>s<|endoftext|><|user|>hi\n<|endoftext|><|assistant|>"
    with pytest.raises(Exception, match="unknown role: critic"):
        tokenizer.apply_chat_template([{"role": "critic", "content": ""}])


def test_the_same_text_gives_the_same_tokenizer_whatever_its_form(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps({"code": TEXT}).encode()))
    _train(path, tmp_path / "again", text_key="code")
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (trained / "tokenizer.json").read_bytes()


def test_a_finished_tokenizer_is_not_trained_again(trained: Path) -> None:
    with pytest.raises(AlreadyDone):
        _train(trained.parent / "a.py", trained)
    with pytest.raises(UserError, match="--overwrite"):
        _train(trained.parent / "a.py", trained, vocab_size=401)


def test_a_vocabulary_without_room_for_bytes_is_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"at least {MINIMUM_VOCAB_SIZE}"):
        _train(trained.parent / "a.py", tmp_path / "out", vocab_size=MINIMUM_VOCAB_SIZE - 1)
    assert not (tmp_path / "out").exists()


def test_too_little_text_gives_fewer_tokens_and_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("ab ab ab")
    _train(tmp_path / "a.txt", tmp_path / "out", vocab_size=1000)
    out, err = capfd.readouterr()
    assert json.loads(out)["vocab_size"] == len(AutoTokenizer.from_pretrained(tmp_path / "out")) < 1000
    assert "1000 were asked for" in err
