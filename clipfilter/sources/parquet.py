"""Tables in Parquet and Arrow files: images as bytes or base64, or as paths or URLs to fetch.

Shards of Parquet are ranges of rows along row groups; an Arrow file is one. Each element of a list of images is a row.
"""

from __future__ import annotations

import itertools
import json
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clipfilter import storage
from clipfilter.errors import MISSING_IMAGE, READ_ERROR, RowError, ShardError, one_line
from clipfilter.sources import img2dataset
from clipfilter.sources.discover import ARROW_SUFFIXES, PARQUET_SUFFIXES, Entry, Found, Location, below
from clipfilter.sources.fetch import Fetched, Fetcher, fetch_images, read_url
from clipfilter.sources.model import ReadStats, Shard, SourceOptions, row_uid, shard_id
from clipfilter.sources.parquet_columns import (
    columns_without,
    copied,
    copied_schema,
    empty_rows,
    explode,
    find_caption,
    find_image,
    find_uid,
    first_readable,
    first_rows,
    flat_schema,
    is_arrow,
    is_caption,
    is_exploded,
    is_textual,
    may_name,
    refuse_what_parquet_lacks,
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
from clipfilter.sources.table_files import ArrowTable, Group, ParquetTable, TableFile

_KEY_NAMES = ("key", "__key__")
_ROOTS = b"clipfilter.image_roots"  # where relative paths of a copied file lead
_COPY_ROWS = 10_000
_SAVED = ("state.json", "dataset_info.json", "dataset_dict.json")  # beside the Arrow files of `datasets`
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
    parts: list[str | None]  # what tells a row from the others of its list
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
            self.parts[start:stop],
            self.problem,
        )


