"""Rows of parquet and arrow files, as `datasets` writes them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.errors import UserError


def table_rows(path: Path, *, batch_bytes: int | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a table in order, without null values, also in objects inside them.

    With `batch_bytes`, about as many bytes of rows are in memory at a time.

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
            for batch in _batches(pyarrow, file, path.suffix.lower(), batch_bytes):
                for part in _slices(batch, batch_bytes):
                    for row in part.to_pylist():
                        yield without_null(row)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError, OSError) as error:  # OSError: a truncated file
            raise UserError(f"{path}: damaged, or not {path.suffix[1:]} ({str(error).splitlines()[0]})") from None


def without_null(value: Any) -> Any:
    """A value without null fields of objects: a column of objects gives each of them the fields of all."""
    if isinstance(value, dict):
        return {name: without_null(item) for name, item in value.items() if item is not None}
    return [without_null(item) for item in value] if isinstance(value, list) else value


def _slices(batch: Any, batch_bytes: int | None) -> Iterator[Any]:
    """A record batch in slices of about so many bytes."""
    if batch_bytes is None or batch.nbytes <= batch_bytes:
        yield batch
        return
    rows = max(1, batch.num_rows * batch_bytes // batch.nbytes)
    yield from (batch.slice(start, rows) for start in range(0, batch.num_rows, rows))


def _batches(pyarrow: Any, file: Any, suffix: str, batch_bytes: int | None) -> Iterator[Any]:
    if suffix == ".parquet":
        table = pyarrow.parquet.ParquetFile(file, **({"buffer_size": 1 << 20} if batch_bytes else {}))
        if not batch_bytes:
            yield from table.iter_batches()
            return
        for index in range(table.num_row_groups):  # of each as many rows as have about so many bytes
            group = table.metadata.row_group(index)
            rows = max(1, group.num_rows * batch_bytes // max(group.total_byte_size, 1))
            yield from table.iter_batches(batch_size=min(rows, 1 << 16), row_groups=[index])
    elif file.read(6) == b"ARROW1":  # the file format; `datasets` writes the stream format
        file.seek(0)
        opened = pyarrow.ipc.open_file(file)
        yield from (opened.get_batch(number) for number in range(opened.num_record_batches))
    else:
        file.seek(0)
        yield from pyarrow.ipc.open_stream(file)
