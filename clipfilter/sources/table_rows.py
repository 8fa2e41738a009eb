"""csv, JSON Lines and JSON documents as a source: their rows name pictures. Each is made Parquet once, and read as that."""

from __future__ import annotations

import itertools
import mmap
import re
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NamedTuple, Self

import pyarrow as pa
import pyarrow.parquet as pq

from clipfilter import columns as cf
from clipfilter import storage
from clipfilter.errors import RefusedError, ShardError, one_line
from clipfilter.sources.discover import TABLE_SUFFIXES, Found, Location
from clipfilter.sources.model import ReadStats, Shard, SourceOptions, shard_id
from clipfilter.sources.parquet import Parquet
from clipfilter.sources.records import CAPTION_NAMES, caption_fields, caption_texts, check_field, record_captions
from clipfilter.sources.schema import fit_batch, fit_records, infer_record_schema, schema_from_text, schema_to_text
from clipfilter.sources.seen import Seen
from clipfilter.sources.spool import check_unchanged
from clipfilter.sources.table_files import ParquetTable, TableFile
from clipfilter.sources.table_lines import TableLines, Unreadable, paths_in
from clipfilter.sources.tables import Table, numeric_columns, with_numbers

_SAMPLED = 1000
_AT_ONCE = 10_000  # records in memory
_KEPT = 4  # tables whose Parquet is kept
_NUMBERED = re.compile(r"#\d+$")  # Flickr's name.jpg#0


class _Made(NamedTuple):
    """A table as Parquet, and how many of its lines could not be parsed."""

    parquet: pa.Buffer
    broken: int


class TableRows(Parquet):
    """A source of tables of one kind; a row is a record, or each image of its list."""

    def __init__(self, location: Location, options: SourceOptions, columns: pa.Schema, plan: dict[str, Any]) -> None:
        super().__init__(location, options, columns, plan)
        self._made: OrderedDict[tuple[str, str], _Made] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def infer(cls, location: Location, options: SourceOptions, found: Found) -> Self:
        """Freeze columns from the first records of the first table that names pictures; raises RefusedError."""
        problem = ""
        for path in found.tables:
            try:
                lines = TableLines.open(location.url(path), options.image_column)
                records = list(itertools.islice(_records(location.root, path, lines), _SAMPLED))
                break
            except Unreadable as why:
                problem = problem or f"{location.url(path)}: {why}"
        else:
            raise RefusedError(
                f"{problem}; give a table with a column of image paths or URLs, named with --image-column."
            )
        where = location.url(path)
        fields = dict.fromkeys(name for record in records for name in record)
        check_field(options.caption_column, "--caption-column", fields, where)
        names = [options.caption_column] if options.caption_column else caption_fields(fields)
        joined = _must_be_joined(records, names, options.caption_column)
        numeric = numeric_columns(records) if lines.dialect.kind == "csv" else []
        reading: dict[str, Any] = {"joined": joined, "caption_names": names, "numeric": numeric}
        sample = list(_prepared(records, options.caption_column, **reading))
        schema = infer_record_schema(sample)
        with pa.BufferOutputStream() as first:
            pq.write_table(pa.Table.from_arrays(fit_records(sample, schema)[0], schema=schema), first)
        file = ParquetTable(pa.BufferReader(first.getvalue()))
        column = lines.dialect.column
        named = replace(options, image_column=column, caption_column="captions" if joined else options.caption_column)
        source = cls.of_file(location, named, found, file, path)
        source.plan.update(kind="table", downloads=False, records=schema_to_text(schema), **reading)
        source.options = options
        return source

    def iter_shards(self, listing: Seen) -> Iterator[Shard]:
        for path, entry in self.location.containers(TABLE_SUFFIXES, listing, lambda names, name: False):
            try:
                made = self._parquet_of(path, entry.etag)
            except ShardError:
                yield Shard(shard_id(path), path, "parquet", size=entry.size, etag=entry.etag)
                continue
            yield from self._split(path, entry, pq.read_metadata(pa.BufferReader(made.parquet)))

    def read(
        self, shard: Shard, rows: Sequence[int] | None, images: bool, stats: ReadStats
    ) -> Iterator[pa.RecordBatch]:
        yield from super().read(shard, rows, images, stats)
        broken = self._parquet_of(shard.path, shard.etag).broken
        if broken and not shard.start:  # the first shard of a table speaks for all of it
            stats.seen.pass_over("unread", shard.path, broken)

    def _open(self, shard: Shard, stack: ExitStack) -> TableFile:
        made = self._parquet_of(shard.path, shard.etag)
        if shard.stop is None:
            raise ShardError(
                f"{self.location.url(shard.path)} could not be read when it was listed, but can now; run again."
            )
        return ParquetTable(pa.BufferReader(made.parquet), shard.row_groups)

    def _fitted(self, rest: pa.RecordBatch) -> tuple[list[pa.Array], list[str | None] | None]:
        """What did not fit when the Parquet was made is text already."""
        place = rest.schema.get_field_index(cf.SOURCE_JSON)
        if place < 0:
            return super()._fitted(rest)
        misfits = rest.column(place).to_pylist()
        columns, _ = fit_batch(rest.drop_columns([cf.SOURCE_JSON]), self.columns)
        return columns, misfits if any(misfits) else None

    def _parquet_of(self, path: str, etag: str) -> _Made:
        """A table as Parquet, made when it is first asked for; raises ShardError."""
        with self._lock:
            made = self._made.get((path, etag))
            if made is None:
                made = self._made[path, etag] = self._make(path, etag)
            self._made.move_to_end((path, etag))
            while len(self._made) > _KEPT:
                self._made.popitem(last=False)
            return made

    def _make(self, path: str, etag: str) -> _Made:
        url, plan = self.location.url(path), self.plan
        try:
            fs, inside = storage.filesystem(url)
            if etag:
                check_unchanged(fs, inside, url, etag)
            lines = TableLines.open(url, plan["image"])
            records = _records(self.location.root, path, lines)
            reading = {name: plan[name] for name in ("joined", "caption_names", "numeric")}
            prepared = _prepared(records, self.options.caption_column, **reading)
            rows = min(_AT_ONCE, self.options.rows_per_shard)
            return _Made(_parquet(prepared, schema_from_text(plan["records"]), rows), lines.broken)
        except ShardError:
            raise
        except Unreadable as why:
            raise ShardError(f"{url}: {why}.") from why
        except FileNotFoundError as error:
            raise ShardError(f"{url} does not exist any more.") from error
        except Exception as error:  # every filesystem has exceptions of its own
            raise ShardError(f"{url} cannot be read: {one_line(error)}") from error