class Parquet:
    """A source of Parquet files that share the first one's schema, more or less."""

    def __init__(self, location: Location, options: SourceOptions, columns: pa.Schema, plan: dict[str, Any]) -> None:
        self.location, self.options, self.columns, self.plan = location, options, columns, plan
        self._schema = full_schema(columns)

    @classmethod
    def infer(cls, location: Location, options: SourceOptions, found: Found) -> Self:
        """Freeze the first readable file's schema and find the image, caption, key and uid columns."""
        with ExitStack() as stack:
            return cls.of_file(location, options, found, *first_readable(location, found, stack))

    @classmethod
    def of_file(cls, location: Location, options: SourceOptions, found: Found, file: TableFile, path: str) -> Self:
        """A source of files like this one."""
        schema = file.schema
        sample = first_rows(file)
        where = location.url(path)
        column, how = find_image(schema, sample, options.image_column, where)
        caption = find_caption(schema, options.caption_column, None if how == "names" else column, where)
        uid = find_uid(schema, options.uid_column, sample, where)
        columns = freeze(rest_schema(schema, column, how))
        refuse_what_parquet_lacks(columns, where)
        names = set(schema.names)
        key = next((name for name in _KEY_NAMES if name in names and is_textual(schema.field(name).type)), None)
        downloads = how == "bytes" and {"key", "status", "error_message"} <= names
        plan = {
            "kind": "img2dataset-parquet" if downloads else found.kind if found.kind == "arrow" else "parquet",
            "stats": downloads and found.stats,
            "image": column,
            "how": how,
            "caption": caption,
            "uid": uid,
            "key": key,
            "downloads": downloads,
            "has_captions": caption is not None,
        }
        return cls(location, options, columns, plan)

    def iter_shards(self, listing: Seen) -> Iterator[Shard]:
        # Parquet beside Arrow files would have been taken in place of them: what is here is a copy that a run made.
        suffixes = (*ARROW_SUFFIXES, *PARQUET_SUFFIXES) if self.plan["kind"] == "arrow" else PARQUET_SUFFIXES
        saved: dict[str, set[str] | None] = {}
        for path, entry in self.location.containers(suffixes, listing, self._is_part):
            if is_arrow(path):
                yield from self._arrow_file(path, entry, saved, listing)
                continue
            try:
                fs, inside = storage.filesystem(self.location.url(path))
                with fs.open(inside, "rb") as handle:
                    metadata = pq.read_metadata(handle)
            except (OSError, pa.ArrowException, ValueError):
                yield Shard(shard_id(path), path, "parquet", size=entry.size, etag=entry.etag)
                continue
            yield from self._split(path, entry, metadata)

    def _is_part(self, names: Collection[str], name: str) -> bool:
        return name in _SAVED if self.plan["kind"] == "arrow" else img2dataset.is_sidecar(names, name)

    def _arrow_file(self, path: str, entry: Entry, saved: dict[str, set[str] | None], listing: Seen) -> Iterator[Shard]:
        """An Arrow file is a shard, unless a `state.json` of `datasets` beside it does not name it. saved: by folder."""
        folder, _, name = path.rpartition("/")
        if folder not in saved:
            saved[folder] = _saved_files(self.location, folder)
        files = saved[folder]
        if files is not None and name not in files:
            listing.containers -= 1
            listing.pass_over("other_kind", path)
        else:
            yield Shard(shard_id(path), path, "parquet", size=entry.size, etag=entry.etag)

    def _split(self, path: str, entry: Entry, metadata: pq.FileMetaData) -> Iterator[Shard]:
        """Whole row groups together up to rows_per_shard; a far larger row group in equal parts."""
        most = self.options.rows_per_shard
        largest = most * (_SPLIT_NAMES if self.plan["how"] == "names" else _SPLIT_BYTES)
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
        self, pieces: Iterator[_Piece], shard: Shard, file: TableFile, stats: ReadStats
    ) -> Iterator[pa.RecordBatch]:
        """Batches with their images: the bytes at hand, or fetched, then ahead of the batch being handed out."""
        fetch = Fetcher(self._roots(shard, file.schema), private=self.options.private)
        schema = flat_schema(file.schema, self.plan["image"])
        place = schema.get_field_index(self.plan["image"])
        ahead: deque[_Piece] = deque()

        def names() -> Iterator[str | bytes | None]:
            for piece in pieces:
                ahead.append(piece)
                yield from piece.names or ()

        if place >= 0 and is_textual(schema.field(place).type):
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
        columns, misfits = self._fitted(piece.rest)
        if misfits is not None:
            stats.misfits += sum(1 for text in misfits if text is not None)
        prefix = [
            pa.array(piece.numbers, pa.int64()),
            pa.array(piece.keys, pa.string()),
            self._uids(piece, uids),
            images,
            self._captions(piece.rest),
            pa.array(error_class, pa.string()),
            pa.array(error, pa.string()),
            pa.array(misfits or [None] * rows, pa.string()),
        ]
        return pa.RecordBatch.from_arrays([*prefix, *columns], schema=self._schema)

    def _fitted(self, rest: pa.RecordBatch) -> tuple[list[pa.Array], list[str | None] | None]:
        """The travelling columns, and per row the JSON text of what does not fit them, None where all does."""
        return fit_batch(rest, self.columns)

    def _uids(self, piece: _Piece, hashed: list[str]) -> pa.Array:
        """uids of rows; one of several pictures of a sample has one that is made of the sample's and its place."""
        whole = self._sample_uids(piece.rest, pa.array(hashed, pa.string()))
        if not any(piece.parts):
            return whole
        several = zip(whole.to_pylist(), piece.parts, strict=True)
        return pa.array([uid if part is None else row_uid(uid, part) for uid, part in several], pa.string())

    def _sample_uids(self, rest: pa.RecordBatch, own: pa.Array) -> pa.Array:
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

    def _open(self, shard: Shard, stack: ExitStack) -> TableFile:
        """The shard's file; raises ShardError when it cannot be read or is not the one that was planned."""
        url = self.location.url(shard.path)
        arrow = is_arrow(shard.path)
        try:
            fs, inside = storage.filesystem(url)
            if shard.etag:
                check_unchanged(fs, inside, url, shard.etag)
            handle = inside if storage.is_local(url) else stack.enter_context(fs.open(inside, "rb"))
            file: TableFile = ArrowTable(handle) if arrow else ParquetTable(handle, shard.row_groups)
        except ShardError:
            raise
        except FileNotFoundError as error:
            raise ShardError(f"{url} does not exist any more.") from error
        except Exception as error:  # every filesystem has exceptions of its own
            kind = "Arrow" if arrow else "Parquet"
            raise ShardError(f"{url} is not a readable {kind} file: {one_line(error)}") from error
        if shard.stop is None and not arrow:
            raise ShardError(f"{url} could not be read when it was listed, but can now; run again.")
        return file

    def _pieces(
        self, file: TableFile, shard: Shard, rows: Sequence[int] | None, images: bool, stats: ReadStats
    ) -> Iterator[_Piece]:
        image, how = self.plan["image"], self.plan["how"]
        columns = None if images else columns_without(file.schema, image, how)
        for found in self._chosen(file, shard, rows, columns, stats):
            count = len(found.keys)
            names: list[Any] | None = [None] * count
            rest, held = empty_rows(count), None
            if found.batch is not None:
                held, names, rest = split_batch(found.batch, image, how, stats.seen)
                if not images:
                    held = names = None
            yield _Piece(rest, found.numbers, found.keys, found.occurrences, held, names, found.parts, found.problem)

    def _chosen(
        self, file: TableFile, shard: Shard, rows: Sequence[int] | None, columns: list[str] | None, stats: ReadStats
    ) -> Iterator[_Rows]:
        """The rows asked for, one picture each; without a batch those of a group that cannot be read."""
        wanted = None if rows is None else _wanted(rows)
        lists = is_exploded(file.schema, self.plan["image"])
        counted = 0
        for part in self._groups(file, shard, stats):
            if not lists and wanted is not None and not np.isin(part.numbers, wanted).any():
                continue
            done, problem = 0, part.problem
            try:
                for batch in file.batches(part.group, columns, self._batch_rows(part)) if problem is None else ():
                    places = np.arange(done, done + batch.num_rows)
                    found = self._exploded(batch, part, places, counted if lists else None, stats)
                    done += batch.num_rows
                    counted += len(found.keys)
                    yield found.chosen(wanted)
            except (OSError, pa.ArrowException) as error:
                problem = self._lost(shard, part.group.number, error)
            if problem is not None:
                places = np.arange(done, len(part.keys))
                places = places[part.numbers[places] >= 0]
                numbers = counted + np.arange(len(places)) if lists else part.numbers[places]
                counted += len(places)
                stats.seen.rows += len(places) if lists else 0
                keys, occurrences = [part.keys[p] for p in places], [part.occurrences[p] for p in places]
                yield _Rows(None, numbers, keys, occurrences, [None] * len(places), problem).chosen(wanted)

    def _exploded(
        self, batch: pa.RecordBatch, part: _Group, places: np.ndarray, first: int | None, stats: ReadStats
    ) -> _Rows:
        """The rows of a batch; first: the number of the first one, where lists make it unknown beforehand."""
        batch, parents, positions = explode(batch, self.plan["image"])
        keep = part.numbers[places[parents]] >= 0
        if self.options.pictures == "first":
            stats.seen.pass_over("other_picture", count=int((keep & (positions > 0)).sum()))
            keep &= positions <= 0
        if not keep.all():
            batch, parents, positions = batch.take(pa.array(np.flatnonzero(keep))), parents[keep], positions[keep]
        places = places[parents]
        several = first is not None and self.options.pictures == "all"
        parts = [str(at) if several and at >= 0 else None for at in positions.tolist()]
        keys = [part.keys[p] if at is None else f"{part.keys[p]}#{at}" for p, at in zip(places, parts, strict=True)]
        numbers = part.numbers[places] if first is None else first + np.arange(len(places))
        stats.seen.rows += 0 if first is None else len(places)
        return _Rows(batch, numbers, keys, [part.occurrences[p] for p in places], parts)

    def _batch_rows(self, part: _Group) -> int:
        """As many rows as the average image size allows."""
        return max(1, min(self.options.max_batch_rows, self.options.max_batch_bytes // part.group.row_bytes))

    def _lost(self, shard: Shard, group: int, error: Exception) -> str:
        """What the rows of a damaged row group are told; ShardError where it may be the network that fails."""
        if not storage.is_local(self.location.root):
            raise ShardError(f"{self.location.url(shard.path)} cannot be read: {error}") from error
        return f"row group {group} cannot be read: {one_line(error)}"

    def _groups(self, file: TableFile, shard: Shard, stats: ReadStats) -> Iterator[_Group]:
        """The identity of the shard's table rows, a group at a time: cf_row (-1: not downloaded) and keys."""
        names = [self.plan["key"], "status" if self.plan["downloads"] else None]
        present = [name for name in names if name is not None and name in file.schema.names]
        lists = is_exploded(file.schema, self.plan["image"])
        counted = 0
        seen: dict[str, int] = {}
        for group in self._readable(file, shard, stats):
            count = group.high - group.low
            keys = [str(group.first + row) for row in range(group.low, group.high)]
            occurrences = [1] * count
            numbers = np.arange(counted, counted + count)
            problem = None
            if present:
                try:
                    table = file.columns(group, present)
                except (OSError, pa.ArrowException) as error:
                    problem, table = self._lost(shard, group.number, error), None
                if table is not None and self.plan["downloads"] and "status" in present:
                    good = pc.fill_null(pc.equal(table["status"], img2dataset.SUCCESS), False).to_numpy()
                    stats.not_downloaded += int((~good).sum())
                    stats.seen.pass_over("not_downloaded", count=int((~good).sum()))
                    numbers = np.where(good, counted + np.cumsum(good) - 1, -1)
                if table is not None and self.plan["key"] in present:
                    own = [key if isinstance(key, str) else None for key in table[self.plan["key"]].to_pylist()]
                    keys = [key or fallback for key, fallback in zip(own, keys, strict=True)]
                    for place, number in enumerate(numbers):
                        if number >= 0:
                            occurrences[place] = seen[keys[place]] = seen.get(keys[place], 0) + 1
                    stats.duplicate_keys += sum(1 for place in occurrences if place > 1)
            valid = int((numbers >= 0).sum())
            counted += valid
            stats.seen.rows += 0 if lists else valid
            yield _Group(group, numbers, keys, occurrences, problem)

    def _readable(self, file: TableFile, shard: Shard, stats: ReadStats) -> Iterator[Group]:
        """The groups of a shard; an Arrow file ends where it breaks off, as a tar does."""
        read = 0
        try:
            for group in file.groups(shard):
                read += group.row_bytes * (group.high - group.low)
                yield group
        except (OSError, pa.ArrowException) as error:
            if not read:
                raise ShardError(f"{self.location.url(shard.path)} cannot be read: {one_line(error)}") from error
            self._lost(shard, 0, error)
            stats.damaged, stats.bytes_unread = True, max(0, shard.size - read)
            stats.seen.pass_over("unread", shard.path)

    def copy_rows(self, shard: Shard, rows: Sequence[int], target: Path) -> int:
        """Write these rows as a Parquet file with the source file's own schema, metadata and codecs.

        Relative image paths stay as they are; where they lead is noted in the file's metadata, and read from there.
        """
        wanted = _wanted(rows)
        image = self.plan["image"]
        count = 0
        with ExitStack() as stack:
            file = self._open(shard, stack)
            schema = copied_schema(file.schema, image)
            if self.plan["how"] == "names" or may_name(file.schema, image):
                roots = "\n".join(dict.fromkeys(self._roots(shard, schema)))
                schema = schema.with_metadata({**(schema.metadata or {}), _ROOTS: roots.encode()})
            writer = stack.enter_context(pq.ParquetWriter(target, schema, **_writer_options(file, image)))
            pending: list[pa.RecordBatch] = []
            held = size = 0
            for found in self._chosen(file, shard, rows, None, ReadStats()):
                if found.batch is None or not found.batch.num_rows:
                    continue
                pending.append(copied(found.batch, image, schema))
                held += found.batch.num_rows
                size += found.batch.nbytes
                if held >= _COPY_ROWS or size >= self.options.max_batch_bytes:
                    count += _flush(writer, pending)
                    pending, held, size = [], 0, 0
            count += _flush(writer, pending)
        if count != len(wanted):
            raise IndexError(f"{len(wanted) - count} of the rows to copy are not in shard {shard.id}")
        return count


@dataclass
class _Rows:
    """Rows with one picture each; `batch` is None where they cannot be read, for the reason `problem`."""

    batch: pa.RecordBatch | None
    numbers: np.ndarray
    keys: list[str]
    occurrences: list[int]
    parts: list[str | None]
    problem: str | None = None

    def chosen(self, wanted: np.ndarray | None) -> _Rows:
        """Those with these numbers."""
        places = np.flatnonzero(np.isin(self.numbers, wanted)) if wanted is not None else ()
        if wanted is None or len(places) == len(self.keys):
            return self
        return _Rows(
            None if self.batch is None else self.batch.take(pa.array(places)),
            self.numbers[places],
            [self.keys[place] for place in places],
            [self.occurrences[place] for place in places],
            [self.parts[place] for place in places],
            self.problem,
        )


@dataclass
class _Group:
    """The rows of a group: their cf_row (-1 for rows that were never downloaded) and keys."""

    group: Group
    numbers: np.ndarray
    keys: list[str]
    occurrences: list[int]
    problem: str | None


def _flush(writer: pq.ParquetWriter, batches: list[pa.RecordBatch]) -> int:
    if not batches:
        return 0
    table = pa.Table.from_batches(batches)
    writer.write_table(only_used(table), row_group_size=max(1, table.num_rows))
    return int(table.num_rows)


def _writer_options(file: TableFile, image: str) -> dict[str, Any]:
    """Codecs as in the source file; no dictionary and no statistics for the images, where they only cost."""
    if not isinstance(file, ParquetTable):
        names = [item.name for item in file.schema if item.name != image]
        return {"compression": "zstd", "use_dictionary": names, "write_statistics": names}
    metadata, columns = file.file.metadata, file.file.schema
    paths = [columns.column(number).path for number in range(len(columns))]
    others = [path for path in paths if path.split(".")[0] != image]
    codecs: dict[str, str] = {}
    if metadata.num_row_groups:
        group = metadata.row_group(0)
        for number, path in enumerate(paths):
            codec = group.column(number).compression.lower()
            codecs[path] = codec if codec in ("snappy", "gzip", "brotli", "lz4", "zstd") else "none"
    return {"compression": codecs or "snappy", "use_dictionary": others, "write_statistics": others}


def _saved_files(location: Location, folder: str) -> set[str] | None:
    """The files that the `state.json` of a folder names, as `Dataset.save_to_disk` writes it; None where there is none."""
    try:
        state = json.loads(read_url(location.url(below(folder, "state.json"))))
        return {file["filename"] for file in state["_data_files"]}
    except (RowError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _wanted(rows: Sequence[int]) -> np.ndarray:
    wanted = np.unique(np.asarray(rows, dtype=np.int64))
    if len(wanted) and wanted[0] < 0:
        raise IndexError(f"row {wanted[0]} is negative")
    return wanted
