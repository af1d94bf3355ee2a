"""Parts: blocks of lines as one document after another; a sampled text with other ids than those of `tokenizers` stops a run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.data import documents as module
from shared.data import parts
from shared.data.parts import Recipe, init_worker, plan, tokenize_part
from shared.data.tokenizer_backends import Fast
from shared.errors import UserError
from tools.pretrain.train_bpe import train

TEXTS = [f"line {i} of a text that is long enough\n" * 3 for i in range(40)]


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tmp_path / "work").mkdir()
    content = str(train(iter(TEXTS), 300).to_str())
    return Recipe(tokenizer_json=content, eos_token_id=0, vocab_size=300, text_key="text", backend="fastokens")


def test_a_sampled_document_with_other_ids_is_named(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(Fast):
        def encode(self, texts: list[str]) -> Any:
            ids, lengths = super().encode(texts)
            ids = ids.copy()
            ids[lengths[:17].sum()] += 1  # of the 18th text
            return ids, lengths

    monkeypatch.setattr(parts, "SAMPLED", 1)
    init_worker(recipe, tmp_path / "work")
    (part,) = plan([tmp_path / "rows.jsonl"])
    parts._worker["fastokens"] = Wrong(recipe.tokenizer_json)
    with pytest.raises(UserError, match=r"rows\.jsonl:18: fastokens gives this text other ids .* --tokenizer-backend"):
        tokenize_part(part)
    assert not list((tmp_path / "work").iterdir())
    init_worker(recipe, tmp_path / "work")
    assert tokenize_part(part).sampled == 40


def test_one_text_in_so_many_is_sampled_by_its_hash(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import xxhash

    monkeypatch.setattr(parts, "SAMPLED", 4)
    init_worker(recipe, tmp_path / "work")
    found = tokenize_part(plan([tmp_path / "rows.jsonl"])[0])
    assert found.sampled == sum(xxhash.xxh3_64_intdigest(text.encode()) % 4 == 0 for text in TEXTS) > 0
    assert found.documents()["hash"].tolist() == [xxhash.xxh3_64_intdigest(text.encode()) for text in TEXTS]
    assert found.documents()["bytes"].tolist() == [len(text) for text in TEXTS]


def test_parts_of_another_back_end_are_not_taken(recipe: Recipe, tmp_path: Path) -> None:
    (part,) = plan([tmp_path / "rows.jsonl"])
    other = Recipe(**{**vars(recipe), "backend": "tokenizers"})
    found = []
    for each in (recipe, other):
        init_worker(each, tmp_path / "work")
        found.append(tokenize_part(part))
        assert not found[-1].reused
    assert found[0].name == found[1].name
    assert np.array_equal(found[0].tokens(np.dtype(np.uint16)), found[1].tokens(np.dtype(np.uint16)))


def test_blocks_of_lines_give_what_single_documents_give(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a begin token, signatures, and in one file empty texts, long ones and those that only `sources` reads."""
    rows = [{"text": text} for text in ["", *TEXTS[:9], "", "", TEXTS[9] * 9, "caf\u00e9 \U0001f600", TEXTS[10], ""]]
    lines = [json.dumps(row, ensure_ascii=bool(number % 2)) for number, row in enumerate(rows)]
    (tmp_path / "a.txt").write_text(TEXTS[11])
    (tmp_path / "b.jsonl").write_text("\n".join([*lines, "", json.dumps({"text": "x", "n": float("nan")}), *lines]))
    (tmp_path / "c.txt").write_text(TEXTS[12] * 9)
    files = [tmp_path / name for name in ("rows.jsonl", "a.txt", "b.jsonl", "c.txt")]
    monkeypatch.setattr(parts, "BATCH_CHARACTERS", 300)
    settings = {**vars(recipe), "bos_token_id": 1, "cut": r"(?<=\n)(?=\S)", "signatures": True}
    found = []
    for name, single, block in (("single", True, 1 << 20), ("blocks", False, 1 << 20), ("small", False, 200)):
        monkeypatch.setattr(parts, "are_lines", (lambda piece: False) if single else module.are_lines)
        monkeypatch.setattr(module, "BLOCK_BYTES", block)
        (tmp_path / name).mkdir()
        init_worker(Recipe(**settings), tmp_path / name)
        (part,) = plan(files)
        found.append(tokenize_part(part))
    for other in found[1:]:
        assert other.empty == found[0].empty == 8
        assert np.array_equal(other.documents(), found[0].documents())
        assert np.array_equal(other.signatures(), found[0].signatures())
        assert other.tokens(np.dtype(np.uint16)).tobytes() == found[0].tokens(np.dtype(np.uint16)).tobytes()
    tokens, documents = found[1].tokens(np.dtype(np.uint16)), found[1].documents()
    assert len(documents) == len(TEXTS) + 1 + 2 * 12 + 1 + 1
    assert documents["tokens"].sum() == len(tokens)
    ends = np.cumsum(documents["tokens"])
    assert set(tokens[ends - 1]) == {0}
    assert set(tokens[ends - documents["tokens"]]) == {1}