def _records(root: str, path: str, lines: TableLines) -> Iterator[dict[str, Any]]:
    """The records of a table: the field that names pictures has their paths, COCO's captions stand in their record, and
    Flickr's lines about one picture are one record."""
    column = lines.dialect.column
    if lines.dialect.kind == "sections":
        table = Table(root, path)
        if table.note and not len(table):
            raise Unreadable(table.note)
        found: Iterable[dict[str, Any]] = (table.records({number: ()})[0] for number in range(len(table)))
    else:
        found = (line.fields for line in lines)
    named = ({**record, column: _paths(record.get(column))} for record in found)
    for one, together in itertools.groupby(named, lambda record: _of_several(record, column) or object()):
        if isinstance(one, str):
            captions = [
                text for line in together for text in record_captions(line, [], None, caption_fields(line)) or []
            ]
            yield {column: one, "captions": captions}
        else:
            yield from together


def _paths(value: Any) -> Any:
    """The paths in a field: one, or a list of them where the field has one."""
    found = [path if "://" in path else path.replace("\\", "/") for path in paths_in(value)]
    return found if isinstance(value, list) else found[0] if found else None


def _of_several(record: dict[str, Any], column: str) -> str | None:
    """The picture of a line that is one of several about it, as Flickr's tables number them."""
    path = record[column]
    if not isinstance(path, str) or not ("comment_number" in record or _NUMBERED.search(path)):
        return None
    return _NUMBERED.sub("", path)


def _must_be_joined(records: Sequence[dict[str, Any]], names: Sequence[str], named: str | None) -> bool:
    """Whether captions must be gathered into a column of their own: no column of that name holds them as text."""
    for name in names:
        values = [value for value in (record.get(name) for record in records) if caption_texts(value)]
        if values:
            texts = [item for value in values for item in (value if isinstance(value, list) else [value])]
            return not all(isinstance(text, str) for text in texts) or (named is None and name not in CAPTION_NAMES)
    return False


def _prepared(
    records: Iterable[dict[str, Any]],
    caption: str | None,
    joined: bool,
    caption_names: Sequence[str],
    numeric: Sequence[str],
) -> Iterator[dict[str, Any]]:
    """Records with numbers where a csv has them, and with their captions gathered."""
    for record in records:
        record = with_numbers(record, numeric)
        yield {**record, "captions": record_captions(record, [], caption, caption_names)} if joined else record


def _parquet(records: Iterable[dict[str, Any]], schema: pa.Schema, rows: int) -> pa.Buffer:
    """The records as Parquet in an unnamed temporary file; what does not fit is JSON in a column cf_source_json."""
    with tempfile.TemporaryFile(prefix="clipfilter-") as file:
        whole = pa.schema([*schema, pa.field(cf.SOURCE_JSON, pa.string())])
        with pq.ParquetWriter(file, whole, compression="zstd") as writer:
            remaining = iter(records)
            while batch := list(itertools.islice(remaining, rows)):
                columns, misfits = fit_records(batch, schema)
                writer.write_table(pa.Table.from_arrays([*columns, pa.array(misfits, pa.string())], schema=whole))
        file.flush()
        return pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
