"""Reading sources: order, compression, pieces that cover every line once, and errors that name the line."""

import gzip
import json
from pathlib import Path

import pytest
import zstandard

from shared.data.sources import Piece, expand, pieces, rows, rows_of, texts
from shared.errors import UserError


def _whole(path: Path) -> Piece:
    return Piece(path=path, start=0, end=path.stat().st_size)


def test_folders_are_walked_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/10.txt", "a.txt", "b.txt", ".hidden/x.txt", "b/.hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    found = [str(file.relative_to(tmp_path)) for file in expand([tmp_path], flag="--source")]
    assert found == ["a.txt", "b/10.txt", "b/2.txt", "b.txt"]


def test_the_same_file_twice_and_foreign_formats_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match=r"a\.txt: given twice"):
        expand([tmp_path, tmp_path / "a.txt"], flag="--source")
    (tmp_path / "b.npy").write_text("")
    with pytest.raises(UserError, match=r"b\.npy: \.npy is not supported"):
        expand([tmp_path], flag="--source")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="contains no files"):
        expand([tmp_path], flag="--source")


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_compressed_and_plain_files_read_alike(tmp_path: Path, suffix: str) -> None:
    content = b"".join(json.dumps({"text": f"line {i} \u00e9\n"}).encode() + b"\n" for i in range(2000))
    compress = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes(compress(content))
    assert list(texts(_whole(path), "text")) == [f"line {i} \u00e9\n" for i in range(2000)]


def test_several_zstd_frames_are_one_file(tmp_path: Path) -> None:
    path = tmp_path / "text.txt.zst"
    path.write_bytes(zstandard.compress(b"one ") + zstandard.compress(b"two"))
    assert list(texts(_whole(path), "text")) == ["one two"]


@pytest.mark.parametrize("size", [1, 7, 100, 1000, 10**6])
def test_pieces_cover_every_row_once(tmp_path: Path, size: int) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"n": i, "pad": "x" * (i % 37)}) + "\n" for i in range(200)))
    cut = pieces(path, size)
    assert cut[0].start == 0
    assert cut[-1].end == path.stat().st_size
    found = [row for piece in cut for row in rows(piece)]
    assert [row.value["n"] for row in found] == list(range(200))
    assert [row.line for row in found] == list(range(1, 201))


def test_a_file_without_a_last_line_end_is_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"n": 0}\n\n{"n": 1}')
    assert [row.value["n"] for piece in pieces(path, 5) for row in rows(piece)] == [0, 1]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": "a"', "not JSON"),
        (b'["a"]', "a JSON object is expected on every line, not list"),
        (b'{"text": "\xff"}', "not UTF-8 (byte 0xff)"),
        (b'{"txt": "a"}', "no key 'text' (the row has: txt); name the key with --text-key"),
        (b'{"text": 3}', "'text' is int, not a string"),
        (b'{"text": "\\ud800"}', "lone surrogate"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_a_bad_row_is_named_by_its_line_in_the_file(tmp_path: Path, line: bytes, problem: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' * 40 + line + b"\n" + b'{"text": "fine"}\n' * 40)
    with pytest.raises(UserError) as caught:
        for piece in pieces(path, 100):  # the line is in a later piece
            list(texts(piece, "text"))
    assert f"{path}:41: " in str(caught.value)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_text_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "page.txt"
    path.write_bytes(b"one\ntwo\nthr\xe9e\n")
    with pytest.raises(UserError, match=r"page\.txt:3: not UTF-8 \(byte 0xe9\)"):
        list(texts(_whole(path), "text"))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_damaged_archives_are_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"page.txt{suffix}"
    compress = {".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    content = compress(bytes(range(256)) * 100)
    for damaged in (b"not an archive", content[: len(content) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=str(path)):
            list(texts(_whole(path), "text"))


ROWS = [{"text": f"line {i} \u00e9", "n": i} for i in range(50)]


def _as_parquet(path: Path) -> None:
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=7)


def _as_arrow(path: Path, kind: str) -> None:
    import pyarrow

    table = pyarrow.Table.from_pylist(ROWS)
    with getattr(pyarrow.ipc, f"new_{kind}")(str(path), table.schema) as file:
        file.write_table(table, max_chunksize=7)


LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
WRITERS = {
    "bom.jsonl": lambda path: path.write_bytes(b"\xef\xbb\xbf" + LINES),
    "bom.jsonl.gz": lambda path: path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + LINES)),
    "array.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "bom_array.json": lambda path: path.write_bytes(b"\xef\xbb\xbf\n" + json.dumps(ROWS).encode()),
    "array.jsonl": lambda path: path.write_text(json.dumps(ROWS)),
    "array.json.zst": lambda path: path.write_bytes(zstandard.compress(json.dumps(ROWS).encode())),
    "table.parquet": _as_parquet,
    "stream.arrow": lambda path: _as_arrow(path, "stream"),
    "file.arrow": lambda path: _as_arrow(path, "file"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_form_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    found = [row for piece in pieces(path, 100) for row in rows(piece)]
    assert [row.value for row in found] == ROWS
    assert [row.line for row in found] == list(range(1, len(ROWS) + 1))


def test_columns_that_are_null_in_a_row_are_left_out(tmp_path: Path) -> None:
    import pyarrow.parquet

    path = tmp_path / "mixed.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a", None], "messages": [None, ["b"]]}), path)
    assert [row.value for row in rows(_whole(path))] == [{"prompt": "a"}, {"messages": ["b"]}]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"mixed\.parquet: damaged, or not parquet"):
        list(rows(_whole(path)))


