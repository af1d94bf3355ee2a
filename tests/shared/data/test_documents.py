"""Reading fast: what `sources.texts` reads, with its messages, in bounded memory."""

import gzip
import json
from pathlib import Path

import pytest

from shared.data import documents as module
from shared.data.documents import documents, place
from shared.data.sources import Piece, pieces, texts
from shared.data.stretches import RULES
from shared.errors import UserError


def _fast(path: Path, size: int = 1 << 20) -> list[str]:
    return [
        "".join(several)
        for piece in pieces(path, 100)
        for _, several in documents(piece, "text", "|".join(RULES), size)
    ]


def _slow(path: Path) -> list[str]:
    return [text for piece in pieces(path, 100) for text in texts(piece, "text")]


LINES = [
    b'{"text": "a"}',
    b'{"text": "a", "text": "b"}',  # the last of two keys holds
    b'{"text": "\\u00e9\\ud83d\\ude00", "n": NaN}',
    b'{"text": "", "n": Infinity}',
    b'{"n": 123456789012345678901234567890, "text": "big"}',
    b'  {"text": "spaces"}  \r',
    b"",
    b" \t",
    b'{"n": ' + b"[" * 100 + b"]" * 100 + b', "text": "deep"}',
    b'{"n": ' + b"[" * 900 + b"]" * 900 + b', "text": "nearly as deep as json goes"}',
    b'{"n": "\xc2\xa0", "text": "nbsp"}\xc2\xa0',
]


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("block", [1, 50, 1 << 20])
def test_every_line_is_read_as_before(tmp_path: Path, suffix: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", block)
    path = tmp_path / f"rows.jsonl{suffix}"
    content = b"\xef\xbb\xbf" + b"\n".join(LINES * 3)
    path.write_bytes(gzip.compress(content) if suffix else content)
    assert _fast(path) == _slow(path)
    assert len(_fast(path)) == 27
    assert _fast(path, size=2) == _slow(path)


@pytest.mark.parametrize(
    "line",
    [
        b'{"text": "a"',
        b'["text"]',
        b'"text"',
        b"null",
        b'{"text": "\xff"}',
        b'{"text": "a", "n": "\xff"}',
        b'{"txt": "a"}',
        b'{"text": 3}',
        b'{"text": null}',
        b'{"text": "\\ud800"}',
        b'{"text": "a", "n": ["\\ud800"]}',
        b'{"text": "a", "n": {"key": "\\ud800"}}',
        b'{"text": "a", "n": ' + b"[" * 900 + b'"\\ud800"' + b"]" * 900 + b"}",
        b'{"text": "a"} {"text": "b"}',
        b'{"text": "a",}',
        b'\xef\xbb\xbf{"text": "a"}',
        b"[" * 100_000,
    ],
)
def test_every_mistake_is_named_as_before(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' * 40 + line + b"\n" + b'{"text": "fine"}\n' * 40)
    with pytest.raises(UserError) as before:
        _slow(path)
    with pytest.raises(UserError) as now:
        _fast(path)
    assert str(now.value) == str(before.value)
    assert f"{path}:41: " in str(now.value)


def test_every_form_is_read_as_before(tmp_path: Path) -> None:
    import pyarrow.parquet

    rows = [{"text": f"line {i} \u00e9", "n": i if i % 2 else None} for i in range(200)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=70)
    (tmp_path / "b.json").write_text(json.dumps(rows))
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"one\ntwo"))
    with pyarrow.ipc.new_stream(str(tmp_path / "d.arrow"), pyarrow.Table.from_pylist(rows).schema) as file:
        file.write_table(pyarrow.Table.from_pylist(rows))
    for path in sorted(tmp_path.iterdir()):
        assert _fast(path) == _slow(path), path
        assert _fast(path)


def test_a_table_is_read_in_small_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow.parquet

    from shared.data import table

    rows = [{"text": "x" * 1000} for _ in range(300)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", use_dictionary=False)
    seen: list[int] = []
    before = table._batches

    def counted(*given: object) -> object:
        for batch in before(*given):
            seen.append(batch.nbytes)
            yield batch

    monkeypatch.setattr(table, "_batches", counted)
    monkeypatch.setattr(module, "_TABLE_BYTES", 20_000)
    assert _fast(tmp_path / "a.parquet") == ["x" * 1000] * 300
    assert max(seen) < 30_000


def test_rows_without_bound_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROW_BYTES", 1000)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n' * 9 + json.dumps({"text": "x" * 1000}) + "\n")
    with pytest.raises(UserError, match=r"rows\.jsonl:10: a row of more than"):
        _fast(path)
    (tmp_path / "array.json").write_text(json.dumps([{"text": "x" * 1000}]))
    with pytest.raises(UserError, match=r"array\.json: a JSON array of more than .*`jq -c"):
        _fast(tmp_path / "array.json")
    (tmp_path / "text.txt").write_text("words " * 1000)
    assert _fast(tmp_path / "text.txt", size=10) == ["words " * 1000]
    with pytest.raises(UserError, match=r"text\.txt: a text of more than .* depend on the whole"):
        for _, several in documents(Piece(path=tmp_path / "text.txt", start=0, end=6000), "text", None, 10):
            list(several)


def test_the_place_of_a_document_is_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} {'x' * 40}"}) + "\n" for i in range(1, 31)))
    for number in (3, 4, 9):  # of blocks without and with a line that only `sources` reads
        mixed = tmp_path / f"mixed{number}.jsonl"
        lines = [json.dumps({"text": str(i)}) for i in range(1, 13)]
        lines[number:number] = ["", json.dumps({"text": str(number + 2), "n": float("nan")})]
        mixed.write_text("\n".join(lines))
        monkeypatch.setattr(module, "BLOCK_BYTES", 40)
        whole = Piece(path=mixed, start=0, end=mixed.stat().st_size)
        found = [(at, "".join(several)) for at, several in documents(whole, "text", None, 100)]
        assert [at for at, _ in found] == [*range(1, number + 1), *range(number + 2, 15)]
        assert found[number] == (number + 2, str(number + 2))
    last = pieces(path, 200)[-1]
    found = [(number, "".join(several)) for number, several in documents(last, "text", None, 100)]
    assert [place(last, number) for number, _ in found] == [f"{path}:{text.split()[0]}" for _, text in found]
