"""One table file, Parquet or Arrow IPC, as groups of rows that are read a batch at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from clipfilter.sources.model import Shard

BUFFER = 1 << 20  # bytes read ahead per column where a row group is read page by page
_STREAMED = 128 << 20  # a row group with more bytes than this is read page by page
_ARROW_MAGIC = b"ARROW1"  # of the file format; the streaming format has none


class Group(NamedTuple):
    """Rows [low, high) of a row group (Parquet) or record batch (Arrow); `first` is its first row's number in the file."""

    number: int
    first: int
    low: int
    high: int
    row_bytes: int  # on average


class TableFile(Protocol):
    """What both kinds of file do."""

    schema: pa.Schema

    def groups(self, shard: Shard) -> Iterator[Group]: ...

    def columns(self, group: Group, names: Sequence[str]) -> pa.Table: ...

    def batches(self, group: Group, names: Sequence[str] | None, rows: int) -> Iterator[pa.RecordBatch]: ...

    def first_rows(self, rows: int) -> pa.RecordBatch | None: ...


class ParquetTable:
    """A Parquet file. `source`: its path, or an open file; `row_groups`: those that will be read."""

    def __init__(self, source: Any, row_groups: Sequence[int] = ()) -> None:
        self.file = pq.ParquetFile(source, pre_buffer=False, buffer_size=BUFFER)
        sizes = [self.file.metadata.row_group(group).total_byte_size for group in row_groups]
        if sizes and max(sizes) <= _STREAMED:
            self.file.close()
            self.file = pq.ParquetFile(source, metadata=self.file.metadata, pre_buffer=True)
        self.schema = self.file.schema_arrow

    def groups(self, shard: Shard) -> Iterator[Group]:
        metadata = self.file.metadata
        first = sum(
            metadata.row_group(group).num_rows for group in range(shard.row_groups[0] if shard.row_groups else 0)
        )
        for number in shard.row_groups:
            group = metadata.row_group(number)
            low, high = max(0, shard.start - first), min(group.num_rows, (shard.stop or 0) - first)
            yield Group(number, first, low, high, max(1, group.total_byte_size // max(1, group.num_rows)))
            first += group.num_rows

    def columns(self, group: Group, names: Sequence[str]) -> pa.Table:
        return self.file.read_row_group(group.number, columns=list(names)).slice(group.low, group.high - group.low)

    def batches(self, group: Group, names: Sequence[str] | None, rows: int) -> Iterator[pa.RecordBatch]:
        position = 0
        columns = None if names is None else list(names)
        for batch in self.file.iter_batches(batch_size=rows, row_groups=[group.number], columns=columns):
            low, high = max(group.low, position), min(group.high, position + batch.num_rows)
            if low < high:
                yield batch.slice(low - position, high - low)
            position += batch.num_rows
            if position >= group.high:
                return

    def first_rows(self, rows: int) -> pa.RecordBatch | None:
        if not self.file.metadata.num_rows:
            return None
        return next(self.file.iter_batches(batch_size=rows, row_groups=[0]), None)


class ArrowTable:
    """An Arrow IPC file (Feather's second version) or stream (what `datasets` saves), read from its beginning to its end."""

    def __init__(self, source: Any) -> None:
        opened = pa.OSFile(source) if isinstance(source, str) else pa.PythonFile(source, mode="r")
        whole = opened.read(len(_ARROW_MAGIC)) == _ARROW_MAGIC
        opened.seek(0)
        self._reader: Any = pa.ipc.open_file(opened) if whole else pa.ipc.open_stream(opened)
        self._whole = whole
        self._batch: pa.RecordBatch | None = None
        self.schema = _without_views(self._reader.schema)

    def groups(self, shard: Shard) -> Iterator[Group]:
        first = 0
        for number, batch in enumerate(self._batches()):
            self._batch = batch
            yield Group(number, first, 0, batch.num_rows, max(1, batch.nbytes // max(1, batch.num_rows)))
            first += batch.num_rows

    def _batches(self) -> Iterator[pa.RecordBatch]:
        read = (
            (self._reader.get_batch(n) for n in range(self._reader.num_record_batches)) if self._whole else self._reader
        )
        for batch in read:
            batch.validate(full=True)  # offsets that lead out of a buffer are a crash elsewhere
            yield (
                pa.Table.from_batches([batch]).cast(self.schema).combine_chunks().to_batches()[0]
                if batch.num_rows and (batch.schema != self.schema)
                else batch
            )

    def columns(self, group: Group, names: Sequence[str]) -> pa.Table:
        return pa.Table.from_batches([self._current()]).select(list(names))

    def batches(self, group: Group, names: Sequence[str] | None, rows: int) -> Iterator[pa.RecordBatch]:
        batch = self._current()
        if names is not None:  # fields of structs are asked for as `column.field`, and are no columns here
            batch = batch.select([name for name in batch.schema.names if name in names])
        for start in range(0, batch.num_rows, rows):
            yield batch.slice(start, rows)

    def first_rows(self, rows: int) -> pa.RecordBatch | None:
        return next((batch.slice(0, rows) for batch in self._batches() if batch.num_rows), None)

    def _current(self) -> pa.RecordBatch:
        assert self._batch is not None
        return self._batch


def _without_views(schema: pa.Schema) -> pa.Schema:
    return pa.schema([item.with_type(_plain(item.type)) for item in schema], metadata=schema.metadata)


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type without views of text, bytes and lists, which Parquet does not have."""
    if pa.types.is_string_view(kind):
        return pa.large_string()
    if pa.types.is_binary_view(kind):
        return pa.large_binary()
    if pa.types.is_list_view(kind):
        return pa.list_(_plain(kind.value_type))
    if pa.types.is_large_list_view(kind):
        return pa.large_list(_plain(kind.value_type))
    return kind