@pytest.mark.parametrize("line", ['{"a": "\\ud83d"}', '{"a": {"b": ["x", "\\udc00"]}}', '{"a": [{"\\ud83d": 1}]}'])
def test_a_lone_surrogate_is_refused_wherever_it_is(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"a": "\\ud83d\\ude00"}}\n{line}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl:2: 'a' has a lone surrogate"):
        list(rows(_whole(path)))


@pytest.mark.parametrize(("encoding", "name"), [("latin-1", "LATIN1"), ("utf-16", "UTF-16")])
def test_another_encoding_is_refused_with_the_command_that_mends_it(tmp_path: Path, encoding: str, name: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"a": "caf\u00e9"}\n'.encode(encoding))
    with pytest.raises(UserError, match=f"rows.jsonl:1: not UTF-8 .*iconv -f {name} -t UTF-8"):
        list(rows(_whole(path)))


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfabc")
    assert list(texts(_whole(tmp_path / "a.txt"), "text")) == ["abc"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"text": "a"}\n{"text": "b"}\n', ["a", "b"]),
        (b'\xef\xbb\xbf\n{"text": "a"}', ["a"]),
        (b'[{"text": "a"},\n {"text": "b"}]', ["a", "b"]),
        (b'{"text": "' + b"a" * 9000 + b'"}\n{"text": "b"}\n', ["a" * 9000, "b"]),
        (b'{\n "text": "a"\n}\n', ['{\n "text": "a"\n}\n']),  # one object over several lines: a document of its own
        (b'["text"]', ['["text"]']),
        (b"", [""]),
    ],
)
def test_a_json_file_holds_rows_if_it_begins_with_them(tmp_path: Path, content: bytes, expected: list[str]) -> None:
    for name, compress in (("a.json", bytes), ("a.json.gz", gzip.compress)):
        path = tmp_path / name
        path.write_bytes(compress(content))
        assert [text for piece in pieces(path, 10) for text in texts(piece, "text")] == expected


def test_rows_that_cannot_be_read_are_handed_on(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{\n\xff\n[1]\n{"a": "\\ud800"}\n{"a": 2}\n')
    aside: list[tuple[int, str]] = []
    found = [row.value for row in rows(_whole(path), reject=lambda line, why, _: aside.append((line, why)))]
    assert found == [{"a": 1}, {"a": 2}]
    assert [line for line, _ in aside] == [2, 3, 4, 5]
    assert [why.split(" (")[0] for _, why in aside][:2] == ["not JSON", "not UTF-8"]
    path.write_text('[{"a": 1}, 3, {"a": 2}]')
    aside.clear()
    assert len(list(rows(_whole(path), reject=lambda line, why, _: aside.append((line, why))))) == 2
    assert aside == [(2, "a JSON object is expected on every line, not int")]


def test_a_folder_of_rows_leaves_its_cards_out(tmp_path: Path) -> None:
    for name in ("README.md", "dataset_infos.json", "b.parquet", "a.jsonl", "c.json"):
        (tmp_path / name).touch()
    assert [f.name for f in expand([tmp_path], flag="--source", rows_only=True)] == ["a.jsonl", "b.parquet", "c.json"]
    (tmp_path / "a.jsonl").write_text('{"n": 1}\n')
    assert [row.value for row in rows_of(tmp_path / "a.jsonl", flag="--prompts")] == [{"n": 1}]


def test_nulls_inside_objects_are_left_out(tmp_path: Path) -> None:
    import pyarrow.parquet

    path = tmp_path / "calls.parquet"
    said = [{"role": "user", "calls": None}, {"role": "assistant", "calls": [{"x": 1, "y": None}, {"x": None, "y": 2}]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"said": said}]), path)
    assert [row.value for row in rows(_whole(path))] == [
        {"said": [{"role": "user"}, {"role": "assistant", "calls": [{"x": 1}, {"y": 2}]}]}
    ]
