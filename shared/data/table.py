"""Rows of parquet and arrow files, as `datasets` writes them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.errors import UserError


def table_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a table in order, without null values, also in objects inside them.

    Raises:
        UserError: the file is damaged; the environment has no pyarrow.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{path}: this tool's environment has no pyarrow to read {path.suffix} with; write it as JSON lines "
            "(datasets: to_json)"
        ) from None
    with path.open("rb") as file:
        try:
            for batch in _batches(pyarrow, file, path.suffix.lower()):
                for row in batch.to_pylist():
                    yield without_null(row)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError, OSError) as error:  # OSError: a truncated file
            raise UserError(f"{path}: damaged, or not {path.suffix[1:]} ({str(error).splitlines()[0]})") from None


def without_null(value: Any) -> Any:
    """A value without null fields of objects: a column of objects gives each of them the fields of all."""
    if isinstance(value, dict):
        return {name: without_null(item) for name, item in value.items() if item is not None}
    return [without_null(item) for item in value] if isinstance(value, list) else value


def _batches(pyarrow: Any, file: Any, suffix: str) -> Iterator[Any]:
    if suffix == ".parquet":
        yield from pyarrow.parquet.ParquetFile(file).iter_batches()
    elif file.read(6) == b"ARROW1":  # the file format; `datasets` writes the stream format
        file.seek(0)
        opened = pyarrow.ipc.open_file(file)
        yield from (opened.get_batch(number) for number in range(opened.num_record_batches))
    else:
        file.seek(0)
        yield from pyarrow.ipc.open_stream(file)
