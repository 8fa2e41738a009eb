"""Parquet files: images as bytes, or as paths or URLs to fetch; shards are ranges of rows along row groups."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clipfilter import storage
from clipfilter.errors import MISSING_IMAGE, READ_ERROR, ShardError, one_line
from clipfilter.sources import img2dataset
from clipfilter.sources.discover import PARQUET_SUFFIXES, Entry, Found, Location
from clipfilter.sources.fetch import Fetched, Fetcher, fetch_images
from clipfilter.sources.model import ReadStats, Shard, SourceOptions, row_uid, shard_id
from clipfilter.sources.parquet_columns import (
    BUFFER,
    columns_without,
    empty_rows,
    find_caption,
    find_image,
    find_uid,
    first_readable,
    first_rows,
    is_caption,
    is_textual,
    rest_schema,
    split_batch,
)
from clipfilter.sources.records import UID_PATTERN, image_array
from clipfilter.sources.schema import (
    caption_lists,
    fit_batch,
    freeze,
    full_schema,
    only_used,
    plain_text,
)
from clipfilter.sources.seen import Seen
from clipfilter.sources.spool import check_unchanged

_KEY_NAMES = ("key", "__key__")
_ROOTS = b"clipfilter.image_roots"  # where relative paths of a copied file lead
_STREAMED = 128 << 20  # a row group with more bytes than this is read page by page
_COPY_ROWS = 10_000
_SPLIT_BYTES, _SPLIT_NAMES = 4, 2  # a row group of more than so many times rows_per_shard is split


@dataclass
class _Piece:
    """Some rows of one file, image column apart: `images` are bytes at hand, `names` what must be fetched."""

    rest: pa.RecordBatch
    numbers: np.ndarray
    keys: list[str]
    occurrences: list[int]
    images: pa.Array | None
    names: list[str | None] | None
    problem: str | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def slice(self, start: int, stop: int) -> _Piece:
        return _Piece(
            self.rest.slice(start, stop - start),
            self.numbers[start:stop],
            self.keys[start:stop],
            self.occurrences[start:stop],
            None if self.images is None else self.images.slice(start, stop - start),
            None if self.names is None else self.names[start:stop],
            self.problem,
        )


class Parquet:
    """A source of Parquet files that share the first one's schema, more or less."""

    def __init__(self, location: Location, options: SourceOptions, columns: pa.Schema, plan: dict[str, Any]) -> None:
        self.location, self.options, self.columns, self.plan = location, options, columns, plan
        self._schema = full_schema(columns)

    @classmethod
    def infer(cls, location: Location, options: SourceOptions, found: Found) -> Parquet:
        """Freeze the first readable file's schema and find the image, caption, key and uid columns."""
        with ExitStack() as stack:
            file, path = first_readable(location, found, stack)
            schema = file.schema_arrow
            sample = first_rows(file)
            where = location.url(path)
            column, how = find_image(schema, sample, options.image_column, where)
            caption = find_caption(schema, options.caption_column, column if how == "bytes" else None, where)
            uid = find_uid(schema, options.uid_column, sample, where)
        names = set(schema.names)
        key = next((name for name in _KEY_NAMES if name in names and is_textual(schema.field(name).type)), None)
        downloads = how == "bytes" and {"key", "status", "error_message"} <= names
        plan = {
            "kind": "img2dataset-parquet" if downloads else "parquet",
            "stats": downloads and found.stats,
            "image": column,
            "how": how,
            "caption": caption,
            "uid": uid,
            "key": key,
            "downloads": downloads,
            "has_captions": caption is not None,
        }
        return cls(location, options, freeze(rest_schema(schema, column)), plan)

    def iter_shards(self, listing: Seen) -> Iterator[Shard]:
        for path, entry in self.location.containers(PARQUET_SUFFIXES, listing, img2dataset.is_sidecar):
            try:
                fs, inside = storage.filesystem(self.location.url(path))
                with fs.open(inside, "rb") as handle:
                    metadata = pq.read_metadata(handle)
            except (OSError, pa.ArrowException, ValueError):
                yield Shard(shard_id(path), path, "parquet", size=entry.size, etag=entry.etag)
                continue
            yield from self._split(path, entry, metadata)

    def _split(self, path: str, entry: Entry, metadata: pq.FileMetaData) -> Iterator[Shard]:
        """Whole row groups together up to rows_per_shard; a far larger row group in equal parts."""
        most = self.options.rows_per_shard
        largest = most * (_SPLIT_BYTES if self.plan["how"] == "bytes" else _SPLIT_NAMES)
        ranges: list[tuple[int, int, tuple[int, ...]]] = []
        start = stop = 0
        groups: list[int] = []
        for group in range(metadata.num_row_groups):
            rows = metadata.row_group(group).num_rows
            if groups and stop - start + rows > most:
                ranges.append((start, stop, tuple(groups)))
                start, groups = stop, []
            if rows > largest:
                parts = -(-rows // most)
                edges = [stop + rows * part // parts for part in range(parts + 1)]
                ranges += [(low, high, (group,)) for low, high in itertools.pairwise(edges)]
                start = stop = stop + rows
            elif rows:
                groups.append(group)
                stop += rows
        if groups:
            ranges.append((start, stop, tuple(groups)))
        total = max(metadata.num_rows, 1)
        for low, high, chosen in ranges:
            size = entry.size * (high - low) // total
            yield Shard(shard_id(path, low, high), path, "parquet", low, high, chosen, size=size, etag=entry.etag)

    def read(
        self, shard: Shard, rows: Sequence[int] | None, images: bool, stats: ReadStats
    ) -> Iterator[pa.RecordBatch]:
        with ExitStack() as stack:
            file = self._open(shard, stack)
            if self.plan["stats"]:
                stats.unfinished = not img2dataset.has_stats(self.location, shard.path)
            pieces = self._pieces(file, shard, rows, images, stats)
            if not images:
                for piece in pieces:
                    yield self._batch(piece, shard, None, stats)
            else:
                yield from self._with_images(pieces, shard, file, stats)

    def _with_images(
        self, pieces: Iterator[_Piece], shard: Shard, file: pq.ParquetFile, stats: ReadStats
    ) -> Iterator[pa.RecordBatch]:
        """Batches with their images: the bytes at hand, or fetched, then ahead of the batch being handed out."""
        fetch = Fetcher(self._roots(shard, file.schema_arrow), private=self.options.private)
        place = file.schema_arrow.get_field_index(self.plan["image"])
        ahead: deque[_Piece] = deque()

        def names() -> Iterator[str | bytes | None]:
            for piece in pieces:
                ahead.append(piece)
                yield from piece.names or ()

        if place >= 0 and is_textual(file.schema_arrow.field(place).type):
            yield from self._fetched(ahead, fetch_images(names(), fetch, self.options.max_batch_bytes), shard, stats)
            return
        for piece in pieces:
            if piece.names is None:
                yield from self._held(piece, shard, stats)
            else:
                found = fetch_images(piece.names, fetch, self.options.max_batch_bytes)
                yield from self._fetched(deque([piece]), found, shard, stats)

    def _roots(self, shard: Shard, schema: pa.Schema) -> list[str]:
        """Where relative paths in a file may lead: beside it, below the source, where earlier copies of it led."""
        earlier = (schema.metadata or {}).get(_ROOTS, b"").decode("utf-8", "replace").split("\n")
        return [self.location.url(shard.path.rpartition("/")[0]), self.location.root, *filter(None, earlier)]

    def _held(self, piece: _Piece, shard: Shard, stats: ReadStats) -> Iterator[pa.RecordBatch]:
        """A piece whose bytes are at hand, cut where max_batch_bytes is reached."""
        if piece.images is None:
            yield self._batch(piece, shard, pa.nulls(len(piece), pa.large_binary()), stats)
            return
        ends = np.cumsum(pc.fill_null(pc.binary_length(piece.images), 0).to_numpy(zero_copy_only=False))
        start = 0
        while start < len(piece):
            before = int(ends[start - 1]) if start else 0
            stop = max(start + 1, int(np.searchsorted(ends, before + self.options.max_batch_bytes, side="right")))
            part = piece.slice(start, stop)
            yield self._batch(part, shard, part.images, stats)
            start = stop

    def _fetched(
        self, ahead: deque[_Piece], found: Iterator[Fetched], shard: Shard, stats: ReadStats
    ) -> Iterator[pa.RecordBatch]:
        """Batches of the pieces in `ahead` (filled while `found` runs), cut where max_batch_bytes is reached."""
        start = size = 0
        results: list[Fetched] = []
        for result in found:
            more = len(result.data or b"")
            if results and size + more > self.options.max_batch_bytes:
                yield self._batch(ahead[0].slice(start, start + len(results)), shard, results, stats)
                start, size, results = start + len(results), 0, []
            results.append(result)
            size += more
            if start + len(results) == len(ahead[0]):
                yield self._batch(ahead.popleft().slice(start, start + len(results)), shard, results, stats)
                start, size, results = 0, 0, []

    def _batch(
        self, piece: _Piece, shard: Shard, images: pa.Array | list[Fetched] | None, stats: ReadStats
    ) -> pa.RecordBatch:
        rows = len(piece)
        uids = [
            row_uid(shard.path, key, occurrence) for key, occurrence in zip(piece.keys, piece.occurrences, strict=True)
        ]
        error_class: list[str | None] | pa.Array = pa.nulls(rows, pa.string())
        error: list[str | None] | pa.Array = pa.nulls(rows, pa.string())
        if images is None:
            images = pa.nulls(rows, pa.large_binary())
        elif piece.problem is not None:
            images = pa.nulls(rows, pa.large_binary())
            error_class, error = [READ_ERROR] * rows, [piece.problem] * rows
        elif isinstance(images, list):
            error_class, error = [item.error_class for item in images], [item.error for item in images]
            images = image_array([item.data for item in images])
        elif images.null_count:
            missing = images.is_null().to_pylist()
            error_class = [MISSING_IMAGE if absent else None for absent in missing]
            error = [f"column {self.plan['image']} is null in this row" if absent else None for absent in missing]
        columns, misfits = fit_batch(piece.rest, self.columns)
        if misfits is not None:
            stats.misfits += sum(1 for text in misfits if text is not None)
        prefix = [
            pa.array(piece.numbers, pa.int64()),
            pa.array(piece.keys, pa.string()),
            self._uids(piece.rest, uids),
            images,
            self._captions(piece.rest),
            pa.array(error_class, pa.string()),
            pa.array(error, pa.string()),
            pa.array(misfits or [None] * rows, pa.string()),
        ]
        return pa.RecordBatch.from_arrays([*prefix, *columns], schema=self._schema)

    def _uids(self, rest: pa.RecordBatch, hashed: list[str]) -> pa.Array:
        own = pa.array(hashed, pa.string())
        name = self.plan["uid"]
        place = rest.schema.get_field_index(name) if name is not None else -1
        if place < 0:
            return own
        given = rest.column(place)
        given = plain_text(given) if is_textual(given.type) else pc.cast(given, pa.string())
        guessed = self.options.uid_column is None
        good = pc.match_substring_regex(given, UID_PATTERN) if guessed else pc.not_equal(given, "")
        return pc.if_else(pc.fill_null(good, False), given, own)

    def _captions(self, rest: pa.RecordBatch) -> pa.Array:
        name = self.plan["caption"]
        place = rest.schema.get_field_index(name) if name is not None else -1
        if place < 0 or not is_caption(rest.schema.field(place).type):
            return pa.nulls(rest.num_rows, pa.list_(pa.string()))
        return caption_lists(rest.column(place))

    def _open(self, shard: Shard, stack: ExitStack) -> pq.ParquetFile:
        """The shard's file; raises ShardError when it cannot be read or is not the one that was planned."""
        url = self.location.url(shard.path)
        try:
            fs, inside = storage.filesystem(url)
            if shard.etag:
                check_unchanged(fs, inside, url, shard.etag)
            handle = inside if storage.is_local(url) else stack.enter_context(fs.open(inside, "rb"))
            file = pq.ParquetFile(handle, pre_buffer=False, buffer_size=BUFFER)
            groups = [file.metadata.row_group(group).total_byte_size for group in shard.row_groups]
            if groups and max(groups) <= _STREAMED:
                file.close()
                file = pq.ParquetFile(handle, metadata=file.metadata, pre_buffer=True)
        except ShardError:
            raise
        except FileNotFoundError as error:
            raise ShardError(f"{url} does not exist any more.") from error
        except Exception as error:  # every filesystem has exceptions of its own
            raise ShardError(f"{url} is not a readable Parquet file: {one_line(error)}") from error
        stack.callback(file.close)
        if shard.stop is None:
            raise ShardError(f"{url} could not be read when it was listed, but can now; run again.")
        return file

    def _pieces(
        self, file: pq.ParquetFile, shard: Shard, rows: Sequence[int] | None, images: bool, stats: ReadStats
    ) -> Iterator[_Piece]:
        column = self.plan["image"]
        wanted = None if rows is None else _wanted(rows)
        for part in self._groups(file, shard, stats):
            numbers = part.numbers if wanted is None else part.numbers[np.isin(part.numbers, wanted)]
            numbers = numbers[numbers >= 0]
            if not len(numbers):
                continue
            done = 0
            problem = part.problem
            if problem is None:
                selected = None if images else columns_without(file.schema_arrow, column)
                try:
                    for batch, inside in self._batches(file, part, selected):
                        chosen = np.flatnonzero(np.isin(part.numbers[inside], numbers) & (part.numbers[inside] >= 0))
                        if len(chosen):
                            if len(chosen) < batch.num_rows:
                                batch = batch.take(pa.array(chosen))
                            yield self._piece(batch, part, inside.start + chosen, images)
                            done += len(chosen)
                except (OSError, pa.ArrowException) as error:
                    problem = self._lost(shard, part.group, error)
            if problem is not None:
                lost = numbers[done:]
                places = (
                    np.searchsorted(part.numbers, lost)
                    if (part.numbers >= 0).all()
                    else np.flatnonzero(np.isin(part.numbers, lost))
                )
                yield _Piece(
                    empty_rows(len(lost)),
                    lost,
                    [part.keys[place] for place in places],
                    [part.occurrences[place] for place in places],
                    None,
                    [None] * len(lost),
                    problem,
                )

    def _lost(self, shard: Shard, group: int, error: Exception) -> str:
        """What the rows of a damaged row group are told; ShardError where it may be the network that fails."""
        if not storage.is_local(self.location.root):
            raise ShardError(f"{self.location.url(shard.path)} cannot be read: {error}") from error
        return f"row group {group} cannot be read: {one_line(error)}"

    def _groups(self, file: pq.ParquetFile, shard: Shard, stats: ReadStats) -> Iterator[_Group]:
        """The identity of the shard's rows, a row group at a time: cf_row (-1: not downloaded) and keys."""
        names = [self.plan["key"], "status" if self.plan["downloads"] else None]
        present = [name for name in names if name is not None and name in file.schema_arrow.names]
        first = (
            sum(file.metadata.row_group(group).num_rows for group in range(shard.row_groups[0]))
            if shard.row_groups
            else 0
        )
        counted = 0
        seen: dict[str, int] = {}
        for group in shard.row_groups:
            rows = file.metadata.row_group(group).num_rows
            low = max(0, shard.start - first)
            high = min(rows, (shard.stop or 0) - first)
            keys = [str(first + row) for row in range(low, high)]
            occurrences = [1] * (high - low)
            numbers = np.arange(counted, counted + high - low)
            problem = None
            if present:
                try:
                    table = file.read_row_group(group, columns=present).slice(low, high - low)
                except (OSError, pa.ArrowException) as error:
                    problem, table = self._lost(shard, group, error), None
                if table is not None and self.plan["downloads"] and "status" in present:
                    good = pc.fill_null(pc.equal(table["status"], img2dataset.SUCCESS), False).to_numpy()
                    stats.not_downloaded += int((~good).sum())
                    numbers = np.where(good, counted + np.cumsum(good) - 1, -1)
                if table is not None and self.plan["key"] in present:
                    own = [key if isinstance(key, str) else None for key in table[self.plan["key"]].to_pylist()]
                    keys = [key or fallback for key, fallback in zip(own, keys, strict=True)]
                    for place, number in enumerate(numbers):
                        if number >= 0:
                            occurrences[place] = seen[keys[place]] = seen.get(keys[place], 0) + 1
                    stats.duplicate_keys += sum(1 for place in occurrences if place > 1)
            counted += int((numbers >= 0).sum())
            yield _Group(group, low, high, numbers, keys, occurrences, problem)
            first += rows

    def _batches(
        self, file: pq.ParquetFile, part: _Group, columns: list[str] | None
    ) -> Iterator[tuple[pa.RecordBatch, slice]]:
        """Batches of the part's row range with their places in it; as many rows as the average image size allows."""
        metadata = file.metadata.row_group(part.group)
        average = max(1, metadata.total_byte_size // max(1, metadata.num_rows))
        size = max(1, min(self.options.max_batch_rows, self.options.max_batch_bytes // average))
        position = 0
        for batch in file.iter_batches(batch_size=size, row_groups=[part.group], columns=columns):
            low, high = max(part.low, position), min(part.high, position + batch.num_rows)
            if low < high:
                yield batch.slice(low - position, high - low), slice(low - part.low, high - part.low)
            position += batch.num_rows
            if position >= part.high:
                return

    def _piece(self, batch: pa.RecordBatch, part: _Group, places: np.ndarray, images: bool) -> _Piece:
        held, names, rest = split_batch(batch, self.plan["image"])
        if not images:
            held = names = None
        keys = [part.keys[place] for place in places]
        occurrences = [part.occurrences[place] for place in places]
        return _Piece(rest, part.numbers[places], keys, occurrences, held, names)

    def copy_rows(self, shard: Shard, rows: Sequence[int], target: Path) -> int:
        """Write these rows as a Parquet file with the source file's own schema, metadata and codecs.

        Relative image paths stay as they are; where they lead is noted in the file's metadata, and read from there.
        """
        wanted = _wanted(rows)
        count = 0
        with ExitStack() as stack:
            file = self._open(shard, stack)
            schema = file.schema_arrow
            if self.plan["how"] != "bytes":
                roots = "\n".join(dict.fromkeys(self._roots(shard, schema)))
                schema = schema.with_metadata({**(schema.metadata or {}), _ROOTS: roots.encode()})
            writer = stack.enter_context(pq.ParquetWriter(target, schema, **_writer_options(file, self.plan["image"])))
            pending: list[pa.RecordBatch] = []
            held = size = 0
            for part in self._groups(file, shard, ReadStats()):
                if not np.isin(part.numbers, wanted).any():
                    continue
                for batch, inside in self._batches(file, part, None):
                    chosen = np.flatnonzero(np.isin(part.numbers[inside], wanted))
                    if not len(chosen):
                        continue
                    batch = batch.take(pa.array(chosen))
                    pending.append(batch)
                    held += batch.num_rows
                    size += batch.nbytes
                    if held >= _COPY_ROWS or size >= self.options.max_batch_bytes:
                        count += _flush(writer, pending, schema)
                        pending, held, size = [], 0, 0
            count += _flush(writer, pending, schema)
        if count != len(wanted):
            raise IndexError(f"{len(wanted) - count} of the rows to copy are not in shard {shard.id}")
        return count


@dataclass
class _Group:
    """Rows [low, high) of one row group: their cf_row (-1 for rows that were never downloaded) and keys."""

    group: int
    low: int
    high: int
    numbers: np.ndarray
    keys: list[str]
    occurrences: list[int]
    problem: str | None


def _flush(writer: pq.ParquetWriter, batches: list[pa.RecordBatch], schema: pa.Schema) -> int:
    if not batches:
        return 0
    table = pa.Table.from_batches(batches).replace_schema_metadata(schema.metadata)
    writer.write_table(only_used(table.cast(schema)), row_group_size=max(1, table.num_rows))
    return int(table.num_rows)


def _writer_options(file: pq.ParquetFile, image: str) -> dict[str, Any]:
    """Codecs as in the source file; no dictionary and no statistics for the images, where they only cost."""
    paths = [file.schema.column(number).path for number in range(len(file.schema))]
    others = [path for path in paths if path.split(".")[0] != image]
    codecs: dict[str, str] = {}
    if file.metadata.num_row_groups:
        group = file.metadata.row_group(0)
        for number, path in enumerate(paths):
            codec = group.column(number).compression.lower()
            codecs[path] = codec if codec in ("snappy", "gzip", "brotli", "lz4", "zstd") else "none"
    return {"compression": codecs or "snappy", "use_dictionary": others, "write_statistics": others}


def _wanted(rows: Sequence[int]) -> np.ndarray:
    wanted = np.unique(np.asarray(rows, dtype=np.int64))
    if len(wanted) and wanted[0] < 0:
        raise IndexError(f"row {wanted[0]} is negative")
    return wanted
