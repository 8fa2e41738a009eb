"""Image folders, and img2dataset's `files` output: captions from files beside the image or from a table."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from clipfilter import storage
from clipfilter.errors import MISSING_IMAGE, ClipfilterError, RefusedError, RowError, ShardError
from clipfilter.sources import img2dataset, tables
from clipfilter.sources.discover import Entry, Folder, Found, Location, below, is_image_name, why_passed
from clipfilter.sources.fetch import Fetched, fetch_in_order, fetch_url, read_url
from clipfilter.sources.model import ReadStats, Shard, SourceOptions, shard_id
from clipfilter.sources.records import (
    CAPTION_NAMES,
    Row,
    batches,
    check_field,
    chosen_rows,
    clean_captions,
    decode_text,
    parse_json,
    record_captions,
    record_uid,
    travelling,
)
from clipfilter.sources.schema import infer_record_schema
from clipfilter.sources.seen import Seen

_TEXT_SUFFIXES = (".txt", ".caption")
_SIDECAR_SUFFIXES = (*_TEXT_SUFFIXES, ".json")
_SAMPLE_IMAGES = 200
_SAMPLE_TABLE_ROWS = 1000
_REMEMBERED_FOLDERS = 1000


class _Job(NamedTuple):
    """An image to read: its path below the root, its rows in caption tables, and the files of its stem."""

    number: int
    path: str
    rows: list[dict[str, Any]]
    files: list[str]


class _Loaded(NamedTuple):
    job: _Job
    image: Fetched
    record: dict[str, Any]
    unfit: dict[str, Any] | None
    texts: list[str]


class ImageFolder:
    """A tree of image files. The key is the path below the root (img2dataset: the basename up to its first dot)."""

    def __init__(self, location: Location, options: SourceOptions, columns: pa.Schema, plan: dict[str, Any]) -> None:
        self.location, self.options, self.columns, self.plan = location, options, columns, plan
        self._tables: dict[str, list[tables.Table]] = {}
        self._beside: dict[str, set[str]] = {}

    @classmethod
    def infer(cls, location: Location, options: SourceOptions, found: Found) -> ImageFolder:
        """Freeze columns from the first images' sidecars and the tables beside them; raises RefusedError."""
        if options.image_column is not None:
            raise RefusedError("--image-column does not apply to an image folder: every image file in it is a row.")
        downloaded = found.kind == "img2dataset-files"
        plan: dict[str, Any] = {
            "kind": found.kind,
            "img2dataset": downloaded,
            "stats": found.stats,
            "caption_guesses": [],
            "has_captions": None,
        }
        source = cls(location, options, pa.schema([]), plan)
        records: list[dict[str, Any]] = []
        captioned = False
        for folder in [] if downloaded else _sampled_folders(location, found.images):
            for name in tables.tables_of(folder):
                records += tables.sample(location.root, name, _SAMPLE_TABLE_ROWS)
        source.columns = infer_record_schema(records)  # the csv columns' types, for what follows
        for number, image in enumerate(found.images[:_SAMPLE_IMAGES]):
            record, _, texts = source._read_beside(source._job(number, image))
            records.append(record)
            captioned |= any(text.strip() for text in texts)
        source._tables.clear()  # they were read before the column types were known
        stems = [path.rpartition(".")[0] for path, _ in found.parquets] if downloaded else []
        columns, fields = travelling(records, img2dataset.sidecar_schema(location, stems))
        check_field(options.caption_column, "--caption-column", fields, location.root)
        check_field(options.uid_column, "--uid-column", fields, location.root)
        guesses = [name for name in CAPTION_NAMES if name in fields]
        source.plan["caption_guesses"] = guesses
        source.plan["has_captions"] = bool(
            captioned or options.caption_column or any(record_captions(record, [], None, guesses) for record in records)
        )
        source.columns = columns
        return source

    # --- planning ---------------------------------------------------------------------------------------------------

    def iter_shards(self, listing: Seen) -> Iterator[Shard]:
        """Pictures are counted where their shard is read, all other files here: what speaks of a picture is a part."""
        if self.plan["img2dataset"]:
            yield from self._downloaded_shards(listing)
            return
        size = self.options.rows_per_shard
        pending: list[tuple[str, Entry]] = []
        extra: dict[str, str] = {}  # the tables and sidecars of the pending images, with their etags
        tables_of: dict[str, dict[str, str]] = {}
        count = 0
        for folder in self.location.walk(listing):
            own = _tables_with_etags(folder)
            if own:
                tables_of[folder.path] = own
            _count_others(folder, own, listing)
            sidecars = _sidecar_etags(folder)
            for entry in folder.files:
                if not is_image_name(entry.name):
                    continue
                path = below(folder.path, entry.name)
                pending.append((path, entry))
                extra.update(sidecars.get(path.rpartition(".")[0], {}))
                for place in _upwards(folder.path):
                    extra.update(tables_of.get(place, {}))
                if len(pending) == size:
                    yield _chunk(".", pending, extra, count, size)
                    count += size
                    pending, extra = [], {}
        if pending:
            yield _chunk(".", pending, extra, count, size)

    def _downloaded_shards(self, listing: Seen) -> Iterator[Shard]:
        """img2dataset's `files`: one shard per folder with images or with a sidecar; larger ones in chunks."""
        size = self.options.rows_per_shard
        expected: set[str] = set()
        for folder in self.location.walk(listing):
            names = {entry.name for entry in folder.files}
            expected.update(below(folder.path, name) for name in folder.folders if name + ".parquet" in names)
            images = [(entry.name, entry) for entry in folder.files if is_image_name(entry.name)]
            around = names.union(folder.folders)
            _count_others(
                folder, {below(folder.path, name) for name in names if img2dataset.is_sidecar(around, name)}, listing
            )
            sidecars = _sidecar_etags(folder)
            if not images and folder.path in expected:  # nothing could be downloaded; its failures still count
                yield _chunk(folder.path, [], {}, 0, size)
            for start in range(0, len(images), size):
                part = images[start : start + size]
                extra: dict[str, str] = {}
                for name, _ in part:
                    extra.update(sidecars.get(below(folder.path, name).rpartition(".")[0], {}))
                yield _chunk(folder.path or ".", part, extra, start, size)

    # --- reading ----------------------------------------------------------------------------------------------------

    def read(
        self, shard: Shard, rows: Sequence[int] | None, images: bool, stats: ReadStats
    ) -> Iterator[pa.RecordBatch]:
        sidecar = None
        if self.plan["img2dataset"]:
            sidecar = img2dataset.Sidecar.open(self.location, shard.path, self.plan["stats"])
            stats.unfinished = sidecar.unfinished
            if shard.start == 0:  # the first chunk of the folder speaks for all of it
                stats.not_downloaded = sidecar.not_downloaded
        stats.seen.rows = len(shard.members)
        numbers = range(len(shard.members)) if rows is None else chosen_rows(rows, len(shard.members))
        yield from batches(self._rows(shard, numbers, images, sidecar, stats), self.columns, self.options, stats)

    def _rows(
        self,
        shard: Shard,
        numbers: Sequence[int],
        images: bool,
        sidecar: img2dataset.Sidecar | None,
        stats: ReadStats,
    ) -> Iterator[Row]:
        occurrences = _occurrences(shard.members) if sidecar is not None else {}
        stats.duplicate_keys = len(occurrences)

        def load(job: _Job) -> _Loaded:
            image = fetch_url(self.location.url(job.path)) if images else Fetched(None)
            return _Loaded(job, image, *self._read_beside(job))

        jobs = (self._job(number, self._path(shard, number)) for number in numbers)
        size = self.options.max_batch_bytes
        for job, image, record, unfit, texts in fetch_in_order(
            jobs, load, size, lambda row: len(row.image.data or b"")
        ):
            key = job.path
            if sidecar is not None:
                key = _key(job.path)
                if not record and unfit is None:
                    record = sidecar.record(key)
            captions = record_captions(record, texts, self.options.caption_column, self.plan["caption_guesses"])
            for other in job.rows[1:]:  # a table may name an image several times, once per caption
                more = record_captions(other, [], self.options.caption_column, self.plan["caption_guesses"])
                captions = clean_captions([*(captions or []), *(more or [])])
            uid = record_uid(record, self.options.uid_column, shard.path, key, occurrences.get(job.number, 1))
            key = key.encode("utf-8", "backslashreplace").decode("utf-8")
            yield Row(job.number, key, uid, image.data, captions, record, image.error_class, image.error, unfit)

    def _path(self, shard: Shard, number: int) -> str:
        member = shard.members[number]
        return member if shard.path == "." else below(shard.path, member)

    def _job(self, number: int, path: str) -> _Job:
        """What is known of an image from listings and tables, before any of its files is opened."""
        return _Job(number, path, self._table_rows(path), self._files_of(path))

    def _files_of(self, path: str) -> list[str]:
        """The text and JSON files of an image's stem."""
        folder, _, base = path.rpartition("/")
        stem = base.rpartition(".")[0]
        beside = self._names(folder)
        return [below(folder, stem + suffix) for suffix in _SIDECAR_SUFFIXES if stem + suffix in beside]

    def _read_beside(self, job: _Job) -> tuple[dict[str, Any], dict[str, Any] | None, list[str]]:
        """(fields, what could not be parsed, caption texts) from the tables and the files of the image's stem."""
        record: dict[str, Any] = dict(job.rows[0]) if job.rows else {}
        unfit: dict[str, Any] | None = None
        texts: list[str] = []
        for path in job.files:
            data = self._file(path)
            if path.endswith(".json"):
                fields, unfit = parse_json(data)
                record.update(fields)
            else:
                texts.append(decode_text(data))
        return record, unfit, texts

    def _table_rows(self, image: str) -> list[dict[str, Any]]:
        if self.plan["img2dataset"]:
            return []
        for place in _upwards(image.rpartition("/")[0]):
            for table in self._tables_in(place):
                rows = table.find(image)
                if rows:
                    return rows
        return []

    def _tables_in(self, folder: str) -> list[tables.Table]:
        found = self._tables.get(folder)
        if found is None:
            listed = Folder(folder, [], [Entry(name, 0, "") for name in sorted(self._names(folder))])
            found = [tables.load(self.location.root, path, self.columns) for path in tables.tables_of(listed)]
            self._tables[folder] = found
        return found

    def _names(self, folder: str) -> set[str]:
        """The names of the files that may speak of images in `folder`, listed once."""
        found = self._beside.get(folder)
        if found is None:
            if len(self._beside) > _REMEMBERED_FOLDERS:
                self._beside.clear()
                self._tables = {place: found for place, found in self._tables.items() if found}
            try:
                fs, path = storage.filesystem(self.location.url(folder))
                entries = fs.ls(path, detail=False)
            except Exception as error:  # every filesystem has exceptions of its own
                raise ShardError(f"{self.location.url(folder)} cannot be listed: {error}") from error
            names = (entry.rstrip("/").rpartition("/")[2] for entry in entries)
            found = {
                name
                for name in names
                if name.lower().endswith((*_SIDECAR_SUFFIXES, *tables.SUFFIXES)) and name[0] != "."
            }
            self._beside[folder] = found
        return found

    def _file(self, path: str) -> bytes:
        try:
            return read_url(self.location.url(path))
        except RowError as error:
            if error.error_class == MISSING_IMAGE:
                return b""
            raise ShardError(f"{self.location.url(path)} cannot be read: {error.message}") from error

    # --- copying ----------------------------------------------------------------------------------------------------

    def copy_rows(self, shard: Shard, rows: Sequence[int], target: Path) -> int:
        """Copy these images below the folder `target`, their paths kept, with their text and JSON files and with the
        lines of the caption tables that speak of them."""
        chosen = [self._path(shard, number) for number in chosen_rows(rows, len(shard.members))]
        for name in dict.fromkeys(name for path in chosen for name in (path, *self._files_of(path))):
            self._copy(name, target / name)
        if not self.plan["img2dataset"]:
            folders = dict.fromkeys(place for path in chosen for place in _upwards(path.rpartition("/")[0]))
            for table in [table for folder in folders for table in self._tables_in(folder)]:
                self._copy_table(table.path, chosen, target / table.path)
        return len(chosen)

    def _copy(self, name: str, target: Path) -> None:
        fs, path = storage.filesystem(self.location.url(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with fs.open(path, "rb") as source, open(target, "wb") as output:
                shutil.copyfileobj(source, output, 1 << 20)
        except ClipfilterError:
            raise
        except Exception as error:  # every filesystem has exceptions of its own
            raise ShardError(f"{self.location.url(name)} cannot be copied: {error}") from error

    def _copy_table(self, name: str, images: Sequence[str], target: Path) -> None:
        folder = name.rpartition("/")[0]
        inside = [image for image in images if not folder or image.startswith(folder + "/")]
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target, "w", encoding="utf-8", newline="") as output:
            count = tables.copy(self.location.root, name, inside, output)
        if not count:
            target.unlink()


def _upwards(folder: str) -> Iterator[str]:
    """`a/b`, `a`, "" (the root)."""
    while folder:
        yield folder
        folder = folder.rpartition("/")[0]
    yield ""


def _key(path: str) -> str:
    """img2dataset's key: the basename up to its first dot."""
    return path.rpartition("/")[2].partition(".")[0]


def _occurrences(members: Sequence[str]) -> dict[int, int]:
    """Member number -> how often its key was there up to it, for keys that occur again."""
    seen: dict[str, int] = {}
    again = {}
    for number, name in enumerate(members):
        key = _key(name)
        seen[key] = seen.get(key, 0) + 1
        if seen[key] > 1:
            again[number] = seen[key]
    return again


def _chunk(path: str, images: list[tuple[str, Entry]], extra: dict[str, str], start: int, size: int) -> Shard:
    """A shard of listed images. Its id names the full range, so that files added at the end change its etag alone."""
    digest = hashlib.sha256()
    for name, entry in images:
        digest.update(f"{name}\0{entry.size}\0{entry.etag}\n".encode("utf-8", "surrogateescape"))
    for name, etag in sorted(extra.items()):
        digest.update(f"{name}\0{etag}\n".encode("utf-8", "surrogateescape"))
    return Shard(
        shard_id(path, start, start + size),
        path,
        "folder",
        start,
        start + len(images),
        members=tuple(name for name, _ in images),
        size=sum(entry.size for _, entry in images),
        etag=digest.hexdigest()[:32],
    )


def _count_others(folder: Folder, own: Collection[str], listing: Seen) -> None:
    """Count a folder's files that are no pictures. own: tables and sidecars of the whole folder, by path."""
    stems = {_stem(entry.name) for entry in folder.files if is_image_name(entry.name)}
    for entry in folder.files:
        if is_image_name(entry.name):
            continue
        path = below(folder.path, entry.name)
        if path in own or (entry.name.endswith(_SIDECAR_SUFFIXES) and _stem(entry.name) in stems):
            listing.parts += 1
        else:
            listing.pass_over(why_passed(entry), path)


def _stem(name: str) -> str:
    return name.rpartition(".")[0] or name


def _tables_with_etags(folder: Folder) -> dict[str, str]:
    etags = {below(folder.path, entry.name): entry.etag for entry in folder.files}
    return {path: etags[path] for path in tables.tables_of(folder)}


def _sidecar_etags(folder: Folder) -> dict[str, dict[str, str]]:
    """Image path without its ending -> the text and JSON files of that stem, with etags."""
    found: dict[str, dict[str, str]] = {}
    for entry in folder.files:
        if entry.name.lower().endswith(_SIDECAR_SUFFIXES):
            path = below(folder.path, entry.name)
            found.setdefault(path.rpartition(".")[0], {})[path] = entry.etag
    return found


def _sampled_folders(location: Location, images: Sequence[str]) -> Iterator[Folder]:
    """The root and the folders of the sampled images, listed flat."""
    for path in dict.fromkeys(["", *(image.rpartition("/")[0] for image in images)]):
        fs, inside = storage.filesystem(location.url(path))
        names = sorted(entry.rstrip("/").rpartition("/")[2] for entry in fs.ls(inside, detail=False))
        yield Folder(path, [], [Entry(name, 0, "") for name in names if not name.startswith(".")])
